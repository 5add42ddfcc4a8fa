"""A training step of several missions in one batch, over a step of one. One JSON line.

The model and the batch of bench/train.py, the same recordings and transcripts, but every other utterance is of another
mission with an initial state of its own: with one adapter for all, and with an adapter for each. The steps take turns.

python bench/missions.py [--missions 4] [--n_layer 12] [--n_embd 1024] [--rounds 3]
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.timing import seconds
from bench.train import batch_of, random_batch, random_language_model, random_speech_model
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import TrainingOptions
from rwkv_speech.trained import learning

TOLERANCE = 1e-4
BOUND = 1.1  # asked of the mix over one mission


def step_of(model: SpeechRWKV) -> Callable[[], None]:
    batch = batch_of(model, *random_batch(model))
    optimizer = TrainingModule(model, TrainingOptions(), total_steps=1000).configure_optimizers()["optimizer"]

    def step() -> None:
        (model.loss_sum(batch) / batch.tokens).backward()
        torch.nn.utils.clip_grad_norm_(learning(model.trained_tensors()), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("missions", 4), ("n_layer", 12), ("n_embd", 1024), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    sizes = {"n_layer": args.n_layer, "n_embd": args.n_embd}
    models = {
        "one": random_speech_model(random_language_model(**sizes)),
        "shared_adapter": random_speech_model(random_language_model(**sizes), missions=args.missions),
        "own_adapters": random_speech_model(
            random_language_model(**sizes), missions=args.missions, adapters=args.missions
        ),
    }
    for adapter in models["own_adapters"].adapters:
        adapter.load_state_dict(models["one"].adapter.state_dict())
    losses = [float(model.loss_sum(batch_of(model, *random_batch(model))).detach()) for model in models.values()]
    if max(losses) - min(losses) > TOLERANCE * max(losses):
        raise SystemExit(f"states and adapters are equal, the losses are not: {losses}; nothing was timed")
    t = seconds({name: step_of(model) for name, model in models.items()}, rounds=args.rounds)
    line = {
        "bench": "missions",
        "model": f"RWKV-6 {args.n_layer} x {args.n_embd}, vocabulary 65536, fp32, random",
        "missions": args.missions,
        "step_seconds": round(t["one"], 3),
        "shared_adapter": round(t["shared_adapter"] / t["one"], 3),
        "own_adapters": round(t["own_adapters"] / t["one"], 3),
        "bound": BOUND,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
