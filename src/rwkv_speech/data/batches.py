"""Batches: which utterances come together, in which order, in which process; and what a batch holds.

- The order is a function of seed and epoch alone; the number of loader workers changes nothing.
- All processes see the same sequence of *global* batches and take every world_size-th utterance of each, so
  one process with a batch of 8 trains on the same global batches as two with 4.
- A sample that can't be used travels as a `BadSample` in its batch; whoever consumes the batch hands it to
  `BadSamples`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from rwkv_speech.data.row import BadSample, Utterance
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError
from rwkv_speech.speech.frame_cache import FrameCache


@dataclass(slots=True)
class Sample:
    """An utterance that was read.

    waveform: float32 (samples,) at 16 kHz; None where the encoder's frames are cached.
    text: transcript.
    index: its place in the dataset.
    samples: of the waveform.
    frames: what the cache holds, (F, width), or None.
    """

    id: str
    waveform: Tensor | None
    text: str
    index: int
    samples: int
    frames: Tensor | None = None


@dataclass
class Batch:
    """Utterances, in step; len() counts the good ones, and can be 0 where all were bad.

    waveforms: float32 (samples,) each, 16 kHz, unpadded: padding is the encoder's own affair; none where
        frames are cached.
    indices: places in the dataset.
    seconds: length of all recordings together.
    bad: samples that couldn't be used.
    tokens: targets in this batch, and
    step_tokens: in all batches of its optimiser step in this process; training counts them.
    epoch: of training, that it belongs to.
    frames: what the encoder made of each waveform, (F, width), where that is cached.
    """

    ids: list[str]
    waveforms: list[Tensor]
    texts: list[str]
    indices: list[int]
    seconds: float
    bad: list[BadSample]
    tokens: int = 0
    step_tokens: int = 0
    epoch: int = 0
    frames: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def audio(self) -> list[Tensor]:
        """Frames where they are cached, else waveforms: the model takes either."""
        return self.frames or self.waveforms


class SpeechDataset(Dataset[Sample | BadSample]):
    """Reads utterances when they are asked for.

    check: returns why a sample of so many samples can't be used (too long for the context, say), or None.
    change: makes another waveform of one, given the utterance's id, the waveform and the epoch; cached frames are
        taken as they are.
    features: where the encoder's frames are cached; nothing is decoded then.
    All run in the loader's workers.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        *,
        check: Callable[[Utterance, int], str | None] | None = None,
        change: Callable[[str, Tensor, int], Tensor] | None = None,
        features: FrameCache | None = None,
    ) -> None:
        self.utterances = utterances
        self.check = check
        self.change = change
        self.features = features
        self.epoch = 0  # of training; workers get to know it when an iteration starts

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> Sample | BadSample:
        utterance = self.utterances[index]
        reason = None if utterance.text.strip() else "text with no tokens"
        if reason is None:
            try:
                waveform, frames, samples = self._read(utterance)
                reason = self.check(utterance, samples) if self.check is not None else None
                if reason is None and self.change is not None and waveform is not None:
                    waveform = self.change(utterance.id, waveform, self.epoch)
                    samples = len(waveform)
            except AudioError as error:
                reason = str(error)
        if reason is not None:
            return BadSample(utterance.id, str(utterance.audio), reason)
        return Sample(utterance.id, waveform, utterance.text, index, samples, frames)

    def _read(self, utterance: Utterance) -> tuple[Tensor | None, Tensor | None, int]:
        """The waveform or its frames, and the samples of the waveform."""
        if self.features is not None:
            return None, *self.features.read(utterance)
        waveform = utterance.waveform()
        return waveform, None, len(waveform)


def collate(items: Sequence[Sample | BadSample]) -> Batch:
    """Put samples together in the order in which they come, the bad ones apart."""
    good = [item for item in items if isinstance(item, Sample)]
    return Batch(
        ids=[sample.id for sample in good],
        waveforms=[sample.waveform for sample in good if sample.waveform is not None],
        frames=[sample.frames for sample in good if sample.frames is not None],
        texts=[sample.text for sample in good],
        indices=[sample.index for sample in good],
        seconds=sum(sample.samples for sample in good) / SAMPLE_RATE,
        bad=[item for item in items if isinstance(item, BadSample)],
    )


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
    """Loads the batches that a sampler tells by their indices, ahead of time in `num_workers` processes."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        # Workers share what the dataset's checks refer to (the model, a cache), which a fresh process could not load.
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),  # else each iterator draws a number from the global stream
    )


class AccumulationLoader:
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
