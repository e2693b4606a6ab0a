"""The kernels of w8a8-static on every usable instruction set: integers exactly, what is rounded to int8 against the
formula in float64, within half a step and what float32 loses before the rounding; what they may touch; what is
rejected.

M rows, K inputs, N outputs, B batch, T time, H heads, d head size.
"""

import numpy as np
import pytest

from minigate import kernels, packing, reference, static_reference
from minigate import static_kernels as sk
from minigate.static_kernels import Grid, Tensor
from tests.kernelcases import GELU_ERROR, SIZES, close, floats, int8s, weights
from tests.test_csrc import at_page_end, guarded, pointer, unharmed

A_GRID, RESIDUAL_GRID, OUT_GRID = Grid(0.02, -37), Grid(0.03, 90), Grid(0.05, 13)
ATTENTION_GRID = Grid(0.01, -3)
RELATIVE = 2e-6     # of a float32 result, relative to the largest magnitude that enters it
P_ERROR = 1e-3      # of 255 times a probability before it is rounded
SUM_ERROR = 2e-3    # of a sum of these


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def numbers(x):
    """A Tensor's numbers in float64."""
    if x.data.dtype == np.float32:
        return x.data.astype(float)
    return float(x.grid.scale) * (x.data.astype(float) - x.grid.zero_point)


def on_grid(q, wanted, grid, error):
    """q int8 is `wanted` (float64) on the grid, whose computation had an error."""
    assert q.dtype == np.int8 and q.shape == wanted.shape
    steps = np.clip(wanted / float(grid.scale) + grid.zero_point, -128, 127)
    worst = np.abs(q - steps).max(initial=0)
    assert worst <= 0.5 + error / grid.scale, f"{worst} steps off"


def agrees(got, wanted, grid, error):
    if grid is None:
        close(got, wanted, error)
    else:
        on_grid(got, wanted, grid, error + RELATIVE * np.abs(wanted).max(initial=0))


# ---- conversion ----

def test_convert_rounds_half_to_even_and_clips(isa):
    ties, far = [0, 0.5, 1.5, 2.5, -0.5, -1.5], [137.5, 138.5, 1e30, np.inf, -117.5, -118.5, -1e30, -np.inf, np.nan]
    x = np.array(ties + far, np.float32)
    q = sk.convert(Tensor(x), Grid(1.0, -10))
    assert q.tolist() == [-10, -10, -8, -8, -10, -12, 127, 127, 127, 127, -128, -128, -128, -128, -128]
    assert sk.convert(Tensor(x[:2]), Grid(1.0, 127)).tolist() == [127, 127]
    assert sk.convert(Tensor(x[:2]), Grid(1.0, -128)).tolist() == [-128, -128]


@pytest.mark.parametrize("out", [None, OUT_GRID])
def test_convert_and_add(isa, out, rng):
    for size in (0, *SIZES, 40000):
        x = Tensor(floats(rng, size) * 4, A_GRID)
        q = Tensor(int8s(rng, "random", size), A_GRID)
        residual = Tensor(int8s(rng, "random", size), RESIDUAL_GRID)
        for a in (x, q):
            agrees(sk.convert(a, out), numbers(a), out, 1e-6)
            for b in (residual, x):
                agrees(sk.add(a, b, out), numbers(a) + numbers(b), out, 4e-6)


def test_int8_values_survive_float32(isa):
    """What an operator writes as float32 and the next one reads as int8 is what it was."""
    q = np.arange(-128, 128).astype(np.int8)
    for scale in np.random.default_rng(0).uniform(1e-6, 30, 200):
        for zero_point in (-128, -1, 0, 127):
            grid = Grid(np.float32(scale), zero_point)
            assert np.array_equal(sk.convert(Tensor(sk.convert(Tensor(q, grid), None)), grid), q)


def test_expand(isa, rng):
    for m, n in [(0, 5), (1, 1), (7, 65), (130, 384)]:
        q, scale = weights(rng, "random", m, n), rng.uniform(1e-3, 1, m).astype("f")
        assert np.array_equal(sk.expand(q, scale), q * scale[:, None])


