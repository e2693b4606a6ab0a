"""The operators of w8a8-static against the simulation of the scheme: one by one, where a result may be a step off that
lies half way between two, and the whole network; and what must be the same to the bit."""

import numpy as np
import pytest

from minigate import checkpoint, graph, model, ops
from minigate.attention import GATE_KINDS
from minigate.audio import read_audio
from minigate.int8weights import dequantize
from minigate.mel import log_mel
from minigate.quantize import quantize_static
from minigate.quantsim import Observed, Simulated
from minigate.static import Static
from minigate.static_kernels import Tensor
from tests.toy import DIMS, toy_model

FLOAT_ERROR = 2e-6  # of float32 results, relative to their largest magnitude
MAX_FLIPS = 1e-4  # share of int8 results that are a step off
LOGIT_ERROR = 0.05  # of the largest logit: what such a step grows to on its way through the toy model
DIFFUSION = {"error_diffusion": True}
KEEP_FLOAT = {
    "nothing": [],
    "paper": ["paper"],
    "products and readers": ["decoder.blocks.0.attn", "encoder.blocks.0.mlp.2", "decoder.token_embedding"],
    "ends": ["encoder.conv1", "encoder.positional_embedding", "decoder.embed", "decoder.ln"],
    "parts": ["decoder.blocks.1.cross_attn.key", "encoder.blocks.0.attn_ln", "encoder.blocks.1.attn.query",
              "decoder.blocks.0.cross_attn.out", "encoder.conv2"],
    "everything": ["encoder", "decoder"],
}  # fmt: skip


def inputs(seed=0, rows=2):
    """-> mel, tokens."""
    rng = np.random.default_rng(seed)
    mel = rng.standard_normal((rows, DIMS["n_mels"], 2 * DIMS["n_audio_ctx"])).astype(np.float32)
    return mel, rng.integers(0, DIMS["n_vocab"], (rows, 7))


def forward(operators, seed=0):
    """-> xa, logits of a batch of two windows, decoded in two steps."""
    dims = model.Dims(**DIMS)
    mel, tokens = inputs(seed)
    xa = model.encoder(operators, dims, mel)
    cache = model.Cache(model.cross_keys_values(operators, dims, xa), dims.n_text_ctx)
    parts = [model.decoder(operators, dims, part, cache) for part in (tokens[:, :4], tokens[:, 4:])]
    return xa, np.concatenate([operators.logits(operators.norm("decoder.ln", x)) for x in parts], axis=1)


def quantized(gate="none", keep_float=(), weights="per-tensor", helpers=None):
    """-> metadata and tensors of a toy model with the ranges that forward() has."""
    metadata, tensors = toy_model(gate)
    observed = Observed(metadata, tensors)
    forward(observed)
    return static(metadata, tensors, observed, keep_float, weights, helpers)


def static(metadata, tensors, observed, keep_float=(), weights="per-tensor", helpers=None):
    """A float model and what was observed of it -> metadata and tensors as w8a8-static."""
    ranges = {point: [float(record.lows.min()), float(record.highs.max())]
              for point, record in observed.records.items()}  # fmt: skip
    return quantize_static(metadata, tensors, ranges, {}, weights, keep_float, helpers)


