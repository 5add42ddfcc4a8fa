"""Batches: which samples come together, in which order, in which process; and what a batch holds.

- The order is a function of seed and epoch alone; the number of loader workers changes nothing.
- All processes see the same sequence of *global* batches and take every world_size-th sample of each, so
  one process with a batch of 8 trains on the same global batches as two with 4.
- What needs no weights is done in the loader's workers: decoding audio, augmentation, the encoder's features, tokens,
  labels, and the indices that put audio embeddings into their slots.
- A sample that can't be used travels as a `BadSample` in its batch; the consumer of the batch hands it to `BadSamples`.
- Batches come from the workers through pipes. Shared memory would take a descriptor for each tensor, and room in
  /dev/shm, of which a container has little.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from rwkv_speech.alignment import fits
from rwkv_speech.data.rendering import NO_LABEL, Rendered, Renderer
from rwkv_speech.data.sample import BadSample, Row, Sample, SampleError
from rwkv_speech.errors import UserError
from rwkv_speech.lm.tokenizer import END_OF_TEXT
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, Longest, TooLongError
from rwkv_speech.speech.augmentation import Masks, SpecAugment
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.speech.recording import Recording


@dataclass(slots=True)
class Item:
    """A sample that was read and rendered.

    index: its row's place in the dataset.
    reference: the text of its last answer.
    samples: of each recording, at 16 kHz.
    audio: of each recording, what the encoder's `extract` made of it, or its cached frames (F, width).
    masks: of each recording, where there is SpecAugment.
    """

    id: str
    index: int
    reference: str
    rendered: Rendered
    samples: list[int]
    audio: list[Tensor]
    masks: list[Masks]


@dataclass
class Batch:
    """B samples, in step, with A recordings; len() is B, and can be 0 where all samples were bad.

    names: ids of the samples.
    references: the texts of their last answers, and
    answers: the tokens of those, without the end of text, and
    fits: whether CTC can align these to the positions of the sample's recordings.
    indices: places of their rows in the dataset.
    ids: (B, T) int64 token ids, padded with END_OF_TEXT; see `Rendered`.
    lengths: (B,) int64, positions of each.
    prompt_lengths: (B,) int64, positions before the last answer of each.
    label_slots: (m,) int64, those of the B * T positions at which something is asked, and
    labels: (m,) int64, what.
    audio: what the encoder's `extract` made of all recordings, or their cached frames, joined along dimension 0.
    audio_sizes: the share of each recording in that.
    is_frames: whether `audio` holds frames.
    samples: of each recording, at 16 kHz.
    frame_lengths: (A,) int64, encoder frames of each recording.
    group_counts: positions of each recording.
    audio_groups: (n,) int64, the valid ones of the A * G positions that the adapter makes of the recordings, and
    audio_slots: (n,) int64, where they go among the B * T positions.
    masks: SpecAugment's, (A, F) and (A, width), or None.
    seconds: length of the recordings of each sample.
    bad: samples that couldn't be used.
    long: places of rows that were set apart, see `SpeechDataset`.
    step_tokens, step_aligned: `tokens` and `aligned` of all batches of its optimiser step in this process;
        `AccumulationLoader` counts them.
    epoch: of training, that it belongs to.
    """

    names: list[str]
    references: list[str]
    answers: list[Tensor]
    fits: list[bool]
    indices: list[int]
    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    label_slots: Tensor
    labels: Tensor
    audio: Tensor
    audio_sizes: list[int]
    is_frames: bool
    samples: list[int]
    frame_lengths: Tensor
    group_counts: list[int]
    audio_groups: Tensor
    audio_slots: Tensor
    masks: Masks | None
    seconds: list[float]
    bad: list[BadSample]
    long: list[int]
    step_tokens: int = 0
    step_aligned: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        """With arrays for tensors, which would go through shared memory."""
        return tree_map(lambda x: x.numpy() if isinstance(x, Tensor) else x, vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(tree_map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, state))

    @property
    def tokens(self) -> int:
        """Labels in this batch."""
        return len(self.labels)

    @property
    def aligned(self) -> int:
        """Tokens of answers, with their ends of text, that CTC can align."""
        return sum(len(answer) + 1 for answer, fit in zip(self.answers, self.fits, strict=True) if fit)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device; `audio` stays where the encoder will fetch it from."""
        names = (
            "ids",
            "lengths",
            "prompt_lengths",
            "label_slots",
            "labels",
            "frame_lengths",
            "audio_groups",
            "audio_slots",
        )
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        masks = self.masks and Masks(*(x.to(device, non_blocking=True) for x in self.masks))
        return replace(self, **moved, masks=masks)


@dataclass(frozen=True, slots=True)
class LongRow:
    """A row whose recording is too long to be a sample as it is; index: its place in the dataset."""

    index: int


