"""Every kernel on every usable instruction set against NumPy: integers exactly, floats within a named tolerance; guard
bytes and guard pages round the arrays, threads, forks, and what is rejected.

M rows, K inputs, N outputs, B batch, T time, H heads, d head size.
"""

import ctypes
import json
import math
import mmap
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from minigate import kernels, reference
from minigate import threads as thread_counts
from minigate.errors import UsageError

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 384, 1536)
GUARD = 64                  # sentinel elements on either side of an output
GELU_ERROR = 5e-7           # absolute, over all float32
RELATIVE = 2e-6             # of a float32 result, relative to the largest magnitude that enters it
ATTENTION_ERROR = 3e-6      # absolute, of averages of values of order 1, with scores of order 1
LARGE_SCORE_ERROR = 2e-4    # the same with scores of order 100, where float32 leaves 1e-5 in the exponent
ERF_ERROR = 1e-15

needs_c = pytest.mark.skipif(not kernels.compiled, reason="no C extension")


def chosen(name):
    """Chooses an instruction set; the one in use and the threads are restored afterwards."""
    before, n_threads = kernels.isa(), kernels.threads()
    if not kernels.isas()[name]:
        pytest.skip(f"cpu lacks {name}")
    yield kernels.use_isa(name)
    kernels.use_isa(before)
    kernels.set_threads(n_threads)


@pytest.fixture(params=kernels.isas())
def isa(request):
    """Each instruction set in turn, NumPy's too."""
    yield from chosen(request.param)


@pytest.fixture(params=[name for name in kernels.isas() if name != "numpy"])
def compiled_isa(request):
    """Each of those whose threads and memory are ours."""
    yield from chosen(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def int8s(rng, fill, *shape):
    """"random", "low", "high" or "zero row" int8 of which the lowest is -128, as for activations."""
    q = rng.integers(-128, 128, shape).astype(np.int8)
    if fill in ("low", "high"):
        q[:] = {"low": -128, "high": 127}[fill]
    elif fill == "zero row":
        q[len(q) // 2] = 0
    return q


def weights(rng, fill, *shape):
    return np.maximum(int8s(rng, fill, *shape), -127)


def close(got, wanted, bound):
    assert got.dtype == np.float32 and got.shape == wanted.shape
    error = np.abs(got - wanted).max(initial=0)
    assert error <= bound, f"error {error} above {bound}"


# ---- integers ----

@pytest.mark.parametrize("fill", ["random", "low", "high", "zero row"])
def test_matmul_int8_equals_numpy(isa, fill, rng):
    shapes = [(s, 17, 33) for s in SIZES] + [(5, s, 65) for s in SIZES] + [(7, 67, s) for s in SIZES]
    for m, n, k in shapes + [(m, 64, 96) for m in range(1, 14)]:
        a = int8s(rng, fill, m, k)
        w = weights(rng, "low" if fill == "high" else fill, n, k)
        acc = kernels.matmul_int8(a, kernels.pack_int8(w))
        assert acc.dtype == np.int32
        assert np.array_equal(acc, a.astype(np.int64) @ w.T.astype(np.int64)), (m, n, k)


@pytest.mark.parametrize("low", [-127, 127])
def test_matmul_int8_is_exact_up_to_the_largest_k(isa, low):
    a = np.full((2, kernels.MAX_K), -128, np.int8)
    w = np.full((1, kernels.MAX_K), low, np.int8)
    assert (kernels.matmul_int8(a, kernels.pack_int8(w)) == -128 * low * kernels.MAX_K).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (4, 5, 0)])
def test_matmul_int8_of_nothing(isa, shape):
    m, n, k = shape
    acc = kernels.matmul_int8(np.zeros((m, k), np.int8), kernels.pack_int8(np.zeros((n, k), np.int8)))
    assert acc.shape == (m, n) and not acc.any()


@pytest.mark.parametrize("shape", [(1, 1), (64, 4), (65, 33), (130, 7)])
def test_packed_weights_give_the_plain_ones_back(shape, rng):
    w = weights(rng, "random", *shape)
    assert np.array_equal(kernels.pack_int8(w).plain(), w)
    assert kernels.pack_int8(w).shape == shape


def test_packed_weights_survive_a_change_of_instruction_set(isa, rng):
    w, a = weights(rng, "random", 70, 50), int8s(rng, "random", 3, 50)
    kernels.use_isa("numpy")
    packed = kernels.pack_int8(w)
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
        got = kernels.linear_int8(q, a_scale, kernels.pack_int8(w), w_scale, b, gelu, r)
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


