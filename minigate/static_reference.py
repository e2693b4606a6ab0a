"""The NumPy reference of each kernel in static_kernels.py: its specification in Python, and what runs without the C
extension. Same arguments and results; nothing is checked here. See reference.py.

Shapes: M rows, K inputs, N outputs, B batch, T time, D n_state, H n_head, d = D / H.
"""

import math

import numpy as np

from minigate import reference

Q_MIN, Q_MAX = -128, 127
P_MAX = 255         # of a probability in uint8
DIFFUSED_BITS = 22  # 255 * 2^22 and what rounding adds to it is in int32
F32 = np.float32


def values(x):
    """x a Tensor -> its numbers in float32: scale * (q - zero_point), float32 as it stands."""
    if x.data.dtype != np.int8:
        return x.data
    return (x.data.astype(np.int16) - np.int16(x.grid.zero_point)).astype(F32) * F32(x.grid.scale)


def held(x, grid):
    """x float32 -> what `values` gives back rounded, int8; float32 if grid is None."""
    if grid is None:
        return x.astype(F32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(x * (F32(1) / F32(grid.scale))) + F32(grid.zero_point)
    return np.fmin(np.fmax(steps, Q_MIN), Q_MAX).astype(np.int8)


def expand(q, scale):
    """q (M, N) int8, scale (M,) -> (M, N) float32."""
    return q * scale[:, None]


def add(x, y, out):
    """x, y Tensor of one shape -> x + y."""
    return held(values(x) + values(y), out)


def linear(a, w, w_scale, out, bias=None, gelu=False, residual=None):
    """a Tensor (M, K) int8, w (N, K) int8, w_scale (N,), residual None or Tensor (M, N) -> (M, N)."""
    acc = reference.matmul_int8(a.data, w)
    acc -= np.int32(a.grid.zero_point) * w.sum(axis=1, dtype=np.int32)
    y = acc.astype(F32)
    y *= F32(a.grid.scale) * w_scale
    return held(reference.finish(y, bias, gelu, None if residual is None else values(residual)), out)


def layer_norm(x, weight, bias, out, eps=1e-5):
    """x Tensor (..., D), weight, bias (D,) -> (..., D)."""
    return held(reference.layer_norm(values(x), weight, bias, eps), out)


def attention(q, k, v, n_head, out, causal=False, gate=None, ungated=None, diffuse=False):
    """q Tensor (B, Tq, D), k, v Tensor (Bk, Tk, D), all int8, gate None, (B, Tq, H) or (B, Tq, D) -> (B, Tq, D)."""
    n_batch, t_q, n_state = q.data.shape
    k_batch, t_k, _ = k.data.shape
    d = n_state // n_head
    unit = F32(float(q.grid.scale) * float(k.grid.scale) / math.sqrt(d))
    result = np.empty((n_batch, t_q, n_head, d), F32)
    for b in range(n_batch):
        shared = b // (n_batch // k_batch)
        keys = _heads(k, shared, n_head).transpose(0, 2, 1)
        for i in range(0, t_q, reference.QUERIES):
            scores = _heads(q, b, n_head, slice(i, i + reference.QUERIES)) @ keys       # (H, queries, Tk), exact
            if causal:
                position = np.arange(i, i + scores.shape[1])[:, None] + t_k - t_q
                scores[:, np.arange(t_k) > position] = -np.inf
            p = _probabilities(scores, unit, diffuse)
            sums = (p @ _heads(v, shared, n_head)).transpose(1, 0, 2)
            result[b, i:i + reference.QUERIES] = sums.astype(F32) * (F32(v.grid.scale) / F32(P_MAX))
    if gate is not None:
        between = held(result, ungated)
        steps = between.astype(np.int16) - np.int16(ungated.zero_point)
        result = steps.astype(F32) * (F32(ungated.scale) * gate.reshape(n_batch, t_q, n_head, -1))
    return held(result.reshape(n_batch, t_q, n_state), out)


def _heads(x, b, n_head, rows=slice(None)):
    """x Tensor (B, T, D) int8 -> q - zero_point of rows of b as (H, T, d) float64, whose sums are exact."""
    part = x.data[b, rows].astype(np.float64) - x.grid.zero_point
    return part.reshape(len(part), n_head, -1).transpose(1, 0, 2)


def _probabilities(scores, unit, diffuse):
    """scores (..., Tk) -> 255 softmax(unit * scores), rounded, float64."""
    e = np.exp((scores - scores.max(axis=-1, keepdims=True)).astype(F32) * unit)
    p = e * (F32(P_MAX) / e.sum(axis=-1, keepdims=True))
    return (diffused(p) if diffuse else np.rint(p)).astype(np.float64)


def diffused(p):
    """p (..., Tk) float32, 0 or more -> whole numbers int64, each with what rounding left of those before it: it is all
    sums from the first on that are rounded, and none of many small ones is lost.

    Error diffusion in one dimension (Floyd and Steinberg, Proc. SID 17, 1976). What is added is in 2^-DIFFUSED_BITS.
    """
    sums = np.cumsum(np.rint(p * F32(2 ** DIFFUSED_BITS)), axis=-1, dtype=np.float64).astype(np.int64)
    return np.diff((sums + 2 ** (DIFFUSED_BITS - 1)) >> DIFFUSED_BITS, axis=-1, prepend=0)
