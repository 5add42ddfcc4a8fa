"""Rows and samples: what a data source holds for one recording, and what a model is to make of it.

A row of a manifest becomes a `Sample` by its mission. Everything that is learnt, evaluated or transcribed is a sample:
a list of messages, each of a role and of parts that are audio or text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rwkv_speech.speech.recording import Recording

Role = Literal["user", "assistant"]
Audio = Recording | Tensor  # a tensor is a waveform, (samples,) float32 at 16 kHz


@dataclass(frozen=True, slots=True)
class Row:
    """What a data source holds for one recording.

    id: name of the row, unique within its split; used in hypotheses and reports.
    text: what belongs to the recording, as training and scoring use it: its transcript, say; None where it isn't known.
    audio: the recording, or its waveform.
    speaker, language, mission: where the source gives them; and
    target_language, transcript: where the text is a translation, its language, and what is said in the recording.
    answers: all texts that are right, where there are several; `text` is what is learnt.
    prompt: typed text that goes before the audio, where the mission has that.
    messages: of a conversation, in the place of the audio; `text` is then that of the last answer.
    """

    id: str
    text: str | None
    audio: Audio | None
    speaker: str | None = None
    language: str | None = None
    mission: str | None = None
    target_language: str | None = None
    transcript: str | None = None
    answers: tuple[str, ...] | None = None
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None

    @property
    def recordings(self) -> list[Audio]:
        """All recordings, in their order."""
        return recordings_of(self.messages) if self.messages else [] if self.audio is None else [self.audio]

    @property
    def place(self) -> str:
        """Where its audio lies, for messages."""
        if self.messages:
            return "a conversation"
        return str(self.audio) if isinstance(self.audio, Recording) else "an array"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks, and what, in order."""

    role: Role
    parts: tuple[Audio | str, ...]


def recordings_of(messages: Iterable[Message]) -> list[Audio]:
    return [part for message in messages for part in message.parts if not isinstance(part, str)]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a model reads, and what it is to answer.

    id: the row's.
    messages: user and assistant by turns, the user first. The last one is the answer that is asked for; where it is the
        user's, the answer is not known.
    mission: the name of the mission that made it.
    """

    id: str
    messages: tuple[Message, ...]
    mission: str = ""

    @property
    def audio(self) -> list[Audio]:
        """All recordings, in the order in which the model reads them."""
        return recordings_of(self.messages)

    @property
    def reference(self) -> str:
        """The text of the last answer; empty where it is not known."""
        last = self.messages[-1]
        return "".join(part for part in last.parts if isinstance(part, str)) if last.role == "assistant" else ""


def one_round(id: str, asked: Sequence[Audio | str | None], answer: str | None) -> Sample:
    """A sample of one round; without an answer it ends with what is asked.

    Raises:
        SampleError: None is asked.
    """
    if any(part is None for part in asked):
        raise SampleError("messages, but no audio of its own: it is a row of the mission converse")
    messages = [Message("user", tuple(asked))]
    if answer is not None:
        messages.append(Message("assistant", (answer,)))
    return Sample(id, tuple(messages))


class SampleError(ValueError):
    """A row that can't be used: the message says why."""


def fingerprint(rows: Iterable[Row], sample_of: Callable[[Row], Sample], *more: object) -> str:
    """16 hexadecimal digits that differ where what is made of rows does: ids, texts, recordings and their order.

    A recording is known by its place, its stamp and the length that its source gives; it isn't read.

    more: what else makes a difference.
    """
    found = hashlib.blake2b(repr(more).encode(), digest_size=8)
    for row in rows:
        found.update(repr((row.id, row.text)).encode())
        with suppress(SampleError):  # which its reader will report
            sample = sample_of(row)
            found.update(sample.mission.encode())
            for message in sample.messages:
                found.update(repr((message.role, *map(_traits, message.parts))).encode())
    return found.hexdigest()


def _traits(part: Audio | str) -> tuple[object, ...]:
    if isinstance(part, Recording):
        return str(part), part.duration, part.stamp(strict=False)
    return ("text", part) if isinstance(part, str) else ("waveform", part.numpy().tobytes())


@dataclass(slots=True)
class BadSample:
    """A sample that can't be used: its id, where its audio lies, and why."""

    id: str
    audio: str
    reason: str
