"""AdamW against its formula in float64; which parameters it decays, slows down and leaves alone; resuming."""

import math

import numpy as np
import pytest

from minigate import optim
from minigate.optim import AdamW, OptimOptions, schedule

SHAPES = {
    "encoder.conv1.weight": (4, 3, 3),
    "encoder.positional_embedding": (5, 4),
    "encoder.blocks.0.attn.query.weight": (40, 50),
    "encoder.blocks.0.attn.query.bias": (40,),
    "encoder.blocks.0.attn.gate.weight": (2, 4),
    "encoder.blocks.0.attn_ln.weight": (4,),
    "decoder.token_embedding.weight": (30, 4),
}
DECAYED = {"encoder.conv1.weight", "encoder.blocks.0.attn.query.weight", "decoder.token_embedding.weight"}
LR, GATE_LR = 1e-2, 5e-2


def arrays(rng, dtype=np.float32, factor=1.0):
    return {name: (factor * rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}


def reference(p, gradients, o, lrs, decay):
    """Algorithm 2 of arXiv 1711.05101 in float64: parameter after each of the gradients."""
    p, m, v = p.astype(np.float64), 0.0, 0.0
    average = p.copy()
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        m = o.beta1 * m + (1 - o.beta1) * g
        v = o.beta2 * v + (1 - o.beta2) * g * g
        step = (m / (1 - o.beta1**t)) / (np.sqrt(v / (1 - o.beta2**t)) + o.eps)
        p = p - lr * decay * p - lr * step
        keep = min(o.ema_decay, (1 + t) / (10 + t))
        average = keep * average + (1 - keep) * p
    return p, average


@pytest.mark.parametrize("block", [7, 1 << 14])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_adamw_is_its_formula(monkeypatch, dtype, rtol, block):
    monkeypatch.setattr(optim, "BLOCK", block)
    rng = np.random.default_rng(0)
    options = OptimOptions(weight_decay=0.3, eps=1e-3, ema_decay=0.5)
    params = arrays(rng, dtype)
    start = {n: p.copy() for n, p in params.items()}
    gradients = [arrays(rng, dtype, factor) for factor in (1e-3, 1, 10, 0.1, 1, 1)]
    factors, scales = [0.5, 1, 0.8, 0.6, 0.4, 0.2], [1, 0.5, 0.1, 1, 1, 0.25]
    optimizer = AdamW(params, options)
    for g, factor, scale in zip(gradients, factors, scales, strict=True):
        optimizer.step(g, factor * LR, factor * GATE_LR, scale)
    for name, p in params.items():
        own = [c * g[name].astype(np.float64) for g, c in zip(gradients, scales, strict=True)]
        lrs = [f * (GATE_LR if "gate" in name else LR) for f in factors]
        expected, average = reference(start[name], own, options, lrs, 0.3 if name in DECAYED else 0)
        np.testing.assert_allclose(p, expected, rtol=rtol, atol=rtol, err_msg=name)
        np.testing.assert_allclose(optimizer.average[name], average, rtol=rtol, atol=rtol, err_msg=name)
        assert p.dtype == dtype and np.abs(p - average).max() > 1e-4


def test_parameters_change_in_place_and_gradients_do_not():
    rng = np.random.default_rng(0)
    params, grads = arrays(rng), arrays(rng)
    held, before = dict(params), {n: g.copy() for n, g in grads.items()}
    start = {n: p.copy() for n, p in params.items()}
    AdamW(params, OptimOptions()).step(grads, LR, GATE_LR)
    for name in SHAPES:
        assert params[name] is held[name] and (params[name] != start[name]).any()
        np.testing.assert_array_equal(grads[name], before[name])


def test_frozen_parameters_stay_and_need_no_gradient():
    rng = np.random.default_rng(0)
    params, grads = arrays(rng), arrays(rng)
    frozen = {"encoder.positional_embedding", "encoder.conv1.weight"}
    start = {n: p.copy() for n, p in params.items()}
    optimizer = AdamW(params, OptimOptions(ema_decay=0.9), frozen)
    optimizer.step({n: g for n, g in grads.items() if n not in frozen}, LR, GATE_LR)
    assert {n for n in SHAPES if np.array_equal(params[n], start[n])} == frozen
    averaged = optimizer.averaged(params)
    assert averaged.keys() == params.keys() and averaged["encoder.conv1.weight"] is params["encoder.conv1.weight"]
    norm = math.sqrt(sum((grads[n].astype(np.float64) ** 2).sum() for n in SHAPES if n not in frozen))
    assert optimizer.norm(grads) == pytest.approx(norm, rel=1e-12)


def test_norm_neither_overflows_nor_hides_what_is_not_finite():
    params = {"w.weight": np.zeros((300, 100), np.float32)}
    optimizer = AdamW(params, OptimOptions())
    assert optimizer.norm({"w.weight": np.full((300, 100), 1e30, np.float32)}) == pytest.approx(1e30 * math.sqrt(3e4))
    for bad in (np.nan, np.inf):
        grad = np.zeros((300, 100), np.float32)
        grad[299, 99] = bad
        assert not math.isfinite(optimizer.norm({"w.weight": grad}))


def test_clipping():
    assert optim.clip_scale(0.5, 1.0) == 1 and optim.clip_scale(0.0, 1.0) == 1
    assert optim.clip_scale(8.0, 2.0) == 0.25


def test_missing_and_misshapen_gradients():
    params = {"w.weight": np.zeros((3, 2), np.float32)}
    optimizer = AdamW(params, OptimOptions())
    with pytest.raises(ValueError, match=r"w.weight: expected a gradient of shape \(3, 2\), got none"):
        optimizer.norm({})
    with pytest.raises(ValueError, match=r"w.weight: expected a gradient of shape \(3, 2\), got \(2, 3\)"):
        optimizer.step({"w.weight": np.zeros((2, 3), np.float32)}, LR, GATE_LR)
    assert optimizer.steps == 0
    with pytest.raises(ValueError, match="w.weight: expected a dense writable array"):
        AdamW({"w.weight": params["w.weight"].T}, OptimOptions())


@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_resuming_is_bit_for_bit(ema_decay):
    rng = np.random.default_rng(0)
    options = OptimOptions(ema_decay=ema_decay)
    params = arrays(rng)
    gradients = [arrays(rng) for _ in range(5)]
    optimizer = AdamW(params, options)
    for i, g in enumerate(gradients):
        if i == 3:
            saved = {n: p.copy() for n, p in params.items()}, {n: a.copy() for n, a in optimizer.state_dict().items()}
        optimizer.step(g, LR, GATE_LR)
    resumed_params, state = saved
    resumed = AdamW(resumed_params, options)
    resumed.load_state(state)
    for g in gradients[3:]:
        resumed.step(g, LR, GATE_LR)
    own, other = optimizer.averaged(params), resumed.averaged(resumed_params)
    assert resumed.steps == optimizer.steps == 5
    for name in SHAPES:
        np.testing.assert_array_equal(resumed_params[name], params[name])
        np.testing.assert_array_equal(other[name], own[name])


def test_state_of_other_parameters_is_refused_whole():
    rng = np.random.default_rng(0)
    optimizer = AdamW(arrays(rng), OptimOptions())
    state = optimizer.state_dict()
    optimizer.step(arrays(rng), LR, GATE_LR)
    name = "v.decoder.token_embedding.weight"
    bad = {**state, name: np.zeros((31, 4), np.float32)}
    with pytest.raises(
        ValueError, match=r"optimizer state: v.decoder.*: expected \(30, 4\) float32, got \(31, 4\) float32"
    ):
        optimizer.load_state(bad)
    with pytest.raises(ValueError, match=f"optimizer state: {name}: expected an array, got none"):
        optimizer.load_state({n: a for n, a in state.items() if n != name})
    with pytest.raises(ValueError, match="optimizer state: average.x: expected no such array, got one"):
        optimizer.load_state({**state, "average.x": state["steps"]})
    assert optimizer.steps == 1


def test_schedule():
    assert [schedule(s, 10, 4) for s in range(1, 11)] == [0.25, 0.5, 0.75, 1, *(n / 7 for n in (6, 5, 4, 3, 2, 1))]
    assert [schedule(s, 4, 0) for s in range(1, 5)] == [1, 0.75, 0.5, 0.25]
    assert [schedule(s, 2, 100) for s in (1, 2)] == [0.01, 0.02]
    assert schedule(1, 1, 0) == 1
    for step in (0, 11):
        with pytest.raises(ValueError, match=f"step: expected 1 to 10, got {step}"):
            schedule(step, 10, 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", -1e-5, "lr: expected a number of at least 0"),
        ("clip_norm", 0, "clip_norm: expected a number above 0"),
        ("beta2", 1.0, "beta2: expected a number below 1, got 1.0"),
        ("ema_decay", 1.5, "ema_decay: expected a number below 1, got 1.5"),
        ("warmup", 2.5, "warmup: expected a whole number of at least 0, got 2.5"),
    ],
)
def test_options_outside_their_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        OptimOptions(**{field: value})