def exact_attention(q, k, v, n_head, causal, gate):
    """The formula, score by score, in float64."""
    n_batch, t_q, n_state = q.shape
    t_k, d = k.shape[1], n_state // n_head
    out = np.zeros((n_batch, t_q, n_head, d))
    for b in range(n_batch):
        shared = b // (n_batch // len(k))
        for h in range(n_head):
            head = slice(h * d, h * d + d)
            scores = q[b, :, head].astype(float) @ k[shared, :, head].T.astype(float) / math.sqrt(d)
            if causal:
                scores[np.arange(t_k) > np.arange(t_q)[:, None] + t_k - t_q] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, h] = p / p.sum(axis=1, keepdims=True) @ v[shared, :, head].astype(float)
    if gate is not None:
        out *= gate.reshape(n_batch, t_q, n_head, -1)
    return out.reshape(q.shape)


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
                                       (6, 3, 20, 33), (5, 5, 5, 5), (1, 1, 2, 260)]:
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
    assert np.array_equal(kernels.pack_int8(np.maximum(q, -127)).plain(), np.maximum(q, -127))


# ---- what is written, what is read ----

def pointer(array):
    kind = {"float32": "float *", "int32": "int32_t *", "int8": "int8_t *"}[array.dtype.name]
    return kernels.ffi.cast(kind, array.ctypes.data)


