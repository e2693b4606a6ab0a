"""The kernels of training on every instruction set against NumPy in float64: named tolerances, guard pages, threads,
and what is rejected.

M rows, K inputs, N outputs, B batch, T time, H heads, d head size.
"""

import numpy as np
import pytest

from minigate import backward, kernels, optim
from minigate import training_kernels as tk
from minigate.distill import DistillOptions, kl_ce, outlier, outlier_backward
from tests.kernelcases import floats
from tests.test_csrc import at_page_end, guarded, pointer, unharmed

ATTENTION_ERROR = 5e-6  # absolute, of sums of order 1, with scores of order 1
BF16_ERROR = 8e-3  # relative to the norm, or to order 1
LARGE_SCORE_ERROR = 5e-5  # relative to the largest, with scores of order 100: float32 leaves 1e-5 in the exponent
ROW_ERROR = 2e-6  # absolute for each term of order 1 in a sum
GELU_SLOPE_ERROR = 3e-6  # absolute
LOSS_ERROR = 5e-7  # absolute, of a difference of probabilities
PRODUCT_ERROR = 1e-6  # absolute for each term of order 1
needs_bf16 = pytest.mark.skipif(not tk.has_bf16(), reason="cpu lacks avx512_bf16")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def near(got, wanted, bound):
    """Absolute error of float32 against float64."""
    assert got.dtype == np.float32 and got.shape == wanted.shape
    error = np.abs(got - wanted).max(initial=0)
    assert error <= bound, f"error {error} above {bound}"


def doubles(*arrays):
    return [a.astype(np.float64) for a in arrays]


# ---- attention ----

