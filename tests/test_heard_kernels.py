"""Attention to packed keys and values in int8: every instruction set against the formula in float64, and its limits."""

import numpy as np
import pytest

from minigate import kernels, reference
from minigate.heard_kernels import Heard, attention_heard, pack_heard
from tests.kernelcases import exact_attention, floats
from tests.test_csrc import at_page_end, guarded, pointer, unharmed

ERROR = 1e-4  # of averages of values of order 1, whose queries have 16 bits


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def heard(x, n_head, is_values):
    """x (W, T, D) float32 -> Heard, and what it stands for."""
    q, scale = reference.quantize_rows(x.reshape(-1, x.shape[-1]))
    packed = pack_heard(q.reshape(x.shape), scale.reshape(x.shape[:2]), n_head, is_values)
    return packed, (q * scale[:, None]).reshape(x.shape)


def both(rng, windows, t_k, n_state, n_head):
    """Keys and values whose rows have magnitudes of their own -> Heard and floats of both."""
    for is_values in (False, True):
        yield heard(floats(rng, windows, t_k, n_state) * abs(floats(rng, windows, t_k, 1)), n_head, is_values)


@pytest.mark.parametrize("t_k", [1, 4, 63, 64, 65, 257, 1500])
@pytest.mark.parametrize("d", [1, 6, 17, 64, 65, 130])
def test_what_is_packed_is_there(t_k, d, rng):
    for packed, floating in both(rng, 2, t_k, 3 * d, 3):
        assert packed.shape == (2, t_k, 3 * d)
        assert np.array_equal(packed.floats(), floating)


@pytest.mark.parametrize("t_q", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("t_k", [1, 31, 64, 300])
def test_attention_is_its_formula(isa, t_q, t_k, rng):
    for d in (1, 6, 17, 64, 80):
        (k, plain_k), (v, plain_v) = both(rng, 2, t_k, 2 * d, 2)
        q = floats(rng, 4, t_q, 2 * d)  # two rows listen to each window
        for gate in (None, floats(rng, 4, t_q, 2), floats(rng, 4, t_q, 2 * d)):
            wanted = exact_attention(q, plain_k, plain_v, 2, False, gate)
            largest = abs(plain_v).max() * (1 if gate is None else abs(gate).max())
            got, (steps, scale) = attention_heard(q, k, v, gate), v.plain()
            np.testing.assert_allclose(got, wanted, rtol=0, atol=ERROR * largest)
            rounded = reference.attention_heard(q, plain_k, steps.astype(np.float32), scale, 2, gate)
            assert np.median(np.abs(got - rounded)) < 1e-6 * largest  # seldom a step is another one


def test_many_small_weights_are_not_lost(isa, rng):
    """1500 keys alike but for one, which is 100 times likelier: 94 % of the weight lies in steps of 328 of 32767."""
    (v, plain_v), q = heard(floats(rng, 1, 1500, 64), 1, True), np.full((1, 1, 64), 0.125, np.float32)
    k = np.zeros((1, 1500, 64), np.float32)
    k[0, 700] = np.log(100)
    k, plain_k = heard(k, 1, False)
    wanted = exact_attention(q, plain_k, plain_v, 1, False, None)
    np.testing.assert_allclose(attention_heard(q, k, v), wanted, rtol=0, atol=2e-5 * abs(plain_v).max())


def test_large_scores_neither_overflow_nor_lose_the_key(isa, rng):
    (k, plain_k), (v, plain_v) = both(rng, 1, 200, 64, 1)
    q = 1000 * floats(rng, 1, 3, 64)
    got, wanted = attention_heard(q, k, v), exact_attention(q, plain_k, plain_v, 1, False, None)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.02 * abs(plain_v).max())


@pytest.mark.parametrize("d", [64, 1100])
def test_the_largest_integers_do_not_overflow(isa, d):
    """All products are 127 times the largest weight, and all scores 127 times a query's largest element."""
    x = np.ones((1, 1500, d), np.float32)
    (k, _), (v, _) = heard(x, 1, False), heard(x, 1, True)
    for sign in (1, -1):
        q = np.full((1, 3, d), sign * 10, np.float32)
        np.testing.assert_allclose(attention_heard(q, k, v), 1, rtol=5e-5)
    x[0, 7] = 1.01
    (k, plain_k), (v, plain_v) = heard(x, 1, False), heard(x, 1, True)
    wanted = exact_attention(q, plain_k, plain_v, 1, False, None)
    np.testing.assert_allclose(attention_heard(q, k, v), wanted, rtol=1e-4)


def test_zeros(isa):
    (k, _), (v, _) = (heard(np.zeros((1, 70, 8), np.float32), 2, values) for values in (False, True))
    assert not attention_heard(np.zeros((1, 2, 8), np.float32), k, v).any()
    (ones, _) = heard(np.ones((1, 70, 8), np.float32), 2, True)
    assert np.allclose(attention_heard(np.zeros((1, 2, 8), np.float32), k, ones), 1, atol=1e-6)
    q = np.ones((2, 0, 8), np.float32)
    assert attention_heard(q, k, v).shape == q.shape


def test_a_value_of_zeros_takes_no_steps_from_the_others(isa, rng):
    """Its scale is 1 as quantize_rows has it, that of the others 1e-6."""
    x = 1e-4 * floats(rng, 1, 100, 64)
    x[0, 50] = 0
    (k, plain_k), (v, plain_v), q = heard(floats(rng, 1, 100, 64), 1, False), heard(x, 1, True), floats(rng, 1, 2, 64)
    wanted = exact_attention(q, plain_k, plain_v, 1, False, None)
    np.testing.assert_allclose(attention_heard(q, k, v), wanted, rtol=0, atol=ERROR * abs(x).max())
    assert v.plain()[1][0, 50] == 0 and np.array_equal(v.floats(), plain_v)


