"""The coarse operators of `model.py` in float32 with every point (`graph.points`) within reach: watched, or rounded.

    Pointed     hands each point to `point(name, x)`, and to `read(module, point, x)` where a module computes with it
    Observed    records what calibration wants to know about the points
    Simulated   rounds points and weights to what an int8 model holds: `w8a8-static` in NumPy

`simulate` makes the operators of any scheme. What is held in int8 is float32 on its grid here, but is multiplied as
steps, whole numbers: so sums are as exact as the kernels' (up to 2^24; above, to 1 in 2^24), and a value differs from
theirs only where float32 arithmetic after the sum puts it on the other side of a boundary between two steps.

B batch, T time, D n_state, K inputs, H n_head, d = D / H.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from minigate import checkpoint, graph, kernels, ops, reference
from minigate.attention import gate, times_gate
from minigate.int8 import is_cached, is_cross
from minigate.int8weights import dequantize, quantize_weights
from minigate.ranges import Record
from minigate.static_reference import diffused

P_STEPS = 255  # probabilities are multiples of 1/255
QUERIES = 256  # whose probabilities are in memory at a time, each H * Tk; eight times that where they are diffused
LOGITS = "decoder.token_embedding"  # the linear whose result is no point


class Pointed(ops.Float):
    """float32 with methods to override: `point`, `read`, `read_residual`, which give x back as it is, and the products
    themselves, `multiplied` and `attended`."""

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray]):
        super().__init__(metadata, tensors)
        self.reads = graph.reads(metadata["dims"], self.gate_kind)

    def point(self, name: str, x: np.ndarray) -> np.ndarray:
        """A point as it is made -> as it is held."""
        return x

    def read(self, module: str, point: str, x: np.ndarray) -> np.ndarray:
        """A point as it is held -> as a module that computes with it takes it."""
        return x

    def read_residual(self, module: str, point: str, x: np.ndarray) -> np.ndarray:
        """The same for what a linear adds to its product."""
        return self.read(module, point, x)

    def conv(self, name: str, x: np.ndarray, stride: int) -> np.ndarray:
        if name == "encoder.conv1":
            x = self.point("mel", x)
        return super().conv(name, x, stride)

    def add_positions(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.point(name, super().add_positions(name, self.read(name, self.reads[name][0], x)))

    def embed(self, tokens: np.ndarray, offset: int) -> np.ndarray:
        return self.point("decoder.embed", super().embed(tokens, offset))

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.point(name, super().norm(name, self.read(name, self.reads[name][0], x)))

    def linear(self, name: str, x: np.ndarray, gelu: bool = False, residual: np.ndarray | None = None) -> np.ndarray:
        x = self.read(name, self.reads[name][-1], x)
        if residual is not None:
            residual = self.read_residual(name, self.reads[name][0], residual)
        y = self.multiplied(name, x, gelu, residual)
        return y if name == LOGITS else self.point(name, y)

    def multiplied(self, name: str, x: np.ndarray, gelu: bool, residual: np.ndarray | None) -> np.ndarray:
        """[gelu](x wᵀ + bias) + residual."""
        return super().linear(name, x, gelu, residual)

    def attention(self, name: str, q, k, v, h, n_head: int, causal: bool) -> np.ndarray:
        q, k, v = (self.read(name, f"{name}.{part}", x) for part, x in (("query", q), ("key", k), ("value", v)))
        a = self.point(name, self.attended(name, q, k, v, n_head, causal))
        if self.gate_kind == "none":
            return a
        h = self.read(name, f"{name}_ln", h)
        g = gate(self.gate_kind, h, self.gates[name], n_head, self.gate_scale)
        return self.point(f"{name}.gate", times_gate(self.read(name, name, a), g))

    def attended(self, name: str, q, k, v, n_head: int, causal: bool) -> np.ndarray:
        """softmax(q kᵀ / sqrt(d)) v, without the gate."""
        return kernels.attention(q, k, v, n_head, causal=causal)


# --- calibration ---


class Observed(Pointed):
    """Records every point, and if wanted what every linear multiplies: of window `window`, used `times` times.

    records  by point
    inputs   by linear: the sum over rows (K,) float64, and how many they are; if means
    squares  by linear: the sum over rows of x xᵀ (K, K) float32; if moments
    """

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray], histograms: bool = False,
                 means: bool = False, moments: bool = False):  # fmt: skip
        super().__init__(metadata, tensors)
        self.means, self.moments = means, moments
        self.window, self.times = 0, 1
        self.records = {point: Record(histograms) for point in graph.points(metadata["dims"], self.gate_kind)}
        self.inputs: dict[str, tuple[np.ndarray, int]] = {}
        self.squares: dict[str, np.ndarray] = {}

    def point(self, name: str, x: np.ndarray) -> np.ndarray:
        self.records[name].see(x, self.window, self.times)
        return x

    def linear(self, name: str, x: np.ndarray, gelu: bool = False, residual: np.ndarray | None = None) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])
        if self.means:
            total, count = self.inputs.get(name, (0, 0))
            self.inputs[name] = total + self.times * rows.sum(0, dtype=np.float64), count + self.times * len(rows)
        if self.moments:
            self.squares[name] = self.squares.get(name, 0) + self.times * (rows.T @ rows)
        return super().linear(name, x, gelu, residual)


# --- simulation ---


def simulate(metadata: dict, tensors: Mapping[str, np.ndarray]) -> ops.Float:
    """metadata with a quantization -> the operators of its scheme in NumPy.

    tensors: a quantized model's, or a float model's, whose weights are rounded here.
    """
    simulated = {"w8a8-static": Simulated, "w8a8-dynamic": SimulatedDynamic, "w8": SimulatedWeights}
    return simulated[metadata["quantization"]["scheme"]](metadata, tensors)


class SimulatedWeights(ops.Float):
    """Scheme `w8`: int8 weights, float32 activations."""

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray]):
        super().__init__(metadata, dequantize(metadata, as_quantized(metadata, tensors))[1])
        self.keep(metadata)

    def keep(self, metadata: Mapping) -> None:
        """What stays in float, by the metadata's quantization."""
        self.metadata = metadata
        self.kept = set(metadata["quantization"]["keep_float"])
        self.held_float = set()  # points

    def keeping(self, modules: Iterable[str], plain: ops.Float) -> "SimulatedWeights":
        """The same model with these modules in float, and no others: plain has their parameters."""
        other = copy.copy(self)
        quantization = {**self.metadata["quantization"], "keep_float": list(modules)}
        other.keep({**self.metadata, "quantization": quantization})
        other.p = {name: (plain if checkpoint.module_of(name) in other.kept else self).p[name] for name in self.p}
        return other


