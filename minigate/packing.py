"""int8 weights in the order in which the integer products of kernels.py read them.

N outputs, K inputs.
"""

import numpy as np

from minigate.kernels import I8, MAX_K, _check, _matrix, compiled

if compiled:
    from minigate._kernels import ffi, lib

    _BYTES = ffi.typeof("int8_t[]")

ALIGNMENT = 64  # bytes, of packed weights
PANEL = 64  # columns of a panel of packed weights
CHUNK = 32 << 20  # bytes of packed weights that are allocated at once
HUGE_PAGE = 2 << 20  # bytes


class Room:
    """Memory for the packed weights of a model, side by side in large chunks, for which NumPy asks for huge pages: a
    token reads all of them once, and finding their small pages would take a tenth of its time."""

    def __init__(self, chunk: int = CHUNK):
        self._chunk, self._free = chunk, np.empty(0, I8)

    def take(self, n: int) -> np.ndarray:
        """-> (n,) int8 on a boundary of ALIGNMENT bytes. Of a chunk only the pages of what is taken become memory."""
        if len(self._free) < n:
            chunk = np.empty(max(n, self._chunk) + HUGE_PAGE, I8)
            self._free = chunk[-chunk.ctypes.data % HUGE_PAGE:]
        room, self._free = self._free[:n], self._free[n + -n % ALIGNMENT:]
        return room


class PackedInt8:
    """int8 weights (N, K) in the order in which the products read them; made by pack_int8()."""

    __slots__ = ("shape", "_plain", "_packed", "_pointer")

    def __init__(self, q: np.ndarray, room: Room):
        self.shape = q.shape
        if not compiled:
            self._plain = q
            return
        self._plain, self._packed = None, room.take(lib.mg_packed_bytes(*q.shape))
        self._pointer = ffi.from_buffer(_BYTES, self._packed)
        _check(lib.mg_pack_int8(self._pointer, ffi.from_buffer(_BYTES, q), *q.shape))

    def pointer(self):
        """The packed form (csrc/pack.c) as C reads it."""
        return self._pointer

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Some rows of the weights as they were: index (...) -> (..., K) int8."""
        n, k = self.shape
        if index.size and not 0 <= index.min() <= index.max() < n:
            raise IndexError(f"index: expected 0 to {n - 1}, got {index.min()} to {index.max()}")
        if self._plain is not None:
            return self._plain[index]
        panels, groups = -(-n // PANEL), -(-k // 4)
        packed = self._packed[:panels * groups * PANEL * 4].reshape(panels, groups, PANEL, 4)
        return packed[index // PANEL, :, index % PANEL].reshape(*index.shape, 4 * groups)[..., :k]

    def plain(self) -> np.ndarray:
        """The weights (N, K) int8 as they were, kept once they are wanted."""
        if self._plain is None:
            self._plain = np.ascontiguousarray(self.rows(np.arange(self.shape[0])))
        return self._plain


def pack_int8(q: np.ndarray, room: Room | None = None) -> PackedInt8:
    """q (N, K) int8 in [-127, 127], at most MAX_K columns -> packed weights, which do not refer to q; in `room` with
    others that live as long."""
    q = _matrix("q", q, None, I8)
    if q.shape[1] > MAX_K:
        raise ValueError(f"q: expected at most {MAX_K} columns, got {q.shape[1]}")
    if q.size and q.min() < -127:
        raise ValueError("q: expected weights from -127 to 127, got -128")
    return PackedInt8(q, room or Room(0))
