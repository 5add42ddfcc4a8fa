"""One training run and its place on disk: its settings, its resume points, and whether to go on with it."""

import io
import json
import logging
import re
import secrets
import shutil
import signal
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.deepspeed import gathered
from rwkv_speech.engine.lock import is_first_process
from rwkv_speech.errors import UserError
from rwkv_speech.files import PARTIAL, write_whole
from rwkv_speech.options import Options
from rwkv_speech.trained import learning

log = logging.getLogger("rwkv_speech")


@dataclass(frozen=True)
class Run:
    """A training run.

    number: 1 for the first in a project.
    folder: `checkpoints/run-<number>` in the project, where it keeps its resume point.
    config: the settings that decide what it learns, and what stands for its frozen parts.
    id: a random name, by which it knows its own files again.
    began: when, in UTC.
    resume_point: the checkpoint to go on from, or None for a new run.
    """

    number: int
    folder: Path
    config: dict[str, Any]
    id: str
    began: str = ""
    resume_point: Path | None = None

    def begin(self) -> None:
        """Takes the folder. Only one process of a run does this, after all have found their run."""
        self._write(finished=False)

    def finish(self) -> None:
        """Marks the run as done: the same command starts a new one."""
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        content = {"finished": finished, "id": self.id, "began": self.began, "options": self.config}
        write_whole(self.folder / "run.json", (json.dumps(content, indent=2) + "\n").encode())


def find_run(options: Options, frozen: Mapping[str, str | None]) -> Run:
    """The newest run of the project where it is unfinished and of the same settings; else a new run.

    frozen: what stands for the frozen parts, and how they compute.

    Raises:
        UserError: the resume point to go on from is damaged.
    """
    config = options.flat(resume_ignored=False) | dict(frozen)
    checkpoints = options.project / "checkpoints"
    folders = {int(path.name[4:]): path for path in checkpoints.glob("run-*/") if path.name[4:].isdecimal()}
    number = max(folders, default=0)
    if number:
        folder = folders[number]
        points = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(r"step=(\d+)\.ckpt", p.name))}
        point = points[max(points)] if points else None
        why = "has no run.json that can be read"
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            before = json.loads((folder / "run.json").read_text())
            finished, id, began, settings = (before[name] for name in ("finished", "id", "began", "options"))
            changed = sorted(x for x in config.keys() | settings.keys() if settings.get(x) != config.get(x))
            if not finished and not changed:
                if point and is_first_process():
                    _check_whole(point)
                log.info("going on with the unfinished run %d from %s", number, point or "its start")
                return Run(number, folder, config, id, began, point)
            why = "is finished" if finished else f"had other {', '.join(changed)}"
        log.info("run %d in %s %s; this is run %d, and leaves its files alone", number, folder, why, number + 1)
    began = datetime.now(UTC).isoformat(timespec="milliseconds")
    return Run(number + 1, checkpoints / f"run-{number + 1}", config, secrets.token_hex(4), began)


def _check_whole(point: Path) -> None:
    """Holds what was written against its checksums, which loading doesn't look at.

    Raises:
        UserError: a file of the resume point is damaged.
    """
    files = list(point.rglob("*.pt")) if point.is_dir() else [point]
    try:
        whole = bool(files) and not any(zipfile.ZipFile(file).testzip() for file in files)
    except (OSError, ValueError, zipfile.BadZipFile):
        whole = False
    if not whole:
        raise UserError(
            f"{point} is damaged: remove it, and the same command starts its run anew; "
            "or train on from the last mission file by --adapter"
        )


@contextmanager
def finite_weights(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Around saving: what is trained, whole under every strategy. All processes enter it together.

    Raises:
        UserError: a weight is not finite.
    """
    tensors = learning(module.model.trained_tensors())
    with gathered(trainer, tensors):
        if not all(bool(x.isfinite().all()) for x in tensors):
            raise UserError(
                f"the weights after step {trainer.global_step} are not finite, and were not saved: start from the "
                "last mission file by --adapter, with a lower --lr_init"
            )
        yield


# What clusters send before they take a machine back, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 - no error
    """The run was asked to stop, and has saved its resume point."""


class StopRequest:
    """Whether this process has been asked to stop; all processes get to know of it with the next step.

    exit_status: of a run that has been asked to stop: 130 after Ctrl-C, else that of SIGTERM, 143.
    """

    def __init__(self) -> None:
        self.requested = False
        self.exit_status = 128 + signal.SIGTERM

    def listen(self) -> None:
        """From now on a signal of STOP_SIGNALS asks to stop; a second Ctrl-C stops at once."""

        def handle(number: int, _: Any) -> None:
            if number == signal.SIGINT:
                if self.requested:
                    raise KeyboardInterrupt
                self.exit_status = 128 + signal.SIGINT
            self.requested = True

        for number in STOP_SIGNALS:  # in the place of Lightning's handlers, which puts the former ones back at the end
            if signal.getsignal(number) != signal.SIG_IGN:  # as Ctrl-C is in jobs that a shell runs in the background
                signal.signal(number, handle)


class ResumePoints(Checkpoint):
    """Saves all that a run needs to go on exactly where it was; keeps the latest.

    A stop signal is heeded after the optimiser step in which the first process got it: the run saves and stops.
    Where the data is no longer that of the resume point, its place in the epoch means nothing: the epoch starts anew.

    run: whose folder takes the resume points, `step=<step>.ckpt`.
    save_steps: optimiser steps between them, 0 for none within an epoch.
    stop: takes note of the signals.
    data: by name, what decides which sample comes when.
    """

    def __init__(self, run: Run, *, save_steps: int, stop: StopRequest, data: Mapping[str, Any]) -> None:
        self.run, self.save_steps, self.stop, self.data = run, save_steps, stop, dict(data)
        self.step = 0
        self.stop_asked = False  # of any process, by the end of the last step

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.data}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        before = checkpoint["callbacks"].get(self.state_key, {}).get("data", {})
        changed = [name for name in self.data if before.get(name) != self.data[name]]
        if changed:
            epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
            for progress in epochs.values():  # as before the epoch: then Lightning doesn't ask for the loader's place
                progress.update(dict.fromkeys(("ready", "started", "completed"), progress["processed"]))
            if trainer.is_global_zero:
                log.warning(
                    "%s changed since %s was written: weights and optimiser go on, epoch %d starts anew",
                    " and ".join(changed), self.run.resume_point, epochs["current"]["processed"],
                )  # fmt: skip

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
        with finite_weights(trainer, trainer.lightning_module):
            pass
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
