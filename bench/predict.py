"""Prediction of many files against the model alone: what reading, decoding and telling speech from silence cost.

Recordings of 15 s, FLAC, whose pages are dropped from the cache of the system before they are read, through the tiny
frozen parts of demo/tiny with an adapter of random weights; each answer has TOKENS tokens, whatever they are. The model
alone gets the same audio as it lies in memory, in the same batches. The two alternate, so many recordings at a time,
and give the same texts. One JSON line.

python bench/predict.py [--recordings 200]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from rwkv_speech import SpeechRWKV
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.sample import Row
from rwkv_speech.options import DecodingOptions
from rwkv_speech.speech.audio import SAMPLE_RATE

TINY = Path(__file__).parents[1] / "demo" / "tiny"
SECONDS, TOKENS, BATCH = 15, 60, 16
TURN = 4 * BATCH  # recordings that each gets before the other has its turn
BOUND = 1.1


def speech(count: int) -> list[Tensor]:
    """Waveforms of SECONDS: sentences of the quick-start one after the other."""
    rows = read_manifest(TINY / "corpus" / "train.jsonl")
    sentences = np.concatenate([row.audio.waveform().numpy() for row in rows[:200]])
    starts = np.random.default_rng(0).integers(len(sentences) - SECONDS * SAMPLE_RATE, size=count)
    return [torch.from_numpy(sentences[start : start + SECONDS * SAMPLE_RATE]) for start in starts]


def written(folder: Path, waves: list[Tensor]) -> list[Path]:
    """As FLAC; none of it stays in the system's cache."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i}.flac" for i in range(len(waves))]
    for path, wave in zip(files, waves, strict=True):
        soundfile.write(path, wave.numpy(), SAMPLE_RATE)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = SpeechRWKV.from_pretrained(TINY / "rwkv6-tiny.pth", encoder=str(TINY / "wavlm-tiny"))
    options = DecodingOptions(max_new_tokens=TOKENS)

    def of_files(files: list[Path]) -> list[str]:
        found = model.transcripts(files, batch_size=BATCH, max_audio_s=SECONDS, options=options)
        return [transcript.text for transcript in found]

    def of_waves(waves: list[Tensor]) -> list[str]:
        texts = []
        for first in range(0, len(waves), BATCH):
            rows = [Row(str(i), None, wave) for i, wave in enumerate(waves[first : first + BATCH], first)]
            results = model.decode(model.prepare([model.sample(row) for row in rows]), options)
            texts += [model.alternatives(result)[0].text for result in results]
        return texts

    taken = {"files": 0.0, "model": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        files = written(Path(folder), waves := speech(args.recordings))
        # Rounded to 16 bits, as in the files. A turn of both first, which isn't counted.
        waves = [(wave * 2**15).round().clamp(-(2**15), 2**15 - 1) / 2**15 for wave in waves]
        of_waves(waves[:BATCH])
        of_files(written(Path(folder) / "first", speech(BATCH)))
        for first in range(0, len(files), TURN):
            turn = slice(first, first + TURN)
            start = time.perf_counter()
            texts = of_files(files[turn])
            between = time.perf_counter()
            alone = of_waves(waves[turn])
            taken["files"] += between - start
            taken["model"] += time.perf_counter() - between
            if texts != alone:
                raise SystemExit("files and waveforms gave other texts; nothing is told")
    line = {
        "bench": "predict",
        "recordings": len(files),
        "threads": torch.get_num_threads(),
        "recordings_per_s": round(len(files) / taken["files"], 1),
        "vs_model_alone": round(taken["files"] / taken["model"], 3),
        "bound": BOUND,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
