"""What the parts share: the device and its CPU stand-in, results, times, profiles, models of random weights."""

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from rwkv_speech.lm import model_class, wkv
from rwkv_speech.lm.initialise import official_sizes
from rwkv_speech.lm.language_model import Block, LanguageModel

_PLAIN_FORWARD = Block.forward
GENERATIONS = (6, 7)


@dataclass(frozen=True)
class Run:
    """One part of one run.

    dry: tiny sizes on the CPU; warm: compile what will be timed later, in small, and record nothing.
    results: the file of results; work: a folder for what parts write; program: the tree that is measured;
    wkv: the operator's backend.
    """

    part: str
    dry: bool
    warm: bool
    results: Path
    work: Path
    program: Path
    wkv: str

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def accelerator(self) -> str:
        return "cpu" if self.dry else "gpu"

    @property
    def backend(self) -> str:
        """How the operator is really computed."""
        return wkv.backend(self.device.type).name

    def size(self, gpu: Any, dry: Any) -> Any:
        return dry if self.dry else gpu

    def folder(self, name: str) -> Path:
        folder = self.work / self.part / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, what: str, *, ok: bool | None = None, detail: bool = False, **values: Any) -> None:
        """Appends a result. ok: whether a check held, None for a figure; detail: not for the table."""
        if self.warm:
            return
        over = [name for name, value in values.items() if name.startswith("share") and not 0 <= value <= 1]
        if over:
            ok, values["error of the benchmark"] = False, f"{', '.join(over)} is no share"
        line = {"part": self.part, "what": what, "ok": ok, "detail": detail, **values}
        with self.results.open("a") as file:  # one short write: parts that run side by side don't mix
            file.write(json.dumps(line) + "\n")

    def section(self, what: str, do: Callable[[], None]) -> None:
        """Does a piece of a part; what goes wrong in it is recorded and costs only itself."""
        try:
            do()
        except Exception as error:
            traceback.print_exc()
            text = (str(error).strip() or repr(error)).splitlines()[0][:300]
            self.record(what, ok=False, error=f"{type(error).__name__}: {text}")
        gc.collect()  # what is measured next finds the memory free
        if not self.dry:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if not self.dry:
            torch.cuda.synchronize()

    def start(self, command: Sequence[object], log: Path, output: Path | None = None, **env: str) -> subprocess.Popen:
        """A process of the program; what it says goes to `log`, its standard output to `output` if that is given."""
        with log.open("a") as file, (output or log).open("a") as out:
            how = {"cwd": self.work, "env": os.environ | env, "stdout": out, "stderr": file}
            process = subprocess.Popen([*map(str, command)], **how)
        process.log = log
        return process

    def finish(self, process: subprocess.Popen) -> None:
        """Waits for it. Raises RuntimeError: it failed; with the last line that it said."""
        if process.wait():
            said = process.log.read_text(errors="replace")
            print(said[-4000:], file=sys.stderr)
            raise RuntimeError((said.strip().splitlines() or ["no output"])[-1])


def interleaved(
    run: Run, things: dict[str, Callable[[], object]], *, rounds: int, queued: bool = False
) -> dict[str, list[float]]:
    """Seconds of each thing on the device in each round, in turn, after one round that is not counted.

    queued: the device is kept busy until the CPU has launched all of a thing, so that only the device's time counts.
    """
    times = defaultdict(list)
    for round_ in range(rounds + 1):
        for name, thing in things.items():
            run.wait()
            if run.dry:
                begin = time.perf_counter()
                thing()
                spent = time.perf_counter() - begin
            else:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if queued:
                    torch.cuda._sleep(4_000_000)  # cycles, about 2 ms
                first.record()
                thing()
                last.record()
                run.wait()
                spent = first.elapsed_time(last) / 1000
            if round_:
                times[name].append(spent)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in times.items()}


class Limits:
    """What the card can do, to be measured in turn with what is compared to it; the best of several counts."""

    def __init__(self, run: Run) -> None:
        n = run.size(8192, 256)
        self.a, self.b = (torch.randn(n, n, device=run.device, dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * n**3
        self.source = torch.randn(run.size(2**30, 2**20), device=run.device, dtype=torch.bfloat16)
        self.target = torch.empty_like(self.source)
        self.things = {
            "limit: product": lambda: torch.mm(self.a, self.b),
            "limit: copy": lambda: self.target.copy_(self.source),
            "limit: read": lambda: self.source.view(-1, 4096).amax(1),
        }

    def of(self, times: dict[str, list[float]]) -> tuple[float, float]:
        """FLOP/s of the product and bytes/s of the memory."""
        size = self.source.nbytes
        memory = max(2 * size / min(times["limit: copy"]), size / min(times["limit: read"]))
        return self.flops / min(times["limit: product"]), memory


def profile(run: Run, call: Callable[[], object]) -> dict[str, Any]:
    """The five most expensive kernels (in dry runs, operators), and the share of time in which no kernel runs."""
    kind = torch.profiler.ProfilerActivity.CPU if run.dry else torch.profiler.ProfilerActivity.CUDA
    run.wait()
    with torch.profiler.profile(activities=[kind]) as profiled:
        call()
        run.wait()
    wanted = DeviceType.CPU if run.dry else DeviceType.CUDA
    events = [e for e in profiled.events() if e.device_type == wanted and not getattr(e, "is_user_annotation", False)]
    spent: dict[str, float] = defaultdict(float)
    busy, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        start, stop = event.time_range.start, event.time_range.end
        spent[event.name] += stop - start
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - min(event.time_range.start for event in events)
    first = sorted(spent, key=spent.get, reverse=True)[:5]
    return {
        "kernels": len(events),
        "share idle": round(1 - busy / span, 3),
        "most expensive": {name[:60]: f"{spent[name] / sum(spent.values()):.1%}" for name in first},
    }


@torch.no_grad()
def random_language_model(run: Run, generation: int = 6) -> LanguageModel:
    """A 3B model of random weights, made on the device; activations and decays have healthy sizes."""
    large, small = {"n_layer": 2 if run.warm else 32, "n_embd": 2560}, {"n_layer": 2, "n_embd": 64, "vocab_size": 300}
    sizes = official_sizes(generation=generation, **run.size(large, small))
    with torch.device("meta"):
        model = model_class(generation)(sizes)
    model = model.to(torch.bfloat16).to_empty(device=run.device)
    torch.manual_seed(0)
    for name, x in model.named_parameters():
        last = name.rpartition(".")[2]
        if x.squeeze().dim() == 1:
            x.uniform_(*{"time_decay": (-7, 1.5), "w0": (-8, 4)}.get(last, (0.1, 0.9)))
        else:  # a matrix: (outputs, inputs), or (..., inputs, outputs) for the low-rank pairs
            x.normal_(0, x.shape[-1 if last == "weight" else -2] ** -0.5)
    for block in model.blocks:
        block.att.time_state = nn.Parameter(block.att.time_state.float())
    return model.requires_grad_(False)


def compile_blocks(run: Run, on: bool = True) -> None:
    """Fuses what lies between the matrix products of a block by torch.compile, or no more: for decoding, which the
    program does not compile.
    """
    fuse = partial(torch.compile, dynamic=False, backend=run.size("inductor", "aot_eager"))
    Block.forward = fuse(_PLAIN_FORWARD) if on else _PLAIN_FORWARD


def relative_error(got: Tensor, want: Tensor) -> float:
    """In norm, both on any device."""
    got, want = (x.detach().double().cpu() for x in (got, want))
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
