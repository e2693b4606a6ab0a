"""The model file: what it must hold, reading it, writing it.

One safetensors file. Its metadata is {"format": "minigate", "minigate": JSON}, its tensors carry openai/whisper's
names, and "tokenizer.vocabulary" holds every ordinary token. Shapes: D n_state, H n_head.
"""
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigate import graph, tensorfile
from minigate.attention import GATE_KINDS, gate_shapes
from minigate.errors import FileError
from minigate.tensorfile import show
from minigate.tokenizer import unpack_vocabulary

FORMAT_VERSION = 1
DIMS = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer",
        "n_vocab", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer")
SCHEMES = ("w8a8-static", "w8a8-dynamic", "w8")
POSITIONS = {"encoder.positional_embedding": "encoder.positional_embedding",
             "decoder.positional_embedding": "decoder.embed"}  # int8 in w8a8-static unless this is kept in float
CALIBRATION = ("method", "percentile", "batches", "seed", "windows", "sha256")
HELPERS = ("smoothquant", "bias_correction", "equalize", "rotate", "error_feedback", "error_diffusion")
INPUT_SCALE = "decoder.token_embedding.input_scale"  # (D,) of a smoothed model: tokens' rows go in multiplied by it
ROTATIONS = ("encoder.rotation", "decoder.rotation")  # (D,) of a rotated model: signs for hadamard.rotation
VOCABULARY = "tokenizer.vocabulary"
MAX_RANGE = 3.4e38  # of an activation: what float32 can hold
MAX_LAYERS = 256  # a bound on what a damaged file can ask for; the largest Whisper has 32


@dataclass(frozen=True)
class ModelFile:
    """A model file that has passed check(). tensors are read-only views of the mapped file."""
    metadata: dict
    tensors: Mapping[str, np.ndarray]
    path: Path


def make_metadata(name: str, dims: Mapping[str, int], provenance: Mapping[str, object], *, gate: Mapping | None = None,
                  quantization: Mapping | None = None, audio_context: str = "full",
                  alignment_heads: list | None = None, suppress_tokens: list | None = None) -> dict:
    """The metadata of a model file, every key present. alignment_heads: [[layer, head], …] of the cross-attention."""
    return {"format_version": FORMAT_VERSION, "name": name, "dims": {key: int(dims[key]) for key in DIMS},
            "gate": dict(gate or {"kind": "none"}), "quantization": quantization and dict(quantization),
            "audio_context": audio_context, "alignment_heads": alignment_heads, "suppress_tokens": suppress_tokens,
            "provenance": dict(provenance)}


# --- which tensors there are ---


def tensor_shapes(dims: Mapping[str, int], gate_kind: str = "none") -> dict[str, tuple[int, ...]]:
    """Every float tensor of a model with these dims and this gate: name -> shape, in openai/whisper's order."""
    D = dims["n_audio_state"]
    shapes = {"encoder.positional_embedding": (dims["n_audio_ctx"], D),
              "encoder.conv1.weight": (D, dims["n_mels"], 3), "encoder.conv1.bias": (D,),
              "encoder.conv2.weight": (D, D, 3), "encoder.conv2.bias": (D,)}
    for i in range(dims["n_audio_layer"]):
        shapes |= _block_shapes(f"encoder.blocks.{i}", D, dims["n_audio_head"], gate_kind, ("attn",))
    shapes |= _norm_shapes("encoder.ln_post", D)
    D = dims["n_text_state"]
    shapes |= {"decoder.positional_embedding": (dims["n_text_ctx"], D),
               "decoder.token_embedding.weight": (dims["n_vocab"], D)}
    for i in range(dims["n_text_layer"]):
        shapes |= _block_shapes(f"decoder.blocks.{i}", D, dims["n_text_head"], gate_kind, ("attn", "cross_attn"))
    return shapes | _norm_shapes("decoder.ln", D)


