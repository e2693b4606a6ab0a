"""The extension itself: guard bytes round outputs, guard pages after inputs, statuses, threads, forked children, and
the choice of an instruction set. What the kernels compute is in test_kernels.py.
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
from pathlib import Path

import numpy as np
import pytest
from kernelcases import ATTENTION_ERROR, SIZES, close, exact_attention, floats, int8s, weights

from minigate import kernels, packing, reference
from minigate.errors import UsageError

GUARD = 64      # sentinel elements on either side of an output


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---- what is written, what is read ----

def pointer(array):
    kind = {"float32": "float *", "int32": "int32_t *", "int8": "int8_t *", "uint16": "uint16_t *"}[array.dtype.name]
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


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 63, 31), (7, 65, 65), (2, 1, 127), (13, 130, 18), (390, 66, 5)])
def test_products_keep_to_their_arrays(compiled_isa, shape, rng):
    (m, n, k), lib, keep = shape, kernels.lib, []
    a, w = (at_page_end(int8s(rng, "random", rows, k), keep) for rows in (m, n))
    w = packing.pack_int8(np.maximum(w, -127))
    packed = at_page_end(np.asarray(w._packed), keep)
    a_scale, w_scale, bias, residual = (at_page_end(floats(rng, *s), keep) for s in ((m,), (n,), (n,), (m, n)))
    acc_room, acc = guarded((m, n), np.int32)
    out_room, out = guarded((m, n), np.float32)
    assert packed.ctypes.data % packing.ALIGNMENT == 0
    assert lib.mg_matmul_int8(pointer(acc), pointer(a), pointer(packed), m, n, k) == lib.MG_OK
    assert lib.mg_linear_int8(pointer(out), kernels.ffi.NULL, pointer(a), pointer(a_scale), pointer(packed),
                              pointer(w_scale), pointer(bias), pointer(residual), True, m, n, k) == lib.MG_OK
    rows_room, rows = guarded((m, n), np.int8)
    scale_room, scale = guarded((m,), np.float32)
    assert lib.mg_linear_int8_rows(pointer(rows), pointer(scale), pointer(a), pointer(a_scale), pointer(packed),
                                   pointer(w_scale), pointer(bias), True, m, n, k) == lib.MG_OK
    assert unharmed(acc_room) and unharmed(out_room) and unharmed(rows_room) and unharmed(scale_room)
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
    status = lib.mg_attention(pointer(out), pointer(q), pointer(k), pointer(v), 0, pointer(gate), 0, row, 0, row, 0,
                              row, d, False, False, 1, 1, n_head, t_q, t_k, d)
    assert status == lib.MG_OK and unharmed(room)
    close(out, exact_attention(q[None], k[None], v[None], n_head, False, gate[None])[0], 2 * ATTENTION_ERROR)


@pytest.mark.skipif(not kernels.compiled, reason="no C extension")
def test_the_extension_rejects_what_python_would_have_caught():
    lib, x = kernels.lib, pointer(np.ones(64, np.float32))
    q = pointer(np.full((1, 8), -128, np.int8))
    packed = np.zeros(lib.mg_packed_bytes(1, 8), np.int8)
    assert lib.mg_pack_int8(pointer(packed), q, 1, 8) == lib.MG_BAD_VALUE
    assert lib.mg_set_threads(0) == lib.MG_BAD_VALUE
    assert lib.mg_use_isa(b"mmx") == lib.MG_BAD_ISA
    sizes = dict(gate_width=1, causal=0, precision=lib.MG_INT8, n_batch=2, group=1, n_head=1, t_q=2, t_k=2, d=2)
    for change in ({"t_k": 0}, {"group": 0}, {"n_batch": 3, "group": 2}, {"t_q": 3, "causal": 1}, {"gate_width": 3}):
        assert lib.mg_attention(x, x, x, x, 0, x, *[0] * 6, *{**sizes, **change}.values()) == lib.MG_BAD_VALUE
    wide = {**sizes, "gate_width": 32769, "d": 32769}.values()  # of sums in int32
    assert lib.mg_attention(x, x, x, x, 0, x, *[0] * 6, *wide) == lib.MG_BAD_VALUE
    for held, precision in ((2, 0), (0, 3)):
        others = {**sizes, "precision": precision}.values()
        assert lib.mg_attention(x, x, x, x, held, x, *[0] * 6, *others) == lib.MG_BAD_VALUE


# ---- threads and processes ----

def all_kernels(rng):
    """Results of all kernels on one input each, large enough for several tasks."""
    a, w = int8s(rng, "random", 200, 100), weights(rng, "random", 300, 100)
    x, y = floats(rng, 200, 384), floats(rng, 1, 400, 384)
    q, scale = kernels.quantize_rows(x)
    return [kernels.matmul_int8(a, packing.pack_int8(w)), kernels.matmul_int8(a[:1], packing.pack_int8(w)), q, scale,
            kernels.layer_norm(x, x[0], x[1]), kernels.gelu(x), kernels.attention(y, y, y, 6),
            kernels.attention(y[:, :1], y, y, 6), kernels.attention(y, y, y, 6, precision="int8")]


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


def n_tasks():
    """The threads of this process, as the kernel of Linux counts them; None elsewhere."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None


