"""Synthesises the tiny corpus, and the larger one that the tiny speech encoder is pretrained on.

    python demo/tiny/make/make_corpus.py --text BOOKS --scratch FOLDER

- `demo/tiny/corpus/{train,valid,test}.jsonl` with 16 kHz Ogg/Opus files: the sentences that `sentences.py` reserves.
- `FOLDER/*.npy` with `FOLDER/*.json`: utterances of other sentences, a thousand to a pair of files, each sentence once
  before any is said again. What is there already is kept: an interrupted run goes on where it was.

Voice, speed, pitch and level of an utterance follow from its sentence, and from how often it has been said. Needs
flite 2.2 (Debian and Ubuntu: `apt install flite`) and `pip install hibari-tts soundfile soxr`, but none of the
project's own packages.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from sentences import read_sentences

RATE = 16_000  # Hz
CORPUS = Path(__file__).parents[1] / "corpus"
SEED = 1

HIBARI_PART = 0.5  # of the utterances; the rest is shared by flite's voices
PEAK = (0.2, 0.9)
SILENCE = 0.01  # of the peak

OPUS = 0.95  # libsndfile's compression level: about 18 kbit/s
CHUNK = 1000


@dataclass(frozen=True)
class Manner:
    """How it is said: ranges that each utterance draws from.

    pitch: a factor; the formants move with it.
    flite: the voices of flite that take turns with hibari's.
    margin: seconds of silence left before and behind the speech.
    opus: part of the utterances, of those not written as Opus anyway, that go through the coder.
    """

    speed: tuple[float, float] = (0.9, 1.1)
    pitch: tuple[float, float] = (0.95, 1.05)
    flite: tuple[str, ...] = ("rms", "awb")
    margin: float = 0.08
    opus: float = 1 / 3


CORPUS_MANNER = Manner()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder of .txt books")
    parser.add_argument("--scratch", type=Path, help="folder for the pretraining utterances; none: the corpus alone")
    parser.add_argument("--utterances", type=int, default=24_000, help="for pretraining (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    sentences = read_sentences(options.text)
    with multiprocessing.Pool(options.processes) as pool:
        for split, texts in (("train", sentences.train), ("valid", sentences.validation), ("test", sentences.test)):
            write_split(split, pool.imap(partial(speak, opus=True), texts, chunksize=8), texts)
        if options.scratch:
            options.scratch.mkdir(parents=True, exist_ok=True)
            for first in range(0, options.utterances, CHUNK):
                numbers = range(first, min(first + CHUNK, options.utterances))
                turns = [divmod(number, len(sentences.spoken)) for number in numbers]
                texts = [sentences.spoken[index] for _, index in turns]
                target = options.scratch / f"{first:06d}"
                if not target.with_suffix(".json").exists():
                    readings = pool.imap(speak_again, zip(texts, (take for take, _ in turns), strict=True), chunksize=8)
                    write_chunk(target, [wave for wave, _ in readings], texts)


def write_split(split: str, spoken: Iterable[tuple[bytes, str]], texts: list[str]) -> None:
    """One manifest and its audio files, which come coded."""
    (CORPUS / split).mkdir(parents=True, exist_ok=True)
    size = seconds = 0.0
    with open(CORPUS / f"{split}.jsonl", "w", encoding="utf-8") as manifest:
        for index, ((coded, voice), text) in enumerate(zip(spoken, texts, strict=True)):
            audio = f"{split}/{index:04d}.ogg"
            (CORPUS / audio).write_bytes(coded)
            duration = soundfile.info(io.BytesIO(coded)).duration
            entry = {"audio": audio, "text": text, "id": f"{split}-{index:04d}", "duration": round(duration, 3)}
            manifest.write(json.dumps(entry | {"speaker": voice}) + "\n")
            size, seconds = size + len(coded), seconds + duration
    print(f"{split}: {len(texts)} utterances, {seconds / 60:.1f} min, {size / 1e6:.2f} MB", flush=True)


def write_chunk(target: Path, waves: list[np.ndarray], texts: list[str]) -> None:
    """All samples end to end in .npy (int16); where each utterance ends, and its text, in .json, which comes last."""
    np.save(target.with_suffix(".npy"), np.concatenate(waves))
    index = {"ends": np.cumsum([len(wave) for wave in waves]).tolist(), "texts": texts}
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(index), encoding="utf-8")
    os.replace(temporary, target.with_suffix(".json"))
    print(f"{target.name}: {len(texts)} utterances, {index['ends'][-1] / RATE / 60:.1f} min", flush=True)


def speak_again(turn: tuple[str, int]) -> tuple[np.ndarray | bytes, str]:
    text, take = turn
    return speak(text, take=take)


def speak(
    text: str, *, take: int = 0, opus: bool = False, manner: Manner = CORPUS_MANNER
) -> tuple[np.ndarray | bytes, str]:
    """A sentence as int16 samples, or as an Ogg/Opus file; and the voice's name. Each take is another reading."""
    draw = random.Random(f"{SEED} {take} {text}")
    speed, pitch, peak = draw.uniform(*manner.speed), draw.uniform(*manner.pitch), draw.uniform(*PEAK)
    voice = "heart" if draw.random() < HIBARI_PART else draw.choice(manner.flite)
    text = re.sub(r"\bi\b", "I", text)
    # Resampling changes pitch and speed by the same factor; the synthesis makes up for the speed.
    if voice == "heart":
        wave, rate = hibari()(text + ".", speed=speed / pitch, seed=SEED), hibari().sample_rate
    else:
        wave, rate = flite(text, voice, stretch=pitch / speed)
    wave = soxr.resample(wave, round(rate * pitch), RATE)
    loud = np.flatnonzero(np.abs(wave) > SILENCE * np.abs(wave).max())
    margin = round(manner.margin * RATE)
    wave = wave[max(0, loud[0] - margin) : loud[-1] + margin]
    wave = wave * (peak / np.abs(wave).max())
    if opus:
        return encode(wave), voice
    if draw.random() < manner.opus:
        wave, _ = soundfile.read(io.BytesIO(encode(wave)), dtype="float32")
    return np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16), voice


@cache
def hibari() -> Any:
    from hibari import Hibari

    return Hibari(threads=1)


def flite(text: str, voice: str, *, stretch: float) -> tuple[np.ndarray, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.4f}", "-t", text, "-o", file.name]
        subprocess.run(command, check=True)
        return soundfile.read(file.name, dtype="float32")


def encode(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="OGG", subtype="OPUS", compression_level=OPUS)
    return file.getvalue()


if __name__ == "__main__":
    main()
