"""Every kernel on every usable instruction set against NumPy: integers exactly, floats within a named tolerance; and
what is rejected. What the extension may touch, threads and forks are in test_csrc.py.

M rows, K inputs, N outputs, B batch, T time, H heads, d head size.
"""

import numpy as np
import pytest
from kernelcases import ATTENTION_ERROR, GELU_ERROR, SIZES, close, exact_attention, floats, int8s, weights

from minigate import kernels, packing, reference
from minigate.errors import UsageError

RELATIVE = 2e-6             # of a float32 result, relative to the largest magnitude that enters it
LARGE_SCORE_ERROR = 2e-4    # of attention with scores of order 100, where float32 leaves 1e-5 in the exponent


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---- integers ----

@pytest.mark.parametrize("fill", ["random", "low", "high", "zero row"])
def test_matmul_int8_equals_numpy(isa, fill, rng):
    shapes = [(s, 17, 33) for s in SIZES] + [(5, s, 65) for s in SIZES] + [(7, 67, s) for s in SIZES]
    for m, n, k in shapes + [(m, 64, 96) for m in range(1, 14)]:
        a = int8s(rng, fill, m, k)
        w = weights(rng, "low" if fill == "high" else fill, n, k)
        acc = kernels.matmul_int8(a, packing.pack_int8(w))
        assert acc.dtype == np.int32
        assert np.array_equal(acc, a.astype(np.int64) @ w.T.astype(np.int64)), (m, n, k)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matmul_int8_of_many_tiles_equals_numpy(isa, threads, rng):
    a, w = int8s(rng, "random", 384, 512), weights(rng, "random", 3000, 512)
    kernels.set_threads(threads)
    acc = kernels.matmul_int8(a, packing.pack_int8(w))
    assert np.array_equal(acc, (a.astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32))


@pytest.mark.parametrize("low", [-127, 127])
def test_matmul_int8_is_exact_up_to_the_largest_k(isa, low):
    a = np.full((2, kernels.MAX_K), -128, np.int8)
    w = np.full((1, kernels.MAX_K), low, np.int8)
    assert (kernels.matmul_int8(a, packing.pack_int8(w)) == -128 * low * kernels.MAX_K).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (4, 5, 0)])
def test_matmul_int8_of_nothing(isa, shape):
    m, n, k = shape
    acc = kernels.matmul_int8(np.zeros((m, k), np.int8), packing.pack_int8(np.zeros((n, k), np.int8)))
    assert acc.shape == (m, n) and not acc.any()