def status_of(child, seconds):
    """Exit status of a child process; None if it takes longer, and then it is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_makes_its_own_pool(compiled_isa):
    kernels.set_threads(3)
    wanted = all_kernels(np.random.default_rng(1))
    child = os.fork()
    if child == 0:
        try:
            ok = same(all_kernels(np.random.default_rng(1)), wanted) and n_tasks() in (3, None)
            kernels.lib.mg_set_threads(2)   # not BLAS, whose threads would be counted too
            ok = ok and same(all_kernels(np.random.default_rng(1)), wanted) and n_tasks() in (2, None)
            os._exit(0 if ok else 1)
        except BaseException:
            os._exit(2)
    assert status_of(child, 30) == 0, "the child hangs, computes something else, or works alone"
    assert same(all_kernels(np.random.default_rng(1)), wanted)


def test_the_pool_uses_other_threads(compiled_isa, rng):
    if n_tasks() is None:
        pytest.skip("no /proc to count threads in")
    kernels.set_threads(1)
    before = n_tasks()
    kernels.set_threads(4)
    kernels.attention(*[floats(rng, 1, 300, 128)] * 3, 2)
    assert n_tasks() == before + 3
    kernels.set_threads(1)
    assert n_tasks() == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to list threads")
def test_workers_may_use_the_processors_of_their_caller(rng):
    """Though a worker that wakes on the caller's is forbidden it for a moment."""
    x = floats(rng, 400, 384)
    kernels.set_threads(3)
    for _ in range(50):
        kernels.gelu(x)
        time.sleep(0.002)  # workers fall asleep
    allowed = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
    assert allowed == [os.sched_getaffinity(0)] * len(allowed)


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


def test_without_the_extension_numpy_runs_and_one_warning_says_so():
    code = """if True:
        import json, sys
        sys.modules["minigate._kernels"] = None
        import numpy as np
        from minigate import kernels, packing
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        q, scale = kernels.quantize_rows(x)
        y = kernels.linear_int8(q, scale, packing.pack_int8(q), scale, gelu=True)
        y = kernels.layer_norm(y, y[0], y[1])
        print(json.dumps([kernels.compiled, kernels.usable_isas(), kernels.set_threads(2), y.tolist()]))"""
    environment = {key: value for key, value in os.environ.items() if key != "MINIGATE_ISA"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60,
                            check=True)
    compiled, usable, n_threads, y = json.loads(result.stdout)
    assert (compiled, usable, n_threads) == (False, ["numpy"], 2) and np.isfinite(y).all()
    assert result.stderr.count("UserWarning: no C extension") == 1 == result.stderr.count("Warning")


@pytest.mark.parametrize("name", ["", "numpy", "mmx"])
def test_isa_tool_prints_the_choice(name):
    tool = Path(__file__).resolve().parent.parent / "tools" / "isa.py"
    result = subprocess.run([sys.executable, str(tool)], env={**os.environ, "MINIGATE_ISA": name}, capture_output=True,
                            text=True, timeout=60, check=False)
    usable = kernels.usable_isas()
    assert f"usable: {' '.join(usable)}\n" in result.stdout
    if name == "mmx":
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    else:
        chosen = f"chosen: {name or usable[-1]} ("
        failed = f"chosen: {usable[-2]} (the fastest usable that can be trusted: {usable[-1]} failed its trial)"
        assert result.returncode == 0 and (chosen in result.stdout or (not name and failed in result.stdout))
