"""The model file: what it must hold, reading it, writing it.

One safetensors file. Its metadata is {"format": "minigate", "minigate": JSON}, its tensors carry openai/whisper's names,
and "tokenizer.vocabulary" holds every ordinary token. Shapes: C n_mels, D n_state, H n_head, F = 4 D.
"""
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import tensorfile
from .errors import FileError
from .tensorfile import show

FORMAT_VERSION = 1
DIMS = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer",
        "n_vocab", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer")
GATE_KINDS = ("none", "per_head", "per_head_mlp", "all_heads", "elementwise")
GATE_HIDDEN = 4  # hidden units of the per_head_mlp gate
SCHEMES = ("w8a8-dynamic",)
MAX_LAYERS = 256  # a bound on what a damaged file can ask for; the largest Whisper has 32
VOCABULARY = "tokenizer.vocabulary"


@dataclass(frozen=True)
class ModelFile:
    """A model file that has passed check(). tensors are read-only views of the mapped file."""
    metadata: dict
    tensors: Mapping[str, np.ndarray]
    path: Path

    @property
    def vocabulary(self) -> list[bytes]:
        """The ordinary tokens in rank order."""
        return unpack_vocabulary(self.tensors[VOCABULARY])


def pack_vocabulary(tokens: list[bytes]) -> np.ndarray:
    """Tokens in rank order, each of at most 255 bytes -> (n,) u8: for each one length byte, then its bytes."""
    if any(len(token) > 255 for token in tokens):
        raise FileError(f"vocabulary: expected tokens of at most 255 bytes, got {max(map(len, tokens))}")
    return np.frombuffer(b"".join(bytes([len(token)]) + token for token in tokens), np.uint8)


def unpack_vocabulary(packed: np.ndarray) -> list[bytes]:
    """The reverse of pack_vocabulary. Raises FileError when it ends within a token or holds one twice."""
    data, at, tokens = packed.tobytes(), 0, []
    while at < len(data):
        end = at + 1 + data[at]
        tokens.append(data[at + 1:end])
        at = end
    if at != len(data) or len(set(tokens)) != len(tokens):
        raise FileError(f"{VOCABULARY}: expected different tokens of the lengths they state, got {len(tokens)} tokens, "
                        f"{len(set(tokens))} different, in {len(data)} of {at} bytes")
    return tokens


def make_metadata(name: str, dims: Mapping[str, int], provenance: Mapping[str, object], *, gate: Mapping | None = None,
                  quantization: Mapping | None = None, audio_context: str = "full",
                  alignment_heads: list | None = None, suppress_tokens: list | None = None) -> dict:
    """The metadata of a model file, every key present. alignment_heads: [[layer, head], ...] of the cross-attention."""
    return {"format_version": FORMAT_VERSION, "name": name, "dims": {key: int(dims[key]) for key in DIMS},
            "gate": dict(gate or {"kind": "none"}), "quantization": quantization and dict(quantization),
            "audio_context": audio_context, "alignment_heads": alignment_heads, "suppress_tokens": suppress_tokens,
            "provenance": dict(provenance)}


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


