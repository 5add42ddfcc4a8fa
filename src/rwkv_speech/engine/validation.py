"""Validation while training: the loss and the scores of a split, each sample once over all processes."""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.machine import gather
from rwkv_speech.engine.metrics import Metrics
from rwkv_speech.engine.mission_files import MissionFiles
from rwkv_speech.errors import UserError
from rwkv_speech.options import DecodingOptions, TrainingOptions
from rwkv_speech.progress import Progress
from rwkv_speech.scoring import EvalRecord

log = logging.getLogger("rwkv_speech")


class Validation(Callback):
    """Every `valid_steps` optimiser steps, and at the end: scores the model and writes it as a mission file.

    options: how often, and after how many validations without improvement to stop.
    decoding: how to decode: as the evaluation of the same settings will.
    mission_files: keeps the best by the mission's leading score.
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
        mission_files: MissionFiles,
        judged_by: str,
        metrics: Metrics,
        bad_samples: BadSamples,
    ) -> None:
        self.options, self.decoding, self.log_every = options, decoding, log_every
        self.mission_files, self.metrics, self.bad_samples = mission_files, metrics, bad_samples
        self.judged_by = judged_by
        self.validated_step = 0
        self.best: float | None = None  # leading score
        self.waited = 0  # validations since then

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
        mission = module.model.mission
        shares = gather((*self._share(module), module.stop.requested))
        loss_sums, tokens, records, stops = zip(*shares, strict=True)
        if any(stops) and not trainer.should_stop:  # not all was scored: once more when the run goes on
            return
        if not any(records):
            raise UserError(
                f"--valid_split: none of its {len(self.batches.dataset)} utterances can be used; mend or leave it out"
            )
        loss = sum(loss_sums) / sum(tokens)
        leading = mission.score([record for share in records for record in share]).leading
        step, kind, score = trainer.global_step, leading.kind, leading.value
        self.validated_step = step
        if trainer.is_global_zero:
            log.info("step %d: validation loss %.4f, %s %s", step, loss, kind.label, kind.text(score))
        self.metrics.record(trainer, {"valid_loss": loss, f"valid_{kind.name}": score})
        self.mission_files.save(trainer, module, **{"valid_loss": loss, kind.name: score})
        if self.best is None or kind.better(score, self.best):
            self.best, self.waited = score, 0
        else:
            self.waited += 1
        if self.options.early_stop and self.waited >= self.options.early_stop:
            trainer.should_stop = True

    @torch.no_grad()
    def _share(self, module: pl.LightningModule) -> tuple[float, int, list[EvalRecord]]:
        """Summed loss, labels and records of this process's share."""
        model = module.model
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
                loss_sum, tokens = loss_sum + float(model.loss_sum(batch, audio_embeds)), tokens + batch.tokens
                results = model.decode(batch, self.decoding, audio_embeds)
                records += [
                    model.mission.record(rows[index], model.text(result), seconds=seconds)
                    for index, result, seconds in zip(batch.indices, results, batch.seconds, strict=True)
                ]
        return loss_sum, tokens, records
