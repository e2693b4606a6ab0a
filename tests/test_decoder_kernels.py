"""The decoder's blocks in one call against their operators one by one: equal to the bit on every instruction set."""

import numpy as np
import pytest

from minigate import int8, kernels, model
from minigate.quantize import quantize_dynamic
from tests.toy import toy_model

ODD = dict(n_audio_state=36, n_text_state=36, n_audio_ctx=131, n_text_ctx=9, n_text_layer=3)


def quantized(gate="none", keep_float=(), **dims):
    return quantize_dynamic(*toy_model(gate, **dims), keep_float=keep_float)


def heard(dims, windows, seed=0):
    shape = windows, dims.n_audio_ctx, dims.n_audio_state
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def logits(made, windows=2):
    """Those of an opening, of tokens one by one in groups of rows that are exchanged, and of one window at the end."""
    cache = made.start(heard(made.dims, windows))
    tokens = np.arange(3 * windows).reshape(windows, 3)
    found = [made.decode(tokens, cache, all_positions=True)]
    cache.repeat(2)
    for step in range(3):
        found.append(made.decode(np.arange(2 * windows)[:, None] + 10 * step, cache))
        cache.reorder(np.arange(2 * windows) // 2 * 2)
    cache.keep(np.array([windows - 1]))
    return [*found, made.decode(np.array([[5, 6], [7, 8]]), cache)]


@pytest.mark.parametrize("dims", [{}, ODD])
def test_blocks_are_their_operators(isa, dims, monkeypatch):
    made = model.Model(*quantized(**dims))
    got = logits(made)
    monkeypatch.setattr(int8.Dynamic, "in_one_call", lambda self: None)
    for one, wanted in zip(got, logits(made), strict=True):
        assert np.array_equal(one, wanted)


def test_no_operator_of_a_block_is_called(compiled_isa, monkeypatch):
    made = model.Model(*quantized())
    cache = made.start(heard(made.dims, 1))
    called = []
    linear = int8.Dynamic.linear
    monkeypatch.setattr(int8.Dynamic, "linear", lambda self, name, *rest, **more: called.append(name) or linear(
        self, name, *rest, **more))  # fmt: skip
    made.decode(np.array([[1, 2]]), cache)
    assert called == ["decoder.token_embedding"] and cache.length == 2


def test_threads_change_nothing(compiled_isa):
    made, before = model.Model(*quantized(**ODD)), kernels.threads()
    found = []
    for threads in (1, 3):
        kernels.set_threads(threads)
        found.append(logits(made))
    kernels.set_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("options", [{"gate": "per_head"}, {"keep_float": ("decoder.blocks.1.mlp.2",)}])
def test_what_has_no_such_call_goes_operator_by_operator(options):
    made = model.Model(*quantized(**options))
    cache = made.start(heard(made.dims, 1))
    assert made.ops.in_one_call() is None
    assert np.isfinite(made.decode(np.array([[1, 2]]), cache)).all()


def test_wrong_input_is_named(compiled_isa):
    made = model.Model(*quantized())
    cache, n_state = made.start(heard(made.dims, 2)), made.dims.n_text_state
    for x, error in ((np.zeros((1, 1, n_state), np.float32), ValueError), (np.zeros((2, 1, 8), np.float32), ValueError),
                     (np.zeros((2, 1, n_state)), TypeError)):  # fmt: skip
        with pytest.raises(error, match="x: expected"):
            made.ops.in_one_call()(x, cache)
    cache.length = made.dims.n_text_ctx
    with pytest.raises(ValueError, match="status 2"):
        made.ops.in_one_call()(np.zeros((2, 1, n_state), np.float32), cache)
