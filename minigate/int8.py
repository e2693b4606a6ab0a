"""The coarse operators of `model.py` on int8 weights, w ≈ scale * q with a scale per channel or per tensor.

`Dynamic` is the scheme `w8a8-dynamic`: activations symmetric int8 with a scale per row, found at run time; products
exact in int32. The encoder's attention is int8 too, with scales for each query and key and for some values and
probabilities (csrc/dynamicattention.c). The decoder's keys and values of the encoder's output are int8, multiplied by
queries and probabilities of 16 bits (csrc/heardattention.c); those of tokens are stored in bfloat16, the products are
float32, or bfloat16 of many queries where the instruction set can.
Layer norm and GELU are float32. `WeightOnly` is the scheme `w8`: activations float32, weights expanded to float32 tile
by tile. `w8a8-static` is in static.py.

B batch, T time, K inputs, N outputs, M = B T rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from minigate import decoder_kernels, kernels, ops, packing, reference, static_kernels
from minigate.heard_kernels import Heard, attention_heard, pack_heard

STEM_STEP = 128  # frames of the stem, to which those that are computed are rounded up where others repeat
TILE = 128 * 1024  # weights that are in memory as float32 at a time, 512 kB


def is_cached(name: str) -> bool:
    """Whether a linear makes the keys or values of tokens, which the decoder keeps in bfloat16 and reads anew for each
    token: the fewer bytes, the less of memory and of its bandwidth."""
    return name.startswith("decoder.") and name.endswith((".attn.key", ".attn.value"))


def is_cross(name: str) -> bool:
    """The same of the encoder's output, which are far more: in int8, by rows."""
    return name.endswith((".cross_attn.key", ".cross_attn.value"))


class Rows(NamedTuple):
    """A float activation and its int8 form, so that several linears quantize it once."""

    x: np.ndarray | None  # (B, T, K) float32; None where nobody wants it
    q: np.ndarray  # (B, T, K) int8
    scale: np.ndarray  # (M,) float32


class Weight(NamedTuple):
    """A linear's weights: q (N, K), as stored or as packed for the kernel, scale (N,) float32."""

    q: np.ndarray | packing.PackedInt8
    scale: np.ndarray


class Int8Weights(ops.Float):
    """What is int8 in the model file is a Weight, what is float stays float."""

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray]):
        self.scales = {name.removesuffix(".scale"): tensors[name] for name in tensors if name.endswith(".scale")}
        self.room = packing.Room()
        super().__init__(metadata, tensors)

    def is_parameter(self, name: str) -> bool:
        return super().is_parameter(name) and not name.endswith(".scale")

    def prepare(self, name: str, array: np.ndarray):
        if array.dtype != np.int8:
            return super().prepare(name, array)
        q = ops.conv_matrix(array) if array.ndim == 3 else array
        scale = np.array(np.broadcast_to(self.scales[name.removesuffix(".weight")], q.shape[:1]), np.float32)
        return Weight(self.packed(q), scale)

    def has_blocks(self, dims: Mapping[str, int]) -> bool:
        """Whether there is one call for the decoder's blocks: all their linears are int8, and gates a number a head."""
        blocks = (f"decoder.blocks.{i}" for i in range(dims["n_text_layer"]))
        weights = (self.p[f"{block}.{name}.weight"] for block in blocks for name in decoder_kernels.LINEARS)
        return kernels.compiled and self.gate_kind != "elementwise" and all(isinstance(w, Weight) for w in weights)

    def packed(self, q: np.ndarray) -> np.ndarray | packing.PackedInt8:
        """q (N, K) -> the form for integer products, if there are any."""
        return packing.pack_int8(q, self.room)

    def token_rows(self, tokens: np.ndarray) -> np.ndarray:
        table = self.p["decoder.token_embedding.weight"]
        if not isinstance(table, Weight):
            return table[tokens]
        rows = table.q.rows(tokens) if isinstance(table.q, packing.PackedInt8) else table.q[tokens]
        return rows * table.scale[tokens][..., None]


