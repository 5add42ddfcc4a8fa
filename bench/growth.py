"""How each cost grows: CPU time and peak memory against length, batch, utterances and missions, with fitted exponents.

The frozen parts are those of the quick-start, fp32, on one thread; speech is that of its corpus, over and over.
Each point is a process of its own, forked from one that has done nothing but load them. It does the smallest
size first, then the size itself with the allocator giving back at once what is freed: the peak of that (VmHWM, less
what was resident before) is the memory. Then again, twice or more, with the allocator keeping what it has, or large
blocks would cost a page fault for each 4 KiB: the least CPU time counts, so that what else runs on the machine does
little harm.

An exponent is the slope of log time over log size by least squares over the upper half of the sizes. It stands beside
the one that is expected, and one that is more than 0.15 above that ends the benchmark with status 1 unless it
is explained here. Memory below 1 MiB counts as 1 MiB.

Prints a JSON line for each cost; --out writes growth.md and growth.png, too. A cost's sizes end with the first that
takes longer than --seconds, the fourth at the earliest: by default under two minutes for all. --seconds inf goes up to
an hour of audio and 10^6 utterances.

python bench/growth.py [--seconds inf --out docs] [--only encoder batch]
"""

import argparse
import ctypes
import gc
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.growth_costs import Cost, Parts, Prepare
from bench.memory import memory

TOLERANCE = 0.15
LEAST = 2**20  # bytes
FEWEST = 4  # sizes of a cost
ROUNDS, ENOUGH = 2, 0.1  # runs that are timed, at least, and the seconds that they take at least
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt, malloc.h


@dataclass
class Measured:
    """A cost at the sizes that were reached: CPU seconds, bytes."""

    cost: Cost
    seconds: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.cost.sizes[: len(self.seconds)]

    @property
    def exponents(self) -> tuple[float, float]:
        return exponent(self.sizes, self.seconds), exponent(self.sizes, np.maximum(self.bytes, LEAST))

    @property
    def is_above(self) -> bool:
        """Whether time or memory grows faster than expected."""
        return any(found > e + TOLERANCE for found, e in zip(self.exponents, self.cost.expected, strict=True))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size, by least squares over the upper half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def point(prepare: Prepare, size: int, smallest: int) -> tuple[float, int]:
    """CPU seconds and peak bytes of one size, measured in a process of its own.

    Raises:
        RuntimeError: the process died.
    """
    context = multiprocessing.get_context("fork")  # what is loaded is there at once
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(_measure(prepare, size, smallest)))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process that measures died; it may have had too little memory") from None
    finally:
        child.join()


def _measure(prepare: Prepare, size: int, smallest: int) -> tuple[float, int]:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.mallopt(M_TRIM_THRESHOLD, 2**17)  # glibc's own
    prepare(smallest)()
    thing = prepare(size)
    libc.malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    thing()
    peak = memory("VmHWM") - before
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    times: list[float] = []
    while len(times) < ROUNDS or sum(times) < ENOUGH:
        start = time.process_time()
        thing()
        times.append(time.process_time() - start)
    return min(times), peak


def grown(cost: Cost, limit: float) -> Measured:
    """The cost at its sizes, up to the first that takes more than `limit` seconds."""
    found = Measured(cost)
    for size in cost.sizes:
        seconds, peak = point(cost.prepare, size, cost.sizes[0])
        found.seconds.append(seconds)
        found.bytes.append(peak)
        if seconds > limit and len(found.seconds) >= FEWEST:
            break
    return found


def line_of(found: Measured) -> dict:
    time_exponent, memory_exponent = found.exponents
    return {
        "bench": "growth",
        "what": found.cost.what,
        "against": found.cost.against,
        "sizes": found.sizes,
        "cpu_seconds": [float(f"{x:.3g}") for x in found.seconds],
        "mib": [round(x / 2**20, 1) for x in found.bytes],
        "time_exponent": round(time_exponent, 2),
        "expected_time": found.cost.expected[0],
        "memory_exponent": round(memory_exponent, 2),
        "expected_memory": found.cost.expected[1],
        "above": found.is_above,
    }