CASES = [  # B, H, Tq, Tk, d, causal
    (1, 1, 1, 1, 1, False), (2, 3, 5, 5, 4, True), (2, 2, 50, 67, 17, False), (1, 2, 49, 49, 64, True),
    (1, 2, 100, 113, 64, True), (1, 3, 40, 130, 15, False), (1, 1, 97, 97, 80, True), (1, 1, 24, 48, 63, True),
    (1, 2, 33, 95, 8, False), (2, 1, 7, 6, 65, False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_backward(isa, case, rng):
    b, h, t_q, t_k, d, causal = case
    q, dout = floats(rng, 2, b, t_q, h * d)
    k, v = floats(rng, 2, b, t_k, h * d)
    wanted = backward.attention_lse(*doubles(q, k, v), h, causal)
    out, lse = tk.attention_lse(q, k, v, h, causal)
    near(out, wanted[0], ATTENTION_ERROR)
    near(lse, wanted[1], ATTENTION_ERROR)
    gradients = tk.attention_backward(dout, out, lse, q, k, v, h, causal)
    exact = backward.attention_backward(dout.astype(float), *wanted, *doubles(q, k, v), h, causal)
    for got, right in zip(gradients, exact, strict=True):
        near(got, right, ATTENTION_ERROR)


@needs_bf16
@pytest.mark.parametrize("case", CASES)
def test_attention_backward_in_bf16(case, rng):
    b, h, t_q, t_k, d, causal = case
    q, dout = floats(rng, 2, b, t_q, h * d)
    k, v = floats(rng, 2, b, t_k, h * d)
    wanted = backward.attention_lse(*doubles(q, k, v), h, causal)
    out, lse = tk.attention_lse(q, k, v, h, causal)
    gradients = tk.attention_backward(dout, out, lse, q, k, v, h, causal, True)
    exact = backward.attention_backward(dout.astype(float), *wanted, *doubles(q, k, v), h, causal)
    for got, right in zip(gradients, exact, strict=True):
        assert got.dtype == np.float32
        assert np.linalg.norm(got - right) <= BF16_ERROR * max(np.linalg.norm(right), np.sqrt(right.size))
    assert not np.array_equal(gradients[2], tk.attention_backward(dout, out, lse, q, k, v, h, causal)[2])


def test_attention_backward_takes_views_and_large_scores(isa, rng):
    whole = 6 * floats(rng, 2, 70, 3 * 32)
    q, k, v = (whole[:, :, i : i + 32] for i in (0, 32, 64))
    dout = floats(rng, 2, 70, 32)
    out, lse = tk.attention_lse(q, k, v, 2, True)
    wanted = backward.attention_lse(*doubles(q, k, v), 2, True)
    exact = backward.attention_backward(dout.astype(float), *wanted, *doubles(q, k, v), 2, True)
    for got, right in zip(tk.attention_backward(dout, out, lse, q, k, v, 2, True), exact, strict=True):
        near(got, right, LARGE_SCORE_ERROR * np.abs(right).max())


@pytest.mark.parametrize("t_q, t_k", [(1, 7), (24, 25), (50, 49)])
@pytest.mark.parametrize("d", [1, 15, 17, 64])
@pytest.mark.parametrize("bf16", [False, True])
def test_attention_backward_keeps_to_its_arrays(compiled_isa, t_q, t_k, d, bf16, rng):
    n_head, lib, keep = 2, kernels.lib, []
    row = n_head * d
    q, dout = (at_page_end(floats(rng, t_q, row), keep) for _ in range(2))
    k, v = (at_page_end(floats(rng, t_k, row), keep) for _ in range(2))
    (room, out), (lse_room, lse) = guarded((t_q, row), np.float32), guarded((n_head, t_q), np.float32)
    strides, sizes = (0, row, 0, row, 0, row, False), (1, n_head, t_q, t_k, d)
    assert lib.mg_attention_lse(*map(pointer, (out, lse, q, k, v)), *strides, *sizes) == lib.MG_OK
    assert unharmed(room) and unharmed(lse_room)
    out, lse = at_page_end(out, keep), at_page_end(lse, keep)
    rooms, grads = zip(*(guarded((t, row), np.float32) for t in (t_q, t_k, t_k)), strict=True)
    arrays = map(pointer, (*grads, dout, out, lse, q, k, v))
    assert lib.mg_attention_backward(*arrays, *strides, bf16, *sizes) == lib.MG_OK
    assert all(map(unharmed, rooms))


# ---- products ----

PRODUCTS = [(1, 1, 1), (2, 3, 5), (8, 48, 2), (17, 49, 33), (100, 16, 31), (97, 100, 385), (16, 17, 769), (5, 300, 63),
            (9, 3, 0), (0, 3, 4), (4, 0, 3), (200, 31, 64)]  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", PRODUCTS)
def test_products(isa, shape, bf16, rng):
    m, n, k = shape
    a, b, bias = floats(rng, m, k), floats(rng, n, k), floats(rng, n)
    rounded = bf16 and (isa == "numpy" or tk.has_bf16())
    exact = a.astype(float) @ b.T.astype(float)
    wanted = backward.round_bf16(a).astype(float) @ backward.round_bf16(b).T.astype(float) if rounded else exact
    bound = PRODUCT_ERROR * max(1, k)
    near(tk.product_nt(a, b, bias, bf16), wanted + bias, bound)
    near(tk.product_nt(a, b, None, bf16), wanted, bound)
    near(tk.product_nn(a, np.ascontiguousarray(b.T), bf16), wanted, bound)
    near(tk.product_tn(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), bf16), wanted, bound)
    if rounded and k > 30:
        assert np.abs(wanted - exact).max() > 2 * bound  # so that rounding shows


@needs_bf16
def test_bf16_rounds_ties_to_even_and_keeps_what_is_not_finite():
    ties = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, np.inf, 3.4e38, 1e-3])[:, None]
    one = np.ones((1, 1), np.float32)
    got = tk.product_nt(ties, one, None, True)[:, 0]
    assert np.array_equal(got, backward.round_bf16(ties)[:, 0])
    assert np.isnan(tk.product_nt(np.float32([[np.nan, 1]]), np.ones((1, 2), np.float32), None, True)).all()


