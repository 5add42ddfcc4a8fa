"""Corpora as they are published: a folder -> the rows of its splits, `train`, `valid` and `test`, where they are there.

Each reader takes the folder of the corpus and the one that its manifests go to; the latter is for what must be written
anew. Archives are to be unpacked first. LibriSpeech needs none: its layout is read directly (`data_dir=`).
"""

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import soundfile
import torch

from rwkv_speech.data.sample import Row
from rwkv_speech.data.sources import load_split
from rwkv_speech.errors import UserError
from rwkv_speech.files import read_lines, write_whole
from rwkv_speech.speech.audio import SAMPLE_RATE, duration, load_audio
from rwkv_speech.speech.recording import Recording

log = logging.getLogger("rwkv_speech")

Splits = dict[str, list[Row]]

DEV = {"train": "train", "valid": "dev", "test": "test"}  # what corpora call them


def aishell(folder: Path, out: Path) -> Splits:
    """AISHELL-1, Mandarin, 178 h, https://www.openslr.org/33: `data_aishell.tgz`, with the archives in its `wav/`.

    transcript/aishell_transcript_v0.8.txt      BAC009S0002W0122 而 对 楼市 成交 抑制 作用 最 大 的 限 购
    wav/{train,dev,test}/S0002/BAC009S0002W0122.wav

    Words are joined, as they are written. A few recordings have no transcript; they are left out.
    """
    folder = folder / "data_aishell" if (folder / "data_aishell").is_dir() else folder
    lines = (line.split() for line in read_lines(folder / "transcript" / "aishell_transcript_v0.8.txt"))
    texts = {words[0]: "".join(words[1:]) for words in lines if words}
    splits = {}
    for name, theirs in DEV.items():
        paths = sorted((folder / "wav" / theirs).glob("*/*.wav"))
        said = [path for path in paths if path.stem in texts]
        splits[name] = [Row(x.stem, texts[x.stem], Recording(x), x.parent.name, "zh", "transcribe") for x in said]
        if len(said) < len(paths):
            log.info("%s: %d recordings have no transcript", theirs, len(paths) - len(said))
    return splits


def common_voice(folder: Path, out: Path) -> Splits:
    """Common Voice, https://commonvoice.mozilla.org: the folder of one language, as `cv-corpus-*/de`.

    {train,dev,test}.tsv    client_id, path, sentence, ..., locale
    clips/*.mp3
    clip_durations.tsv      clip, duration[ms]; in newer releases

    The tables are read directly, too (`data_dir=`); this adds the durations, without opening every file.
    """
    table = folder / "clip_durations.tsv"
    seconds = {x["clip"]: float(x["duration[ms]"]) / 1000 for x in _table(table)} if table.exists() else {}

    def row(row: Row) -> Row:
        audio = replace(row.audio, duration=seconds.get(row.audio.source.name))
        return replace(row, audio=audio, language=row.language or folder.name, mission="transcribe")

    tables = {name: folder / f"{theirs}.tsv" for name, theirs in DEV.items()}
    return {name: list(map(row, load_split(str(path)))) for name, path in tables.items() if path.exists()}


def fleurs(folder: Path, out: Path) -> Splits:
    """FLEURS, https://huggingface.co/datasets/google/fleurs: the folder of one language, as `data/de_de`.

    {train,dev,test}.tsv    without a header: sentence's id, file, text as written, text normalised, its characters,
                            samples at 16 kHz, gender
    audio/train/*.wav       from audio/train.tar.gz

    or of the branch `refs/convert/parquet`, `de_de/train/*.parquet`. The normalised text is taken. Nothing tells the
    speakers apart.
    """
    splits, language = {}, folder.name.split("_")[0]
    for name, theirs in DEV.items():
        table = folder / f"{theirs}.tsv"
        if table.exists():
            where = next((x for x in (folder / "audio" / theirs, folder / theirs) if x.is_dir()), folder / "audio")
            lines = (line.split("\t") for line in read_lines(table) if line.strip())
            found = ((where / cells[1], cells[3], cells[5]) for cells in lines)
        else:
            rows = _parquet(folder, name, out)
            found = ((audio, x["transcription"], x["num_samples"]) for audio, x in rows)
        splits[name] = [
            Row(audio.stem, text, Recording(audio, int(n) / SAMPLE_RATE), language=language, mission="transcribe")
            for audio, text, n in found
        ]
    return splits


