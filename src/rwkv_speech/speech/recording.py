"""A recording, wherever it lies: read when it is asked for, and known again by a stamp."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rwkv_speech.files import printable
from rwkv_speech.speech.audio import AudioError, duration, load_audio
from rwkv_speech.speech.identity import file_stamp


class EncodedAudio(Protocol):
    """An encoded recording that is no file, such as a row of a Hugging Face dataset; str() is what messages call it."""

    def fetch(self) -> bytes | str:
        """The encoded bytes, or the path of a file; raises AudioError."""

    def stamp(self) -> str | None:
        """Stands for the content for as long as it doesn't change; None: nothing but the content itself does."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording; nothing is read before a method is called. str() is what messages call it.

    source: a file, or what fetches encoded audio.
    duration: length in seconds, where the data source gives it.
    """

    source: Path | EncodedAudio
    duration: float | None = None

    def __str__(self) -> str:
        return printable(str(self.source))

    def waveform(self) -> Tensor:
        """Decode the recording: float32, shape (samples,), 16 kHz mono.

        Raises:
            AudioError: the recording is missing or can't be decoded.
        """
        return load_audio(self._encoded(), name=str(self))

    def seconds(self) -> float:
        """Length in seconds, from the data source where it gives one, else from the recording's header.

        Raises:
            AudioError: the recording can't be opened.
        """
        return self.duration if self.duration is not None else duration(self._encoded(), name=str(self))

    def stamp(self) -> str | None:
        """Stands for the recording's content until that changes; None where only reading it can show a change."""
        return file_stamp(self.source) if isinstance(self.source, Path) else self.source.stamp()

    def read(self) -> tuple[bytes, str | None]:
        """The recording as it is encoded, and a stamp that stood for it before it was read, or None.

        Raises:
            AudioError: it can't be read.
        """
        stamp = self.stamp()
        encoded = self._encoded()
        if isinstance(encoded, bytes):
            return encoded, stamp
        try:
            # The stamp of a row says nothing of a file that the row points to.
            return Path(encoded).read_bytes(), stamp if encoded is self.source else None
        except (OSError, ValueError) as error:  # a ValueError of a name with a NUL
            problem = getattr(error, "strerror", None) or error
            raise AudioError(f"{self}: cannot be read ({problem}); expected an audio file") from error

    def _encoded(self) -> Path | bytes | str:
        return self.source if isinstance(self.source, Path) else self.source.fetch()