class SimulatedSteps(SimulatedWeights):
    """Weights as steps, whole numbers in float32, and their scales apart."""

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray]):
        tensors, self.scales = as_quantized(metadata, tensors), {}
        super().__init__(metadata, tensors)
        for layer in set(checkpoint.quantizable(metadata["dims"])).difference(self.kept):
            steps = self.p[f"{layer}.weight"] = self.prepare(f"{layer}.weight", tensors[f"{layer}.weight"])
            self.scales[layer] = np.broadcast_to(tensors[f"{layer}.scale"], steps.shape[:1])

    def token_rows(self, tokens: np.ndarray) -> np.ndarray:
        rows = super().token_rows(tokens)
        return rows if LOGITS in self.kept else rows * self.scales[LOGITS][tokens][..., None]

    def of_steps(self, name: str, steps: np.ndarray, scale, gelu: bool, residual: np.ndarray | None) -> np.ndarray:
        """x = scale * steps (…, K), scale (…, 1) or a number -> [gelu](x wᵀ + bias) + residual."""
        y = kernels.linear_f32(steps, self.p[f"{name}.weight"])
        y *= scale * self.scales[name]
        if f"{name}.bias" in self.p:
            y += self.p[f"{name}.bias"]
        if gelu:
            y = kernels.gelu(y)
        return y if residual is None else y + residual


class SimulatedDynamic(SimulatedSteps):
    """Scheme `w8a8-dynamic`: the rows that a linear multiplies with int8 weights are int8 too, and so is the encoder's
    attention; the decoder's keys and values are int8 rows, those of tokens bfloat16. Attention to tokens is float32
    here."""

    def linear(self, name: str, x: np.ndarray, gelu: bool = False, residual: np.ndarray | None = None) -> np.ndarray:
        y = self.products(name, x, gelu, residual)
        if is_cross(name):
            q, scale = kernels.quantize_rows(y.reshape(-1, y.shape[-1]))
            return (q * scale[:, None]).reshape(y.shape)
        return reference.from_bf16(reference.to_bf16(y)) if is_cached(name) else y

    def attention(self, name: str, q, k, v, h, n_head: int, causal: bool) -> np.ndarray:
        if name.endswith(".cross_attn"):
            steps, scale = reference.nearest_steps(v, -1)
            return reference.attention_heard(q, k, steps, scale[..., 0], n_head, self.gate_of(name, h, n_head))
        if name in self.kept or name.startswith("decoder."):
            return super().attention(name, q, k, v, h, n_head, causal)
        return reference.attention_int8(q, k, v, n_head, causal, self.gate_of(name, h, n_head))

    def products(self, name: str, x: np.ndarray, gelu: bool, residual: np.ndarray | None) -> np.ndarray:
        if name in self.kept:
            return super().linear(name, x, gelu, residual)
        q, scale = kernels.quantize_rows(np.ascontiguousarray(x.reshape(-1, x.shape[-1])))
        steps = q.astype(np.float32).reshape(x.shape)
        return self.of_steps(name, steps, scale.reshape(*x.shape[:-1], 1), gelu, residual)