# ---- linear, layer norm ----

def check_linear(rng, m, n, k, out, bias=True, gelu=False, residual=None, fill="random", zero_point=-37):
    a = Tensor(int8s(rng, fill, m, k), Grid(0.02, zero_point))
    w = weights(rng, "low" if fill == "high" else fill, n, k)
    w_scale = rng.uniform(0.5e-2, 1e-2, n).astype("f") / np.sqrt(k).astype("f")
    b = floats(rng, n) if bias else None
    r = {None: None, "int8": Tensor(int8s(rng, "random", m, n), RESIDUAL_GRID), "float32": Tensor(floats(rng, m, n))}
    args = w_scale, out, b, gelu, r[residual]
    got = sk.linear(a, packing.pack_int8(w), *args)
    y = (a.data.astype(np.int64) - zero_point) @ w.T.astype(np.int64) * (float(a.grid.scale) * w_scale.astype(float))
    y = y if b is None else y + b
    y = reference.gelu(y) if gelu else y
    y = y if residual is None else y + numbers(r[residual])
    agrees(got, y, out, GELU_ERROR + RELATIVE * np.abs(y).max(initial=1))
    if not gelu:
        assert np.array_equal(got, static_reference.linear(a, w, *args)), "not exact up to the rounding"


@pytest.mark.parametrize("out", [None, OUT_GRID])
@pytest.mark.parametrize("fill", ["random", "low", "high", "zero row"])
def test_linear_sizes(isa, out, fill, rng):
    shapes = [(s, 17, 33) for s in SIZES] + [(5, s, 65) for s in SIZES] + [(7, 67, s) for s in SIZES]
    for m, n, k in shapes + [(0, 3, 4), (4, 0, 7)] * (fill == "random"):
        check_linear(rng, m, n, k, out, fill=fill)


@pytest.mark.parametrize("residual", [None, "int8", "float32"])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [None, OUT_GRID, Grid(1e-4, -128)])
def test_linear_epilogue(isa, out, bias, gelu, residual, rng):
    for zero_point in (-128, 0, 127):
        for m, n, k in [(1, 65, 17), (50, 33, 100), (8, 64, 64)]:
            check_linear(rng, m, n, k, out, bias, gelu, residual, zero_point=zero_point)


@pytest.mark.parametrize("low", [-127, 127])
@pytest.mark.parametrize(("q", "zero_point"), [(-128, 127), (127, -128)])
def test_linear_is_exact_up_to_the_largest_k(isa, low, q, zero_point):
    a = Tensor(np.full((2, sk.MAX_K), q, np.int8), Grid(1.0, zero_point))
    w = packing.pack_int8(np.full((1, sk.MAX_K), low, np.int8))
    y = sk.linear(a, w, np.ones(1, "f"), None)
    assert (y == np.float32((q - zero_point) * low * sk.MAX_K)).all()


@pytest.mark.parametrize("out", [None, Grid(0.03, 5)])
@pytest.mark.parametrize("from_int8", [False, True])
def test_layer_norm(isa, out, from_int8, rng):
    for n in SIZES:
        x = Tensor(int8s(rng, "random", 2, 5, n), A_GRID) if from_int8 else Tensor(floats(rng, 2, 5, n))
        weight, bias = floats(rng, n), floats(rng, n)
        wanted = reference.layer_norm(numbers(x), weight.astype(float), bias.astype(float))
        agrees(sk.layer_norm(x, weight, bias, out), wanted, out, 2e-4 if n < 15 else 5e-6)


# ---- attention ----

def attention_case(rng, n_batch, k_batch, t_q, t_k, n_state, fill="random", size=0.05):
    q, k, v = (Tensor(int8s(rng, fill, b, t, n_state), grid) for b, t, grid in (
        (n_batch, t_q, Grid(size, -100)), (k_batch, t_k, Grid(size, 31)), (k_batch, t_k, Grid(0.01, 77))))
    return q, k, v


