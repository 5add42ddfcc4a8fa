"""One training step: the share of its time that its matrix products need, and what takes how much. One JSON line.

An RWKV of 12 x 1024 with vocabulary 65,536, fp32, and the adapter of a WavLM-large, all of random weights. A batch
is 8 utterances of 14.6 to 15 s and 45 words, T about 200 positions. Their frames are given, as a cache gives them
(fp16), and nothing is recomputed. A step is all that training does with a batch: adapter, language model, loss, the
backward pass, clipping, AdamW.

`products_at_peak` is the time that the step's matrix products would take at the rate of a product of two 2048 x 2048
matrices, measured between the steps, over the time of the step. Counted are the adapter's, the language model's with
the low-rank ones, and the head's at the positions of the transcript, forward and backward: frozen matrices need the
gradient of their input only. torch's own counter must find the same number of operations.

Before anything is timed, loss and gradients must be those of the utterances one by one, with the operator in plain
torch.

`shares` are parts of the step, loss and adapter each both ways. `of_all` tells what the WKV operator and the matrix
products, as they really run, take of a step under torch's profiler. The encoder is outside: bench/cache.py tells its
share.

python bench/train.py [--generation 6] [--rounds 3]
"""

import argparse
import json
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.timing import SQUARE, seconds, share, squares
from rwkv_speech.data.batches import Batch, Collate, Item
from rwkv_speech.data.sample import one_round
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.lm import model_class, wkv
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.missions.task import Task
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import TrainingOptions
from rwkv_speech.speech.adapter import Adapter
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.encoder import shortest_input
from rwkv_speech.speech.frame_cache import AbsentEncoder

WORDS = ["they", "came", "to", "the", "river", "in", "evening", "and", "found", "nobody", "there", "who", "knew"]
SECONDS = (14.6, 14.7, 14.7, 14.8, 14.8, 14.9, 14.9, 15.0)
WORDS_EACH = 45
WIDTH = 1024  # of WavLM-large's frames
CONVOLUTIONS = ((10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2)
BOUND = 0.70  # asked of products_at_peak
TOLERANCE = 1e-4
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def random_language_model(*, n_layer: int, n_embd: int, generation: int = 6) -> LanguageModel:
    sizes = official_sizes(generation=generation, n_layer=n_layer, n_embd=n_embd)
    with torch.device("meta"):
        model = model_class(generation)(sizes)
    model.load_state_dict(random_weights(sizes, seed=0, time_state=True), assign=True)
    return model.requires_grad_(False)


def random_speech_model(language_model: LanguageModel, *, missions: int = 1, adapters: int = 1) -> SpeechRWKV:
    """Beside the model, adapters of random weights for the frames of a WavLM-large, which isn't there itself."""
    encoder = AbsentEncoder("WavLM-large", width=WIDTH, convolutions=CONVOLUTIONS)
    torch.manual_seed(0)
    tasks = [Task("transcribe"), *(Task(f"transcribe/{i}") for i in range(1, missions))]
    parts = (Adapter(WIDTH, language_model.sizes.n_embd) for _ in range(adapters))
    return SpeechRWKV(language_model, encoder, *parts, tasks=tasks)


def random_frames(model: SpeechRWKV, seconds: Iterable[float]) -> list[Tensor]:
    """Frames (F, WIDTH), fp16, of audio that lasts as long."""
    rng = np.random.default_rng(0)
    counts = [model.speech_encoder.frame_count(round(s * SAMPLE_RATE)) for s in seconds]
    return [torch.from_numpy(rng.standard_normal((count, WIDTH), np.float32)).half() for count in counts]


def random_batch(model: SpeechRWKV) -> tuple[list[Tensor], list[str]]:
    """Frames (F, WIDTH) and a transcript for each of SECONDS."""
    rng = np.random.default_rng(1)
    return random_frames(model, SECONDS), [" ".join(rng.choice(WORDS, WORDS_EACH)) for _ in SECONDS]


def batch_of(model: SpeechRWKV, frames: list[Tensor], texts: list[str]) -> Batch:
    """The batch of frames that are cached, as a loader's workers make it."""
    items = []
    for i, (x, text) in enumerate(zip(frames, texts, strict=True)):
        samples = shortest_input(CONVOLUTIONS) + (len(x) - 1) * math.prod(stride for _, stride in CONVOLUTIONS)
        rendered = model.renderer(one_round(str(i), [torch.empty(samples)], text), [samples])
        mission = [*model.tasks][i % len(model.tasks)]
        items.append(Item(str(i), mission, i, text, rendered, [samples], [x], []))
    return Collate(model.adapter.group_count, is_frames=True)(items)


def product_flops(model: SpeechRWKV, batch: Batch) -> int:
    """Floating-point operations of the matrix products of a step, two for each multiplication; padding counts."""
    s = model.language_model.sizes
    C = s.n_embd
    groups, positions = batch.group_counts, batch.ids.numel()
    if s.generation == 6:
        # W_r, W_k, W_v, W_g, W_o and the channel mix's W_r; its other two; the low-rank interpolations and decays.
        blocks = s.n_layer * (6 * C * C + 2 * C * s.dim_ffn + 2 * C * (5 * s.dim_mix + s.dim_decay))
    else:
        # W_r, W_k, W_v, W_o; the channel mix's two; the low-rank decays, rates and gates, and values but in the first.
        low_rank = s.n_layer * (s.dim_decay + s.dim_rate + s.dim_gate) + (s.n_layer - 1) * s.dim_value
        blocks = s.n_layer * (4 * C * C + 2 * C * s.dim_ffn) + 2 * C * low_rank
    first, second = (model.adapter.layers[i].weight.numel() for i in (0, 2))
    return 2 * (
        2 * positions * blocks
        + 2 * batch.tokens * C * s.vocab_size
        + len(groups) * max(groups) * (2 * first + 3 * second)  # frames take no gradient, the hidden units do
    )


def gradients(model: SpeechRWKV) -> dict[str, Tensor]:
    """Those of the trained tensors, which are cleared."""
    found = {name: x.grad for name, x in model.trainable_state_dict().items()}
    model.zero_grad()
    return found


def largest_difference(model: SpeechRWKV, frames: list[Tensor], texts: list[str]) -> float:
    """Between the batch and its utterances one by one with the operator in plain torch: of the loss or a gradient."""
    results = []
    for backend, parts in (
        ("auto", [batch_of(model, frames, texts)]),
        ("torch", [batch_of(model, [x], [t]) for x, t in zip(frames, texts, strict=True)]),
    ):
        wkv.set_backend(backend)
        totals = [model.loss_sum(part) for part in parts]
        sum(totals).backward()
        results.append({"loss": sum(totals).detach()} | gradients(model))
    wkv.set_backend("auto")
    ours, theirs = results
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours)


