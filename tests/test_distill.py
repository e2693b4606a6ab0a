"""Losses: values against literal formulas, gradients by differences in float64, and what must not overflow."""

import tracemalloc

import numpy as np
import pytest

from minigate import distill
from minigate.distill import DistillOptions, hidden_mse, kl_ce, outlier, outlier_backward
from tests.gradients import check_gradient

M, V = 9, 31


def logits(dtype=np.float64, rows=M, vocabulary=V, seed=0):
    rng = np.random.default_rng(seed)
    z, t = 3 * rng.standard_normal((2, rows, vocabulary))
    targets = rng.integers(0, vocabulary, rows)
    targets[:2] = 0, vocabulary - 1
    targets[2::4] = -1
    return z.astype(dtype), t.astype(dtype), targets


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def expected_kl_ce(z, t, targets, temperature):
    """One label at a time, as the definitions read."""
    kl, ce = [], []
    for row, target in enumerate(targets):
        if target >= 0:
            p, q = log_softmax(z[row] / temperature), log_softmax(t[row] / temperature)
            kl.append(temperature**2 * (np.exp(q) * (q - p)).sum())
            ce.append(-log_softmax(z[row])[target])
    return np.mean(kl), np.mean(ce)


# --- the checker itself ---


@pytest.mark.parametrize("factor", [1.01, 0.99, -1, 0])
def test_checker_rejects_a_wrong_gradient(factor):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4, 5))
    check_gradient(lambda a: float((w * np.sin(a)).sum()), x, w * np.cos(x), rng)
    with pytest.raises(AssertionError, match="slope: expected"):
        check_gradient(lambda a: float((w * np.sin(a)).sum()), x, factor * w * np.cos(x), rng)


def test_checker_rejects_one_entry_wrong_by_one_percent():
    rng = np.random.default_rng(1)
    x = rng.standard_normal(50)
    dx = 3 * x**2
    dx[np.abs(dx).argmax()] *= 1.01
    with pytest.raises(AssertionError, match="slope"):
        check_gradient(lambda a: float((a**3).sum()), x, dx, rng)


# --- KL and cross-entropy ---


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 2e-6)])
def test_kl_and_ce_are_their_formulas(dtype, rtol, temperature):
    z, t, targets = logits(dtype)
    (kl, ce), dlogits = kl_ce(z, t, targets, DistillOptions(temperature=temperature))
    expected = expected_kl_ce(z.astype(np.float64), t.astype(np.float64), targets, temperature)
    np.testing.assert_allclose([kl, ce], expected, rtol=rtol)
    assert dlogits.dtype == dtype


@pytest.mark.parametrize("chunk", [1, 3 * V * 8, 1 << 19])
@pytest.mark.parametrize("weights", [(0.8, 1.0), (1.3, 0), (0, 0.6)])
def test_gradient_of_kl_and_ce(monkeypatch, weights, chunk):
    monkeypatch.setattr(distill, "CHUNK_BYTES", chunk)
    z, t, targets = logits()
    options = DistillOptions(kl_weight=weights[0], ce_weight=weights[1], temperature=1.7)

    def loss(x):
        return 0.25 * np.dot(weights, expected_kl_ce(x, t, targets, 1.7))

    _, dlogits = kl_ce(z, t, targets, options, scale=0.25)
    check_gradient(loss, z, dlogits, np.random.default_rng(0))
    assert not dlogits[targets < 0].any()
    with pytest.raises(AssertionError, match="slope"):
        check_gradient(loss, z, 1.01 * dlogits, np.random.default_rng(0))


def test_dlogits_may_take_the_place_of_the_logits():
    z, t, targets = logits(np.float32)
    losses, dlogits = kl_ce(z.copy(), t, targets, DistillOptions())
    reused = z.copy()
    own_losses, own = kl_ce(reused, t, targets, DistillOptions(), out=reused)
    assert own is reused and own_losses == losses
    np.testing.assert_array_equal(own, dlogits)


def test_a_student_that_equals_its_teacher_has_no_kl():
    z, _, targets = logits(np.float32)
    (kl, ce), dlogits = kl_ce(z, z, targets, DistillOptions(ce_weight=0))
    assert kl == 0 and ce > 0 and not dlogits.any()


def test_no_teacher_and_no_label():
    z, _, targets = logits()
    options = DistillOptions(kl_weight=0)
    (kl, ce), _ = kl_ce(z, None, targets, options)
    assert kl == 0 and ce > 0
    (kl, ce), dlogits = kl_ce(z, None, np.full(M, -1), options)
    assert kl == ce == 0 and not dlogits.any()
    with pytest.raises(ValueError, match="teacher_logits: expected an array for a kl_weight of 0.8, got None"):
        kl_ce(z, None, targets, DistillOptions())


