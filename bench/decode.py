"""Decoding and prefill of the bare language model against the `rwkv` package, and against what the memory and the
matrix products allow. L12 x 768, vocabulary 65,536, random weights; prints one JSON line of ratios for each precision.

With --quant, a line for each quant instead: its tokens a second against those of bf16, and of the fastest form of the
package, all in turn.

python bench/decode.py [--generation 6] [--n_layer 12 --n_embd 768] [--rounds 5] [--quant int8 nf4]
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.random_model import write_model
from bench.timing import READ, reading, seconds, share
from rwkv_speech.lm import load
from rwkv_speech.lm.initialise import official_sizes
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.options import QUANTS

TOKENS, PREFILL, BATCH, FAR = 8, 256, 16, 10_000


def matrices(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Every weight that a token reads whole: all but the embedding."""
    others = ("emb.weight", "time_state", "time_faaaa", "r_k")
    return {
        name: p
        for name, p in model.named_parameters()
        if name.endswith("scale") or (min(p.shape[-2:]) > 1 < p.dim() and not name.endswith(others))
    }


def bytes_read(model: LanguageModel) -> int:
    """Of weights, for a token."""
    return sum(w.nbytes for w in matrices(model).values())


def size_of(model: LanguageModel) -> str:
    return f"RWKV-{model.generation} L{model.sizes.n_layer}x{model.sizes.n_embd}"


@torch.inference_mode()
def measure(path: Path, dtype: torch.dtype, name: str, rounds: int) -> dict:
    from rwkv.model import RWKV

    model = load(path, dtype=dtype)
    package = RWKV(str(path.with_suffix("")), f"cpu {name}")
    prompt = torch.randint(1, 65530, (PREFILL,), generator=torch.Generator().manual_seed(0))
    hidden, state = model(prompt[None])
    got, (want, theirs) = model.logits(hidden[0, -1]).float(), package.forward(prompt.tolist(), None)
    error = ((got - want.float()).norm() / want.float().norm()).item()
    assert error < (1e-4 if dtype == torch.float32 else 0.1), f"logits differ from the package's by {error:.1e}"

    token, tokens = prompt[:1, None], prompt[:BATCH, None]
    far = state
    for _ in range(FAR // 1000):
        far = model(torch.randint(1, 65530, (1, 1000)), far)[1]
    batch = state.select(torch.zeros(BATCH, dtype=torch.long))

    def steps(inputs, state):
        for _ in range(TOKENS):
            hidden, state = model(inputs, state)
            model.logits(hidden[:, -1])

    def package_steps():
        for _ in range(TOKENS):
            package.forward([5], [x.clone() for x in theirs])

    # What the matrix products of a prefill take by themselves; the low-rank ones count too.
    factors = []
    for part, w in matrices(model).items():
        if part != "head.weight":
            w = w.T if part.endswith("weight") else w
            factors.append((torch.randn(*w.shape[:-2], PREFILL, w.shape[-2], dtype=dtype), w))

    def products():
        for x, w in factors:
            x @ w

    t = seconds(
        {
            "ours": lambda: steps(token, state),
            "package": package_steps,
            "far": lambda: steps(token, far),
            "batch": lambda: steps(tokens, batch),
            "prefill": lambda: model(prompt[None]),
            "prefill_package": lambda: package.forward(prompt.tolist(), None),
        },
        rounds=rounds,
        limits={"reading": reading(), "products": {"one by one": products}},
    )
    read = bytes_read(model) * TOKENS / READ * t["reading"]
    of_bandwidth = {way: share(read, t[way], of="the memory bandwidth") for way in ("ours", "package")}
    return {
        "bench": "decode",
        "model": f"{size_of(model)} {name}",
        "threads": torch.get_num_threads(),
        "tokens_per_s_vs_package": round(t["package"] / t["ours"], 2),
        "of_memory_bandwidth": of_bandwidth["ours"],
        "package_of_memory_bandwidth": of_bandwidth["package"],
        "batch16_vs_batch1": round(BATCH * t["ours"] / t["batch"], 2),
        f"time_after_{FAR}_tokens": round(t["far"] / t["ours"], 3),
        "prefill_of_matrix_products": share(t["products"], t["prefill"], of="the matrix products"),
        "prefill_vs_package": round(t["prefill_package"] / t["prefill"], 2),
    }


@torch.inference_mode()
def measure_quantised(path: Path, quants: list[str], rounds: int) -> list[dict]:
    from rwkv.model import RWKV

    models = {name: load(path, dtype=torch.bfloat16, quant=name) for name in quants}
    prompt = torch.randint(1, 65530, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    for name, model in models.items():  # the products of few rows against those with unpacked weights
        whole, (start, state) = model(prompt)[0], model(prompt[:, :-TOKENS])
        for token in prompt[:, -TOKENS:].T:
            start, state = model(token[:, None], state)
        got, want = (model.logits(x[:, -1]).float() for x in (start, whole))
        error = ((got - want).norm() / want.norm()).item()
        assert error < 0.1, f"{name}: logits token by token differ from those of all at once by {error:.1e}"
    models["bf16"] = load(path, dtype=torch.bfloat16)

    def steps(model):
        state = None
        for _ in range(TOKENS):
            hidden, state = model(prompt[:, :1], state)
            model.logits(hidden[:, -1])

    def package_steps(model):
        state = None
        for _ in range(TOKENS):
            _, state = model.forward([5], state)

    things = {name: lambda model=model: steps(model) for name, model in models.items()}
    for name in ("fp32", "bf16"):
        package = RWKV(str(path.with_suffix("")), f"cpu {name}")
        things[f"package {name}"] = lambda model=package: package_steps(model)
    t = seconds(things, rounds=rounds, limits={"reading": reading()})
    byte = t["reading"] / READ
    return [
        {
            "bench": "decode",
            "model": f"{size_of(models[name])} {name}",
            "threads": torch.get_num_threads(),
            "tokens_per_s": round(TOKENS / t[name], 1),
            "tokens_per_s_vs_bf16": round(t["bf16"] / t[name], 2),
            "tokens_per_s_vs_package": round(min(t["package fp32"], t["package bf16"]) / t[name], 2),
            "of_memory_bandwidth": share(bytes_read(models[name]) * TOKENS * byte, t[name], of="the memory bandwidth"),
        }
        for name in models
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--generation", type=int, choices=(6, 7), default=6)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--quant", nargs="+", choices=QUANTS)
    args = parser.parse_args()
    # The package reads these when it is imported.
    os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(args.generation == 7))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        sizes = official_sizes(generation=args.generation, n_layer=args.n_layer, n_embd=args.n_embd)
        write_model(path, sizes, dtype=torch.bfloat16 if args.quant else torch.float32, seed=0)
        if args.quant:
            for line in measure_quantised(path, args.quant, args.rounds):
                print(json.dumps(line), flush=True)
            return
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            print(json.dumps(measure(path, dtype, name, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
