"""The mission files of a run: when they are written, which are kept, and their mean."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.machine import gather
from rwkv_speech.engine.runs import Run, finite_weights
from rwkv_speech.lm.peft import PeftWeights
from rwkv_speech.mission_file import read_mission_file, remove_mission_file, write_mission_file
from rwkv_speech.scoring import MetricKind
from rwkv_speech.scoring.scores import defined
from rwkv_speech.speech.audio import SAMPLE_RATE

LOSS = MetricKind("train_loss", "training loss", higher_is_better=False)


class MissionFiles(Callback):
    """Writes mission files as training goes, and keeps this run's latest and best.

    The best has the best leading score of its mission in validation; without validation, the lowest mean training loss
    since the file before.
    Files of other runs are neither overwritten nor deleted: where a name is taken, the run's number joins it.

    folder: where they go.
    run: the run that they belong to.
    task: whose they are.
    info: what their JSON says, beside step and scores.
    epoch_save: epochs between files.
    save_steps: optimiser steps between files, 0 for none within an epoch.
    leading: the score that validation decides by; None without validation.
    by_loss: whether the training loss decides then, which is that of all missions of the run; else none is best.
    judged_by: what stands for the samples of validation: scores on others are not compared.
    average: how many of the latest to keep, for `write_mean`; 0 and 1: the latest.
    """

    def __init__(
        self,
        folder: Path,
        run: Run,
        task: str,
        info: dict[str, Any],
        *,
        epoch_save: int,
        save_steps: int,
        leading: MetricKind | None = None,
        by_loss: bool = True,
        judged_by: str = "",
        average: int = 0,
    ) -> None:
        self.folder, self.run, self.task = folder, run, task
        self.info = info | {"run": run.id, "run_began": run.began}
        self.epoch_save, self.save_steps, self.leading, self.average = epoch_save, save_steps, leading, average
        self.by_loss, self.judged_by = by_loss, judged_by
        self.written: list[str] = []  # names of the files that are there, oldest first
        self.best: tuple[float, str] | None = None
        self.loss_sum, self.tokens = 0.0, 0.0  # since the latest
        self.longest = 0  # samples of a recording
        self.saved_step, self.loss = 0, math.nan  # of the latest; nan where no step computed one

    @property
    def state_key(self) -> str:
        return f"MissionFiles {self.task}"

    def state_dict(self) -> dict[str, Any]:
        names = ("written", "best", "judged_by", "loss_sum", "tokens", "longest", "saved_step", "loss")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("judged_by") != self.judged_by:
            state_dict = state_dict | {"best": None, "judged_by": self.judged_by}
        for name, value in state_dict.items():
            setattr(self, name, value)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.run.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.loss_sum += outputs["stats"].loss_sum
        self.tokens += outputs["stats"].tokens
        own = (n for n, i in zip(batch.samples, batch.owners, strict=True) if batch.missions[i] == self.task)
        self.longest = max(self.longest, *own, 0)
        if self.save_steps and trainer.global_step % self.save_steps == 0:
            self.save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.epoch_save == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, pl_module)

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, **scores: float) -> None:
        """Writes the file of this step, or adds scores to it; all processes call this together.

        Raises:
            UserError: a weight is not finite; nothing has been written.
        """
        step = trainer.global_step
        if step == self.saved_step and not scores:
            return
        if step != self.saved_step:
            self.saved_step, self.loss = step, self.loss_sum / self.tokens if self.tokens else math.nan
            self.loss_sum = self.tokens = 0.0
        self.longest = max(gather(self.longest))
        self.info["trained_audio_s"] = self.longest / SAMPLE_RATE
        measured = {name: defined(round(value, 6)) for name, value in ({"train_loss": self.loss} | scores).items()}
        info = self.info | {"step": step, "epoch": trainer.current_epoch} | measured
        with finite_weights(trainer, pl_module):
            if trainer.is_global_zero:
                tensors = pl_module.model.trainable_state_dict(self.task, published=True)
                score = scores.get(self.leading.name) if self.leading else self.loss if self.by_loss else None
                self._write(str(step), tensors, info, score, pl_module.model.peft_weights())

    def write_mean(self) -> None:
        """Writes the mean of the latest files as one of its own, `rwkv-adapter-<step>-avg<N>.pth`."""
        names = self.written[-self.average :]
        files = [read_mission_file(self.folder / name) for name in names]
        beside_model = files[-1].peft
        if beside_model:
            beside_model = replace(beside_model, tensors=_mean([file.peft.tensors for file in files]))
        info = self.info | {"step": self.saved_step, "mean_of": names}
        path = self._path(f"{self.saved_step}-avg{len(names)}")
        write_mission_file(path, _mean([file.tensors for file in files]), info, beside_model)

    def _write(
        self,
        step: str,
        tensors: Mapping[str, Tensor],
        info: dict[str, Any],
        score: float | None,
        beside_model: PeftWeights | None,
    ) -> None:
        path = self._path(step)
        kind = self.leading or LOSS
        if score is not None and kind.better(score, self.best[0] if self.best else math.nan):
            self.best = (score, path.name)
        if self.leading and self.best and self.best[1] == path.name:
            info = info | {"best_by": self.leading.name}
        write_mission_file(path, tensors, info, beside_model)
        written = [name for name in self.written if name != path.name] + [path.name]
        keep = {*written[-max(1, self.average) :], *(self.best or ())[1:]}
        for name in written:
            if name not in keep:
                remove_mission_file(self.folder / name)
        self.written = [name for name in written if name in keep]

    def _path(self, step: str) -> Path:
        """A name that is free, or this run's own: without `checkpoints/` the numbers of runs start again from 1."""
        ours = f"-run{self.run.number}"
        suffixes = chain(("", ours), (f"{ours}-{i}" for i in count(2)))
        paths = (self.folder / f"rwkv-adapter-{step}{suffix}.pth" for suffix in suffixes)
        return next(path for path in paths if self._ours(path))

    def _ours(self, path: Path) -> bool:
        """Whether this run may write there: nothing is there, or this run wrote it before it was interrupted."""
        beside = path.with_suffix(".json")
        if not beside.exists():
            return not path.exists() and not path.with_suffix("").exists()
        try:
            return json.loads(beside.read_text()).get("run") == self.run.id
        except (ValueError, AttributeError):
            return False


def _mean(files: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([x[name].double() for x in files]).mean(0).float() for name in files[-1]}
