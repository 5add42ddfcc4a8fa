"""Folders of audio files described by a table, `metadata.csv` or `metadata.jsonl` with a column `file_name`.

It is the layout that Hugging Face calls AudioFolder. `datasets` itself reads it only where torchcodec, and so
ffmpeg, is installed; nothing of that is needed for a table of file names.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rwkv_speech.data.hub import TEXT_COLUMNS
from rwkv_speech.data.sample import Row
from rwkv_speech.errors import UserError
from rwkv_speech.speech.recording import Recording

TABLES = ("metadata.csv", "metadata.jsonl")


def has_table(folder: Path) -> bool:
    """Whether the folder, or one right below it, holds such a table."""
    return _table(folder) is not None or bool(_splits(folder))


def read_audio_folder(
    folder: Path, *, split: str | None = None, audio_column: str | None = None, text_column: str | None = None
) -> list[Row]:
    """Read the folder, or the split that is its sub-folder, in the order of the table.

    audio_column: path relative to the table; `file_name` when None.
    text_column: guessed as for other Hugging Face datasets when None.

    Raises:
        UserError: no such split, or a table that can't be read or lacks the columns.
    """
    path = _table(folder if split is None else folder / split)
    if path is None:
        problem = "name a split" if split is None else f"no split {split!r}"
        there = ", ".join(_splits(folder)) or "none, so name it without a split"
        raise UserError(f"{folder}: {problem}; there are {there}")
    rows = _read_table(path)
    columns = list(rows[0]) if rows else []
    audio_column = audio_column or "file_name"
    text_column = text_column or next((column for column in TEXT_COLUMNS if column in columns), "text")
    for number, row in enumerate(rows, start=1):
        for flag, column in (("audio", audio_column), ("text", text_column)):
            if not isinstance(row.get(column), str):
                raise UserError(
                    f"{path}: entry {number} has no {column!r}; name the {flag} column by --{flag}_column, "
                    f"the columns are {', '.join(columns)}"
                )
    return [Row(row[audio_column], row[text_column], Recording(path.parent / row[audio_column])) for row in rows]


def _table(folder: Path) -> Path | None:
    return next((path for name in TABLES if (path := folder / name).is_file()), None)


def _splits(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and _table(path) is not None)


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: each line must be one JSON object")
    return rows
