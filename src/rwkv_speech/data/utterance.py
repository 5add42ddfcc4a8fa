"""One utterance: a recording, wherever it lies, and its transcript."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rwkv_speech.speech.audio import AudioError, load_audio

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


@dataclass(slots=True)
class BadSample:
    """An utterance that can't be used: its id, where its audio lies, and why."""

    id: str
    audio: str
    reason: str
