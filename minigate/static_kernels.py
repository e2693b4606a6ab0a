"""The kernels of the scheme w8a8-static: checks, allocates, calls C; without it and with MINIGATE_ISA=numpy the same
functions of static_reference.py run. See kernels.py, whose instruction set and threads they share.

    x ≈ scale * (q - zero_point), q = clip(rint(x / scale) + zero_point, -128, 127), ties to even

A result is float32 where `out` is None, else int8 on the grid `out`. Products are exact in int32; what follows them up
to the result (scale, bias, GELU, residual) is float32, so that a value half way between two steps may become either.

Shapes: M rows, K inputs, N outputs, B batch, T time, D n_state, H n_head.
"""

from typing import NamedTuple

import numpy as np

from minigate import static_reference as reference
from minigate.kernels import (  # the other half of the door
    F32,
    I8,
    _array,
    _check,
    _floats,
    _in_c,
    _matrix,
    _optional,
    _strided,
    compiled,
    empty,
)
from minigate.packing import PackedInt8

if compiled:
    from minigate._kernels import ffi, lib

    _NUMBERS, _FLOATS, _BYTES = ffi.typeof("struct mg_tensor *"), ffi.typeof("float[]"), ffi.typeof("int8_t[]")

MAX_K = 65536  # inputs of a product with a zero point that int32 surely holds: 65536 * 255 * 127 < 2^31
MAX_ATTENTION = 32768  # keys, and elements of a head


class Grid(NamedTuple):
    """The int8 values of a tensor: x ≈ scale * (q - zero_point)."""

    scale: float
    zero_point: int


class Tensor(NamedTuple):
    """int8 on a grid, or float32 as it stands: then the grid is what an int8 reader rounds it to."""

    data: np.ndarray
    grid: Grid | None = None


def _numbers(x, grid: Grid | None, first=None):
    """An array as C sees it; `first`: where it begins, if it is a view with strides."""
    at = x if first is None else first
    if x.dtype == F32:
        return ffi.new(_NUMBERS, (ffi.from_buffer(_FLOATS, at), ffi.NULL, 1.0, 0))
    return ffi.new(_NUMBERS, (ffi.NULL, ffi.from_buffer(_BYTES, at), grid.scale, grid.zero_point))


def _tensor(name: str, x, shape: tuple | None = None) -> Tensor:
    """x, dense, after a check of its type, grid and shape (None: any)."""
    _check_tensor(name, x)
    return Tensor(_array(name, x.data, x.data.shape if shape is None else shape, x.data.dtype), x.grid)


def _check_tensor(name: str, x, only_int8: bool = False) -> None:
    types = (I8,) if only_int8 else (I8, F32)
    if not isinstance(x, Tensor) or getattr(x.data, "dtype", None) not in types:
        got = f"Tensor of {getattr(x.data, 'dtype', '?')}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a Tensor of {' or '.join(map(str, types))}, got {got}")
    if x.data.dtype == I8:
        _check_grid(name, x.grid)


def _check_grid(name: str, grid) -> None:
    if not isinstance(grid, Grid) or not 0 < grid.scale < np.inf or not -128 <= grid.zero_point <= 127:
        raise ValueError(f"{name}: expected a grid with a positive scale and a zero point in int8, got {grid}")


def _result(shape: tuple, out: Grid | None) -> np.ndarray:
    if out is None:
        return empty(shape, F32)
    _check_grid("out", out)
    return empty(shape, I8)


# ---- conversion ----


def convert(x: Tensor, out: Grid | None) -> np.ndarray:
    """The numbers of x on another grid, or as float32."""
    x = _tensor("x", x)
    y = _result(x.data.shape, out)
    if not _in_c(x.data):
        return reference.held(reference.values(x), out)
    _check(lib.mg_add_static(_numbers(y, out), _numbers(*x), ffi.NULL, y.size))
    return y


def add(x: Tensor, y: Tensor, out: Grid | None) -> np.ndarray:
    """x + y, both of one shape."""
    x = _tensor("x", x)
    y = _tensor("y", y, x.data.shape)
    z = _result(x.data.shape, out)
    if not _in_c(x.data):
        return reference.add(x, y, out)
    _check(lib.mg_add_static(_numbers(z, out), _numbers(*x), _numbers(*y), z.size))
    return z


