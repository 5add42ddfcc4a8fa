"""A recording, wherever it lies, or a segment of one: read when it is asked for, and known again by a stamp."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rwkv_speech.files import printable
from rwkv_speech.speech.audio import AudioError, Longest, Segment, at_speed, audio_blocks, duration, load_audio
from rwkv_speech.speech.decoders import open_file
from rwkv_speech.speech.identity import file_stamp


class EncodedAudio(Protocol):
    """An encoded recording that is no file, such as a row of a Hugging Face dataset; str() is what messages call it."""

    def fetch(self) -> bytes | str:
        """The encoded bytes, or the path of a file; raises AudioError."""

    def stamp(self, *, strict: bool = True) -> str | None:
        """Stands for the content for as long as it doesn't change; None: nothing but the content itself does.

        strict: as in `file_stamp`.
        """


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording; nothing is read before a method is called. str() is what messages call it.

    source: a file, or what fetches encoded audio.
    duration: length in seconds, where the data source gives it.
    offset: of a segment, where it begins in its file, in seconds; it lasts `duration`, or as far as the file goes. None
        for all of the file, whatever `duration` says.
    speed: see `audio.at_speed`; `duration` and `offset` are those of the file all the same.
    """

    source: Path | EncodedAudio
    duration: float | None = None
    offset: float | None = None
    speed: float = 1.0

    def __str__(self) -> str:
        return printable(str(self.source)) + self._part

    @property
    def segment(self) -> Segment | None:
        return None if self.offset is None else Segment(self.offset, self.duration)

    @property
    def place(self) -> str:
        """What tells it from its file as a whole: of a segment its place, and another speed; else nothing."""
        return self._part + ("" if self.speed == 1 else f" at {self.speed} of its speed")

    @property
    def _part(self) -> str:
        if self.offset is None:
            return ""
        return f" [{'' if self.duration is None else f'{self.duration} s '}from {self.offset} s]"

    def waveform(self, longest: Longest | None = None) -> Tensor:
        """Decode the recording: float32, shape (samples,), 16 kHz mono.

        Raises:
            AudioError: the recording is missing or can't be decoded.
            TooLongError: it is longer than `longest`; no more of it has been decoded.
        """
        waveform = load_audio(self._encoded(), name=str(self), longest=longest, segment=self.segment)
        return at_speed(waveform, self.speed)

    def blocks(self, longest: Longest | None = None) -> Iterator[Tensor]:
        """The same block by block, see `audio_blocks`; at another speed as one block."""
        if self.speed != 1:
            yield self.waveform(longest)
            return
        yield from audio_blocks(self._encoded(), name=str(self), longest=longest, segment=self.segment)

    def seconds(self, longest: Longest | None = None) -> float:
        """Length in seconds, from the data source where it gives one, else from the recording's header.

        Raises:
            AudioError: the recording can't be opened.
            TooLongError: by its header it is longer than `longest`.
        """
        if self.duration is not None and not (longest and self.duration > longest.seconds):
            return self.duration / self.speed
        return duration(self._encoded(), name=str(self), longest=longest, segment=self.segment) / self.speed

    def stamp(self, *, strict: bool = True) -> str | None:
        """Stands for the recording's content until that changes; None where only reading it can show a change.

        strict: as in `file_stamp`.
        """
        is_file = isinstance(self.source, Path)
        stamp = file_stamp(self.source, strict=strict) if is_file else self.source.stamp(strict=strict)
        return stamp and stamp + self.place

    def read(self) -> tuple[bytes, str | None]:
        """The file as it is encoded, all of it, and a stamp that stood for the recording before it was read, or None.

        Raises:
            AudioError: it can't be read.
        """
        stamp = self.stamp()
        encoded = self._encoded()
        if isinstance(encoded, bytes):
            return encoded, stamp
        try:
            with open_file(encoded, str(self)) as file:
                return file.read(), stamp
        except OSError as error:
            raise AudioError(f"{self}: cannot be read ({error.strerror}); expected an audio file") from error

    def _encoded(self) -> Path | bytes | str:
        return self.source if isinstance(self.source, Path) else self.source.fetch()
