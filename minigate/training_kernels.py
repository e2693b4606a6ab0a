"""The kernels of training: checks, allocates, calls C; without it, with MINIGATE_ISA=numpy, and for float64 arrays the
same functions of backward.py run. See kernels.py, whose instruction set and threads they share.

No result depends on the number of threads.

Shapes: M rows, K inputs, N outputs, B batch, T time, D n_state, H n_head, V n_vocab.
"""

import numpy as np

from minigate import backward
from minigate.kernels import (  # the other half of the door
    F32,
    _array,
    _check,
    _float_type,
    _floats,
    _in_c,
    _matrix,
    _optional,
    _strided,
    _view,
    compiled,
)

if compiled:
    from minigate._kernels import lib

F32_ZERO = np.zeros((), F32)


# ---- attention ----


def _heads(q, k, v, n_head: int, causal: bool) -> tuple:
    """q k v checked, as views, and (B, H, Tq, Tk, d)."""
    dtype = _float_type("q", q)
    q = _strided("q", q, q.shape if q.ndim == 3 else (None, None, None), dtype)
    n_batch, t_q, n_state = q.shape
    k = _strided("k", k, (n_batch, *k.shape[1:2], n_state) if k.ndim == 3 else (n_batch, None, n_state), dtype)
    v = _strided("v", v, k.shape, dtype)
    t_k = k.shape[1]
    if n_head < 1 or n_state % n_head:
        raise ValueError(f"n_head: expected a divisor of {n_state}, got {n_head}")
    if t_k == 0 or (causal and t_q > t_k):
        raise ValueError(f"k: expected at least {max(1, t_q if causal else 1)} positions, got {t_k}")
    return q, k, v, (n_batch, n_head, t_q, t_k, n_state // n_head)


def attention_lse(q, k, v, n_head: int, causal=False) -> tuple[np.ndarray, np.ndarray]:
    """softmax(q kᵀ / sqrt(D / H)) v, head by head -> (B, Tq, D), and lse (B, H, Tq), the logarithm of each row's sum of
    exponentials, from which the backward recomputes the probabilities. q (B, Tq, D); k, v (B, Tk, D); views will do.
    causal: query i sees keys j <= i + Tk - Tq, which needs Tq <= Tk."""
    q, k, v, sizes = _heads(q, k, v, n_head, causal)
    if not _in_c(q) or q.size == 0:
        return backward.attention_lse(q, k, v, n_head, causal)
    out, lse = np.empty(q.shape, F32), np.empty(sizes[:3], F32)
    (q_data, *q_strides), (k_data, *k_strides), (v_data, *v_strides) = _view(q), _view(k), _view(v)
    _check(lib.mg_attention_lse(_floats(out), _floats(lse), q_data, k_data, v_data, *q_strides, *k_strides, *v_strides,
                                causal, *sizes))  # fmt: skip
    return out, lse


def attention_backward(dout, out, lse, q, k, v, n_head: int, causal=False) -> tuple[np.ndarray, ...]:
    """dout (B, Tq, D), out and lse of attention_lse -> dq (B, Tq, D), dk dv (B, Tk, D), without a Tq x Tk matrix."""
    q, k, v, sizes = _heads(q, k, v, n_head, causal)
    dout, out = _array("dout", dout, q.shape, q.dtype), _array("out", out, q.shape, q.dtype)
    lse = _array("lse", lse, sizes[:3], q.dtype)
    if not _in_c(q) or q.size == 0:
        return backward.attention_backward(dout, out, lse, q, k, v, n_head, causal)
    dq, dk, dv = (np.empty(x.shape, F32) for x in (q, k, v))
    (q_data, *q_strides), (k_data, *k_strides), (v_data, *v_strides) = _view(q), _view(k), _view(v)
    _check(lib.mg_attention_backward(*(_floats(x) for x in (dq, dk, dv, dout, out, lse)), q_data, k_data, v_data,
                                     *q_strides, *k_strides, *v_strides, causal, *sizes))  # fmt: skip
    return dq, dk, dv


# ---- products ----


def has_bf16() -> bool:
    """Whether products in bfloat16 run in C here; elsewhere they are float32 products."""
    return _in_c(F32_ZERO) and bool(lib.mg_has_bf16())


def _product(a, b, bias, a_strides: tuple[int, int], b_strides: tuple[int, int], sizes: tuple) -> np.ndarray:
    c = np.empty(sizes[:2], F32)
    _check(lib.mg_product_bf16(_floats(c), _floats(a), _floats(b), _floats(bias), *a_strides, *b_strides, *sizes))
    return c


def product_nt(x, w, bias=None, bf16=False) -> np.ndarray:
    """x (M, K), w (N, K), bias (N,) or None -> x wᵀ + bias (M, N), in float32 by BLAS.

    bf16: where the processor can, x and w are rounded to bfloat16 and products summed in float32; here and below."""
    dtype = _float_type("x", x)
    x = _matrix("x", x, None, dtype)
    w = _matrix("w", w, x.shape[1], dtype)
    bias = _optional("bias", bias, (w.shape[0],), dtype)
    (m, k), n = x.shape, w.shape[0]
    if bf16 and _in_c(x) and lib.mg_has_bf16():
        return _product(x, w, bias, (k, 1), (k, 1), (m, n, k))
    y = backward.product_nt(x, w, bf16 and not _in_c(x))
    if bias is not None:
        y += bias
    return y


def product_nn(dy, w, bf16=False) -> np.ndarray:
    """dy (M, N), w (N, K) -> dy w (M, K)."""
    dtype = _float_type("dy", dy)
    dy = _matrix("dy", dy, None, dtype)
    (m, n), k = dy.shape, w.shape[-1]
    w = _array("w", w, (n, k), dtype)
    if bf16 and _in_c(dy) and lib.mg_has_bf16():
        return _product(dy, w, None, (n, 1), (1, k), (m, k, n))
    return backward.product_nn(dy, w, bf16 and not _in_c(dy))


def product_tn(dy, x, bf16=False) -> np.ndarray:
    """dy (M, N), x (M, K) -> dyᵀ x (N, K)."""
    dtype = _float_type("dy", dy)
    dy = _matrix("dy", dy, None, dtype)
    (m, n), k = dy.shape, x.shape[-1]
    x = _array("x", x, (m, k), dtype)
    if bf16 and _in_c(dy) and lib.mg_has_bf16():
        return _product(dy, x, None, (1, n), (1, k), (n, k, m))
    return backward.product_tn(dy, x, bf16 and not _in_c(dy))
