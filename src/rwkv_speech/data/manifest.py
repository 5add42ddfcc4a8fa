"""Manifests: JSON lines, one utterance each, `{"audio": path, "text": string}`.

Paths are relative to the manifest. Optional: `id`, `duration` (s), `speaker`, `language`, `mission`, `prompt`,
`target_language` and `transcript` of what is translated, and `answers`: a list of texts, all of them right; `text` may
then be left out, and is the first of them. NeMo's `audio_filepath` is accepted for `audio`; other keys are ignored, but
for `offset`: segments of longer files aren't supported, and reading the whole file instead would train on wrong pairs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rwkv_speech.data.sample import Row
from rwkv_speech.errors import UserError
from rwkv_speech.speech.recording import Recording

SUFFIXES = (".jsonl", ".json")


def read_manifest(path: str | Path) -> list[Row]:
    """Read a manifest in the order of its lines; without an `id`, an utterance goes by its path as written.

    Raises:
        UserError: no such file, not UTF-8, or malformed lines: one error with the first ones' numbers and
            their count.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such manifest: {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as UTF-8 text ({error})") from error
    utterances, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            utterances.append(_parse(line, folder=path.parent))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        count = f"{len(problems)} malformed line{'s' * (len(problems) > 1)}"
        raise UserError(
            f"{path}: {count} ({'; '.join(problems[:3])}{more}); "
            'each line must be one object like {"audio": "a.flac", "text": "what is said"}'
        )
    return utterances


def _parse(line: str, *, folder: Path) -> Row:
    """Raises ValueError, with what is wrong as its message."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, {error.msg} at column {error.colno}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON {type(entry).__name__}, not an object")
    if entry.get("offset") is not None:
        raise ValueError("'offset' isn't supported, cut the segments into files of their own")
    if "audio" in entry and "audio_filepath" in entry:
        raise ValueError("both 'audio' and 'audio_filepath'")
    audio = _string(entry, "audio_filepath" if "audio_filepath" in entry else "audio", required=True)
    answers = _answers(entry)
    text = _string(entry, "text", required=not answers)
    if not audio:
        raise ValueError("'audio' is empty")
    return Row(
        _string(entry, "id") or audio,
        answers[0] if text is None else text,
        Recording(folder / audio, duration=_duration(entry)),
        speaker=_string(entry, "speaker"),
        language=_string(entry, "language"),
        mission=_string(entry, "mission"),
        target_language=_string(entry, "target_language"),
        transcript=_string(entry, "transcript"),
        answers=answers,
        prompt=_string(entry, "prompt"),
    )


def _string(entry: dict[str, Any], key: str, *, required: bool = False) -> str | None:
    value = entry.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, str):
        raise ValueError(f"no {key!r}" if key not in entry else f"{key!r} is {value!r}, not a string")
    return value


def _answers(entry: dict[str, Any]) -> tuple[str, ...] | None:
    value = entry.get("answers")
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(answer, str) for answer in value):
        raise ValueError(f"'answers' is {value!r}, not a list of strings")
    return tuple(value)


def _duration(entry: dict[str, Any]) -> float | None:
    value = entry.get("duration")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"'duration' is {value!r}, not a number of seconds")
    return float(value)