class Simulated(SimulatedSteps, Pointed):
    """Scheme `w8a8-static`.

    linears_only: only what linears and convolutions multiply is rounded, weights and operands; not what lies between
    them, the residual stream, queries, keys, values and probabilities. No scheme of ours: for comparison.
    """

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray], linears_only: bool = False):
        self.linears_only = linears_only
        if linears_only:
            metadata = with_keep_float(metadata, between_linears(metadata))
        super().__init__(metadata, tensors)

    def keep(self, metadata: Mapping) -> None:
        super().keep(metadata)
        self.held_float = graph.held_float(metadata)
        self.grids = graph.grids(metadata)
        self.diffuse = graph.diffuses(metadata)

    def point(self, name: str, x: np.ndarray) -> np.ndarray:
        return x if name in self.held_float else rounded(x, *self.grids[name])

    def read(self, module: str, point: str, x: np.ndarray) -> np.ndarray:
        enters = point in self.held_float and module not in self.kept
        return rounded(x, *self.grids[point]) if enters else x

    def read_residual(self, module: str, point: str, x: np.ndarray) -> np.ndarray:
        return x if self.linears_only else super().read_residual(module, point, x)

    def multiplied(self, name: str, x: np.ndarray, gelu: bool, residual: np.ndarray | None) -> np.ndarray:
        if name in self.kept:
            return super().multiplied(name, x, gelu, residual)
        scale = self.grids[self.reads[name][-1]][0]
        return self.of_steps(name, steps_of(x, scale), scale, gelu, residual)

    def attended(self, name: str, q, k, v, n_head: int, causal: bool) -> np.ndarray:
        if name in self.kept:
            return super().attended(name, q, k, v, n_head, causal)
        scales = [self.grids[f"{name}.{part}"][0] for part in ("query", "key", "value")]
        steps = [steps_of(x, scale) for x, scale in zip((q, k, v), scales, strict=True)]
        return rounded_attention(*steps, scales, n_head, causal, self.diffuse)


def as_quantized(metadata: Mapping, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """A quantized model's tensors as they are, a float model's quantized."""
    if any(array.dtype == np.int8 for array in tensors.values()):
        return tensors
    return quantize_weights(metadata, tensors)


def with_keep_float(metadata: Mapping, modules: Iterable[str]) -> dict:
    """Metadata in which these modules stay in float too, given in any order."""
    kept = {*metadata["quantization"]["keep_float"], *modules}
    expanded = graph.expand_keep_float(kept, metadata["dims"])
    return {**metadata, "quantization": {**metadata["quantization"], "keep_float": expanded}}


def between_linears(metadata: Mapping) -> set[str]:
    """The modules that are neither linear nor convolution."""
    return set(graph.modules(metadata["dims"])).difference(checkpoint.quantizable(metadata["dims"]))


def steps_of(x: np.ndarray, scale: np.float32) -> np.ndarray:
    """x -> the nearest multiples of scale, in steps: whole numbers in float32."""
    return np.rint(x * (np.float32(1) / scale))


def rounded(x: np.ndarray, scale: np.float32, zero_point: int) -> np.ndarray:
    """x float32 -> scale * (q - zero_point), q = clip(rint(x / scale) + zero_point, -128, 127)."""
    y = steps_of(x, scale)
    np.clip(y, graph.Q_MIN - zero_point, graph.Q_MAX - zero_point, out=y)
    y *= scale
    return y


def rounded_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scales: Sequence[float], n_head: int,
                      causal: bool, diffuse: bool = False) -> np.ndarray:  # fmt: skip
    """softmax(q kᵀ / sqrt(d)) v with probabilities in steps of 1/255, to the nearest or, diffuse, by
    `static_reference.diffused`; shapes as in `kernels.attention`.

    q, k, v in steps of the three scales.
    """
    n_batch, t_q, n_state = q.shape
    t_k, d = k.shape[1], n_state // n_head
    group = n_batch // k.shape[0]
    unit = np.float32(float(scales[0]) * float(scales[1]) / math.sqrt(d))
    out = np.empty((n_batch, t_q, n_head, d), np.float32)
    for b in range(n_batch):
        keys = k[b // group].reshape(t_k, n_head, d).transpose(1, 2, 0)
        values = v[b // group].reshape(t_k, n_head, d).transpose(1, 0, 2)
        for i in range(0, t_q, QUERIES):
            p = q[b, i : i + QUERIES].reshape(-1, n_head, d).transpose(1, 0, 2) @ keys  # (H, queries, Tk)
            if causal:
                position = np.arange(i, i + p.shape[1])[:, None] + t_k - t_q
                p[:, np.arange(t_k) > position] = -np.inf
            p -= p.max(axis=-1, keepdims=True)
            p *= unit
            np.exp(p, out=p)
            p *= P_STEPS / p.sum(axis=-1, keepdims=True)
            p = diffused(p).astype(np.float32) if diffuse else np.rint(p, out=p)
            out[b, i : i + QUERIES] = (p @ values).transpose(1, 0, 2)
    out *= scales[2] / np.float32(P_STEPS)
    return out.reshape(n_batch, t_q, n_state)
