"""The model file: what it must hold, and that every deviation is one clear line."""

import json

import numpy as np
import pytest

from minigate import checkpoint, graph, int8weights, quantize, tensorfile
from minigate.attention import GATE_KINDS
from minigate.errors import FileError
from tests.toy import DIMS, toy_model

SCHEME = {"scheme": "w8a8-dynamic", "weights": "per-tensor", "keep_float": []}


def quantized(weights="per-channel", keep_float=(), gate="per_head"):
    metadata, tensors = toy_model(gate)
    for layer in checkpoint.quantizable(metadata["dims"]):
        if layer not in keep_float:
            name = f"{layer}.weight"
            tensors[name], tensors[f"{layer}.scale"] = int8weights.quantize_weight(
                tensors[name], weights == "per-channel")  # fmt: skip
    return {**metadata, "quantization": dict(SCHEME, weights=weights, keep_float=[*keep_float])}, tensors


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_tensor_shapes_are_those_of_the_network(gate):
    metadata, tensors = toy_model(gate)
    del tensors["tokenizer.vocabulary"]
    shapes = checkpoint.tensor_shapes(metadata["dims"], gate)
    assert shapes == {name: array.shape for name, array in tensors.items()}


@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_round_trip(tmp_path, gate, dtype):
    metadata, tensors = toy_model(gate)
    checkpoint.write(tmp_path / "toy.safetensors", metadata, tensors, dtype)
    model = checkpoint.read(tmp_path / "toy.safetensors")
    assert model.metadata == metadata and model.path == tmp_path / "toy.safetensors"
    for name, array in tensors.items():
        expected = array.astype(dtype) if dtype and array.dtype.kind == "f" else array
        np.testing.assert_array_equal(model.tensors[name], expected)
    assert tensorfile.read(model.path)[0].keys() == {"format", "minigate"}


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("keep_float", [(), ("encoder.blocks.1.mlp.2", "encoder.conv1")])
def test_quantized_round_trip(tmp_path, weights, keep_float):
    metadata, tensors = quantized(weights, keep_float)
    checkpoint.write(tmp_path / "toy.safetensors", metadata, tensors)
    found = checkpoint.read(tmp_path / "toy.safetensors").tensors
    assert found["decoder.token_embedding.weight"].dtype == np.int8
    assert found["decoder.blocks.0.cross_attn.gate.weight"].dtype == np.float32
    assert found["encoder.conv1.weight"].dtype == (np.float32 if keep_float else np.int8)
    assert found["encoder.conv2.scale"].shape == ((32,) if weights == "per-channel" else ())


def test_what_quantize_makes_is_accepted():
    metadata, tensors = quantize.quantize_dynamic(*toy_model("elementwise"))
    checkpoint.check(metadata, tensors)


def static(**change):
    """A toy model in w8a8-static with made-up ranges, and what of its quantization is to be different."""
    metadata, tensors = toy_model()
    ranges = {point: [-1, 2.5] for point in graph.points(DIMS, "none")}
    metadata, tensors = quantize.quantize_static(metadata, tensors, ranges, dict.fromkeys(checkpoint.CALIBRATION))
    return {**metadata, "quantization": {**metadata["quantization"], **change}}, tensors


def test_static_round_trip(tmp_path):
    metadata, tensors = static()
    checkpoint.write(tmp_path / "toy.safetensors", metadata, tensors)
    found = checkpoint.read(tmp_path / "toy.safetensors")
    assert found.metadata == metadata
    assert found.tensors["decoder.positional_embedding"].dtype == np.int8
    assert found.tensors["decoder.positional_embedding.scale"].shape == ()


POINTS = {point: [-1, 2.5] for point in graph.points(DIMS, "none")}
PAIR = "finite numbers .low, high. around 0"


