"""Synthesises sentences of the books as a slow reader says them: more training data for the recipe on recorded speech.

    python demo/tiny/make/make_more_speech.py --text BOOKS --out FOLDER

writes `FOLDER/manifest.jsonl` and a FLAC file for each of its sentences, with the voices of `make_corpus.py` and two
more. Interrupted, the same command goes on behind the last sentence.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
from collections import Counter
from functools import partial
from pathlib import Path

import soundfile
from make_corpus import RATE, Manner, speak
from sentences import read_sentences

WORDS = range(4, 15)
CHARACTERS = range(18, 73)
COMMON = 8
"""A word occurs so many times in the books."""
SEED = 5
SLOW = Manner(speed=(0.55, 1.0), pitch=(0.9, 1.1), flite=("rms", "awb", "slt", "kal16"), margin=0.2, opus=0.3)


def choose(text: list[str]) -> list[str]:
    """The sentences of middle length and of known words, each once, shuffled."""
    frequency = Counter(word for sentence in text for word in sentence.split())
    chosen = {
        sentence
        for sentence in text
        if len(words := sentence.split()) in WORDS
        and len(sentence) in CHARACTERS
        and all(frequency[word] >= COMMON for word in words)
    }
    shuffled = sorted(chosen)
    random.Random(SEED).shuffle(shuffled)
    return shuffled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder of .txt books")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--utterances", type=int, default=8000, help="how many (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "manifest.jsonl").exists():
        raise SystemExit(f"{options.out / 'manifest.jsonl'} is there already: remove it, or choose another --out")
    texts = choose(read_sentences(options.text).text)[: options.utterances]
    unfinished = options.out / "manifest.tmp"
    done = len(unfinished.read_bytes().splitlines()) if unfinished.exists() else 0
    with multiprocessing.Pool(options.processes) as pool, open(unfinished, "a", encoding="utf-8") as manifest:
        readings = pool.imap(partial(speak, manner=SLOW), texts[done:], chunksize=8)
        for number, (text, (wave, voice)) in enumerate(zip(texts[done:], readings, strict=True), done):
            audio = f"{number:06d}.flac"
            coded = io.BytesIO()
            soundfile.write(coded, wave, RATE, format="FLAC")
            (options.out / audio).write_bytes(coded.getbuffer())
            entry = {"audio": audio, "text": text, "id": f"synthetic-{number:06d}", "speaker": voice}
            manifest.write(json.dumps(entry | {"duration": round(len(wave) / RATE, 3)}) + "\n")
            manifest.flush()
    os.replace(unfinished, options.out / "manifest.jsonl")


if __name__ == "__main__":
    main()
