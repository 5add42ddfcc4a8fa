"""The LightningModule: how a `SpeechRWKV` learns from batches, in one process or several."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from rwkv_speech.alignment import alignment_loss_sum
from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.runs import StopRequest
from rwkv_speech.errors import UserError
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import TrainingOptions
from rwkv_speech.trained import learning, parameter_groups


class StepStats(NamedTuple):
    """Of one micro-batch, summed over all processes before the backward pass, in one go."""

    loss_sum: float
    """The language model's cross-entropy, over `tokens`; both 0 where it isn't computed."""
    tokens: float
    ctc_sum: float
    """The auxiliary CTC loss before its weight, over `ctc_tokens`: of the answers that it can align."""
    ctc_tokens: float
    step_tokens: float
    """Of the whole optimiser step, as"""
    step_aligned: float
    utterances: float
    seconds: float
    nonfinite: float
    """Processes whose loss is NaN or infinite."""
    stop: float
    """Processes that have been asked to stop."""


class TrainingModule(pl.LightningModule):
    """What Lightning's Trainer calls. A training step gives its loss and its `StepStats`, as `stats`.

    model: what learns.
    options: how.
    total_steps: of the whole training; None asks the Trainer, which forgets a resumed loader's position.
    stop: whether this process has been asked to stop.
    on_nonfinite: called by all processes together where a loss is NaN or infinite, with the number of the step and the
        names of the samples of the batches that gave it.

    utterances: that all processes have learnt from since this one started.
    """

    def __init__(
        self,
        model: SpeechRWKV,
        options: TrainingOptions,
        *,
        total_steps: int | None = None,
        stop: StopRequest | None = None,
        on_nonfinite: Callable[[int, list[str]], None] = lambda step, names: None,
    ) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.total_steps = total_steps
        self.stop = stop or StopRequest()
        self.on_nonfinite = on_nonfinite
        self.utterances = 0.0
        self.strict_loading = False  # a resume point holds what is trained, not the frozen parts

    def training_step(self, batch: Batch, _: int) -> dict[str, Any]:
        """The mean loss over the labels of the optimiser step that this batch belongs to, in all processes.

        With the CTC loss, times its weight, where that takes part.
        """
        self.model.language_model.train()  # for what LoRA may drop by chance; nothing else in it has a mode
        text, ctc = self._losses(batch)
        loss_sum, ctc_sum = (0.0 if part is None else float(part.detach()) for part in (text, ctc))
        finite = math.isfinite(loss_sum + ctc_sum)
        here = StepStats(
            loss_sum=loss_sum if finite else 0.0,
            tokens=0 if text is None else batch.tokens,
            ctc_sum=ctc_sum if finite else 0.0,
            ctc_tokens=0 if ctc is None else batch.aligned,
            step_tokens=batch.step_tokens,
            step_aligned=batch.step_aligned,
            utterances=len(batch),
            seconds=sum(batch.seconds),
            nonfinite=not finite,
            stop=self.stop.requested,
        )
        everywhere = torch.tensor(here, dtype=torch.float64, device=self.device)
        stats = StepStats(*self.trainer.strategy.reduce(everywhere, reduce_op="sum").tolist())
        self.utterances += stats.utterances
        if stats.nonfinite:
            self.on_nonfinite(self.trainer.global_step + 1, [] if finite else batch.names)
            stats = stats._replace(loss_sum=0.0, tokens=0.0, ctc_sum=0.0, ctc_tokens=0.0)
            text = ctc = None
        total = torch.zeros((), device=self.device) if text is None else text
        if ctc is not None:
            # A mean, like the other, but over the labels of the answers that it can align.
            total = total + self.options.ctc_align * ctc * (stats.step_tokens / max(1.0, stats.step_aligned))
        if text is None:  # in all processes; the optimiser still expects all gradients
            total = total + sum(p.sum() for p in learning(self.model.trained_tensors())) * 0.0
        # Lightning divides by the accumulated micro-batches, the strategy by the processes: both are undone here.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return {"loss": total * (scale / max(1.0, stats.step_tokens)), "stats": stats}

    def _losses(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Summed cross-entropy and summed CTC loss of a batch; None for what this step doesn't compute."""
        both = not self.options.ctc_align or self.trainer.global_step >= self.options.ctc_align_steps
        if not len(batch):
            nothing = self.model.no_loss(batch)
            return nothing if both else None, nothing if self.options.ctc_align else None
        audio_embeds, _ = self.model.embed_audio(batch)
        text = ctc = None
        if both:
            text = self.model.loss_sum(batch, audio_embeds, longest=self.options.ctx_len)
        if self.options.ctc_align:
            aligned = self.model.aligned
            rows = [i for i, name in enumerate(batch.missions) if self.model.task(name).name in aligned]
            recordings = [i for i, row in enumerate(batch.owners) if row in rows]
            if [batch.owners[i] for i in recordings] != rows:
                raise UserError("--ctc_align aligns one recording with its text: a sample here has none or several")
            groups = torch.tensor(batch.group_counts)
            answers = batch.answers
            if len(rows) < len(batch):
                answers = [answers[i] for i in rows]
                audio_embeds, groups = audio_embeds[recordings], groups[recordings]
            if rows:
                ctc = alignment_loss_sum(audio_embeds, groups, answers, self.model.language_model.emb.weight)
            else:
                ctc = audio_embeds.sum() * 0.0  # by the same path as where it has some
        return text, ctc

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.options
        groups = parameter_groups(self.model.trained_tensors(), options)
        betas = (options.beta1, options.beta2)
        optimizer = torch.optim.AdamW(groups, lr=options.lr_init, betas=betas, eps=options.adam_eps, weight_decay=0.0)
        total = self.total_steps or int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: options.lr_factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in trained}
