"""What happens beside the training steps: mission files, bad samples, throughput."""

import time
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from rwkv_speech.data.bad_audio import BadAudio
from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.runs import Run
from rwkv_speech.mission import write_mission


class MissionFiles(Callback):
    """Writes mission files as training goes, and keeps this run's latest and best.

    The best is the one behind the lowest mean training loss since the file before. Files of other runs are neither
    overwritten nor deleted: where a name is taken, the run's number joins it.

    folder: where they go.
    run: the run that they belong to.
    info: what their JSON says, beside step and loss.
    epoch_save: epochs between files.
    save_steps: optimiser steps between files, 0 for none within an epoch.
    """

    def __init__(self, folder: Path, run: Run, info: dict[str, Any], *, epoch_save: int, save_steps: int) -> None:
        self.folder, self.run, self.info = folder, run, info
        self.epoch_save, self.save_steps = epoch_save, save_steps
        self.written: list[str] = []  # names of the files that are there
        self.best: tuple[float, str] | None = None
        self.loss_sum, self.tokens = 0.0, 0
        self.saved_step = 0

    def state_dict(self) -> dict[str, Any]:
        names = ("written", "best", "loss_sum", "tokens", "saved_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.run.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.loss_sum += float(pl_module.last_loss_sum)
        self.tokens += batch.tokens
        step = trainer.global_step
        if self.save_steps and step % self.save_steps == 0 and step != self.saved_step:
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.epoch_save == 0 and trainer.global_step != self.saved_step:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, loss = trainer.global_step, self.loss_sum / max(1, self.tokens)
        self.saved_step, self.loss_sum, self.tokens = step, 0.0, 0
        if not trainer.is_global_zero:
            return
        path = self._path(step)
        info = self.info | {"step": step, "epoch": trainer.current_epoch, "train_loss": round(loss, 6)}
        write_mission(path, pl_module.trainable_state_dict(), info)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, path.name)
        keep = {path.name, self.best[1]}
        for name in self.written:
            if name not in keep:
                (self.folder / name).unlink(missing_ok=True)
                (self.folder / name).with_suffix(".json").unlink(missing_ok=True)
        self.written = sorted(keep)

    def _path(self, step: int) -> Path:
        """A name that is this run's, or nobody's: whoever deletes `checkpoints/` starts from run 1 again."""
        ours = f"-run{self.run.number}"
        suffixes = chain(("", ours), (f"{ours}-{i}" for i in count(2)))
        paths = (self.folder / f"rwkv-adapter-{step}{suffix}.pth" for suffix in suffixes)
        return next(p for p in paths if p.name in self.written or not (p.exists() or p.with_suffix(".json").exists()))


class Throughput(Callback):
    """Logs utterances and seconds of audio per second of training, of all processes, over the last steps."""

    def __init__(self) -> None:
        self.utterances = self.seconds = 0.0
        self.since = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.utterances += len(batch)
        self.seconds += batch.seconds
        elapsed = time.perf_counter() - self.since
        if elapsed < 1.0 and batch_idx:
            return
        scale = trainer.world_size / elapsed
        rates = {"utt/s": self.utterances * scale, "audio s/s": self.seconds * scale}
        pl_module.log_dict(rates, prog_bar=True, batch_size=1)
        self.utterances = self.seconds = 0.0
        self.since = time.perf_counter()


class BadSamples(Callback):
    """Hands the bad samples of each batch to the policy, before the step."""

    def __init__(self, bad_audio: BadAudio) -> None:
        self.bad_audio = bad_audio

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.bad_audio.add(batch.bad)