def rounded(p, diffuse):
    """p (Tq, Tk) in steps -> whole numbers, and where these may be one off because they are near a tie: each by itself
    or, diffuse, its sum with those before it; that key's, and if diffuse the next one's."""
    sums = np.cumsum(p, axis=1) if diffuse else p
    near = np.abs(sums - np.floor(sums) - 0.5) < (SUM_ERROR if diffuse else P_ERROR)
    if not diffuse:
        return np.rint(p), near
    return np.diff(np.floor(sums + 0.5), axis=1, prepend=0), near | np.pad(near, ((0, 0), (1, 0)))[:, :-1]


def exact_attention(q, k, v, n_head, causal, diffuse=False):
    """-> P v (B, Tq, H, d) with rounded probabilities in float64, and the sum of |v| where these are near a tie: what P
    v may be off when they are rounded the other way."""
    (n_batch, t_q, n_state), t_k = q.data.shape, k.data.shape[1]
    y, doubt = (np.zeros((n_batch, t_q, n_head, n_state // n_head)) for _ in range(2))
    for b in range(n_batch):
        shared = b // (n_batch // len(k.data))
        for h in range(n_head):
            head = slice(h * y.shape[3], (h + 1) * y.shape[3])
            scores = numbers(q)[b, :, head] @ numbers(k)[shared, :, head].T / np.sqrt(y.shape[3])
            if causal:
                scores[np.arange(t_k) > np.arange(t_q)[:, None] + t_k - t_q] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p *= 255 / p.sum(axis=1, keepdims=True)
            p, near = rounded(p, diffuse)
            y[b, :, h] = p / 255 @ numbers(v)[shared, :, head]
            doubt[b, :, h] = near / 255 @ np.abs(numbers(v)[shared, :, head])
    return y, doubt


def near(got, wanted, doubt, grid):
    """wanted, or off by what is in doubt and by what float32 loses."""
    error = doubt + 1e-6 * np.abs(wanted).max() + 1e-6
    if grid is None:
        assert got.dtype == np.float32 and (np.abs(got - wanted) <= error).all()
    else:
        steps = np.clip(wanted / float(grid.scale) + grid.zero_point, -128, 127)
        assert got.dtype == np.int8 and (np.abs(got - steps) <= 0.5 + error / grid.scale).all()


def check_attention(rng, n_batch, k_batch, t_q, t_k, n_head, d, causal=False, gate=None, out=ATTENTION_GRID,
                    diffuse=False, **case):
    q, k, v = attention_case(rng, n_batch, k_batch, t_q, t_k, n_head * d, **case)
    y, doubt = exact_attention(q, k, v, n_head, causal, diffuse)
    if gate is None:
        got = sk.attention(q, k, v, n_head, out, causal, diffuse=diffuse)
        near(got.reshape(y.shape), y, doubt, out)
        return
    ungated = Grid(0.008, 20)
    g = floats(rng, n_batch, t_q, n_head * (d if gate == "element" else 1))
    got = sk.attention(q, k, v, n_head, out, causal, g, ungated, diffuse)
    g = g.reshape(n_batch, t_q, n_head, -1).astype(float)
    steps = np.clip(y / ungated.scale + ungated.zero_point, -128, 127)      # before it is rounded to the grid
    doubt = doubt / ungated.scale + 1e-5
    low, high = np.rint(np.clip(steps - doubt, -128, 127)), np.rint(np.clip(steps + doubt, -128, 127))
    middle = ungated.scale * ((low + high) / 2 - ungated.zero_point) * g
    near(got.reshape(y.shape), middle, ungated.scale * (high - low) / 2 * np.abs(g), out)


@pytest.mark.parametrize("t_q", [1, 2, 6, 8, 9, 17, 49, 97])
@pytest.mark.parametrize("diffuse", [False, True])
def test_attention_sizes_of_queries_and_keys(isa, t_q, diffuse, rng):
    for t_k in (1, 3, 4, 15, 16, 17, 63, 64, 65, 128, 300):
        check_attention(rng, 1, 1, t_q, t_k, 2, 16, diffuse=diffuse)


@pytest.mark.parametrize("d", [1, 3, 4, 15, 16, 17, 31, 63, 64, 65, 80, 129])
def test_attention_head_sizes(isa, d, rng):
    for t_q in (1, 5, 20):
        check_attention(rng, 1, 1, t_q, 70, 3, d)
        check_attention(rng, 1, 1, t_q, 70, 3, d, gate="element")


@pytest.mark.parametrize("gate", [None, "head", "element"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("out", [None, Grid(0.02, -60)])
@pytest.mark.parametrize("diffuse", [False, True])
def test_attention_gates_masks_and_shared_keys(isa, gate, causal, out, diffuse, rng):
    for n_batch, k_batch, t_q, t_k in [(1, 1, 1, 1), (1, 1, 70, 70), (2, 2, 40, 200), (6, 2, 1, 150), (4, 1, 3, 90),
                                       (6, 3, 20, 33), (5, 5, 5, 5), (1, 1, 2, 260), (10, 1, 1, 65)]:
        check_attention(rng, n_batch, k_batch, t_q, t_k, 2, 24, causal, gate, out, diffuse)


@pytest.mark.parametrize("fill", ["random", "low", "high"])
@pytest.mark.parametrize("t_q", [1, 30])
def test_attention_of_extreme_integers(isa, fill, t_q, rng):
    for t_k, size in ((2, 0.05), (300, 0.05), (300, 2.0)):      # the last: a softmax that is one key
        for diffuse in (False, True):
            check_attention(rng, 1, 1, t_q, t_k, 2, 64, fill=fill, size=size, diffuse=diffuse)
    check_attention(rng, 1, 1, t_q, t_q, 2, 64, causal=True, fill=fill, size=2.0)


def attend_itself(rng, t_q, t_k, d, diffuse=False):
    """Values that give the probabilities themselves: (Tq, Tk) uint8, and the score of each key in float64."""
    q, k, _ = attention_case(rng, 1, 1, t_q, t_k, d)
    v = Tensor(np.eye(t_k, d, dtype=np.int8)[None], Grid(255.0, 0))
    p = sk.attention(q, k, v, 1, None, diffuse=diffuse)[0, :, :t_k]
    return p, numbers(q)[0] @ numbers(k)[0].T / np.sqrt(d)


@pytest.mark.parametrize("t_q", [1, 5, 40])
def test_probabilities_are_rounded_to_the_nearest_of_255_steps(isa, t_q, rng):
    for t_k in (1, 2, 17, 64):
        p, scores = attend_itself(rng, t_q, t_k, 64)
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        worst = np.abs(p - 255 * e / e.sum(axis=1, keepdims=True)).max()
        assert np.array_equal(p, np.rint(p)) and worst <= 0.5 + P_ERROR


@pytest.mark.parametrize("t_q", [1, 5, 40])
def test_diffused_probabilities_have_sums_rounded_to_the_nearest_of_255_steps(isa, t_q, rng):
    for t_k in (1, 2, 17, 64):
        p, scores = attend_itself(rng, t_q, t_k, 64, diffuse=True)
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        worst = np.abs(np.cumsum(p - 255 * e / e.sum(axis=1, keepdims=True), axis=1)).max()
        assert np.array_equal(p, np.rint(p)) and p.min() >= 0 and worst <= 0.5 + SUM_ERROR
        assert np.array_equal(p.sum(axis=1), np.full(t_q, 255))


@pytest.mark.parametrize("t_k", [1500, 32768])
@pytest.mark.parametrize("t_q", [1, 20])
def test_a_flat_softmax_keeps_its_mass_only_if_diffused(isa, t_q, t_k):
    q, k, v = (Tensor(np.full((1, t, 4), x, np.int8), Grid(0.01, 0)) for t, x in ((t_q, 1), (t_k, 1), (t_k, 100)))
    lost, kept = (sk.attention(q, k, v, 1, None, diffuse=diffuse) for diffuse in (False, True))
    assert not lost.any()       # each of the probabilities is less than half a step
    np.testing.assert_allclose(kept, 1, rtol=1e-6)


def test_attention_of_views(isa, rng):
    for t_q in (1, 3, 60):
        qkv = int8s(rng, "random", 2, t_q + 5, 3 * 32 + 1)
        parts = [qkv[:, 2:2 + t_q, 1 + 32 * i:33 + 32 * i] for i in range(3)]
        parts[1] = qkv[:, :, 33:65]
        parts[2] = np.repeat(qkv[:, :, 65:97], 2, axis=1)[:, ::2]
        views = [Tensor(x, A_GRID) for x in parts]
        copies = [Tensor(x.copy(), A_GRID) for x in parts]
        backwards = [Tensor(x[::-1], A_GRID) for x in parts]
        wanted = sk.attention(*copies, 2, None)
        assert np.array_equal(sk.attention(*views, 2, None), wanted)
        assert np.array_equal(sk.attention(*backwards, 2, None), wanted[::-1])


# ---- what is written, what is read ----

def tensor(array, grid):
    """An array as C sees it."""
    x, q = (pointer(array) if array.dtype == kind else kernels.ffi.NULL for kind in (np.float32, np.int8))
    return kernels.ffi.new("struct mg_tensor *", (x, q, grid.scale, grid.zero_point))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 63, 31), (7, 65, 65), (2, 1, 127), (13, 130, 18)])
def test_linear_keeps_to_its_arrays(compiled_isa, shape, rng):
    (m, n, k), lib, keep = shape, kernels.lib, []
    a, residual = (at_page_end(int8s(rng, "random", m, width), keep) for width in (k, n))
    packed = at_page_end(np.asarray(packing.pack_int8(weights(rng, "random", n, k))._packed), keep)
    w_scale, bias = (at_page_end(floats(rng, n), keep) for _ in range(2))
    for dtype in (np.int8, np.float32):
        room, out = guarded((m, n), dtype)
        assert lib.mg_linear_static(tensor(out, OUT_GRID), tensor(a, A_GRID), pointer(packed), pointer(w_scale),
                                    pointer(bias), tensor(residual, RESIDUAL_GRID), True, m, n, k) == lib.MG_OK
        assert unharmed(room)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("from_int8", [False, True])
@pytest.mark.parametrize("to_int8", [False, True])
def test_row_kernels_keep_to_their_arrays(compiled_isa, n, from_int8, to_int8, rng):
    lib, keep = kernels.lib, []
    x = at_page_end(int8s(rng, "random", 3, n) if from_int8 else floats(rng, 3, n), keep)
    y = at_page_end(int8s(rng, "random", 3, n), keep)
    weight, bias = (at_page_end(floats(rng, n), keep) for _ in range(2))
    room, out = guarded((3, n), np.int8 if to_int8 else np.float32)
    args = tensor(out, OUT_GRID), tensor(x, A_GRID)
    assert lib.mg_layer_norm_static(*args, pointer(weight), pointer(bias), 1e-5, 3, n) == lib.MG_OK
    assert lib.mg_add_static(*args, tensor(y, A_GRID), 3 * n) == lib.MG_OK
    assert unharmed(room)
    room, out = guarded((3, n), np.float32)
    assert lib.mg_expand(pointer(out), pointer(y), pointer(weight), min(3, n), n) == lib.MG_OK
    assert unharmed(room)


@pytest.mark.parametrize("t_q", [1, 9, 50])
@pytest.mark.parametrize("d", [1, 15, 17, 64, 65])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_attention_keeps_to_its_arrays(compiled_isa, t_q, d, dtype, rng):
    t_k, n_head, lib, keep = 67, 3, kernels.lib, []
    row = n_head * d
    q, k, v = (at_page_end(int8s(rng, "random", t, row), keep) for t in (t_q, t_k, t_k))
    gate = at_page_end(floats(rng, t_q, row), keep)
    for g, width in ((pointer(gate), d), (kernels.ffi.NULL, 0)):
        room, out = guarded((t_q, row), dtype)
        status = lib.mg_attention_static(tensor(out, OUT_GRID), tensor(out, OUT_GRID), tensor(q, A_GRID),
                                         tensor(k, A_GRID), tensor(v, A_GRID), g, 0, row, 0, row, 0, row, width, False,
                                         width == 0, 1, 1, n_head, t_q, t_k, d)
        assert status == lib.MG_OK and unharmed(room)


def test_results_do_not_depend_on_the_number_of_threads(compiled_isa, rng):
    q, k, v = attention_case(rng, 2, 2, 130, 300, 128)
    a = Tensor(int8s(rng, "random", 200, 100), A_GRID)
    w, w_scale = packing.pack_int8(weights(rng, "random", 300, 100)), rng.uniform(1e-3, 2e-3, 300).astype("f")
    x, parameters = Tensor(int8s(rng, "random", 200, 384), A_GRID), floats(rng, 2, 384)

    def results():
        return [sk.attention(q, k, v, 2, OUT_GRID), sk.attention(Tensor(q.data[:, :1], q.grid), k, v, 2, OUT_GRID),
                sk.attention(q, k, v, 2, OUT_GRID, diffuse=True),
                sk.linear(a, w, w_scale, OUT_GRID, gelu=True), sk.layer_norm(x, *parameters, OUT_GRID),
                sk.add(x, x, OUT_GRID)]

    kernels.set_threads(1)
    wanted = results()
    for n in (2, 3, 1):
        kernels.set_threads(n)
        assert all(np.array_equal(a, b) for a, b in zip(results(), wanted, strict=True))


# ---- what is rejected ----

Q3 = Tensor(np.ones((2, 3, 8), np.int8), A_GRID)
Q2 = Tensor(Q3.data[0], A_GRID)
K2 = Tensor(Q3.data[:, :2], A_GRID)
X2 = Tensor(np.ones((3, 8), np.float32), A_GRID)
S = np.ones(4, np.float32)
W = packing.pack_int8(np.ones((4, 8), np.int8))
WIDE = np.zeros((1, sk.MAX_K + 1), np.int8)
BAD = [
    (lambda: sk.convert(Q2.data, None), TypeError, "x: expected a Tensor of int8 or float32, got ndarray"),
    (lambda: sk.convert(Tensor(S.astype(float)), None), TypeError, "x: expected .* float32, got Tensor of float64"),
    (lambda: sk.convert(Tensor(Q2.data, None), None), ValueError, "x: expected a grid with .*, got None"),
    (lambda: sk.convert(X2, Grid(0.0, 0)), ValueError, "out: expected a grid with a positive scale"),
    (lambda: sk.convert(X2, Grid(np.nan, 0)), ValueError, "out: expected a grid with a positive scale"),
    (lambda: sk.convert(X2, Grid(1.0, 128)), ValueError, "out: expected a grid .* zero point in int8"),
    (lambda: sk.add(Q2, Q3, None), ValueError, r"y: expected shape \(3, 8\), got \(2, 3, 8\)"),
    (lambda: sk.linear(X2, W, S, None), TypeError, "a: expected a Tensor of int8, got Tensor of float32"),
    (lambda: sk.linear(Q2, W, S[1:], None), ValueError, r"w_scale: expected shape \(4\), got \(3,\)"),
    (lambda: sk.linear(Q3, W, S, None), ValueError, r"a: expected shape \(any, 8\), got \(2, 3, 8\)"),
    (lambda: sk.linear(Q2, W, S, None, residual=Q2), ValueError, r"residual: expected shape \(3, 4\), got \(3, 8\)"),
    (lambda: sk.linear(Tensor(WIDE, A_GRID), packing.pack_int8(WIDE), S[:1], None), ValueError,
     "w: expected at most 65536 columns, got 65537"),
    (lambda: sk.layer_norm(Q2, S, S, None), ValueError, r"weight: expected shape \(8\), got \(4,\)"),
    (lambda: sk.expand(Q2.data, S), ValueError, r"scale: expected shape \(3\), got \(4,\)"),
    (lambda: sk.attention(X2, Q3, Q3, 2, None), TypeError, "q: expected a Tensor of int8, got Tensor of float32"),
    (lambda: sk.attention(Q2, Q3, Q3, 2, None), ValueError, r"q: expected shape \(any, any, any\), got \(3, 8\)"),
    (lambda: sk.attention(Q3, Q3, Q2, 2, None), ValueError, r"v: expected shape \(2, 3, 8\), got \(3, 8\)"),
    (lambda: sk.attention(Q3, Q3, Q3, 3, None), ValueError, "n_head: expected a divisor of 8, got 3"),
    (lambda: sk.attention(Tensor(Q3.data[:1], A_GRID), Q3, Q3, 2, None), ValueError,
     "k: expected a number of rows that divides the 1 of q, got 2"),
    (lambda: sk.attention(Q3, K2, K2, 2, None, True), ValueError, "k: expected 3 to 32768 positions, got 2"),
    (lambda: sk.attention(Q3, Q3, Q3, 2, None, gate=np.ones((2, 3, 2), "f")), ValueError, "ungated: expected a grid"),
    (lambda: sk.attention(Q3, Q3, Q3, 2, None, gate=np.ones((2, 3, 3), "f"), ungated=A_GRID), ValueError,
     r"gate: expected shape \(2, 3, 2\), got \(2, 3, 3\)"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not kernels.compiled, reason="no C extension")
def test_the_extension_rejects_what_python_would_have_caught():
    lib, x = kernels.lib, pointer(np.ones(64, np.float32))
    q = np.ones(64, np.int8)
    good, flat, beyond = tensor(q, A_GRID), tensor(q, Grid(0.0, 0)), tensor(q, Grid(1.0, 128))
    null = kernels.ffi.NULL
    for bad in (flat, beyond):
        assert lib.mg_add_static(bad, good, null, 1) == lib.MG_BAD_VALUE
        assert lib.mg_add_static(good, good, bad, 1) == lib.MG_BAD_VALUE
        assert lib.mg_layer_norm_static(good, bad, x, x, 1e-5, 1, 1) == lib.MG_BAD_VALUE
        assert lib.mg_linear_static(good, good, pointer(q), x, x, bad, 0, 1, 1, 1) == lib.MG_BAD_VALUE
    floats_ = tensor(np.ones(4, np.float32), A_GRID)
    assert lib.mg_linear_static(good, floats_, pointer(q), x, x, null, 0, 1, 1, 1) == lib.MG_BAD_VALUE
    assert lib.mg_linear_static(good, good, pointer(q), x, x, null, 0, 1, 1, 65537) == lib.MG_BAD_VALUE
    sizes = dict(gate_width=1, causal=0, diffuse=0, n_batch=2, group=1, n_head=1, t_q=2, t_k=2, d=2)
    wrong = ({"t_k": 0}, {"group": 0}, {"n_batch": 3, "group": 2}, {"t_q": 3, "causal": 1}, {"gate_width": 3},
             {"t_k": 32769}, {"d": 32769})
    for change in wrong:
        rest = [0] * 6, {**sizes, **change}.values()
        assert lib.mg_attention_static(good, good, good, good, good, x, *rest[0], *rest[1]) == lib.MG_BAD_VALUE
    for ungated, key in ((null, good), (good, floats_), (flat, good)):
        assert lib.mg_attention_static(good, ungated, good, key, good, x, *[0] * 6, *sizes.values()) == lib.MG_BAD_VALUE
