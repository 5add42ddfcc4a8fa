"""What a batch holds, and how samples become one.

- What needs no weights is done in the loader's workers: decoding audio, augmentation, the encoder's features, tokens,
  labels, and the indices that put audio embeddings into their slots.
- A sample that can't be used travels as a `BadSample` in its batch; the consumer of the batch hands it to `BadSamples`.
- Batches come from the workers through pipes. Shared memory would take a descriptor for each tensor, and room in
  /dev/shm, of which a container has little.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from rwkv_speech.alignment import fits
from rwkv_speech.data.mixing import Mix
from rwkv_speech.data.rendering import NO_LABEL, Rendered, Renderer
from rwkv_speech.data.sample import BadSample, Row, Sample, SampleError
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
    mission: str
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
    missions: by which they were made.
    references: the texts of their last answers, and
    answers: the tokens of those, without the end of text, and
    fits: whether CTC can align these to the positions of the sample's recordings.
    indices: places of their rows in the dataset.
    ids: (B, T) int64 token ids, padded with END_OF_TEXT; see `Rendered`.
    lengths: (B,) int64, positions of each.
    prompt_lengths: (B,) int64, positions before the last answer of each.
    rounds: of each sample, the positions of all its answers; see `Rendered`.
    label_slots: (m,) int64, those of the B * T positions at which something is asked, and
    labels: (m,) int64, what.
    audio: what the encoder's `extract` made of all recordings, or their cached frames, joined along dimension 0.
    audio_sizes: the share of each recording in that.
    is_frames: whether `audio` holds frames.
    samples: of each recording, at 16 kHz.
    owners: the place in the batch of each recording's sample.
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
    missions: list[str]
    references: list[str]
    answers: list[Tensor]
    fits: list[bool]
    indices: list[int]
    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    rounds: list[list[range]]
    label_slots: Tensor
    labels: Tensor
    audio: Tensor
    audio_sizes: list[int]
    is_frames: bool
    samples: list[int]
    owners: list[int]
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
    mix: which of them, by their places, there are in an epoch; None: all.
    sample_of: makes a sample of a row, as its mission does; raises SampleError where the row lacks something.
    renderer: of the model.
    extract: a waveform -> what the encoder's network takes; None where frames are cached.
    cache: where the encoder's frames are cached; nothing is decoded then.
    transform: makes another waveform of one, given the sample's id, the waveform and the epoch.
    speed: where frames are cached, at which of its speeds a recording is taken, given the sample's id and the epoch.
    filter: says why a sample with its waveforms' samples (before `transform`) can't be used, or None.
    spec_augment: draws masks.
    needs_answer: whether a sample without an answer to learn from is a bad one.
    aligned: see `Collate`.
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
        speed: Callable[[str, int], float] | None = None,
        filter: Callable[[Rendered, Sequence[int]], str | None] | None = None,
        spec_augment: SpecAugment | None = None,
        needs_answer: bool = False,
        aligned: Container[str] | None = None,
        longest: Longest | None = None,
        set_apart: bool = False,
        mix: Mix | None = None,
    ) -> None:
        self.rows = rows
        self.mix, self.mixed = mix, (-1, np.zeros(0, int))  # the rows of an epoch, kept with its number
        self.copies = None if mix is None else mix.copies
        self.sample_of = sample_of
        self.renderer = renderer
        self.extract, self.cache = extract, cache
        self.transform, self.speed, self.filter, self.spec_augment = transform, speed, filter, spec_augment
        self.needs_answer = needs_answer
        self.aligned = aligned
        self.longest, self.set_apart = longest, set_apart
        self.epoch = 0  # of training; workers get to know it when an iteration starts

    def __len__(self) -> int:
        return len(self.rows if self.mix is None else self.mix)

    def __getitem__(self, index: int) -> Item | BadSample | LongRow:
        copy = 0
        if self.mix is not None:
            if self.mixed[0] != self.epoch:
                self.mixed = self.epoch, self.mix(self.epoch)
            index, copy = int(self.mixed[1][index]), int(self.copies[index])
        row = self.rows[index]
        try:
            return self.read(self.sample_of(row), index, copy)
        except (AudioError, SampleError) as error:
            if self.set_apart and isinstance(error, TooLongError):
                return LongRow(index)
            return BadSample(row.id, row.place, str(error))

    def read(self, sample: Sample, index: int, copy: int = 0) -> Item:
        """Reads and renders one sample; copy: how often its row was taken before in this epoch.

        Raises:
            AudioError: its audio can't be used.
            SampleError: it has nothing to learn from, or `filter` says why it can't be used.
        """
        if self.needs_answer and not sample.reference.strip():
            raise SampleError("text with no tokens")
        drawn = copy_id(sample.id, copy)
        if self.cache is not None:
            recordings = sample.audio
            if self.speed is not None:
                self._rendered(sample, [self.cache.samples(x, self.longest) for x in recordings])  # whether it fits
                speeds = [self.speed(_draw(drawn, i), self.epoch) for i in range(len(recordings))]
                recordings = [replace(x, speed=speed) for x, speed in zip(recordings, speeds, strict=True)]
            cached = [self.cache.read(x, self.longest) for x in recordings]
            audio, samples = [x for x, _ in cached], [n for _, n in cached]
            rendered = (self._rendered if self.speed is None else self.renderer)(sample, samples)
        else:
            waveforms = [x.waveform(self.longest) if isinstance(x, Recording) else x for x in sample.audio]
            samples = [len(x) for x in waveforms]
            rendered = self._rendered(sample, samples)
            if self.transform is not None:
                waveforms = [self.transform(_draw(drawn, i), x, self.epoch) for i, x in enumerate(waveforms)]
                if samples != (samples := [len(x) for x in waveforms]):
                    rendered = self.renderer(sample, samples)
            audio = [self.extract(x) for x in waveforms]
        masks = []
        if self.spec_augment is not None:
            masks = [self.spec_augment(_draw(drawn, i), n, self.epoch) for i, n in enumerate(rendered.frames)]
        return Item(sample.id, sample.mission, index, sample.reference, rendered, samples, audio, masks)

    def _rendered(self, sample: Sample, samples: Sequence[int]) -> Rendered:
        rendered = self.renderer(sample, samples)
        if self.filter is not None and (reason := self.filter(rendered, samples)):
            raise SampleError(reason)
        return rendered


def copy_id(id: str, copy: int) -> str:
    """What random draws for a row depend on, by how often it was taken before."""
    return f"{id} again {copy}" if copy else id


def _draw(id: str, recording: int) -> str:
    """The same for one of its recordings."""
    return f"{id} {recording}" if recording else id


class Collate:
    """Puts items together in the order in which they come, bad samples and long rows apart.

    group_count: as the renderer's.
    is_frames: whether items hold cached frames.
    aligned: the missions whose answers CTC aligns; None: all.
    """

    def __init__(
        self, group_count: Callable[[int], int], *, is_frames: bool, aligned: Container[str] | None = None
    ) -> None:
        self.group_count = group_count
        self.is_frames = is_frames
        self.aligned = aligned

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
            missions=[item.mission for item in good],
            references=[item.reference for item in good],
            answers=answers,
            fits=[
                (self.aligned is None or item.mission in self.aligned)
                and fits(answer, sum(map(self.group_count, item.rendered.frames)))
                for answer, item in zip(answers, good, strict=True)
            ],
            indices=[item.index for item in good],
            ids=ids,
            label_slots=label_slots,
            labels=labels[label_slots],
            lengths=torch.tensor([len(r) for r in rendered], dtype=torch.int64),
            prompt_lengths=torch.tensor([r.prompt_length for r in rendered], dtype=torch.int64),
            rounds=[r.answers for r in rendered],
            audio=torch.cat(audio) if audio else torch.empty(0),
            audio_sizes=[len(x) for x in audio],
            is_frames=self.is_frames,
            samples=[n for item in good for n in item.samples],
            owners=[i for i, item in enumerate(good) for _ in item.samples],
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
