"""Mean and deviation of the frames' channels, measured before training, for adapters that standardise them."""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from rwkv_speech.errors import UserError
from rwkv_speech.model import SpeechRWKV

log = logging.getLogger("rwkv_speech")

RECORDINGS = 256  # that are measured: some minutes of speech, 10^4 frames or more


class Standardise(Callback):
    """Measures the frames before the first step, and tells all adapters; a resumed run has the figures of the first.

    batches: of the recordings to measure; the first process reads them.
    """

    def __init__(self, batches: DataLoader, model: SpeechRWKV) -> None:
        self.batches, self.model = batches, model
        self.measured: tuple[Tensor, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.measured = state_dict["measured"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.measured is None:
            measured = frame_statistics(self.model, self.batches) if trainer.is_global_zero else None
            self.measured = trainer.strategy.broadcast(measured)
            if self.measured is None:  # in all processes, or the others would wait for ever
                raise UserError("--standardise 1: none of the recordings that were to be measured can be used")
        for adapter in self.model.adapters:
            adapter.standardise(*self.measured)


@torch.no_grad()
def frame_statistics(model: SpeechRWKV, batches: DataLoader) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation (width,) of all valid frames, channel by channel; 1 where a channel never changes.
    None: there are no frames."""
    width = model.speech_encoder.width
    count, total, squares = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for batch in batches:
        if not len(batch):
            continue
        frames = model.encode(batch.to(model.device)).cpu().double()
        for x, length in zip(frames, batch.frame_lengths.tolist(), strict=True):
            count, total, squares = count + length, total + x[:length].sum(0), squares + x[:length].square().sum(0)
    if not count:
        return None
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    log.info("standardised frames: measured on %s of them, deviations %.3g to %.3g", f"{count:,}", std.min(), std.max())
    return mean.float(), torch.where(std < 1e-6, 1.0, std).float()
