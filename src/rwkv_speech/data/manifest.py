"""Manifests: JSON lines, one utterance each, `{"audio": path, "text": string}`, or one array of such objects.

Paths are relative to the manifest. Optional: `id`, `duration` (s), `offset` (s), `speaker`, `language`, `mission`,
`prompt`, `target_language` and `transcript` of what is translated, and `answers`: a list of texts, all of them right;
`text` may then be left out, and is the first of them. What else the keys may be called stands in `columns`, among it
NeMo's `audio_filepath`. Other keys are ignored.

An entry with `messages` is a conversation: the user's and the assistant's by turns, the last one an answer.

    {"messages": [{"role": "user", "audio": "1.flac"}, {"role": "assistant", "text": "..."}, ...]}

A message of the user's has `text`, `audio` (with `offset` and `duration`, as below), or both, and then the text comes
first. Without an `id`, a conversation goes by its place in the file.

An `offset` above 0 makes the row a segment of its file: from there on for the `duration`, or to the end. Rows of the
same file with an offset of 0 and a duration are then segments, too; else they are the whole file, as are rows without.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from rwkv_speech.data.columns import find_columns, read_entries
from rwkv_speech.data.sample import Row
from rwkv_speech.errors import UserError
from rwkv_speech.files import read_lines

SUFFIXES = (".jsonl", ".json")


def read_manifest(path: str | Path, *, audio_column: str | None = None, text_column: str | None = None) -> list[Row]:
    """Read a manifest in the order of its lines; without an `id`, an utterance goes by its path as written.

    audio_column, text_column: keys of the path and the text; guessed when None.

    Raises:
        UserError: no such file, not UTF-8, or malformed lines: one error with the first ones' numbers and
            their count.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"no such manifest: {path}")
    lines = read_lines(path)
    array = _array(path, lines)
    if array is None:
        entries, parse = [(f"line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()], _from_line
    else:
        entries, parse = [(f"entry {n}", entry) for n, entry in enumerate(array, start=1)], _checked
    return read_entries(
        path,
        entries,
        parse,
        columns=functools.partial(find_columns, audio=audio_column, text=text_column),
        folder=path.parent,
        expected='each line must be one object like {"audio": "a.flac", "text": "what is said"}',
    )


def _array(path: Path, lines: list[str]) -> list[Any] | None:
    """The file as one JSON array; None where it is of lines that are JSON, each for itself."""
    first = next(filter(str.strip, lines), "")
    if not first.lstrip().startswith("["):
        return None
    try:
        return _load("\n".join(lines))
    except ValueError as error:
        try:
            _load(first)
        except ValueError:
            raise UserError(f"{path}: {error}; expected an array of objects, or one object to a line") from None
        return None


def _from_line(line: str) -> dict[str, Any]:
    return _checked(_load(line))


def _checked(entry: Any) -> dict[str, Any]:
    """The entry, if it is one that can be read; raises ValueError, with what is wrong as its message."""
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON {type(entry).__name__}, not an object")
    return entry


def _load(text: str) -> Any:
    """Raises ValueError, in one line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON, {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError:  # the limit of Python for the digits of an integer
        raise ValueError("a number of thousands of digits") from None
