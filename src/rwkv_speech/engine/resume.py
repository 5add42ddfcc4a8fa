"""Resume points, and the end that a cluster's notice puts to a run."""

import io
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.runs import Run
from rwkv_speech.files import PARTIAL, write_whole

log = logging.getLogger("rwkv_speech")

NOTICES = (signal.SIGTERM, signal.SIGUSR1)  # what clusters send before they take a machine back


class Interrupted(Exception):  # noqa: N818 - no error
    """The run was asked to stop, and has saved its resume point."""


class ResumePoints(Checkpoint):
    """Saves all that a run needs to go on exactly where it was; keeps the latest.

    A notice is heeded after the optimiser step in which the first process got it: the run saves and stops.

    run: whose folder takes the resume points, `step=<step>.ckpt`.
    save_steps: optimiser steps between them, 0 for none within an epoch.
    """

    def __init__(self, run: Run, *, save_steps: int) -> None:
        self.run, self.save_steps = run, save_steps
        self.step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

        def notice(*_: Any) -> None:
            pl_module.stop_asked = True

        for number in NOTICES:  # in the place of Lightning's handlers, which puts the former ones back at the end
            signal.signal(number, notice)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step or trainer.is_last_batch:  # within a step; or an epoch's end is to come
            return
        self.step = trainer.global_step
        if pl_module.totals.stop:
            self._stop(trainer)
        if self.save_steps and self.step % self.save_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            return  # what comes after training is part of the last epoch, and is done again with it
        if pl_module.totals.stop:
            self._stop(trainer)
        self._save(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        self._save(trainer)
        raise Interrupted(f"stopped at step {self.step}, as asked; the same command goes on from there")

    def _save(self, trainer: pl.Trainer) -> None:
        path = self.run.folder / f"step={self.step}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in (*self.run.folder.glob("step=*.ckpt"), *self.run.folder.glob(f"*{PARTIAL}")):
                if old != path:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())
