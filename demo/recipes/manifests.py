"""Rows -> a manifest."""

import json
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech.data.sample import Row
from rwkv_speech.files import write_whole


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object to a line. A file that says the same is left alone: training goes by its time."""
    content = "".join(json.dumps(_entry(row)) + "\n" for row in rows).encode()
    if not path.exists() or path.read_bytes() != content:
        write_whole(path, content)


def _entry(row: Row) -> dict[str, object]:
    entry = {
        "audio": str(Path(row.audio.source).resolve()),
        "text": row.text,
        "id": row.id,
        "speaker": row.speaker,
        "duration": row.audio.duration,
        "offset": row.audio.offset,
        "language": row.language,
        "mission": row.mission,
        "target_language": row.target_language,
        "transcript": row.transcript,
        "answers": row.answers,
        "prompt": row.prompt,
    }
    return {name: value for name, value in entry.items() if value is not None}