def _norm_shapes(name: str, D: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def _block_shapes(name: str, D: int, H: int, gate_kind: str, modules: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for module in modules:
        for linear in ("query", "key", "value", "out"):
            shapes[f"{name}.{module}.{linear}.weight"] = (D, D)
            if linear != "key":  # Whisper's keys have no bias: it would add the same to every score of a query
                shapes[f"{name}.{module}.{linear}.bias"] = (D,)
        shapes |= {f"{name}.{module}.gate.{key}": shape for key, shape in gate_shapes(gate_kind, D, H).items()}
        shapes |= _norm_shapes(f"{name}.{module}_ln", D)
    shapes |= {f"{name}.mlp.0.weight": (4 * D, D), f"{name}.mlp.0.bias": (4 * D,),
               f"{name}.mlp.2.weight": (D, 4 * D), f"{name}.mlp.2.bias": (D,)}
    return shapes | _norm_shapes(f"{name}.mlp_ln", D)


def quantizable(dims: Mapping[str, int]) -> list[str]:
    """The layers whose "….weight" is int8 in an int8 model: linears, convolutions, token embedding; not the gates."""
    shapes = tensor_shapes(dims)
    weights = [name for name, shape in shapes.items() if len(shape) > 1 and name.endswith(".weight")]
    return [name.removesuffix(".weight") for name in weights]


def keepable(dims: Mapping[str, int], scheme: str) -> list[str]:
    """The modules that a scheme rounds, and keep_float may name, in the network's order: all of them in w8a8-static; in
    the others those with weights, and in w8a8-dynamic the encoder's attention."""
    rounded = set(quantizable(dims))
    if scheme == "w8a8-dynamic":
        rounded |= {f"encoder.blocks.{i}.attn" for i in range(dims["n_audio_layer"])}
    return [module for module in graph.modules(dims) if scheme == "w8a8-static" or module in rounded]


def expected_tensors(metadata: Mapping) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, "int8" | "float32" (a scale) | "float" (float32 or float16)) for dims, gate and quantization."""
    dims, quantization = metadata["dims"], metadata["quantization"]
    expected = {name: (shape, "float") for name, shape in tensor_shapes(dims, metadata["gate"]["kind"]).items()}
    if quantization:
        for layer in quantizable(dims):
            if layer not in quantization["keep_float"]:
                shape = expected[f"{layer}.weight"][0]
                expected[f"{layer}.weight"] = shape, "int8"
                expected[f"{layer}.scale"] = shape[:1] if quantization["weights"] == "per-channel" else (), "float32"
        helpers, states = quantization.get("helpers") or {}, (dims["n_audio_state"], dims["n_text_state"])
        if helpers.get("rotate"):
            expected |= {name: ((D,), "float") for name, D in zip(ROTATIONS, states, strict=True)}
        if helpers.get("smoothquant") is not None:
            expected[INPUT_SCALE] = states[1:], "float"
        for name in POSITIONS if quantization["scheme"] == "w8a8-static" else ():
            if module_of(name) not in quantization["keep_float"]:
                expected[name], expected[scale_name(name)] = (expected[name][0], "int8"), ((), "float32")
    return expected


def module_of(name: str) -> str:
    """The module whose keep_float decides whether a tensor is int8: of `X.weight` X."""
    return POSITIONS.get(name, name.removesuffix(".weight"))


def scale_name(name: str) -> str:
    """The tensor that holds the scale of an int8 tensor."""
    return f"{name.removesuffix('.weight')}.scale"


# --- checks ---


def check(metadata: Mapping, tensors: Mapping[str, np.ndarray], where: str | Path = "model") -> None:
    """Raise FileError, beginning with where, unless metadata is complete and tensors are exactly what it demands."""
    check_metadata(where, metadata)
    check_tensors(where, tensors, expected_tensors(metadata) | {VOCABULARY: (None, "uint8")})
    try:
        tokens = unpack_vocabulary(tensors[VOCABULARY])
    except FileError as error:
        raise FileError(f"{where}: {error}") from None
    if len(set(tokens)) != len(tokens):
        raise FileError(f"{where}: vocabulary: expected {len(tokens)} different tokens, got {len(set(tokens))}")


def check_tensors(where: str | Path, tensors: Mapping[str, np.ndarray],
                  expected: Mapping[str, tuple[tuple[int, ...] | None, str]]) -> None:
    """Raise FileError unless tensors are the expected ones: name -> (shape or None for (n,), kind of dtype)."""
    for name in tensors:
        if name not in expected:
            raise FileError(f"{where}: tensor {show(name)}: expected none of this name for dims, gate and quantization")
    for name, (shape, kind) in expected.items():
        if name not in tensors:
            raise FileError(f"{where}: tensor {name}: expected for dims, gate and quantization, got none")
        got, dtype = tensorfile.kind_of(tensors, name)
        dtypes = ("float32", "float16") if kind == "float" else (kind,)
        if (len(got) != 1 if shape is None else got != shape) or dtype.name not in dtypes:
            text = f"{'(n,)' if shape is None else shape} {' or '.join(dtypes)}"
            raise FileError(f"{where}: tensor {name}: expected {text}, got {show(got)} {dtype}")
        if kind == "float" and not _all_finite(tensors[name]):
            raise FileError(f"{where}: tensor {name}: expected finite values, got NaN or infinity")
        if kind == "int8" and tensors[name].min() < -127:
            raise FileError(f"{where}: tensor {name}: expected values from -127 to 127, got -128")
        if kind == "float32" and not (np.isfinite(tensors[name]).all() and (tensors[name] > 0).all()):
            raise FileError(f"{where}: tensor {name}: expected positive finite scales, got {np.min(tensors[name])}")


def _all_finite(array: np.ndarray) -> bool:
    """float32 or float16: NaN passes through min and max, and float16's bits are faster to look at than its values."""
    if array.dtype == np.float16:
        return not ((array.view(np.uint16) & 0x7C00) == 0x7C00).any()
    return not array.size or bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def check_metadata(where: str | Path, metadata: Mapping) -> None:
    """Raise FileError unless every field is there and of its form."""
    version = metadata.get("format_version")
    _want(f"{where}: format_version", version == FORMAT_VERSION, f"{FORMAT_VERSION}, for this minigate", version)
    for field in make_metadata("", dict.fromkeys(DIMS, 1), {}):
        _want(f"{where}: metadata", field in metadata, f"the field {field}", list(metadata))
    check_dims(where, metadata["dims"])
    _want(f"{where}: name", isinstance(metadata["name"], str), "a string", metadata["name"])
    gate, context, provenance = metadata["gate"], metadata["audio_context"], metadata["provenance"]
    _want(f"{where}: gate", isinstance(gate, dict) and gate.get("kind") in GATE_KINDS, " or ".join(GATE_KINDS), gate)
    numbers = [] if gate["kind"] == "none" else [gate.get("init"), gate.get("scale")]
    _want(f"{where}: gate", all(type(n) in (int, float) and math.isfinite(n) for n in numbers),
          "finite numbers init and scale", gate)
    _want(f"{where}: audio_context", context in ("full", "variable"), "full or variable", context)
    _want(f"{where}: provenance", isinstance(provenance, dict), "an object", provenance)
    _check_lists(where, metadata)
    _check_quantization(where, metadata)


def check_dims(where: str | Path, dims: object) -> None:
    """Raise FileError unless dims are those of a model that can be computed."""
    where = f"{where}: dims"
    _want(where, isinstance(dims, dict) and set(dims) == set(DIMS), " ".join(DIMS), dims)
    _want(where, all(type(n) is int and n > 0 for n in dims.values()), "positive integers", dims)
    _want(where, dims["n_audio_state"] == dims["n_text_state"], "n_text_state equal to n_audio_state", dims)
    for side in ("audio", "text"):
        state, head, layer = (f"n_{side}_{key}" for key in ("state", "head", "layer"))
        _want(where, dims[state] % dims[head] == 0, f"{state} divisible by {head}", dims)
        _want(where, dims[layer] <= MAX_LAYERS, f"{layer} of at most {MAX_LAYERS}", dims)


def _check_lists(where: str | Path, metadata: Mapping) -> None:
    """alignment_heads and suppress_tokens."""
    dims, heads, tokens = metadata["dims"], metadata["alignment_heads"], metadata["suppress_tokens"]
    limits = [dims["n_text_layer"], dims["n_text_head"]]
    _want(f"{where}: alignment_heads", heads is None or isinstance(heads, list) and all(
        _below(pair, limits) for pair in heads), "null or a list of [layer, head]", heads)
    _want(f"{where}: suppress_tokens", tokens is None or isinstance(tokens, list) and _below(
        tokens, [dims["n_vocab"]] * len(tokens)), "null or a list of token ids below n_vocab", tokens)


def _check_quantization(where: str | Path, metadata: Mapping) -> None:
    """quantization: null, or scheme, weights, keep_float, and what a scheme or a newer minigate adds to them."""
    dims, quantization, where = metadata["dims"], metadata["quantization"], f"{where}: quantization"
    if quantization is None:
        return
    _want(where, isinstance(quantization, dict), "null or an object", quantization)
    scheme, weights, kept = (quantization.get(key) for key in ("scheme", "weights", "keep_float"))
    _want(f"{where}: scheme", scheme in SCHEMES, " or ".join(SCHEMES), scheme)
    _want(f"{where}: weights", weights in ("per-channel", "per-tensor"), "per-channel or per-tensor", weights)
    layers = keepable(dims, scheme)
    _want(f"{where}: keep_float", isinstance(kept, list) and all(layer in layers for layer in kept),
          "a list of layers like decoder.blocks.0.mlp.2", kept)
    helpers = quantization.get("helpers")
    _want(f"{where}: helpers", helpers is None or isinstance(helpers, dict) and set(helpers) <= set(HELPERS),
          f"an object with any of {', '.join(HELPERS)}", helpers)
    diffuses = (helpers or {}).get("error_diffusion", False)  # which says how to compute
    _want(f"{where}: helpers: error_diffusion", diffuses is False or diffuses is True and scheme == "w8a8-static",
          "false, or true in w8a8-static", diffuses)
    if scheme == "w8a8-static":
        _check_ranges(f"{where}: ranges", quantization.get("ranges"), graph.points(dims, metadata["gate"]["kind"]))
        calibration = quantization.get("calibration")
        _want(f"{where}: calibration", isinstance(calibration, dict) and set(calibration) == set(CALIBRATION),
              f"an object with {', '.join(CALIBRATION)}", calibration)


def _check_ranges(where: str, ranges: object, points: Mapping[str, tuple]) -> None:
    _want(where, isinstance(ranges, dict), "an object with a range for each tensor", ranges)
    for point in (*points, *ranges):
        _want(where, point in points, "tensors of this network only", point)
        pair = ranges.get(point)
        _want(f"{where}: {point}", isinstance(pair, list) and len(pair) == 2 and all(
            type(n) in (int, float) and abs(n) <= MAX_RANGE for n in pair) and pair[0] <= 0 <= pair[1],
              "finite numbers [low, high] around 0", pair)


def _below(numbers: object, limits: list[int]) -> bool:
    return isinstance(numbers, list) and len(numbers) == len(limits) and all(
        type(n) is int and 0 <= n < limit for n, limit in zip(numbers, limits, strict=True))


def _want(field: str, good: bool, expected: str, got: object) -> None:
    if not good:
        raise FileError(f"{field}: expected {expected}, got {show(got)}")


# --- the file ---


def read(path: str | Path) -> ModelFile:
    """Model file -> ModelFile, checked. Raises FileError naming the file and what is wrong with it."""
    pairs, tensors = tensorfile.read(path)
    if pairs.get("format") != "minigate" or "minigate" not in pairs:
        raise FileError(f"{path}: expected a minigate model, got a safetensors file without its metadata; convert "
                        "others with python -m minigate.convert SRC OUT.safetensors")
    try:
        metadata = json.loads(pairs["minigate"])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: metadata: expected JSON, got {show(str(error))}") from None
    _want(f"{path}: metadata", isinstance(metadata, dict), "a JSON object", metadata)
    check(metadata, tensors, path)
    return ModelFile(metadata, tensors, Path(path))


def write(path: str | Path, metadata: Mapping, tensors: Mapping[str, np.ndarray], float_dtype: str | None = None,
          progress: Callable[[int], object] | None = None) -> None:
    """Check, then write a model file whole or not at all; float_dtype and progress as in tensorfile.write."""
    check(metadata, tensors, path)
    pairs = {"format": "minigate", "minigate": json.dumps(metadata, allow_nan=False)}
    tensorfile.write(path, tensors, pairs, float_dtype, progress)
