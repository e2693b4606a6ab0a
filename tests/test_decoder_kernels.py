"""The decoder's blocks in one call against their operators one by one: equal to the bit on every instruction set."""

import numpy as np
import pytest

from minigate import int8, kernels, model, static
from minigate.attention import GATE_KINDS
from minigate.quantize import quantize_dynamic
from minigate.quantsim import Observed
from tests import test_static
from tests.toy import toy_model

WIDE = dict(n_audio_state=136, n_text_state=136, n_audio_head=2, n_text_head=2, n_audio_ctx=80)  # panels, heads of 68
ODD = dict(n_audio_state=36, n_text_state=36, n_audio_ctx=131, n_text_ctx=9, n_text_layer=3)
SCHEMES = {"w8a8-dynamic": int8.Dynamic, "w8a8-static": static.Static}
HEADS = [kind for kind in GATE_KINDS if kind != "elementwise"]


def quantized(scheme, gate="none", keep_float=(), helpers=None, **dims):
    metadata, tensors = toy_model(gate, **dims)
    if scheme == "w8a8-dynamic":
        return model.Model(*quantize_dynamic(metadata, tensors, keep_float=keep_float))
    observed, plain = Observed(metadata, tensors), model.Model(metadata, tensors)
    plain.ops = observed
    mel = np.random.default_rng(1).standard_normal((1, plain.dims.n_mels, 2 * plain.dims.n_audio_ctx))
    plain.encode(mel.astype(np.float32))
    logits(plain)
    return model.Model(*test_static.static(metadata, tensors, observed, keep_float, helpers=helpers))


def heard(dims, windows):
    shape = windows, dims.n_audio_ctx, dims.n_audio_state
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


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


@pytest.mark.parametrize("helpers", [None, {"error_diffusion": True}])
@pytest.mark.parametrize("dims", [ODD, WIDE])
@pytest.mark.parametrize("gate", HEADS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_are_their_operators(compiled_isa, scheme, gate, dims, helpers, monkeypatch):
    if helpers and scheme == "w8a8-dynamic":
        pytest.skip("error diffusion is of w8a8-static")
    made = quantized(scheme, gate, helpers=helpers, **dims)
    got = logits(made)
    monkeypatch.setattr(SCHEMES[scheme], "in_one_call", lambda self: None)
    for one, wanted in zip(got, logits(made), strict=True):
        assert np.array_equal(one, wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_operator_of_a_block_is_called(compiled_isa, scheme, monkeypatch):
    made = quantized(scheme, "per_head")
    cache, called = made.start(heard(made.dims, 1)), []
    linear = SCHEMES[scheme].linear
    monkeypatch.setattr(SCHEMES[scheme], "linear", lambda self, name, *rest, **more: called.append(name) or linear(
        self, name, *rest, **more))  # fmt: skip
    made.decode(np.array([[1, 2]]), cache)
    assert called == ["decoder.token_embedding"] and cache.length == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_change_nothing(compiled_isa, scheme):
    made, found = quantized(scheme, "all_heads", **ODD), []
    for threads in (1, 3):
        kernels.set_threads(threads)
        found.append(logits(made))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", [{"gate": "elementwise"}, {"keep_float": ("decoder.blocks.1.mlp.2",)},
                                     {"keep_float": ("decoder.blocks.0.attn",)}])  # fmt: skip
def test_what_has_no_such_call_goes_operator_by_operator(scheme, options):
    made = quantized(scheme, **options)
    in_float = options.get("keep_float") == ("decoder.blocks.0.attn",) and scheme == "w8a8-dynamic"  # as it is anyway
    assert (made.ops.in_one_call() is None) != (in_float and kernels.isa() != "numpy")
    assert np.isfinite(made.decode(np.array([[1, 2]]), made.start(heard(made.dims, 1)))).all()


@pytest.mark.parametrize("kept", ["encoder.ln_post", "decoder.token_embedding"])
def test_what_is_in_float_around_the_blocks_leaves_them_in_one_call(compiled_isa, kept):
    assert quantized("w8a8-static", keep_float=(kept,)).ops.in_one_call() is not None


def test_wrong_input_is_named(compiled_isa):
    made = quantized("w8a8-dynamic")
    cache, n_state, run = made.start(heard(made.dims, 2)), made.dims.n_text_state, made.ops.in_one_call()
    for x, error in ((np.zeros((1, 1, n_state), np.float32), ValueError), (np.zeros((2, 1, 8), np.float32), ValueError),
                     (np.zeros((2, 1, n_state)), TypeError)):  # fmt: skip
        with pytest.raises(error, match="x: expected"):
            run(x, cache)
    cache.length = made.dims.n_text_ctx
    with pytest.raises(ValueError, match="status 2"):
        run(np.zeros((2, 1, n_state), np.float32), cache)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("other", [dict(n_text_layer=1), dict(n_text_layer=3), dict(n_text_head=2, n_audio_head=2),
                                   dict(n_audio_state=64, n_text_state=64)])  # fmt: skip
def test_caches_of_other_models_are_rejected(compiled_isa, scheme, other):
    if scheme == "w8a8-static" and "n_text_head" in other:
        pytest.skip("caches of w8a8-static do not know their heads")
    made, stranger = quantized(scheme), quantized(scheme, **other)
    cache = stranger.start(heard(stranger.dims, 1))
    with pytest.raises(ValueError, match="cache: expected|layers|shape"):
        made.decode(np.array([[1]]), cache)
    cache = made.start(heard(made.dims, 1))
    cache.cross = [tuple(np.zeros(x.shape, np.float32) for x in pair) for pair in cache.cross]
    with pytest.raises((ValueError, TypeError), match="cache: expected"):
        made.decode(np.array([[1]]), cache)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_empty_cache_is_rejected(scheme):
    made = quantized(scheme)
    cache = made.start(heard(made.dims, 1))
    made.decode(np.array([[1]]), cache)
    cache.keep(np.array([], int))
    with pytest.raises(ValueError, match="tokens: expected shape"):
        made.decode(np.zeros((0, 1), int), cache)


@pytest.mark.skipif(not kernels.compiled, reason="no C extension")
def test_the_extension_rejects_sizes_that_do_not_fit():
    lib, ffi = kernels.lib, kernels.ffi
    good = dict(m=2, group=1, t=1, length=0, n_ctx=4, t_audio=5, n_head=2, n_state=8, n_hidden=8, eps=1e-5)
    for change in ({"n_head": 0}, {"n_head": 3}, {"group": 0}, {"m": 3, "group": 2}, {"t_audio": 0}, {"t": 5},
                   {"length": 4}, {"length": 5}):  # fmt: skip
        dims = ffi.new("struct mg_decoder_dims *", {**good, **change})
        assert lib.mg_decoder_blocks(ffi.NULL, ffi.NULL, ffi.NULL, 0, dims) == lib.MG_BAD_VALUE
        assert lib.mg_decoder_static(ffi.NULL, ffi.NULL, ffi.NULL, ffi.NULL, 0, 0, dims) == lib.MG_BAD_VALUE
    dims = ffi.new("struct mg_decoder_dims *", good)
    assert lib.mg_decoder_blocks(ffi.NULL, ffi.NULL, ffi.NULL, 0, dims) == lib.MG_OK
