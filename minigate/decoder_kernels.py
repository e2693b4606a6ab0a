"""The decoder's blocks in one call to C, in the scheme w8a8-dynamic: of a token's time a third would go to calling
their operators one by one. The results are the same to the bit. See kernels.py, whose instruction set and threads this
shares.

R rows, T new tokens of each, D n_state.
"""

from collections.abc import Callable

import numpy as np

from minigate.heard_kernels import Heard
from minigate.kernels import F32, U16, _array, _check, compiled, threads

if compiled:
    from minigate._kernels import ffi, lib

    _FLOATS, _BYTES, _HALVES = ffi.typeof("float[]"), ffi.typeof("int8_t[]"), ffi.typeof("uint16_t[]")
    _DIMS, _CACHES = ffi.typeof("struct mg_decoder_dims *"), ffi.typeof("struct mg_decoder_cache[]")

LINEARS = ("attn.query", "attn.key", "attn.value", "attn.out", "cross_attn.query", "cross_attn.out", "mlp.0", "mlp.2")
NORMS = ("attn_ln", "cross_attn_ln", "mlp_ln")
EPS = 1e-5  # of the layer norms


class Blocks:
    """All blocks of a decoder as C reads them.

    parameter(name), for a name within the blocks such as "0.attn.query.weight", is what the operators compute with; a
    linear's weight has packed integers `q` and a `scale` for each output, float32 like biases and layer norms."""

    def __init__(self, parameter: Callable, n_blocks: int, n_head: int):
        self.n_head, self._kept = n_head, []
        self._blocks = ffi.new("struct mg_decoder_block[]", n_blocks)
        for i, block in enumerate(self._blocks):
            for name in NORMS:
                norm = getattr(block, name)
                norm.weight, norm.bias = (self._floats(parameter(f"{i}.{name}.{part}")) for part in ("weight", "bias"))
            for name in LINEARS:
                linear, weight = getattr(block, name.replace(".", "_")), parameter(f"{i}.{name}.weight")
                linear.packed, linear.scale = weight.q.pointer(), self._floats(weight.scale)
                linear.bias = self._floats(parameter(f"{i}.{name}.bias"))
        self.n_hidden, self.n_state = parameter("0.mlp.0.weight").q.shape

    def _floats(self, x: np.ndarray | None):
        """A pointer to x, which from now on lives as long as this."""
        if x is None:
            return ffi.NULL
        self._kept.append(ffi.from_buffer(_FLOATS, _array("parameter", x, x.shape, F32)))
        return self._kept[-1]

    def __call__(self, x: np.ndarray, cache) -> np.ndarray:
        """x (R, T, D) float32, embedded -> (R, T, D) after the last block. The keys and values of the new tokens are in
        the cache, whose length stays as it is. Not with MINIGATE_ISA=numpy, which has no blocks."""
        x = _array("x", x, (cache.rows, None, self.n_state), F32)
        threads()  # the choice is made, if it was open
        y, windows, t_audio = x.copy(), *cache.cross[0][0].shape[:2]
        kept = [self._pointers(cache.own(i, self.n_state, U16), *heard) for i, heard in enumerate(cache.cross)]
        dims = (cache.rows, cache.rows // windows, x.shape[1], cache.length, cache.n_ctx, t_audio, self.n_head,
                self.n_state, self.n_hidden, EPS)  # fmt: skip
        _check(lib.mg_decoder_blocks(ffi.from_buffer(_FLOATS, y), self._blocks, ffi.new(_CACHES, kept), len(kept),
                                     ffi.new(_DIMS, dims)))  # fmt: skip
        return y

    def _pointers(self, own: list[np.ndarray], k: Heard, v: Heard) -> tuple:
        """struct mg_decoder_cache, of arrays that are dense."""
        arrays = (_HALVES, own), (_BYTES, (*k.arrays, *v.arrays))
        return tuple(ffi.from_buffer(kind, array) for kind, pair in arrays for array in pair)