@pytest.mark.parametrize("change, said", [
    ({"ranges": None}, "ranges: expected an object with a range for each tensor, got None"),
    ({"ranges": {**POINTS, "x": [0, 1]}}, "ranges: expected tensors of this network only, got 'x'"),
    ({"ranges": {**POINTS, "encoder.blocks.0.attn.gate": [0, 1]}}, "ranges: expected tensors of this network"),
    ({"ranges": {k: v for k, v in POINTS.items() if k != "mel"}}, f"ranges: mel: expected {PAIR}, got None"),
    ({"ranges": {**POINTS, "mel": [0, float("inf")]}}, f"ranges: mel: expected {PAIR}, got"),
    ({"ranges": {**POINTS, "mel": [float("nan"), 0]}}, f"ranges: mel: expected {PAIR}, got"),
    ({"ranges": {**POINTS, "mel": [0, 1e39]}}, f"ranges: mel: expected {PAIR}, got"),
    ({"ranges": {**POINTS, "mel": [1, 2]}}, f"ranges: mel: expected {PAIR}, got"),
    ({"ranges": {**POINTS, "mel": [0, 1, 2]}}, f"ranges: mel: expected {PAIR}, got"),
    ({"ranges": {**POINTS, "mel": [0, True]}}, f"ranges: mel: expected {PAIR}, got"),
    ({"calibration": None}, "calibration: expected an object with method, percentile, batches"),
    ({"calibration": {"method": "minmax"}}, "calibration: expected an object with method, percentile, batches"),
    ({"helpers": {"magic": True}}, "helpers: expected an object with any of smoothquant, bias_correction"),
    ({"helpers": {"error_diffusion": "no"}}, "helpers: error_diffusion: expected false, or true in w8a8-static, got"),
    ({"helpers": {"error_diffusion": 1}}, "helpers: error_diffusion: expected false, or true in w8a8-static, got"),
    ({"keep_float": ["encoder.blocks.0"]}, "keep_float: expected a list of layers"),
])  # fmt: skip
def test_static_deviations(change, said):
    metadata, tensors = static(**change)
    with pytest.raises(FileError, match=f"model: quantization: {said}"):
        checkpoint.check(metadata, tensors)


def test_static_may_keep_what_has_no_weights_and_positions_belong_to_a_module():
    for kept in (["encoder.ln_post"], ["decoder.blocks.0.attn"]):
        checkpoint.check(*static(keep_float=kept))
    for module, name in (("decoder.embed", "decoder.pos"), ("encoder.positional_embedding", "encoder.pos")):
        with pytest.raises(FileError, match=f"tensor '{name}itional_embedding.scale': expected none of this name"):
            checkpoint.check(*static(keep_float=[module]))


def change_metadata(**change):
    def apply(metadata, tensors):
        return {**metadata, **change}, tensors
    return apply


def change_dims(**change):
    return lambda metadata, tensors: ({**metadata, "dims": {**metadata["dims"], **change}}, tensors)


def change_tensor(name, array):
    return lambda metadata, tensors: (metadata, {**tensors, name: array})


def without(name):
    return lambda metadata, tensors: ({k: v for k, v in metadata.items() if k != name},
                                      {k: v for k, v in tensors.items() if k != name})


BIAS = "decoder.blocks.1.cross_attn.out.bias"
HEADS = "alignment_heads: expected null or a list of .layer, head."


