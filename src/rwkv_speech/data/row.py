"""One utterance: a recording, wherever it lies, and its transcript."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rwkv_speech.speech.audio import AudioError, duration, load_audio
from rwkv_speech.speech.identity import file_stamp

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """An encoded recording inside a Hugging Face dataset, fetched when it is asked for.

    rows: the dataset; its audio column is of type `Audio(decode=False)`.
    column: name of the audio column.
    index: row number.
    name: what messages call it.
    """

    rows: datasets.Dataset
    column: str
    index: int
    name: str

    def __str__(self) -> str:
        return self.name

    def fetch(self) -> bytes | str:
        """The encoded bytes, or the path of the file that the row points to.

        Raises:
            AudioError: the row holds neither.
        """
        cell = self.rows[self.index][self.column] or {}
        if (source := cell.get("bytes") or cell.get("path")) is None:
            raise AudioError(f"{self.name}: the row holds no audio")
        return source

    def stamp(self) -> str | None:
        """Stands for the row as long as neither the dataset's files nor what was done to it change.

        Returns:
            None where the dataset isn't made of files that could tell.
        """
        files = _files_stamp(tuple(file["filename"] for file in self.rows.cache_files))
        return f"{files} {self.rows._fingerprint} {self.column} {self.index}" if files else None


@functools.lru_cache
def _files_stamp(files: tuple[str, ...]) -> str | None:
    stamps = [file_stamp(Path(file)) for file in files]
    return None if None in stamps else " ".join(stamps)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Utterance:
    """A recording and its transcript; nothing is read before `waveform` is called.

    id: name of the utterance, used in hypotheses and reports.
    text: transcript, as training and scoring use it.
    audio: a file, or a row of a Hugging Face dataset.
    duration: length in seconds, where the source tells it.
    speaker, language, mission: where the source tells them.
    """

    id: str
    text: str
    audio: Path | DatasetRow
    duration: float | None = None
    speaker: str | None = None
    language: str | None = None
    mission: str | None = None

    def waveform(self) -> Tensor:
        """Decode the recording: float32, shape (samples,), 16 kHz mono.

        Raises:
            AudioError: the recording is missing or can't be decoded.
        """
        if isinstance(self.audio, Path):
            return load_audio(self.audio)
        return load_audio(self.audio.fetch(), name=self.audio.name)

    def seconds(self) -> float:
        """Length in seconds, from the source where it tells, else from the recording's header.

        Raises:
            AudioError: the recording can't be opened.
        """
        if self.duration is not None:
            return self.duration
        if isinstance(self.audio, Path):
            return duration(self.audio)
        return duration(self.audio.fetch(), name=self.audio.name)

    def stamp(self) -> str | None:
        """Stands for the recording's content as long as that doesn't change; None where only reading it can tell."""
        return file_stamp(self.audio) if isinstance(self.audio, Path) else self.audio.stamp()

    def read(self) -> tuple[bytes, str | None]:
        """The recording as it is encoded, and a stamp that stood for it before it was read, or None.

        Raises:
            AudioError: it can't be read.
        """
        stamp = self.stamp()
        source = self.audio if isinstance(self.audio, Path) else self.audio.fetch()
        if isinstance(source, bytes):
            return source, stamp
        try:
            # The stamp of a row says nothing of a file that the row points to.
            return Path(source).read_bytes(), stamp if source is self.audio else None
        except OSError as error:
            raise AudioError(f"{self.audio}: cannot be read ({error.strerror}); expected an audio file") from error


@dataclass(slots=True)
class BadSample:
    """An utterance that can't be used: its id, where its audio lies, and why."""

    id: str
    audio: str
    reason: str
