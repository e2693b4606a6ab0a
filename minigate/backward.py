"""The kernels of training in NumPy: matrix products, the backward of layer norm, GELU and attention.

float32 and float64; formulas here, the layers that use them in layers.py and attention.py. What needs the forward's
matrices computes them again: only row statistics are kept between forward and backward.

M rows, K inputs, N outputs, B batch, T time, D n_state, H n_head, d = D / H.
"""

import math

import numpy as np

from minigate import reference

QUERIES = 128  # query rows whose probabilities exist at one time


def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as float32."""
    return reference.from_bf16(reference.to_bf16(np.asarray(x, np.float32)))


def _operands(a, b, bf16):
    return (round_bf16(a), round_bf16(b)) if bf16 and a.dtype == np.float32 else (a, b)


def product_nt(x, w, bf16=False):
    """x (M, K), w (N, K) -> x wᵀ (M, N). bf16: both rounded to bfloat16, sums in float32."""
    x, w = _operands(x, w, bf16)
    return x @ w.T


def product_nn(dy, w, bf16=False):
    """dy (M, N), w (N, K) -> dy w (M, K)."""
    dy, w = _operands(dy, w, bf16)
    return dy @ w


def product_tn(dy, x, bf16=False):
    """dy (M, N), x (M, K) -> dyᵀ x (N, K)."""
    dy, x = _operands(dy, x, bf16)
    return dy.T @ x


def layer_norm_backward(dy, x, weight, eps=1e-5):
    """dy x (…, D), weight (D,) -> dx (…, D), dweight (D,), dbias (D,).

    With x̂ the normalized x and g = dy weight: dx = (g - mean(g) - x̂ mean(g x̂)) / sqrt(variance + eps).
    """
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + x.dtype.type(eps))
    normal = centred * inverse
    g = dy * weight
    dx = (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True)) * inverse
    rows = tuple(range(dy.ndim - 1))
    return dx, (dy * normal).sum(rows), dy.sum(rows)


def gelu_backward(dy, x):
    """dy x -> dx = dy (Φ(x) + x φ(x))."""
    cdf = (reference.erf(x * x.dtype.type(math.sqrt(0.5))) + 1) * x.dtype.type(0.5)
    return dy * (cdf + x * np.exp(x * x * x.dtype.type(-0.5)) * x.dtype.type(1 / math.sqrt(2 * math.pi)))


def split_heads(x, n_head):
    """(B, T, D) -> (B, H, T, d), a view."""
    return x.reshape(*x.shape[:2], n_head, -1).transpose(0, 2, 1, 3)


def _score_tiles(q, k, causal):
    """q k (B, H, T, d) -> a slice of query rows and their scaled scores (B, H, rows, T_k), tile by tile."""
    t_q, t_k = q.shape[2], k.shape[2]
    for start in range(0, t_q, QUERIES):
        rows = slice(start, min(start + QUERIES, t_q))
        score = q[:, :, rows] @ k.swapaxes(2, 3)
        score *= q.dtype.type(1 / math.sqrt(q.shape[-1]))
        if causal:
            newest = np.arange(t_q)[rows, None] + t_k - t_q
            score[:, :, np.arange(t_k) > newest] = -np.inf
        yield rows, score


def attention_lse(q, k, v, n_head, causal=False):
    """q (B, T_q, D), k v (B, T_k, D) -> softmax(q kᵀ / sqrt(d)) v (B, T_q, D), and lse (B, H, T_q), the logarithm of
    each row's sum of exponentials, from which the backward recomputes the probabilities."""
    out, lse = np.empty_like(q), np.empty((q.shape[0], n_head, q.shape[1]), q.dtype)
    by_head, values = split_heads(out, n_head), split_heads(v, n_head)
    for rows, score in _score_tiles(split_heads(q, n_head), split_heads(k, n_head), causal):
        largest = score.max(-1, keepdims=True)
        score -= largest
        np.exp(score, out=score)
        total = score.sum(-1, keepdims=True)
        score /= total
        by_head[:, :, rows] = score @ values
        lse[:, :, rows] = (largest + np.log(total))[..., 0]
    return out, lse


def attention_backward(dout, out, lse, q, k, v, n_head, causal=False):
    """dout (B, T_q, D), out and lse of attention_lse -> dq (B, T_q, D), dk dv (B, T_k, D).

    P = exp(score - lse), dP = dout vᵀ, dscore = P (dP - rowsum(dout out)); Dao et al., arXiv 2205.14135, appendix B.
    """
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    dq_h, dk_h, dv_h, dout, out, q, k, v = (split_heads(x, n_head) for x in (dq, dk, dv, dout, out, q, k, v))
    delta = (dout * out).sum(-1, keepdims=True)
    for rows, p in _score_tiles(q, k, causal):
        p -= lse[:, :, rows, None]
        np.exp(p, out=p)
        dv_h += p.swapaxes(2, 3) @ dout[:, :, rows]
        dscore = dout[:, :, rows] @ v.swapaxes(2, 3)
        dscore -= delta[:, :, rows]
        dscore *= p
        dscore *= q.dtype.type(1 / math.sqrt(q.shape[-1]))
        dq_h[:, :, rows] = dscore @ k
        dk_h += dscore.swapaxes(2, 3) @ q[:, :, rows]
    return dq, dk, dv
