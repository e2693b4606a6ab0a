"""bfloat16 outside training: rounding, linears that end in it, and attention with keys and values, or all, in it."""

import math

import numpy as np
import pytest

from minigate import kernels, packing, reference
from minigate import training_kernels as tk
from tests.kernelcases import ATTENTION_ERROR, close, exact_attention, floats, int8s, weights
from tests.test_csrc import at_page_end, guarded, pointer, unharmed

FORMS = ("float", "half")  # of keys and values
PROBABILITY_ERROR = 2**-8  # of a value, whose weights are rounded to 8 bits beside a sum that is not


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def narrow(x):
    """The nearest bfloat16, as float32."""
    return reference.from_bf16(reference.to_bf16(x))


def test_rounding_to_bf16():
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2**-126 * 1.5], np.float32)
    assert narrow(ties).tolist() == [1, 1 + 2**-6, -1, 2**-126 * 1.5]
    assert narrow(np.array([np.inf, -np.inf, 0.0, 3.4e38], np.float32)).tolist() == [np.inf, -np.inf, 0, np.inf]
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(narrow(nan)).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 130, 64), (49, 65, 30)])
def test_linear_int8_ends_in_bf16(isa, shape, rng):
    m, n, k = shape
    q, w = int8s(rng, "random", m, k), packing.pack_int8(weights(rng, "random", n, k))
    others = abs(floats(rng, m)), w, floats(rng, n), floats(rng, n), True, floats(rng, m, n)
    got = kernels.linear_int8(q, *others, bf16=True)
    assert got.dtype == np.uint16
    assert np.array_equal(got, reference.to_bf16(kernels.linear_int8(q, *others)))


@pytest.mark.parametrize("t_q", [1, 3, 8, 20])
@pytest.mark.parametrize("t_k", [1, 31, 300])
def test_attention_to_keys_and_values_in_bf16(isa, t_q, t_k, rng):
    for d in (1, 17, 64, 80):
        q, kv = floats(rng, 4, t_q, 2 * d), reference.to_bf16(floats(rng, 2, t_k, 4 * d))
        k, v = kv[..., : 2 * d], kv[..., 2 * d :]  # views, two rows to each
        wanted = exact_attention(q, reference.from_bf16(k), reference.from_bf16(v), 2, False, None)
        close(kernels.attention(q, k, v, 2), wanted, ATTENTION_ERROR)


def test_attention_rejects_half_of_bf16(isa):
    q, k = np.ones((1, 2, 4), np.float32), np.ones((1, 2, 4), np.uint16)
    with pytest.raises(TypeError, match="v: expected an array of uint16, got float32"):
        kernels.attention(q, k, q, 1)
    with pytest.raises(TypeError, match="k: expected an array of float64, got uint16"):
        kernels.attention(q.astype(float), k, k, 1)


CASES = [  # queries, keys, head size, causal, gate
    (9, 1, 1, False, None), (17, 130, 64, False, "head"), (50, 67, 17, True, "element"), (193, 300, 8, True, None),
    (400, 257, 80, False, "element"), (10, 129, 450, False, "head"), (9, 30, 800, False, None),
]  # fmt: skip


@pytest.mark.skipif(not tk.has_bf16(), reason="cpu lacks avx512_bf16")
@pytest.mark.parametrize("case", CASES)
def test_attention_of_many_queries_in_bf16(case, rng):
    t_q, t_k, d, causal, gate = case
    t_k = max(t_q, t_k) if causal else t_k
    q, k, v = floats(rng, 2, t_q, 2 * d), floats(rng, 2, t_k, 2 * d), floats(rng, 2, t_k, 2 * d)
    g = {None: None, "head": floats(rng, 2, t_q, 2), "element": floats(rng, 2, t_q, 2 * d)}[gate]
    unit = np.float32(math.log2(math.e) / math.sqrt(d))
    wanted = exact_attention(narrow(q * unit) / unit, narrow(k), narrow(v), 2, causal, g)
    got = kernels.attention(q, k, v, 2, causal, g, precision="bf16")
    close(got, wanted, PROBABILITY_ERROR * abs(v).max() * (1 if g is None else abs(g).max()))
    if t_k > 1:
        assert not np.array_equal(got, kernels.attention(q, k, v, 2, causal, g))
        half = kernels.attention(q, *map(reference.to_bf16, (k, v)), 2, causal, g, "bf16")
        assert np.array_equal(half, got)


@pytest.mark.skipif(not tk.has_bf16(), reason="cpu lacks avx512_bf16")
def test_attention_in_bf16_with_large_scores_does_not_overflow(rng):
    q, k, v = floats(rng, 1, 60, 64) * 1000, floats(rng, 1, 200, 64), floats(rng, 1, 200, 64)
    unit = np.float32(math.log2(math.e) / 8)
    wanted = exact_attention(narrow(q * unit) / unit, narrow(k), narrow(v), 1, False, None)
    close(kernels.attention(q, k, v, 1, precision="bf16"), wanted, 0.05)


@pytest.mark.skipif(not tk.has_bf16(), reason="cpu lacks avx512_bf16")
def test_attention_in_bf16_does_not_hide_what_is_not_finite(rng):
    for spoil, value in (("q", np.nan), ("k", np.nan), ("k", np.inf), ("v", np.nan)):
        x = {name: floats(rng, 1, 60, 64) for name in "qkv"}
        x[spoil][0, 7, 3] = value
        wrong = ~np.isfinite(kernels.attention(*x.values(), 1, precision="bf16"))
        float32 = ~np.isfinite(kernels.attention(*x.values(), 1))
        assert wrong.any() and np.array_equal(wrong, float32)


@pytest.mark.parametrize("t_q", [1, 9, 60])
@pytest.mark.parametrize("d", [1, 15, 64])
@pytest.mark.parametrize("form", FORMS)
def test_attention_in_bf16_keeps_to_its_arrays(compiled_isa, t_q, d, form, rng):
    t_k, n_head, lib, keep = 131, 3, kernels.lib, []
    row = n_head * d
    q, gate = (at_page_end(floats(rng, t_q, row), keep) for _ in range(2))
    k, v = (floats(rng, t_k, row) for _ in range(2))
    forms = [pointer(at_page_end(reference.to_bf16(x) if form == "half" else x, keep)) for x in (k, v)]
    room, out = guarded((t_q, row), np.float32)
    status = lib.mg_attention(pointer(out), pointer(q), *forms, FORMS.index(form), pointer(gate), 0, row, 0, row,
                              0, row, d, False, lib.MG_BF16, 1, 1, n_head, t_q, t_k, d)  # fmt: skip
    assert status == lib.MG_OK and unharmed(room)
    close(out, exact_attention(q[None], k[None], v[None], n_head, False, gate[None])[0], 0.06)
