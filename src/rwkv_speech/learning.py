"""How the trained parts learn: the optimiser's course, the auxiliary loss, and what processes tell each other."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimisation:
    """AdamW and the course of its learning rate; the defaults are those of the published recipe."""

    lr_init: float = 1e-4
    lr_final: float = 1e-4
    """Reached exponentially, by the last step, where it differs from lr_init."""
    warmup_steps: int = 100
    """From 0.2 of lr_init to all of it."""
    state_lr_scale: float = 1.0
    """The initial state's learning rate, as a multiple of the adapter's."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On the adapter's two matrices only."""
    total_steps: int | None = None
    """Of the whole training, for lr_final; None asks the Trainer, who then forgets a resumed loader's position."""

    def factor(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0 of `total`, as a multiple of lr_init."""
        if step < self.warmup_steps:
            return 0.2 + 0.8 * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total - 1 - self.warmup_steps)
        return (self.lr_final / self.lr_init) ** min(1.0, progress)


@dataclass(frozen=True)
class Alignment:
    """How far the auxiliary CTC loss of `rwkv_speech.alignment` takes part in training; by default it doesn't."""

    weight: float = 0.0
    """Beside the language model's cross-entropy, of weight 1."""
    alone_steps: int = 0
    """First optimiser steps that know nothing but the CTC loss, and so don't run the language model."""


@dataclass(frozen=True)
class StepStats:
    """Of one micro-batch in all processes; told to each other before the backward pass, in one go."""

    loss_sum: float
    """The language model's cross-entropy, over `tokens`; both 0 where it isn't computed."""
    tokens: float
    ctc_sum: float
    """The alignment's loss before its weight, over `ctc_tokens`."""
    ctc_tokens: float
    step_tokens: float
    """Of the whole optimiser step."""
    utterances: float
    seconds: float
    nonfinite: float
    """Processes whose loss is NaN or infinite."""
    stop: float
    """Processes that have been asked to stop."""