@pytest.mark.parametrize("change, said", [
    (change_metadata(format_version=2), "format_version: expected 1, for this minigate, got 2"),
    (without("format_version"), "format_version: expected 1.*got None"),
    (without("gate"), "metadata: expected the field gate"),
    (without("provenance"), "metadata: expected the field provenance"),
    (change_metadata(name=3), "name: expected a string, got 3"),
    (change_metadata(dims=None), "dims: expected n_mels"),
    (change_dims(more=1), "dims: expected n_mels"),
    (change_dims(n_mels=0), "dims: expected positive integers"),
    (change_dims(n_mels=True), "dims: expected positive integers"),
    (change_dims(n_mels="8"), "dims: expected positive integers"),
    (change_dims(n_audio_layer=10**9), "dims: expected n_audio_layer of at most 256"),
    (change_dims(n_text_head=3), "dims: expected n_text_state divisible by n_text_head"),
    (change_dims(n_text_state=64), "dims: expected n_text_state equal to n_audio_state"),
    (change_dims(n_mels=80), r"tensor encoder.conv1.weight: expected \(32, 80, 3\) float32 or .*, got \(32, 8, 3\)"),
    (change_dims(n_text_layer=3), "tensor decoder.blocks.2.attn.query.weight: expected for dims, .* got none"),
    (change_dims(n_text_layer=1), "tensor 'decoder.blocks.1.attn.query.weight': expected none of this name"),
    (change_metadata(gate=None), "gate: expected none or per_head"),
    (change_metadata(gate={"kind": "other"}), "gate: expected none or per_head"),
    (change_metadata(gate={"kind": "per_head"}), "gate: expected finite numbers init and scale"),
    (change_metadata(gate={"kind": "per_head", "init": 0.5, "scale": float("nan")}), "gate: expected finite numbers"),
    (change_metadata(gate={"kind": "per_head", "init": 0.5, "scale": 2}), "tensor encoder.blocks.0.attn.gate.weight: "),
    (change_metadata(audio_context="half"), "audio_context: expected full or variable, got 'half'"),
    (change_metadata(provenance="here"), "provenance: expected an object"),
    (change_metadata(alignment_heads=5), HEADS),
    (change_metadata(alignment_heads=[5]), HEADS),
    (change_metadata(alignment_heads=[[2, 0]]), HEADS),
    (change_metadata(alignment_heads=[[0, 4]]), HEADS),
    (change_metadata(alignment_heads=[[0, -1]]), HEADS),
    (change_metadata(alignment_heads=[[0, 1.0]]), HEADS),
    (change_metadata(suppress_tokens="1"), "suppress_tokens: expected null or a list of token ids"),
    (change_metadata(suppress_tokens=[10**6]), "suppress_tokens: expected null or a list of token ids below n_vocab"),
    (change_metadata(suppress_tokens=[-1]), "suppress_tokens: expected null or a list of token ids below n_vocab"),
    (change_metadata(quantization=8), "quantization: expected null or an object"),
    (change_metadata(quantization={"scheme": "w4"}), "quantization: scheme: expected w8a8-static or .*, got 'w4'"),
    (change_metadata(quantization={**SCHEME, "weights": "per-row"}), "quantization: weights: expected per-channel or"),
    (change_metadata(quantization={**SCHEME, "keep_float": None}), "keep_float: expected a list"),
    (change_metadata(quantization={**SCHEME, "keep_float": ["encoder.ln_post"]}), "keep_float: expected a list of lay"),
    (change_metadata(quantization={**SCHEME, "keep_float": [[]]}), "keep_float: expected a list of layers"),
    (change_metadata(quantization=SCHEME),
     r"tensor encoder.conv1.weight: expected \(32, 8, 3\) int8, got \(32, 8, 3\) float32"),
    (without(BIAS), f"tensor {BIAS}: expected for dims, gate and quantization, got none"),
    (without("tokenizer.vocabulary"), "tensor tokenizer.vocabulary: expected for dims"),
    (change_tensor("a\nb", np.zeros(1, np.float32)), r"tensor 'a\\nb': expected none of this name"),
    (change_tensor("decoder.blocks.0.attn.key.bias", np.zeros(32, np.float32)), "attn.key.bias': expected none"),
    (change_tensor(BIAS, np.zeros(31, np.float32)), rf"tensor {BIAS}: expected \(32,\) float32 or .*, got \(31,\)"),
    (change_tensor(BIAS, np.zeros(32, np.int8)), rf"tensor {BIAS}: expected \(32,\) float32 or .*, got \(32,\) int8"),
    (change_tensor(BIAS, np.zeros(32, np.float64)), rf"tensor {BIAS}: .* got \(32,\) float64"),
    (change_tensor(checkpoint.VOCABULARY, np.zeros(4, np.int8)), r"vocabulary: expected \(n,\) uint8, got"),
    (change_tensor(checkpoint.VOCABULARY, np.zeros((2, 2), np.uint8)), r"tokenizer.vocabulary: expected \(n,\) uint8"),
    (change_tensor(checkpoint.VOCABULARY, np.uint8([1, 65, 3, 66])), "vocabulary: expected 6 bytes"),
    (change_tensor(checkpoint.VOCABULARY, np.uint8([1, 65, 1, 65])), "vocabulary: expected 2 different tokens, got 1"),
])  # fmt: skip
def test_deviations_are_refused_in_writing_and_reading(tmp_path, change, said):
    metadata, tensors = change(*toy_model())
    path = tmp_path / "toy.safetensors"
    with pytest.raises(FileError, match=f"toy.safetensors: .*{said}"):
        checkpoint.write(path, metadata, tensors)
    assert not path.exists()
    tensorfile.write(path, tensors, {"format": "minigate", "minigate": json.dumps(metadata)})
    with pytest.raises(FileError, match=f"toy.safetensors: .*{said}") as error:
        checkpoint.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(dtype, value):
    metadata, tensors = toy_model()
    for name in (BIAS, "decoder.token_embedding.weight"):
        array = tensors[name].astype(dtype)
        array.flat[-1] = value
        with pytest.raises(FileError, match=f"model: tensor {name}: expected finite values, got NaN or infinity"):
            checkpoint.check(metadata, {**tensors, name: array})


