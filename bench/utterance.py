"""Where the time of a whole transcription goes: 15 s of audio to 60 tokens, encoder included. A JSON line a batch.

A WavLM-base and an RWKV of 12 x 768 with vocabulary 65,536, all of random weights; audio of 15 s in batches of 1 and of
16, to 60 tokens each. `shares` are parts of the time by the clock: features (what the encoder reads, on the CPU), the
encoder, the adapter, the prompt (the language model's one pass over frames and text), and the tokens, with choosing
them. `of_all` are the operations that take more than 1 % of it, by the profiler of torch. What is no matrix
product, a convolution or attention, and takes more than BOUND, is listed in `above_bound`. Before, the first second of
each builds what the batch needs; one utterance is timed three times, 16 once, and the last time is the profiled one.

python bench/utterance.py [--generation 6] [--dtype fp32]
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.cache import write_encoder
from bench.random_model import DTYPES, write_model
from rwkv_speech import SpeechRWKV
from rwkv_speech.data.sample import Row
from rwkv_speech.lm.initialise import official_sizes
from rwkv_speech.options import DecodingOptions
from rwkv_speech.speech.audio import SAMPLE_RATE

SECONDS, TOKENS = 15, 60
ROUNDS = {1: 3, 16: 1}  # by size of the batch; the last is profiled
# Of torch, and of this project: what multiplies matrices, a block's whole step of one token included.
PRODUCTS = ("mm", "linear", "conv", "attention", "rows", "step")
BOUND = 0.05


class Stages:
    """The time that each stage of `transcribe` takes, summed; they follow each other."""

    def __init__(self, model: SpeechRWKV) -> None:
        self.model = model
        self.taken: dict[str, float] = defaultdict(float)
        self._since = 0.0
        model.speech_encoder.encode = self._encode
        for adapter in model.adapters:
            adapter.register_forward_hook(lambda *_: self._ends("adapter"))
        model.language_model.register_forward_hook(
            lambda _, inputs, __: self._ends("prompt" if inputs[0].shape[1] > 1 else "tokens")
        )

    def transcribe(self, waves: list[Tensor]) -> list[list[int]]:
        self._since = time.perf_counter()
        rows = [self.model.sample(Row(str(i), None, wave)) for i, wave in enumerate(waves)]
        batch = self.model.prepare(rows)
        self._ends("features")
        found = self.model.decode(batch, DecodingOptions(max_new_tokens=TOKENS))
        self._ends("tokens")
        return [result.tokens for result in found]

    def _encode(self, *inputs: object) -> object:
        frames = type(self.model.speech_encoder).encode(self.model.speech_encoder, *inputs)
        self._ends("encoder")
        return frames

    def _ends(self, stage: str) -> None:
        now = time.perf_counter()
        self.taken[stage] += now - self._since
        self._since = now


def measure(model: SpeechRWKV, batch_size: int, name: str) -> dict:
    waves = [*(0.1 * torch.randn(batch_size, SECONDS * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)))]
    stages = Stages(model)
    stages.transcribe([wave[:SAMPLE_RATE] for wave in waves])  # kernels are built
    stages.taken.clear()
    found = [stages.transcribe(waves) for _ in range(ROUNDS[batch_size] - 1)]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:  # its own work is a few thousandths here
        found.append(stages.transcribe(waves))
    if any(len(tokens) != TOKENS for tokens in chain(*found)):
        raise SystemExit(f"an answer ended before it had {TOKENS} tokens; nothing is told")
    seconds = sum(stages.taken.values())
    events = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    whole = sum(events.values())
    of_all = {key: round(part / whole, 3) for key, part in events.items() if part > 0.01 * whole}
    return {
        "bench": "utterance",
        "model": name,
        "threads": torch.get_num_threads(),
        "batch": batch_size,
        "seconds": round(seconds / ROUNDS[batch_size], 2),
        "shares": {stage: round(part / seconds, 3) for stage, part in stages.taken.items()},
        "of_all": dict(sorted(of_all.items(), key=lambda item: -item[1])),
        "above_bound": [key for key, share in of_all.items() if share > BOUND and not any(x in key for x in PRODUCTS)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generation", type=int, choices=(6, 7), default=6)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    name = f"WavLM-base, RWKV-{args.generation} 12 x 768, {args.dtype}, random"
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder) / "encoder")
        sizes = official_sizes(generation=args.generation, n_layer=12, n_embd=768)
        write_model(Path(folder) / "model.pth", sizes, dtype=DTYPES[args.dtype], seed=0)
        for batch in ROUNDS:
            torch.manual_seed(0)
            model = SpeechRWKV.from_pretrained(Path(folder) / "model.pth", encoder=str(Path(folder) / "encoder"))
            print(json.dumps(measure(model, batch, name)), flush=True)


if __name__ == "__main__":
    main()
