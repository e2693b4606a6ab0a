"""The NumPy reference of each kernel in kernels.py: its specification in Python, what runs without the C extension, and
what float64 arrays always go through. Same arguments and results; nothing is checked here.

Shapes: M rows, K inputs, N outputs, B batch, T time, D n_state, H n_head, d = D / H.
"""

import math

import numpy as np

ROWS = 4096         # of weights that are expanded at a time
EXACT_K = 1024      # 1024 * 128 * 128 <= 2^24: sums that float32 holds exactly, in any order
KEYS = 256          # that share a scale of their probabilities in attention_int8
QUERIES = 256       # whose scores are in memory at a time, each H * Tk
QUERY_STEPS = 127 * 128     # of a query's largest element, in attention_heard
WEIGHT_STEPS = 32767        # of the largest weight of a value
SMALLEST = 1e-30    # a row whose largest magnitude is below it counts as zero

# W. J. Cody, Rational Chebyshev approximations for the error function, Math. Comp. 23 (1969), 631-637: numerators and
# denominators in descending powers, for |x| <= 0.46875 in x^2, up to 4 in |x|, and above in 1/x^2.
ERF_SMALL = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
     3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
ERFC_MIDDLE = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
     2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
     1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
     3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)
ERFC_LARGE = (
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
     1.60837851487422766e-2, 6.58749161529837803e-4),
    (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
     2.33520497626869185e-3),
)


def matmul_int8(a, w):
    """a (M, K), w (N, K) int8 -> (M, N) int32, exact: float32 products of EXACT_K columns, summed as integers."""
    acc = np.zeros((a.shape[0], w.shape[0]), np.int32)
    for k in range(0, a.shape[1], EXACT_K):
        part = a[:, k:k + EXACT_K].astype(np.float32)
        for n in range(0, w.shape[0], ROWS):
            acc[:, n:n + ROWS] += (part @ w[n:n + ROWS, k:k + EXACT_K].astype(np.float32).T).astype(np.int32)
    return acc


def linear_int8(q, a_scale, w, w_scale, bias=None, gelu=False, residual=None):
    """q (M, K), w (N, K) int8, a_scale (M,), w_scale (N,) -> (M, N) float32."""
    y = matmul_int8(q, w).astype(np.float32)
    y *= a_scale[:, None] * w_scale
    return finish(y, bias, gelu, residual)


def to_bf16(x):
    """x float32 -> bfloat16, ties to even, as uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bf16(half):
    """bfloat16, as uint16 -> float32."""
    return (half.astype(np.uint32) << 16).view(np.float32)


def quantize_rows(x):
    """x (M, K) float32 -> q (M, K) int8, scale (M,) float32, x ≈ scale * q."""
    top = np.abs(x).max(axis=1, initial=0)
    zero = top < SMALLEST
    inverse = np.float32(127) / np.where(zero, np.float32(1), top)
    q = np.rint(x * inverse[:, None])
    q[zero] = 0
    return q.astype(np.int8), np.where(zero, np.float32(1), top / np.float32(127))


def finish(y, bias=None, gelu_after=False, residual=None):
    """[gelu](y + bias) + residual, y (M, N)."""
    if bias is not None:
        y = y + bias
    if gelu_after:
        y = gelu(y)
    return y if residual is None else y + residual


def linear(x, w, bias=None, gelu_after=False, residual=None):
    """x (M, K), w (N, K) -> (M, N)."""
    return finish(x @ w.T, bias, gelu_after, residual)


def layer_norm(x, weight, bias, eps=1e-5):
    """x (M, D), weight, bias (D,) -> (M, D)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + x.dtype.type(eps)) * weight + bias


def erf(x):
    """The error function of any array of floats, in its precision (float64: error below 1e-15)."""
    x = np.asarray(x)
    size = np.abs(x)
    small = size <= 0.46875
    large = size > 4
    result = np.empty_like(size)
    at = size[small]
    result[small] = at * np.polyval(ERF_SMALL[0], at * at) / np.polyval(ERF_SMALL[1], at * at)
    at = size[~small & ~large]
    result[~small & ~large] = 1 - np.exp(-at * at) * np.polyval(ERFC_MIDDLE[0], at) / np.polyval(ERFC_MIDDLE[1], at)
    at = np.minimum(size[large], 10)    # erfc(10) is 2e-45
    inverse = 1 / (at * at)
    tail = 1 / math.sqrt(math.pi) - inverse * np.polyval(ERFC_LARGE[0], inverse) / np.polyval(ERFC_LARGE[1], inverse)
    result[large] = 1 - np.exp(-at * at) / at * tail
    return np.copysign(result, x)


def gelu(x):
    """x * Phi(x), with Phi the normal distribution function: x / 2 * (1 + erf(x / sqrt(2)))."""
    y = erf(x * x.dtype.type(math.sqrt(0.5)))
    y += 1
    y *= x
    y *= x.dtype.type(0.5)
    return y