@pytest.mark.parametrize("name, array, said", [
    ("encoder.conv1.weight", np.full((32, 8, 3), -128, np.int8), "expected values from -127 to 127, got -128"),
    ("encoder.conv1.weight", np.zeros((32, 8, 3), np.float32), r"expected \(32, 8, 3\) int8, got"),
    ("encoder.conv1.scale", np.zeros(32, np.float32), "expected positive finite scales, got 0.0"),
    ("encoder.conv1.scale", np.full(32, np.inf, np.float32), "expected positive finite scales, got inf"),
    ("encoder.conv1.scale", np.ones(32, np.float16), r"expected \(32,\) float32, got \(32,\) float16"),
    ("encoder.conv1.scale", np.float32(1), r"expected \(32,\) float32, got \(\) float32"),
    ("encoder.blocks.0.attn.gate.scale", np.float32(1), "expected none of this name"),
])  # fmt: skip
def test_quantized_deviations(name, array, said):
    metadata, tensors = quantized()
    with pytest.raises(FileError, match=f"model: tensor '?{name}'?: {said}"):
        checkpoint.check(metadata, {**tensors, name: array})


@pytest.mark.parametrize("pairs, said", [
    ({"format": "pt"}, "expected a minigate model, .*minigate.convert"),
    ({"format": "minigate"}, "expected a minigate model"),
    ({"format": "minigate", "minigate": "{"}, "metadata: expected JSON"),
    ({"format": "minigate", "minigate": "[" * 100_000}, "metadata: expected JSON"),
    ({"format": "minigate", "minigate": "[]"}, "metadata: expected a JSON object"),
    ({"format": "minigate", "minigate": "{}"}, "format_version: expected 1"),
])  # fmt: skip
def test_metadata_that_is_none_of_ours(tmp_path, pairs, said):
    tensorfile.write(tmp_path / "a.safetensors", toy_model()[1], pairs)
    with pytest.raises(FileError, match=f"a.safetensors: {said}"):
        checkpoint.read(tmp_path / "a.safetensors")


def test_truncated_and_altered_models_raise_only_file_errors(tmp_path):
    path = tmp_path / "toy.safetensors"
    checkpoint.write(path, *quantized())
    good, rng, refused = path.read_bytes(), np.random.default_rng(2), 0
    header = 8 + int.from_bytes(good[:8], "little")
    cuts = [*range(0, header, header // 40), *range(header, len(good), len(good) // 20)]
    cases = [good[:n] for n in cuts]
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.integers(0, header)] = rng.integers(0, 256)
        cases.append(bytes(bad))
    for case in cases:
        path.write_bytes(case)
        try:
            checkpoint.read(path)
        except FileError:
            refused += 1
    assert refused >= len(cuts) + 100
