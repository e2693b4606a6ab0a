"""The coarse operators of `model.py` in the scheme `w8a8-static`: int8 weights, and activations whose scale and zero
point were fixed at calibration, the residual stream, keys, values and probabilities included.

    x ≈ scale * (q - zero_point)

What a tensor is called, and which of them a keep_float list holds in float32, is in graph.py. An activation is a
`Tensor` (static_kernels.py): int8, or float32 with the grid to which a reader that computes in int8 rounds it. Gates,
softmax, GELU, layer norm and the rotation of a turned residual stream are float32 arithmetic between these.

B batch, T time, C channels in, D n_state, N outputs, V n_vocab.
"""

from collections.abc import Callable, Mapping

import numpy as np

from minigate import decoder_kernels, graph, int8, kernels, ops, static_kernels
from minigate.static_kernels import Grid, Tensor


class Static(int8.Int8Weights):
    """Modules of the keep_float list compute in float32, all others in int8."""

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray]):
        self.grids = {point: Grid(*grid) for point, grid in graph.grids(metadata).items()}
        self.kept = set(metadata["quantization"]["keep_float"])
        self.diffuse = graph.diffuses(metadata)
        self._last = f"decoder.blocks.{metadata['dims']['n_text_layer'] - 1}.mlp.2"
        held_float = graph.held_float(metadata)
        self.int8_grids = {point: grid for point, grid in self.grids.items() if point not in held_float}
        super().__init__(metadata, tensors)
        floating = any(name.startswith(("decoder.blocks.", "decoder.embed")) for name in (*held_float, *self.kept))
        self._blocks = None
        if self.has_blocks(metadata["dims"]) and not floating:
            self._blocks = decoder_kernels.StaticBlocks(self, metadata["dims"])

    def in_one_call(self) -> Callable | None:
        """Of Tensors, whose grids the blocks know."""
        if kernels.isa() == "numpy" or self._blocks is None:
            return None
        return lambda x, cache: Tensor(self._blocks(x.data, cache), self.grids[self._last])

    def prepare(self, name: str, array: np.ndarray):
        if array.dtype == np.int8 and name.endswith(".positional_embedding"):
            return Tensor(array, Grid(self.scales[name][()], 0))
        return super().prepare(name, array)

    # --- between operators ---

    def entered(self, x: Tensor) -> Tensor:
        """x as a reader that computes in int8 takes it."""
        return x if x.data.dtype == np.int8 else Tensor(static_kernels.convert(x, x.grid), x.grid)

    def left(self, point: str, x: np.ndarray) -> Tensor:
        """x float32 as the point holds it."""
        x = Tensor(x, self.grids[point])
        return self.entered(x) if point in self.int8_grids else x

    def rows(self, x: np.ndarray) -> Tensor:
        """x (B, T, D) float32, the encoder's output."""
        return self.left("encoder.ln_post", x)

    def values(self, x: Tensor) -> np.ndarray:
        return x.data if x.data.dtype == np.float32 else static_kernels.convert(x, None)

    def last(self, x: Tensor) -> Tensor:
        return Tensor(x.data[:, -1:], x.grid)

    # --- operators ---

    def conv(self, name: str, x: np.ndarray | Tensor, stride: int) -> Tensor:
        x = x if isinstance(x, Tensor) else Tensor(np.ascontiguousarray(x), self.grids["mel"])
        if name in self.kept:
            return self.linear(name, Tensor(ops.conv_rows(x.data, stride), x.grid), gelu=True)
        x = self.entered(x)
        return self.linear(name, Tensor(ops.conv_rows(x.data, stride, x.grid.zero_point), x.grid), gelu=True)

    def add_positions(self, name: str, x: Tensor) -> Tensor:
        positions, shape = self.p[name], x.data.shape
        if name in self.kept:
            return self.left(name, self.turned(name, x.data) + positions[: shape[1]])
        if self.turns(name):
            turned = self.turned(name, self.values(self.entered(x)))
            return self.left(name, turned + positions.data[: shape[1]] * positions.grid.scale)
        rows = np.broadcast_to(positions.data[: shape[1]], shape)
        y = static_kernels.add(self.entered(x), Tensor(rows, positions.grid), self.int8_grids.get(name))
        return Tensor(y, self.grids[name])

    def embed(self, tokens: np.ndarray, offset: int) -> Tensor:
        positions = self.p["decoder.positional_embedding"]
        rows = slice(offset, offset + tokens.shape[1])
        if isinstance(positions, Tensor):
            positions = positions.data[rows] * positions.grid.scale
        else:
            positions = positions[rows]
        return self.left("decoder.embed", self.input_rows(tokens) + positions)

    def norm(self, name: str, x: Tensor) -> Tensor:
        if name in self.kept:
            return Tensor(super().norm(name, x.data), self.grids[name])
        x = self.entered(x)
        if name == "decoder.ln" and self.turns(name):
            return self.left(name, super().norm(name, self.values(x)))
        y = static_kernels.layer_norm(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], self.int8_grids.get(name))
        return Tensor(y, self.grids[name])

    def linear(self, name: str, x: Tensor, gelu: bool = False, residual: Tensor | None = None):
        """x (B, T, D) -> Tensor (B, T, N); keys and values, which go to the cache, as an array."""
        w, bias = self.p[f"{name}.weight"], self.p.get(f"{name}.bias")
        if name in self.kept:
            y = kernels.linear_f32(x.data, w, bias, gelu, None if residual is None else residual.data)
        else:
            x = self.entered(x)
            flat = Tensor(x.data.reshape(-1, x.data.shape[-1]), x.grid)
            if residual is not None:
                residual = self.entered(residual)
                residual = Tensor(residual.data.reshape(len(flat.data), -1), residual.grid)
            y = static_kernels.linear(flat, w.q, w.scale, self.int8_grids.get(name), bias, gelu, residual)
            y = y.reshape(*x.data.shape[:-1], -1)
        return y if name.endswith((".key", ".value")) else Tensor(y, self.grids.get(name))

    def attention(self, name: str, q: Tensor, k, v, h: Tensor, n_head: int, causal: bool) -> Tensor:
        """q h (B, T_q, D), k v (B or fewer, T_k, D) from the cache -> (B, T_q, D)."""
        gated = self.gate_kind != "none"
        point = f"{name}.gate" if gated else name
        if name in self.kept:
            y = kernels.attention(q.data, k, v, n_head, causal=causal, gate=self.gate_of(name, h, n_head))
            return Tensor(y, self.grids[point])
        q, k, v = (self.entered(Tensor(x, self.grids[f"{name}.{part}"]))
                   for part, x in (("query", q.data), ("key", k), ("value", v)))  # fmt: skip
        g = self.gate_of(name, self.entered(h), n_head) if gated else None
        out = self.int8_grids.get(point)
        y = static_kernels.attention(q, k, v, n_head, out, causal, g, self.grids[name], self.diffuse)
        return Tensor(y, self.grids[point])

    def logits(self, x: Tensor) -> np.ndarray:
        return self.linear("decoder.token_embedding", x).data
