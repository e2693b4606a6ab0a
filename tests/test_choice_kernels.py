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


X = np.zeros((2, 9), np.float32)
BAD = [
    (lambda: choose(X, np.array([9]), ranges((0, 5, 5, 9)).repeat(2, 0), 5, True), "rejects a value"),
    (lambda: choose(X, np.array([-1]), ranges((0, 5, 5, 9)).repeat(2, 0), 5, True), "rejects a value"),
    (lambda: choose(X, np.array([1]), ranges((0, 6, 5, 9), (0, 5, 5, 9)), 5, True), "rejects a value"),
    (lambda: choose(X, np.array([1]), ranges((0, 5, 5, 9), (0, 5, 4, 9)), 5, True), "rejects a value"),
    (lambda: choose(X, np.array([1]), ranges((0, 5, 5, 9), (0, 5, 5, 10)), 5, True), "rejects a value"),
    (lambda: choose(X, np.array([1]), ranges((3, 2, 5, 9), (0, 5, 5, 9)), 5, True), "rejects a value"),
    (lambda: choose(X, np.array([1]), ranges((0, 5, 5, 9)), 5, True), r"ranges: expected shape \(2, 4\), got \(1, 4\)"),
    (lambda: choose(X, np.array([1]), ranges((0, 5, 5, 9)).repeat(2, 0), 5, True, 10), "k: expected 1 to 9, got 10"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_values(compiled_isa, case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_result_does_not_depend_on_threads(compiled_isa, rng):
    x, found = rng.standard_normal((9, V)).astype(np.float32), []
    for n in (1, 4):
        kernels.set_threads(n)
        every = ranges((0, BEGIN, BEGIN, V)).repeat(9, 0)
        found.append(choose(x.copy(), np.arange(5), every, BEGIN, True))
    kernels.set_threads(1)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
