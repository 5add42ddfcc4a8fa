"""A pass over several splits that takes some of them more often than once, or only in part."""

from collections.abc import Sequence

import numpy as np


class Mix:
    """Which rows the pass of an epoch takes: `mix(epoch)`, (len(mix),) int64; the same number in each.

    Of a split with the weight 2.5, every row twice, and half of them once more: in the next epoch the other half.

    sizes: rows of each split, which lie one after the other.
    weights: of each split, above 0.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        self.seed = seed
        starts = np.cumsum([0, *sizes[:-1]])
        self.splits = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        self.whole = [int(weight) for weight in weights]
        parts = (round(weight % 1 * size) for weight, size in zip(weights, sizes, strict=True))
        self.parts = [part or int(not whole) for part, whole in zip(parts, self.whole, strict=True)]

    @property
    def copies(self) -> np.ndarray:
        """(len(mix),): how often a pass has taken the row before. Augmentation draws for each of them."""
        found = []
        for rows, n, part in zip(self.splits, self.whole, self.parts, strict=True):
            found += [np.full(len(rows), copy) for copy in range(n)] + [np.full(part, n)]
        return np.concatenate(found)

    def __len__(self) -> int:
        return sum(n * len(rows) + part for rows, n, part in zip(self.splits, self.whole, self.parts, strict=True))

    def __call__(self, epoch: int) -> np.ndarray:
        found = []
        for number, (rows, n, part) in enumerate(zip(self.splits, self.whole, self.parts, strict=True)):
            order = np.random.default_rng([self.seed, number]).permutation(rows)
            found += [rows] * n + [order.take(np.arange(part) + epoch * part, mode="wrap")]
        return np.concatenate(found)

    def longest(self, seconds: np.ndarray) -> np.ndarray:
        """(len(mix),): what the p-th in order of length, of a pass in any epoch, is never longer than, for each p.

        seconds: (rows,) of all rows.
        """
        found = []
        for rows, n, part in zip(self.splits, self.whole, self.parts, strict=True):
            found += [seconds[rows]] * n + [np.sort(seconds[rows])[len(rows) - part :]]
        return np.concatenate(found)