def page(measured: Sequence[Measured], command: str) -> str:
    """growth.md."""
    load = os.getloadavg()[0]
    lines = [
        "# How each cost grows",
        "",
        f"Written by `{command}`; what is measured, and how, stands at the top of that file. Exponents are the slopes "
        "over the upper half of the sizes, beside what is expected. *One more*: what another second, "
        "sample, utterance or mission adds between the two largest sizes. CPU time of one thread, fp32, with the "
        f"quick-start's small parts, on {os.cpu_count()} cores with a load of {load:.1f}: growth is what can be "
        "taken from here, not speed.",
        "",
        "![Time and memory over the sizes, both logarithmic](growth.png)",
    ]
    for against, group in groupby(measured, lambda x: x.cost.against):
        lines += [
            "",
            f"## Against {against}",
            "",
            "| what | sizes | time: exponent, expected | one more | memory: exponent, expected | one more | why |",
            "|---|---|---|---|---|---|---|",
            *map(_row, group),
        ]
    return "\n".join(lines) + "\n"


def _row(found: Measured) -> str:
    cost, sizes = found.cost, found.sizes
    time_exponent, memory_exponent = found.exponents
    step = sizes[-1] - sizes[-2]
    seconds = max(0.0, (found.seconds[-1] - found.seconds[-2]) / step)
    kilobytes = max(0.0, (found.bytes[-1] - found.bytes[-2]) / step / 1000)
    cells = (
        cost.what,
        f"{sizes[0]:,} to {sizes[-1]:,}",
        f"{time_exponent:.2f}, {cost.expected[0]}",
        f"{1e6 * seconds:,.3g} µs" if seconds < 1e-3 else f"{1e3 * seconds:,.3g} ms",
        f"{memory_exponent:.2f}, {cost.expected[1]}",
        f"{kilobytes:,.3g} kB",
        cost.why + (f". {cost.above}" if found.is_above else ""),
    )
    return f"| {' | '.join(cells)} |"


def picture(measured: Sequence[Measured], path: Path) -> None:
    """Time above memory, a column for each thing that they grow with."""
    groups = {against: list(group) for against, group in groupby(measured, lambda x: x.cost.against)}
    figure = Figure(figsize=(4.4 * len(groups), 8.4), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False)
    for (against, group), (above, below) in zip(groups.items(), axes.T, strict=True):
        for number, x in enumerate(group):
            label = "{:.2f}  {:.2f}  {}".format(*x.exponents, x.cost.what)
            line = "o-" if number < 10 else "o--"  # there are ten colours
            above.plot(x.sizes, x.seconds, line, ms=3)
            below.plot(x.sizes, np.maximum(x.bytes, LEAST) / 2**20, line, ms=3, label=label)
        for ax, what in ((above, "CPU time, s"), (below, "peak memory, MiB")):
            ax.set(xscale="log", yscale="log", xlabel=against, ylabel=what)
            low, high = ax.get_ylim()
            wider = max(1.0, (100 * low / high) ** 0.5)  # two decades at least, or noise looks like growth
            ax.set_ylim(low / wider, high * wider)
            ax.grid(alpha=0.3)
        title = "exponents of time and memory"
        below.legend(fontsize=8, title=title, title_fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="a cost's sizes end with the first that takes longer"
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="costs that have one of these in them")
    parser.add_argument("--out", type=Path, help="folder for growth.md and growth.png (default: none is written)")
    args = parser.parse_args()
    logging.getLogger("rwkv_speech").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder))
        gc.freeze()  # what is loaded is no work for the collector
        costs = [x for x in parts.costs() if any(words in f"{x.what} {x.against}" for words in args.only)]
        if not costs:
            parser.error(f"--only {' '.join(args.only)}: no cost has one of these words in it")
        for cost in costs:
            measured.append(grown(cost, args.seconds))
            print(json.dumps(line_of(measured[-1])), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python bench/growth.py", *sys.argv[1:]])
        (args.out / "growth.md").write_text(page(measured, command), encoding="utf-8")
        picture(measured, args.out / "growth.png")
    if unexplained := [x.cost.what for x in measured if x.is_above and not x.cost.above]:
        raise SystemExit(f"grows faster than expected: {'; '.join(unexplained)}")


if __name__ == "__main__":
    main()
