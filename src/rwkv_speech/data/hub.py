"""Hugging Face datasets, from the Hub or a local folder; the audio is decoded by this package."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_speech.data.columns import OPTIONAL, TEXT
from rwkv_speech.data.sample import Row
from rwkv_speech.errors import UserError, reason
from rwkv_speech.speech.audio import AudioError
from rwkv_speech.speech.identity import file_stamp
from rwkv_speech.speech.recording import Recording

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("rwkv_speech")

# The first one present is taken.
AUDIO_COLUMNS = ("audio", "speech")
TEXT_COLUMNS = tuple(itertools.chain(*TEXT))

LIBRISPEECH = "openslr/librispeech_asr"
LIBRISPEECH_SPLITS = {
    "train-clean-100": "train.clean.100",
    "train-clean-360": "train.clean.360",
    "train-other-500": "train.other.500",
    "dev-clean": "validation.clean",
    "dev-other": "validation.other",
    "test-clean": "test.clean",
    "test-other": "test.other",
}


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """An encoded recording inside a Hugging Face dataset, fetched when it is asked for.

    rows: the dataset; its audio column is of type `Audio(decode=False)`.
    column: name of the audio column.
    index: row number.
    name: what messages call it.
    embedded: whether all rows of the dataset hold their bytes; others may point to files.
    """

    rows: datasets.Dataset
    column: str
    index: int
    name: str
    embedded: bool

    def __str__(self) -> str:
        return self.name

    def fetch(self) -> bytes | str:
        """The encoded bytes, or the path of the file that the row points to.

        Raises:
            AudioError: the row holds neither.
        """
        try:
            cell = self.rows[self.index][self.column] or {}
        except Exception as error:  # damaged files make a dozen kinds
            raise AudioError(f"{self.name}: the row can't be read ({reason(error)})") from error
        if (source := cell.get("bytes") or cell.get("path")) is None:
            raise AudioError(f"{self.name}: the row holds no audio")
        return source

    def stamp(self, *, strict: bool = True) -> str | None:
        """That of the file which the row points to; else one that changes with the dataset's files and rows.

        strict: as in `file_stamp`.

        Returns:
            None where the file has none, or the dataset isn't made of files that have.
        """
        if not self.embedded:
            try:
                source = self.fetch()
            except AudioError:
                return None
            if isinstance(source, str):
                return file_stamp(Path(source), strict=strict)
        files = _files_stamp(tuple(file["filename"] for file in self.rows.cache_files), strict)
        return f"{files} {self.rows._fingerprint} {self.column} {self.index}" if files else None


@functools.lru_cache
def _files_stamp(files: tuple[str, ...], strict: bool) -> str | None:
    stamps = [file_stamp(Path(file), strict=strict) for file in files]
    return None if None in stamps else " ".join(stamps)  # type: ignore[arg-type]


def read_dataset(
    name: str | Path,
    *,
    split: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
) -> list[Row]:
    """Read one split; text is read at once, audio when an utterance asks for it.

    name: a local folder (made by `save_to_disk`, or of Parquet files and the like), or a name on the Hub,
        `owner/name` or `owner/name:configuration`.
    split: as the dataset calls it; may be a slice such as `train[:10%]` where the folder wasn't made by
        `save_to_disk`. None where the dataset has only one.
    audio_column, text_column: guessed when None.

    Raises:
        UserError: no such dataset, split or column, or it can't be fetched.
    """
    with _reading(name, split):
        rows = _open(name, split)
        return _utterances(rows, name=str(name), audio_column=audio_column, text_column=text_column)


def read_librispeech_from_hub(split: str) -> list[Row]:
    """Read an official LibriSpeech split (`train-clean-100`, ...) from the Hub, fetching no other split.

    Raises:
        UserError: no such split, or it can't be fetched.
    """
    if (hub_split := LIBRISPEECH_SPLITS.get(split)) is None:
        raise UserError(f"LibriSpeech has no split {split!r}; there are {', '.join(LIBRISPEECH_SPLITS)}")
    # Without data_files, `datasets` fetches all of a configuration (60 GB) for any split of it.
    with _reading(LIBRISPEECH, hub_split):
        rows = _open(LIBRISPEECH, hub_split, data_files={hub_split: f"all/{hub_split}/*.parquet"})
        return _utterances(rows, name=LIBRISPEECH, audio_column="audio", text_column="text")


@contextlib.contextmanager
def _reading(name: str | Path, split: str | None) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a dozen kinds: of `datasets`, pyarrow, the hub
        where = f"split {split} of {name}" if split else name
        why = reason(error.__cause__ or error)
        raise UserError(f"can't read {where} as a Hugging Face dataset: {why}") from error


def _open(name: str | Path, split: str | None, *, data_files: dict[str, str] | None = None) -> datasets.Dataset:
    import datasets  # takes a second or two, and most runs do without

    folder = Path(name)
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(str(folder))
    else:
        path, _, configuration = (str(name), "", "") if folder.is_dir() else str(name).partition(":")
        loaded = datasets.load_dataset(
            path,
            configuration or None,
            split=split,
            data_files=data_files,
            # A part of the splits is no damage, though less than the dataset's card promises.
            verification_mode="no_checks" if data_files else None,
        )
    if isinstance(loaded, datasets.DatasetDict):
        if split is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        if split not in loaded:
            raise UserError(
                f"{name}: {f'no split {split!r}' if split else 'name a split'}; there are {', '.join(loaded)}"
            )
        return loaded[split]
    if split is not None and (folder / "state.json").is_file() and str(loaded.split) != split:
        raise UserError(f"{name} holds one dataset, saved without splits: name it without a split, not with {split!r}")
    return loaded


def _utterances(rows: datasets.Dataset, *, name: str, audio_column: str | None, text_column: str | None) -> list[Row]:
    import datasets

    audio_column = _column(rows.features, audio_column, AUDIO_COLUMNS, what="audio", name=name, test=_is_audio)
    text_column = _column(rows.features, text_column, TEXT_COLUMNS, what="text", name=name, test=_is_text)
    logger.info("%s: audio from column %s, text from column %s", name, audio_column, text_column)
    optional = {}
    for field, known in OPTIONAL.items():
        if field == "offset":  # where what the row holds was cut from
            continue
        if (column := _first(known, rows.features)) not in (None, text_column):
            optional[field] = column
    rows = rows.with_format(None)
    recordings = rows.select_columns([audio_column]).cast_column(audio_column, datasets.Audio(decode=False))
    embedded = all(piece.field("bytes").null_count == 0 for piece in recordings.data.column(audio_column).chunks)
    table = rows.select_columns(list({text_column, *optional.values()}))[:]
    ids = [id for id in table[optional["id"]] if id is not None] if "id" in optional else []
    if len(set(ids)) < len(ids):  # FLEURS: that of the sentence, which several people read
        logger.info("%s: column %s names several recordings alike: they go by their rows", name, optional.pop("id"))
    where = f"{name} {rows.split}" if rows.split is not None else name
    utterances = []
    for index, text in enumerate(table[text_column]):
        values = {field: table[column][index] for field, column in optional.items()}
        label = f"{where} row {index}"
        utterances.append(
            Row(
                id=_text_or_none(values.pop("id", None)) or label,
                text=text or "",
                audio=Recording(
                    DatasetRow(recordings, audio_column, index, label, embedded),
                    duration=_seconds_or_none(values.pop("duration", None)),
                ),
                answers=_texts_or_none(values.pop("answers", None)),
                **{field: _text_or_none(value) for field, value in values.items()},
            )
        )
    return utterances


def _column(
    features: datasets.Features,
    asked: str | None,
    known: Sequence[str],
    *,
    what: str,
    name: str,
    test: Callable[[Any], bool],
) -> str:
    column = asked or _first(known, features)
    if column in features and test(features[column]):
        return column
    if column is None:
        problem = f"no {what} column known by its name ({', '.join(known)})"
    elif column not in features:
        problem = f"no column {column!r}"
    else:
        problem = f"column {column!r} holds no {what}"
    raise UserError(f"{name}: {problem}; name it by --{what}_column, the columns are {', '.join(features)}")


def _first(known: Sequence[str], columns: Container[str]) -> str | None:
    return next((column for column in known if column in columns), None)


def _is_audio(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Audio) or getattr(feature, "dtype", None) in ("string", "binary")


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _texts_or_none(value: Any) -> tuple[str, ...] | None:
    return tuple(map(str, value)) if isinstance(value, list) and value else None


def _seconds_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value < math.inf else None
