"""Rows -> a manifest."""

import json
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech.data.sample import Message, Row
from rwkv_speech.files import write_whole
from rwkv_speech.speech.recording import Recording


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object to a line. A file that says the same is left alone: training goes by its time."""
    content = "".join(json.dumps(_entry(row)) + "\n" for row in rows).encode()
    if not path.exists() or path.read_bytes() != content:
        write_whole(path, content)


def _entry(row: Row) -> dict[str, object]:
    said = {"messages": [_message(message) for message in row.messages]} if row.messages else _part(row.audio)
    entry = said | {
        "text": None if row.messages else row.text,
        "id": row.id,
        "speaker": row.speaker,
        "language": row.language,
        "mission": row.mission,
        "target_language": row.target_language,
        "transcript": row.transcript,
        "answers": row.answers,
        "prompt": row.prompt,
    }
    return {name: value for name, value in entry.items() if value is not None}


def _message(message: Message) -> dict[str, object]:
    entry: dict[str, object] = {"role": message.role}
    for part in message.parts:
        entry |= {"text": part} if isinstance(part, str) else _part(part)
    return entry


def _part(recording: Recording) -> dict[str, object]:
    entry = {"audio": str(Path(recording.source).resolve()), "duration": recording.duration, "offset": recording.offset}
    return {name: value for name, value in entry.items() if value is not None}
