"""Audio that is still coming in -> segments of speech, each as soon as the speaker has paused for long enough."""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.segments import AudioSegment, Held, place_to_cut, speech_frames
from rwkv_speech.speech.voice import FRAME, Memory, voice_activity

SPEAKING = 0.5  # probability of speech that begins a segment; one goes on above `segments.QUIET`
# Quiet frames that stay beside speech: one, 0.03 s, as silero-vad leaves. With more silence than recordings have that a
# mission learnt from, finals get worse.
MARGIN = 1


class OpenSegment(NamedTuple):
    """What has come of a segment that goes on."""

    start: float
    """Seconds from the beginning of the audio; it stays the same."""
    waveform: Tensor
    """(samples,) float32 at 16 kHz."""
    spoken: int
    """Samples up to the silence that may become its end; all of them where nobody pauses."""


class Endpointer:
    """Cuts speech out of audio in pieces of any size; what it finds doesn't depend on their sizes.

    A segment begins where silero-vad hears speech (0.5), and ends after `pause` seconds in which it hears none (0.35),
    with up to 0.03 s around the speech. One that gets longer than `longest` is cut as `segments.cut` cuts. What is in
    memory is one segment.

    Args:
        pause: seconds of silence that end a segment.
        longest: seconds, at least 1.
    """

    def __init__(self, *, pause: float, longest: float) -> None:
        self._pause, self._longest = round(pause * SAMPLE_RATE / FRAME), round(longest * SAMPLE_RATE) // FRAME
        self._rest = torch.zeros(0)  # samples of a frame that is not whole yet
        self._memory: Memory | None = None
        self._held = Held(MARGIN)
        self._is_open = False

    @property
    def open(self) -> OpenSegment | None:
        """The segment that is being spoken, so far; None where nobody speaks."""
        held = self._held
        if not self._is_open:
            return None
        spoken = (int(speech_frames(held.voice)[-1]) + 1 + MARGIN) * FRAME
        return OpenSegment(held.seconds, held.samples, min(spoken, len(held.samples)))

    def feed(self, samples: Tensor) -> list[AudioSegment]:
        """The segments that end within the next samples (samples,), float32 at 16 kHz."""
        samples = torch.cat([self._rest, samples])
        whole = len(samples) // FRAME * FRAME
        self._rest = samples[whole:].clone()
        # One by one: together, rounding would differ with their number.
        return [segment for frame in samples[:whole].split(FRAME) if len(frame) for segment in self._add(frame)]

    def finish(self) -> list[AudioSegment]:
        """What is left at the end of the audio."""
        found = self._add(self._rest) if len(self._rest) else []
        return [*found, *self._take(len(self._held.voice))] if self._is_open else found

    def drop(self) -> None:
        """Forgets the segment that is being spoken."""
        self._held.drop(len(self._held.voice))
        self._is_open = False

    def _add(self, frame: Tensor) -> list[AudioSegment]:
        voice, self._memory = voice_activity()(frame, self._memory)
        held = self._held
        held.add(frame, voice)
        self._is_open = self._is_open or bool(voice >= SPEAKING)
        if len(held.voice) > self._longest:
            return self._take(place_to_cut(held.voice, self._longest))
        speech = speech_frames(held.voice)
        if len(speech) and len(held.voice) - 1 - int(speech[-1]) >= self._pause:
            end = int(speech[-1]) + 1 + MARGIN
            # What may be the soft beginning of the next one stays.
            return self._take(min(len(held.voice), max(end, len(held.voice) - MARGIN)))
        return []

    def _take(self, frames: int) -> list[AudioSegment]:
        """What is held up to here, if it is speech; what was said after it goes on."""
        segment = self._held.take(frames)
        found = [segment] if self._is_open else []
        self._is_open = self._is_open and len(speech_frames(self._held.voice)) > 0
        return found
