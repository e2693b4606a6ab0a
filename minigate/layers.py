"""The layers, forward and backward in pairs: free functions without state, in float32 or float64.

A forward returns its result and the cache that its backward takes; a backward returns gradients and changes nothing.
dx is the gradient of the loss with respect to x.

B batch, T time, D n_state, K inputs, N outputs, C channels in, V n_vocab. A leading … stands for any axes.
"""

import numpy as np

from minigate import kernels, training_kernels
from minigate.ops import CONV_WIDTH, conv_matrix, conv_rows


def linear(x, weight, bias=None, bf16=False):
    """x (…, K), weight (N, K), bias (N,) or None -> y = x weightᵀ + bias (…, N), cache. bf16: products in bfloat16."""
    y = training_kernels.product_nt(x.reshape(-1, x.shape[-1]), weight, bias, bf16)
    return y.reshape(*x.shape[:-1], -1), (x, weight, bias is not None, bf16)


def linear_backward(dy, cache, dx_wanted=True):
    """dy (…, N) -> dx (…, K) or None, dweight (N, K), dbias (N,) or None."""
    x, weight, has_bias, bf16 = cache
    dy, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = training_kernels.product_nn(dy, weight, bf16).reshape(x.shape) if dx_wanted else None
    return dx, training_kernels.product_tn(dy, rows, bf16), training_kernels.column_sums(dy) if has_bias else None


def conv1d(x, weight, bias, stride, bf16=False):
    """x (B, T, C), weight (N, C, 3), bias (N,) -> y (B, ceil(T / stride), N), cache. Padding 1."""
    y, cache = linear(conv_rows(x, stride), conv_matrix(weight), bias, bf16)
    return y, (cache, x.shape, stride)


def conv1d_backward(dy, cache, dx_wanted=True):
    """dy (B, T', N) -> dx (B, T, C) or None, dweight (N, C, 3), dbias (N,)."""
    linear_cache, (b, t, c), stride = cache
    drows, dmatrix, dbias = linear_backward(dy, linear_cache, dx_wanted)
    dweight = dmatrix.reshape(-1, CONV_WIDTH, c).transpose(0, 2, 1)
    if not dx_wanted:
        return None, dweight, dbias
    drows = drows.reshape(b, -1, CONV_WIDTH, c)
    dpadded = np.zeros((b, t + CONV_WIDTH - 1, c), dy.dtype)
    for i in range(CONV_WIDTH):
        dpadded[:, i : i + stride * drows.shape[1] : stride] += drows[:, :, i]
    return dpadded[:, 1:-1], dweight, dbias


def layer_norm(x, weight, bias, eps=1e-5):
    """x (…, D), weight (D,), bias (D,) -> y (…, D), cache."""
    return kernels.layer_norm(x, weight, bias, eps), (x, weight, eps)


def layer_norm_backward(dy, cache):
    """dy (…, D) -> dx (…, D), dweight (D,), dbias (D,)."""
    return training_kernels.layer_norm_backward(dy, *cache)


def gelu(x):
    """x -> y = x Φ(x), Φ the normal distribution function; cache."""
    return kernels.gelu(x), x


def gelu_backward(dy, x):
    """dy -> dx = dy (Φ(x) + x φ(x)), φ the normal density."""
    return training_kernels.gelu_backward(dy, x)


def embedding(tokens, table):
    """tokens (B, T), table (V, D) -> y (B, T, D), cache."""
    return table[tokens], (tokens, table.shape)


def embedding_backward(dy, cache):
    """dy (B, T, D) -> dtable (V, D)."""
    dtable = np.zeros(cache[1], dy.dtype)
    rows, drows = embedding_rows_backward(dy, cache)
    dtable[rows] = drows
    return dtable


def embedding_rows_backward(dy, cache):
    """dy (B, T, D) -> the R rows of the table that were used (R,), their gradients (R, D)."""
    rows, places = np.unique(cache[0], return_inverse=True)
    drows = np.zeros((len(rows), dy.shape[-1]), dy.dtype)
    np.add.at(drows, places.reshape(cache[0].shape), dy)
    return rows, drows
