"""A float model to a quantized one: the three schemes."""

import numpy as np
import pytest

from minigate import checkpoint, graph, quantize
from minigate.errors import UsageError
from tests.toy import DIMS, toy_model

CALIBRATION = {"method": "minmax", "percentile": None, "batches": 16, "seed": 0, "windows": 8, "sha256": "0"}


def quantized(scheme, gate="none", **options):
    """A toy model, with made-up ranges if it is static."""
    metadata, tensors = toy_model(gate)
    if scheme == "w8a8-static":
        ranges = {point: [-1.0, 2.5] for point in graph.points(DIMS, gate)}
        return quantize.quantize_static(metadata, tensors, ranges, CALIBRATION, **options)
    chosen = {"w8a8-dynamic": quantize.quantize_dynamic, "w8": quantize.quantize_w8}[scheme]
    return chosen(metadata, tensors, **options)


@pytest.mark.parametrize("gate", ["none", "per_head_mlp"])
@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_a_scheme_makes_a_model_that_is_accepted(scheme, gate):
    metadata, tensors = quantized(scheme, gate)
    checkpoint.check(metadata, tensors)
    quantization = metadata["quantization"]
    assert quantization["scheme"] == scheme and quantization["keep_float"] == []
    assert quantization["helpers"] == quantize.NO_HELPERS
    static = scheme == "w8a8-static"
    assert ("ranges" in quantization, "calibration" in quantization) == (static, static)
    int8 = {name for name, array in tensors.items() if array.dtype == np.int8}
    positions = {"encoder.positional_embedding", "decoder.positional_embedding"} if static else set()
    assert int8 == {f"{layer}.weight" for layer in checkpoint.quantizable(DIMS)} | positions
    assert tensors["decoder.token_embedding.scale"].shape == (() if static else (DIMS["n_vocab"],))


@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
@pytest.mark.parametrize("weights", ["per-tensor", "per-channel"])
def test_weights_and_what_stays_float_are_options_of_every_scheme(scheme, weights):
    kept = ["encoder.blocks.1", "decoder.embed"]
    metadata, tensors = quantized(scheme, weights=weights, keep_float=kept, helpers={"equalize": True})
    checkpoint.check(metadata, tensors)
    assert tensors["encoder.blocks.1.mlp.2.weight"].dtype == np.float32
    assert tensors["encoder.blocks.0.mlp.2.scale"].shape == ((32,) if weights == "per-channel" else ())
    expanded = graph.expand_keep_float(kept, DIMS)
    stored = metadata["quantization"]["keep_float"]
    assert stored == expanded if scheme == "w8a8-static" else set(stored) == set(expanded) & set(
        checkpoint.quantizable(DIMS))  # fmt: skip
    assert tensors["decoder.positional_embedding"].dtype == np.float32
    assert (tensors["encoder.positional_embedding"].dtype == np.int8) == (scheme == "w8a8-static")
    assert metadata["quantization"]["helpers"] == {**quantize.NO_HELPERS, "equalize": True}


def test_a_models_own_tensors_stay_as_they_are():
    metadata, tensors = toy_model()
    before = {name: array.copy() for name, array in tensors.items()}
    quantize.quantize_dynamic(metadata, tensors)
    assert metadata["quantization"] is None
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_a_quantized_model_is_refused(scheme):
    with pytest.raises(UsageError, match=f"expected a float model, got one quantized as {scheme}"):
        quantize.quantize_dynamic(*quantized(scheme))


def test_an_unknown_layer_is_refused():
    with pytest.raises(UsageError, match="got 'encoder.blocks.1.mpl'; the nearest is encoder.blocks.1.mlp"):
        quantized("w8", keep_float=["encoder.blocks.1.mpl"])
