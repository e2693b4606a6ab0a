"""Gates in C against the formula in float64."""

import numpy as np
import pytest

from minigate import attention, kernels
from minigate.gate_kernels import gate


@pytest.mark.parametrize("kind", attention.GATE_KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 40, 64)])
def test_gate_is_that_of_attention(isa, kind, shape):
    (batch, t, d), n_head, rng = shape, 3, np.random.default_rng(1)
    shapes = attention.gate_shapes(kind, n_head * d, n_head)
    p = {name: rng.standard_normal(size).astype(np.float32) for name, size in shapes.items()}
    h = rng.standard_normal((batch, t, n_head * d)).astype(np.float32)
    got = gate(kind, h, p, n_head, 2.5)
    if kind == "none":
        assert got is None
        return
    wanted = attention.gate(kind, h.astype(float), {name: x.astype(float) for name, x in p.items()}, n_head, 2.5)
    assert got.dtype == np.float32 and got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6)
    assert gate(kind, h.astype(float), p, n_head, 2.5).dtype == np.float64


def test_gate_does_not_overflow(isa):
    p = {"weight": np.zeros((4, 8), np.float32), "bias": np.array([-1e4, -200, 200, 1e4], np.float32)}
    assert gate("all_heads", np.zeros((1, 2, 8), np.float32), p, 4, 1.0)[0, 1].tolist() == [0, 0, 1, 1]


def test_threads_change_nothing(compiled_isa):
    rng, found = np.random.default_rng(0), []
    p = {"weight": rng.standard_normal((2, 4)).astype(np.float32), "bias": np.zeros(2, np.float32)}
    h = rng.standard_normal((2, 100, 8)).astype(np.float32)
    for threads in (1, 3):
        kernels.set_threads(threads)
        found.append(gate("per_head", h, p, 2, 1.0))
    assert np.array_equal(*found)


def test_wrong_parameters_are_named(compiled_isa):
    h, p = np.zeros((1, 2, 8), np.float32), {"weight": np.zeros((2, 4), np.float32), "bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"bias: expected shape \(2\), got \(3,\)"):
        gate("per_head", h, p, 2, 1.0)
    with pytest.raises(ValueError, match="gate: expected one of"):
        gate("per_hat", h, p, 2, 1.0)


@pytest.mark.skipif(not kernels.compiled, reason="no C extension")
def test_the_extension_rejects_other_kinds():
    null, x = kernels.ffi.NULL, kernels.ffi.new("float[8]")
    for kind in (kernels.lib.MG_NO_GATE, 4):
        struct = kernels.ffi.new("struct mg_gate *", (kind, 0, 1.0, null, null, null, null))
        assert kernels.lib.mg_gate(x, struct, x, 1, 1, 1) == kernels.lib.MG_BAD_VALUE
