"""The points and modules of w8a8-static: names, readers, what is held in float, and the grid of a range."""

import re

import numpy as np
import pytest

from minigate import graph
from minigate.errors import UsageError
from tests.toy import DIMS

ENCODER, DECODER = "encoder.blocks.1", "decoder.blocks.0"


def metadata(keep_float, gate="none"):
    return {"dims": DIMS, "gate": {"kind": gate}, "quantization": {"keep_float": keep_float}}


@pytest.mark.parametrize("gate", ["none", "per_head"])
def test_every_point_is_named_once_and_read_by_modules(gate):
    found = graph.points(DIMS, gate)
    modules = graph.modules(DIMS)
    per_attention = 6 + (gate != "none")  # norm, query, key, value, product, [gate,] out
    n_attentions = DIMS["n_audio_layer"] + 2 * DIMS["n_text_layer"]
    n_blocks = DIMS["n_audio_layer"] + DIMS["n_text_layer"]
    assert len(found) == 4 + 1 + 1 + 1 + per_attention * n_attentions + 3 * n_blocks
    assert all(readers and set(readers) <= set(modules) for readers in found.values())
    assert {graph.maker(point) for point in found} - {"mel"} | {"decoder.token_embedding"} == set(modules)


def test_who_reads_what():
    found = graph.points(DIMS, "per_head")
    assert found["mel"] == ("encoder.conv1",)
    assert found["encoder.positional_embedding"] == ("encoder.blocks.0.attn_ln", "encoder.blocks.0.attn.out")
    assert found["encoder.blocks.0.mlp.2"] == (f"{ENCODER}.attn_ln", f"{ENCODER}.attn.out")
    assert found[f"{ENCODER}.mlp.2"] == ("encoder.ln_post",)
    cross = [f"decoder.blocks.{i}.cross_attn.{part}" for i in (0, 1) for part in ("key", "value")]
    assert found["encoder.ln_post"] == tuple(cross)
    assert found["decoder.embed"] == (f"{DECODER}.attn_ln", f"{DECODER}.attn.out")
    assert found[f"{DECODER}.attn.out"] == (f"{DECODER}.cross_attn_ln", f"{DECODER}.cross_attn.out")
    assert found[f"{DECODER}.cross_attn.out"] == (f"{DECODER}.mlp_ln", f"{DECODER}.mlp.2")
    assert found[f"{DECODER}.cross_attn_ln"] == (f"{DECODER}.cross_attn.query", f"{DECODER}.cross_attn")
    assert found[f"{DECODER}.attn"] == (f"{DECODER}.attn",)
    assert found[f"{DECODER}.attn.gate"] == (f"{DECODER}.attn.out",)
    assert found["decoder.ln"] == ("decoder.token_embedding",)


@pytest.mark.parametrize("gate", ["none", "per_head"])
def test_what_a_module_reads_ends_with_its_operand(gate):
    reads = graph.reads(DIMS, gate)
    assert set(reads) == set(graph.modules(DIMS)) - {"decoder.embed"}
    product = f"{DECODER}.cross_attn.gate" if gate == "per_head" else f"{DECODER}.cross_attn"
    assert reads[f"{DECODER}.cross_attn.out"] == (f"{DECODER}.attn.out", product)
    assert reads[f"{DECODER}.mlp.2"] == (f"{DECODER}.cross_attn.out", f"{DECODER}.mlp.0")
    assert reads[f"{ENCODER}.attn.out"][0] == "encoder.blocks.0.mlp.2"
    assert reads[f"{DECODER}.cross_attn.value"] == ("encoder.ln_post",)
    assert reads["encoder.conv1"] == ("mel",) and reads["decoder.token_embedding"] == ("decoder.ln",)


def test_without_gates_attention_is_read_by_its_projection():
    found = graph.points(DIMS, "none")
    assert found[f"{DECODER}.attn"] == (f"{DECODER}.attn.out",)
    assert f"{DECODER}.attn.gate" not in found
    assert found[f"{DECODER}.attn_ln"] == tuple(f"{DECODER}.attn.{part}" for part in ("query", "key", "value"))


