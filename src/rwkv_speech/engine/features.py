"""Cached encoder frames in a training run: all its processes fill the cache together before the first step."""

from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from rwkv_speech.data.bad_audio import BadAudio
from rwkv_speech.data.utterance import BadSample, Utterance
from rwkv_speech.speech.features import FeatureCache


class FillFeatures(Callback):
    """Computes the frames that the cache lacks, each process on its own device.

    cache: opened, with the encoder of the run.
    utterances: all that the run will read from it.
    bad_audio: takes those that can't be used.
    """

    def __init__(self, cache: FeatureCache, utterances: Sequence[Utterance], bad_audio: BadAudio) -> None:
        self.cache = cache
        self.utterances = [utterance for utterance in utterances if utterance.text.strip()]
        self.bad_audio = bad_audio

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.cache.fill(
            self.utterances,
            device=trainer.strategy.root_device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
            on_bad=lambda utterance, error: self.bad_audio.add(
                [BadSample(utterance.id, str(utterance.audio), str(error))]
            ),
        )