class Pair:
    """Runs every operator of the simulation, and beside it that of Static on the same input, and compares."""

    def __init__(self, metadata, tensors):
        self.simulated, self.static = Simulated(metadata, tensors), Static(metadata, tensors)
        self.reads = graph.reads(metadata["dims"], metadata["gate"]["kind"])
        self.flips, self.results = 0, 0

    def same(self, point, got, wanted, slack=0.0):
        """got, a Tensor or the array of keys or values, compared -> wanted, float32. slack: a difference in numbers."""
        got = got if isinstance(got, Tensor) else Tensor(got, self.static.grids[point])
        assert (got.data.dtype == np.int8) == (point in self.static.int8_grids) and got.data.shape == wanted.shape
        error = np.abs(self.static.values(got) - wanted)
        if got.data.dtype == np.int8:
            assert got.grid == self.static.grids[point]
            assert error.max() <= 1.001 * got.grid.scale + slack, (point, error.max() / got.grid.scale)
            self.flips += np.count_nonzero(error > 0.5 * got.grid.scale)
            self.results += error.size
        else:
            assert error.max() <= FLOAT_ERROR * np.abs(wanted).max() + slack, point
        return wanted

    def conv(self, name, x, stride):
        held = self.static.left(self.reads[name][0], np.ascontiguousarray(x))
        return self.same(name, self.static.conv(name, held, stride), self.simulated.conv(name, x, stride))

    def add_positions(self, name, x):
        held = self.static.left(self.reads[name][0], x)
        return self.same(name, self.static.add_positions(name, held), self.simulated.add_positions(name, x))

    def embed(self, tokens, offset):
        args = tokens, offset
        return self.same("decoder.embed", self.static.embed(*args), self.simulated.embed(*args))

    def norm(self, name, x):
        held = self.static.left(self.reads[name][0], x)
        return self.same(name, self.static.norm(name, held), self.simulated.norm(name, x))

    def linear(self, name, x, gelu=False, residual=None):
        held = self.static.left(self.reads[name][-1], x)
        held_residual = None if residual is None else self.static.left(self.reads[name][0], residual)
        got = self.static.linear(name, held, gelu, held_residual)
        return self.same(name, got, self.simulated.linear(name, x, gelu, residual))

    def attention(self, name, q, k, v, h, n_head, causal):
        point = name if self.static.gate_kind == "none" else f"{name}.gate"
        parts = {part: self.static.left(f"{name}.{part}", x) for part, x in (("query", q), ("key", k), ("value", v))}
        held = parts["query"], parts["key"].data, parts["value"].data, self.static.left(f"{name}_ln", h)
        a_255th = 4 * np.abs(v).max() / 255  # two probabilities are a step off, and the gate is at most 4
        slack = a_255th + 4 * self.static.grids[name].scale * (point != name) if name not in self.static.kept else 0
        got = self.static.attention(name, *held, n_head, causal)
        return self.same(point, got, self.simulated.attention(name, q, k, v, h, n_head, causal), slack)

    def logits(self, x):
        got, wanted = self.static.logits(self.static.left("decoder.ln", x)), self.simulated.logits(x)
        assert np.abs(got - wanted).max() <= FLOAT_ERROR * np.abs(wanted).max()
        return wanted

    def rows(self, x):
        return x

    values = rows


@pytest.mark.parametrize("weights", ["per-tensor", "per-channel"])
@pytest.mark.parametrize("keep_float", KEEP_FLOAT)
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_every_operator_computes_what_the_simulation_does(isa, gate, keep_float, weights):
    pair = Pair(*quantized(gate, KEEP_FLOAT[keep_float], weights))
    forward(pair)
    assert pair.flips <= MAX_FLIPS * pair.results
    assert (pair.results > 0) == (keep_float != "everything")


@pytest.mark.parametrize("gate", ["none", "per_head", "elementwise"])
def test_every_operator_computes_what_the_simulation_does_with_error_diffusion(isa, gate):
    pair = Pair(*quantized(gate, helpers=DIFFUSION))
    forward(pair)
    assert pair.static.diffuse and pair.simulated.diffuse and pair.flips <= MAX_FLIPS * pair.results


def test_a_file_says_how_its_probabilities_are_rounded(isa):
    plain, diffused = (forward(Static(*quantized(helpers=helpers))) for helpers in (None, DIFFUSION))
    assert not np.array_equal(plain[0], diffused[0]) and not np.array_equal(plain[1], diffused[1])
    metadata, tensors = quantized()
    del metadata["quantization"]["helpers"]  # a file may be without
    assert np.array_equal(forward(Static(metadata, tensors))[1], plain[1])


@pytest.mark.parametrize("keep_float", KEEP_FLOAT)
@pytest.mark.parametrize("gate", ["none", "per_head", "elementwise"])
def test_the_network_computes_what_the_simulation_does(isa, gate, keep_float):
    metadata, tensors = quantized(gate, KEEP_FLOAT[keep_float])
    for got, wanted in zip(forward(Static(metadata, tensors)), forward(Simulated(metadata, tensors)), strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - wanted).max() <= LOGIT_ERROR * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("helpers", [None, DIFFUSION])
def test_whispers_operators_compute_what_the_simulation_does(compiled_isa, helpers):
    """At real sizes, on the first seconds of the sample and the ranges that it has itself."""
    file = checkpoint.read(model.find("tiny.en-w8a8-dynamic"))
    metadata, tensors = dequantize(file.metadata, file.tensors)
    dims = model.Dims(**metadata["dims"])
    mel = log_mel(read_audio(model.weights_folder() / "sample.wav"), dims.n_mels)[None, :, :600]
    tokens = np.array([[50257, 50362, 770, 318, 257, 1332, 13, 50256]])

    def forward(operators):
        xa = model.encoder(operators, dims, mel)
        cache = model.Cache(model.cross_keys_values(operators, dims, xa), dims.n_text_ctx)
        operators.logits(operators.norm("decoder.ln", model.decoder(operators, dims, tokens, cache)))

    observed = Observed(metadata, tensors)
    forward(observed)
    pair = Pair(*static(metadata, tensors, observed, helpers=helpers))
    forward(pair)
    share = 3e-5 if helpers else 1e-5  # a sum of probabilities that is rounded the other way changes two of them
    assert pair.results > 5e6 and pair.flips <= share * pair.results


