"""Validation while training: the loss and the scores of a split, each sample once over all processes."""

import logging
from collections.abc import Mapping
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader

from rwkv_speech.answering import answer_rounds
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.evaluation import record_of
from rwkv_speech.engine.machine import gather
from rwkv_speech.engine.metrics import Metrics, valid_column
from rwkv_speech.engine.mission_files import MissionFiles
from rwkv_speech.errors import UserError
from rwkv_speech.lm import graphs
from rwkv_speech.options import DecodingOptions, TrainingOptions
from rwkv_speech.progress import Progress
from rwkv_speech.scoring import EvalRecord

log = logging.getLogger("rwkv_speech")


class Validation(Callback):
    """Every `valid_steps` optimiser steps, and at the end: scores the model and writes it as a mission file.

    options: how often, and after how many validations without improvement to stop.
    decoding: how to decode: as the evaluation of the same settings will.
    mission_files: of each task; they keep the best by the mission's leading score.
    judged_by: what stands for the samples; scores on others are not compared.
    log_every: seconds between lines of progress.
    metrics: takes the scores.
    bad_samples: takes what can't be used.

    batches: of this process; to be set before training starts.
    """

    batches: DataLoader[Batch]

    def __init__(
        self,
        options: TrainingOptions,
        decoding: DecodingOptions,
        *,
        log_every: float,
        mission_files: Mapping[str, MissionFiles],
        judged_by: str,
        metrics: Metrics,
        bad_samples: BadSamples,
    ) -> None:
        self.options, self.decoding, self.log_every = options, decoding, log_every
        self.mission_files, self.metrics, self.bad_samples = mission_files, metrics, bad_samples
        self.judged_by = judged_by
        self.validated_step = 0
        self.best: dict[str, float] = {}  # leading score of each task
        self.waited = 0  # validations in which none of them got better

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("validated_step", "best", "waited", "judged_by")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("judged_by") != self.judged_by:
            state_dict = {}
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validate_if_due(trainer, pl_module)  # where a stop signal came in between

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._validate_if_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self.validated_step:
            self._validate(trainer, pl_module)

    def _validate_if_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step and step % self.options.valid_steps == 0 and step != self.validated_step:
            self._validate(trainer, module)

    def _validate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        shares = gather((*self._share(module), module.stop.requested))
        loss_sums, tokens, shared, stops = zip(*shares, strict=True)
        if any(stops) and not trainer.should_stop:  # not all was scored: once more when the run goes on
            return
        records = list(chain(*shared))
        if not records:
            raise UserError(
                f"--valid_split: none of its {len(self.batches.dataset)} utterances can be used; mend or leave it out"
            )
        loss, step, better = sum(loss_sums) / sum(tokens), trainer.global_step, False
        measured, said = {"valid_loss": loss}, [f"validation loss {loss:.4f}"]
        for task in module.model.tasks.values():
            scores: dict[str, float] = {}
            if own := [record for record in records if record.mission == task.name]:
                leading = task.mission.score(own).leading
                kind, score = leading.kind, leading.value
                scores[kind.name] = score
                whose = f"{task.name} " if len(module.model.tasks) > 1 else ""
                measured[valid_column(kind, whose.strip())] = score
                said.append(f"{whose}{kind.label} {kind.text(score)}")
                if task.name not in self.best or kind.better(score, self.best[task.name]):
                    self.best[task.name], better = score, True
            self.mission_files[task.name].save(trainer, module, **{"valid_loss": loss} | scores)
        self.validated_step = step
        if trainer.is_global_zero:
            log.info("step %d: %s", step, ", ".join(said))
        self.metrics.record(trainer, measured)
        self.waited = 0 if better else self.waited + 1
        if self.options.early_stop and self.waited >= self.options.early_stop:
            trainer.should_stop = True

    @torch.no_grad()
    def _share(self, module: pl.LightningModule) -> tuple[float, int, list[EvalRecord]]:
        """Summed loss, labels and records of this process's share."""
        model = module.model
        model.language_model.eval()
        loss_sum, tokens, records = 0.0, 0, []
        rows, trainer = self.batches.dataset.rows, module.trainer
        first = trainer.is_global_zero
        with Progress("validation", len(rows), log_every=self.log_every, visible=first, transient=True) as progress:
            for batch in self.batches:
                if module.stop.requested:
                    break
                self.bad_samples.add(batch.bad)
                progress.advance(trainer.world_size * (len(batch) + len(batch.bad)))
                if not len(batch):
                    continue
                batch = batch.to(model.device)
                audio_embeds, _ = model.embed_audio(batch)
                loss_sum += float(model.loss_sum(batch, audio_embeds, longest=self.options.ctx_len))
                tokens += batch.tokens
                answers = answer_rounds(model, batch, self.decoding, audio_embeds)
                for index, rounds, seconds in zip(batch.indices, answers, batch.seconds, strict=True):
                    records.append(record_of(model, rows[index], rounds, seconds=seconds))
        graphs.forget(model.language_model)  # training needs the memory
        return loss_sum, tokens, records