def test_keep_float_expands_prefixes_and_the_preset_in_the_networks_order():
    whole = graph.expand_keep_float([ENCODER], DIMS)
    parts = ["attn_ln", "attn.query", "attn.key", "attn.value", "attn", "attn.out", "mlp_ln", "mlp.0", "mlp.2"]
    assert whole == [f"{ENCODER}.{part}" for part in parts]
    assert graph.expand_keep_float(["paper"], DIMS) == [*whole, "encoder.ln_post"]
    assert graph.expand_keep_float(["decoder.ln", f"{ENCODER}.mlp", f"{ENCODER}.mlp.0"], DIMS) == [
        f"{ENCODER}.mlp.0", f"{ENCODER}.mlp.2", "decoder.ln"]  # fmt: skip
    assert graph.expand_keep_float(whole, DIMS) == whole
    assert graph.expand_keep_float(["encoder", "decoder"], DIMS) == graph.modules(DIMS)


def test_an_attentions_name_is_the_attention_alone():
    assert graph.expand_keep_float([f"{ENCODER}.attn"], DIMS) == [f"{ENCODER}.attn"]


@pytest.mark.parametrize(("wrong", "right"), [
    ("encoder.blocks.1.mlp.3", "encoder.blocks.1.mlp"), ("encoder.ln_pots", "encoder.ln_post"),
    ("encoder.block.0", "encoder.blocks.0"), ("papers", "paper"), ("decoder.tokenembedding", "decoder.token_embedding"),
    ("encoder.blocks.1.mlp_lm", "encoder.blocks.1.mlp_ln"), ("", "paper"),
])  # fmt: skip
def test_an_unknown_layer_is_an_error_with_the_nearest_name(wrong, right):
    with pytest.raises(UsageError, match=f"keep_float: expected a layer.*, got {wrong!r}; the nearest is ") as error:
        graph.expand_keep_float([wrong], DIMS)
    assert not wrong or re.search(rf"the nearest is {re.escape(right)}(\.\d)?$", str(error.value))


def test_held_in_float_where_the_maker_or_a_reader_is_kept():
    assert graph.held_float(metadata([])) == set()
    assert graph.held_float(metadata(["decoder.token_embedding"])) == {"decoder.ln"}
    assert graph.held_float(metadata([f"{ENCODER}.mlp.2"])) == {
        f"{ENCODER}.mlp.0", f"{ENCODER}.attn.out", f"{ENCODER}.mlp.2"}  # fmt: skip
    attention = {f"{DECODER}.attn.{part}" for part in ("query", "key", "value")} | {f"{DECODER}.attn"}
    assert graph.held_float(metadata([f"{DECODER}.attn"])) == attention
    gated = attention | {f"{DECODER}.attn.gate", f"{DECODER}.attn_ln"}  # the gate reads the norm's output
    assert graph.held_float(metadata([f"{DECODER}.attn"], "per_head")) == gated
    assert graph.held_float(metadata(graph.modules(DIMS))) == set(graph.points(DIMS, "none"))


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 6), (-3, 0), (-0.17, 12.5), (2, 5), (-9, -4), (-1e-3, 600)])
def test_a_grid_contains_its_range_and_zero(low, high):
    scale, zero_point = graph.grid(low, high)
    assert scale.dtype == np.float32 and -128 <= zero_point <= 127
    low, high, scale = min(low, 0), max(high, 0), float(scale)
    assert scale == pytest.approx((high - low) / 255, rel=1e-6)
    assert scale * (-128 - zero_point) == pytest.approx(low, abs=0.501 * scale)
    assert scale * (127 - zero_point) == pytest.approx(high, abs=0.501 * scale)


@pytest.mark.parametrize(("pair", "scale", "zero_point"), [
    ((0, 6), 6 / 255, -128), ((-6, 0), 6 / 255, 127), ((0, 0), 1, -128), ((0, 1e-43), 1, -128),
])  # fmt: skip
def test_grids_at_the_edges(pair, scale, zero_point):
    assert graph.grid(*pair) == (np.float32(scale), zero_point)


@pytest.mark.parametrize("pair", [(-np.inf, 1), (0, np.inf), (np.nan, 1), (0, np.nan), (-1e308, 1e308)])
def test_an_infinite_range_is_refused(pair):
    with pytest.raises(ValueError, match="range: expected finite numbers, got"):
        graph.grid(*pair)


def test_grids_of_a_model():
    ranges = {"mel": [-1.0, 1.5], "decoder.ln": [0.0, 3.0]}
    assert graph.grids({"quantization": {"ranges": ranges}}) == {
        "mel": graph.grid(-1.0, 1.5), "decoder.ln": graph.grid(0, 3)}  # fmt: skip