def test_what_numpy_keeps_is_packed_where_c_computes(rng):
    before = kernels.isa()
    if not kernels.compiled or before == "numpy":
        pytest.skip("no C extension in use")
    kernels.use_isa("numpy")
    (k, _), (v, _) = both(rng, 2, 70, 16, 2)
    q = floats(rng, 2, 1, 16)
    wanted = attention_heard(q, k, v)
    kernels.use_isa(before)
    assert len(k.arrays) == 2
    np.testing.assert_allclose(attention_heard(q, k, v), wanted, rtol=0, atol=ERROR * abs(v.floats()).max())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(compiled_isa, threads, rng):
    (k, _), (v, _) = both(rng, 3, 200, 96, 6)
    q = floats(rng, 6, 20, 96)
    kernels.set_threads(1)
    wanted = attention_heard(q, k, v)
    kernels.set_threads(threads)
    assert np.array_equal(attention_heard(q, k, v), wanted)


@pytest.mark.parametrize("t_q", [1, 9])
@pytest.mark.parametrize("d", [1, 15, 64, 65])
@pytest.mark.parametrize("t_k", [1, 66, 131])
def test_attention_keeps_to_its_arrays(compiled_isa, t_q, d, t_k, rng):
    n_head, lib, keep, packed = 3, kernels.lib, [], []
    q, gate = (at_page_end(floats(rng, t_q, n_head * d), keep) for _ in range(2))
    for values in (0, 1):
        x, scale = reference.quantize_rows(floats(rng, t_k, n_head * d))
        room, inside = guarded((lib.mg_heard_bytes(values, n_head, t_k, d),), np.int8)
        assert lib.mg_pack_heard(pointer(inside), values, pointer(at_page_end(x, keep)),
                                 pointer(at_page_end(scale, keep)), 1, n_head, t_k, d) == lib.MG_OK  # fmt: skip
        assert unharmed(room)
        packed.append(at_page_end(inside, keep))
    room, out = guarded((t_q, n_head * d), np.float32)
    status = lib.mg_attention_heard(pointer(out), pointer(q), *map(pointer, packed), pointer(gate), d, 1, 1, n_head,
                                    t_q, t_k, d)  # fmt: skip
    assert status == lib.MG_OK and unharmed(room) and np.isfinite(out).all()


@pytest.mark.skipif(not kernels.compiled, reason="no C extension")
def test_the_extension_rejects_sizes():
    lib, x, q = kernels.lib, pointer(np.ones(64, np.float32)), pointer(np.ones(64, np.int8))
    for t_k, d in ((0, 2), (32769, 2), (2, 32769)):
        assert lib.mg_pack_heard(q, 0, q, x, 1, 1, t_k, d) == lib.MG_BAD_VALUE
        assert lib.mg_attention_heard(x, x, q, q, x, 1, 1, 1, 1, 1, t_k, d) == lib.MG_BAD_VALUE
    for width, batch, group in ((3, 1, 1), (1, 3, 2), (1, 1, 0)):
        assert lib.mg_attention_heard(x, x, q, q, x, width, batch, group, 1, 1, 2, 2) == lib.MG_BAD_VALUE


def test_wrong_input_is_named(isa, rng):
    (k, _), (v, _) = both(rng, 2, 5, 8, 2)
    q = floats(rng, 2, 3, 8)
    for args, error, message in (
        ((q, v, v), TypeError, "k: expected Heard keys"), ((q, k, k), TypeError, "v: expected Heard values"),
        ((q, k, q), TypeError, "v: expected Heard values, got ndarray"),
        ((q.astype(float), k, v), TypeError, "q: expected an array of float32"),
        ((q[..., :4], k, v), ValueError, r"q: expected shape \(any, any, 8\)"),
        ((q[[0, 1, 1]], k, v), ValueError, "k: expected a number of windows that divides the 3 rows of q, got 2"),
        ((q, k, v, q[..., :3]), ValueError, "gate: expected shape"),
        ((q, k, heard(floats(rng, 2, 6, 8), 2, True)[0]), ValueError, "v: expected shape"),
        ((q, k, heard(floats(rng, 2, 5, 8), 4, True)[0]), ValueError, "v: expected shape .* and 2 heads"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            attention_heard(*args)
    x = np.zeros((1, 2, 6), np.int8)
    for args, error, message in (
        ((x, np.ones((1, 3), np.float32), 2), ValueError, "scale: expected shape"),
        ((x, np.ones((1, 2)), 2), TypeError, "scale: expected an array of float32"),
        ((x, np.ones((1, 2), np.float32), 4), ValueError, "n_head: expected a divisor of 6, got 4"),
        ((x[:, :0], np.ones((1, 0), np.float32), 2), ValueError, "q: expected 1 to 32768 positions"),
        ((x[0], np.ones((1, 2), np.float32), 2), ValueError, "q: expected shape"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            pack_heard(*args, False)


def test_windows_that_are_left(rng):
    (k, plain), _ = both(rng, 3, 9, 8, 2)
    left = k.with_arrays(tuple(array[1:] for array in k.arrays))
    assert isinstance(left, Heard) and left.shape == (2, 9, 8)
    assert np.array_equal(left.floats(), plain[1:])