def covost(folder: Path, out: Path) -> Splits:
    """CoVoST 2, https://github.com/facebookresearch/covost: speech of Common Voice 4, and its sentences translated.

    The folder of the source language in Common Voice 4 with the translations beside its tables; where there are those
    into several languages, one of their files in place of the folder:

    clips/*.mp3, validated.tsv      client_id, path, sentence, ...
    covost_v2.en_de.tsv             path, translation, split

    or, by the authors' get_covost_splits.py, covost_v2.en_de.{train,dev,test}.tsv: path, sentence, translation,
    client_id. Or a folder `en_de` of https://huggingface.co/datasets/fixie-ai/covost2, which holds
    {train,validation,test}-*.parquet: client_id, file, audio, sentence, translation, id.
    """
    pattern = re.compile(r"(covost_v2\.([A-Za-z-]+)_([A-Za-z-]+))(\.(train|dev|test))?\.tsv")
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    named = {match[1]: (path.parent, match[2], match[3]) for path in files if (match := pattern.fullmatch(path.name))}
    if len(named) > 1:
        raise UserError(f"{folder}: {', '.join(named)}; expected one pair of languages: name its file, not the folder")
    if named:
        ((table, (place, source, target)),) = named.items()
    else:
        table, place, (source, _, target) = None, folder, folder.name.partition("_")

    def row(audio: Path, x: dict[str, Any]) -> Row:
        row = Row(audio.stem, x["translation"], Recording(audio), x["client_id"], source, "translate")
        return replace(row, target_language=target, transcript=x["sentence"])

    return {
        name: [row(*x) for x in (_translated(place, table, name) if table else _parquet(place, name, out))]
        for name in DEV
    }


