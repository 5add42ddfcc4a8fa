"""One training run and its place on disk: its settings, its resume points, and whether to go on with it."""

import io
import json
import logging
import re
import secrets
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from rwkv_speech.data.batches import Batch
from rwkv_speech.files import PARTIAL, write_whole
from rwkv_speech.options import Options

log = logging.getLogger("rwkv_speech")


@dataclass(frozen=True)
class Run:
    """A training run.

    number: 1 for the first in a project.
    folder: `checkpoints/run-<number>` in the project, where it keeps its resume point.
    config: the settings that decide what it learns.
    id: a random name, by which it knows its own files again.
    resume_point: the checkpoint to go on from, or None for a new run.
    """

    number: int
    folder: Path
    config: dict[str, Any]
    id: str
    resume_point: Path | None = None

    def begin(self) -> None:
        """Takes the folder. Only one process of a run does this, after all have found their run."""
        self._write(finished=False)

    def finish(self) -> None:
        """Marks the run as done: the same command starts a new one."""
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        content = {"finished": finished, "id": self.id, "options": self.config}
        write_whole(self.folder / "run.json", (json.dumps(content, indent=2) + "\n").encode())


def find_run(options: Options) -> Run:
    """The newest run of the project where it is unfinished and of the same settings; else a new run."""
    config = options.flat(resume_ignored=False)
    checkpoints = options.project / "checkpoints"
    folders = {int(path.name[4:]): path for path in checkpoints.glob("run-*") if path.name[4:].isdecimal()}
    number = max(folders, default=0)
    if number:
        folder = folders[number]
        points = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"step=(\d+)\.ckpt", p.name))}
        point = points[max(points)] if points else None
        try:
            before = {"id": "", **json.loads((folder / "run.json").read_text())}
        except (OSError, ValueError):
            before = {"finished": True, "id": "", "options": {}}
        if not before["finished"] and before["options"] == config:
            log.info("going on with the unfinished run %d from %s", number, point or "its start")
            return Run(number, folder, config, before["id"], point)
        names = config.keys() | before["options"].keys()
        changed = sorted(name for name in names if before["options"].get(name) != config.get(name))
        why = "is finished" if before["finished"] else f"had other {', '.join(changed)}"
        log.info("run %d in %s %s; this is run %d, and leaves its files alone", number, folder, why, number + 1)
    return Run(number + 1, checkpoints / f"run-{number + 1}", config, secrets.token_hex(4))


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what clusters send before they take a machine back


class Interrupted(Exception):  # noqa: N818 - no error
    """The run was asked to stop, and has saved its resume point."""


class StopRequest:
    """Whether this process has been asked to stop; all processes get to know of it with the next step."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """From now on a signal of STOP_SIGNALS asks to stop."""

        def handle(*_: Any) -> None:
            self.requested = True

        for number in STOP_SIGNALS:  # in the place of Lightning's handlers, which puts the former ones back at the end
            signal.signal(number, handle)


class ResumePoints(Checkpoint):
    """Saves all that a run needs to go on exactly where it was; keeps the latest.

    A stop signal is heeded after the optimiser step in which the first process got it: the run saves and stops.

    run: whose folder takes the resume points, `step=<step>.ckpt`.
    save_steps: optimiser steps between them, 0 for none within an epoch.
    stop: takes note of the signals.
    """

    def __init__(self, run: Run, *, save_steps: int, stop: StopRequest) -> None:
        self.run, self.save_steps, self.stop = run, save_steps, stop
        self.step = 0
        self.stop_asked = False  # of any process, by the end of the last step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        self.stop.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.stop_asked = bool(outputs["stats"].stop)
        if trainer.global_step == self.step or trainer.is_last_batch:  # within a step; or an epoch's end is to come
            return
        self.step = trainer.global_step
        if self.stop_asked:
            self._stop(trainer)
        if self.save_steps and self.step % self.save_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            return  # what comes after training is part of the last epoch, and is done again with it
        if self.stop_asked:
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
