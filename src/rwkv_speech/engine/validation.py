"""Validation while training: the loss and the word error rate of a split, each utterance once over all processes."""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.metrics import Metrics
from rwkv_speech.engine.mission_files import MissionFiles
from rwkv_speech.options import Options
from rwkv_speech.scoring import Edits, EvalRecord, align

log = logging.getLogger("rwkv_speech")


class Validation(Callback):
    """Every `options.valid_steps` optimiser steps, and at the end: scores the model and writes it as a mission file.

    options: how often, how to decode, and after how many validations without improvement to stop.
    mission_files: keeps the best by word error rate.
    metrics: takes the scores.
    bad_audio: takes what can't be used.
    """

    def __init__(
        self,
        options: Options,
        *,
        mission_files: MissionFiles,
        metrics: Metrics,
        bad_audio: BadSamples,
    ) -> None:
        self.options = options
        self.mission_files, self.metrics, self.bad_audio = mission_files, metrics, bad_audio
        self.validated_step = 0
        self.best = float("inf")  # word error rate
        self.waited = 0  # validations since then

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("validated_step", "best", "waited")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validate_if_due(trainer, pl_module)  # where a notice came in between

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._validate_if_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self.validated_step:
            self._validate(trainer, pl_module)

    def _validate_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step and step % self.options.valid_steps == 0 and step != self.validated_step:
            self._validate(trainer, pl_module)

    def _validate(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        loss_sum, tokens, edits = self._score(model)
        here = torch.tensor(
            [loss_sum, tokens, edits.errors, edits.length, model.stop_asked], dtype=torch.float64, device=model.device
        )
        loss_sum, tokens, errors, words, stop = trainer.strategy.reduce(here, reduce_op="sum").tolist()
        if stop and not trainer.should_stop:  # not all was scored: once more when the run goes on
            return
        step, wer, loss = trainer.global_step, errors / max(1, words), loss_sum / max(1, tokens)
        self.validated_step = step
        if trainer.is_global_zero:
            log.info("step %d: validation loss %.4f, WER %.2f %%", step, loss, 100 * wer)
        self.metrics.record(trainer, {"valid_loss": loss, "valid_wer": wer})
        self.mission_files.save(trainer, model, valid_loss=round(loss, 6), wer=round(wer, 6))
        self.best, self.waited = (wer, 0) if wer < self.best else (self.best, self.waited + 1)
        if self.options.early_stop and self.waited >= self.options.early_stop:
            trainer.should_stop = True

    @torch.no_grad()
    def _score(self, model: pl.LightningModule) -> tuple[float, int, Edits]:
        """Summed loss, targets and word edits of this process's share."""
        loss_sum, tokens, edits = 0.0, 0, Edits()
        for batch in self.batches:
            if model.stop_asked:
                break
            self.bad_audio.add(batch.bad)
            if not len(batch):
                continue
            loss, count = model.loss_sum(batch.audio, batch.texts)
            loss_sum, tokens = loss_sum + float(loss), tokens + count
            decoded = model.decode_waveforms(
                batch.audio, max_new_tokens=self.options.max_new_tokens, loop_guard=self.options.loop_guard
            )
            records = [
                EvalRecord(id=id, reference=text, hypothesis=model.tokenizer.decode(result.tokens).strip(), seconds=0.0)
                for id, text, result in zip(batch.ids, batch.texts, decoded, strict=True)
            ]
            edits = sum((aligned.edits for aligned in align(records)), edits)
        return loss_sum, tokens, edits
