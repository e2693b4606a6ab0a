"""Weights to int8 and back: w ≈ scale * q, q in [-127, 127], a scale per output channel or one for the tensor.

Which tensors of a model are int8 follows from its metadata (`checkpoint.expected_tensors`); the scale of `X.weight` is
`X.scale`, that of a positional embedding has `.scale` behind its name.

Rounding is to nearest, or with the feedback of errors (errorfeedback.py) where it is known what the weights multiply.

N output channels, K inputs.
"""

from collections.abc import Mapping

import numpy as np

from minigate import checkpoint
from minigate.errorfeedback import round_with_feedback
from minigate.ops import conv_matrix, conv_weight

Q_MAX = 127  # weights are symmetric: -127 to 127


def quantize_weight(w: np.ndarray, per_channel: bool = True, moments: np.ndarray | None = None
                    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """w (N, …) -> q int8 of the same shape, scale (N,) or () float32; a channel of zeros has scale 1.

    moments (K, K): E[x xᵀ] of what w multiplies, a convolution's as `ops.conv_rows` orders it; for error feedback.
    """
    w = np.asarray(w, np.float32)
    largest = np.abs(w).max(axis=tuple(range(1, w.ndim))) if per_channel else np.abs(w).max()
    scale = np.asarray(largest / np.float32(Q_MAX), np.float32)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    if moments is not None:
        is_conv = w.ndim == 3
        q = round_with_feedback(conv_matrix(w) if is_conv else w, scale, moments, Q_MAX)
        return conv_weight(q) if is_conv else q, scale
    q = np.rint(w / scale.reshape(scale.shape + (1,) * (w.ndim - scale.ndim)))
    return q.astype(np.int8), scale


def quantize_weights(metadata: Mapping, tensors: Mapping[str, np.ndarray],
                     moments: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    """A float model's tensors -> those of a model with this metadata, the quantization included.

    What stays float is kept in float16 where that loses nothing. moments: linear or convolution -> as in
    `quantize_weight`; those that are not in it are rounded to nearest.
    """
    expected, out = checkpoint.expected_tensors(metadata), {}
    for name, array in tensors.items():
        if expected.get(name, (None, ""))[1] == "int8":
            scale = checkpoint.scale_name(name)
            own = (moments or {}).get(checkpoint.module_of(name))
            out[name], out[scale] = quantize_weight(array, expected[scale][0] != (), own)
        else:
            out[name] = smallest_float(array)
    return out


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
            scale = np.asarray(tensors[checkpoint.scale_name(name)], np.float32)
            out[name] = array * scale.reshape(scale.shape + (1,) * (array.ndim - scale.ndim))
        elif not name.endswith(".scale"):
            out[name] = np.asarray(array, np.float32) if array.dtype == np.float16 else array
    return {**metadata, "quantization": None}, out