@needs_bf16
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (17, 49, 33), (9, 15, 31), (24, 48, 385)])
def test_bf16_products_keep_to_their_arrays(shape, rng):
    (m, n, k), lib, keep = shape, kernels.lib, []
    bias = at_page_end(floats(rng, n), keep)
    for a_shape, a_strides in (((m, k), (k, 1)), ((k, m), (1, m))):
        for b_shape, b_strides in (((n, k), (k, 1)), ((k, n), (1, n))):
            a, b = at_page_end(floats(rng, *a_shape), keep), at_page_end(floats(rng, *b_shape), keep)
            room, c = guarded((m, n), np.float32)
            status = lib.mg_product_bf16(*map(pointer, (c, a, b, bias)), *a_strides, *b_strides, m, n, k)
            assert status == lib.MG_OK and unharmed(room)


def test_bf16_is_refused_where_there_is_none(compiled_isa):
    x = pointer(np.ones(4, np.float32))
    lib = kernels.lib
    wanted = lib.MG_BAD_VALUE if tk.has_bf16() else lib.MG_BAD_ISA
    assert lib.mg_product_bf16(x, x, x, x, 2, 2, 2, 1, 1, 1, 1) == wanted
    assert tk.has_bf16() == (compiled_isa in ("avx512vnni", "amx") and all(kernels.features()["avx512_bf16"]))


# ---- rows ----


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 15), (33, 16), (40, 33), (200, 384), (7, 1536), (0, 4), (5, 0)])
def test_row_kernels(isa, shape, rng):
    x, dy, weight = 3 * floats(rng, *shape) + 1, floats(rng, *shape), floats(rng, shape[1])
    wide, bound = doubles(x, dy, weight), ROW_ERROR * max(1, shape[0])
    near(tk.column_sums(dy), wide[1].sum(0), bound)
    slope = backward.gelu_backward(wide[1], wide[0])
    near(tk.gelu_backward(dy, x), slope, GELU_SLOPE_ERROR * np.abs(dy).max(initial=0))
    if shape[1] > 1:  # of one element the variance is 0
        for got, right in zip(tk.layer_norm_backward(dy, x, weight),
                              backward.layer_norm_backward(wide[1], wide[0], wide[2]), strict=True):  # fmt: skip
            near(got, right, 10 * bound)


def test_gelu_backward_over_its_range(isa):
    x = np.concatenate([np.linspace(-14, 14, 20001), [0, 1e-30, -1e-30, 200, -200]]).astype(np.float32)
    got = tk.gelu_backward(np.ones_like(x), x)
    near(got, backward.gelu_backward(np.ones(x.shape), x.astype(float)), GELU_SLOPE_ERROR)
    assert np.isnan(tk.gelu_backward(np.float32([1, np.nan]), np.float32([np.nan, 1]))).all()


@pytest.mark.parametrize("n", [1, 15, 17, 64, 385])
def test_row_kernels_keep_to_their_arrays(compiled_isa, n, rng):
    lib, keep, m = kernels.lib, [], 3
    x, dy = (at_page_end(floats(rng, m, n), keep) for _ in range(2))
    weight = at_page_end(floats(rng, n), keep)
    (room, dx), (sum_room, sums) = guarded((m, n), np.float32), guarded((2, n), np.float32)
    assert lib.mg_layer_norm_backward(*map(pointer, (dx, sums, dy, x, weight)), 1e-5, m, n) == lib.MG_OK
    assert lib.mg_column_sums(pointer(sums), pointer(x), m, n) == lib.MG_OK
    assert lib.mg_gelu_backward(*map(pointer, (dx, dy, x)), m * n) == lib.MG_OK
    assert lib.mg_power_backward(pointer(dx), pointer(x), 2, 3, 4, m * n) == lib.MG_OK
    assert lib.mg_adamw(pointer(dx), pointer(dx.copy()), pointer(np.abs(dx)), kernels.ffi.NULL, pointer(x),
                        *[0.5] * 8, m * n) == lib.MG_OK  # fmt: skip
    assert unharmed(room) and unharmed(sum_room)


