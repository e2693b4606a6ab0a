"""The operators on int8 weights against the formula of their scheme in NumPy: per channel, per tensor, and with layers
kept in float."""

import numpy as np
import pytest
from scipy.special import ndtr

from minigate import int8, model, ops
from minigate.int8weights import dequantize, quantize_weight
from minigate.quantize import quantize_dynamic
from tests.toy import DIMS, toy_model

RTOL = 2e-6  # float32 rounding of scale * integer
D = DIMS["n_audio_state"]
LINEAR, CONV, EMBEDDING = "encoder.blocks.0.mlp.0", "encoder.conv2", "decoder.token_embedding"
OUT = "encoder.blocks.0.attn.out"


def quantized(weights, keep_float=()):
    """Metadata and tensors of a toy model, per channel or per tensor, some layers left in float."""
    metadata, tensors = toy_model()
    new_metadata, new = quantize_dynamic(metadata, tensors)
    for name in [n for n in new if n.endswith(".scale")]:
        layer = name.removesuffix(".scale")
        if layer in keep_float:
            del new[name]
            new[f"{layer}.weight"] = tensors[f"{layer}.weight"]
        elif weights == "per-tensor":
            new[f"{layer}.weight"], new[name] = quantize_weight(tensors[f"{layer}.weight"], per_channel=False)
    return new_metadata, new, int8.Dynamic(new_metadata, new)


def rounded(x):
    """x (…, K), each row rounded to 127 steps either way of its largest magnitude."""
    step = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / step) * step


def weight(tensors, layer):
    """The layer's weights in float64 as the file says: scale * q."""
    w = tensors[f"{layer}.weight"].astype(np.float64)
    scale = np.float64(tensors[f"{layer}.scale"])
    return w * scale.reshape(scale.shape + (1,) * (w.ndim - 1 if scale.ndim else 0))


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=RTOL * np.abs(expected).max())


