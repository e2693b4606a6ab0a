"""The decoder's blocks in one call to C, in the schemes w8a8-dynamic and w8a8-static: of a token's time a fifth to a
half would go to calling their operators one by one. The results are the same to the bit. See kernels.py, whose
instruction set and threads this shares.

R rows, T new tokens of each, D n_state.
"""

from collections.abc import Mapping

import numpy as np

from minigate import gate_kernels
from minigate.heard_kernels import Heard
from minigate.kernels import F32, I8, U16, _array, _check, compiled, threads

if compiled:
    from minigate._kernels import ffi, lib

    _FLOATS, _BYTES = ffi.typeof("float[]"), ffi.typeof("int8_t[]")
    _DIMS, _CACHES = ffi.typeof("struct mg_decoder_dims *"), ffi.typeof("struct mg_decoder_cache[]")

LINEARS = ("attn.query", "attn.key", "attn.value", "attn.out", "cross_attn.query", "cross_attn.out", "mlp.0", "mlp.2")
ATTENTIONS = ("attn", "cross_attn")
NORMS = ("attn_ln", "cross_attn_ln", "mlp_ln")
POINTS = ("attn_ln", "attn.query", "attn.key", "attn.value", "attn", "attn.gate", "attn.out", "cross_attn_ln",
          "cross_attn.query", "cross_attn.key", "cross_attn.value", "cross_attn", "cross_attn.gate", "cross_attn.out",
          "mlp_ln", "mlp.0", "mlp.2")  # of a block, after its input  # fmt: skip
EPS = 1e-5  # of the layer norms