def test_a_pair_that_disagrees_is_seen():
    metadata, tensors = quantized()
    pair = Pair(metadata, tensors)
    grid = pair.static.grids["encoder.blocks.0.mlp.2"]
    pair.static.int8_grids["encoder.blocks.0.mlp.2"] = grid._replace(zero_point=grid.zero_point + 2)
    with pytest.raises(AssertionError, match="encoder.blocks.0.mlp.2"):
        forward(pair)


def test_kept_in_float_throughout_is_float():
    metadata, tensors = quantized("per_head", ["encoder", "decoder"])
    plain = forward(ops.Float(*toy_model("per_head")))
    for got, wanted in zip(forward(Static(metadata, tensors)), plain, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_int8_is_close_to_float():
    xa, logits = forward(Static(*quantized("per_head")))
    wanted_xa, wanted = forward(ops.Float(*toy_model("per_head")))
    assert np.abs(xa - wanted_xa).mean() < 0.1 * np.abs(wanted_xa).mean()
    assert np.abs(logits - wanted).mean() < 0.1 * np.abs(wanted).mean()


# ---- a model ----


@pytest.fixture(params=["none", "per_head", "elementwise"])
def static_model(isa, request):
    return model.Model(*quantized(request.param), name="toy")


def test_the_scheme_chooses_the_operators():
    metadata, tensors = quantized()
    assert isinstance(model.Model(metadata, tensors).ops, Static)
    assert isinstance(model.Model(*toy_model()).ops, ops.Float)


def test_keys_values_and_what_operators_give_are_int8(static_model):
    mel, tokens = inputs()
    xa = static_model.encode(mel)
    assert xa.dtype == np.float32
    held = static_model.ops.rows(xa)
    assert held.data.dtype == np.int8
    np.testing.assert_array_equal(static_model.ops.values(held), xa)
    cache = static_model.start(xa)
    static_model.decode(tokens, cache)
    assert {x.dtype for pair in cache.cross + cache._own for x in pair} == {np.dtype(np.int8)}
    hidden = static_model.hidden(tokens, static_model.start(xa))
    assert hidden.dtype == np.float32 and hidden.shape == (2, 7, DIMS["n_text_state"])


def test_token_by_token_is_all_at_once(static_model):
    """Scores, probabilities and sums are the same integers, whichever way the keys are read."""
    mel, tokens = inputs()
    xa = static_model.encode(mel)
    cache = static_model.start(xa)
    singly = [static_model.decode(tokens[:, i : i + 1], cache) for i in range(7)]
    at_once = static_model.decode(tokens, static_model.start(xa), all_positions=True)
    np.testing.assert_array_equal(np.stack(singly, axis=1), at_once)


def test_rows_do_not_see_each_other(static_model):
    mel, tokens = inputs()
    xa = static_model.encode(mel)
    np.testing.assert_array_equal(static_model.encode(mel[1:])[0], xa[1])
    both = static_model.decode(tokens, static_model.start(xa), all_positions=True)
    alone = static_model.decode(tokens[1:], static_model.start(xa[1:]), all_positions=True)
    np.testing.assert_array_equal(alone[0], both[1])


def test_beams_share_their_windows_keys(static_model):
    mel, tokens = inputs()
    xa = static_model.encode(mel)
    cache = static_model.start(xa)
    static_model.decode(tokens[:, :3], cache)
    cache.repeat(5)
    beams = np.random.default_rng(0).integers(0, DIMS["n_vocab"], (10, 2))
    static_model.decode(beams[:, :1], cache)
    cache.reorder(np.array([1, 0, 2, 2, 4, 5, 9, 7, 8, 6]))
    cache.keep(np.array([1]))
    got = static_model.decode(beams[5:, 1:], cache)
    for row, parent in enumerate([5, 9, 7, 8, 6]):
        plain = static_model.start(xa[1:])
        path = np.concatenate([tokens[1, :3], beams[parent, :1], beams[5 + row, 1:]])
        np.testing.assert_array_equal(static_model.decode(path[None], plain)[0], got[row])


def test_variable_context(static_model):
    static_model.metadata["audio_context"] = "variable"
    assert static_model.encode(inputs()[0][:, :, :18]).shape == (2, 9, DIMS["n_audio_state"])
