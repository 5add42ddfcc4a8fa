"""Timing for the benchmarks: several things in turn, round after round, so that a drifting machine hits all alike."""

import time
from collections.abc import Callable
from statistics import median


def seconds(things: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """The median time of each over `rounds` rounds, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in things}
    for round_ in range(rounds + 1):
        for name, thing in things.items():
            start = time.perf_counter()
            thing()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}
