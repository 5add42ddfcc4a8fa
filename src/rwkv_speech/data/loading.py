"""Which samples come together, in which order, in which process.

- The order is a function of seed and epoch alone; the number of loader workers changes nothing.
- All processes see the same sequence of *global* batches and take every world_size-th sample of each, so
  one process with a batch of 8 trains on the same global batches as two with 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from rwkv_speech.data.batches import Batch, Collate, SpeechDataset
from rwkv_speech.errors import UserError


class Shuffled(Sampler[int]):
    """All indices in an order given by seed and epoch; Lightning calls `set_epoch` before each epoch."""

    def __init__(self, size: int, *, seed: int, epoch: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist())


class SharedBatches(Sampler[list[int]]):
    """One process's share of each global batch, the global batches being cut from the sampler's order.

    batch_size: utterances per process; a global batch has batch_size * world_size.
    even: whether all processes must get the same number of batches, none of them empty, as training needs.
        The last global batch may be smaller than the others; if it can't give every process one utterance it
        is left out (fewer than world_size utterances an epoch), and where it is the only one, its utterances
        repeat instead. Otherwise each utterance is given exactly once, and some processes may have one batch
        fewer.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        even: bool = False,
    ) -> None:
        self.sampler = sampler  # by this name Lightning finds set_epoch
        self.batch_size = batch_size  # DeepSpeed's strategy reads it
        self.rank = rank
        self.world_size = world_size
        self.even = even
        self.skip = 0  # batches left out at the start of the next iteration: a resumed epoch goes on after them

    def __len__(self) -> int:
        size, global_size = len(self.sampler), self.batch_size * self.world_size
        whole, rest = divmod(size, global_size)
        if self.even:
            return whole + (rest >= self.world_size) or min(size, 1)
        return whole + (rest > self.rank)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        if self.even and len(order) < self.world_size:
            order *= math.ceil(self.world_size / max(len(order), 1))
            order = order[: self.world_size]
        step = self.batch_size * self.world_size
        first, self.skip = self.skip, 0
        for number in range(first, len(self)):
            yield order[number * step : (number + 1) * step][self.rank :: self.world_size]


def loader(
    dataset: SpeechDataset,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    epoch: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    even: bool = False,
) -> DataLoader[Batch]:
    """The batches of one process. The arguments are those of `Shuffled` and `SharedBatches`.

    Train with shuffle and even; evaluate with neither. The sampler is complete as it is: Lightning runs with
    `use_distributed_sampler=False`.
    """
    order = Shuffled(len(dataset), seed=seed, epoch=epoch) if shuffle else SequentialSampler(dataset)
    batches = SharedBatches(order, batch_size, rank=rank, world_size=world_size, even=even)
    return load_batches(dataset, batches, num_workers=num_workers)


def load_batches(dataset: SpeechDataset, batches: Sampler[list[int]], *, num_workers: int = 0) -> DataLoader[Batch]:
    """Loads the batches whose indices a sampler gives, ahead of time in `num_workers` processes."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=Collate(dataset.renderer.group_count, is_frames=dataset.cache is not None, aligned=dataset.aligned),
        num_workers=num_workers,
        # Workers share what the dataset refers to (the encoder's features, a cache), which a fresh process can't load.
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),  # else each iterator draws a number from the global stream
    )


_DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal: [\w ]+|exited unexpectedly)")


@contextmanager
def reading() -> Iterator[None]:
    """Around the use of loaders. The death of a worker, which torch raises wherever this process is, becomes one line.

    Raises:
        UserError: a worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not (found := _DEAD_WORKER.search(str(error))):
            raise
        raise UserError(
            f"a process that reads audio {found[1]}; it may have had too little memory: "
            "lower --num_workers, or --num_workers 0 reads in the main process"
        ) from error


class AccumulationLoader:
    """A process's batches in groups of one optimiser step, whose labels are counted together.

    The loss is a mean over all labels of a step, so every micro-batch must know their number beforehand. The batches
    of a group wait in memory for the rest of it, nothing more. The position within an epoch is the state of this
    loader: Lightning saves it and gives it back on resuming.

    loader: the batches of this process.
    accumulate: micro-batches to an optimiser step.
    limit: optimiser steps to an epoch, 0 for one pass over the data.
    """

    def __init__(self, loader: DataLoader[Batch], *, accumulate: int, limit: int = 0) -> None:
        self.loader = loader
        self.accumulate = accumulate
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
                batch.epoch, batch.step_tokens = epoch, sum(b.tokens for b in group)
                batch.step_aligned = sum(b.aligned for b in group)
                self.given += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["given"]
