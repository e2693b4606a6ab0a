"""What is done to a float model before it is rounded to int8, so that rounding costs less.

    equalize         evens out the channels between two linears with nothing nonlinear between them
    rotate           turns the residual streams, so that an outlier in one dimension becomes a little in all
    smoothquant      moves the large channels of layer norms' outputs into the weights that read them
    bias_correction  takes the mean error of rounded weights off the biases

Each takes a float model's metadata and tensors and gives new ones; the arguments stay as they are. The first three
leave what the model computes as it is. Linears are named as in graph.py.

D n_state, H n_head, d = D / H, K inputs and N outputs of a linear.
"""

from collections.abc import Mapping

import numpy as np

from minigate import graph
from minigate.checkpoint import INPUT_SCALE
from minigate.errors import UsageError
from minigate.hadamard import random_signs, rotation
from minigate.ops import conv_matrix

Tensors = dict[str, np.ndarray]
EMBEDDING = "decoder.token_embedding"
SMALLEST = 1e-5  # magnitudes below it count as this much
WRITERS = {f"{layer}.{part}" for layer in ("attn.out", "cross_attn.out", "mlp.2") for part in ("weight", "bias")}
FIRST_OF_GATE = {"per_head_mlp": "0.weight"}  # the gate's parameter that h is multiplied with; of other kinds "weight"


# --- between two linears ---


def equalize(metadata: dict, tensors: Mapping[str, np.ndarray]) -> tuple[dict, Tensors]:
    """Scale the channels between two linears so that both linears' weights have the same range there
    (Nagel et al., arXiv 1906.04721, eq. 11): of an attention's value and out, through P v and the gate, and of its
    query and key, through q kᵀ. Both are exact.

    The two linears of an MLP stay as they are: s GELU(x / s) is not GELU(x). Scaled all the same they cost tiny.en a KL
    of 0.018 nats per token and 5 % of the top-1 tokens with factors of at most 1.1, and 0.069 with all of eq. 11, where
    rounding everything to w8a8-dynamic costs 0.004; with only the 1 % of an MLP's channels that peak highest 0.001 in
    the encoder, 0.087 in the decoder, and rounding costs no less afterwards. What is possible in front of them is
    `smoothquant`.
    """
    out = dict(tensors)
    for module in attentions(metadata):
        rows, columns = (np.abs(out[f"{module}.{part}.weight"]).max(axis) for part, axis in (("value", 1), ("out", 0)))
        scale = balance(rows, columns)
        scale_rows(out, f"{module}.value", 1 / scale)
        scale_columns(out, f"{module}.out.weight", scale)
        queries, keys = (np.abs(out[f"{module}.{part}.weight"]).max(1) for part in ("query", "key"))
        scale = balance(queries, keys)
        scale_rows(out, f"{module}.query", 1 / scale)
        scale_rows(out, f"{module}.key", scale)
    return metadata, out


def attentions(metadata: Mapping) -> list[str]:
    """Every attention module, encoder first."""
    dims = metadata["dims"]
    own = [f"{side}.blocks.{i}.attn" for side, text in (("encoder", "audio"), ("decoder", "text"))
           for i in range(dims[f"n_{text}_layer"])]  # fmt: skip
    return own + [f"decoder.blocks.{i}.cross_attn" for i in range(dims["n_text_layer"])]


def balance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Largest magnitudes (N,) -> s with first / s = second * s; 1 where a channel is without effect."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    live = (first > SMALLEST) & (second > SMALLEST)
    return np.where(live, np.sqrt(first / np.where(live, second, 1)), 1)


def scale_rows(out: Tensors, layer: str, scale: np.ndarray) -> None:
    """Multiply a layer's outputs, bias included, by scale (N,)."""
    out[f"{layer}.weight"] = (out[f"{layer}.weight"] * scale[:, None]).astype(np.float32)
    if f"{layer}.bias" in out:
        out[f"{layer}.bias"] = (out[f"{layer}.bias"] * scale).astype(np.float32)


def scale_columns(out: Tensors, name: str, scale: np.ndarray) -> None:
    """Multiply a weight's columns by scale (K,); a gate's that sees only its head's slice too: (H, d) or (H, …, d)."""
    weight = out[name]
    if weight.shape[-1] != len(scale):
        scale = scale.reshape(len(weight), *[1] * (weight.ndim - 2), weight.shape[-1])
    out[name] = (weight * scale).astype(np.float32)


# --- between a layer norm and its readers ---


def smoothquant(metadata: dict, tensors: Mapping[str, np.ndarray], maxima: Mapping[str, np.ndarray],
                alpha: float = 0.5) -> tuple[dict, Tensors]:  # fmt: skip
    """Divide every layer norm's output by s (D,), and multiply the columns of what reads it by s; for channel j

        s_j = max |x_j|^alpha / max |W_j|^(1 - alpha)        (Xiao et al., arXiv 2211.10438, eq. 4)

    maxima: layer norm -> max |x| (D,) of its output. W: all linears that read it, of `encoder.ln_post` all cross keys
    and values; gates, which stay float, are scaled with them but have no say. The logits' matrix is the table of the
    decoder's input too: its rows are divided by s on their way in, by the new tensor `INPUT_SCALE` (D,).
    """
    out = dict(tensors)
    for norm, readers in norm_readers(metadata, tensors).items():
        largest = np.max([np.abs(out[name]).max(0) for name in readers if ".gate." not in name], axis=0)
        inputs = np.maximum(np.asarray(maxima[norm], np.float64), SMALLEST)
        scale = inputs**alpha / np.maximum(largest.astype(np.float64), SMALLEST) ** (1 - alpha)
        for part in ("weight", "bias"):
            out[f"{norm}.{part}"] = (out[f"{norm}.{part}"] / scale).astype(np.float32)
        for name in readers:
            scale_columns(out, name, scale)
        if f"{EMBEDDING}.weight" in readers:
            out[INPUT_SCALE] = (out.get(INPUT_SCALE, 1) / scale).astype(np.float32)
    return metadata, out


