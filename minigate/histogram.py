"""Histogram of a tensor's values, whose range grows as larger values come."""

import numpy as np

BINS = 4096  # a power of two
LEAST_LIMIT = 2.0**-20


class Histogram:
    """counts (BINS,) of values in equal bins from -limit to limit; lowest and highest are exact.

    The limit is a power of two. For a larger value it doubles, and every two bins become one: nothing is lost but
    resolution.
    """

    def __init__(self):
        self.limit = LEAST_LIMIT
        self.counts = np.zeros(BINS, np.int64)
        self.lowest, self.highest = np.inf, -np.inf

    def add(self, x: np.ndarray) -> None:
        """x (…) float, finite."""
        self.lowest, self.highest = min(self.lowest, float(x.min())), max(self.highest, float(x.max()))
        while max(self.highest, -self.lowest) >= self.limit:
            self._double()
        bins = np.floor(x.ravel() * x.dtype.type(BINS / (2 * self.limit))).astype(np.int64)  # exact: powers of two
        self.counts += np.bincount(bins + BINS // 2, minlength=BINS)

    def _double(self) -> None:
        pairs = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(BINS, np.int64)
        self.counts[BINS // 4 : -BINS // 4] = pairs
        self.limit *= 2

    def edges(self) -> np.ndarray:
        """(BINS + 1,)"""
        return np.linspace(-self.limit, self.limit, BINS + 1)

    def central(self, share: float) -> tuple[float, float]:
        """Bounds of the values that are left when (1 - share) / 2 of them are cut off at either end."""
        cumulative = np.cumsum(self.counts)
        low, high = ((1 - share) / 2 * cumulative[-1], (1 + share) / 2 * cumulative[-1])
        first, last = np.searchsorted(cumulative, low, side="right"), np.searchsorted(cumulative, high)
        edges = self.edges()
        return max(float(edges[first]), self.lowest), min(float(edges[last + 1]), self.highest)
