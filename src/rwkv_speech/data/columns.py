"""What the columns of tables and the keys of manifests are called, and how an entry of either becomes a row."""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from rwkv_speech.data.sample import Audio, Message, Row
from rwkv_speech.errors import UserError
from rwkv_speech.files import printable
from rwkv_speech.speech.recording import Recording

# The column is of the first of these groups of which one is there; of that group there must be no other.
AUDIO = (("audio", "audio_filepath"), ("file_name",), ("wav", "path", "file", "speech"))
TEXT = (("text",), ("sentence", "transcription", "transcript", "translation", "normalized_text", "txt"))
PAIR = ("source", "target")  # audio and text, where none of those is there
OPTIONAL = {
    "id": ("id", "utterance_id", "key"),
    "duration": ("duration",),  # s
    "offset": ("offset",),  # s, of a segment of a longer file
    "speaker": ("speaker_id", "speaker", "client_id"),
    "language": ("language", "locale"),
    "mission": ("mission",),
    "target_language": ("target_language",),
    "transcript": ("transcript",),  # of what is translated
    "answers": ("answers",),  # a list of texts, all of them right
    "prompt": ("prompt",),
}

Entry = TypeVar("Entry")


@functools.lru_cache
def find_columns(names: tuple[str, ...], audio: str | None = None, text: str | None = None) -> dict[str, str]:
    """Which column holds which field of a `Row`: always its audio and its text (or answers), and others that there are.

    audio, text: the columns of these; guessed when None.

    Raises:
        ValueError: there is no such column, or more than one may be meant; the message says so.
    """
    if set(PAIR) <= set(names) and not any(set(group) & set(names) for group in (*AUDIO, *TEXT)):
        audio, text = audio or PAIR[0], text or PAIR[1]
    found = {"audio": _column(names, audio, AUDIO, "audio")}
    if text or "answers" not in names or any(set(group) & set(names) for group in TEXT):
        found["text"] = _column(names, text, TEXT, "text")
    others = [name for name in names if name not in found.values()]
    optional = {field: next((name for name in known if name in others), None) for field, known in OPTIONAL.items()}
    return found | {field: name for field, name in optional.items() if name}


def _column(names: tuple[str, ...], asked: str | None, known: tuple[tuple[str, ...], ...], what: str) -> str:
    groups = ((asked,),) if asked else known
    found = next(filter(None, ([name for name in names if name in group] for group in groups)), [])
    if not found:
        there = printable(", ".join(names))[:200] or "nothing"
        raise ValueError(f"no {groups[0][0]!r} among {there}; --{what}_column can name another")
    if len(found) > 1:
        raise ValueError(f"both {' and '.join(map(repr, found))}; --{what}_column can name one")
    return found[0]


def read_entries(
    path: Path,
    entries: Iterable[tuple[str, Entry]],
    parse: Callable[[Entry], Mapping[str, Any]],
    *,
    columns: Callable[[tuple[str, ...]], dict[str, str]],
    folder: Path,
    expected: str,
) -> list[Row]:
    """The rows of all entries of a file.

    entries: each with where it stands, "line 3".
    parse: an entry as its columns and their values; raises ValueError.
    columns: gives the column of each field; see `find_columns`.
    folder: what paths are relative to.
    expected: what the file must be like, for the message.

    Raises:
        UserError: malformed entries: one error with the first ones, where they stand, and their count.
    """
    rows, problems = [], []
    for where, entry in entries:
        try:
            values = parse(entry)
            if "messages" in values and set(values).isdisjoint(chain(*AUDIO)):
                rows.append(_conversation(values, folder, f"{path.name}, {where}"))
            else:
                rows.append(_row(values, columns(tuple(values)), folder))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        count = f"{len(problems)} malformed line{'s' * (len(problems) > 1)}"
        raise UserError(f"{path}: {count} ({'; '.join(problems[:3])}{more}); {expected}")
    cut = {recording.source for row in rows for recording in row.recordings if recording.offset}
    return [_uncut(row, cut) for row in rows]