class SpeechDataset(Dataset[Item | BadSample | LongRow]):
    """Reads and renders rows when they are asked for; all of it runs in the loader's workers.

    rows: of one data source or several.
    sample_of: makes a sample of a row, as its mission does; raises SampleError where the row lacks something.
    renderer: of the model.
    extract: a waveform -> what the encoder's network takes; None where frames are cached.
    cache: where the encoder's frames are cached; nothing is decoded then.
    transform: makes another waveform of one, given the sample's id, the waveform and the epoch; cached frames are
        taken as they are.
    filter: says why a sample with its waveforms' samples (before `transform`) can't be used, or None.
    spec_augment: draws masks.
    needs_answer: whether a sample without an answer to learn from is a bad one.
    longest: a longer recording is not decoded beyond that, and makes a bad sample.
    set_apart: it does not: its row is in `Batch.long`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        sample_of: Callable[[Row], Sample],
        renderer: Renderer,
        extract: Callable[[Tensor], Tensor] | None = None,
        cache: FrameCache | None = None,
        transform: Callable[[str, Tensor, int], Tensor] | None = None,
        filter: Callable[[Rendered, Sequence[int]], str | None] | None = None,
        spec_augment: SpecAugment | None = None,
        needs_answer: bool = False,
        longest: Longest | None = None,
        set_apart: bool = False,
    ) -> None:
        self.rows = rows
        self.sample_of = sample_of
        self.renderer = renderer
        self.extract, self.cache = extract, cache
        self.transform, self.filter, self.spec_augment = transform, filter, spec_augment
        self.needs_answer = needs_answer
        self.longest, self.set_apart = longest, set_apart
        self.epoch = 0  # of training; workers get to know it when an iteration starts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item | BadSample | LongRow:
        row = self.rows[index]
        try:
            return self.read(self.sample_of(row), index)
        except (AudioError, SampleError) as error:
            if self.set_apart and isinstance(error, TooLongError):
                return LongRow(index)
            return BadSample(row.id, str(row.audio) if isinstance(row.audio, Recording) else "an array", str(error))

    def read(self, sample: Sample, index: int) -> Item:
        """Reads and renders one sample.

        Raises:
            AudioError: its audio can't be used.
            SampleError: it has nothing to learn from, or `filter` says why it can't be used.
        """
        if self.needs_answer and not sample.reference.strip():
            raise SampleError("text with no tokens")
        if self.cache is not None:
            cached = [self.cache.read(x, self.longest) for x in sample.audio]
            audio, samples = [x for x, _ in cached], [n for _, n in cached]
            rendered = self._rendered(sample, samples)
        else:
            waveforms = [x.waveform(self.longest) if isinstance(x, Recording) else x for x in sample.audio]
            samples = [len(x) for x in waveforms]
            rendered = self._rendered(sample, samples)
            if self.transform is not None:
                waveforms = [self.transform(_draw(sample, i), x, self.epoch) for i, x in enumerate(waveforms)]
                if samples != (samples := [len(x) for x in waveforms]):
                    rendered = self.renderer(sample, samples)
            audio = [self.extract(x) for x in waveforms]
        masks = []
        if self.spec_augment is not None:
            masks = [self.spec_augment(_draw(sample, i), n, self.epoch) for i, n in enumerate(rendered.frames)]
        return Item(sample.id, index, sample.reference, rendered, samples, audio, masks)

    def _rendered(self, sample: Sample, samples: Sequence[int]) -> Rendered:
        rendered = self.renderer(sample, samples)
        if self.filter is not None and (reason := self.filter(rendered, samples)):
            raise SampleError(reason)
        return rendered


def _draw(sample: Sample, recording: int) -> str:
    """What random draws for one of a sample's recordings depend on."""
    return f"{sample.id} {recording}" if recording else sample.id


class Collate:
    """Puts items together in the order in which they come, bad samples and long rows apart.

    group_count: as the renderer's.
    is_frames: whether items hold cached frames.
    """

    def __init__(self, group_count: Callable[[int], int], *, is_frames: bool) -> None:
        self.group_count = group_count
        self.is_frames = is_frames

    def __call__(self, items: Sequence[Item | BadSample | LongRow]) -> Batch:
        good = [item for item in items if isinstance(item, Item)]
        rendered = [item.rendered for item in good]
        ids = _padded([r.ids for r in rendered], END_OF_TEXT)
        labels = _padded([r.labels for r in rendered], NO_LABEL).flatten()
        label_slots = (labels != NO_LABEL).nonzero()[:, 0]
        answers = [r.ids[r.prompt_length :] for r in rendered]
        frames = [n for r in rendered for n in r.frames]
        groups = [self.group_count(n) for n in frames]
        per_recording = max(groups, default=0)
        audio = [x for item in good for x in item.audio]
        masks = [m for item in good for m in item.masks]
        return Batch(
            names=[item.id for item in good],
            references=[item.reference for item in good],
            answers=answers,
            fits=[
                fits(answer, sum(map(self.group_count, r.frames))) for answer, r in zip(answers, rendered, strict=True)
            ],
            indices=[item.index for item in good],
            ids=ids,
            label_slots=label_slots,
            labels=labels[label_slots],
            lengths=torch.tensor([len(r) for r in rendered], dtype=torch.int64),
            prompt_lengths=torch.tensor([r.prompt_length for r in rendered], dtype=torch.int64),
            audio=torch.cat(audio) if audio else torch.empty(0),
            audio_sizes=[len(x) for x in audio],
            is_frames=self.is_frames,
            samples=[n for item in good for n in item.samples],
            frame_lengths=torch.tensor(frames, dtype=torch.int64),
            group_counts=groups,
            audio_groups=_indices(torch.arange(n) + i * per_recording for i, n in enumerate(groups)),
            audio_slots=_indices(r.audio_slots + i * ids.shape[1] for i, r in enumerate(rendered)),
            masks=Masks(_padded([m.frames for m in masks], False), torch.stack([m.channels for m in masks]))
            if masks
            else None,
            seconds=[sum(item.samples) / SAMPLE_RATE for item in good],
            bad=[item for item in items if isinstance(item, BadSample)],
            long=[item.index for item in items if isinstance(item, LongRow)],
        )


def _padded(rows: list[Tensor], value: float) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value) if rows else torch.empty(0, 0, dtype=torch.int64)


def _indices(parts: Iterator[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


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
        collate_fn=Collate(dataset.renderer.group_count, is_frames=dataset.cache is not None),
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
