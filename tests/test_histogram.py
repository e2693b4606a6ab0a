"""A histogram that grows: nothing is lost, bounds are exact."""

import numpy as np
import pytest

from minigate.histogram import BINS, Histogram


def filled(*arrays):
    h = Histogram()
    for x in arrays:
        h.add(np.asarray(x, np.float32))
    return h


def test_counts_are_numpys_on_its_own_edges():
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, s, (30, 7)).astype(np.float32) for s in (0.1, 50, 3)]
    h, together = filled(*parts), np.concatenate(parts)
    assert h.limit / 2 <= np.abs(together).max() < h.limit and np.log2(h.limit) % 1 == 0
    np.testing.assert_array_equal(h.counts, np.histogram(together, h.edges())[0])
    assert (h.lowest, h.highest) == (together.min(), together.max())


def test_values_at_the_limit():
    below = np.nextafter(np.float32(4), np.float32(0))
    h = filled([below, -4])
    assert h.limit == 8 and h.counts.sum() == 2
    h = filled([below])
    assert h.limit == 4 and h.counts[-1] == 1
    assert filled(np.zeros(5)).counts[BINS // 2] == 5


def test_the_central_share():
    h = filled(np.linspace(-100, 100, 100_000), [500.0], [-300.0])
    low, high = h.central(0.98)
    width = 2 * h.limit / BINS
    assert low == pytest.approx(-98, abs=width) and high == pytest.approx(98, abs=width)
    assert h.central(1.0) == (-300, 500)
