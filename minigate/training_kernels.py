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
    from minigate._kernels import ffi, lib

I64 = np.dtype(np.int64)
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


def attention_backward(dout, out, lse, q, k, v, n_head: int, causal=False, bf16=False) -> tuple[np.ndarray, ...]:
    """dout (B, Tq, D), out and lse of attention_lse -> dq (B, Tq, D), dk dv (B, Tk, D), without a Tq x Tk matrix.

    bf16: where has_bf16(), all products but the scores are of numbers rounded to bfloat16."""
    q, k, v, sizes = _heads(q, k, v, n_head, causal)
    dout, out = _array("dout", dout, q.shape, q.dtype), _array("out", out, q.shape, q.dtype)
    lse = _array("lse", lse, sizes[:3], q.dtype)
    if not _in_c(q) or q.size == 0:
        return backward.attention_backward(dout, out, lse, q, k, v, n_head, causal)
    dq, dk, dv = (np.empty(x.shape, F32) for x in (q, k, v))
    (q_data, *q_strides), (k_data, *k_strides), (v_data, *v_strides) = _view(q), _view(k), _view(v)
    _check(lib.mg_attention_backward(*(_floats(x) for x in (dq, dk, dv, dout, out, lse)), q_data, k_data, v_data,
                                     *q_strides, *k_strides, *v_strides, causal, bf16, *sizes))  # fmt: skip
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


# ---- layer norm, GELU, bias ----


def layer_norm_backward(dy, x, weight, eps=1e-5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy x (…, D), weight (D,) -> dx (…, D), dweight (D,), dbias (D,)."""
    dtype = _float_type("x", x)
    x = _array("x", x, x.shape, dtype)
    n = x.shape[-1]
    dy, weight = _array("dy", dy, x.shape, dtype), _array("weight", weight, (n,), dtype)
    if not _in_c(x):
        return backward.layer_norm_backward(dy, x, weight, eps)
    dx, sums = np.empty(x.shape, F32), np.empty((2, n), F32)
    _check(lib.mg_layer_norm_backward(*map(_floats, (dx, sums, dy, x, weight)), eps, x.size // n if n else 0, n))
    return dx, sums[0], sums[1]


def gelu_backward(dy, x) -> np.ndarray:
    """dy x of any shape -> dx = dy (Φ(x) + x φ(x))."""
    dtype = _float_type("x", x)
    x = _array("x", x, x.shape, dtype)
    dy = _array("dy", dy, x.shape, dtype)
    if not _in_c(x):
        return backward.gelu_backward(dy, x)
    dx = np.empty(x.shape, F32)
    _check(lib.mg_gelu_backward(*map(_floats, (dx, dy, x)), x.size))
    return dx


def column_sums(x) -> np.ndarray:
    """x (M, N) -> (N,), the gradient of a bias."""
    x = _matrix("x", x, None, _float_type("x", x))
    if not _in_c(x):
        return x.sum(0)
    sums = np.empty(x.shape[1], F32)
    _check(lib.mg_column_sums(_floats(sums), _floats(x), *x.shape))
    return sums


# ---- losses ----


def logit_losses(logits, teacher, targets, temperature: float, kl_scale: float, ce_scale: float, out) -> np.ndarray:
    """logits (M, V), teacher (M, V) or None, targets (M,) int64 -> values (M, 2) float64 of each row.

    With p, q the softmax of logits and teacher over the temperature and s that of logits: values are Σ q (ln q - ln p)
    and -ln s[target]; out (M, V), which may be logits, receives kl_scale (p - q) + ce_scale (s - onehot(target)). Rows
    with a target below 0 get zeros. float32 and in C only: distill.kl_ce has the formula for the rest."""
    m, n = logits.shape
    logits, out = (_array(name, x, (m, n), F32) for name, x in (("logits", logits), ("out", out)))
    teacher = _optional("teacher", teacher, (m, n), F32)
    values = np.empty((m, 2), np.float64)
    _check(lib.mg_logit_losses(_floats(out), ffi.from_buffer("double[]", values), _floats(logits), _floats(teacher),
                               ffi.from_buffer("int64_t[]", _array("targets", targets, (m,), I64)), temperature,
                               kl_scale, ce_scale, m, n))  # fmt: skip
    return values


def magnitude(a) -> float:
    """The largest |a|, NaN if an element is not finite; a float32, in C only, as the next two."""
    largest = ffi.new("float *")
    _check(lib.mg_magnitude(largest, _floats(a), a.size))
    return largest[0]


def power_sum(a, largest: float, power: int) -> float:
    """Σ (|a| / largest)^power."""
    total = ffi.new("double *")
    _check(lib.mg_power_sum(total, _floats(a), largest, power, a.size))
    return total[0]


def power_backward(a, largest: float, factor: float, power: int, da) -> None:
    """da = factor sign(a) (|a| / largest)^(power - 1)."""
    _check(lib.mg_power_backward(_floats(da), _floats(a), largest, factor, power, a.size))


# ---- optimizer ----


def in_c(*arrays) -> bool:
    """Whether these can go to the kernels above that are in C only: dense, float32, and the extension in use."""
    return all(a.dtype == F32 and a.flags.c_contiguous for a in arrays) and _in_c(F32_ZERO)


def adamw(p, m, v, average, g, *, beta1, beta2, g_mean, g_root, step, eps, shrink, average_rate) -> None:
    """optim.adamw on float32 arrays (n,) that are dense, bit for bit the same, in C only."""
    for name, x in (("m", m), ("v", v), ("g", g)):
        _array(name, x, p.shape, F32)
    _optional("average", average, p.shape, F32)
    _check(lib.mg_adamw(*map(_floats, (p, m, v, average, g)), beta1, beta2, g_mean, g_root, step, eps, shrink,
                        average_rate, p.size))  # fmt: skip


def sum_squares(x) -> float:
    """Σ x² in float64; x float32, dense, in C only."""
    total = ffi.new("double *")
    _check(lib.mg_sum_squares(total, _floats(x), x.size))
    return total[0]