def at_page_end(array, keep):
    """A copy of an array whose last byte is the last before a page that must not be touched."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    room = mmap.mmap(-1, size + page)
    keep.append(room)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(room, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[:] = array
    return copy


def guarded(shape, dtype):
    room = np.full(math.prod(shape) + 2 * GUARD, 93, dtype)
    return room, room[GUARD:-GUARD].reshape(shape)


def unharmed(room):
    return (room[:GUARD] == 93).all() and (room[-GUARD:] == 93).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 63, 31), (7, 65, 65), (2, 1, 127), (13, 130, 18)])
def test_products_keep_to_their_arrays(compiled_isa, shape, rng):
    (m, n, k), lib, keep = shape, kernels.lib, []
    a, w = (at_page_end(int8s(rng, "random", rows, k), keep) for rows in (m, n))
    w = kernels.pack_int8(np.maximum(w, -127))
    packed = at_page_end(np.asarray(w._packed), keep)
    a_scale, w_scale, bias, residual = (at_page_end(floats(rng, *s), keep) for s in ((m,), (n,), (n,), (m, n)))
    acc_room, acc = guarded((m, n), np.int32)
    out_room, out = guarded((m, n), np.float32)
    assert packed.ctypes.data % kernels.ALIGNMENT == 0
    assert lib.mg_matmul_int8(pointer(acc), pointer(a), pointer(packed), m, n, k) == lib.MG_OK
    assert lib.mg_linear_int8(pointer(out), pointer(a), pointer(a_scale), pointer(packed), pointer(w_scale),
                              pointer(bias), pointer(residual), True, m, n, k) == lib.MG_OK
    assert unharmed(acc_room) and unharmed(out_room)
    assert np.array_equal(acc, reference.matmul_int8(a, w.plain()))


@pytest.mark.parametrize("n", SIZES)
def test_row_kernels_keep_to_their_arrays(compiled_isa, n, rng):
    lib, keep = kernels.lib, []
    x, residual = (at_page_end(floats(rng, 3, n), keep) for _ in range(2))
    weight, bias = (at_page_end(floats(rng, n), keep) for _ in range(2))
    q_room, q = guarded((3, n), np.int8)
    scale_room, scale = guarded((3,), np.float32)
    y_room, y = guarded((3, n), np.float32)
    assert lib.mg_quantize_rows(pointer(q), pointer(scale), pointer(x), 3, n) == lib.MG_OK
    assert lib.mg_layer_norm(pointer(y), pointer(x), pointer(weight), pointer(bias), 1e-5, 3, n) == lib.MG_OK
    assert lib.mg_finish(pointer(y), pointer(x), pointer(bias), pointer(residual), True, 3, n) == lib.MG_OK
    assert unharmed(q_room) and unharmed(scale_room) and unharmed(y_room)
    close(y, reference.finish(x.astype(float), bias, True, residual), 3e-6)
    assert lib.mg_finish(pointer(y), pointer(y), pointer(bias), pointer(y), False, 3, n) == lib.MG_OK   # in place
    assert unharmed(y_room)


@pytest.mark.parametrize("t_q", [1, 9, 50])
@pytest.mark.parametrize("d", [1, 15, 17, 64])
def test_attention_keeps_to_its_arrays(compiled_isa, t_q, d, rng):
    t_k, n_head, lib, keep = 67, 3, kernels.lib, []
    q, gate = (at_page_end(floats(rng, t_q, n_head * d), keep) for _ in range(2))
    k, v = (at_page_end(floats(rng, t_k, n_head * d), keep) for _ in range(2))
    room, out = guarded((t_q, n_head * d), np.float32)
    row = n_head * d
    status = lib.mg_attention(pointer(out), pointer(q), pointer(k), pointer(v), pointer(gate), 0, row, 0, row, 0, row,
                              d, False, 1, 1, n_head, t_q, t_k, d)
    assert status == lib.MG_OK and unharmed(room)
    close(out, exact_attention(q[None], k[None], v[None], n_head, False, gate[None])[0], 2 * ATTENTION_ERROR)


# ---- threads and processes ----

def all_kernels(rng):
    """Results of all kernels on one input each, large enough for several tasks."""
    a, w = int8s(rng, "random", 200, 100), weights(rng, "random", 300, 100)
    x, y = floats(rng, 200, 384), floats(rng, 1, 400, 384)
    q, scale = kernels.quantize_rows(x)
    return [kernels.matmul_int8(a, kernels.pack_int8(w)), kernels.matmul_int8(a[:1], kernels.pack_int8(w)), q, scale,
            kernels.layer_norm(x, x[0], x[1]), kernels.gelu(x), kernels.attention(y, y, y, 6),
            kernels.attention(y[:, :1], y, y, 6)]


def same(results, wanted):
    return all(np.array_equal(a, b) for a, b in zip(results, wanted, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(compiled_isa):
    kernels.set_threads(1)
    wanted = all_kernels(np.random.default_rng(1))
    for n in (2, 3, 5, 2, 1):
        assert kernels.set_threads(n) == kernels.threads() == n
        assert same(all_kernels(np.random.default_rng(1)), wanted)


def test_two_python_threads_at_once(compiled_isa):
    kernels.set_threads(3)
    wanted = [all_kernels(np.random.default_rng(seed)) for seed in (1, 2)]
    wrong = []

    def repeat(seed):
        for _ in range(8):
            if not same(all_kernels(np.random.default_rng(seed)), wanted[seed - 1]):
                wrong.append(seed)

    callers = [threading.Thread(target=repeat, args=(seed,)) for seed in (1, 2)]
    for caller in callers:
        caller.start()
    for n in (2, 4, 3):
        kernels.set_threads(n)
        time.sleep(0.01)
    for caller in callers:
        caller.join(60)
    assert not wrong and not any(caller.is_alive() for caller in callers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_makes_its_own_pool(compiled_isa):
    kernels.set_threads(3)
    wanted = all_kernels(np.random.default_rng(1))
    child = os.fork()
    if child == 0:
        try:
            ok = same(all_kernels(np.random.default_rng(1)), wanted)
            kernels.set_threads(2)
            os._exit(0 if ok and same(all_kernels(np.random.default_rng(1)), wanted) else 1)
        except BaseException:
            os._exit(2)
    end = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == (child, 0), "the child hangs, or computes something else"
    assert same(all_kernels(np.random.default_rng(1)), wanted)


def test_the_pool_uses_other_threads(compiled_isa, rng):
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc to count threads in")
    kernels.set_threads(1)
    before = len(os.listdir("/proc/self/task"))
    kernels.set_threads(4)
    kernels.attention(*[floats(rng, 1, 300, 128)] * 3, 2)
    assert len(os.listdir("/proc/self/task")) == before + 3
    kernels.set_threads(1)
    assert len(os.listdir("/proc/self/task")) == before


def test_set_threads_holds_blas_too():
    before = kernels.threads()
    functions = thread_counts.blas_functions()
    if functions is None:
        pytest.skip("NumPy's BLAS is no OpenBLAS")
    try:
        for n in (1, 2):
            kernels.set_threads(n)
            assert functions[1]() == min(n, os.cpu_count())
    finally:
        kernels.set_threads(before)


def test_default_threads_are_the_cores_of_this_process():
    before = kernels.threads()
    try:
        assert 1 <= kernels.set_threads() <= os.cpu_count()
        if hasattr(os, "sched_getaffinity"):
            assert kernels.threads() <= len(os.sched_getaffinity(0))
    finally:
        kernels.set_threads(before)


# ---- instruction sets ----

def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=60, check=False)


def test_unknown_instruction_set_is_an_error():
    with pytest.raises(UsageError, match=f"MINIGATE_ISA: expected one of {', '.join(kernels.usable_isas())}, got mmx"):
        kernels.use_isa("mmx")
    assert kernels.isa() in kernels.usable_isas()


@pytest.mark.parametrize("name", kernels.isas())
def test_environment_forces_an_instruction_set_or_fails(name):
    code = "from minigate import kernels\ntry:\n print(kernels.isa())\nexcept ValueError as e:\n print(e)"
    printed = run(code, MINIGATE_ISA=name).stdout.strip()
    usable = kernels.usable_isas()
    assert printed == (name if name in usable else f"MINIGATE_ISA: expected one of {', '.join(usable)}, got {name}")


def test_environment_with_an_unknown_instruction_set_fails_at_the_first_kernel():
    code = "import numpy as np; from minigate import kernels; print('imported'); kernels.gelu(np.ones(3, 'f'))"
    result = run(code, MINIGATE_ISA="mmx")
    assert result.stdout == "imported\n" and result.returncode == 1
    assert "UsageError: MINIGATE_ISA: expected one of" in result.stderr


def test_without_the_extension_numpy_runs_and_one_line_says_so():
    code = """if True:
        import json, sys
        sys.modules["minigate._kernels"] = None
        import numpy as np
        from minigate import kernels
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        q, scale = kernels.quantize_rows(x)
        y = kernels.linear_int8(q, scale, kernels.pack_int8(q), scale, gelu=True)
        y = kernels.layer_norm(y, y[0], y[1])
        print(json.dumps([kernels.compiled, kernels.usable_isas(), kernels.set_threads(2), y.tolist()]))"""
    environment = {key: value for key, value in os.environ.items() if key != "MINIGATE_ISA"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60,
                            check=True)
    compiled, usable, n_threads, y = json.loads(result.stdout)
    assert (compiled, usable, n_threads) == (False, ["numpy"], 2) and np.isfinite(y).all()
    assert len(result.stderr.splitlines()) == 1 and "no C extension" in result.stderr


# ---- NumPy reference ----

def test_float64_stays_float64(rng):
    x, w = rng.standard_normal((2, 3, 8)), rng.standard_normal((5, 8))
    results = [kernels.linear_f32(x, w, w[:, 0], True), kernels.gelu(x), kernels.layer_norm(x, w[0], w[1]),
               kernels.attention(x, x, x, 2, True, x)]
    assert all(y.dtype == np.float64 for y in results)
    assert np.abs(results[3] - exact_attention(x, x, x, 2, True, x)).max() < 1e-14
    assert np.abs(results[0] - reference.gelu(x @ w.T + w[:, 0])).max() < 1e-14


def test_erf():
    x = np.concatenate([np.linspace(-7, 7, 20001), [0.46875, -0.46875, 4, -4, 0, 1e-300, 30, -30]])
    wanted = np.array([math.erf(value) for value in x])
    assert np.abs(reference.erf(x) - wanted).max() <= ERF_ERROR
    assert reference.erf(x.astype(np.float32)).dtype == np.float32
    assert reference.erf(x.reshape(-1, 1)).shape == (x.size, 1)


def test_reference_attention_takes_queries_in_blocks(rng, monkeypatch):
    x = floats(rng, 2, 30, 8)
    monkeypatch.setattr(reference, "QUERIES", 7)
    close(reference.attention(x, x, x, 2, True), exact_attention(x, x, x, 2, True, None), ATTENTION_ERROR)


# ---- what is rejected ----

X = np.ones((2, 3, 8), np.float32)
Q = np.ones((4, 8), np.int8)
S = np.ones(4, np.float32)
W = kernels.pack_int8(np.ones((5, 8), np.int8))
BAD = [
    (lambda: kernels.pack_int8(X[0]), TypeError, "q: expected an array of int8, got float32"),
    (lambda: kernels.pack_int8(Q[0]), ValueError, r"q: expected shape \(any, any\), got \(8,\)"),
    (lambda: kernels.pack_int8(-Q - 127), ValueError, "q: expected weights from -127 to 127, got -128"),
    (lambda: kernels.pack_int8(np.zeros((1, 131073), np.int8)), ValueError, "at most 131072 columns, got 131073"),
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
    (lambda: kernels.attention(X, X, X, 2, gate=X[:, :, :3]), ValueError, r"gate: expected shape \(2, 3, 2\)"),
    (lambda: kernels.set_threads(0), UsageError, "threads: expected 1 to 256, got 0"),
    (lambda: kernels.set_threads(257), UsageError, "threads: expected 1 to 256, got 257"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@needs_c
def test_the_extension_rejects_what_python_would_have_caught():
    lib, x = kernels.lib, pointer(np.ones(64, np.float32))
    q = pointer(np.full((1, 8), -128, np.int8))
    packed = np.zeros(lib.mg_packed_bytes(1, 8), np.int8)
    assert lib.mg_pack_int8(pointer(packed), q, 1, 8) == lib.MG_BAD_VALUE
    assert lib.mg_set_threads(0) == lib.MG_BAD_VALUE
    assert lib.mg_use_isa(b"mmx") == lib.MG_BAD_ISA
    sizes = dict(gate_width=1, causal=0, n_batch=2, group=1, n_head=1, t_q=2, t_k=2, d=2)
    for change in ({"t_k": 0}, {"group": 0}, {"n_batch": 3, "group": 2}, {"t_q": 3, "causal": 1}, {"gate_width": 3}):
        assert lib.mg_attention(x, x, x, x, x, *[0] * 6, *{**sizes, **change}.values()) == lib.MG_BAD_VALUE
