"""What a training run does beside learning: bad samples, cached frames, losses that are not finite."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import Batch
from rwkv_speech.data.sample import BadSample, Row
from rwkv_speech.errors import UserError
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.speech.audio import Longest
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.speech.recording import Recording
from rwkv_speech.trained import learning

log = logging.getLogger("rwkv_speech")


class ReportBadSamples(Callback):
    """Hands the bad samples of each batch to the policy, before the step."""

    def __init__(self, bad_samples: BadSamples) -> None:
        self.bad_samples = bad_samples

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.bad_samples.add(batch.bad)


class FillFrames(Callback):
    """Computes the encoder's frames that the cache lacks, all processes together before the first step.

    cache: opened, with the encoder of the run.
    wanted: all recordings that the run will read from it, and their rows.
    bad_samples: takes those that can't be used.
    longest: of these, recordings that are longer.
    log_every: seconds between lines of progress.
    """

    def __init__(
        self,
        cache: FrameCache,
        wanted: Sequence[tuple[Recording, Row]],
        bad_samples: BadSamples,
        longest: Longest,
        *,
        log_every: float,
    ) -> None:
        self.cache = cache
        self.wanted = wanted
        self.longest = longest
        self.bad_samples = bad_samples
        self.log_every = log_every

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        rows: dict[str, Row] = {}

        def on_bad(recording: Recording, error: Exception) -> None:
            if not rows:
                rows.update((str(recording), row) for recording, row in self.wanted)
            row = rows[str(recording)]
            self.bad_samples.add([BadSample(row.id, row.place, str(error))])

        self.cache.fill(
            [recording for recording, _ in self.wanted],
            longest=self.longest,
            device=trainer.strategy.root_device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
            on_bad=on_bad,
            log_every=self.log_every,
        )
        self.wanted = ()


class NonFiniteLosses:
    """The policy for a loss that is NaN or infinite, and the record of the batches that gave it.

    policy: "stop" ends the run, "skip" goes on as if the batch had no labels.
    path: JSON-lines file; each line the step, and the ids of one process's batch.
    model: whose weights are looked at: where they are spoilt, nothing can be skipped.

    skipped: steps that had such a batch, and went on without it.
    """

    def __init__(self, policy: str, path: Path, model: SpeechRWKV) -> None:
        self.policy, self.path, self.model = policy, path, model
        self.skipped: set[int] = set()

    def __call__(self, step: int, ids: list[str]) -> None:
        """All processes call it together, with the ids of those batches whose loss is none, else without.

        Raises:
            UserError: the policy is to stop, or a weight is not finite either.
        """
        if ids:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "ids": ids}, ensure_ascii=False) + "\n")
        self.model.language_model.check_weights()
        spoilt = not all(bool(x.isfinite().all()) for x in learning(self.model.trained_tensors()))
        what = f"the loss of step {step} is not finite; the batch is listed in {self.path}"
        if spoilt:
            raise UserError(f"{what}, and the weights are spoilt: start from the last mission file by --adapter, "
                            "with a lower --lr_init")  # fmt: skip
        if self.policy == "stop":
            raise UserError(f"{what}; look at it, or go on without such batches by --on_nonfinite skip")
        log.warning("%s and skipped", what)
        self.skipped.add(step)
