"""Hadamard matrices, and the rotations of a residual stream that are made of them.

A layer norm takes the mean off its input, so a rotation of its input comes out of it again only if it leaves the vector
of ones where it is: Q 1 = 1. With H a Hadamard matrix whose first column is ones, S = diag(1, ±1, …):

    Q = H S Hᵀ / D        orthogonal, symmetric (so its own inverse), Q 1 = 1

An outlier in one dimension comes out in all of them, about 1/sqrt(D) of it in each.
"""

import numpy as np

from minigate.errors import UsageError

ORDERS = (1, 12, 20)  # of the matrices that are doubled


def hadamard(n: int) -> np.ndarray:
    """-> (n, n) int8 of ±1, H Hᵀ = n I, first column ones. UsageError unless n is 2^k, 12·2^k or 20·2^k."""
    for order in ORDERS:
        doublings = n // order
        if n == order * doublings and doublings & (doublings - 1) == 0 and doublings:
            h = paley(order)
            for _ in range(doublings.bit_length() - 1):
                h = np.block([[h, h], [h, -h]])
            return h * h[:, :1]
    raise UsageError(f"rotation: expected a size of 2^k, 12 * 2^k or 20 * 2^k, got {n}")


def paley(n: int) -> np.ndarray:
    """A Hadamard matrix of order n = q + 1, q a prime of the form 4 k + 3 (Paley, J. Math. Phys. 12, 1933); or of 1."""
    q = n - 1
    squares = {i * i % q for i in range(1, q)}
    h = np.eye(n, dtype=np.int8)
    h[0, 1:], h[1:, 0] = 1, -1
    for i in range(q):
        for j in range(q):
            if i != j:
                h[1 + i, 1 + j] = 1 if (i - j) % q in squares else -1
    return h


def rotation(signs: np.ndarray) -> np.ndarray:
    """signs (D,) of ±1, the first 1 -> Q (D, D) float64."""
    h = hadamard(len(signs)).astype(np.float64)
    return (h * signs) @ h.T / len(signs)


def random_signs(n: int, seed: int) -> np.ndarray:
    """-> (n,) float32, the first 1."""
    signs = np.random.default_rng(seed).choice(np.float32([-1, 1]), n)
    signs[0] = 1
    return signs