def activation(seed=0, shape=(2, 5, D)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
def test_linear_is_its_formula(weights):
    _, tensors, dynamic = quantized(weights)
    x, residual = activation(), activation(1, (2, 5, 4 * D))
    y = rounded(x.astype(np.float64)) @ weight(tensors, LINEAR).T + tensors[f"{LINEAR}.bias"]
    close(dynamic.linear(OUT, x), rounded(x.astype(np.float64)) @ weight(tensors, OUT).T + tensors[f"{OUT}.bias"])
    for form in (x, dynamic.rows(x)):
        close(dynamic.linear(LINEAR, form, residual=residual), y + residual)
        got = dynamic.linear(LINEAR, form, gelu=True)  # rows in int8 for the MLP's second linear
        assert got.x is None
        scale, wanted = got.scale.reshape(2, 5, 1), y * ndtr(y)
        close(scale, np.abs(wanted).max(-1, keepdims=True) / 127)
        assert (np.abs(got.q * scale - wanted) <= 0.501 * scale).all()


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
def test_conv_is_its_formula(weights):
    _, tensors, dynamic = quantized(weights)
    x = activation(shape=(2, 7, D))
    rows = rounded(ops.conv_rows(x.astype(np.float64), 2))
    y = rows @ ops.conv_matrix(weight(tensors, CONV)).T + tensors[f"{CONV}.bias"]
    close(dynamic.conv(CONV, x, 2), y * ndtr(y))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frames", [1000, 1001])
@pytest.mark.parametrize("still", [0, 1, 2, 37, 38, 700])
def test_frames_that_repeat_are_computed_once_and_the_same(isa, still, frames, stride, monkeypatch):
    _, _, dynamic = quantized("per-channel")
    x = activation(shape=(2, frames, D))
    x[:, still:] = x[:, -1:]
    with monkeypatch.context() as patch:
        patch.setattr(int8.Dynamic, "repeated", ops.Float.repeated)
        wanted, rows = dynamic.conv(CONV, x, stride), []
    linear = int8.Dynamic.linear
    monkeypatch.setattr(int8.Dynamic, "linear", lambda self, name, x, *rest, **more: rows.append(x.shape[1]) or linear(
        self, name, x, *rest, **more))  # fmt: skip
    np.testing.assert_array_equal(dynamic.conv(CONV, x, stride), wanted)
    assert sum(rows) <= min(still / stride + 4 + int8.STEM_STEP, frames)


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
def test_embedding_and_logits_share_a_table(weights):
    _, tensors, dynamic = quantized(weights)
    table, tokens = weight(tensors, EMBEDDING), np.array([[0, 7, 299]])
    positions = tensors["decoder.positional_embedding"][4:7].astype(np.float64)
    close(dynamic.embed(tokens, 4), table[tokens] + positions)
    x = activation()
    close(dynamic.logits(x), rounded(x.astype(np.float64)) @ table.T)


@pytest.mark.parametrize("layer", [LINEAR, CONV, EMBEDDING])
def test_a_layer_kept_in_float_computes_as_float(layer):
    metadata, tensors, dynamic = quantized("per-channel", {layer})
    plain = ops.Float({**metadata, "quantization": None}, dict(toy_model()[1]))
    x = activation()
    if layer == CONV:
        np.testing.assert_array_equal(dynamic.conv(layer, x, 2), plain.conv(layer, x, 2))
    elif layer == EMBEDDING:
        np.testing.assert_array_equal(dynamic.embed(np.array([[3, 5]]), 0), plain.embed(np.array([[3, 5]]), 0))
        np.testing.assert_array_equal(dynamic.logits(x), plain.logits(x))
    else:
        np.testing.assert_array_equal(dynamic.linear(layer, dynamic.rows(x)), plain.linear(layer, x))


def test_an_mlp_whose_second_linear_is_float_has_floats_between():
    _, _, dynamic = quantized("per-channel", {LINEAR.removesuffix("0") + "2"})
    assert isinstance(dynamic.linear(LINEAR, activation(), gelu=True), np.ndarray)


# --- w8 ---


@pytest.fixture
def weight_only(isa):
    metadata, tensors, _ = quantized("per-channel")
    return int8.WeightOnly(metadata, tensors), ops.Float(*dequantize(metadata, tensors))


@pytest.mark.parametrize("tile", [1, 100, int8.TILE])
def test_w8_is_float_with_the_same_weights(weight_only, monkeypatch, tile):
    monkeypatch.setattr(int8, "TILE", tile)
    operators, plain = weight_only
    x, residual = activation(), activation(1, (2, 5, 4 * D))
    for gelu, added in ((False, None), (True, residual)):
        close(operators.linear(LINEAR, x, gelu, added), plain.linear(LINEAR, x, gelu, added))
    close(operators.conv(CONV, x, 2), plain.conv(CONV, x, 2))
    close(operators.logits(x), plain.logits(x))
    tokens = np.array([[0, 7, 299]])
    np.testing.assert_array_equal(operators.embed(tokens, 4), plain.embed(tokens, 4))


def test_w8_expands_a_tile_at_a_time(monkeypatch):
    metadata, tensors, _ = quantized("per-channel")
    operators, expanded = int8.WeightOnly(metadata, tensors), []
    monkeypatch.setattr(int8, "TILE", 10 * D)
    monkeypatch.setattr(int8.static_kernels, "expand", lambda q, scale: expanded.append(q.size) or q * scale[:, None])
    operators.logits(activation())
    assert len(expanded) == 30 and max(expanded) == 10 * D
    assert all(isinstance(w.q, np.ndarray) for w in operators.p.values() if isinstance(w, int8.Weight))


def test_w8_keeps_layers_in_float():
    metadata, tensors, _ = quantized("per-channel", {LINEAR})
    x = activation()
    plain = ops.Float({**metadata, "quantization": None}, dict(toy_model()[1]))
    np.testing.assert_array_equal(int8.WeightOnly(metadata, tensors).linear(LINEAR, x), plain.linear(LINEAR, x))


@pytest.mark.parametrize(("scheme", "operators"), [("w8a8-dynamic", int8.Dynamic), ("w8", int8.WeightOnly)])
def test_the_scheme_chooses_the_operators(scheme, operators):
    metadata, tensors, _ = quantized("per-channel")
    metadata["quantization"]["scheme"] = scheme
    assert type(model.Model(metadata, tensors).ops) is operators
