"""Ranges of a point by the four methods, and the histogram behind two of them."""

import numpy as np
import pytest

from minigate import graph, ranges
from minigate.ranges import Record, range_of


def record(windows, histogram=True, times=None):
    made = Record(histogram)
    for i, x in enumerate(windows):
        made.see(np.asarray(x, np.float32).reshape(-1, 2), i, 1 if times is None else times[i])
    return made


def normal(n=20_000, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 2)).astype(np.float32)


def test_bounds_by_window_and_by_channel():
    made = record([[[-1, 5], [2, 0]], [[-3, 1], [0, 0]]])
    made.see(np.float32([[7, -9]]), 1)
    assert made.bounds == {0: (-1, 5), 1: (-9, 7)}
    assert made.lows.tolist() == [-3, -9] and made.highs.tolist() == [7, 5] and made.largest().tolist() == [7, 9]


def test_minmax_contains_zero():
    assert range_of(record([[1, 5], [2, 3]], False), "minmax", [[0, 1]], 0) == (0, 5)
    assert range_of(record([[-1, -5]], False), "minmax", [[0]], 0) == (-5, 0)


def test_running_is_a_mean_over_batches_that_begins_with_the_first():
    made = record([[-1, 10], [-2, 20], [-8, 5]], False)
    low, high = range_of(made, "running", [[0, 1], [2, 0], [1, 2]], 0)
    assert low == pytest.approx(0.9 * (0.9 * -2 + 0.1 * -8) + 0.1 * -8)
    assert high == pytest.approx(0.9 * (0.9 * 20 + 0.1 * 10) + 0.1 * 20)


@pytest.mark.parametrize("value", [1, -1, 0.37, -600, 1e-30, 3e38, 0.0])
def test_bins_are_within_a_256th_of_their_values(value):
    [middle], [count] = ranges.values_of(ranges.bin_counts(np.full(3, value, np.float32)))
    assert count == 3 and middle == pytest.approx(value, rel=1 / 250, abs=1e-38)


def test_bins_count_every_value_in_ascending_order(monkeypatch):
    monkeypatch.setattr(ranges, "AT_ONCE", 1000)
    x = normal()
    values, counts = ranges.values_of(ranges.bin_counts(x))
    assert counts.sum() == x.size and (np.diff(values) > 0).all()
    assert counts[values > 1].sum() == pytest.approx((x > 1).sum(), abs=60)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentiles_are_those_of_the_values(percentile):
    x = normal()
    low, high = range_of(record([x]), "percentile", [[0]], percentile)
    assert low == pytest.approx(np.percentile(x, 100 - percentile), rel=0.02)
    assert high == pytest.approx(np.percentile(x, percentile), rel=0.02)


def test_a_percentile_is_within_the_smallest_and_the_largest_value():
    low, high = range_of(record([[-1.0001, 3.0117]]), "percentile", [[0]], 100)
    assert -np.float32(1.0001) == low and 3 <= high <= np.float32(3.0117)
    assert range_of(record([[5, 6, 7, 8]]), "percentile", [[0]], 99)[0] == 0


def test_a_window_counts_as_often_as_it_is_used():
    zeros, ones = np.zeros(900), np.ones(100)
    assert range_of(record([zeros, ones], times=[1, 1]), "percentile", [[0, 1]], 95)[1] == pytest.approx(1, rel=0.01)
    assert range_of(record([zeros, ones], times=[9, 1]), "percentile", [[0, 1]], 95)[1] == pytest.approx(0, abs=1e-6)


def rounding_error(x, low, high):
    scale, zero_point = graph.grid(low, high)
    q = np.clip(np.rint(x / scale) + zero_point, -128, 127)
    return float(np.square(x - scale * (q - zero_point), dtype=np.float64).mean())


def test_mse_cuts_outliers_off_where_that_lessens_the_error():
    x = normal(200_000)
    x[7, 1] = 300
    made = record([x])
    low, high = range_of(made, "mse", [[0]], 0)
    assert high < 250 and rounding_error(x, low, high) < 0.8 * rounding_error(x, *range_of(made, "minmax", [[0]], 0))
    for other in ((low, 1.1 * high), (0.8 * low, high), (low, 0.9 * high)):
        assert rounding_error(x, low, high) <= rounding_error(x, *other) * 1.01


def test_mse_keeps_a_range_that_needs_no_cut_and_one_sided_ranges():
    x = np.random.default_rng(0).uniform(0, 4, (5000, 2)).astype(np.float32)
    low, high = range_of(record([x]), "mse", [[0]], 0)
    assert low == 0 and high == pytest.approx(4, rel=0.01)
    assert range_of(record([np.zeros(4)]), "mse", [[0]], 0) == (0, 0)
