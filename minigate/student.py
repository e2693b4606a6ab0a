"""A student from its teacher: which layers it keeps, how its gates begin, which of its parameters are trained.

In: a teacher's metadata and tensors. Out: the student's, as `checkpoint.write` takes them.
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from minigate.attention import GATE_KINDS, gate_shapes
from minigate.errors import UsageError

PARTS = {  # what can be frozen: pattern of the parameters' names
    "encoder": r"encoder\.",
    "decoder": r"decoder\.",
    "embedding": r"decoder\.(token_embedding\.weight|positional_embedding)$",
    "gates": r".*\.gate\.",
}
CONSTANT = "encoder.positional_embedding"  # sinusoids, no parameter of Whisper's


def make_student(
    metadata: Mapping,
    tensors: Mapping[str, np.ndarray],
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    gate: str = "none",
    gate_init: float = 0.5,
    seed: int = 0,
    audio_context: str = "full",
) -> tuple[dict, dict[str, np.ndarray]]:
    """A float model without gates -> metadata and tensors (float32 copies) of a student that starts from its layers.

    Layers: None keeps all. With all of them the student computes its teacher's function, as every gate begins as the
    identity: its last linear has weights 0 and bias logit(gate_init), and gate_scale is 1 / gate_init. `seed` is of the
    hidden layer of per_head_mlp. Alignment heads of dropped layers are dropped; None, unknown, if none is left.
    audio_context: full or variable. UsageError for what is not possible.
    """
    _check(metadata, gate, gate_init, audio_context)
    dims = dict(metadata["dims"])
    kept = {
        "encoder": choose_layers("encoder_layers", dims["n_audio_layer"], encoder_layers),
        "decoder": choose_layers("decoder_layers", dims["n_text_layer"], decoder_layers),
    }
    dims |= {"n_audio_layer": len(kept["encoder"]), "n_text_layer": len(kept["decoder"])}
    student = _kept_tensors(tensors, kept)
    if gate != "none":
        student |= start_gates(dims, gate, gate_init, np.random.default_rng(seed))
    provenance = {
        "source": f"student of {metadata['name']}",
        "teacher": {"name": metadata["name"], **metadata["provenance"]},
        "encoder_layers": kept["encoder"],
        "decoder_layers": kept["decoder"],
        "seed": seed,
    }
    gate_start = {"kind": gate} if gate == "none" else {"kind": gate, "init": gate_init, "scale": 1 / gate_init}
    return {
        **metadata, "name": f"{metadata['name']}-student", "dims": dims, "gate": gate_start,
        "audio_context": audio_context, "alignment_heads": _kept_heads(metadata["alignment_heads"], kept["decoder"]),
        "provenance": provenance,
    }, student  # fmt: skip


def _check(metadata: Mapping, gate: str, gate_init: float, audio_context: str) -> None:
    if metadata["quantization"]:
        scheme = metadata["quantization"]["scheme"]
        raise UsageError(f"teacher: expected a float model, got {metadata['name']}, quantized as {scheme}; "
                         "make one with python -m minigate.convert")  # fmt: skip
    if metadata["gate"]["kind"] != "none":
        kind = metadata["gate"]["kind"]
        raise UsageError(f"teacher: expected a model without gates, got {metadata['name']} with gate {kind}")
    if gate not in GATE_KINDS:
        raise UsageError(f"gate: expected one of {', '.join(GATE_KINDS)}, got {gate!r}")
    if not 0 < gate_init < 1:
        raise UsageError(f"gate_init: expected a number above 0 and below 1, got {gate_init}")
    if audio_context not in ("full", "variable"):
        raise UsageError(f"audio_context: expected full or variable, got {audio_context!r}")


def choose_layers(argument: str, n_layers: int, n_kept: int | None) -> list[int]:
    """n_kept of 0 … n_layers - 1 (None: all), evenly spaced, rounded down, the first and the last among them; a single
    one is the last. Source: Distil-Whisper's create_student_model.py. UsageError, naming `argument`, for other numbers.
    """
    n_kept = n_layers if n_kept is None else n_kept
    if type(n_kept) is not int or not 1 <= n_kept <= n_layers:
        raise UsageError(f"{argument}: expected 1 to {n_layers}, the teacher's, got {n_kept}")
    return [i * (n_layers - 1) // (n_kept - 1) for i in range(n_kept)] if n_kept > 1 else [n_layers - 1]


def _kept_tensors(tensors: Mapping[str, np.ndarray], kept: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    """Copies: floats as float32, blocks under their new numbers, those of dropped layers left out."""
    student = {}
    for name in tensors:
        block = re.match(r"(encoder|decoder)\.blocks\.(\d+)\.", name)
        new_name = name
        if block:
            side, layer = block[1], int(block[2])
            if layer not in kept[side]:
                continue
            new_name = f"{side}.blocks.{kept[side].index(layer)}.{name[block.end() :]}"
        array = tensors[name]
        student[new_name] = np.array(array, np.float32 if array.dtype.kind == "f" else array.dtype)
    return student


def _kept_heads(heads: list | None, kept: list[int]) -> list | None:
    """[[layer, head], …] of the teacher -> of the student."""
    if not heads:
        return heads
    return [[kept.index(layer), head] for layer, head in heads if layer in kept] or None


def start_gates(dims: Mapping[str, int], kind: str, init: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The parameters of all gates, float32, so that sigmoid(gate_logits) = init for every input.

    The hidden layer of per_head_mlp is normal with variance 2 / d_head (He et al., arXiv 1502.01852), its bias 0.
    """
    gates = {}
    for side, part, modules in (("encoder", "audio", ("attn",)), ("decoder", "text", ("attn", "cross_attn"))):
        shapes = gate_shapes(kind, dims[f"n_{part}_state"], dims[f"n_{part}_head"])
        for block in (f"{side}.blocks.{i}" for i in range(dims[f"n_{part}_layer"])):
            for module in modules:
                for name, shape in shapes.items():
                    gates[f"{block}.{module}.gate.{name}"] = _start(name, shape, init, rng)
    return gates


def _start(name: str, shape: tuple[int, ...], init: float, rng: np.random.Generator) -> np.ndarray:
    if name == "0.weight":
        return (math.sqrt(2 / shape[-1]) * rng.standard_normal(shape)).astype(np.float32)
    is_last_bias = name in ("bias", "2.bias")
    return np.full(shape, math.log(init / (1 - init)) if is_last_bias else 0, np.float32)


def frozen_names(names: Iterable[str], parts: Iterable[str]) -> frozenset[str]:
    """Those of the parameters `names` that are not trained: the encoder's positions and all that belongs to `parts`.

    encoder and decoder include their gates, decoder its embeddings. UsageError for an unknown part or when nothing is
    left to train.
    """
    parts = tuple(parts)
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"freeze: expected some of {', '.join(PARTS)}, got {part!r}")
    names = set(names)
    frozen = {name for name in names if name == CONSTANT or any(re.match(PARTS[part], name) for part in parts)}
    if frozen == names:
        raise UsageError(f"freeze: expected something left to train, got {', '.join(parts)}")
    return frozenset(frozen)
