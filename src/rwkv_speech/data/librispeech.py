"""LibriSpeech, and any folder in its layout: `[split/]speaker/chapter/*.trans.txt`, audio files beside.

A transcript file has one line per utterance, its id and its text; the audio file of utterance
`84-121123-0001` is `84-121123-0001.flac`, or the same with another audio suffix.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.listing import AUDIO_SUFFIXES, entries, folders, is_hidden
from rwkv_speech.data.sample import BadSample, Row
from rwkv_speech.errors import UserError, reason
from rwkv_speech.files import printable, read_lines
from rwkv_speech.speech.recording import Recording

URL = "https://www.openslr.org/resources/12"
SPLITS = {  # SHA-256 of their archives, as torchaudio.datasets.LIBRISPEECH has them
    "train-clean-100": "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
    "train-clean-360": "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf",
    "train-other-500": "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2",
    "dev-clean": "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3",
    "dev-other": "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365",
    "test-clean": "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23",
    "test-other": "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29",
}
TRAIN_SPLIT = "train-clean-100+train-clean-360+train-other-500"  # 960 h
EVAL_SPLITS = ("test-clean", "test-other")


def has_layout(folder: Path) -> bool:
    """Whether there is a LibriSpeech transcript file below the folder, be it reached through links."""
    depths = range(5)  # from a chapter to what holds LibriSpeech/split/speaker/chapter
    return any(_has_transcripts(folder, depth) for depth in depths)


def read_librispeech(folder: Path, *, split: str | None = None, bad_audio: BadSamples | None = None) -> list[Row]:
    """Read one split in the order of speaker, chapter and transcript line; texts as they are written.

    folder: the folder that holds the splits, or a `LibriSpeech` folder that holds them, or one split
        (the speakers) itself.
    split: name of the split's folder; None where `folder` is one split.
    bad_audio: with its policy "skip", audio without a transcript and folders that can't be searched are noted there,
        and a transcript without audio is a row whose recording is absent; otherwise these are an error.

    Raises:
        UserError: there is no such split, or transcripts and audio files don't match.
    """
    skip = bad_audio is not None and bad_audio.policy == "skip"
    utterances: list[Row] = []
    without_audio: list[str] = []  # ids of transcripts
    without_transcript: list[BadSample] = []
    unsearchable: list[BadSample] = []

    def note(folder: Path, error: OSError) -> None:
        reason = f"the folder can't be searched ({error.strerror})"
        unsearchable.append(BadSample(folder.name, printable(folder), reason))

    for speaker in folders(_split_folder(folder, split)):
        for chapter in folders(speaker, note):
            transcripts, audio = _read_chapter(chapter, note)
            for id, text in transcripts:
                if id not in audio:
                    without_audio.append(id)
                path = audio.get(id, chapter / f"{id}.flac")
                utterances.append(Row(id, text, Recording(path), speaker=id.split("-")[0]))
            written = {id for id, _ in transcripts}
            without_transcript += [
                BadSample(printable(id), printable(path), "the audio file has no transcript")
                for id, path in audio.items()
                if id not in written
            ]
    if skip:
        bad_audio.add(unsearchable + without_transcript)
    elif unsearchable or without_audio or without_transcript:
        raise UserError(
            _mismatch(
                folder,
                {
                    "transcript lines without an audio file": without_audio,
                    "audio files without a transcript line": [sample.id for sample in without_transcript],
                    "folders that can't be searched": [sample.audio for sample in unsearchable],
                },
            )
        )
    return utterances


def download(splits: Iterable[str], root: str | Path) -> None:
    """Fetch official splits from openslr.org into `root/LibriSpeech/`, and check their SHA-256.

    A split that is already there is left as it is. Each archive goes again once it is unpacked.

    Raises:
        UserError: an unknown split, or a failed download.
    """
    root = Path(root).expanduser()
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"LibriSpeech has no split {split!r} to download; there are {', '.join(SPLITS)}")
        if (root / split).is_dir() or (root / "LibriSpeech" / split).is_dir():
            continue
        archive, staging = root / f"{split}.tar.gz", root / f".{split}.unpacking"
        try:
            (root / "LibriSpeech").mkdir(parents=True, exist_ok=True)
            if not archive.exists():  # it gets this name only when it is whole and its hash is right
                torch.hub.download_url_to_file(f"{URL}/{split}.tar.gz", str(archive), hash_prefix=SPLITS[split])
            shutil.rmtree(staging, ignore_errors=True)
            with tarfile.open(archive) as tar:
                tar.extractall(staging, filter="data")
            os.replace(staging / "LibriSpeech" / split, root / "LibriSpeech" / split)
            shutil.rmtree(staging)
            archive.unlink()
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(
                f"downloading LibriSpeech {split} into {root} failed ({reason(error)}); "
                "start again, or fetch it by hand from https://www.openslr.org/12"
            ) from error


def _split_folder(folder: Path, split: str | None) -> Path:
    if not os.path.isdir(folder):
        raise UserError(f"no such folder: {folder}")
    if split is None or (folder.name == split and _is_split(folder)):
        if _is_split(folder):
            return folder
        problem = "it holds no speaker/chapter folders with *.trans.txt files itself"
    else:
        for candidate in (folder / split, folder / "LibriSpeech" / split):
            if os.path.isdir(candidate):
                return candidate
        problem = f"it has no split {split!r}"
    if _is_split(folder):
        raise UserError(
            f"{folder}: {problem}, being one itself (speaker/chapter/*.trans.txt): "
            "name no split, or the folder's path instead of one"
        )
    parents = [parent for parent in (folder, folder / "LibriSpeech") if parent.is_dir()]
    splits = sorted(path.name for parent in parents for path in folders(parent) if _is_split(path))
    raise UserError(f"{folder}: {problem}; splits there: {', '.join(splits) or 'none'}")


def _is_split(folder: Path) -> bool:
    return _has_transcripts(folder, 2)


def _has_transcripts(folder: Path, depth: int) -> bool:
    found = folder.glob("*/" * depth + "*.trans.txt")
    return any(not any(map(is_hidden, path.relative_to(folder).parts)) for path in found)


def _read_chapter(
    chapter: Path, onerror: Callable[[Path, OSError], None]
) -> tuple[list[tuple[str, str]], dict[str, Path]]:
    """The chapter's (id, text) in the order of the file, and its audio files by id."""
    transcripts: list[tuple[str, str]] = []
    audio: dict[str, Path] = {}
    for path in (Path(entry.path) for entry in entries(chapter, onerror)):
        if path.name.endswith(".trans.txt"):
            transcripts += _read_transcripts(path)
        elif (suffix := path.suffix.lower()) in AUDIO_SUFFIXES:
            other = audio.get(path.stem)
            if other is None or AUDIO_SUFFIXES.index(suffix) < AUDIO_SUFFIXES.index(other.suffix.lower()):
                audio[path.stem] = path
    return transcripts, audio


def _read_transcripts(path: Path) -> list[tuple[str, str]]:
    """Of each line its first word, which ends at a blank or a tab, and the rest."""
    lines = (line.strip() for line in read_lines(path))
    found = (re.fullmatch(r"([^ \t]+)[ \t]*(.*)", line, re.DOTALL) for line in lines if line)
    return [(match[1], match[2]) for match in found]


def _mismatch(folder: Path, found: dict[str, list[str]]) -> str:
    parts = []
    for what, names in found.items():
        if names:
            parts.append(f"{what}: {len(names)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})")
    return f"{folder}: {', '.join(parts)}; complete the folder, or go on without them by --on_bad_audio skip"
