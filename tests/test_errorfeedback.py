"""Rounding with the feedback of errors, against rounding to nearest and against the formula of the last column."""

import numpy as np
import pytest

from minigate.errorfeedback import feedback, round_with_feedback


def output_error(w: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> float:
    """w, rounded (N, K), moments (K, K) = E[x xᵀ] -> E[|(w - rounded) x|²], what feedback makes small."""
    difference = np.asarray(w, np.float64) - rounded
    return float(np.einsum("nk,kl,nl->", difference, moments, difference, optimize=True))


def correlated(k, rows, seed=0):
    """Inputs (rows, k) that go together, with channels of very different power."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((rows, k // 4)) @ rng.standard_normal((k // 4, k))
    return (shared + 0.3 * rng.standard_normal((rows, k))) * np.exp(rng.standard_normal(k))


def nearest(w, scale):
    return np.clip(np.rint(w / scale), -127, 127)


@pytest.mark.parametrize("k", [1, 5, 63, 64, 65, 200])
def test_outputs_err_less_than_with_rounding_to_nearest(k):
    rng = np.random.default_rng(k)
    w = rng.standard_normal((16, k)).astype(np.float32)
    x = correlated(k, 400) if k > 4 else rng.standard_normal((400, k))
    moments, scale = x.T @ x / len(x), np.abs(w).max(1) / np.float32(20)  # coarse, so that rounding shows
    q = round_with_feedback(w, scale, moments)
    assert q.dtype == np.int8 and q.shape == w.shape
    found, plain = (output_error(w, r * scale[:, None], moments) for r in (q, nearest(w, scale[:, None])))
    assert plain == pytest.approx(np.square(x @ (w - nearest(w, scale[:, None]) * scale[:, None]).T).sum(1).mean())
    assert found <= plain * (1 + 1e-6) if k == 1 else found < (0.95 if k == 5 else 0.6) * plain


def test_independent_inputs_are_rounded_to_nearest():
    w = np.random.default_rng(1).standard_normal((8, 70)).astype(np.float32)
    for moments in (3 * np.eye(70), np.zeros((70, 70))):
        np.testing.assert_array_equal(round_with_feedback(w, np.float32(0.02), moments), nearest(w, np.float32(0.02)))


def test_pieces_of_columns_are_the_same_as_one_column_after_the_other():
    """Algorithm 1 without its pieces, in float64."""
    rng, k = np.random.default_rng(2), 150
    w, x = rng.standard_normal((6, k)), correlated(k, 300, 2)
    moments, scale = x.T @ x, np.abs(w).max() / 10
    order = np.argsort(-np.diag(moments), kind="stable")
    answers = feedback(moments[np.ix_(order, order)]).astype(float)
    rest, expected = w[:, order].copy(), np.empty((6, k))
    for j in range(k):
        expected[:, order[j]] = q = nearest(rest[:, j], scale)
        rest[:, j + 1 :] -= np.outer(rest[:, j] - q * scale, answers[j, j + 1 :])
    got = round_with_feedback(w, np.float32(scale), moments)
    assert (got != expected).mean() < 0.01  # float32 may put a value on the other side of a boundary


def test_feedback_is_the_least_squares_answer_of_the_columns_behind():
    x = correlated(8, 100, 3)
    moments = x.T @ x
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(8)
    for j in (0, 3, 6):
        behind = slice(j + 1, None)
        answer = np.linalg.solve(damped[behind, behind], damped[behind, j])  # min |x_j + x_behind a|, up to the sign
        np.testing.assert_allclose(feedback(moments)[j, behind], -answer, rtol=1e-4, atol=1e-6)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"moments: expected shape \(4, 4\)"):
        round_with_feedback(np.ones((2, 4)), np.float32(1), np.eye(3))
