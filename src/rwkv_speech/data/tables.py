"""Tables of audio files: `metadata.csv` in their folder, one table a split, or LJSpeech's without a header.

    metadata.csv, .tsv, .jsonl      a column `file_name`: what Hugging Face calls AudioFolder; of a folder or of its
                                    sub-folders, which are the splits
    train.tsv, test.tsv, clips/     Common Voice: `path`, `sentence`, `client_id`
    metadata.csv, wavs/             LJSpeech: `LJ001-0001|the text|the text, numbers in words`

Columns are separated by the comma or semicolon, where a cell with one of these in it stands in quotes, or by tab or
bar, where quotes are part of the text. `datasets` itself reads the first only where torchcodec, and so ffmpeg, is
installed; nothing of that is needed for a table of file names.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_speech.data import manifest
from rwkv_speech.data.columns import AUDIO, PAIR, find_columns, read_entries
from rwkv_speech.data.listing import entries, folders, is_audio
from rwkv_speech.data.sample import Row
from rwkv_speech.errors import UserError
from rwkv_speech.files import read_lines

SUFFIXES = (".csv", ".tsv")
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
SEPARATORS = (",", ";", "\t", "|")
EXPECTED = (
    "expected as many columns in each line as in the first; a text that holds the separator or a quotation mark stands "
    "in quotation marks, with those in it doubled"
)


def find_table(folder: Path, split: str | None) -> Path | None:
    """The table of a split, or of the folder itself; None where there is none."""
    place = folder / split if split else folder
    candidates = [place / name for name in METADATA]
    if split:
        candidates += [folder / f"{split}{suffix}" for suffix in (*SUFFIXES, *manifest.SUFFIXES)]
    return next((path for path in candidates if os.path.isfile(path)), None)


def table_splits(folder: Path) -> list[str]:
    """The splits of a folder that holds one table for each."""
    tables = [Path(entry.name).stem for entry in entries(folder) if entry.name.endswith(".tsv")]
    return sorted({path.name for path in folders(folder) if find_table(path, None)} | set(tables))


def read_table(path: str | Path, *, audio_column: str | None = None, text_column: str | None = None) -> list[Row]:
    """Read a table in its order; without ids that are unique, an utterance goes by the name of its file.

    audio_column, text_column: of the file's name and of the text; guessed when None.

    Raises:
        UserError: it can't be read, its columns aren't there, or malformed lines: one error with the first ones'
            numbers and their count.
    """
    path = Path(path)
    lines = read_lines(path)
    first = next(filter(str.strip, lines), None)
    if first is None:
        return []
    separator, header = _header(first, audio_column)
    records = list(_records(lines, separator))
    if header is None:
        header, records = _without_header(path, records)
    else:
        del records[0]
    try:
        columns = dict(find_columns(tuple(header), audio_column, text_column))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    whole = [record.cells for record in records if record.error is None and len(record.cells) == len(header)]
    audio = header.index(columns["audio"])
    if "id" in columns and len({cells[header.index(columns["id"])] for cells in whole}) < len(whole):
        del columns["id"]  # it names something else: the sentence, say

    def parse(record: _Record) -> dict[str, str]:
        if record.error is not None:
            raise ValueError(record.error)
        if len(record.cells) != len(header):
            raise ValueError(f"{len(record.cells)} cells for {len(header)} columns")
        swallowed = (line.split(separator) for line in lines[record.first : record.last])
        if any(len(cells) > audio and is_audio(cells[audio]) for cells in swallowed):
            raise ValueError(f"a quotation mark makes one text of all up to line {record.last}")
        return dict(zip(header, record.cells, strict=True))

    return read_entries(
        path,
        [(f"line {record.first}", record) for record in records],
        parse,
        columns=lambda _: columns,
        folder=_audio_folder(path.parent, [cells[audio] for cells in whole[:20]]),
        expected=EXPECTED,
    )


class _Record(NamedTuple):
    """A line of a table, or several where a text in quotes goes on over their ends.

    first, last: numbers of its lines.
    error: why it can't be read, or None.
    """

    first: int
    last: int
    cells: list[str]
    error: str | None = None


def _header(line: str, audio_column: str | None) -> tuple[str, list[str] | None]:
    """What separates the columns, and their names; None where there is no header, as in LJSpeech."""
    known = {audio_column} if audio_column else {*itertools.chain(*AUDIO), PAIR[0]}
    headers = {separator: next(_records([line], separator)).cells for separator in SEPARATORS}
    for separator, names in headers.items():
        if known & set(names := [name.strip() for name in names]):
            return separator, names
    if "|" in line:
        return "|", None
    return max(headers.items(), key=lambda found: len(found[1]))


def _records(lines: list[str], separator: str) -> Iterator[_Record]:
    if separator in "\t|":
        yield from (_Record(n, n, line.split(separator)) for n, line in enumerate(lines, start=1) if line.strip())
        return
    reader = csv.reader((line + "\n" for line in lines), delimiter=separator, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Record(first, reader.line_num, [], str(error))
        else:
            if cells:
                yield _Record(first, reader.line_num, cells)


def _without_header(path: Path, records: list[_Record]) -> tuple[list[str], list[_Record]]:
    """LJSpeech's columns, and the records with the name of the file after the id."""
    texts = len(records[0].cells) - 1
    named = is_audio(records[0].cells[0])
    if texts > 2 or (texts == 2 and named):
        raise UserError(
            f"{path}: no column of the first line is known by its name, and it isn't of the form id|text or "
            "id|text|normalized text: put the names of the columns into a line above, file_name|text, say"
        )
    suffix = "" if named else ".wav"
    records = [x._replace(cells=[x.cells[0], x.cells[0] + suffix, *x.cells[1:]]) for x in records]
    return ["id", "audio", "text", "normalized_text"][: 2 + texts], records


def _audio_folder(folder: Path, names: list[str]) -> Path:
    """Where the files of a table lie: beside it, or where Common Voice (clips) and LJSpeech (wavs) keep them."""
    if any(os.path.exists(folder / name) for name in names):
        return folder
    return next((inner for name in ("clips", "wavs") if (inner := folder / name).is_dir()), folder)
