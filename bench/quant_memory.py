"""Memory of training beside a model of random weights that is kept in bf16, int8 or nf4. Prints one JSON line.

A model of width 2048, of 6 layers unless asked otherwise, and the adapter of a WavLM-large, with activation
checkpointing, on one utterance of 15 s and 45 words whose frames are given. Each form is a process of its own that
loads the model and trains for two steps. `mib` is the peak of what is resident during these (VmHWM), less what was
before the model was loaded: the model, what is trained, its gradients and the optimiser's state, and what a step
needs. In bf16 all weights come from the mapped file and count as a step reads them; the embedding does in each form, a
few rows of it. `of_which_weights` is all the rest. The first losses must agree. glibc is told to give freed memory
back at once. With 24 layers it takes five minutes, and only then tells whether nf4 is within BOUND.

python bench/quant_memory.py [--generation 7] [--n_layer 24]
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.memory import FREE_AT_ONCE, memory
from bench.random_model import write_model
from bench.train import WORDS, WORDS_EACH, batch_of, random_frames, random_speech_model
from rwkv_speech import lm
from rwkv_speech.lm.initialise import official_sizes
from rwkv_speech.options import QUANTS

SECONDS = 15.0
TOLERANCE = 0.02  # of the first loss, relative; a model that has learnt nothing
BOUND, LAYERS = 0.45, 24  # nf4's over bf16's, where there are so many: of few, what a step needs weighs more


def measure(path: Path, form: str) -> dict:
    """Bytes of a training process that keeps the model in this form, and the losses of its two steps."""
    before = memory("VmRSS")
    language_model = lm.load(path, dtype=torch.bfloat16, quant=None if form == "bf16" else form)
    language_model.checkpointing = True
    model = random_speech_model(language_model)
    optimizer = torch.optim.AdamW(model.trainable_state_dict().values())
    text = " ".join(WORDS[i % len(WORDS)] for i in range(WORDS_EACH))
    batch = batch_of(model, random_frames(model, [SECONDS]), [text])
    losses = []
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    for _ in range(2):
        loss = model.loss_sum(batch) / batch.tokens
        loss.backward()
        losses.append(round(loss.item(), 4))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    weights = sum(x.nbytes for name, x in language_model.state_dict().items() if name != "emb.weight")
    return {"peak": memory("VmHWM") - before, "weights": weights, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generation", type=int, choices=(6, 7), default=7)
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # a process's part: file, form
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        sizes = official_sizes(generation=args.generation, n_layer=args.n_layer, n_embd=args.n_embd)
        write_model(path, sizes, dtype=torch.bfloat16, seed=0)
        for form in ("bf16", *QUANTS):
            command = [sys.executable, __file__, "--measure", str(path), form]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | FREE_AT_ONCE)
            found[form] = json.loads(done.stdout)
    first = [x["losses"][0] for x in found.values()]
    if max(first) > (1 + TOLERANCE) * min(first):
        raise SystemExit(f"the first losses of bf16, {', '.join(QUANTS)} are {first}; nothing is told")
    line = {
        "bench": "quant_memory",
        "model": f"RWKV-{args.generation} {args.n_layer} x {args.n_embd}",
        "mib": {form: round(x["peak"] / 2**20) for form, x in found.items()},
        "of_which_weights": {form: round(x["weights"] / 2**20) for form, x in found.items()},
        "vs_bf16": {form: round(x["peak"] / found["bf16"]["peak"], 3) for form, x in found.items()},
        "losses": {form: x["losses"] for form, x in found.items()},
    }
    if args.n_layer >= LAYERS:
        line |= {"bound": BOUND, "within_bound": found["nf4"]["peak"] <= BOUND * found["bf16"]["peak"]}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