# ---- losses ----


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("m, v", [(1, 1), (3, 2), (5, 15), (4, 17), (6, 1025), (3, 5000), (0, 4)])
def test_logit_losses(isa, m, v, temperature, rng):
    options = DistillOptions(kl_weight=0.7, ce_weight=1.3, temperature=temperature)
    logits, teacher = 5 * floats(rng, 2, m, v) + 40
    targets = rng.integers(-1, v, m)
    wanted, right = kl_ce(*doubles(logits, teacher), targets, options, 0.5)
    values, got = kl_ce(logits, teacher, targets, options, 0.5)
    np.testing.assert_allclose(values, wanted, rtol=2e-5, atol=2e-5)
    near(got, right, LOSS_ERROR)
    out = logits.copy()
    again, got_in_place = kl_ce(out, teacher, targets, options, 0.5, out=out)
    assert got_in_place is out and again == values and np.array_equal(out, got)


def test_logit_losses_without_teacher_and_of_what_is_not_finite(isa, rng):
    options = DistillOptions(kl_weight=0)
    logits, targets = floats(rng, 4, 33), np.array([0, 32, -1, 5])
    wanted, right = kl_ce(logits.astype(float), None, targets, options)
    values, got = kl_ce(logits, None, targets, options)
    np.testing.assert_allclose(values, wanted, rtol=1e-6)
    near(got, right, LOSS_ERROR)
    for bad in (np.nan, np.inf):
        for part in range(2):
            both = floats(rng, 2, 4, 33)
            both[part, 1, 7] = bad
            with np.errstate(invalid="ignore"):
                values, got = kl_ce(*both, targets, DistillOptions())
            assert np.isnan(values[0]) and np.isnan(got[1]).any() and np.isfinite(got[0]).all()


@pytest.mark.parametrize("power", [2, 3, 4, 7, 2.5])
@pytest.mark.parametrize("size", [1, 15, 17, 1025, 70000])
def test_outlier_penalty(isa, size, power, rng):
    a = 4 * floats(rng, size)
    a[size // 2] = -90
    wanted, cache = outlier(a.astype(float), 6, power)
    right = outlier_backward(0.3, cache)
    value, cache = outlier(a, 6, power)
    assert value == pytest.approx(wanted, rel=1e-6)
    near(outlier_backward(0.3, cache), right, 1e-5 * np.abs(right).max())
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, size - 1):
            broken = a.copy()
            broken[place] = bad
            assert np.isnan(outlier(broken, 6, power)[0])
    assert outlier(np.zeros(size, np.float32), 6, power)[0] == 0


# ---- optimizer ----


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("size", [1, 15, 17, 40000])
def test_adamw_is_numpys_bit_for_bit(compiled_isa, size, averaged, rng):
    numbers = dict(beta1=0.9, beta2=0.999, g_mean=0.037, g_root=0.0123, step=1.3e-3, eps=3e-10, shrink=1 - 1e-4,
                   average_rate=0.013)  # fmt: skip
    for shrink in (1.0, numbers["shrink"]):
        state = [floats(rng, size), floats(rng, size), floats(rng, size) ** 2, floats(rng, size)]
        ours = [x.copy() for x in state]
        for g in floats(rng, 3, size) * np.float32([[1], [1e-20], [1e15]]):
            for update, (p, m, v, average) in ((optim.adamw, state), (tk.adamw, ours)):
                update(p, m, v, average if averaged else None, g, **{**numbers, "shrink": shrink})
        for got, right in zip(ours, state, strict=True):
            assert np.array_equal(got, right)


@pytest.mark.parametrize("size", [0, 1, 17, 70000])
def test_sum_of_squares(isa, size, rng):
    x = 1e25 * floats(rng, size)
    assert optim.sum_squares(x) == pytest.approx(float((x.astype(float) ** 2).sum()), rel=1e-12)
    assert not size or not np.isfinite(optim.sum_squares(np.append(x, np.float32(np.inf))))


# ---- threads ----