def expand(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """q (M, N) int8, scale (M,) float32 -> scale[m] * q[m, n] (M, N) float32: weights with a scale per row."""
    q = _matrix("q", q, None, I8)
    scale = _array("scale", scale, q.shape[:1], F32)
    if not _in_c(q):
        return reference.expand(q, scale)
    y = empty(q.shape, F32)
    _check(lib.mg_expand(_floats(y), ffi.from_buffer(_BYTES, q), _floats(scale), *q.shape))
    return y


# ---- linear, layer norm ----


def linear(a: Tensor, w: PackedInt8, w_scale: np.ndarray, out: Grid | None, bias=None, gelu=False,
           residual: Tensor | None = None) -> np.ndarray:
    """[gelu](a wᵀ + bias) + residual -> (M, N). a (M, K) int8, w (N, K), w_scale (N,), bias (N,) or None float32,
    residual (M, N) or None."""
    n, k = w.shape
    _check_tensor("a", a, only_int8=True)
    a = Tensor(_matrix("a", a.data, k, I8), a.grid)
    m = a.data.shape[0]
    if k > MAX_K:
        raise ValueError(f"w: expected at most {MAX_K} columns, got {k}")
    w_scale = _array("w_scale", w_scale, (n,), F32)
    bias = _optional("bias", bias, (n,), F32)
    residual = None if residual is None else _tensor("residual", residual, (m, n))
    y = _result((m, n), out)
    if not _in_c(a.data):
        return reference.linear(a, w.plain(), w_scale, out, bias, gelu, residual)
    _check(lib.mg_linear_static(_numbers(y, out), _numbers(*a), w.pointer(), _floats(w_scale), _floats(bias),
                                ffi.NULL if residual is None else _numbers(*residual), gelu, m, n, k))
    return y


def layer_norm(x: Tensor, weight: np.ndarray, bias: np.ndarray, out: Grid | None, eps: float = 1e-5) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis. x (..., D), weight, bias (D,) float32."""
    x = _tensor("x", x)
    n = x.data.shape[-1]
    weight, bias = _array("weight", weight, (n,), F32), _array("bias", bias, (n,), F32)
    y = _result(x.data.shape, out)
    if not _in_c(x.data):
        return reference.layer_norm(x, weight, bias, out, eps)
    _check(lib.mg_layer_norm_static(_numbers(y, out), _numbers(*x), _floats(weight), _floats(bias), eps,
                                    y.size // n if n else 0, n))
    return y


# ---- attention ----


def _view(x: Tensor) -> tuple:
    """pointer, and the strides of batches and rows in elements."""
    batch, row, _ = x.data.strides
    return _numbers(x.data, x.grid, x.data[0, 0]), batch, row


def _rows(name: str, x, n_batch=None, t=None, n_state=None) -> Tensor:
    """x (B, T, D) int8 after a check; a copy only if its last axis is not dense or a stride is negative."""
    _check_tensor(name, x, only_int8=True)
    wanted = (n_batch, t, n_state)
    if x.data.ndim == 3:
        wanted = tuple(n if n is not None else own for n, own in zip(wanted, x.data.shape, strict=True))
    return Tensor(_strided(name, x.data, wanted, I8), x.grid)


def attention(q: Tensor, k: Tensor, v: Tensor, n_head: int, out: Grid | None, causal=False, gate=None,
              ungated: Grid | None = None, diffuse=False) -> np.ndarray:
    """P v * gate, P = softmax(q kᵀ / sqrt(D / H)) in steps of 1/255, to the nearest or, diffuse, by
    `static_reference.diffused`; head by head -> (B, Tq, D), without a Tq x Tk matrix in memory.

    q (B, Tq, D); k, v (Bk, Tk, D), all int8; Bk divides B and row b attends to k[b // (B // Bk)]; views with strides
    will do. gate: None, or (B, Tq, H) or (B, Tq, D) float32; then P v is rounded to the grid `ungated` before it is
    gated. causal: query i sees keys j <= i + Tk - Tq, which needs Tq <= Tk."""
    q = _rows("q", q)
    n_batch, t_q, n_state = q.data.shape
    k = _rows("k", k, n_state=n_state)
    v = _rows("v", v, *k.data.shape)
    k_batch, t_k, _ = k.data.shape
    if n_head < 1 or n_state % n_head:
        raise ValueError(f"n_head: expected a divisor of {n_state}, got {n_head}")
    if k_batch == 0 or n_batch % k_batch:
        raise ValueError(f"k: expected a number of rows that divides the {n_batch} of q, got {k_batch}")
    if not max(1, t_q if causal else 1) <= t_k <= MAX_ATTENTION:
        raise ValueError(f"k: expected {max(1, t_q if causal else 1)} to {MAX_ATTENTION} positions, got {t_k}")
    if n_state // n_head > MAX_ATTENTION:
        raise ValueError(f"n_head: expected heads of at most {MAX_ATTENTION}, got {n_state // n_head}")
    gate_width = 0
    if gate is not None:
        _check_grid("ungated", ungated)
        gate_width = n_state // n_head if gate.shape[-1] == n_state else 1
        gate = _array("gate", gate, (n_batch, t_q, n_head * gate_width), F32)
    y = _result((n_batch, t_q, n_state), out)
    if not _in_c(q.data) or q.data.size == 0:
        return reference.attention(q, k, v, n_head, out, causal, gate, ungated, diffuse)
    (q_data, *q_strides), (k_data, *k_strides), (v_data, *v_strides) = _view(q), _view(k), _view(v)
    between = ffi.NULL if gate is None else ffi.new(_NUMBERS, (ffi.NULL, ffi.NULL, *ungated))
    _check(lib.mg_attention_static(_numbers(y, out), between, q_data, k_data, v_data, _floats(gate), *q_strides,
                                   *k_strides, *v_strides, gate_width, causal, diffuse, n_batch, n_batch // k_batch,
                                   n_head, t_q, t_k, n_state // n_head))
    return y
