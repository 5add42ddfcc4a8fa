"""Decoding from a recurrent state against running the whole sequence again for every token: one JSON line.

Model 12 x 768, vocabulary 65,536, fp32, random weights; 16 utterances of adapter frames of 15 s of audio (150
positions) and "#", 60 tokens each, whatever they are. Three ways, on the same weights and with the same operators:

- recompute: every token from a pass over all that precedes it, logits at the last position only, one utterance;
- batch_1: `decode`, one utterance;
- batch_16: `decode`, all utterances at once.

Before anything is timed, batch_1 must give the tokens of recompute for the first utterance, and batch_16 those of
batch_1 for all. Times are medians of interleaved runs. Memory is read in one run of 600 tokens: what lies in tensors,
and what the process holds, after 600 tokens less after 60.

python bench/decode_utterances.py [--repeats 3]
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from rwkv_speech.decoding import decode
from rwkv_speech.lm import wkv
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.rwkv6 import RWKV6

UTTERANCES = 16
POSITIONS = 150  # of 15 s: 50 frames/s, 5 to a position
TOKENS = 60
MANY_TOKENS = 600
NEVER = -1  # no token ends a transcript
HASH = 36  # "#"
BOUNDS = {"batch_1_vs_recompute": 8, "batch_16_vs_recompute": 30, "batch_16_vs_batch_1": 3}


def random_model() -> RWKV6:
    sizes = official_sizes(n_layer=12, n_embd=768)
    with torch.device("meta"):
        model = RWKV6(sizes)
    model.load_state_dict(random_weights(sizes, seed=0, time_state=True), assign=True)
    return model.requires_grad_(False)


@torch.inference_mode()
def recompute(model: RWKV6, prefix: Tensor, n_tokens: int) -> list[int]:
    """Greedy tokens after a prefix (1, T, C), each from a full pass."""
    tokens = []
    while len(tokens) < n_tokens:
        hidden, _ = model(torch.cat([prefix, model.embed(torch.tensor([tokens], dtype=torch.int64))], dim=1))
        tokens.append(model.logits(hidden[:, -1]).argmax().item())
    return tokens


def ours(model: RWKV6, prefixes: Tensor, n_tokens: int) -> list[list[int]]:
    """Greedy tokens after each prefix of (B, T, C), by `decode`."""
    B, T, _ = prefixes.shape
    lengths = torch.full((B,), T)
    return [x.tokens for x in decode(model, prefixes, lengths, max_new_tokens=[n_tokens] * B, end=NEVER)]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def memory_growth(model: RWKV6, prefix: Tensor) -> dict[str, int]:
    """Bytes held after MANY_TOKENS tokens less those after TOKENS, in one run of `decode`."""
    passes, found = 0, []

    def look(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes in (TOKENS, MANY_TOKENS):
            storages = (x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), Tensor))
            in_tensors = sum({x.data_ptr(): x.nbytes() for x in storages}.values())
            found.append((in_tensors, resident_bytes()))

    hook = model.register_forward_hook(look)
    ours(model, prefix, MANY_TOKENS)
    hook.remove()
    (tensors_before, resident_before), (tensors_after, resident_after) = found
    return {
        "tensor_bytes_growth": tensors_after - tensors_before,
        "resident_bytes_growth": resident_after - resident_before,
        "resident_bytes": resident_after,
    }


def resident_bytes() -> int:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, interleaved")
    args = parser.parse_args()

    model = random_model()
    frames = torch.randn(UTTERANCES, POSITIONS, model.sizes.n_embd, generator=torch.Generator().manual_seed(1))
    prefixes = torch.cat([frames, model.embed(torch.full((UTTERANCES, 1), HASH))], dim=1)
    first = prefixes[:1]

    one_by_one = [ours(model, prefix[None], TOKENS)[0] for prefix in prefixes]
    if one_by_one[0] != recompute(model, first, TOKENS):
        raise SystemExit("decode gives other tokens than full re-computation; nothing was timed")
    if one_by_one != ours(model, prefixes, TOKENS):
        raise SystemExit("a batch gives other tokens than one by one; nothing was timed")

    ways = {
        "recompute": lambda: recompute(model, first, TOKENS),
        "batch_1": lambda: ours(model, first, TOKENS),
        "batch_16": lambda: ours(model, prefixes, TOKENS),
    }
    runs = [{name: seconds(run) for name, run in ways.items()} for _ in range(args.repeats)]
    median = {name: statistics.median(run[name] for run in runs) for name in ways}
    ratios = {
        "batch_1_vs_recompute": median["recompute"] / median["batch_1"],
        "batch_16_vs_recompute": median["recompute"] / (median["batch_16"] / UTTERANCES),
        "batch_16_vs_batch_1": median["batch_1"] / (median["batch_16"] / UTTERANCES),
    }
    memory = memory_growth(model, first)
    line = {
        "bench": "decode_utterances",
        "model": "12 x 768, vocabulary 65536, fp32, random",
        "wkv": wkv.backend("cpu").name,
        "threads": torch.get_num_threads(),
        "prefix_positions": prefixes.shape[1],
        "tokens": TOKENS,
        "distinct_tokens": len({token for tokens in one_by_one for token in tokens}),
        "tokens_equal": True,
        "repeats": args.repeats,
        **{f"{name}_seconds": round(value, 3) for name, value in median.items()},
        **{name: round(value, 2) for name, value in ratios.items()},
        "bounds": BOUNDS,
        **memory,
        "within_bounds": all(ratios[name] >= bound for name, bound in BOUNDS.items())
        and memory["tensor_bytes_growth"] == 0,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
