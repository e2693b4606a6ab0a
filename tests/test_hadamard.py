"""Hadamard matrices, and rotations that leave a layer norm's mean alone."""

import numpy as np
import pytest

from minigate.errors import UsageError
from minigate.hadamard import hadamard, random_signs, rotation


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 32, 80, 384, 512, 768])
def test_rows_are_orthogonal_and_the_first_column_ones(n):
    h = hadamard(n).astype(int)
    assert set(np.unique(h)) <= {-1, 1} and (h[:, 0] == 1).all()
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n, dtype=int))


@pytest.mark.parametrize("n", [3, 6, 28, 36, 500])
def test_other_sizes_are_refused(n):
    with pytest.raises(UsageError, match=rf"rotation: expected a size of 2\^k, 12 \* 2\^k or 20 \* 2\^k, got {n}"):
        hadamard(n)


@pytest.mark.parametrize("n", [32, 384])
def test_a_rotation_keeps_lengths_and_means_and_spreads_one_dimension(n):
    q = rotation(random_signs(n, 0))
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(q, q.T, atol=1e-12)
    np.testing.assert_allclose(q @ np.ones(n), np.ones(n), atol=1e-12)
    assert np.abs(q).max() < 4.5 / np.sqrt(n)


def test_signs_follow_from_the_seed():
    signs = random_signs(384, 3)
    np.testing.assert_array_equal(signs, random_signs(384, 3))
    assert signs.dtype == np.float32 and signs[0] == 1 and set(signs) == {-1, 1}
    assert not np.array_equal(signs, random_signs(384, 4))
