"""The choice among logits: every instruction set against NumPy, and its limits."""

import numpy as np
import pytest

from minigate import kernels, reference
from minigate.choice_kernels import choose

V, BEGIN = 5003, 4001  # not multiples of anything


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def ranges(*rows):
    return np.array(rows, np.int64)


CASES = [  # first, end, middle, last
    (0, BEGIN, BEGIN, V), (0, BEGIN, V, V), (0, 0, BEGIN, BEGIN + 51), (3999, BEGIN, 4500, V), (7, 8, 4444, 4445),
    (0, 0, V, V), (0, BEGIN, 4003, 4100),
]  # fmt: skip


@pytest.mark.parametrize("prefer", [False, True])
@pytest.mark.parametrize("k", [1, 6])
def test_choice_is_that_of_the_reference(isa, prefer, k, rng):
    for scale in (1, 8, 300):
        logits = (scale * rng.standard_normal((len(CASES), V))).astype(np.float32)
        logits[:, BEGIN:] += scale * rng.choice([-3, 0, 3])
        logits[:, [40, 1033, 4800]] = logits.max(axis=1, keepdims=True)  # equals
        never, wanted = np.sort(rng.choice(V, 90, replace=False)), logits.copy()
        ids, values, totals = reference.choose(wanted, never, ranges(*CASES), BEGIN, prefer, k)
        got = choose(logits, never, ranges(*CASES), BEGIN, prefer, k)
        assert np.array_equal(logits, wanted)
        assert np.array_equal(got.values, values)
        possible = np.isfinite(values)
        assert np.array_equal(got.ids[possible], ids[possible]) and possible[:5].any(axis=1).all()
        np.testing.assert_allclose(got.totals[possible[:, 0]], totals[possible[:, 0]], rtol=1e-6)
        x = logits[possible[:, 0]].astype(float)
        log_softmax = values[possible[:, 0]] - x.max(1, keepdims=True) - np.log(
            np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))  # fmt: skip
        np.testing.assert_allclose(got.logprobs(values)[possible[:, 0]], log_softmax, atol=1e-4, rtol=1e-6)


def test_together_likelier_than_the_likeliest(isa):
    for text, chosen in ((2.0, BEGIN), (np.log(1000) + 1e-3, 17)):  # n ids of 0 together have log(n)
        logits = np.zeros((1, V), np.float32)
        logits[0, :BEGIN], logits[0, 17] = -5, text
        for count, wanted in ((V - BEGIN, BEGIN), (1000, chosen)):
            x = logits.copy()
            got = choose(x, np.array([], np.int64), ranges((0, BEGIN, BEGIN, BEGIN + count)), BEGIN, True)
            assert got.ids[0, 0] == wanted and np.isneginf(x[0, 17]) == (wanted == BEGIN)


def test_without_anything_allowed(isa):
    got = choose(np.zeros((1, 9), np.float32), np.arange(9), ranges((0, 5, 5, 9)), 5, True, 2)
    assert np.isneginf(got.values).all() and np.isnan(got.logprobs(got.values)).all()


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 1024, 1025])
def test_small_vocabularies_and_all_candidates(isa, n, rng):
    for begin in (0, n // 2, n):
        x, k = rng.standard_normal((2, n)).astype(np.float32), min(n, 20)
        wanted, every = x.copy(), ranges((0, begin, begin, n)).repeat(2, 0)
        never = np.arange(n // 3)
        ids, values, totals = reference.choose(wanted, never, every, begin, False, k)
        got = choose(x, never, every, begin, False, k)
        assert np.array_equal(x, wanted) and np.array_equal(got.values, values)
        assert np.array_equal(got.ids[np.isfinite(values)], ids[np.isfinite(values)])
        np.testing.assert_allclose(got.totals, totals, rtol=1e-6)
    assert choose(x[:0], never, every[:0], n, False).ids.shape == (0, 1)


def test_what_is_no_number_makes_the_sum_none(isa):
    for at in (0, 20):
        x = np.zeros((2, 21), np.float32)
        x[0, at] = np.nan
        totals = choose(x, np.array([], np.int64), ranges((0, 21, 21, 21)).repeat(2, 0), 21, True).totals
        assert np.isnan(totals[0]) and totals[1] == pytest.approx(21)


BAD = [  # never, ranges of two rows, candidates
    ([9], [(0, 5, 5, 9)] * 2, 1, "never: expected 0 to 8, got 9 to 9"),
    ([-1, 3], [(0, 5, 5, 9)] * 2, 1, "never: expected 0 to 8, got -1 to 3"),
    ([1], [(0, 6, 5, 9), (0, 5, 5, 9)], 1, "ranges: expected 0 <= first <= end <= 5 <= first <= end <= 9"),
    ([1], [(0, 5, 5, 9), (0, 5, 4, 9)], 1, "ranges: expected"), ([1], [(0, 5, 5, 9), (0, 5, 5, 10)], 1, "ranges: exp"),
    ([1], [(3, 2, 5, 9), (0, 5, 5, 9)], 1, "ranges: expected"), ([1], [(0, 5, 5, 9), (-1, 5, 5, 9)], 1, "ranges: exp"),
    ([1], [(0, 5, 5, 9)], 1, r"ranges: expected shape \(2, 4\), got \(1, 4\)"),
    ([1], [(0, 5, 5, 9)] * 2, 10, "k: expected 1 to 9, got 10"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_values(isa, case):
    never, rows, k, message = case
    with pytest.raises(ValueError, match=message):
        choose(np.zeros((2, 9), np.float32), np.array(never), ranges(*rows), 5, True, k)


@pytest.mark.parametrize("constant", [False, True])
def test_logits_that_could_not_be_changed_in_place(isa, constant):
    logits = np.zeros((2, 9), np.float32) if constant else np.zeros((9, 2), np.float32).T
    logits.flags.writeable = not constant
    with pytest.raises(ValueError, match="logits: expected a C-ordered array that may be changed in place"):
        choose(logits, np.array([1]), ranges((0, 5, 5, 9)).repeat(2, 0), 5, True)
    assert not logits.any()


@pytest.mark.skipif(not kernels.compiled, reason="no C extension")
def test_the_extension_rejects_them_too():
    ffi, lib, x = kernels.ffi, kernels.lib, np.zeros((2, 9), np.float32)

    def ints(values):
        return ffi.from_buffer("int64_t[]", np.array(values, np.int64))

    for never, rows, k, _ in BAD[:-2]:
        out = ints([0] * 20), ffi.from_buffer("float[]", np.zeros(20, np.float32)), ffi.new("double[]", 2)
        status = lib.mg_choose(*out, ffi.from_buffer("float[]", x), ints(never), ints(rows), len(never), 5, 1, k, 2, 9)
        assert status == lib.MG_BAD_VALUE and not x.any()


def test_result_does_not_depend_on_threads(compiled_isa, rng):
    x, found = rng.standard_normal((9, V)).astype(np.float32), []
    for n in (1, 4):
        kernels.set_threads(n)
        every = ranges((0, BEGIN, BEGIN, V)).repeat(9, 0)
        found.append(choose(x.copy(), np.arange(5), every, BEGIN, True))
    kernels.set_threads(1)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