def _translated(folder: Path, table: str, split: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    divided = folder / f"{table}.{DEV[split]}.tsv"
    if divided.exists():
        rows = _table(divided)
    else:  # as get_covost_splits.py does it
        marks = ("train", "train_covost") if split == "train" else (DEV[split],)
        texts = {x["path"]: x["translation"] for x in _table(folder / f"{table}.tsv") if x["split"] in marks}
        said = (x for x in _table(folder / "validated.tsv") if x["path"] in texts)
        rows = (x | {"translation": texts[x["path"]]} for x in said)
    return ((folder / "clips" / x["path"], x) for x in rows)


def spoken_squad(folder: Path, out: Path) -> Splits:
    """Spoken-SQuAD, https://github.com/Chia-Hsuan-Lee/Spoken-SQuAD: passages are spoken, questions are typed.

    spoken_train-v1.1.json, spoken_test-v1.1.json   as SQuAD's, passages and answers as they were recognised
    train_wav/0_3_1.wav, dev_wav/...                article, paragraph and sentence, by their places in these files

    The sentences of a paragraph are joined, in order and with nothing between, into one file; where one is missing,
    the paragraph's questions are left out. Every tenth article of train is kept for validation.
    """
    splits: Splits = {"train": [], "valid": [], "test": []}
    for theirs, wavs in (("train", "train_wav"), ("test", "dev_wav")):
        file = folder / f"spoken_{theirs}-v1.1.json"
        if not file.exists():
            continue
        sentences: dict[tuple[int, int], dict[int, Path]] = {}
        for path in (folder / wavs).glob("*.wav"):
            if match := re.fullmatch(r"(\d+)_(\d+)_(\d+)", path.stem):
                article, paragraph, sentence = map(int, match.groups())
                sentences.setdefault((article, paragraph), {})[sentence] = path
        left_out = 0
        for i, article in enumerate(json.loads(file.read_bytes())["data"]):
            rows = splits["valid" if theirs == "train" and i % 10 == 9 else theirs]
            for j, paragraph in enumerate(article["paragraphs"]):
                parts = sentences.get((i, j), {})
                if sorted(parts) != list(range(len(parts))) or not parts:
                    left_out += len(paragraph["qas"])
                elif paragraph["qas"]:
                    audio = _joined([parts[k] for k in range(len(parts))], out / "audio" / theirs / f"{i}_{j}.flac")
                    rows += (_question(x, audio) for x in paragraph["qas"])
        if left_out:
            log.warning("%s: %d questions are left out, whose passages are not whole in %s", theirs, left_out, wavs)
    return splits


def _question(asked: dict[str, Any], audio: Recording) -> Row:
    answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
    row = Row(asked["id"], answers[0], audio, language="en", mission="answer")
    return replace(row, answers=answers, prompt=asked["question"].strip())


def _joined(parts: list[Path], path: Path) -> Recording:
    if not path.exists():
        whole = io.BytesIO()
        soundfile.write(whole, torch.cat([load_audio(part) for part in parts]).numpy(), SAMPLE_RATE, format="FLAC")
        write_whole(path, whole.getvalue())
    return Recording(path, duration(path))


def esc50(folder: Path, out: Path) -> Splits:
    """ESC-50, 2,000 sounds of 50 kinds, https://github.com/karolpiczak/ESC-50.

    meta/esc50.csv      filename, fold, target, category, ...
    audio/1-100032-A-0.wav

    Of its five folds the fifth is the test, and the fourth is validated on.
    """
    splits: Splits = {"train": [], "valid": [], "test": []}
    for x in _table(folder / "meta" / "esc50.csv"):
        audio = folder / "audio" / x["filename"]
        name = {"4": "valid", "5": "test"}.get(x["fold"], "train")
        splits[name].append(
            Row(audio.stem, x["category"].replace("_", " "), Recording(audio, duration=5.0), mission="label")
        )
    return splits


EMOTIONS = {  # the first letters of their names in German
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "happiness",
    "T": "sadness",
    "N": "neutral",
}


def emodb(folder: Path, out: Path) -> Splits:
    """EmoDB, 535 sentences by ten actors, http://emodb.bilderbar.info: `wav/03a01Fa.wav` is speaker 03, sentence a01,
    F for happiness, version a.

    A woman and a man are the test, 14 and 11, and another pair, 13 and 12, is validated on.
    """
    splits: Splits = {"train": [], "valid": [], "test": []}
    names = {"12": "valid", "13": "valid", "11": "test", "14": "test"}
    for audio in sorted((folder / "wav").glob("*.wav")):
        if match := re.fullmatch(r"(\d\d)[ab]\d\d([WLEAFTN])[a-z]", audio.stem):
            speaker, emotion = match.groups()
            splits[names.get(speaker, "train")].append(
                Row(audio.stem, EMOTIONS[emotion], Recording(audio), speaker, "de", "label")
            )
    return splits


CORPORA: dict[str, Callable[[Path, Path], Splits]] = {
    "aishell": aishell,
    "common_voice": common_voice,
    "fleurs": fleurs,
    "covost": covost,
    "spoken_squad": spoken_squad,
    "esc50": esc50,
    "emodb": emodb,
}


def _table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a table with a header; of a .tsv as Common Voice and CoVoST write it, where quotes are text."""
    lines = read_lines(path)
    if path.suffix == ".tsv":
        return csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
    return csv.DictReader(lines)


def _parquet(folder: Path, split: str, out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The rows of a Hugging Face dataset's split, and the files that their audio is written to."""
    split = {"valid": "validation"}.get(split, split)
    for file in sorted(folder.glob(f"{split}-*.parquet")) or sorted((folder / split).glob("*.parquet")):
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(64):
            for row in batch.to_pylist():
                audio = row.pop("audio")
                path = out / "audio" / split / Path(audio["path"]).name
                if not path.exists():
                    write_whole(path, audio["bytes"])
                yield path, row