def all_kernels(rng):
    q, k, v, dout = floats(rng, 4, 2, 130, 96)
    out, lse = tk.attention_lse(q, k, v, 3, True)
    gradients = [tk.attention_backward(dout, out, lse, q, k, v, 3, True, bf16) for bf16 in (False, True)]
    a, b, c = floats(rng, 3, 300, 200)
    products = [f(x, y, bf16=True) for f in (tk.product_nt, tk.product_tn) for x, y in ((a, b), (b, c))]
    if not tk.has_bf16():
        products = []  # BLAS may sum in another order
    x, teacher = floats(rng, 2, 90, 700)
    dlogits = np.empty_like(x)
    values = tk.logit_losses(x, teacher, np.arange(90), 2.0, 0.5, 0.7, dlogits)
    powers = np.empty_like(x)
    tk.power_backward(x, 5.0, 0.3, 4, powers)
    numbers = [tk.magnitude(x), tk.power_sum(x, 5.0, 4), tk.sum_squares(x)]
    return [out, lse, *gradients[0], *gradients[1], *products, values, dlogits, numbers,
            *tk.layer_norm_backward(a, b, a[0]), tk.gelu_backward(a, b), tk.column_sums(a),
            powers]  # fmt: skip


def test_results_do_not_depend_on_the_number_of_threads(compiled_isa):
    kernels.set_threads(1)
    wanted = all_kernels(np.random.default_rng(1))
    for n in (2, 3, 5, 1):
        kernels.set_threads(n)
        for got, right in zip(all_kernels(np.random.default_rng(1)), wanted, strict=True):
            assert np.array_equal(got, right)


# ---- what is rejected ----

X = np.ones((2, 3, 8), np.float32)
L = np.ones((2, 2, 3), np.float32)
BAD = [
    (lambda: tk.attention_lse(X, X[:, :2], X[:, :2], 2, True), ValueError, "k: expected at least 3 positions, got 2"),
    (lambda: tk.attention_lse(X, X[:1], X[:1], 2), ValueError, r"k: expected shape \(2, 3, 8\), got \(1, 3, 8\)"),
    (lambda: tk.attention_lse(X, X, X[:, 1:], 2), ValueError, r"v: expected shape \(2, 3, 8\), got \(2, 2, 8\)"),
    (lambda: tk.attention_lse(X, X, X, 3), ValueError, "n_head: expected a divisor of 8, got 3"),
    (lambda: tk.attention_lse(X, X, X.astype(float), 2), TypeError, "v: expected an array of float32, got float64"),
    (lambda: tk.product_nt(X[0], X), ValueError, r"w: expected shape \(any, 8\), got \(2, 3, 8\)"),
    (lambda: tk.product_nt(X[0], X[0, :, 1:]), ValueError, r"w: expected shape \(3, 8\), got \(3, 7\)"),
    (lambda: tk.product_nn(X[0], X[0]), ValueError, r"w: expected shape \(8, 8\), got \(3, 8\)"),
    (lambda: tk.product_tn(X[0], X[0, 1:]), ValueError, r"x: expected shape \(3, 8\), got \(2, 8\)"),
    (lambda: tk.product_tn(X[0], X[0].astype(float)), TypeError, "x: expected an array of float32, got float64"),
    (lambda: tk.column_sums(X), ValueError, r"x: expected shape \(any, any\), got \(2, 3, 8\)"),
    (lambda: tk.gelu_backward(X[:1], X), ValueError, r"dy: expected shape \(2, 3, 8\), got \(1, 3, 8\)"),
    (lambda: tk.layer_norm_backward(X, X, X[0, 0, 1:]), ValueError, r"weight: expected shape \(8\), got \(7,\)"),
    (lambda: tk.attention_backward(X[:1], X, L, X, X, X, 2), ValueError, r"dout: expected shape \(2, 3, 8\), got"),
    (lambda: tk.attention_backward(X, X, L[:1], X, X, X, 2), ValueError, r"lse: expected shape \(2, 2, 3\), got"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