class Dynamic(Int8Weights):
    """Everything that is int8 in the model file is computed in int8."""

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray]):
        self.kept = set(metadata["quantization"]["keep_float"])
        self.n_head = metadata["dims"]["n_text_head"]
        super().__init__(metadata, tensors)
        self._blocks = decoder_kernels.Blocks(self, metadata["dims"]) if self.has_blocks(metadata["dims"]) else None

    def in_one_call(self) -> decoder_kernels.Blocks | None:
        return None if kernels.isa() == "numpy" else self._blocks

    def repeated(self, name: str, x: np.ndarray, stride: int) -> tuple[int, int] | None:
        """Frames that hear nothing but frames equal to the last one, as where zeros follow a recording's end: integer
        products of equal rows are equal, wherever these stand."""
        if not isinstance(self.p[f"{name}.weight"], Weight) or x.shape[1] < 3 or (x[:, -2] != x[:, -1]).any():
            return None
        changes = np.flatnonzero((x != x[:, -1:]).any(axis=(0, 2)))
        still = changes[-1] + 1 if len(changes) else 0
        first, last = -(-(still + 1) // stride), (x.shape[1] - 2) // stride
        first += -(first + 1) % STEM_STEP  # few sizes of arrays, whose memory is kept
        return (first, last) if first < last else None

    def norm(self, name: str, x: np.ndarray) -> Rows:
        if name == "decoder.ln" and self.turns(name):
            return self.rows(super().norm(name, x))
        return Rows(*kernels.layer_norm_rows(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"]))

    def rows(self, x: np.ndarray) -> Rows:
        q, scale = kernels.quantize_rows(x.reshape(-1, x.shape[-1]))
        return Rows(x, q.reshape(x.shape), scale)

    def values(self, x: Rows | Heard | np.ndarray) -> np.ndarray:
        if isinstance(x, np.ndarray):  # keys and values
            return reference.from_bf16(x) if x.dtype == np.uint16 else x
        return x.floats() if isinstance(x, Heard) else x.x

    def linear(self, name: str, x, gelu: bool = False, residual: np.ndarray | None = None
               ) -> np.ndarray | Rows | Heard:  # fmt: skip
        """As `ops.Float.linear`; Rows from an MLP's first linear and GELU, whose result only the second reads; keys and
        values of the decoder as they are stored."""
        w, bias = self.p[f"{name}.weight"], self.p.get(f"{name}.bias")
        if not isinstance(w, Weight):
            return self._stored(name, super().linear(name, x.x if isinstance(x, Rows) else x, gelu, residual))
        rows = x if isinstance(x, Rows) else self.rows(x)
        (*shape, k), product = rows.q.shape, (rows.scale, w.q, w.scale, bias, gelu)
        if gelu and residual is None and name.endswith(".mlp.0") and isinstance(self.p[f"{name[:-1]}2.weight"], Weight):
            q, scale = kernels.linear_int8_rows(rows.q.reshape(-1, k), *product)
            return Rows(None, q.reshape(*shape, -1), scale)
        if is_cross(name):
            q, scale = kernels.linear_int8_rows(rows.q.reshape(-1, k), *product)
            return self._heard(name, q.reshape(*shape, -1), scale)
        flat = None if residual is None else residual.reshape(-1, residual.shape[-1])
        y = kernels.linear_int8(rows.q.reshape(-1, k), *product, flat, bf16=is_cached(name))
        return y.reshape(*shape, -1)

    def _stored(self, name: str, y: np.ndarray) -> np.ndarray | Heard:
        """The result of a linear in float as the decoder keeps it."""
        if is_cross(name):
            rows = self.rows(y)
            return self._heard(name, rows.q, rows.scale)
        return reference.to_bf16(y) if is_cached(name) else y

    def _heard(self, name: str, q: np.ndarray, scale: np.ndarray) -> Heard:
        return pack_heard(q, scale.reshape(q.shape[:2]), self.n_head, name.endswith(".value"))

    def attention(self, name: str, q, k, v, h: Rows, n_head: int, causal: bool) -> np.ndarray:
        if isinstance(k, Heard):
            return attention_heard(q, k, v, self.gate_of(name, h, n_head))
        return super().attention(name, q, k, v, h, n_head, causal)

    def precision(self, name: str) -> str:
        if name.startswith("decoder."):
            return "bf16"
        return "float32" if name in self.kept else "int8"


class WeightOnly(Int8Weights):
    """Everything is computed in float32."""

    def packed(self, q: np.ndarray) -> np.ndarray:
        return q

    def linear(self, name: str, x: np.ndarray, gelu: bool = False, residual: np.ndarray | None = None) -> np.ndarray:
        w, bias = self.p[f"{name}.weight"], self.p.get(f"{name}.bias")
        if not isinstance(w, Weight):
            return super().linear(name, x, gelu, residual)
        (n, k), y = w.q.shape, np.empty((*x.shape[:-1], len(w.q)), np.float32)
        size = max(1, TILE // k)
        for tile in (slice(at, at + size) for at in range(0, n, size)):
            expanded = static_kernels.expand(w.q[tile], w.scale[tile])
            part = None if residual is None else residual[..., tile]
            y[..., tile] = kernels.linear_f32(x, expanded, None if bias is None else bias[tile], gelu, part)
        return y
