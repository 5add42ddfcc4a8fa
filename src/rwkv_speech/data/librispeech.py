"""LibriSpeech, and any folder in its layout: `[split/]speaker/chapter/*.trans.txt`, audio files beside.

A transcript file has one line per utterance, its id and its text; the audio file of utterance
`84-121123-0001` is `84-121123-0001.flac`, or the same with another audio suffix.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from rwkv_speech.data.bad_audio import BadAudio
from rwkv_speech.data.utterance import BadSample, Utterance
from rwkv_speech.errors import UserError

SPLITS = (
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
)
TRAIN_SPLIT = "train-clean-100+train-clean-360+train-other-500"  # 960 h
EVAL_SPLITS = ("test-clean", "test-other")

# Where one utterance lies there in several formats, the first of these is read.
AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".oga", ".mp3", ".m4a", ".aac", ".webm")


def has_layout(folder: Path) -> bool:
    """Whether there is a LibriSpeech transcript file anywhere below the folder."""
    return next(folder.rglob("*.trans.txt"), None) is not None


def read_librispeech(folder: Path, *, split: str | None = None, bad_audio: BadAudio | None = None) -> list[Utterance]:
    """Read one split in the order of speaker, chapter and transcript line; texts as they are written.

    folder: the folder that holds the splits, or a `LibriSpeech` folder that holds them, or one split
        (the speakers) itself.
    split: name of the split's folder; None where `folder` is one split.
    bad_audio: with its policy "skip", transcripts without audio and audio without a transcript are noted
        there; otherwise they are an error.

    Raises:
        UserError: there is no such split, or transcripts and audio files don't match.
    """
    utterances: list[Utterance] = []
    unheard: list[BadSample] = []  # transcripts without audio
    unwritten: list[BadSample] = []  # audio without a transcript
    for chapter in _chapters(_split_folder(folder, split)):
        transcripts, audio = _read_chapter(chapter)
        for id, text in transcripts:
            if id in audio:
                utterances.append(Utterance(id, text, audio[id], speaker=id.split("-")[0]))
            else:
                unheard.append(BadSample(id, str(chapter / f"{id}.flac"), "the transcript has no audio file"))
        written = {id for id, _ in transcripts}
        unwritten += [
            BadSample(id, str(path), "the audio file has no transcript")
            for id, path in audio.items()
            if id not in written
        ]
    if bad_audio is not None and bad_audio.policy == "skip":
        bad_audio.add(unheard + unwritten)
    elif unheard or unwritten:
        raise UserError(_mismatch(folder, unheard, unwritten))
    return utterances


def download(splits: Iterable[str], root: str | Path) -> None:
    """Fetch official splits from openslr.org into `root/LibriSpeech/`, by torchaudio and with its checksums.

    A split that is already there is left as it is. The archives stay in `root/archives/`.

    Raises:
        UserError: an unknown split, no usable torchaudio, or a failed download.
    """
    root = Path(root)
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"LibriSpeech has no split {split!r} to download; there are {', '.join(SPLITS)}")
        if (root / split).is_dir() or (root / "LibriSpeech" / split).is_dir():
            continue
        try:
            from torchaudio.datasets import LIBRISPEECH
        except (ImportError, OSError, RuntimeError) as error:  # its compiled part is choosy about torch
            raise UserError(
                f"downloading LibriSpeech needs torchaudio, which fails to import ({_first_line(error)}); "
                f"fetch https://www.openslr.org/12 by hand and unpack it in {root}"
            ) from error
        # Unpacked apart and moved when whole: torchaudio takes a half-unpacked split for a complete one.
        staging = root / "archives"
        try:
            shutil.rmtree(staging / "LibriSpeech" / split, ignore_errors=True)
            staging.mkdir(parents=True, exist_ok=True)
            LIBRISPEECH(staging, url=split, download=True)
            (root / "LibriSpeech").mkdir(exist_ok=True)
            os.replace(staging / "LibriSpeech" / split, root / "LibriSpeech" / split)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"downloading LibriSpeech {split} into {root} failed ({_first_line(error)}); "
                "start again, or fetch it by hand from https://www.openslr.org/12"
            ) from error


def _split_folder(folder: Path, split: str | None) -> Path:
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if split is None or (folder.name == split and _is_split(folder)):
        if _is_split(folder):
            return folder
        problem = "it holds no speaker/chapter folders with *.trans.txt files itself"
    else:
        for candidate in (folder / split, folder / "LibriSpeech" / split):
            if candidate.is_dir():
                return candidate
        problem = f"it has no split {split!r}"
    if _is_split(folder):
        raise UserError(
            f"{folder}: {problem}, being one itself (speaker/chapter/*.trans.txt): "
            "name no split, or the folder's path instead of one"
        )
    splits = sorted(
        path.name for parent in (folder, folder / "LibriSpeech") for path in _folders(parent) if _is_split(path)
    )
    raise UserError(f"{folder}: {problem}; splits there: {', '.join(splits) or 'none'}")


def _is_split(folder: Path) -> bool:
    return next(folder.glob("*/*/*.trans.txt"), None) is not None


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(parent) if entry.is_dir())


def _chapters(folder: Path) -> Iterator[Path]:
    for speaker in _folders(folder):
        yield from _folders(speaker)


def _read_chapter(chapter: Path) -> tuple[list[tuple[str, str]], dict[str, Path]]:
    """The chapter's (id, text) in the order of the file, and its audio files by id."""
    transcripts: list[tuple[str, str]] = []
    audio: dict[str, Path] = {}
    for path in sorted(chapter.iterdir()):
        if path.name.startswith("."):  # macOS leaves "._name.flac" beside "name.flac"
            continue
        if path.name.endswith(".trans.txt"):
            transcripts += _read_transcripts(path)
        elif (suffix := path.suffix.lower()) in AUDIO_SUFFIXES:
            other = audio.get(path.stem)
            if other is None or AUDIO_SUFFIXES.index(suffix) < AUDIO_SUFFIXES.index(other.suffix.lower()):
                audio[path.stem] = path
    return transcripts, audio


def _read_transcripts(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as UTF-8 text ({error})") from error
    for line in filter(str.strip, lines):
        id, _, text = line.strip().partition(" ")
        yield id, text.strip()


def _mismatch(folder: Path, unheard: list[BadSample], unwritten: list[BadSample]) -> str:
    parts = []
    for samples, what in (
        (unheard, "transcript lines without an audio file"),
        (unwritten, "audio files without a transcript line"),
    ):
        if samples:
            first = ", ".join(sample.id for sample in samples[:3]) + ", ..." * (len(samples) > 3)
            parts.append(f"{what}: {len(samples)} ({first})")
    return f"{folder}: {', '.join(parts)}; complete the folder, or go on without them by --on_bad_audio skip"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
