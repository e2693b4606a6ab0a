"""Weights to int8 and back: a float model file's tensors -> a quantized one's.

`w8a8-dynamic`: every linear, both convolutions and the token embedding become symmetric int8, w ≈ scale * q with q in
[-127, 127] and one scale per output channel; activations get theirs at run time (`int8.Dynamic`). Biases, layer norms,
positions and gates stay float.

N output channels, K inputs.
"""

from collections.abc import Mapping

import numpy as np

from minigate import checkpoint
from minigate.errors import UsageError

Q_MAX = 127


def quantize_weight(w: np.ndarray, per_channel: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """w (N, …) -> q int8 of the same shape, scale (N,) or () float32; an all-zero channel has scale 1."""
    w = np.asarray(w, np.float32)
    largest = np.abs(w).max(axis=tuple(range(1, w.ndim))) if per_channel else np.abs(w).max()
    scale = np.where(largest > 0, largest / np.float32(Q_MAX), np.float32(1)).astype(np.float32)
    q = np.rint(w / scale.reshape(scale.shape + (1,) * (w.ndim - scale.ndim)))
    return q.astype(np.int8), scale


def quantize_dynamic(metadata: dict, tensors: Mapping[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """A float model -> its metadata and tensors as `w8a8-dynamic`, a scale per channel.

    What stays float is kept in float16 where that loses nothing. UsageError for a model that is quantized already.
    """
    if metadata.get("quantization"):
        raise UsageError(f"model: expected a float model, got one quantized as {metadata['quantization']['scheme']}")
    out, layers = {}, set(checkpoint.quantizable(metadata["dims"]))
    for name, array in tensors.items():
        if name.removesuffix(".weight") in layers and name.endswith(".weight"):
            out[name], out[name.removesuffix("weight") + "scale"] = quantize_weight(array)
        else:
            out[name] = smallest_float(array)
    quantization = {"scheme": "w8a8-dynamic", "weights": "per-channel", "keep_float": []}
    return {**metadata, "quantization": quantization}, out


def smallest_float(array: np.ndarray) -> np.ndarray:
    """float32 -> float16 if every value survives; anything else as it is."""
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else array


def dequantize(metadata: dict, tensors: Mapping[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """A quantized model -> the float model with the same weights, scale * q in float32."""
    out = {}
    for name, array in tensors.items():
        if array.dtype == np.int8:
            scale = np.asarray(tensors[name.removesuffix("weight") + "scale"], np.float32)
            out[name] = array * scale.reshape(scale.shape + (1,) * (array.ndim - scale.ndim))
        elif not name.endswith(".scale"):
            out[name] = np.asarray(array, np.float32) if array.dtype == np.float16 else array
    return {**metadata, "quantization": None}, out


def size_report(tensors: Mapping[str, np.ndarray]) -> str:
    """Parameters and bytes, for a line on the screen."""
    values, size = sum(a.size for a in tensors.values()), sum(a.nbytes for a in tensors.values())
    return f"{values / 1e6:.1f} M values, {size / 1e6:.1f} MB"
