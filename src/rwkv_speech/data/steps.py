"""The batches of training, each told its epoch and how many targets its optimiser step has."""

from collections.abc import Callable, Iterator
from itertools import islice

from torch.utils.data import DataLoader, Sampler

from rwkv_speech.data.batches import Batch


class OptimiserSteps:
    """A process's batches in groups of one optimiser step, whose targets are counted together.

    The loss is a mean over all targets of a step, so every micro-batch must know their number beforehand. Waveforms
    wait in memory for the rest of their group, nothing more. The position within an epoch is the state of this
    loader: Lightning saves it and gives it back on resuming.

    loader: the batches of this process.
    accumulate: micro-batches to an optimiser step.
    count: the targets of a text.
    limit: optimiser steps to an epoch, 0 for one pass over the data.
    """

    def __init__(
        self, loader: DataLoader[Batch], *, accumulate: int, count: Callable[[str], int], limit: int = 0
    ) -> None:
        self.loader = loader
        self.accumulate = accumulate
        self.count = count
        self.limit = limit * accumulate or len(loader)
        self.given = 0  # batches of this epoch
        self.skip = 0  # batches of the next iteration that were given before the run was interrupted

    @property
    def batch_sampler(self) -> Sampler[list[int]]:
        """Where Lightning finds `sampler.set_epoch`."""
        return self.loader.batch_sampler

    @property
    def batch_size(self) -> int:
        """What DeepSpeed's strategy reads."""
        return self.loader.batch_sampler.batch_size

    def __len__(self) -> int:
        return min(self.limit, len(self.loader))

    def __iter__(self) -> Iterator[Batch]:
        self.given, self.loader.batch_sampler.skip, self.skip = self.skip, self.skip, 0
        epoch = self.loader.dataset.epoch = self.loader.batch_sampler.sampler.epoch  # before workers start
        batches = islice(self.loader, len(self) - self.given)
        while group := list(islice(batches, self.accumulate)):
            for batch in group:
                batch.epoch, batch.tokens = epoch, sum(map(self.count, batch.texts))
            for batch in group:
                batch.step_tokens = sum(b.tokens for b in group)
                self.given += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["given"]