def attention(q, k, v, n_head, causal=False, gate=None):
    """q (B, Tq, D), k, v (Bk, Tk, D), gate None, (B, Tq, H) or (B, Tq, D) -> (B, Tq, D)."""
    n_batch, t_q, n_state = q.shape
    t_k, d = k.shape[1], n_state // n_head
    group = n_batch // k.shape[0] if n_batch else 1
    out = np.empty((n_batch, t_q, n_head, d), q.dtype)
    for b in range(n_batch):
        keys = k[b // group].reshape(t_k, n_head, d).transpose(1, 2, 0)
        values = v[b // group].reshape(t_k, n_head, d).transpose(1, 0, 2)
        for i in range(0, t_q, QUERIES):
            queries = q[b, i:i + QUERIES].reshape(-1, n_head, d).transpose(1, 0, 2)
            scores = queries @ keys * q.dtype.type(1 / math.sqrt(d))        # (H, queries, Tk)
            if causal:
                position = np.arange(i, i + queries.shape[1])[:, None] + t_k - t_q
                scores[:, np.arange(t_k) > position] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            out[b, i:i + QUERIES] = (scores @ values).transpose(1, 0, 2)
    if gate is not None:
        out *= gate.reshape(n_batch, t_q, n_head, -1)
    return out.reshape(n_batch, t_q, n_state)


def nearest_steps(x, axis, steps=127):
    """x to the nearest of so many steps of its largest magnitude along an axis, and the steps' size."""
    top = np.abs(x).max(axis=axis, keepdims=True)
    inverse = x.dtype.type(steps) / np.where(top < SMALLEST, x.dtype.type(np.inf), top)
    return np.rint(x * inverse), top / x.dtype.type(steps)


def attention_heard(q, k, v, v_scale, n_head, gate=None):
    """`attention`, not causal, to values v_scale (Bk, Tk) * v, v whole numbers, as csrc/heardattention.c rounds it: a
    head's queries, and its softmax times v_scale, to steps of their largest."""
    n_batch, t_q, n_state = q.shape
    d, group = n_state // n_head, n_batch // k.shape[0] if n_batch else 1
    out = np.empty((n_batch, t_q, n_head, d), q.dtype)
    for b, h in np.ndindex(n_batch, n_head):
        head, shared = slice(h * d, h * d + d), b // group
        for i in range(0, t_q, QUERIES):
            queries, scale = nearest_steps(q[b, i:i + QUERIES, head], 1, QUERY_STEPS)
            scores = queries @ k[shared, :, head].T * (scale / q.dtype.type(math.sqrt(d)))
            e = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights, size = nearest_steps(e * v_scale[shared], 1, WEIGHT_STEPS)
            out[b, i:i + QUERIES, h] = weights @ v[shared, :, head] * (size / e.sum(axis=1, keepdims=True))
    if gate is not None:
        out *= gate.reshape(n_batch, t_q, n_head, -1)
    return out.reshape(n_batch, t_q, n_state)


def attention_int8(q, k, v, n_head, causal=False, gate=None):
    """`attention` as csrc/dynamicattention.c rounds it: a scale for each query and each key, less the keys' mean, of a
    head; for KEYS keys at a time one for each element of values, and one for probabilities, whose largest is 255."""
    n_batch, t_q, n_state = q.shape
    t_k, d = k.shape[1], n_state // n_head
    group = n_batch // k.shape[0] if n_batch else 1
    out = np.empty((n_batch, t_q, n_head, d), q.dtype)
    for b, h in np.ndindex(n_batch, n_head):
        head, shared = slice(h * d, h * d + d), b // group
        keys, key_scale = nearest_steps(k[shared, :, head] - k[shared, :, head].mean(axis=0), 1)
        for i in range(0, t_q, QUERIES):
            queries, scale = nearest_steps(q[b, i:i + QUERIES, head], 1)
            scores = queries @ keys.T * key_scale.T * (scale / q.dtype.type(math.sqrt(d)))
            if causal:
                position = np.arange(i, i + len(queries))[:, None] + t_k - t_q
                scores[np.arange(t_k) > position] = -np.inf
            top, total, sums = scores.max(axis=1, keepdims=True), 0, 0
            for j in range(0, t_k, KEYS):
                some, (values, value_scale) = scores[:, j:j + KEYS], nearest_steps(v[shared, j:j + KEYS, head], 0)
                own = np.maximum(some.max(axis=1, keepdims=True), top - 1000)   # of keys that are not seen: anything
                p, weight = 255 * np.exp(some - own), np.exp(own - top)
                total += weight * p.sum(axis=1, keepdims=True)
                sums += weight * (np.rint(p) @ values * value_scale)
            out[b, i:i + QUERIES, h] = sums / total
    if gate is not None:
        out *= gate.reshape(n_batch, t_q, n_head, -1)
    return out.reshape(n_batch, t_q, n_state)


def choose(logits, never, ranges, begin, prefer, k):
    """As choice_kernels.choose -> ids, values (rows, k), totals (rows,)."""
    position = np.arange(logits.shape[1])
    logits[:, never] = -np.inf
    for row, (first, end, middle, last) in zip(logits, ranges, strict=True):
        row[(position < begin) & ((position < first) | (position >= end))] = -np.inf
        row[(position >= begin) & ((position < middle) | (position >= last))] = -np.inf
        peak = row[begin:].max(initial=-np.inf)
        if prefer and peak > -np.inf:
            together = peak + np.log(np.exp(row[begin:] - peak).sum(dtype=float))
            if together > row[:begin].max(initial=-np.inf):
                row[:begin] = -np.inf
    every, rest, found = np.arange(len(logits)), logits.copy(), []
    for _ in range(k):  # few: faster than to sort the vocabulary
        found.append(rest.argmax(axis=1))
        rest[every, found[-1]] = -np.inf
    ids = np.array(found).T
    values = np.take_along_axis(logits, ids, axis=1)
    with np.errstate(invalid="ignore"):
        totals = np.exp(logits - values[:, :1]).sum(axis=1, dtype=float)
    return ids, values, totals
