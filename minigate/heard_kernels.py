"""Keys and values of what the encoder heard, in int8, packed for the products of a decoder that reads them for each
token; and attention to them. See kernels.py, whose instruction set and threads this shares.

W windows, T positions of the encoder, D n_state, H n_head, B rows of queries, a multiple of W.
"""

import numpy as np

from minigate import reference
from minigate.kernels import F32, I8, _array, _check, _floats, _in_c, _optional, compiled, empty
from minigate.packing import PANEL

if compiled:
    from minigate._kernels import ffi, lib

    _BYTES = ffi.typeof("int8_t[]")

MAX_HEARD = 32768  # keys, and elements of a head


class Heard:
    """Keys, or values, scale * q of some windows.

    shape   (W, T, D)
    arrays  what is kept of each window: packed bytes (W, n), or where NumPy computes q (W, T, D) and scale (W, T)
    """

    __slots__ = ("arrays", "is_values", "n_head", "_shape")

    def __init__(self, arrays: tuple[np.ndarray, ...], shape: tuple[int, int], n_head: int, is_values: bool):
        self.arrays, self._shape, self.n_head, self.is_values = arrays, shape, n_head, is_values

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.arrays[0]), *self._shape

    def with_arrays(self, arrays: tuple[np.ndarray, ...]) -> "Heard":
        """The same of other windows."""
        return Heard(arrays, self._shape, self.n_head, self.is_values)

    def floats(self) -> np.ndarray:
        """(W, T, D) float32."""
        q, scale = self.plain()
        return q * scale[..., None]

    def packed(self) -> np.ndarray:
        """Bytes (W, n) as C reads them."""
        return self.arrays[0] if len(self.arrays) == 1 else _pack(*self.arrays, self.n_head, self.is_values)

    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """q (W, T, D) int8, scale (W, T) float32."""
        if len(self.arrays) == 2:
            return self.arrays
        [packed], (t, n_state) = self.arrays, self._shape
        d, panels, windows = n_state // self.n_head, -(-t // PANEL), len(packed)
        scale = packed[:, : 4 * PANEL * panels].view(F32)[:, :t]
        heads = packed[:, 4 * PANEL * panels :]
        if self.is_values:
            groups, wide = -(-t // 4), -(-d // PANEL)
            heads = heads[:, : self.n_head * wide * groups * 4 * PANEL]
            heads = heads.reshape(windows, self.n_head, wide, groups, PANEL, 4)
            rows = heads.transpose(0, 3, 5, 1, 2, 4).reshape(windows, 4 * groups, self.n_head, wide * PANEL)
        else:
            fours = -(-d // 4)
            size = panels * PANEL * (4 * fours + 4)  # of a head, with its sums
            heads = heads[:, : self.n_head * size].reshape(windows, self.n_head, size)[..., : -4 * panels * PANEL]
            heads = heads.reshape(windows, self.n_head, panels, fours, PANEL, 4)
            rows = heads.transpose(0, 2, 4, 1, 3, 5).reshape(windows, panels * PANEL, self.n_head, 4 * fours)
        return rows[:, :t, :, :d].reshape(windows, t, n_state), scale


def pack_heard(q: np.ndarray, scale: np.ndarray, n_head: int, is_values: bool) -> Heard:
    """q (W, T, D) int8 in [-127, 127], scale (W, T) float32, at least 0: keys or values scale * q. Of values that are
    all zeros the scale becomes 0, so that it is not the one that others' weights are rounded by."""
    q = _array("q", q, q.shape if getattr(q, "ndim", 0) == 3 else (None, None, None), I8)
    windows, t, n_state = q.shape
    scale = _array("scale", scale, (windows, t), F32)
    if n_head < 1 or n_state % n_head:
        raise ValueError(f"n_head: expected a divisor of {n_state}, got {n_head}")
    if not 1 <= t <= MAX_HEARD or n_state // n_head > MAX_HEARD:
        raise ValueError(f"q: expected 1 to {MAX_HEARD} positions, and at most as many elements of a head, "
                         f"got {t} and {n_state // n_head}")  # fmt: skip
    if _in_c(scale):
        return Heard((_pack(q, scale, n_head, is_values),), (t, n_state), n_head, is_values)
    scale = np.where(q.any(axis=2), scale, np.float32(0)) if is_values else scale
    return Heard((q, scale), (t, n_state), n_head, is_values)


def _pack(q: np.ndarray, scale: np.ndarray, n_head: int, is_values: bool) -> np.ndarray:
    windows, t, n_state = q.shape
    dims = n_head, t, n_state // n_head
    packed = empty((windows, lib.mg_heard_bytes(is_values, *dims)), I8)
    _check(lib.mg_pack_heard(ffi.from_buffer(_BYTES, packed), is_values, ffi.from_buffer(_BYTES, q), _floats(scale),
                             windows, *dims))  # fmt: skip
    return packed


def attention_heard(q: np.ndarray, k: Heard, v: Heard, gate: np.ndarray | None = None) -> np.ndarray:
    """softmax(q kᵀ / sqrt(D / H)) v * gate, head by head -> (B, Tq, D). Row b of q (B, Tq, D) float32 listens to window
    b // (B // W); gate: None, (B, Tq, H) or (B, Tq, D).

    Queries and the softmax times the values' scales are rounded to 16 bits, of the largest of a head."""
    for name, x, is_values in (("k", k, False), ("v", v, True)):
        if not isinstance(x, Heard) or x.is_values != is_values:
            raise TypeError(f"{name}: expected Heard {'values' if is_values else 'keys'}, got {type(x).__name__}")
    if v.shape != k.shape or v.n_head != k.n_head:
        raise ValueError(f"v: expected shape {k.shape} and {k.n_head} heads like k, got {v.shape} and {v.n_head}")
    windows, t_k, n_state = k.shape
    q = _array("q", q, (None, None, n_state), F32)
    n_batch, t_q, _ = q.shape
    if windows == 0 or n_batch % windows:
        raise ValueError(f"k: expected a number of windows that divides the {n_batch} rows of q, got {windows}")
    per_element = gate is not None and gate.shape[-1] == n_state
    width = n_state // k.n_head if per_element else 1
    gate = _optional("gate", gate, (n_batch, t_q, k.n_head * width), F32)
    if not _in_c(q) or q.size == 0:
        values, scale = v.plain()
        return reference.attention_heard(q, k.floats(), values.astype(F32), scale, k.n_head, gate)
    out, packed = empty(q.shape, F32), [ffi.from_buffer(_BYTES, x.packed()) for x in (k, v)]
    _check(lib.mg_attention_heard(_floats(out), _floats(q), *packed, _floats(gate), width, n_batch, n_batch // windows,
                                  k.n_head, t_q, t_k, n_state // k.n_head))  # fmt: skip
    return out