@pytest.mark.parametrize("shape", [(1, 1), (64, 4), (65, 33), (130, 7)])
def test_packed_weights_give_the_plain_ones_back(shape, rng):
    w = weights(rng, "random", *shape)
    assert np.array_equal(packing.pack_int8(w).plain(), w)
    assert packing.pack_int8(w).shape == shape
    index = np.array([[0, shape[0] - 1], [shape[0] // 2, 0]])
    assert np.array_equal(packing.pack_int8(w).rows(index), w[index])


def test_packed_weights_share_a_room(rng):
    room = packing.Room(100_000)
    some = [weights(rng, "random", *shape) for shape in [(70, 33), (300, 100), (64, 4), (1000, 200), (5, 9), (5, 9)]]
    packed = [packing.pack_int8(w, room) for w in some]
    for w, p in zip(some, packed, strict=True):
        assert np.array_equal(p.plain(), w)
    if kernels.compiled:
        at = [int(kernels.ffi.cast("uintptr_t", p.pointer())) for p in packed]
        assert not any(address % packing.ALIGNMENT for address in at)
        assert at[1] - at[0] == 2 * 64 * 36 + 2 * 64 * 4  # panels and sums, csrc/pack.c


def test_packed_weights_survive_a_change_of_instruction_set(isa, rng):
    w, a = weights(rng, "random", 70, 50), int8s(rng, "random", 3, 50)
    kernels.use_isa("numpy")
    packed = packing.pack_int8(w)
    wanted = kernels.matmul_int8(a, packed)
    kernels.use_isa(isa)
    assert np.array_equal(kernels.matmul_int8(a, packed), wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_int8(isa, bias, gelu, residual, rng):
    for m, n, k in [(1, 1, 1), (3, 65, 17), (1, 200, 384), (50, 33, 100), (8, 64, 64)]:
        q, w = int8s(rng, "random", m, k), weights(rng, "random", n, k)
        a_scale, w_scale = rng.uniform(1e-3, 2e-3, m).astype("f"), rng.uniform(1e-3, 2e-3, n).astype("f")
        b, r = (floats(rng, n) if bias else None), (floats(rng, m, n) if residual else None)
        got = kernels.linear_int8(q, a_scale, packing.pack_int8(w), w_scale, b, gelu, r)
        y = (q.astype(float) @ w.T.astype(float)) * a_scale[:, None].astype(float) * w_scale
        y = y if b is None else y + b
        y = reference.gelu(y) if gelu else y
        close(got, y if r is None else y + r, GELU_ERROR + RELATIVE * (4 + np.abs(y).max()))


def test_quantize_rows_equals_numpy(isa, rng):
    for k in SIZES:
        x = floats(rng, 9, k) * 10 ** rng.uniform(-6, 6, (9, 1)).astype(np.float32)
        x[3], x[4], x[5] = 0, 1e-31, -x[5].max()
        q, scale = kernels.quantize_rows(x)
        wanted_q, wanted_scale = reference.quantize_rows(x)
        assert q.dtype == np.int8 and np.array_equal(q, wanted_q)
        assert scale.dtype == np.float32 and np.array_equal(scale, wanted_scale)
        assert scale[3] == 1 and not q[3].any() and scale[4] == 1 and not q[4].any()
        close(q * scale[:, None], x, np.abs(x).max() / 127)


@pytest.mark.parametrize("shape", [(1, 130, 40), (7, 64, 64), (385, 70, 30), (432, 1, 4), (433, 129, 8), (0, 3, 4),
                                   (400, 0, 4)])
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_int8_rows_quantizes_the_rows_of_linear_int8(isa, shape, gelu, rng):
    m, n, k = shape     # more than 384 rows are quantized tile by tile
    q, a_scale = int8s(rng, "random", m, k), rng.uniform(1e-3, 2e-3, m).astype("f")
    w, w_scale = packing.pack_int8(weights(rng, "random", n, k)), rng.uniform(1e-3, 2e-3, n).astype("f")
    others = w, w_scale, floats(rng, n), gelu
    wanted_q, wanted_scale = kernels.quantize_rows(kernels.linear_int8(q, a_scale, *others))
    got_q, got_scale = kernels.linear_int8_rows(q, a_scale, *others)
    assert np.array_equal(got_q, wanted_q) and np.array_equal(got_scale, wanted_scale)


def test_layer_norm_rows_is_layer_norm_and_quantize_rows(isa, rng):
    for n in SIZES:
        x, weight, bias = floats(rng, 2, 5, n), floats(rng, n), floats(rng, n)
        y, q, scale = kernels.layer_norm_rows(x, weight, bias)
        assert np.array_equal(y, kernels.layer_norm(x, weight, bias))
        wanted_q, wanted_scale = kernels.quantize_rows(y.reshape(-1, n))
        assert np.array_equal(q, wanted_q.reshape(x.shape)) and np.array_equal(scale, wanted_scale)


def test_quantize_rows_rounds_half_to_even(isa):
    x = np.array([[127, -127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 3.49]], np.float32)
    q, scale = kernels.quantize_rows(x)
    assert q.tolist() == [[127, -127, 0, 2, 2, 0, -2, -2, 126, 3]] and scale.tolist() == [1]


# ---- floats ----

def test_gelu(isa, rng):
    x = np.concatenate([np.linspace(-12, 12, 100003), [0, -0.0, 1e-30, 600, -600, 1e10, -1e10]]).astype(np.float32)
    close(kernels.gelu(x[:1000]), reference.gelu(x[:1000].astype(float)), GELU_ERROR)
    got, wanted = kernels.gelu(x), reference.gelu(x.astype(float))
    close(got[:-4], wanted[:-4], GELU_ERROR)
    close(got[-4:], wanted[-4:], 1e-7 * 1e10)
    assert got[-3] == got[-1] == 0
    for n in SIZES:
        close(kernels.gelu(x[-n:]), wanted[-n:].astype(np.float32), 1e-7 * 1e10)
    assert kernels.gelu(np.zeros((0, 4), np.float32)).shape == (0, 4)
    close(kernels.gelu(floats(rng, 2, 3, 5).transpose(2, 0, 1)), np.zeros((5, 2, 3)), 5)


def test_layer_norm(isa, rng):
    for n in SIZES:
        x = floats(rng, 2, 5, n) * 30 + 100
        weight, bias = floats(rng, n), floats(rng, n)
        wanted = reference.layer_norm(x.astype(float), weight.astype(float), bias.astype(float))
        close(kernels.layer_norm(x, weight, bias), wanted, 2e-4 if n < 15 else 5e-5)    # cancellation in x - mean
        close(kernels.layer_norm(x / 30, weight, bias, eps=0.5),
              reference.layer_norm(x.astype(float) / 30, weight.astype(float), bias.astype(float), 0.5), 5e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_f32(isa, bias, gelu, residual, rng):
    for n in (1, 2, 3, 15, 16, 17, 33, 384):
        x, w = floats(rng, 2, 3, 20), floats(rng, n, 20)
        b, r = (floats(rng, n) if bias else None), (floats(rng, 2, 3, n) if residual else None)
        got = kernels.linear_f32(x, w, b, gelu, r)
        y = x.astype(float) @ w.T.astype(float)
        y = y if b is None else y + b
        y = reference.gelu(y) if gelu else y
        close(got, y if r is None else y + r, GELU_ERROR + RELATIVE * 20)


def check_attention(rng, n_batch, k_batch, t_q, t_k, n_head, d, causal=False, gate=None, size=1, bound=ATTENTION_ERROR):
    q, k, v = (floats(rng, b, t, n_head * d) for b, t in ((n_batch, t_q), (k_batch, t_k), (k_batch, t_k)))
    q *= size
    g = {None: None, "head": floats(rng, n_batch, t_q, n_head), "element": floats(rng, n_batch, t_q, n_head * d)}[gate]
    close(kernels.attention(q, k, v, n_head, causal, g), exact_attention(q, k, v, n_head, causal, g), bound)


@pytest.mark.parametrize("t_q", [1, 2, 8, 9, 15, 17, 33, 49, 65, 127])
def test_attention_sizes_of_queries_and_keys(isa, t_q, rng):
    for t_k in (1, 7, 8, 16, 31, 63, 64, 65, 128, 129, 300):
        check_attention(rng, 1, 1, t_q, t_k, 2, 16)


@pytest.mark.parametrize("d", [1, 3, 8, 15, 16, 17, 31, 64, 65, 80, 129])
def test_attention_head_sizes(isa, d, rng):
    for t_q in (1, 5, 20, 50):
        check_attention(rng, 1, 1, t_q, 70, 3, d)


@pytest.mark.parametrize("gate", [None, "head", "element"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_gates_masks_and_shared_keys(isa, gate, causal, rng):
    for n_batch, k_batch, t_q, t_k in [(1, 1, 1, 1), (1, 1, 70, 70), (2, 2, 40, 200), (6, 2, 1, 150), (4, 1, 3, 90),
                                       (6, 3, 20, 33), (5, 5, 5, 5), (1, 1, 2, 260), (1, 1, 5, 34),
                                       (1, 1, 4, 131)]:
        check_attention(rng, n_batch, k_batch, t_q, t_k, 2, 24, causal, gate)


def test_attention_with_large_scores_does_not_overflow(isa, rng):
    for t_q in (1, 30):
        check_attention(rng, 1, 1, t_q, 200, 2, 64, size=40, bound=LARGE_SCORE_ERROR)


def test_attention_of_views(isa, rng):
    for t_q in (1, 3, 60):
        qkv = floats(rng, 2, t_q + 5, 3 * 32 + 1)
        parts = [qkv[:, 2:2 + t_q, 1 + 32 * i:33 + 32 * i] for i in range(3)]
        parts[1] = qkv[:, :, 33:65]
        parts[2] = np.repeat(qkv[:, :, 65:97], 2, axis=1)[:, ::2]
        wanted = exact_attention(*parts, 2, False, None)
        close(kernels.attention(*parts, 2), wanted, ATTENTION_ERROR)
        close(kernels.attention(parts[0][::-1], parts[1][::-1], parts[2][::-1], 2), wanted[::-1], ATTENTION_ERROR)
        close(kernels.attention(parts[0].swapaxes(0, 1), parts[1][:1].repeat(t_q, 0), parts[2][:1].repeat(t_q, 0), 2),
              exact_attention(parts[0].swapaxes(0, 1), parts[1][:1], parts[2][:1], 2, False, None), ATTENTION_ERROR)


def test_read_only_mapped_arrays_are_taken(isa, rng, tmp_path):
    path = tmp_path / "x.bin"
    floats(rng, 40, 12).tofile(path)
    x = np.memmap(path, np.float32, "r", shape=(1, 40, 12))
    assert not x.flags.writeable
    close(kernels.attention(x, x, x, 3), exact_attention(x, x, x, 3, False, None), ATTENTION_ERROR)
    close(kernels.linear_f32(x, x[0]), np.asarray(x[0].astype(float) @ x[0].T.astype(float))[None], 1e-4)
    assert np.array_equal(kernels.quantize_rows(x[0])[0], reference.quantize_rows(x[0])[0])
    q = np.memmap(path, np.int8, "r", shape=(40, 48))
    assert np.array_equal(packing.pack_int8(np.maximum(q, -127)).plain(), np.maximum(q, -127))


# ---- what is rejected ----

X = np.ones((2, 3, 8), np.float32)
Q = np.ones((4, 8), np.int8)
S = np.ones(4, np.float32)
W = packing.pack_int8(np.ones((5, 8), np.int8))
BAD = [
    (lambda: packing.pack_int8(X[0]), TypeError, "q: expected an array of int8, got float32"),
    (lambda: packing.pack_int8(Q[0]), ValueError, r"q: expected shape \(any, any\), got \(8,\)"),
    (lambda: packing.pack_int8(-Q - 127), ValueError, "q: expected weights from -127 to 127, got -128"),
    (lambda: packing.pack_int8(np.zeros((1, 131073), np.int8)), ValueError, "at most 131072 columns, got 131073"),
    (lambda: kernels.matmul_int8(Q.astype(np.int64), W), TypeError, "a: expected an array of int8, got int64"),
    (lambda: kernels.matmul_int8(Q[:, 1:], W), ValueError, r"a: expected shape \(4, 8\), got \(4, 7\)"),
    (lambda: kernels.matmul_int8([[1]], W), TypeError, "a: expected an array of int8, got list"),
    (lambda: kernels.linear_int8(Q, S[1:], W, np.ones(5, "f")), ValueError, r"a_scale: expected shape \(4\), got"),
    (lambda: kernels.linear_int8(Q, S, W, S), ValueError, r"w_scale: expected shape \(5\), got \(4,\)"),
    (lambda: kernels.linear_int8(Q, S, W, np.ones(5)), TypeError, "w_scale: expected an array of float32, got float64"),
    (lambda: kernels.linear_int8(Q, S, W, np.ones(5, "f"), S), ValueError, "bias: expected shape"),
    (lambda: kernels.linear_int8(Q, S, W, np.ones(5, "f"), residual=X[0]), ValueError, "residual: expected shape"),
    (lambda: kernels.quantize_rows(X), ValueError, r"x: expected shape \(any, any\), got \(2, 3, 8\)"),
    (lambda: kernels.quantize_rows(X[0].astype(float)), TypeError, "x: expected an array of float32, got float64"),
    (lambda: kernels.linear_f32(X, X[0, :, 1:]), ValueError, r"w: expected shape \(3, 8\), got \(3, 7\)"),
    (lambda: kernels.linear_f32(X, X[0].astype(float)), TypeError, "w: expected an array of float32, got float64"),
    (lambda: kernels.linear_f32(Q, Q), TypeError, "x: expected an array of float32 or float64, got int8"),
    (lambda: kernels.gelu(1.0), TypeError, "x: expected an array of float32 or float64, got float"),
    (lambda: kernels.layer_norm(X, S, S), ValueError, r"weight: expected shape \(8\), got \(4,\)"),
    (lambda: kernels.attention(X[0], X, X, 2), ValueError, r"q: expected shape \(any, any, any\), got \(3, 8\)"),
    (lambda: kernels.attention(X, X[:, :, 1:], X, 2), ValueError, r"k: expected shape \(2, 3, 8\), got \(2, 3, 7\)"),
    (lambda: kernels.attention(X, X, X[:, 1:], 2), ValueError, r"v: expected shape \(2, 3, 8\), got \(2, 2, 8\)"),
    (lambda: kernels.attention(X, X, X.astype(float), 2), TypeError, "v: expected an array of float32, got float64"),
    (lambda: kernels.attention(X, X, X, 3), ValueError, "n_head: expected a divisor of 8, got 3"),
    (lambda: kernels.attention(X[:1], X, X, 2), ValueError, "k: expected a number of rows that divides the 1 of q"),
    (lambda: kernels.attention(X, X[:, :0], X[:, :0], 2), ValueError, "k: expected at least 1 positions, got 0"),
    (lambda: kernels.attention(X, X[:, :2], X[:, :2], 2, True), ValueError, "k: expected at least 3 positions, got 2"),
    (lambda: kernels.attention(X, X, X, 2, precision="int4"), ValueError, "expected float32 or bf16 or int8, got 'i"),
    (lambda: W.rows(np.array([0, 5])), IndexError, "index: expected 0 to 4, got 0 to 5"),
    (lambda: W.rows(np.array([-1])), IndexError, "index: expected 0 to 4, got -1 to -1"),
    (lambda: kernels.attention(X, X, X, 2, gate=X[:, :, :3]), ValueError, r"gate: expected shape \(2, 3, 2\)"),
    (lambda: kernels.set_threads(0), UsageError, "threads: expected 1 to 256, got 0"),
    (lambda: kernels.set_threads(257), UsageError, "threads: expected 1 to 256, got 257"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
