"""Writes a model of random weights in the form of the official files, to measure and test with.

python bench/random_model.py OUT.pth --generation 7 --n_layer 24 --n_embd 2048
"""

import argparse
import os
from pathlib import Path

import torch

from rwkv_speech.lm.initialise import fresh_weights, official_sizes, random_weights
from rwkv_speech.lm.weights import ModelSizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_model(
    path: Path,
    sizes: ModelSizes,
    *,
    dtype: torch.dtype,
    seed: int,
    time_state: bool = False,
    fresh: bool = False,
) -> None:
    """Writes the model under a temporary name beside `path` and renames it when it is whole.

    Args:
        path: of the `.pth` file; its folder is made if need be.
        sizes: of the model.
        dtype: of all tensors.
        seed: of all random numbers.
        time_state: with non-zero initial states.
        fresh: initialised for training instead of random in every tensor.
    """
    if fresh:
        tensors = fresh_weights(sizes, seed=seed, dtype=dtype)
    else:
        tensors = random_weights(sizes, seed=seed, dtype=dtype, time_state=time_state)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(tensors, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.pth")
    parser.add_argument("--generation", type=int, choices=(6, 7), default=6)
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--time_state", action="store_true", help="with a non-zero initial state in each block")
    kind.add_argument("--fresh", action="store_true", help="initialised for training, as the official code does")
    args = parser.parse_args()

    if args.n_embd % args.head_size:
        parser.error(f"--n_embd {args.n_embd} is no multiple of --head_size {args.head_size}")
    sizes = official_sizes(
        generation=args.generation,
        n_layer=args.n_layer,
        n_embd=args.n_embd,
        vocab_size=args.vocab_size,
        head_size=args.head_size,
    )
    write_model(
        args.out,
        sizes,
        dtype=DTYPES[args.dtype],
        seed=args.seed,
        time_state=args.time_state,
        fresh=args.fresh,
    )
    print(f"{args.out}: {sizes.n_params:,} parameters, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
