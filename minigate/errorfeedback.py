"""Weights -> int8 with error feedback: what rounding a column adds to the outputs, the columns still to come take off.

    E[x xᵀ] of a linear's inputs (quantsim.Observed) --inverse, Cholesky--> feedback --column by column--> q

Rounding to nearest makes each weight's own error smallest; what counts is that of the outputs, E[|(w - scale q) x|²],
in which inputs that go together can cancel. GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1) rounds one column
after the other and changes those that follow by their least squares answer to the error made. As its authors' code can,
columns are taken in the order of their inputs' power, the strongest first, while there are most others to answer.
Scales stay as they are, so that every scheme and granularity can have it.

N output channels, K inputs.
"""

import numpy as np

DAMPING = 0.01  # of the mean power of the inputs, added to each: keeps the inverse small where few rows were seen
COLUMNS = 64  # whose answers go to all columns behind them in one product


def round_with_feedback(w: np.ndarray, scale: np.ndarray, moments: np.ndarray, q_max: int = 127) -> np.ndarray:
    """w (N, K) float, scale (N,) or (), moments (K, K) = E[x xᵀ] or a multiple of it -> q (N, K) int8, |q| <= q_max.

    With moments that are a multiple of the identity it is rounding to nearest. ValueError when the shapes do not fit.
    """
    n, k = w.shape
    if moments.shape != (k, k):
        raise ValueError(f"moments: expected shape {(k, k)} for w of {w.shape}, got {moments.shape}")
    order = np.argsort(-np.diag(moments), kind="stable")
    answers = feedback(moments[np.ix_(order, order)])
    column_scale = np.broadcast_to(np.asarray(scale, np.float32), n)
    rest, q = np.array(w[:, order].T, np.float32), np.empty((k, n), np.int8)  # a column in a row
    for start in range(0, k, COLUMNS):
        block = slice(start, min(start + COLUMNS, k))
        errors = _round_block(rest[block], q[block], column_scale, answers[block, block], q_max)
        rest[block.stop :] -= answers[block, block.stop :].T @ errors
    out = np.empty((n, k), np.int8)
    out[:, order] = q.T
    return out


def _round_block(rest: np.ndarray, q: np.ndarray, scale: np.ndarray, answers: np.ndarray, q_max: int) -> np.ndarray:
    """Columns (C, N), which change, -> q (C, N) in place, and each column's error (C, N)."""
    errors = np.empty_like(rest)
    for i in range(len(rest)):
        steps = np.clip(np.rint(rest[i] / scale), -q_max, q_max)
        q[i] = steps
        errors[i] = rest[i] - steps * scale
        rest[i + 1 :] -= answers[i, i + 1 :, None] * errors[i]
    return errors


def feedback(moments: np.ndarray) -> np.ndarray:
    """moments (K, K) -> (K, K) float32, upper triangle: [j, l] is how much column l must give up for an error of 1 in
    column j, when the columns up to j are settled.

    With Uᵀ U = moments⁻¹, U upper triangular, it is U[j, l] / U[j, j].
    """
    damped = np.asarray(moments, np.float64).copy()
    mean = float(np.diag(damped).mean()) or 1.0  # 1: inputs that are all 0 mean nothing
    damped[np.diag_indices_from(damped)] += DAMPING * mean
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    return (upper / np.diag(upper)[:, None]).astype(np.float32)
