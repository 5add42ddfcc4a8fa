"""Batches of training: utterances alike in length come together, in an order that is still random.

- An epoch: all utterances are sorted by their length times a random factor within 2 % of 1, the sorted list is cut into
  groups, and the groups are shuffled. Any within 4 % of an utterance's length, some thousands in LibriSpeech, can
  come to share its batch, and no more than about 4 % of a batch is padding.
- All of it follows from seed, epoch and lengths. Not from the number of loader workers; and by count not from the
  number of processes: n utterances to an optimiser step are the same n for any processes x micro-batches.
- The processes' micro-batches of a step are alike in length, so that none waits for another.
- What an optimiser step sees is of one length, and each step counts the same: tokens of short utterances weigh more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Sampler

from rwkv_speech.data.batches import Batch, SpeechDataset
from rwkv_speech.data.loading import SharedBatches, Shuffled, load_batches
from rwkv_speech.errors import UserError

JITTER = 0.02  # of a length, up and down, before sorting: more of it mixes better and pads more
SHORTEST = 0.1  # s; one position of the language model: no utterance is less work

Lengths = Callable[[int], np.ndarray]  # epoch -> (utterances,) s; augmentation may change them from epoch to epoch


def bucketed_loader(
    dataset: SpeechDataset,
    lengths: Lengths,
    *,
    batch_size: int,
    max_seconds: float | None = None,
    longest: np.ndarray | None = None,
    accumulate: int = 1,
    seed: int = 0,
    epoch: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """The training batches of one process, by count or by seconds of audio.

    lengths: of the utterances in an epoch, in seconds.
    batch_size: utterances to a micro-batch, where `max_seconds` is None.
    max_seconds, longest: see `BoundedBatches`; longest is lengths(0) where None.
    accumulate: micro-batches to an optimiser step.

    Raises:
        UserError: fewer utterances than processes, by seconds.
    """
    batches: Sampler[list[int]]
    if max_seconds is None:
        step = batch_size * world_size * accumulate
        order = ByLength(lengths, len(dataset), step=step, seed=seed, epoch=epoch)
        batches = SharedBatches(order, batch_size, rank=rank, world_size=world_size, even=True)
    else:
        order = Shuffled(len(dataset), seed=seed, epoch=epoch)
        longest = lengths(0) if longest is None else longest
        batches = BoundedBatches(order, lengths, max_seconds, longest=longest, rank=rank, world_size=world_size)
    return load_batches(dataset, batches, num_workers=num_workers)


def padding_waste(batches: Iterable[Sequence[int]], seconds: np.ndarray) -> float:
    """The share of padding in batches of utterances with such lengths, each padded to the longest in it: 0 to 1."""
    used = padded = 0.0
    for batch in batches:
        inside = seconds[batch]
        used += inside.sum()
        padded += inside.max() * len(inside)
    return 1 - used / padded if padded else 0.0


class ByLength(Shuffled):
    """All indices, each consecutive `step` of them alike in length, and the steps in random order.

    The rest that makes no whole step comes last; it is of random length.
    """

    def __init__(self, lengths: Lengths, size: int, *, step: int, seed: int, epoch: int = 0) -> None:
        super().__init__(size, seed=seed, epoch=epoch)
        self.lengths = lengths
        self.step = step

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = _sorted(rng.permutation(self.size), self.lengths(self.epoch), rng)
        whole, rest = divmod(self.size, self.step)
        start = self.step * int(rng.integers(whole + 1))
        order = np.concatenate([order[:start], order[start + rest :], order[start : start + rest]])
        steps = order[: whole * self.step].reshape(whole, self.step)
        yield from rng.permutation(steps).ravel().tolist()
        yield from order[whole * self.step :].tolist()


class BoundedBatches(Sampler[list[int]]):
    """One process's share of global batches with at most `max_seconds` of padded audio (longest x count) in each share.

    How many utterances the batches hold, from the batch of the shortest to that of the longest, is settled once, so
    that each epoch has the same number of batches and any draw of the random factors stays within the bound. (That
    leaves a part of it unused: 4 %, and 10 % more where speeds are drawn.) All processes get the same number of
    utterances in a batch; of those that make no whole round over the processes, fewer than world_size, other ones are
    left out in each epoch. An utterance that is longer than the bound comes alone.

    sampler: all utterances in random order; Lightning sets its epoch.
    lengths: of the utterances in an epoch, in seconds.
    longest: (utterances,) s, the most that each can take in any epoch.

    Raises:
        UserError: fewer utterances than processes.
    """

    def __init__(
        self,
        sampler: Shuffled,
        lengths: Lengths,
        max_seconds: float,
        *,
        longest: np.ndarray,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(sampler) < world_size:
            raise UserError(f"{len(sampler)} utterances can't be shared by {world_size} processes: use fewer --devices")
        self.sampler = sampler  # by this name Lightning finds set_epoch
        self.lengths = lengths
        self.rank = rank
        self.world_size = world_size
        self.skip = 0  # batches left out at the start of the next iteration: a resumed epoch goes on after them
        # The p-th in sorted order is never longer than this p-th, whatever is left out and whatever factors are drawn.
        seconds = np.sort(np.maximum(longest, SHORTEST))[len(sampler) % world_size :] * (1 + JITTER) / (1 - JITTER)
        self.sizes: list[int] = []  # utterances of a process in each batch
        for longest_of_round in seconds[world_size - 1 :: world_size].tolist():
            if self.sizes and (self.sizes[-1] + 1) * longest_of_round <= max_seconds:
                self.sizes[-1] += 1
            else:
                self.sizes.append(1)

    @property
    def batch_size(self) -> int:
        """Of an average batch; DeepSpeed's strategy reads it to log the throughput."""
        return max(1, round(sum(self.sizes) / len(self.sizes)))

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.sampler.epoch
        rng = np.random.default_rng([self.sampler.seed, epoch, 1])
        chosen = np.fromiter(self.sampler, int)[: sum(self.sizes) * self.world_size]
        order = _sorted(chosen, self.lengths(epoch), rng)
        batches = np.split(order, np.cumsum(self.sizes)[:-1] * self.world_size)
        first, self.skip = self.skip, 0
        for number in rng.permutation(len(batches))[first:]:
            yield batches[number][self.rank :: self.world_size].tolist()


def _sorted(indices: np.ndarray, seconds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices by length, as far as the jitter lets them; those of one length in the order in which they came."""
    keys = np.maximum(seconds[indices], SHORTEST) * rng.uniform(1 - JITTER, 1 + JITTER, len(indices))
    return indices[np.argsort(keys, kind="stable")]
