"""Timing for the benchmarks: several things in turn, round after round, so that a drifting machine hits all alike."""

import time
from collections.abc import Callable
from statistics import median

import torch

READ = 256 * 2**20  # bytes, far more than the caches hold
SQUARE = 2048  # rows of the matrices whose product tells the peak
REPEATS = 3  # of each measure of a limit in a round

Things = dict[str, Callable[[], object]]


def seconds(things: Things, *, rounds: int, limits: dict[str, Things] | None = None) -> dict[str, float]:
    """The median time of each over `rounds` rounds, after one that is not counted.

    Of `limits`, each a few ways to reach one limit of the machine (`reading`, `squares`), the shortest time counts: of
    any way in any round. They run between the others.
    """
    limits = limits or {}
    times: dict[str, list[float]] = {name: [] for name in (*things, *limits)}
    for round_ in range(rounds + 1):
        for name, thing in things.items():
            taken = _seconds(thing)
            if round_:
                times[name].append(taken)
            for limit, ways in limits.items():
                times[limit] += [_seconds(way) for way in ways.values() for _ in range(REPEATS)]
    return {name: min(values) if name in limits else median(values) for name, values in times.items()}


def reading() -> Things:
    """Ways to read READ bytes of memory."""
    rows = torch.ones(2**13, READ // 2**15)
    x = rows.flatten()
    vector = torch.ones(rows.shape[1])
    return {"sum": x.sum, "dot": lambda: torch.dot(x, x), "product": lambda: rows @ vector}


def squares() -> Things:
    """The product of two matrices of SQUARE x SQUARE, fp32: 2 SQUARE^3 operations."""
    square = torch.randn(SQUARE, SQUARE)
    return {"fp32": lambda: square @ square}


def share(least: float, taken: float, *, of: str) -> float:
    """The least time that a limit of the machine allows, over the time taken; above 1 it ends the benchmark."""
    if least > taken:
        raise SystemExit(f"{least / taken:.3f} of {of} can't be: the limit was measured on a slower machine; try again")
    return round(least / taken, 3)


def _seconds(thing: Callable[[], object]) -> float:
    start = time.perf_counter()
    thing()
    return time.perf_counter() - start
