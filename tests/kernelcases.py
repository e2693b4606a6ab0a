"""What the tests of kernels share: inputs, tolerances, and attention by its formula."""

import math

import numpy as np

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 384, 1536)
GELU_ERROR = 5e-7           # absolute, over all float32
ATTENTION_ERROR = 3e-6      # absolute, of averages of values of order 1, with scores of order 1


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def int8s(rng, fill, *shape):
    """"random", "low", "high" or "zero row" int8 of which the lowest is -128, as for activations."""
    q = rng.integers(-128, 128, shape).astype(np.int8)
    if fill in ("low", "high"):
        q[:] = {"low": -128, "high": 127}[fill]
    elif fill == "zero row":
        q[len(q) // 2] = 0
    return q


def weights(rng, fill, *shape):
    return np.maximum(int8s(rng, fill, *shape), -127)


def close(got, wanted, bound):
    assert got.dtype == np.float32 and got.shape == wanted.shape
    error = np.abs(got - wanted).max(initial=0)
    assert error <= bound, f"error {error} above {bound}"


def exact_attention(q, k, v, n_head, causal, gate):
    """The formula, score by score, in float64."""
    n_batch, t_q, n_state = q.shape
    t_k, d = k.shape[1], n_state // n_head
    out = np.zeros((n_batch, t_q, n_head, d))
    for b in range(n_batch):
        shared = b // (n_batch // len(k))
        for h in range(n_head):
            head = slice(h * d, h * d + d)
            scores = q[b, :, head].astype(float) @ k[shared, :, head].T.astype(float) / math.sqrt(d)
            if causal:
                scores[np.arange(t_k) > np.arange(t_q)[:, None] + t_k - t_q] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, h] = p / p.sum(axis=1, keepdims=True) @ v[shared, :, head].astype(float)
    if gate is not None:
        out *= gate.reshape(n_batch, t_q, n_head, -1)
    return out.reshape(q.shape)