class Stopwatch:
    """Sums the time of the parts of each step; hooks see where the language model begins and ends, both ways."""

    def __init__(self, model: SpeechRWKV) -> None:
        self.laps: dict[str, float] = defaultdict(float)
        model.language_model.register_forward_pre_hook(self._enter)
        model.language_model.register_forward_hook(self._leave)

    def start(self) -> None:
        self.since = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has passed since the lap before belongs to this part."""
        now = time.perf_counter()
        self.laps[name] += now - self.since
        self.since = now

    def _enter(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self.lap("adapter")
        inputs[0].register_hook(lambda _: self.lap("language_model_backward"))

    def _leave(self, _: nn.Module, inputs: tuple[Tensor], outputs: tuple) -> None:
        self.lap("language_model_forward")
        outputs[0].register_hook(lambda _: self.lap("loss"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generation", type=int, choices=(6, 7), default=6)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    model = random_speech_model(random_language_model(n_layer=12, n_embd=1024, generation=args.generation))
    frames, texts = random_batch(model)
    difference = largest_difference(model, frames, texts)
    if difference > TOLERANCE:
        raise SystemExit(f"the loss or a gradient of the batch is off by {difference:.1e}; nothing was timed")
    batch = batch_of(model, frames, texts)
    flops = product_flops(model, batch)
    with FlopCounterMode(display=False) as counter:
        model.loss_sum(batch).backward()
    if flops != counter.get_total_flops():
        raise SystemExit(f"{flops} operations by formula, {counter.get_total_flops()} by torch's counter")

    optimizer = TrainingModule(model, TrainingOptions(), total_steps=1000).configure_optimizers()["optimizer"]
    watch = Stopwatch(model)

    def step() -> None:
        watch.start()
        total = model.loss_sum(batch)
        watch.lap("loss")
        (total / batch.tokens).backward()
        watch.lap("adapter")
        torch.nn.utils.clip_grad_norm_(model.trainable_state_dict().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.lap("optimiser")

    t = seconds({"step": step}, rounds=args.rounds, limits={"squares": squares()})
    peak = 2 * SQUARE**3 / t["squares"]
    laps = {name: time / sum(watch.laps.values()) for name, time in watch.laps.items()}
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    operator = [f"rwkv_speech_cpu::wkv{args.generation}_{way}" for way in ("forward", "backward")]
    of_kind = {
        kind: sum(event.self_cpu_time_total for event in events if event.key in names) / whole
        for kind, names in (("operator", operator), ("matrix_products", PRODUCTS))
    }
    line = {
        "bench": "train",
        "model": f"RWKV-{args.generation} 12 x 1024, vocabulary 65536, fp32, random",
        "wkv": wkv.backend("cpu").name,
        "threads": torch.get_num_threads(),
        "batch": len(texts),
        "largest_difference": float(f"{difference:.1e}"),
        "step_seconds": round(t["step"], 2),
        "product_tflop": round(flops / 1e12, 3),
        "peak_gflops": round(peak / 1e9),
        "products_at_peak": share(flops / peak, t["step"], of="the peak in products"),
        "bound": BOUND,
        "shares": {name: round(share, 3) for name, share in laps.items()},
        "of_all": {kind: round(share, 3) for kind, share in of_kind.items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
