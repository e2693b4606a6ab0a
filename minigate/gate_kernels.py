"""Gates of one number a head in C; those of one an element, and what runs in NumPy, by attention.py. See kernels.py,
whose instruction set and threads this shares.

B batch, T time, D n_state, H n_head.
"""

from collections.abc import Mapping

import numpy as np

from minigate import attention
from minigate.kernels import F32, _array, _check, _floats, _in_c, compiled, empty

if compiled:
    from minigate._kernels import ffi, lib

    KINDS = {"none": lib.MG_NO_GATE, "per_head": lib.MG_PER_HEAD, "per_head_mlp": lib.MG_PER_HEAD_MLP,
             "all_heads": lib.MG_ALL_HEADS}  # fmt: skip


def gate(kind: str, h: np.ndarray, p: Mapping[str, np.ndarray], n_head: int, scale: float) -> np.ndarray | None:
    """`attention.gate`: h (B, T, D), p the module's gate parameters -> scale * sigmoid(gate_logits), (B, T, H) or for
    `elementwise` (B, T, D); None for `none`. In C for float32 and one number a head."""
    if kind in ("none", "elementwise") or not _in_c(h):
        return attention.gate(kind, h, p, n_head, scale)
    h = _array("h", h, (None, None, None), F32)
    n_state = h.shape[2]
    out = empty((*h.shape[:2], n_head), F32)
    struct = parameters(kind, p, n_state, n_head, scale)
    _check(lib.mg_gate(_floats(out), ffi.new("struct mg_gate *", struct), _floats(h), out.size // n_head, n_head,
                       n_state // n_head))  # fmt: skip
    return out


def parameters(kind: str, p: Mapping[str, np.ndarray], n_state: int, n_head: int, scale: float) -> tuple:
    """-> struct mg_gate as cffi takes it, to be kept as long as C reads it: its pointers hold what they point to."""
    shapes = attention.gate_shapes(kind, n_state, n_head)
    pointers = [_floats(_array(name, p[name], shape, F32)) for name, shape in shapes.items()]
    n_hidden = shapes["0.weight"][1] if kind == "per_head_mlp" else 0
    return KINDS[kind], n_hidden, scale, *pointers, *[ffi.NULL] * (4 - len(pointers))
