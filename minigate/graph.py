"""The network as `w8a8-static` sees it: which tensors are held in int8, who makes and who reads them, what stays float.

    x ≈ scale * (q - zero_point), q int8, scale and zero point of a tensor fixed at calibration (`grid`)

A *point* is a tensor of the forward pass, named after the operator that makes it; `X.attn` is the probabilities times
v, `X.attn.gate` the same after the gate, and a linear with a residual makes the residual stream after it. A *module* is
what computes and may be kept in float: a convolution, linear, layer norm, an attention's two products (`X.attn`), the
adding of the encoder's positions, the embedding.

A kept module computes in float from inputs that are held in float, and its output is held in float: so a point is in
float when its maker or one of its readers is kept. An int8 reader of such a point quantizes it by the point's range.
"""

import difflib
from collections.abc import Iterable, Mapping

import numpy as np

from minigate.errors import UsageError

Q_MIN, Q_MAX = -128, 127
STEPS = Q_MAX - Q_MIN  # of a grid, between its smallest and its largest value
PAPER = "paper"  # what Wagner et al. (Interspeech 2024) keep in float: the encoder's last block and final layer norm


def points(dims: Mapping[str, int], gate_kind: str) -> dict[str, tuple[str, ...]]:
    """Every point, in the order in which the data passes them -> the modules that read it."""
    found = {"mel": ("encoder.conv1",), "encoder.conv1": ("encoder.conv2",),
             "encoder.conv2": ("encoder.positional_embedding",)}  # fmt: skip
    stream = "encoder.positional_embedding"
    for i in range(dims["n_audio_layer"]):
        stream = _block_points(found, f"encoder.blocks.{i}", stream, ("attn",), gate_kind)
    found[stream] = ("encoder.ln_post",)
    cross = [f"decoder.blocks.{i}.cross_attn" for i in range(dims["n_text_layer"])]
    found["encoder.ln_post"] = tuple(f"{module}.{part}" for module in cross for part in ("key", "value"))
    stream = "decoder.embed"
    for i in range(dims["n_text_layer"]):
        stream = _block_points(found, f"decoder.blocks.{i}", stream, ("attn", "cross_attn"), gate_kind)
    found[stream] = ("decoder.ln",)
    found["decoder.ln"] = ("decoder.token_embedding",)
    return found


def _block_points(found: dict, block: str, stream: str, attentions: tuple[str, ...], gate_kind: str) -> str:
    """Add a block's points, its input first -> the point of the residual stream that it ends with, not added yet."""
    gated = gate_kind != "none"
    for attention in attentions:
        module = f"{block}.{attention}"
        found[stream] = (f"{module}_ln", f"{module}.out")
        own = ("query",) if attention == "cross_attn" else ("query", "key", "value")
        found[f"{module}_ln"] = (*(f"{module}.{part}" for part in own), *[module] * gated)
        found |= {f"{module}.{part}": (module,) for part in ("query", "key", "value")}
        found[module] = (module if gated else f"{module}.out",)
        if gated:
            found[f"{module}.gate"] = (f"{module}.out",)
        stream = f"{module}.out"
    found[stream] = (f"{block}.mlp_ln", f"{block}.mlp.2")
    found[f"{block}.mlp_ln"] = (f"{block}.mlp.0",)
    found[f"{block}.mlp.0"] = (f"{block}.mlp.2",)
    return f"{block}.mlp.2"


def reads(dims: Mapping[str, int], gate_kind: str) -> dict[str, tuple[str, ...]]:
    """Module -> the points that it reads. Of a linear the last is its operand, the first its residual if it has one."""
    found: dict[str, tuple[str, ...]] = {}
    for point, readers in points(dims, gate_kind).items():
        for module in readers:
            found[module] = (*found.get(module, ()), point)
    return found


def maker(point: str) -> str:
    """The module that makes a point; "mel" for the input."""
    return point.removesuffix(".gate")


def modules(dims: Mapping[str, int]) -> list[str]:
    """Everything that may be kept in float, in the order in which the data passes it."""
    made = [point for point in points(dims, "none") if point != "mel"]
    return [*made, "decoder.token_embedding"]


def expand_keep_float(names: Iterable[str], dims: Mapping[str, int]) -> list[str]:
    """Modules, prefixes of them (`encoder.blocks.3`) or "paper" -> the modules, each once, in the network's order.

    A module's full name is that module alone, even where others' names begin with it (`X.attn`). UsageError, with the
    nearest name, for one that fits nothing.
    """
    known, kept = modules(dims), set()
    for name in names:
        if name == PAPER:
            last = f"encoder.blocks.{dims['n_audio_layer'] - 1}."
            matches = [module for module in known if module.startswith(last) or module == "encoder.ln_post"]
        elif name in known:
            matches = [name]
        else:
            matches = [module for module in known if module.startswith(f"{name}.")]
        if not matches:
            raise UsageError(f"keep_float: expected a layer, a prefix of layers or {PAPER}, got {name!r}; "
                             f"the nearest is {nearest(name, known)}")  # fmt: skip
        kept.update(matches)
    return [module for module in known if module in kept]


def nearest(name: str, known: list[str]) -> str:
    """The module, or prefix of modules, that a misspelt name resembles most."""
    prefixes = {module.rsplit(".", n)[0] for module in known for n in range(module.count(".") + 1)}
    choices = sorted(prefixes | {PAPER})
    return difflib.get_close_matches(name, choices, n=1, cutoff=0)[0]


def held_float(metadata: Mapping) -> set[str]:
    """The points of a `w8a8-static` model that are held in float."""
    kept = set(metadata["quantization"]["keep_float"])
    found = points(metadata["dims"], metadata["gate"]["kind"])
    return {point for point, readers in found.items() if maker(point) in kept or kept.intersection(readers)}


def diffuses(metadata: Mapping) -> bool:
    """Whether a `w8a8-static` model's probabilities are rounded with what was left of those before."""
    return (metadata["quantization"].get("helpers") or {}).get("error_diffusion", False)


def grid(low: float, high: float) -> tuple[np.float32, int]:
    """The range of a point -> scale and zero point of its int8 values. The range is widened to contain 0, which is
    always exact; of a range too small for float32's normal numbers the scale is 1.

    ValueError for a range that is not finite, or that runs backwards.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if not np.isfinite(high - low):
        raise ValueError(f"range: expected finite numbers, got {low} to {high}")
    scale = np.float32((high - low) / STEPS)
    if scale < np.finfo(np.float32).tiny:
        scale = np.float32(1)
    return scale, int(np.clip(np.rint(Q_MIN - low / float(scale)), Q_MIN, Q_MAX))


def grids(metadata: Mapping) -> dict[str, tuple[np.float32, int]]:
    """Scale and zero point of every point of a `w8a8-static` model."""
    return {point: grid(*pair) for point, pair in metadata["quantization"]["ranges"].items()}