def norm_readers(metadata: Mapping, tensors: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Layer norm -> the weights that its output is multiplied with, those of gates included."""
    kind = metadata["gate"]["kind"]
    gate = FIRST_OF_GATE.get(kind, "weight")
    found = {}
    for point, readers in graph.points(metadata["dims"], kind).items():
        if np.ndim(tensors.get(f"{point}.weight")) == 1:
            found[point] = [f"{module}.weight" if f"{module}.weight" in tensors else f"{module}.gate.{gate}"
                            for module in readers]  # fmt: skip
    return found


# --- the residual streams ---


def rotate(metadata: dict, tensors: Mapping[str, np.ndarray], seed: int = 0) -> tuple[dict, Tensors]:
    """Turn the residual streams of encoder and decoder: x becomes x Q, Q of `hadamard.rotation` with random signs.

    Layer norms' gains and biases go into the linears and gates that read them, and leave 1 and 0 behind; keys have no
    bias, and need none: it would add the same to all scores of a query. A gate per_head sees its head's slice of the
    norm's output and becomes all_heads; per_head_mlp is refused with UsageError: there is no dense kind of it.

    Where a stream begins no weight can turn it: the encoder's is GELU(conv2), the decoder's a row of the table that is
    the logits' matrix too. The new tensors `checkpoint.ROTATIONS` (D,), Q's signs, have it turned there, before
    positions are added, and for the table's sake turned back inside of `decoder.ln`, before its gain: a D x D product
    a token.
    """
    if metadata["gate"]["kind"] == "per_head_mlp":
        raise UsageError("rotate: expected a gate that is, or can be written as, linear in the whole layer norm's "
                         "output, got per_head_mlp, whose heads see a slice each")  # fmt: skip
    metadata, out = dense_gates(metadata, tensors)
    for side, state in (("encoder", "n_audio_state"), ("decoder", "n_text_state")):
        signs = out[f"{side}.rotation"] = random_signs(metadata["dims"][state], seed)
        q = rotation(signs)
        for norm, readers in norm_readers(metadata, out).items():
            if norm.startswith(side) and norm != "decoder.ln":
                for name in readers:
                    absorb(out, norm, name)
                    out[name] = (out[name] @ q).astype(np.float32)
                out[f"{norm}.weight"], out[f"{norm}.bias"] = np.ones(len(q), np.float32), np.zeros(len(q), np.float32)
        for name in out:
            if name.startswith(f"{side}.blocks.") and name.split(".", 3)[-1] in WRITERS:
                out[name] = (q.T @ out[name]).astype(np.float32)
        positions = f"{side}.positional_embedding"
        out[positions] = (out[positions] @ q).astype(np.float32)
    return metadata, out


def absorb(out: Tensors, norm: str, name: str) -> None:
    """Move a layer norm's gain and bias into a weight (N, K) that reads it, and its bias (N,) if it has one."""
    weight = out[name].astype(np.float64)
    bias = f"{name.removesuffix('weight')}bias"
    if bias in out:
        out[bias] = (out[bias] + weight @ out[f"{norm}.bias"]).astype(np.float32)
    out[name] = weight * out[f"{norm}.weight"]


def dense_gates(metadata: Mapping, tensors: Mapping[str, np.ndarray]) -> tuple[dict, Tensors]:
    """Gates per_head -> all_heads with zeros where a head did not look; other kinds as they are."""
    out = dict(tensors)
    if metadata["gate"]["kind"] != "per_head":
        return dict(metadata), out
    for module in attentions(metadata):
        name = f"{module}.gate.weight"
        heads, d = out[name].shape
        dense = np.zeros((heads, heads, d), np.float32)
        dense[np.arange(heads), np.arange(heads)] = out[name]
        out[name] = dense.reshape(heads, heads * d)
    return {**metadata, "gate": {**metadata["gate"], "kind": "all_heads"}}, out


# --- after rounding ---


def bias_correction(metadata: dict, tensors: Mapping[str, np.ndarray], quantized: Mapping[str, np.ndarray],
                    mean_inputs: Mapping[str, np.ndarray]) -> Tensors:  # fmt: skip
    """-> tensors with biases b + (W - Wq) E[x], so that a rounded linear's output has the mean of the float one's
    (Nagel et al., arXiv 1906.04721, section 4.2).

    quantized: weight -> what int8 makes of it, in float. mean_inputs: linear or convolution -> E[x] (K,), the latter's
    as `ops.conv_rows` orders it. Keys and the logits have no bias, and are skipped: an error that is the same for every
    key cancels in the softmax, one of the logits does not.
    """
    out = dict(tensors)
    for layer, mean in mean_inputs.items():
        if f"{layer}.bias" in out:
            error = np.asarray(tensors[f"{layer}.weight"], np.float64) - quantized[f"{layer}.weight"]
            error = conv_matrix(error) if error.ndim == 3 else error
            out[f"{layer}.bias"] = (out[f"{layer}.bias"] + error @ mean).astype(np.float32)
    return out
