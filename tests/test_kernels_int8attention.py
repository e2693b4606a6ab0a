"""Attention in int8 with scales found on the way: against the same steps in NumPy, and its formula."""

import math

import numpy as np
import pytest

from minigate import kernels, reference
from tests.kernelcases import close, exact_attention, floats
from tests.test_csrc import at_page_end, guarded, pointer, unharmed

BLOCK = 256  # keys that share a scale of their probabilities, MG_WEIGHED
SAME = 2e-3  # of the result's root mean square; a few numbers fall to the other side of a tie
ROUNDING = 3e-2  # the same, of rounding to 8 bits


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def rounded(x, axis):
    """x to the nearest of 127 steps along an axis, as float64."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale


def in_steps(q, k, v, causal):
    """One head, (Tq, d), (Tk, d) -> the result (Tq, d)."""
    (t_q, d), t_k = q.shape, len(k)
    scores = rounded(q, 1) @ rounded(k - k.mean(axis=0), 1).T / math.sqrt(d)
    if causal:
        scores[np.arange(t_k) > np.arange(t_q)[:, None] + t_k - t_q] = -np.inf
    top, total, out = scores.max(axis=1, keepdims=True), 0, 0
    for at in range(0, t_k, BLOCK):
        block, values = scores[:, at : at + BLOCK], rounded(v[at : at + BLOCK], 0)
        own = np.where(np.isneginf(block).all(axis=1), 0, block.max(axis=1))[:, None]
        p, weight = np.exp(block - own), np.exp(own - top)
        total += weight * p.sum(axis=1, keepdims=True)
        out += weight * (np.rint(255 * p) / 255) @ values
    return out / total


def wanted(q, k, v, n_head, causal, gate):
    """All heads and batches."""
    n_batch, t_q, n_state = q.shape
    out = np.zeros((n_batch, t_q, n_head, n_state // n_head))
    for b in range(n_batch):
        for h, part in enumerate(np.split(np.arange(n_state), n_head)):
            shared = b // (n_batch // len(k))
            out[b, :, h] = in_steps(q[b][:, part], k[shared][:, part], v[shared][:, part], causal)
    if gate is not None:
        out *= gate.reshape(n_batch, t_q, n_head, -1)
    return out.reshape(q.shape)


def rms(x):
    return math.sqrt(np.square(x, dtype=float).mean())


CASES = [  # queries, keys, head size, causal, gate, rows to a window
    (1, 300, 64, False, "head", 2), (3, 5, 2, True, None, 1), (9, 1, 1, False, None, 1),
    (17, 130, 64, False, "head", 1), (50, 67, 17, True, "element", 1),
    (193, 600, 8, True, None, 1), (100, 257, 80, False, "element", 2), (10, 512, 130, False, "head", 2),
    (60, 300, 64, True, "head", 2), (7, 20, 2600, False, None, 1),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_attention_in_int8_is_its_steps(isa, case, rng):
    t_q, t_k, d, causal, gate, group = case
    t_k = max(t_q, t_k) if causal else t_k
    q, k, v = floats(rng, 2, t_q, 2 * d) * 2, floats(rng, 2 // group, t_k, 2 * d), floats(rng, 2 // group, t_k, 2 * d)
    g = {None: None, "head": floats(rng, 2, t_q, 2), "element": floats(rng, 2, t_q, 2 * d)}[gate]
    k += 3 * floats(rng, 2 * d)  # a mean, as keys have it
    got = kernels.attention(q, k, v, 2, causal, g, "int8")
    result, exact = wanted(q, k, v, 2, causal, g), exact_attention(q, k, v, 2, causal, g)
    assert got.dtype == np.float32 and got.shape == q.shape
    assert rms(got - result) <= SAME * rms(exact)
    assert rms(result - exact) <= ROUNDING * rms(exact)
    rows = kernels.attention(*(np.concatenate([x, x], axis=2)[..., : 2 * d] for x in (q, k, v)), 2, causal, g, "int8")
    assert np.array_equal(rows, got)  # views


@pytest.mark.parametrize("t_k", [31, 300])
def test_attention_in_int8_of_keys_and_values_in_bf16(isa, t_k, rng):
    q, k, v = floats(rng, 1, 20, 48), *(reference.to_bf16(floats(rng, 1, t_k, 48)) for _ in range(2))
    wide = [reference.from_bf16(x) for x in (k, v)]
    assert np.array_equal(kernels.attention(q, k, v, 3, precision="int8"), kernels.attention(q, *wide, 3, False, None,
                                                                                             "int8"))  # fmt: skip


def test_attention_in_int8_with_large_scores_does_not_overflow(isa, rng):
    q, k, v = floats(rng, 1, 60, 64) * 1e4, floats(rng, 1, 600, 64), floats(rng, 1, 600, 64)
    got = kernels.attention(q, k, v, 1, precision="int8")
    assert np.isfinite(got).all() and (np.abs(got - exact_attention(q, k, v, 1, False, None)) < 0.03).mean() > 0.9


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_attention_in_int8_with_large_scores_weighs_as_it_sums(isa, rng, size):
    q, k = floats(rng, 1, 60, 64) * size, floats(rng, 1, 600, 64)
    got = kernels.attention(q, k, np.ones_like(k), 1, precision="int8")
    assert np.abs(got - 1).max() < 1e-3


def test_attention_in_int8_of_zeros(isa):
    x = np.zeros((1, 300, 64), np.float32)
    assert not kernels.attention(x, x, x, 1, precision="int8").any()
    assert np.allclose(kernels.attention(x, x, x + 1, 1, precision="int8"), 1, atol=5e-4)


@pytest.mark.parametrize("t_q", [1, 9, 60])
@pytest.mark.parametrize("d", [1, 15, 64])
@pytest.mark.parametrize("half", [0, 1])
def test_attention_in_int8_keeps_to_its_arrays(compiled_isa, t_q, d, half, rng):
    t_k, n_head, lib, keep = 261, 3, kernels.lib, []
    row = n_head * d
    q, gate = (at_page_end(floats(rng, t_q, row), keep) for _ in range(2))
    k, v = (floats(rng, t_k, row) for _ in range(2))
    forms = [at_page_end(reference.to_bf16(x) if half else x, keep) for x in (k, v)]
    room, out = guarded((t_q, row), np.float32)
    status = lib.mg_attention(pointer(out), pointer(q), *map(pointer, forms), half, pointer(gate), 0, row, 0, row,
                              0, row, d, False, lib.MG_INT8, 1, 1, n_head, t_q, t_k, d)  # fmt: skip
    assert status == lib.MG_OK and unharmed(room)
    close(out, exact_attention(q[None], k[None], v[None], n_head, False, gate[None])[0], 0.1)
