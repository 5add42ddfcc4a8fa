"""Epochs with cached encoder frames against epochs without, and why: one JSON line.

WavLM-base (12 x 768, 94 M parameters) and an RWKV-6 of 12 x 768 with vocabulary 65,536, both of random weights, fp32;
6 recordings of noise of 6 to 15 s, as long as those of LibriSpeech, in batches of 3. An epoch is all that training
does: reading, encoding, adapter, language model, backward pass, AdamW. Filling the cache is what the first epoch costs
besides. Before anything is timed, every batch must have the same loss from the cache as from the recordings.

`expected_ratio` is what leaving the encoder out would give if nothing else changed: 1 / (1 - encoder_share). Reading
frames instead of decoding audio, and room in the processor's caches, make the difference.

python bench/cache.py [--rounds 2] [--cache_dtype fp16]
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.random_model import write_model
from bench.timing import seconds
from rwkv_speech.data.batches import Batch, SpeechDataset
from rwkv_speech.data.loading import loader
from rwkv_speech.data.sample import Row
from rwkv_speech.lm import wkv
from rwkv_speech.lm.initialise import official_sizes
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.encoder import import_transformers
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.speech.recording import Recording

SECONDS = (6, 12, 15, 8, 14, 10)
WORDS = ["they", "came", "to", "the", "river", "in", "evening", "and", "found", "nobody", "there", "who", "knew"]
BATCH = 3
TOLERANCE = {"fp16": 1e-3, "int8": 5e-3}  # of a loss, relative


def write_encoder(folder: Path) -> None:
    transformers = import_transformers()
    torch.manual_seed(0)
    transformers.WavLMModel(transformers.WavLMConfig()).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)


def write_speech(folder: Path) -> list[Row]:
    """Recordings with 2.5 words a second."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(SECONDS):
        path = folder / f"{number}.flac"
        soundfile.write(path, 0.1 * rng.standard_normal(length * SAMPLE_RATE), SAMPLE_RATE)
        text = " ".join(rng.choice(WORDS, size=int(2.5 * length)))
        rows.append(Row(str(number), text, Recording(path, duration=float(length))))
    return rows


def batches(model: SpeechRWKV, rows: list[Row], cache: FrameCache | None = None) -> DataLoader[Batch]:
    extract = model.speech_encoder.extract
    dataset = SpeechDataset(rows, sample_of=model.sample, renderer=model.renderer, extract=extract, cache=cache)
    return loader(dataset, batch_size=BATCH, shuffle=False)


def loss(model: SpeechRWKV, batch: Batch) -> torch.Tensor:
    return model.loss_sum(batch) / batch.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="epochs of each kind, interleaved")
    parser.add_argument("--cache_dtype", choices=TOLERANCE, default="fp16")
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model.pth", official_sizes(n_layer=12, n_embd=768), dtype=torch.float32, seed=0)
        write_encoder(folder / "encoder")
        rows = write_speech(folder / "speech")
        torch.manual_seed(0)
        model = SpeechRWKV.from_pretrained(folder / "model.pth", encoder=str(folder / "encoder"))
        cache = FrameCache(folder / "cache", storage=args.cache_dtype)
        cache.encoder(str(folder / "encoder"))
        start = time.perf_counter()
        cache.fill([row.audio for row in rows])
        filling = time.perf_counter() - start

        uncached, cached = batches(model, rows), batches(model, rows, cache)
        with torch.no_grad():
            difference = max(
                abs(loss(model, ours) / loss(model, theirs) - 1).item()
                for ours, theirs in zip(cached, uncached, strict=True)
            )
        if difference > TOLERANCE[args.cache_dtype]:
            raise SystemExit(f"a batch's loss from the cache differs by {difference:.2e}; nothing was timed")

        optimizer = torch.optim.AdamW(model.trainable_state_dict().values(), lr=1e-4)
        spent = {"encoder": 0.0, "epochs": 0.0}

        encode = model.speech_encoder.encode

        def timed_encode(*inputs: object) -> torch.Tensor:
            begun = time.perf_counter()
            frames = encode(*inputs)
            spent["encoder"] += time.perf_counter() - begun
            return frames

        model.speech_encoder.encode = timed_encode

        def epoch(kind: DataLoader[Batch]) -> None:
            start = time.perf_counter()
            for batch in kind:
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            if kind is uncached:
                spent["epochs"] += time.perf_counter() - start

        times = seconds({"uncached": lambda: epoch(uncached), "cached": lambda: epoch(cached)}, rounds=args.rounds)
        frame_bytes = sum(path.stat().st_size for path in folder.glob("cache/*/*.frames"))
    share = spent["encoder"] / spent["epochs"]
    line = {
        "bench": "cache",
        "encoder": "WavLM-base sizes, fp32, random",
        "model": "12 x 768, vocabulary 65536, fp32, random",
        "cache_dtype": args.cache_dtype,
        "wkv": wkv.backend("cpu").name,
        "threads": torch.get_num_threads(),
        "audio_seconds": sum(SECONDS),
        "batch": BATCH,
        "largest_loss_difference": difference,
        "cache_bytes_per_audio_second": round(frame_bytes / sum(SECONDS)),
        "filling_seconds": round(filling, 2),
        "uncached_epoch_seconds": round(times["uncached"], 2),
        "cached_epoch_seconds": round(times["cached"], 2),
        "ratio": round(times["uncached"] / times["cached"], 2),
        "encoder_share": round(share, 3),
        "expected_ratio": round(1 / (1 - share), 2),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
