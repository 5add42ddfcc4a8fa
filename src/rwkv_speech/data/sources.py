"""Reads a split by its name, from whatever kind of data source there is, into rows."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from rwkv_speech.data import librispeech, manifest, tables
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.hub import read_dataset, read_librispeech_from_hub
from rwkv_speech.data.librispeech import read_librispeech
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.sample import Row
from rwkv_speech.data.tables import read_table
from rwkv_speech.errors import UserError

LIBRISPEECH = "librispeech"
_WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d+)?)")
FILE_SUFFIXES = (*manifest.SUFFIXES, *tables.SUFFIXES)


def load_split(
    split: str | None,
    *,
    data: str = LIBRISPEECH,
    data_dir: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    lower_case: bool | None = None,
    download: bool = False,
    bad_audio: BadSamples | None = None,
) -> list[Row]:
    """Find a split and list its utterances, always in the same order.

    split: one name or several joined by "+", see `split_names`. A name with a slash, or ending like a manifest or a
        table, is a path, and is read instead of `data` and `data_dir`. None or "" is all there is, where that isn't
        divided into splits.
    data: "librispeech", a manifest (*.jsonl, *.json), a table (*.csv, *.tsv), a local folder, or a Hugging Face name
        (`owner/name[:configuration]`). "librispeech" alone comes from the Hugging Face Hub, split by split.
    data_dir: a local folder to read instead. It goes with `data="librispeech"` only.
        A folder is read by what it holds: LibriSpeech's layout if there are *.trans.txt files, tables of
        audio files if there are such (see `tables`), and else a Hugging Face dataset.
    audio_column, text_column: for all but LibriSpeech's layout; guessed when None.
    lower_case: whether to lower-case transcripts; when None, those of LibriSpeech and its layout.
    download: first fetch the official LibriSpeech splits that `data_dir` lacks.
    bad_audio: see `read_librispeech`.

    Raises:
        UserError: arguments that contradict each other, a missing folder or split, an empty one, or malformed
            contents.
    """
    if data_dir is not None and data != LIBRISPEECH:
        raise UserError(f"--data {data} and --data_dir {data_dir} both say where the data is: give one of them")
    parts = split_names(split, within=data_dir or data) if split else [None]
    if download:
        if data != LIBRISPEECH or data_dir is None or not split:
            raise UserError(
                "--download fetches LibriSpeech into a folder: give --data_dir, splits, and no other --data"
            )
        librispeech.download((part for part in parts if not _is_path(part)), data_dir)
    columns = {"audio_column": audio_column, "text_column": text_column}
    utterances: list[Row] = []
    for part in parts:
        place, name = (part, None) if part is not None and _is_path(part) else (data_dir or data, part)
        if place != data and not os.path.exists(os.path.expanduser(place)):
            raise UserError(f"no such file or folder: {place}")
        found, is_librispeech = _read(place, name, columns=columns, bad_audio=bad_audio)
        if not found:
            raise UserError(
                f"{place}: {f'split {name!r}' if name else 'it'} holds no utterances; expected at least one"
            )
        if is_librispeech if lower_case is None else lower_case:
            found = [replace(utterance, text=utterance.text.lower()) for utterance in found]
        utterances += found
    return utterances


def split_names(asked: str, within: str = "", what: str = "split") -> list[str]:
    """The names that are joined by "+" in what was asked for.

    A "+" may also be part of a name: what is there by the name as it stands, as a path or in the folder `within`, is
    not taken apart.

    Raises:
        UserError: an empty name.
    """
    pieces, names = asked.split("+"), []
    while pieces:
        joined = ("+".join(pieces[:count]) for count in range(len(pieces), 1, -1))
        name = next((name for name in joined if _is_there(name, within, weighted=True)), pieces[0])
        del pieces[: name.count("+") + 1]
        names.append(name if _is_there(name, within, weighted=True) else name.strip())
    if not all(names):
        raise UserError(
            f"{what} {asked!r} has an empty name; expected one name, or several joined by '+'; "
            "one that has a '+' in it must be there"
        )
    return names


def split_weights(asked: str, within: str = "") -> dict[str, float]:
    """The names of `split_names`, and how often a pass takes each: `a.jsonl:2+b.jsonl` takes the first twice.

    Raises:
        UserError: an empty name, or a weight of 0.
    """
    weights: dict[str, float] = {}
    for part in split_names(asked, within):
        found = None if _is_there(part, within) else _WEIGHTED.fullmatch(part)
        name, weight = (found[1], float(found[2])) if found else (part, 1.0)
        if not weight:
            raise UserError(f"split {part!r}: expected a weight above 0")
        weights[name] = weights.get(name, 0.0) + weight
    return weights


def _is_there(name: str, within: str, *, weighted: bool = False) -> bool:
    """Whether there is something of the name; weighted: also without the weight that it may end with."""
    place = name if _is_path(name) else os.path.join(within, name)
    if weighted and (found := _WEIGHTED.fullmatch(name)) and _is_there(found[1], within):
        return True
    return bool(name) and os.path.exists(os.path.expanduser(place))


def _is_path(part: str) -> bool:
    return "/" in part or part.endswith(FILE_SUFFIXES)


def _read(
    place: str, split: str | None, *, columns: dict[str, str | None], bad_audio: BadSamples | None
) -> tuple[list[Row], bool]:
    """The utterances, and whether they are LibriSpeech's or come in its layout."""
    path = Path(os.path.expanduser(place))
    if place.endswith(FILE_SUFFIXES):
        if split is not None:
            raise UserError(f"{place} is a manifest, without splits: give a file as the split, not {split!r}")
        return _read_file(path, **columns), False
    if place != LIBRISPEECH:
        if not os.path.isdir(path):
            if path.is_absolute() or place.startswith(".") or place.count("/") != 1:
                raise UserError(f"no such folder: {place}; expected one, or owner/name of a Hugging Face dataset")
            return read_dataset(place, split=split, **columns), False
        if not librispeech.has_layout(path):
            return _read_folder(path, split, **columns), False
    if any(columns.values()):
        raise UserError(f"{place} has no columns: --audio_column and --text_column are for tables and datasets")
    if place != LIBRISPEECH:
        return read_librispeech(path, split=split, bad_audio=bad_audio), True
    if split is None:
        raise UserError(f"name a split of LibriSpeech, one of {', '.join(librispeech.SPLITS)}")
    return read_librispeech_from_hub(split), True


def _read_file(path: Path, **columns: str | None) -> list[Row]:
    read = read_table if path.name.endswith(tables.SUFFIXES) else read_manifest
    return read(path, **columns)


def _read_folder(folder: Path, split: str | None, **columns: str | None) -> list[Row]:
    if table := tables.find_table(folder, split):
        return _read_file(table, **columns)
    if splits := tables.table_splits(folder):
        problem = f"no split {split!r}" if split else "name a split"
        raise UserError(f"{folder}: {problem}; there are {', '.join(splits)}")
    if split and tables.find_table(folder, None):
        raise UserError(f"{folder}: no split {split!r}; there are none, so name it without a split")
    return read_dataset(folder, split=split, **columns)
