"""What calibration learns about a point, and the range that follows from it.

    Record.see(x) window by window -> range_of(record, …) -> (low, high), which contain 0

`minmax`      the smallest and the largest value there was
`running`     of each batch, in a running mean: what a batch adds has a weight of 1 - MOMENTUM
`percentile`  cuts off the same share of the values at either end
`mse`         the range with the least mean squared error of rounding and clipping

The last two look at a histogram whose bins are as fine as bfloat16 (1/128 of a value), so that it needs to know nothing
about the values before it sees them, and outliers do not make it coarse for the others.
"""

from collections.abc import Sequence

import numpy as np

from minigate import graph

METHODS = ("minmax", "running", "percentile", "mse")
MOMENTUM = 0.9
BINS = 1 << 16
AT_ONCE = 1 << 20  # values whose bins are in memory at a time
SHRINKS = 2.0 ** (-np.arange(97) / 8)  # of a range, tried for `mse`: down to 1/4096
ROUNDS = 3  # of `mse`: ends in turn


class Record:
    """Of one point: its values' bounds by window and by channel, and if wanted a histogram.

    bounds  window -> (low, high)
    lows, highs  (D,) over all windows
    counts  (BINS,) values, each as often as its window is used; or None
    """

    def __init__(self, histogram: bool = False):
        self.bounds: dict[int, tuple[float, float]] = {}
        self.lows = self.highs = None
        self.counts = np.zeros(BINS, np.int64) if histogram else None

    def see(self, x: np.ndarray, window: int, times: int = 1) -> None:
        """x (…, D) float32, of a window that is used so many times."""
        rows = x.reshape(-1, x.shape[-1])
        lows, highs = rows.min(axis=0), rows.max(axis=0)
        low, high = float(lows.min()), float(highs.max())
        if window in self.bounds:
            low, high = min(low, self.bounds[window][0]), max(high, self.bounds[window][1])
        self.bounds[window] = low, high
        self.lows = lows if self.lows is None else np.minimum(self.lows, lows)
        self.highs = highs if self.highs is None else np.maximum(self.highs, highs)
        if self.counts is not None:
            self.counts += times * bin_counts(rows)

    def largest(self) -> np.ndarray:
        """(D,) largest magnitude by channel."""
        return np.maximum(np.abs(self.lows), np.abs(self.highs))


def bin_counts(x: np.ndarray) -> np.ndarray:
    """x float32 -> (BINS,) values by the upper half of their bits: sign, exponent and 7 bits of the fraction."""
    bits = np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint32)
    counts = np.zeros(BINS, np.int64)
    for i in range(0, len(bits), AT_ONCE):
        counts += np.bincount(bits[i : i + AT_ONCE] >> 16, minlength=BINS)
    return counts


def values_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """counts (BINS,) -> the middle of each bin that holds a value (n,) float64, ascending; how many it holds (n,)."""
    used = np.flatnonzero(counts)
    middle = (used.astype(np.uint32) << 16 | 0x8000).view(np.float32).astype(np.float64)
    order = np.argsort(middle)
    return middle[order], counts[used][order]


def range_of(record: Record, method: str, batches: Sequence[Sequence[int]], percentile: float) -> tuple[float, float]:
    """-> (low, high) around 0, of the windows whose numbers are in `batches`; percentile in per cent."""
    if method == "running":
        low, high = running(record, batches)
    else:
        low, high = float(record.lows.min()), float(record.highs.max())
    if method == "percentile":
        low, high = central(record, percentile / 100, low, high)
    low, high = min(low, 0.0), max(high, 0.0)
    return least_error(record, low, high) if method == "mse" else (low, high)


def running(record: Record, batches: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The batches' smallest and largest values in a running mean that begins with the first batch's."""
    mean = None
    for batch in batches:
        bounds = np.array([record.bounds[window] for window in batch])
        found = np.array([bounds[:, 0].min(), bounds[:, 1].max()])
        mean = found if mean is None else MOMENTUM * mean + (1 - MOMENTUM) * found
    return float(mean[0]), float(mean[1])


def central(record: Record, share: float, low: float, high: float) -> tuple[float, float]:
    """What is left when 1 - share of the values is cut off at either end, within low and high."""
    values, counts = values_of(record.counts)
    below = np.cumsum(counts)
    first = np.searchsorted(below, (1 - share) * below[-1], side="right")
    last = np.searchsorted(below, share * below[-1])
    return max(low, float(values[first])), min(high, float(values[last]))


def least_error(record: Record, low: float, high: float) -> tuple[float, float]:
    """The range within low and high whose grid has the least squared error: both ends are shrunk together, then each in
    turn, ROUNDS times."""
    values, counts = values_of(record.counts)

    def best(candidates):
        return min(candidates, key=lambda pair: squared_error(values, counts, *pair))

    found = best([(low * s, high * s) for s in SHRINKS])
    for _ in range(ROUNDS):
        found = best([found, *((found[0], high * s) for s in SHRINKS)])
        found = best([found, *((low * s, found[1]) for s in SHRINKS)])
    return float(found[0]), float(found[1])


def squared_error(values: np.ndarray, counts: np.ndarray, low: float, high: float) -> float:
    """Of the values on the grid of low and high, summed."""
    scale, zero_point = graph.grid(low, high)
    steps = np.clip(np.rint(values / float(scale)), graph.Q_MIN - zero_point, graph.Q_MAX - zero_point)
    return float(counts @ np.square(values - float(scale) * steps))
