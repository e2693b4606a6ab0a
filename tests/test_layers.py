"""Layers and gated attention: float64 gradients along random directions."""

import numpy as np
import pytest

from minigate import attention, kernels, layers, training_kernels
from tests.gradients import check_gradient

B, T, D, H = 2, 5, 12, 3


def rng():
    return np.random.default_rng(0)


def check_all(forward, backward, arguments, order):
    """forward(*arguments) -> y, cache; backward(dy, cache) -> gradients of arguments[i] for i in order."""
    r = rng()
    y, cache = forward(*arguments)
    dy = r.standard_normal(y.shape)
    kept = [np.copy(a) for a in arguments if isinstance(a, np.ndarray)]
    gradients = backward(dy, cache)
    for before, now in zip(kept, (a for a in arguments if isinstance(a, np.ndarray)), strict=True):
        np.testing.assert_array_equal(before, now)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for i, gradient in zip(order, gradients, strict=True):

        def f(x, i=i):
            return float((dy * forward(*arguments[:i], x, *arguments[i + 1 :])[0]).sum())

        check_gradient(f, arguments[i], gradient, r)


def test_linear():
    r = rng()
    arguments = (r.standard_normal((B, T, D)), r.standard_normal((7, D)), r.standard_normal(7))
    check_all(layers.linear, layers.linear_backward, arguments, (0, 1, 2))


def test_linear_without_bias():
    r = rng()
    y, cache = layers.linear(r.standard_normal((B, T, D)), r.standard_normal((7, D)))
    assert layers.linear_backward(y, cache)[2] is None


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frames", [6, 7])
def test_conv1d(stride, frames):
    r = rng()
    arguments = (r.standard_normal((B, frames, 4)), r.standard_normal((5, 4, 3)), r.standard_normal(5))
    check_all(lambda x, w, b: layers.conv1d(x, w, b, stride), layers.conv1d_backward, arguments, (0, 1, 2))


def test_layer_norm():
    r = rng()
    arguments = (r.standard_normal((B, T, D)) * 3 + 1, r.standard_normal(D), r.standard_normal(D))
    check_all(layers.layer_norm, layers.layer_norm_backward, arguments, (0, 1, 2))


def test_gelu():
    check_all(layers.gelu, layers.gelu_backward, (3 * rng().standard_normal((B, T, D)),), (0,))


def test_embedding_sums_what_a_token_gets_in_several_places():
    tokens = np.array([[0, 2, 2], [3, 0, 0]])
    check_all(
        lambda table: layers.embedding(tokens, table), layers.embedding_backward, (rng().standard_normal((4, D)),), (0,)
    )


@pytest.mark.parametrize("kind", attention.GATE_KINDS)
@pytest.mark.parametrize("causal, t_q, t_k", [(False, 150, 131), (True, 140, 140), (True, 3, 5)])
def test_gated_attention(kind, causal, t_q, t_k):
    r = rng()
    q, h = r.standard_normal((2, B, t_q, D))
    k, v = r.standard_normal((2, B, t_k, D))
    names = sorted(attention.gate_shapes(kind, D, H))
    values = [r.standard_normal(attention.gate_shapes(kind, D, H)[n]) for n in names]

    def forward(q, k, v, h, *values):
        return attention.gated_attention(q, k, v, h, kind, dict(zip(names, values, strict=True)), H, 2.0, causal)

    def backward(dout, cache):
        dq, dk, dv, dh, dp = attention.gated_attention_backward(dout, cache)
        assert sorted(dp) == names and (dh is None) == (kind == "none")
        return (dq, dk, dv) + (() if dh is None else (dh,)) + tuple(dp[n] for n in names)

    order = (0, 1, 2) if kind == "none" else tuple(range(4 + len(names)))
    check_all(forward, backward, (q, k, v, h, *values), order)


def test_bf16_products_round_to_the_nearest():
    x, w = rng().standard_normal((2, 6, 6)).astype(np.float32)
    exact, rounded = layers.linear(x, w)[0], layers.linear(x, w, bf16=True)[0]
    assert np.array_equal(exact, rounded) == (kernels.isa() != "numpy" and not training_kernels.has_bf16())
    np.testing.assert_allclose(rounded, exact, atol=6 * 2**-8 * np.abs(x).max() * np.abs(w).max())
