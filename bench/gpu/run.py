"""One part of bench/gpu.sh: runs it, or says what it lacks."""

import argparse
import importlib.util
import json
from importlib import import_module
from pathlib import Path

SPEECH = ("transformers", "pytorch_lightning", "soundfile", "soxr", "jiwer", "rwkv", "rich")
TRAINING = (*SPEECH, "tensorboard", "matplotlib")
# Part -> module of this folder, its function, and the packages it can't do without.
PARTS = {
    "build": ("build", "build", ()),
    "operator": ("operators", "check", ()),
    "operator7": ("operators", "check7", ()),
    "sanitizer": ("operators", "sanitize", ()),
    "whole": ("whole", "compare", SPEECH),
    "training": ("commands", "train", TRAINING),
    "commands": ("commands", "use", TRAINING),
    "quickstart": ("commands", "quickstart", TRAINING),
    "wkv": ("operators", "measure", ()),
    "step": ("large", "train", SPEECH),
    "decode": ("large", "decode", SPEECH),
    "quantised": ("large", "quantised", SPEECH),
    "fla": ("operators", "measure_fla", ()),
    "sanitized": ("operators", "sanitized", ()),  # what the sanitizer runs
}
PARTS |= {f"warm-{name}": PARTS[name] for name in ("step", "decode")}


def missing(part: str) -> list[str]:
    names = ("torch", "numpy", "safetensors", *PARTS[part][2])
    return [name for name in names if importlib.util.find_spec(name) is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    for name in ("results", "work", "program"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--wkv", default="auto")
    args = parser.parse_args()
    if lacks := missing(args.part):
        line = {"part": args.part, "what": "left out", "ok": None, "needs": ", ".join(lacks)}
        with args.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return

    from bench.gpu.common import Run
    from rwkv_speech.lm import wkv

    wkv.set_backend(args.wkv)
    module, function, _ = PARTS[args.part]
    warm = args.part.startswith("warm-")
    run = Run(args.part, args.dry, warm, args.results, args.work, args.program, args.wkv)
    getattr(import_module(f"bench.gpu.{module}"), function)(run)


if __name__ == "__main__":
    main()
