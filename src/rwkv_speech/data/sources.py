"""Reads a split by its name, from whatever kind of data source there is, into rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rwkv_speech.data import librispeech
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.hub import read_dataset, read_librispeech_from_hub
from rwkv_speech.data.librispeech import read_librispeech
from rwkv_speech.data.manifest import SUFFIXES as MANIFEST_SUFFIXES
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.sample import Row
from rwkv_speech.data.tables import has_table, read_audio_folder
from rwkv_speech.errors import UserError

LIBRISPEECH = "librispeech"


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

    split: one name or several joined by "+". A name with a slash, or ending in .json or .jsonl, is a path,
        and is read instead of `data` and `data_dir`. None or "" is all there is, where that isn't divided
        into splits.
    data: "librispeech", a manifest (*.jsonl, *.json), a local folder, or a Hugging Face name
        (`owner/name[:configuration]`). "librispeech" alone comes from the Hugging Face Hub, split by split.
    data_dir: a local folder to read instead. It goes with `data="librispeech"` only.
        A folder is read by what it holds: LibriSpeech's layout if there are *.trans.txt files, a table of
        audio files if there is a metadata.csv or metadata.jsonl, and else a Hugging Face dataset.
    audio_column, text_column: for Hugging Face datasets and tables; guessed when None.
    lower_case: whether to lower-case transcripts; when None, those of LibriSpeech and its layout.
    download: first fetch the official LibriSpeech splits that `data_dir` lacks.
    bad_audio: see `read_librispeech`.

    Raises:
        UserError: arguments that contradict each other, a missing folder or split, an empty one, or malformed
            contents.
    """
    if data_dir is not None and data != LIBRISPEECH:
        raise UserError(f"--data {data} and --data_dir {data_dir} both say where the data is: give one of them")
    parts = _parts(split)
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
        if place != data and not Path(place).expanduser().exists():
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


def _parts(split: str | None) -> list[str | None]:
    if not split:
        return [None]
    if _is_path(split) and Path(split).expanduser().exists():  # a path may have a "+" in it
        return [split]
    parts = [part.strip() for part in split.split("+")]
    if not all(parts):
        raise UserError(f"split {split!r} has an empty name; expected one name, or several joined by '+'")
    return list(parts)


def _is_path(part: str) -> bool:
    return "/" in part or part.endswith(MANIFEST_SUFFIXES)


def _read(
    place: str, split: str | None, *, columns: dict[str, str | None], bad_audio: BadSamples | None
) -> tuple[list[Row], bool]:
    """The utterances, and whether they are LibriSpeech's or come in its layout."""
    path = Path(place).expanduser()
    if place != LIBRISPEECH and not place.endswith(MANIFEST_SUFFIXES):
        if not path.is_dir():
            if path.is_absolute() or place.startswith(".") or place.count("/") != 1:
                raise UserError(f"no such folder: {place}; expected one, or owner/name of a Hugging Face dataset")
            return read_dataset(place, split=split, **columns), False
        if not librispeech.has_layout(path):
            read = read_audio_folder if has_table(path) else read_dataset
            return read(path, split=split, **columns), False
    if any(columns.values()):
        raise UserError(f"{place} has no columns: --audio_column and --text_column are for Hugging Face datasets")
    if place.endswith(MANIFEST_SUFFIXES):
        if split is not None:
            raise UserError(f"{place} is a manifest, without splits: give a manifest as the split, not {split!r}")
        return read_manifest(path), False
    if place != LIBRISPEECH:
        return read_librispeech(path, split=split, bad_audio=bad_audio), True
    if split is None:
        raise UserError(f"name a split of LibriSpeech, one of {', '.join(librispeech.SPLITS)}")
    return read_librispeech_from_hub(split), True