def _uncut(row: Row, cut: Container[Path]) -> Row:
    """Of files that nothing cuts: an offset of 0, as NeMo writes it everywhere, makes no segment of them."""

    def whole(part: Audio | str) -> Audio | str:
        uncut = isinstance(part, Recording) and part.offset == 0 and part.source not in cut
        return replace(part, offset=None) if uncut else part

    if row.messages:
        return replace(row, messages=tuple(replace(x, parts=tuple(map(whole, x.parts))) for x in row.messages))
    audio = whole(row.audio)
    return row if audio is row.audio else replace(row, id=row.id.removesuffix(row.audio.place), audio=audio)


def _row(entry: Mapping[str, Any], columns: dict[str, str], folder: Path) -> Row:
    """Raises ValueError, with what is wrong as its message."""
    audio = _string(entry, columns["audio"])
    if not audio:
        raise ValueError(f"{columns['audio']!r} is empty")
    given = {field: entry.get(column) for field, column in columns.items() if entry.get(column) not in (None, "")}
    answers = _texts(given, "answers")
    if "text" in columns:
        text = _whole(_string(entry, columns["text"]), columns["text"])
    elif answers:
        text = answers[0]
    else:
        raise ValueError("neither 'text' nor 'answers'")
    recording = _recording(folder / audio, given)
    return Row(
        _name(given, "id") or printable(audio) + recording.place,
        text,
        recording,
        speaker=_name(given, "speaker"),
        language=_name(given, "language"),
        mission=_name(given, "mission"),
        target_language=_name(given, "target_language"),
        transcript=_text(given, "transcript"),
        answers=answers,
        prompt=_text(given, "prompt"),
    )


def _recording(path: Path, given: Mapping[str, Any]) -> Recording:
    duration, offset = _seconds(given, "duration"), _seconds(given, "offset")
    if offset and duration == 0:
        raise ValueError("'duration' is 0, of a segment")
    return Recording(path, duration, offset if offset or duration else None)


def _conversation(entry: Mapping[str, Any], folder: Path, name: str) -> Row:
    """The row of an entry with `messages`; raises ValueError.

    name: of the row, where it has no id.
    """
    given = entry["messages"]
    if not isinstance(given, list) or not given:
        raise ValueError(f"'messages' is {reprlib.repr(given)}, not a list of messages")
    messages = []
    for number, message in enumerate(given, start=1):
        try:
            messages.append(_message(message, ("user", "assistant")[len(messages) % 2], folder))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if len(messages) % 2:
        raise ValueError("the last of 'messages' is the user's, not an answer")
    return Row(
        _name(entry, "id") or printable(name),
        messages[-1].parts[0],
        None,
        speaker=_name(entry, "speaker"),
        language=_name(entry, "language"),
        mission=_name(entry, "mission"),
        messages=tuple(messages),
    )


def _message(message: Any, role: str, folder: Path) -> Message:
    """A message that is to be of this role: its typed text, and then its audio."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{reprlib.repr(message)}, not an object")
    if message.get("role") != role:
        raise ValueError(
            f"'role' is {reprlib.repr(message.get('role'))}, not {role!r}: they take turns, the user first"
        )
    given = {key: value for key, value in message.items() if value not in (None, "")}
    parts: list[Audio | str] = []
    if "text" in given:
        parts.append(_whole(_string(given, "text"), "text"))
    if audio := next((key for key in AUDIO[0] if key in given), None):
        if role == "assistant":
            raise ValueError(f"{audio!r} of the assistant, whose answers are texts")
        parts.append(_recording(folder / _string(given, audio), given))
    if not any(isinstance(part, Recording) or part.strip() for part in parts):
        raise ValueError(f"no 'text'{' and no audio' * (role == 'user')}")
    return Message(role, tuple(parts))


def _whole(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half of a pair of surrogates, {reprlib.repr(text)}") from None
    return text


def _text(entry: Mapping[str, Any], key: str) -> str | None:
    """As it stands, unlike `_name`."""
    return None if _name(entry, key) is None else _whole(str(entry[key]), key)


def _texts(entry: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    value = entry.get(key)
    if value is None:
        return None
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}, not a list of strings")
    return tuple(_whole(text, key) for text in texts)


def _string(entry: Mapping[str, Any], key: str) -> str:
    value = entry[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}, not a string")
    return value


def _name(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}, not a string or a number")
    return None if value is None else printable(str(value))


def _seconds(entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    try:
        seconds = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{key!r} is {reprlib.repr(value)}, not a number of seconds")
    return seconds
