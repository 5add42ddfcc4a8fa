"""Long audio -> segments of bounded length, cut in the pauses of speech.

The audio comes in blocks and is looked at once, from beginning to end: what is held at any time is one segment and one
block, whether the recording lasts a minute or a day.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.voice import FRAME, Memory, voice_activity

QUIET = 0.35  # probability of speech; silero-vad takes speech to go on above this
SILENT = 0.2  # the same, nowhere reached in audio without speech: a short word alone may stay below 0.35
LEVEL = 0.5  # peak to which audio is brought before it is called silent: faint speech scores low
PAUSE = 7  # quiet frames, 0.22 s: more than a plosive's closure
# Quiet frames, 0.13 s, that stay beside speech: enough for soft beginnings and ends, and more makes transcripts worse.
MARGIN = 4

_BLOCK = 1024 * FRAME  # samples, 33 s: what the network sees at once


@dataclass(frozen=True, eq=False)
class AudioSegment:
    """A stretch of a recording."""

    start: float
    """Seconds from the beginning of the recording."""
    waveform: Tensor
    """(samples,) float32 at 16 kHz."""

    @property
    def end(self) -> float:
        """Seconds from the beginning of the recording."""
        return self.start + len(self.waveform) / SAMPLE_RATE


def cut(blocks: Iterable[Tensor], *, max_seconds: float = 30.0) -> Iterator[AudioSegment]:
    """The segments of a recording, in order, without overlap.

    Audio that is not longer than `max_seconds` is one segment, as it is, unless it is silent. Of longer audio, each
    segment ends in the last pause that keeps it within `max_seconds`; where there is none, at the frame of its second
    half that is the least likely to be speech. Every frame to which silero-vad gives a probability of speech of at
    least 0.35 belongs to a segment, with up to 0.13 s around it; of the silence before and after a segment, more than
    that is left out.

    Args:
        blocks: (samples,) float32 at 16 kHz each, together the recording, as `audio_blocks` yields it; for a waveform
            that is there as a whole, `[waveform]`.
        max_seconds: the longest segment, at least 1.

    Yields:
        Segments; none where the audio holds no speech.

    Raises:
        ValueError: `max_seconds` below 1.
        UserError: the weights of the voice activity's network are missing.
    """
    if not max_seconds >= 1:
        raise ValueError(f"cut: max_seconds must be at least 1, not {max_seconds}")
    limit = round(max_seconds * SAMPLE_RATE)
    blocks = iter(blocks)
    head, length = [], 0
    for block in blocks:
        head.append(block)
        length += len(block)
        if length > limit:
            yield from _cut_at_pauses(chain(head, blocks), limit // FRAME)
            return
    if head and not _is_silent(whole := torch.cat(head)):
        yield AudioSegment(0.0, whole)


def _is_silent(samples: Tensor) -> bool:
    peak = float(samples.abs().max())
    return not peak or all(voice.max() < SILENT for _, voice in _with_voice([samples / peak * LEVEL]))


def _cut_at_pauses(blocks: Iterable[Tensor], longest: int) -> Iterator[AudioSegment]:
    held = Held()
    for samples, voice in _with_voice(blocks):
        held.add(samples, voice)
        while len(held.voice) > longest:
            yield held.take(place_to_cut(held.voice, longest))
    if len(speech_frames(held.voice)):
        yield held.take(len(held.voice))


def _with_voice(blocks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The recording in blocks of one size, each with the probabilities of speech in its frames."""
    network = voice_activity()
    memory: Memory | None = None
    rest = torch.zeros(0)
    for block in blocks:
        rest = torch.cat([rest, block.cpu()])
        while len(rest) >= _BLOCK:
            samples, rest = rest[:_BLOCK], rest[_BLOCK:]
            voice, memory = network(samples, memory)
            yield samples, voice
    if len(rest):
        yield rest, network(rest, memory)[0]


class Held:
    """What of the recording is looked at: it begins with speech, a margin before it aside, or is all silence.

    margin: quiet frames that stay beside speech.
    samples: (frames * 512,), fewer at the end of the recording.
    voice: (frames,) probabilities of speech.
    """

    def __init__(self, margin: int = MARGIN) -> None:
        self.margin = margin
        self.start = 0  # in frames, from the beginning of the recording
        self.samples = torch.zeros(0)
        self.voice = torch.zeros(0)

    @property
    def seconds(self) -> float:
        """Where it begins, from the beginning of the recording."""
        return self.start * FRAME / SAMPLE_RATE

    def add(self, samples: Tensor, voice: Tensor) -> None:
        self.samples = torch.cat([self.samples, samples])
        self.voice = torch.cat([self.voice, voice])
        self._drop_silence()

    def take(self, end: int) -> AudioSegment:
        """The segment of the first `end` frames, which hold speech; they, and the silence after them, leave."""
        trimmed = min(end, int(speech_frames(self.voice[:end])[-1]) + 1 + self.margin)
        segment = AudioSegment(self.seconds, self.samples[: trimmed * FRAME].clone())
        self.drop(end)
        self._drop_silence()
        return segment

    def _drop_silence(self) -> None:
        speech = speech_frames(self.voice)
        self.drop(max(0, (int(speech[0]) if len(speech) else len(self.voice)) - self.margin))

    def drop(self, frames: int) -> None:
        """The first frames leave."""
        self.start += frames
        self.samples = self.samples[frames * FRAME :]
        self.voice = self.voice[frames:]


def speech_frames(voice: Tensor) -> Tensor:
    """Indices of the frames that are not quiet."""
    return (voice >= QUIET).nonzero().flatten()


def place_to_cut(voice: Tensor, longest: int) -> int:
    """The middle of the last pause within reach or, without one, the quietest frame of the second half."""
    speech = speech_frames(voice)
    begins, ends = speech + 1, torch.cat([speech[1:], torch.tensor([len(voice)])])  # of the silence after each frame
    within = ((ends - begins >= PAUSE) & (begins + PAUSE // 2 <= longest)).nonzero().flatten()
    if len(within):
        last = within[-1]
        return min(longest, int(begins[last] + ends[last]) // 2)
    second_half = voice[longest // 2 : longest]
    return longest - 1 - int(second_half.flip(0).argmin())  # of equals the last