def test_extreme_logits_stay_finite():
    z, t, targets = logits(np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        (kl, ce), dlogits = kl_ce(1e4 * z, -1e4 * t, targets, DistillOptions())
    assert np.isfinite([kl, ce]).all() and np.isfinite(dlogits).all()


def test_only_a_few_rows_are_held_at_one_time():
    z, t, targets = logits(np.float32, rows=24, vocabulary=51864)
    tracemalloc.start()
    kl_ce(z, t, targets, DistillOptions(), out=z)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # dlogits would be 5 MB by itself


def test_shapes_that_do_not_fit():
    z, t, targets = logits()
    with pytest.raises(
        ValueError, match=r"targets: expected shape \(M,\) for logits \(M, V\), got \(8,\) for \(9, 31\)"
    ):
        kl_ce(z, t, targets[1:], DistillOptions())
    with pytest.raises(ValueError, match=r"teacher_logits: expected shape \(9, 31\) like logits, got \(9, 30\)"):
        kl_ce(z, t[:, 1:], targets, DistillOptions())
    with pytest.raises(ValueError, match="targets: expected tokens below 31, got 31"):
        kl_ce(z, t, np.full(M, V), DistillOptions())


# --- hidden states ---


def test_hidden_mse_counts_real_frames_only():
    rng = np.random.default_rng(0)
    xa, teacher = rng.standard_normal((2, 3, 6, 4))
    frames = np.array([6, 2, 0])
    real = np.arange(6) < frames[:, None]

    def loss(x):
        return 0.5 * float(((x - teacher)[real] ** 2).mean())

    value, dxa = hidden_mse(xa, teacher, frames, scale=0.5)
    assert 0.5 * value == pytest.approx(loss(xa), rel=1e-12)
    check_gradient(loss, xa, dxa, rng)
    assert not dxa[~real].any()
    with pytest.raises(ValueError, match="frames: expected 3 numbers from 0 to 6, got"):
        hidden_mse(xa, teacher, np.array([7, 2, 0]))
    with pytest.raises(ValueError, match=r"teacher: expected shape \(3, 6, 4\)"):
        hidden_mse(xa, teacher[:, 1:], frames)


# --- outliers ---


def expected_outlier(a, tau, power, unit="value", most=None):
    if unit == "rms":
        rms = np.sqrt(np.mean(a**2, axis=tuple(range(1, a.ndim)), keepdims=True))
        a = a / (rms if most is None else np.minimum(rms, most))
    return float(np.log(1 + np.mean((np.abs(a) / tau) ** power)))


@pytest.mark.parametrize("power", [1.5, 2, 2.5, 4.0, 7, 20])
@pytest.mark.parametrize("block", [7, 1 << 15])
@pytest.mark.parametrize(("unit", "tau", "most"), [("value", 3.0, None), ("rms", 1.5, None), ("rms", 1.5, 4.0)])
def test_outlier_gradient(monkeypatch, power, block, unit, tau, most):
    monkeypatch.setattr(distill, "BLOCK", block)
    rng = np.random.default_rng(0)
    a = 2 * rng.standard_normal((2, 5, 8))
    a[1] *= 3
    if unit == "rms" and power == 2 and most is None:  # E[(|A| / rms)²] is 1 whatever A is
        assert np.abs(outlier_backward(1.0, outlier(a, tau, power, unit)[1])).max() < 1e-12
        return

    def f(x):
        return -0.7 * expected_outlier(x, tau, power, unit, most)

    value, cache = outlier(a, tau, power, unit, most)
    assert -0.7 * value == pytest.approx(f(a), rel=1e-12)
    da = outlier_backward(-0.7, cache)
    check_gradient(f, a, da, rng)
    with pytest.raises(AssertionError, match="slope"):
        check_gradient(f, a, 1.01 * da, rng)


def test_in_rms_the_size_of_a_tensor_does_not_count():
    """And each window counts by itself, so that windows may lie in several processes."""
    a = np.random.default_rng(3).standard_normal((3, 40, 8)).astype(np.float32)
    a[0, 5, 2] = 60
    (value, cache), (larger, larger_cache) = (outlier(x, 2.0, 6, "rms") for x in (a, 100 * a))
    assert larger == pytest.approx(value, rel=1e-6) and value > 5
    da = outlier_backward(1.0, cache)
    np.testing.assert_allclose(100 * outlier_backward(1.0, larger_cache), da, rtol=1e-4, atol=1e-9)
    assert abs((a.astype(float) * da).sum()) < 1e-5 * np.abs(a * da).sum()  # Euler: nothing along A itself
    means = [np.expm1(outlier(a[i : i + 1], 2.0, 6, "rms")[0]) for i in range(3)]
    assert np.expm1(value) == pytest.approx(np.mean(means), rel=1e-6) and means[0] > 100 * means[1]
    wide, wide_cache = outlier(a.astype(np.float64), 2.0, 6, "rms")
    assert value == pytest.approx(wide, rel=1e-6)
    np.testing.assert_allclose(da, outlier_backward(1.0, wide_cache), rtol=1e-3, atol=1e-7 * np.abs(da).max())


@pytest.mark.parametrize("unit", ["value", "rms"])
@pytest.mark.parametrize(
    ("largest", "tau", "power"), [(1e4, 6.0, 4.0), (1e4, 0.1, 4.0), (1e38, 1e-3, 7), (1e-30, 6, 4)]
)
def test_outliers_in_float32_do_not_overflow(largest, tau, power, unit):
    a = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    a[1, 3] = -largest
    a *= np.float32(largest) / np.abs(a).max()
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        value, cache = outlier(a, tau, power, unit)
        da = outlier_backward(1.0, cache)
    wide = a.astype(np.float64)
    if unit == "rms":
        expected, wide_cache = outlier(wide, tau, power, unit)
        assert value == pytest.approx(expected, rel=1e-5)
        expected = outlier_backward(1.0, wide_cache)
        np.testing.assert_allclose(da, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
        return
    m = np.mean((np.abs(wide) / tau) ** power)
    assert value == pytest.approx(np.log1p(m), rel=1e-5)
    expected = power * np.abs(wide) ** (power - 1) * np.sign(wide) / tau**power / a.size / (1 + m)
    np.testing.assert_allclose(da, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max() + 1e-37)


def test_a_mean_beyond_float64_has_its_logarithm():
    a = np.float32([[1e38, -3e37], [2e5, 0]])
    value, cache = outlier(a, 1e-3, 40.0)
    assert value == pytest.approx(40 * np.log(1e41) - np.log(4), rel=1e-6)
    slope = (a.astype(np.float64) * outlier_backward(1.0, cache)).sum()  # of log E[|A|^40] along A: Euler's 40
    assert slope == pytest.approx(40, rel=1e-5)


def test_zeros_and_what_is_not_finite():
    for unit in distill.OUTLIER_UNITS:
        value, cache = outlier(np.zeros((2, 3), np.float32), 6, 4, unit)
        assert value == 0 and not outlier_backward(1.0, cache).any()
        for bad in (np.nan, np.inf, -np.inf):
            value, cache = outlier(np.float32([[1, bad, 2]]), 6, 4, unit)
            with np.errstate(invalid="ignore"):
                assert np.isnan(value) and np.isnan(outlier_backward(1.0, cache)).any()
    value, cache = outlier(np.float32([[0, 0, 0, 0], [0, 3, 0, 0]]), 1, 4, "rms")  # silence beside sound
    assert value == pytest.approx(np.log(1 + 4 / 2)) and np.isfinite(outlier_backward(1.0, cache)).all()


def test_number_of_penalized_tensors():
    dims = {"n_audio_layer": 4, "n_text_layer": 3}
    assert distill.n_penalized(dims, distill.OUTLIER_GROUPS) == 7 + 7 + 2 + 7


# --- options ---


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kl_weight", -1, "kl_weight: expected a number of at least 0, got -1"),
        ("hidden_weight", float("nan"), "hidden_weight: expected a number"),
        ("temperature", 0, "temperature: expected a number above 0, got 0"),
        ("outlier_tau", 0.0, "outlier_tau: expected a number above 0, got 0.0"),
        ("outlier_power", 1, "outlier_power: expected a number above 1, got 1"),
        ("outlier_tensors", "block,attn",
         "outlier_tensors: expected some of block, mlp, final-norm, mlp-hidden, each once, got"),
        ("outlier_tensors", (), "outlier_tensors: expected some of"),
        ("outlier_tensors", ("mlp", "mlp"), "outlier_tensors: expected some of"),
    ],
)
def test_options_outside_their_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        DistillOptions(**{field: value})


def test_something_must_be_learnt():
    with pytest.raises(ValueError, match="kl_weight, ce_weight, .*: expected one above 0 at least, got 0 for all"):
        DistillOptions(kl_weight=0, ce_weight=0)
    assert DistillOptions(outlier_tensors="mlp,block").outlier_tensors == ("mlp", "block")
