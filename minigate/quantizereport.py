"""What there is to say about a quantized model: its scheme, what calibration found, ranges, and bytes by part."""

from collections.abc import Mapping

import numpy as np

from minigate import checkpoint, graph
from minigate.report import aligned

OPTIONS = {"smoothquant": "SmoothQuant", "bias_correction": "bias correction", "equalize": "equalization",
           "rotate": "rotation", "error_feedback": "error feedback", "error_diffusion": "error diffusion"}  # fmt: skip


def inspect(metadata: Mapping, tensors: Mapping[str, np.ndarray]) -> str:
    """A model -> lines for the screen."""
    quantization = metadata["quantization"]
    lines = [f"{metadata['name']}: {summary(metadata, tensors)}"]
    if quantization:
        lines += [f"helpers: {_helpers(quantization.get('helpers') or {})}"]
        if "calibration" in quantization:
            lines += [f"calibration: {_calibration(quantization['calibration'])}"]
        kept = quantization["keep_float"]
        lines += [f"kept in float: {' '.join(kept) or 'nothing'}"]
    lines += ["", *aligned(size_rows(metadata, tensors))]
    if quantization and "ranges" in quantization:
        lines += ["", *aligned(range_rows(metadata))]
    return "\n".join(line.rstrip() for line in lines)


def summary(metadata: Mapping, tensors: Mapping[str, np.ndarray]) -> str:
    """One line: scheme, parameters, bytes, and their share of the same model in float32, gate networks apart."""
    quantization, scheme = metadata["quantization"], "float"
    if quantization:
        scheme = f"{quantization['scheme']}, weights {quantization['weights']}"
    gates = sum(array.nbytes for name, array in tensors.items() if ".gate." in name)
    size = sum(array.nbytes for array in tensors.values())
    share = 100 * (size - gates) / (float32_bytes(metadata) + tensors[checkpoint.VOCABULARY].nbytes)
    apart = f" without {gates / 1e6:.2f} MB of gates" if gates else ""
    return f"{scheme}, {size_report(tensors)}, {share:.1f} % of float32{apart}"


def size_report(tensors: Mapping[str, np.ndarray]) -> str:
    """Values and bytes, for a line on the screen."""
    values, size = sum(a.size for a in tensors.values()), sum(a.nbytes for a in tensors.values())
    return f"{values / 1e6:.1f} M values, {size / 1e6:.1f} MB"


def float32_bytes(metadata: Mapping) -> int:
    """Of all parameters but the gates'."""
    return 4 * sum(int(np.prod(shape)) for shape in checkpoint.tensor_shapes(metadata["dims"]).values())


def part_of(name: str) -> str:
    """The part of a model that a tensor's bytes are counted in: a block, a layer outside of the blocks, the gates."""
    if ".gate." in name:
        return "gates"
    words = name.split(".")
    return ".".join(words[:3] if "blocks" in words else words[:2])


def size_rows(metadata: Mapping, tensors: Mapping[str, np.ndarray]) -> list[tuple[str, ...]]:
    """A row for each part: its values, and kB by type."""
    kinds, parts = ("int8", "float32", "float16", "uint8"), {}
    for name in checkpoint.expected_tensors(metadata) | {checkpoint.VOCABULARY: None}:
        part = parts.setdefault(part_of(name), dict.fromkeys(("values", *kinds), 0))
        part["values"] += tensors[name].size
        part[tensors[name].dtype.name] += tensors[name].nbytes
    parts["all"] = {key: sum(part[key] for part in parts.values()) for key in ("values", *kinds)}
    kinds = [kind for kind in kinds if parts["all"][kind]]
    rows = [("part", "values", *(f"{kind} kB" for kind in kinds), "kB")]
    for name, part in parts.items():
        sizes = [part[kind] for kind in kinds]
        rows.append((name, str(part["values"]), *(f"{size / 1e3:.1f}" for size in (*sizes, sum(sizes)))))
    return rows


def range_rows(metadata: Mapping) -> list[tuple[str, ...]]:
    """A row for each point, in the network's order: its range, scale and zero point, and in what it is held."""
    ranges, grids = metadata["quantization"]["ranges"], graph.grids(metadata)
    held_float = graph.held_float(metadata)
    rows = [("tensor", "low", "high", "scale", "zero point", "held")]
    for point in graph.points(metadata["dims"], metadata["gate"]["kind"]):
        (low, high), (scale, zero_point) = ranges[point], grids[point]
        rows.append((point, f"{low:.5g}", f"{high:.5g}", f"{scale:.5g}", str(zero_point),
                     "float" if point in held_float else "int8"))  # fmt: skip
    return rows


def _helpers(helpers: Mapping) -> str:
    used = [text + (f" {helpers[name]}" if name == "smoothquant" else "")
            for name, text in OPTIONS.items() if helpers.get(name) not in (None, False)]  # fmt: skip
    return ", ".join(used) or "none"


def _calibration(found: Mapping) -> str:
    percentile = f" {found['percentile']}" if found["percentile"] is not None else ""
    return (f"{found['method']}{percentile} over {found['batches']} batches, {found['windows']} different windows, "
            f"seed {found['seed']}, sound {found['sha256']}")  # fmt: skip
