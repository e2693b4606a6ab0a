"""The NumPy references themselves: float64, the error function, attention in blocks."""

import math

import numpy as np
import pytest
from kernelcases import ATTENTION_ERROR, close, exact_attention, floats

from minigate import kernels, reference

ERF_ERROR = 1e-15


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_float64_stays_float64(rng):
    x, w = rng.standard_normal((2, 3, 8)), rng.standard_normal((5, 8))
    results = [kernels.linear_f32(x, w, w[:, 0], True), kernels.gelu(x), kernels.layer_norm(x, w[0], w[1]),
               kernels.attention(x, x, x, 2, True, x)]
    assert all(y.dtype == np.float64 for y in results)
    assert np.abs(results[3] - exact_attention(x, x, x, 2, True, x)).max() < 1e-14
    assert np.abs(results[0] - reference.gelu(x @ w.T + w[:, 0])).max() < 1e-14


def test_erf():
    x = np.concatenate([np.linspace(-7, 7, 20001), [0.46875, -0.46875, 4, -4, 0, 1e-300, 30, -30]])
    wanted = np.array([math.erf(value) for value in x])
    assert np.abs(reference.erf(x) - wanted).max() <= ERF_ERROR
    assert reference.erf(x.astype(np.float32)).dtype == np.float32
    assert reference.erf(x.reshape(-1, 1)).shape == (x.size, 1)


def test_reference_attention_takes_queries_in_blocks(rng, monkeypatch):
    x = floats(rng, 2, 30, 8)
    monkeypatch.setattr(reference, "QUERIES", 7)
    close(reference.attention(x, x, x, 2, True), exact_attention(x, x, x, 2, True, None), ATTENTION_ERROR)