def _block_shapes(name: str, D: int, H: int, gate_kind: str, attentions: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for part in attentions:
        for linear in ("query", "key", "value", "out"):
            shapes[f"{name}.{part}.{linear}.weight"] = (D, D)
            if linear != "key":  # Whisper's keys have no bias: it would add the same to every score of a query
                shapes[f"{name}.{part}.{linear}.bias"] = (D,)
        shapes |= {f"{name}.{part}.gate.{key}": shape for key, shape in gate_shapes(gate_kind, D, H).items()}
        shapes |= _norm_shapes(f"{name}.{part}_ln", D)
    shapes |= {f"{name}.mlp.0.weight": (4 * D, D), f"{name}.mlp.0.bias": (4 * D,),
               f"{name}.mlp.2.weight": (D, 4 * D), f"{name}.mlp.2.bias": (D,)}
    return shapes | _norm_shapes(f"{name}.mlp_ln", D)


def gate_shapes(kind: str, D: int, H: int) -> dict[str, tuple[int, ...]]:
    """The gate tensors of one attention module with H heads of D // H: name below "….gate." -> shape."""
    if kind == "per_head_mlp":
        return {"0.weight": (H, GATE_HIDDEN, D // H), "0.bias": (H, GATE_HIDDEN), "2.weight": (H, GATE_HIDDEN), "2.bias": (H,)}
    weights = {"none": None, "per_head": (H, D // H), "all_heads": (H, D), "elementwise": (D, D)}
    weight = weights[kind]
    return {} if weight is None else {"weight": weight, "bias": weight[:1]}


def quantizable(dims: Mapping[str, int]) -> list[str]:
    """The layers whose "….weight" an int8 model stores as int8: linears, convolutions, token embedding; gates are not."""
    shapes = tensor_shapes(dims)
    return [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1 and name.endswith(".weight")]


def expected_tensors(metadata: Mapping) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, "int8" | "float32" | "float" (float32 or float16)) for dims, gate and quantization in metadata."""
    dims, quantization = metadata["dims"], metadata["quantization"]
    expected = {name: (shape, "float") for name, shape in tensor_shapes(dims, metadata["gate"]["kind"]).items()}
    if quantization:
        for layer in quantizable(dims):
            if layer not in quantization["keep_float"]:
                shape = expected[f"{layer}.weight"][0]
                expected[f"{layer}.weight"] = shape, "int8"
                expected[f"{layer}.scale"] = shape[:1] if quantization["weights"] == "per-channel" else (), "float32"
    return expected


def check(metadata: Mapping, tensors: Mapping[str, np.ndarray], where: str | Path = "model") -> None:
    """Raise FileError, beginning with where, unless metadata is complete and tensors are exactly what it demands."""
    _check_metadata(where, metadata)
    check_tensors(where, tensors, expected_tensors(metadata) | {VOCABULARY: (None, "uint8")})
    try:
        n_tokens, n_vocab = len(unpack_vocabulary(tensors[VOCABULARY])), metadata["dims"]["n_vocab"]
    except FileError as error:
        raise FileError(f"{where}: {error}") from None
    if not 0 < n_tokens < n_vocab:
        raise FileError(f"{where}: {VOCABULARY}: expected 1 to {n_vocab - 1} tokens (n_vocab {n_vocab}), got {n_tokens}")


def check_tensors(where: str | Path, tensors: Mapping[str, np.ndarray],
                  expected: Mapping[str, tuple[tuple[int, ...] | None, str]]) -> None:
    """Raise FileError unless tensors are the expected ones: name -> (shape or None for (n,), kind of dtype)."""
    for name in tensors:
        if name not in expected:
            raise FileError(f"{where}: tensor {show(name)}: expected no such tensor for these dims, gate and quantization")
    for name, (shape, kind) in expected.items():
        if name not in tensors:
            raise FileError(f"{where}: tensor {name}: expected for these dims, gate and quantization, got none")
        got, dtype = tensorfile.kind_of(tensors, name)
        dtypes = ("float32", "float16") if kind == "float" else (kind,)
        if (len(got) != 1 if shape is None else got != shape) or dtype.name not in dtypes:
            raise FileError(f"{where}: tensor {name}: expected {shape or '(n,)'} {' or '.join(dtypes)}, got {got} {dtype}")
        if kind == "int8" and tensors[name].min() < -127:
            raise FileError(f"{where}: tensor {name}: expected values from -127 to 127, got -128")
        if kind == "float32" and not (np.isfinite(tensors[name]).all() and (tensors[name] > 0).all()):
            raise FileError(f"{where}: tensor {name}: expected positive finite scales, got {tensors[name].min()}")


def check_dims(where: str | Path, dims: object) -> None:
    """Raise FileError unless dims are those of a model that can be computed."""
    def want(good: bool, text: str) -> None:
        if not good:
            raise FileError(f"{where}: dims: expected {text}, got {show(dims)}")

    want(isinstance(dims, dict) and set(dims) == set(DIMS) and all(type(n) is int and n > 0 for n in dims.values()),
         f"positive integers {' '.join(DIMS)}")
    want(dims["n_audio_state"] == dims["n_text_state"], "n_text_state equal to n_audio_state")
    want(dims["n_audio_state"] % dims["n_audio_head"] == 0 == dims["n_text_state"] % dims["n_text_head"],
         "n_state divisible by n_head")
    want(max(dims["n_audio_layer"], dims["n_text_layer"]) <= MAX_LAYERS, f"at most {MAX_LAYERS} layers")


def _check_metadata(where: str | Path, metadata: Mapping) -> None:
    def want(field: str, good: bool, text: str, got: object) -> None:
        if not good:
            raise FileError(f"{where}: metadata: {field}: expected {text}, got {show(got)}")

    version = metadata.get("format_version")
    want("format_version", version == FORMAT_VERSION, f"{FORMAT_VERSION} (made by another minigate?)", version)
    names = set(make_metadata("", dict.fromkeys(DIMS, 1), {}))
    want("keys", names <= metadata.keys(), " ".join(sorted(names)), sorted(metadata))
    want("name", isinstance(metadata["name"], str), "a string", metadata["name"])
    dims, gate = metadata["dims"], metadata["gate"]
    check_dims(where, dims)
    want("gate", isinstance(gate, dict) and gate.get("kind") in GATE_KINDS, f"kind of {' '.join(GATE_KINDS)}", gate)
    want("gate", gate["kind"] == "none" or all(type(gate.get(k)) in (int, float) for k in ("init", "scale")),
         "numbers init and scale", gate)
    want("audio_context", metadata["audio_context"] in ("full", "variable"), "full or variable", metadata["audio_context"])
    want("provenance", isinstance(metadata["provenance"], dict), "an object", metadata["provenance"])
    _check_lists(want, metadata)


def _check_lists(want: Callable[[str, bool, str, object], None], metadata: Mapping) -> None:
    """The fields of metadata that are lists: alignment_heads, suppress_tokens, quantization's keep_float."""
    dims, heads, tokens = metadata["dims"], metadata["alignment_heads"], metadata["suppress_tokens"]
    want("alignment_heads", heads is None or isinstance(heads, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
        and 0 <= pair[0] < dims["n_text_layer"] and 0 <= pair[1] < dims["n_text_head"] for pair in heads),
        "null or a list of [layer, head]", heads)
    want("suppress_tokens", tokens is None or isinstance(tokens, list) and all(
        type(n) is int and 0 <= n < dims["n_vocab"] for n in tokens), "null or a list of token ids below n_vocab", tokens)
    quantization = metadata["quantization"]
    if quantization is None:
        return
    want("quantization", isinstance(quantization, dict) and quantization.get("scheme") in SCHEMES
         and quantization.get("weights") in ("per-channel", "per-tensor") and isinstance(quantization.get("keep_float"), list),
         f"null or scheme of {' '.join(SCHEMES)}, weights per-channel or per-tensor, and the list keep_float", quantization)
    layers = quantizable(dims)
    for layer in quantization["keep_float"]:
        want("quantization: keep_float", layer in layers, "names of layers like decoder.blocks.0.mlp.2", layer)


def read(path: str | Path) -> ModelFile:
    """Model file -> ModelFile, checked. Raises FileError naming the file and what is wrong with it."""
    pairs, tensors = tensorfile.read(path)
    if pairs.get("format") != "minigate" or "minigate" not in pairs:
        raise FileError(f"{path}: expected a minigate model, got a safetensors file without its metadata; make one with "
                        "python -m minigate.convert SRC OUT.safetensors")
    try:
        metadata = json.loads(pairs["minigate"])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: metadata: expected JSON, got {show(str(error))}") from None
    if not isinstance(metadata, dict):
        raise FileError(f"{path}: metadata: expected a JSON object, got {show(metadata)}")
    check(metadata, tensors, path)
    return ModelFile(metadata, tensors, Path(path))


def write(path: str | Path, metadata: Mapping, tensors: Mapping[str, np.ndarray], float_dtype: str | None = None,
          progress: Callable[[int], object] | None = None) -> None:
    """Check, then write a model file whole or not at all; float_dtype and progress as in tensorfile.write."""
    check(metadata, tensors, path)
    pairs = {"format": "minigate", "minigate": json.dumps(metadata, allow_nan=False)}
    tensorfile.write(path, tensors, pairs, float_dtype, progress)
