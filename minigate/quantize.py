"""A float model -> a model in int8, by one of three schemes.

`w8a8-static`   weights and activations; an activation's scale and zero point are fixed at calibration
`w8a8-dynamic`  weights and what they are multiplied with; a row's scale is found at run time
`w8`            weights only

Weights (linears, both convolutions, the token embedding; in `w8a8-static` the positions too) are symmetric, with one
scale or one for each output channel. Biases, layer norms and gates stay float; what else does is `keep_float`.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from minigate import checkpoint, graph
from minigate.errors import UsageError
from minigate.int8weights import dequantize, quantize_weight, quantize_weights, smallest_float  # noqa: F401

WEIGHTS = {"w8a8-static": "per-tensor", "w8a8-dynamic": "per-channel", "w8": "per-channel"}  # unless told
NO_HELPERS = {"smoothquant": None, "bias_correction": False, "equalize": False, "rotate": False}


def quantize_static(metadata: Mapping, tensors: Mapping[str, np.ndarray], ranges: Mapping[str, list[float]],
                    calibration: Mapping, weights: str = WEIGHTS["w8a8-static"], keep_float: Iterable[str] = (),
                    helpers: Mapping | None = None) -> tuple[dict, dict[str, np.ndarray]]:  # fmt: skip
    """A float model, [low, high] of every point and how they were found -> metadata and tensors as `w8a8-static`.

    keep_float, helpers and errors as in `quantized`.
    """
    found = {"ranges": dict(ranges), "calibration": dict(calibration)}
    return quantized(metadata, tensors, "w8a8-static", weights, keep_float, helpers, found)


def quantize_dynamic(metadata: Mapping, tensors: Mapping[str, np.ndarray], weights: str = WEIGHTS["w8a8-dynamic"],
                     keep_float: Iterable[str] = (), helpers: Mapping | None = None
                     ) -> tuple[dict, dict[str, np.ndarray]]:  # fmt: skip
    """A float model -> its metadata and tensors as `w8a8-dynamic`; the rest as in `quantized`."""
    return quantized(metadata, tensors, "w8a8-dynamic", weights, keep_float, helpers)


def quantize_w8(metadata: Mapping, tensors: Mapping[str, np.ndarray], weights: str = WEIGHTS["w8"],
                keep_float: Iterable[str] = (), helpers: Mapping | None = None
                ) -> tuple[dict, dict[str, np.ndarray]]:  # fmt: skip
    """A float model -> its metadata and tensors as `w8`; the rest as in `quantized`."""
    return quantized(metadata, tensors, "w8", weights, keep_float, helpers)


def quantized(metadata: Mapping, tensors: Mapping[str, np.ndarray], scheme: str, weights: str,
              keep_float: Iterable[str] = (), helpers: Mapping | None = None, found: Mapping | None = None
              ) -> tuple[dict, dict[str, np.ndarray]]:  # fmt: skip
    """A float model -> metadata with its quantization, tensors. What stays float is float16 where that loses nothing.

    keep_float: as `graph.expand_keep_float` takes it; in the schemes without points only layers with weights count.
    helpers: what was done to the tensors before. found: what calibration adds. UsageError for a model that is quantized
    already, or a layer that there is not.
    """
    check_float(metadata)
    kept = graph.expand_keep_float(keep_float, metadata["dims"])
    if scheme != "w8a8-static":
        layers = checkpoint.quantizable(metadata["dims"])
        kept = [module for module in kept if module in layers]
    quantization = {"scheme": scheme, "weights": weights, "keep_float": kept,
                    "helpers": {**NO_HELPERS, **(helpers or {})}, **(found or {})}  # fmt: skip
    metadata = {**metadata, "quantization": quantization}
    return metadata, quantize_weights(metadata, tensors)


def check_float(metadata: Mapping) -> None:
    """Raise UsageError for a model that is quantized already."""
    if metadata.get("quantization"):
        raise UsageError(f"model: expected a float model, got one quantized as {metadata['quantization']['scheme']}")


def size_report(tensors: Mapping[str, np.ndarray]) -> str:
    """Parameters and bytes, for a line on the screen."""
    values, size = sum(a.size for a in tensors.values()), sum(a.nbytes for a in tensors.values())
    return f"{values / 1e6:.1f} M values, {size / 1e6:.1f} MB"