class Blocks:
    """All blocks of the decoder of w8a8-dynamic as C reads them.

    ops: the operators on int8 weights that compute the same, all linears of the blocks in int8, gates of any kind but
    elementwise. Their parameters live as long as this."""

    kept_as, kept_type = U16, "uint16_t[]"  # keys and values of tokens

    def __init__(self, ops, dims: Mapping[str, int]):
        self.n_head, self._kept = dims["n_text_head"], []
        self.n_hidden, self.n_state = ops.p["decoder.blocks.0.mlp.0.weight"].q.shape
        self._blocks = ffi.new("struct mg_decoder_block[]", dims["n_text_layer"])
        for i, block in enumerate(self._blocks):
            self._fill(block, ops, f"decoder.blocks.{i}")

    def _fill(self, block, ops, prefix: str) -> None:
        for name in NORMS:
            norm = getattr(block, name)
            parts = (ops.p[f"{prefix}.{name}.{part}"] for part in ("weight", "bias"))
            norm.weight, norm.bias = (self._floats(part, self.n_state) for part in parts)
        for name in LINEARS:
            linear, weight = getattr(block, name.replace(".", "_")), ops.p[f"{prefix}.{name}.weight"]
            outputs, inputs = (self.n_hidden if name == wide else self.n_state for wide in ("mlp.0", "mlp.2"))
            if weight.q.shape != (outputs, inputs):
                raise ValueError(f"{prefix}.{name}.weight: expected shape ({outputs}, {inputs}), got {weight.q.shape}")
            linear.packed, linear.scale = weight.q.pointer(), self._floats(weight.scale, outputs)
            linear.bias = self._floats(ops.p.get(f"{prefix}.{name}.bias"), outputs)
            self._kept.append(weight.q)
        for name in ATTENTIONS:
            gate = gate_kernels.parameters(ops.gate_kind, ops.gates.get(f"{prefix}.{name}", {}), self.n_state,
                                           self.n_head, ops.gate_scale)  # fmt: skip
            setattr(block, f"{name}_gate", gate)
            self._kept.append(gate)

    def _floats(self, x: np.ndarray | None, n: int):
        """A pointer to x (n,), which from now on lives as long as this."""
        if x is None:
            return ffi.NULL
        self._kept.append(ffi.from_buffer(_FLOATS, _array("parameter", x, (n,), F32)))
        return self._kept[-1]

    def __call__(self, x: np.ndarray, cache) -> np.ndarray:
        """x (R, T, D) float32, embedded -> (R, T, D) after the last block. The keys and values of the new tokens are in
        the cache, whose length stays as it is. Not with MINIGATE_ISA=numpy, which has no blocks."""
        y = _array("x", x, (cache.rows, None, self.n_state), F32).copy()
        caches, dims, kept = self._place(cache, y.shape[1])
        _check(lib.mg_decoder_blocks(ffi.from_buffer(_FLOATS, y), self._blocks, caches, len(kept), dims))
        return y

    def _place(self, cache, t: int) -> tuple:
        """-> the cache and the sizes of t new tokens as C reads them; what the pointers point to, for each block."""
        threads()  # the choice is made, if it was open
        if len(cache.cross) != len(self._blocks):
            raise ValueError(f"cache: expected {len(self._blocks)} layers, got {len(cache.cross)}")
        (windows, t_audio, _), kept = cache.cross[0][0].shape, []
        if not windows or cache.rows % windows:
            raise ValueError(f"cache: expected a number of windows that divides its {cache.rows} rows, got {windows}")
        shape, heard = (cache.rows, cache.n_ctx, self.n_state), (windows, t_audio, self.n_state)
        for i, pair in enumerate(cache.cross):
            own = [_array("cache", x, shape, self.kept_as) for x in cache.own(i, self.n_state, self.kept_as)]
            cross = [self.heard(x, heard, is_values) for x, is_values in zip(pair, (False, True), strict=True)]
            kept.append((*(ffi.from_buffer(self.kept_type, x) for x in own),
                         *(ffi.from_buffer(_BYTES, x) for x in cross)))  # fmt: skip
        dims = (cache.rows, cache.rows // windows, t, cache.length, cache.n_ctx, t_audio, self.n_head, self.n_state,
                self.n_hidden, EPS)  # fmt: skip
        return ffi.new(_CACHES, kept), ffi.new(_DIMS, dims), kept

    def heard(self, x, shape: tuple, is_values: bool) -> np.ndarray:
        """The array of keys or values that the encoder's output made, after a check."""
        if not isinstance(x, Heard) or (x.shape, x.n_head, x.is_values) != (shape, self.n_head, is_values):
            what = f"{'values' if is_values else 'keys'} {shape} in {self.n_head} heads"
            raise ValueError(f"cache: expected {what}, got {type(x).__name__} {x.shape}")
        return x.packed()


class StaticBlocks(Blocks):
    """Those of w8a8-static, all of whose tensors are int8.

    ops: as for Blocks, with `int8_grids` of all of them and `diffuse`."""

    kept_as, kept_type = I8, "int8_t[]"

    def __init__(self, ops, dims: Mapping[str, int]):
        super().__init__(ops, dims)
        self.diffuse, self._grids = ops.diffuse, ffi.new("struct mg_decoder_grids[]", dims["n_text_layer"])
        before = "decoder.embed"
        for i, grids in enumerate(self._grids):
            grids.input = tuple(ops.int8_grids[before])
            for name in POINTS:
                point = f"decoder.blocks.{i}.{name}"
                if not (name.endswith(".gate") and ops.gate_kind == "none"):
                    setattr(grids, name.replace(".", "_"), tuple(ops.int8_grids[point]))
            before = f"decoder.blocks.{i}.mlp.2"

    def __call__(self, x: np.ndarray, cache) -> np.ndarray:
        """As in Blocks, of int8."""
        y = _array("x", x, (cache.rows, None, self.n_state), I8).copy()
        caches, dims, kept = self._place(cache, y.shape[1])
        _check(lib.mg_decoder_static(ffi.from_buffer(_BYTES, y), self._blocks, self._grids, caches, len(kept),
                                     self.diffuse, dims))  # fmt: skip
        return y

    def heard(self, x, shape: tuple, is_values: bool) -> np.ndarray:
        return _array("cache", x, shape, I8)
