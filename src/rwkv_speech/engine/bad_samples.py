"""Bad samples of the batches, on their way to the policy."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from rwkv_speech.data.bad_audio import BadAudio
from rwkv_speech.data.batches import Batch


class BadSamples(Callback):
    """Hands the bad samples of each batch to the policy, before the step."""

    def __init__(self, bad_audio: BadAudio) -> None:
        self.bad_audio = bad_audio

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.bad_audio.add(batch.bad)
