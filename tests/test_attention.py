"""Gates: each kind against its formula in float64, and the identity at the start."""

import numpy as np
import pytest

from minigate import attention

B, T, H, D = 2, 5, 4, 32


def parameters(kind, rng):
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in attention.gate_shapes(kind, D, H).items()}


def expected_logits(kind, h, p):
    """One output at a time, as the definition reads."""
    out = np.zeros((B, T, D if kind == "elementwise" else H))
    for index in np.ndindex(out.shape):
        x, i = h[index[:2]].astype(np.float64), index[2]
        own = x.reshape(H, -1)[i] if kind.startswith("per_head") else x
        if kind == "per_head_mlp":
            hidden = np.maximum(p["0.weight"][i] @ own + p["0.bias"][i], 0)
            out[index] = p["2.weight"][i] @ hidden + p["2.bias"][i]
        else:
            out[index] = p["weight"][i] @ own + p["bias"][i]
    return out


@pytest.mark.parametrize("kind", attention.GATE_KINDS[1:])
def test_gate_is_its_formula(kind):
    rng = np.random.default_rng(0)
    h, p = rng.standard_normal((B, T, D)).astype(np.float32), parameters(kind, rng)
    logits = expected_logits(kind, h, p)
    np.testing.assert_allclose(attention.gate_logits(kind, h, p, H), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(attention.gate(kind, h, p, H, 2.0), 2 / (1 + np.exp(-logits)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("kind", attention.GATE_KINDS[1:])
def test_gate_starts_as_the_identity(kind, init):
    rng = np.random.default_rng(1)
    p = parameters(kind, rng)
    last = "2." if kind == "per_head_mlp" else ""
    p[f"{last}weight"][:] = 0
    p[f"{last}bias"][:] = np.log(init / (1 - init))
    gate = attention.gate(kind, rng.standard_normal((B, T, D)).astype(np.float32), p, H, 1 / init)
    np.testing.assert_allclose(gate, 1, rtol=1e-6)


def test_gate_does_not_overflow():
    p = {"weight": np.zeros((H, D), np.float32), "bias": np.array([-1e4, -100, 100, 1e4], np.float32)}
    with np.errstate(all="raise"):
        gate = attention.gate("all_heads", np.zeros((B, T, D), np.float32), p, H, 1.0)
    np.testing.assert_array_equal(gate[0, 0], [0, 0, 1, 1])


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="gate: expected one of none, per_head.*got 'head'"):
        attention.gate_shapes("head", D, H)
