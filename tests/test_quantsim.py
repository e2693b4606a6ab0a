"""The points of the network in float32: where they lie, that watching changes nothing, and what rounding does."""

import numpy as np
import pytest

from minigate import checkpoint, graph, model, ops, quantsim
from minigate.attention import GATE_KINDS
from minigate.int8weights import dequantize, quantize_weight, quantize_weights
from tests.toy import DIMS, toy_model

KINDS = ["none", "per_head", "elementwise"]


def forward(operators, seed=0, dims=DIMS):
    """-> xa, logits of a batch of two windows."""
    rng = np.random.default_rng(seed)
    d = model.Dims(**dims)
    mel = rng.standard_normal((2, d.n_mels, 2 * d.n_audio_ctx)).astype(np.float32)
    tokens = rng.integers(0, d.n_vocab, (2, 7))
    xa = model.encoder(operators, d, mel)
    cache = model.Cache(model.cross_keys_values(operators, d, xa), d.n_text_ctx)
    hidden = [model.decoder(operators, d, part, cache) for part in (tokens[:, :4], tokens[:, 4:])]
    return xa, np.concatenate([operators.logits(operators.norm("decoder.ln", x)) for x in hidden], axis=1)


class Listed(quantsim.Pointed):
    """Remembers what passes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.points, self.read_by = {}, {}

    def point(self, name, x):
        self.points.setdefault(name, []).append(x)
        return x

    def read(self, module, point, x):
        self.read_by.setdefault(point, []).append((module, x))
        return x


def static(gate="none", keep_float=(), weights="per-tensor", low_high=None):
    """-> metadata of a toy model with the ranges that forward() has, its float tensors."""
    metadata, tensors = toy_model(gate)
    observed = quantsim.Observed(metadata, tensors)
    forward(observed)
    ranges = {point: [min(0.0, float(r.lows.min())), max(0.0, float(r.highs.max()))]
              for point, r in observed.records.items()}  # fmt: skip
    quantization = {
        "scheme": "w8a8-static", "weights": weights, "keep_float": list(keep_float), "ranges": ranges,
        "calibration": dict.fromkeys(checkpoint.CALIBRATION),
    }  # fmt: skip
    return {**metadata, "quantization": quantization}, tensors


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_pointed_computes_what_float_does_and_passes_every_point(gate):
    metadata, tensors = toy_model(gate)
    listed = Listed(metadata, tensors)
    for got, expected in zip(forward(listed), forward(ops.Float(metadata, tensors)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    points = graph.points(DIMS, gate)
    assert listed.points.keys() == points.keys()
    once = (".cross_attn.key", ".cross_attn.value")
    passes = {point: 2 if point.startswith("decoder") and not point.endswith(once) else 1 for point in points}
    assert {point: len(arrays) for point, arrays in listed.points.items()} == passes


@pytest.mark.parametrize("gate", KINDS)
def test_modules_read_the_points_that_the_graph_says(gate):
    listed = Listed(*toy_model(gate))
    forward(listed)
    for point, readers in graph.points(DIMS, gate).items():
        assert {module for module, _ in listed.read_by[point]} == set(readers), point
        if "conv" in point or point == "mel" or point.endswith((".key", ".value")):  # in rows of three, or in a cache
            continue
        for module, x in listed.read_by[point]:
            assert any(x is made for made in listed.points[point]), (module, point)


def test_points_hold_what_they_are_named_after():
    metadata, tensors = toy_model("per_head")
    listed = Listed(metadata, tensors)
    xa, _ = forward(listed)
    block, points = "encoder.blocks.0", {name: arrays[0] for name, arrays in listed.points.items()}
    assert points["mel"].shape == (2, 40, 8) and points["encoder.conv1"].shape == (2, 40, 32)
    assert points["encoder.ln_post"] is xa
    stream = points["encoder.conv2"] + tensors["encoder.positional_embedding"]
    np.testing.assert_array_equal(points["encoder.positional_embedding"], stream)
    plain = ops.Float(metadata, tensors)
    after = stream + plain.linear(f"{block}.attn.out", points[f"{block}.attn.gate"])
    np.testing.assert_allclose(points[f"{block}.attn.out"], after, atol=1e-5)
    assert points[f"{block}.mlp.0"].min() > -0.2  # after GELU
    mlp = plain.linear(f"{block}.mlp.2", points[f"{block}.mlp.0"])
    np.testing.assert_allclose(points[f"{block}.mlp.2"], after + mlp, atol=1e-5)


def test_observed_records_ranges_channels_and_mean_inputs():
    metadata, tensors = toy_model("per_head")
    listed, observed = Listed(metadata, tensors), quantsim.Observed(metadata, tensors, means=True)
    forward(listed)
    observed.window, observed.times = 5, 3
    forward(observed)
    for point, record in observed.records.items():
        rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in listed.points[point]])
        assert record.bounds == {5: (rows.min(), rows.max())} and record.counts is None
        np.testing.assert_array_equal(record.largest(), np.abs(rows).max(0))
    assert observed.inputs.keys() == set(checkpoint.quantizable(DIMS))
    total, count = observed.inputs["decoder.blocks.0.mlp.2"]
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in listed.points["decoder.blocks.0.mlp.0"]])
    assert count == 3 * len(rows)
    np.testing.assert_allclose(total / count, rows.mean(0), rtol=1e-4, atol=1e-6)
    assert observed.inputs["encoder.conv2"][0].shape == (3 * 32,)


def test_observed_makes_histograms_when_told():
    observed = quantsim.Observed(*toy_model(), histograms=True)
    forward(observed)
    assert observed.records["mel"].counts.sum() == 2 * 40 * 8


# --- rounding


def test_rounding_is_to_the_grid_and_idempotent():
    x = np.random.default_rng(0).normal(0.5, 2, 1000).astype(np.float32)
    scale, zero_point = graph.grid(-2, 4)
    y = quantsim.rounded(x, scale, zero_point)
    q = y / scale + zero_point
    np.testing.assert_allclose(q, np.rint(q), atol=1e-4)
    assert q.min() == -128 and q.max() == pytest.approx(127)
    inside = (x > -2) & (x < 4)
    assert np.abs(y - x)[inside].max() <= 0.5001 * scale
    np.testing.assert_array_equal(quantsim.rounded(y, scale, zero_point), y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("diffuse", [False, True])
def test_probabilities_are_multiples_of_a_255th(causal, diffuse):
    rng = np.random.default_rng(0)
    steps = [rng.integers(-200, 200, (2, t, 8)).astype(np.float32) for t in (5, 9, 9)]
    scales = [np.float32(0.02), np.float32(0.01), np.float32(0.03)]
    got = quantsim.rounded_attention(*steps, scales, 2, causal, diffuse)
    q, k, v = (scale * x for scale, x in zip(scales, steps, strict=True))
    for b in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            s = q[b, :, head].astype(np.float64) @ k[b, :, head].T / 2
            if causal:
                s = np.where(np.arange(9) <= np.arange(5)[:, None] + 4, s, -np.inf)
            p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
            whole = np.diff(np.rint(255 * np.cumsum(p, -1)), prepend=0) if diffuse else np.rint(255 * p)
            np.testing.assert_allclose(got[b, :, head], whole / 255 @ v[b, :, head], atol=1e-5)


def test_rows_share_a_windows_keys(monkeypatch):
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-9, 9, (rows, 6, 8)).astype(np.float32) for rows in (4, 2))
    scales = [np.float32(0.1)] * 3
    whole = quantsim.rounded_attention(q, np.repeat(k, 2, 0), np.repeat(k, 2, 0), scales, 2, True)
    monkeypatch.setattr(quantsim, "QUERIES", 4)
    np.testing.assert_allclose(quantsim.rounded_attention(q, k, k, scales, 2, True), whole, atol=1e-6)


@pytest.mark.parametrize("gate", KINDS)
def test_everything_is_rounded_where_nothing_is_kept(gate):
    metadata, tensors = static(gate)
    made = []

    class Watched(quantsim.Simulated):
        def point(self, name, x):
            y = super().point(name, x)
            made.append((name, y))
            return y

    simulated = Watched(metadata, tensors)
    forward(simulated)
    assert {name for name, _ in made} == graph.points(DIMS, gate).keys()
    for name, y in made:
        scale, zero_point = simulated.grids[name]
        q = y / scale + zero_point
        np.testing.assert_allclose(q, np.rint(q), atol=1e-3)
        assert q.min() >= -128.01 and q.max() <= 127.01


@pytest.mark.parametrize("gate", KINDS)
def test_rounded_logits_are_near_the_float_ones_and_not_equal(gate):
    metadata, tensors = static(gate)
    (xa, logits), (float_xa, float_logits) = forward(quantsim.Simulated(metadata, tensors)), forward(
        ops.Float(metadata, tensors))  # fmt: skip
    for got, expected in ((xa, float_xa), (logits, float_logits)):
        error = np.abs(got - expected).mean() / np.abs(expected).mean()
        assert 1e-3 < error < 0.2


def test_a_quantized_models_tensors_give_the_same_logits():
    metadata, tensors = static("per_head", ["encoder.blocks.1.mlp.2", "decoder.embed"], "per-channel")
    quantized = quantize_weights(metadata, tensors)
    assert quantized["encoder.positional_embedding"].dtype == np.int8
    assert quantized["decoder.positional_embedding"].dtype != np.int8
    for got, expected in zip(forward(quantsim.Simulated(metadata, quantized)),
                             forward(quantsim.Simulated(metadata, tensors)), strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, expected)


def test_with_everything_kept_it_is_the_float_model():
    metadata, tensors = static("per_head")
    simulated = quantsim.Simulated(quantsim.with_keep_float(metadata, ["encoder", "decoder"]), tensors)
    for got, expected in zip(forward(simulated), forward(ops.Float(metadata, tensors)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_kept_module_reads_float_and_its_neighbours_round_on_entry():
    kept, metadata, tensors = "encoder.blocks.0.mlp.2", *static()
    held, entered = set(), set()

    class Watched(quantsim.Simulated):
        def point(self, name, x):
            y = super().point(name, x)
            held.update([name] * (y is x))
            return y

        def read(self, module, point, x):
            y = super().read(module, point, x)
            entered.update([(module, point)] * (y is not x))
            return y

    forward(Watched(quantsim.with_keep_float(metadata, [kept]), tensors))
    block, following = "encoder.blocks.0", "encoder.blocks.1"
    assert held == {f"{block}.mlp.0", f"{block}.attn.out", kept}
    assert entered == {(f"{block}.mlp_ln", f"{block}.attn.out"), (f"{following}.attn_ln", kept),
                       (f"{following}.attn.out", kept)}  # fmt: skip


def test_a_kept_attention_has_float_probabilities():
    metadata, tensors = static()
    attention = "encoder.blocks.0.attn"
    simulated = quantsim.Simulated(quantsim.with_keep_float(metadata, [attention]), tensors)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 20, 32)).astype(np.float32) for _ in range(3))
    np.testing.assert_array_equal(
        simulated.attention(attention, q, k, v, None, 4, False), ops.Float(metadata, tensors).attention(
            attention, q, k, v, None, 4, False))  # fmt: skip


def test_linears_only_rounds_what_linears_multiply_and_nothing_else():
    metadata, tensors = static("per_head")
    simulated = quantsim.Simulated(metadata, tensors, linears_only=True)
    rounded = []

    class Watched(quantsim.Simulated):
        def linear(self, name, x, gelu=False, residual=None):
            if residual is not None:
                rounded.append(self.read_residual(name, self.reads[name][0], residual) is residual)
            return super().linear(name, x, gelu, residual)

    forward(Watched(metadata, tensors, linears_only=True))
    assert rounded and all(rounded)
    assert simulated.held_float == {
        point for point in graph.points(DIMS, "per_head")
        if point not in ("mel", "encoder.conv1") and not point.endswith("mlp.0")}  # fmt: skip
    assert (simulated.p["encoder.positional_embedding"] == tensors["encoder.positional_embedding"]).all()
    q, scale = quantize_weight(tensors["encoder.blocks.0.mlp.0.weight"], per_channel=False)
    np.testing.assert_array_equal(simulated.p["encoder.blocks.0.mlp.0.weight"], q)
    assert (simulated.scales["encoder.blocks.0.mlp.0"] == scale).all()
    error = [np.abs(forward(o)[1] - forward(ops.Float(metadata, tensors))[1]).mean()
             for o in (simulated, quantsim.Simulated(metadata, tensors))]  # fmt: skip
    assert 0 < error[0] < error[1]


def test_a_residual_outlier_harms_the_full_graph_only():
    metadata, tensors = static()
    stream = "encoder.blocks.0.mlp.2"
    metadata["quantization"]["ranges"][stream] = [-5000.0, 5000.0]
    expected = forward(ops.Float(metadata, tensors))[0]
    linears, full = (np.abs(forward(quantsim.Simulated(metadata, tensors, linears_only))[0] - expected).mean()
                     for linears_only in (True, False))  # fmt: skip
    assert full > 10 * linears


@pytest.mark.parametrize(("scheme", "kind"), [
    ("w8", quantsim.SimulatedWeights), ("w8a8-dynamic", quantsim.SimulatedDynamic),
    ("w8a8-static", quantsim.Simulated)])  # fmt: skip
def test_simulate_chooses_by_the_scheme(scheme, kind):
    metadata, tensors = static()
    metadata["quantization"]["scheme"] = scheme
    assert type(quantsim.simulate(metadata, tensors)) is kind


def test_weights_only_is_the_dequantized_model():
    metadata, tensors = static(weights="per-channel")
    metadata["quantization"] |= {"scheme": "w8", "keep_float": ["encoder.conv1"]}
    plain = ops.Float(*dequantize(metadata, quantize_weights(metadata, tensors)))
    np.testing.assert_array_equal(plain.p["encoder.conv1.weight"], ops.conv_matrix(tensors["encoder.conv1.weight"]))
    for got, expected in zip(forward(quantsim.simulate(metadata, tensors)), forward(plain), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("keep_float", [
    [], ["decoder.token_embedding", "encoder.blocks.0.attn.query"], ["decoder.blocks.1.cross_attn.key"],
    ["encoder.blocks.1.attn"]])  # fmt: skip
def test_dynamic_agrees_with_the_integer_kernels(keep_float):
    metadata, tensors = static("per_head", keep_float, "per-channel")
    metadata["quantization"]["scheme"] = "w8a8-dynamic"
    quantized = quantize_weights(metadata, tensors)
    integer = model.Model(metadata, quantized).ops
    assert [integer.precision(f"encoder.blocks.{i}.attn") for i in (0, 1)] == [
        "int8", "float32" if "encoder.blocks.1.attn" in keep_float else "int8"]  # fmt: skip
    assert integer.precision("decoder.blocks.0.attn") == "bf16"
    (xa, logits), (real_xa, real_logits) = forward(quantsim.simulate(metadata, tensors)), forward(integer)
    assert (np.abs(xa - real_xa) > 1e-5).mean() < 0.01  # a number between two steps spreads
    assert (np.abs(logits - real_logits) > 1e-5).mean() < 0.2 and np.median(np.abs(logits - real_logits)) < 1e-6


@pytest.mark.parametrize("weights", ["per-tensor", "per-channel"])
@pytest.mark.parametrize(("gate", "keep_float"), [
    ("none", []), ("per_head", []), ("elementwise", ["encoder.blocks.0", "decoder.embed", "decoder.blocks.1.attn"]),
    ("per_head", ["encoder.conv2", "encoder.positional_embedding", "decoder.blocks.0.cross_attn", "decoder.ln"]),
    ("none", ["encoder.blocks.1.attn_ln", "decoder.blocks.0.attn.out", "decoder.token_embedding"]),
])  # fmt: skip
def test_static_agrees_with_the_integer_kernels(isa, gate, keep_float, weights):
    metadata, tensors = static(gate, graph.expand_keep_float(keep_float, DIMS), weights)
    integer = model.Model(metadata, quantize_weights(metadata, tensors)).ops
    expected = forward(ops.Float(metadata, tensors))
    for got, real, plain in zip(forward(quantsim.simulate(metadata, tensors)), forward(integer), expected, strict=True):
        error = np.abs(got - plain).mean()
        assert np.median(np.abs(got - real)) < 1e-5 * np.abs(real).max()
        assert np.abs(got - real).mean() < 0.1 * error
