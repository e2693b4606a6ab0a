"""The door to the C extension, beside the other *_kernels.py and packing.py: checks, allocates, calls, turns a status
into an exception.

In and out go NumPy arrays, float32 and int8, C-ordered (others are copied; q, k and v of attention may be views with
strides). Without the extension, with MINIGATE_ISA=numpy, and for float64 arrays the same functions of reference.py run.
MINIGATE_ISA picks the instruction set, see use_isa(). All kernels may be called from several threads at once.

Shapes: M rows, K inputs, N outputs, B batch, T time, D n_state, H n_head.
"""

import math
import os
import warnings

import numpy as np

from minigate import reference
from minigate import threads as _threads
from minigate.errors import UsageError

try:
    from minigate._kernels import ffi, lib
except ImportError as error:
    compiled, _missing = False, str(error)
else:
    compiled, _missing = True, ""
    _FLOATS, _INTS, _BYTES = ffi.typeof("float[]"), ffi.typeof("int32_t[]"), ffi.typeof("int8_t[]")
    _HALVES = ffi.typeof("uint16_t[]")

F32, F64, I8, U16 = (np.dtype(t) for t in (np.float32, np.float64, np.int8, np.uint16))
PRECISIONS = ("float32", "bf16", "int8")    # of attention; enum mg_precision
HELD = (F32, U16)   # keys and values; enum mg_held
MAX_THREADS = 256
MAX_K = 131072      # inputs of an integer product that int32 surely holds
LARGE = 1 << 18     # bytes of an array whose memory is kept for the next one

_isa = ""           # the chosen instruction set; "" until one is needed
_n_threads = 0      # 0 until they are set or needed


# ---- instruction set and threads ----

def isas() -> dict[str, bool]:
    """Every instruction set that the kernels exist for, from the slowest to the fastest, and whether it is usable."""
    found = {"numpy": True}
    i = 0
    while compiled and (name := lib.mg_isa_name(i)) != ffi.NULL:
        found[ffi.string(name).decode()] = bool(lib.mg_isa_usable(i))
        i += 1
    return found


def usable_isas() -> list[str]:
    """What use_isa() and MINIGATE_ISA may name here, from the slowest to the fastest."""
    return [name for name, usable in isas().items() if usable]


def features() -> dict[str, tuple[bool, bool, bool]]:
    """What the instruction sets are made of: name -> whether the chip has it, the operating system saves its registers,
    and this process may use it."""
    found = {}
    i = 0
    while compiled and (name := lib.mg_feature_name(i)) != ffi.NULL:
        bits = lib.mg_feature(i)
        found[ffi.string(name).decode()] = (bool(bits & 1), bool(bits & 2), bool(bits & 4))
        i += 1
    return found


def use_isa(name: str = "") -> str:
    """Runs all kernels on an instruction set from now on ("": the fastest, amx and avxvnni if they pass
    csrc/trial.c); -> its name.

    Raises UsageError if it is unknown or this process may not use it."""
    global _isa
    usable = usable_isas()
    if name and name not in usable:
        raise UsageError(f"MINIGATE_ISA: expected one of {', '.join(usable)}, got {name}")
    if compiled and name != "numpy":
        _check(lib.mg_use_isa(name.encode()))
        name = ffi.string(lib.mg_isa()).decode()
    _isa = name or "numpy"
    return _isa


def isa() -> str:
    """The instruction set in use: MINIGATE_ISA, else what use_isa() takes; "numpy" stands for reference.py."""
    if not _isa:
        use_isa(os.environ.get("MINIGATE_ISA", ""))
        if not compiled:
            warnings.warn(f"no C extension ({_missing}); running on NumPy, which is slow", stacklevel=2)
    return _isa


def set_threads(n: int | None = None) -> int:
    """Shares kernels, and BLAS if it is an OpenBLAS, among n threads (None: the cores this process may use); -> n."""
    global _n_threads
    n = _threads.available() if n is None else n
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_THREADS:
        raise UsageError(f"threads: expected 1 to {MAX_THREADS}, got {n!r}")
    if compiled:
        _check(lib.mg_set_threads(n))
    _threads.limit_blas(n)
    _n_threads = n
    return n


def threads() -> int:
    """The number of threads in use."""
    return _n_threads or set_threads()


def _in_c(x) -> bool:
    """Whether a kernel on x runs in C; makes the choices that are open."""
    if x.dtype == F64:
        return False
    if not _n_threads:
        set_threads()
    return (_isa or isa()) != "numpy"


def _check(status: int) -> None:
    if status == lib.MG_NO_MEMORY:
        raise MemoryError("kernels: no memory for scratch")
    if status != lib.MG_OK:
        raise ValueError(f"kernels: the extension rejects a value, status {status}")


def _array(name: str, x, shape: tuple, dtype: np.dtype) -> np.ndarray:
    """x, or a C-ordered copy, after a check of its type and shape; a None in shape stands for any size."""
    if not isinstance(x, np.ndarray) or x.dtype != dtype:
        raise TypeError(f"{name}: expected an array of {dtype}, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != shape and (x.ndim != len(shape) or any(n not in (None, x.shape[i]) for i, n in enumerate(shape))):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape ({sizes}), got {x.shape}")
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)


def _matrix(name: str, x, k: int | None, dtype: np.dtype) -> np.ndarray:
    """_array of any number of rows, k columns or any."""
    if getattr(x, "ndim", 0) != 2:
        return _array(name, x, (None, k), dtype)
    return _array(name, x, (x.shape[0], x.shape[1] if k is None else k), dtype)


def _optional(name: str, x, shape: tuple, dtype: np.dtype) -> np.ndarray | None:
    return None if x is None else _array(name, x, shape, dtype)


def _float_type(name: str, x) -> np.dtype:
    """float32 or float64: what x has."""
    if not isinstance(x, np.ndarray) or (x.dtype != F32 and x.dtype != F64):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name}: expected an array of float32 or float64, got {got}")
    return x.dtype


def _floats(x):
    return ffi.NULL if x is None else ffi.from_buffer(_FLOATS, x)


# ---- memory ----

def empty(shape: tuple, dtype) -> np.ndarray:
    """numpy.empty; large arrays in memory that is kept for those that follow them (csrc/memory.c)."""
    dtype = np.dtype(dtype)
    n = math.prod(shape)
    if not compiled or n * dtype.itemsize < LARGE:
        return np.empty(shape, dtype)
    block = lib.mg_take_memory(n * dtype.itemsize)
    if block == ffi.NULL:
        raise MemoryError(f"kernels: no memory for an array of {n * dtype.itemsize} bytes")
    block = ffi.gc(block, lib.mg_give_memory, n * dtype.itemsize)
    return np.frombuffer(ffi.buffer(block, n * dtype.itemsize), dtype).reshape(shape)


def release_memory() -> None:
    """Gives what is kept for large arrays back to the system: the next ones will be other ones."""
    if compiled:
        lib.mg_release_memory()


# ---- integers ----

def matmul_int8(a: np.ndarray, w) -> np.ndarray:
    """a (M, K) int8, w (N, K) packed (packing.py) -> a wᵀ (M, N) int32, exact."""
    n, k = w.shape
    a = _matrix("a", a, k, I8)
    if not _in_c(a):
        return reference.matmul_int8(a, w.plain())
    acc = empty((a.shape[0], n), np.int32)
    _check(lib.mg_matmul_int8(ffi.from_buffer(_INTS, acc), ffi.from_buffer(_BYTES, a), w.pointer(), a.shape[0], n, k))
    return acc


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (M, K) float32, finite -> q (M, K) int8, scale (M,) float32 with x ≈ scale * q.

    scale = max |x| / 127 of the row, q = x * (127 / max) rounded half to even; a row of zeros has scale 1."""
    x = _matrix("x", x, None, F32)
    if not _in_c(x):
        return reference.quantize_rows(x)
    q, scale = empty(x.shape, I8), np.empty(x.shape[0], F32)
    _check(lib.mg_quantize_rows(ffi.from_buffer(_BYTES, q), _floats(scale), _floats(x), *x.shape))
    return q, scale


def linear_int8(q: np.ndarray, a_scale: np.ndarray, w, w_scale: np.ndarray, bias=None, gelu=False,
                residual=None, bf16=False) -> np.ndarray:
    """[gelu](a_scale[m] * w_scale[n] * (q wᵀ)[m, n] + bias[n]) + residual -> (M, N) float32, or if bf16 bfloat16, which
    is uint16 for NumPy.

    q (M, K) int8, a_scale (M,), w_scale (N,), bias (N,) or None, residual (M, N) or None, all float32."""
    n, k = w.shape
    q = _matrix("q", q, k, I8)
    m = q.shape[0]
    a_scale = _array("a_scale", a_scale, (m,), F32)
    w_scale = _array("w_scale", w_scale, (n,), F32)
    bias = _optional("bias", bias, (n,), F32)
    residual = _optional("residual", residual, (m, n), F32)
    if not _in_c(q):
        y = reference.linear_int8(q, a_scale, w.plain(), w_scale, bias, gelu, residual)
        return reference.to_bf16(y) if bf16 else y
    out = empty((m, n), U16 if bf16 else F32)
    targets = (ffi.NULL, ffi.from_buffer(_HALVES, out)) if bf16 else (_floats(out), ffi.NULL)
    _check(lib.mg_linear_int8(*targets, ffi.from_buffer(_BYTES, q), _floats(a_scale), w.pointer(),
                              _floats(w_scale), _floats(bias), _floats(residual), gelu, m, n, k))
    return out


def linear_int8_rows(q: np.ndarray, a_scale: np.ndarray, w, w_scale: np.ndarray, bias=None,
                     gelu=False) -> tuple[np.ndarray, np.ndarray]:
    """quantize_rows of linear_int8, of which the floats are never in memory as a whole -> (M, N) int8, (M,) float32."""
    n, k = w.shape
    q = _matrix("q", q, k, I8)
    m = q.shape[0]
    a_scale, w_scale = _array("a_scale", a_scale, (m,), F32), _array("w_scale", w_scale, (n,), F32)
    bias = _optional("bias", bias, (n,), F32)
    if not _in_c(q):
        return reference.quantize_rows(reference.linear_int8(q, a_scale, w.plain(), w_scale, bias, gelu))
    out, scale = empty((m, n), I8), np.empty(m, F32)
    _check(lib.mg_linear_int8_rows(ffi.from_buffer(_BYTES, out), _floats(scale), ffi.from_buffer(_BYTES, q),
                                   _floats(a_scale), w.pointer(), _floats(w_scale), _floats(bias), gelu, m, n, k))
    return out, scale


# ---- floats ----

def linear_f32(x: np.ndarray, w: np.ndarray, bias=None, gelu=False, residual=None) -> np.ndarray:
    """[gelu](x wᵀ + bias) + residual -> (..., N), the product by BLAS. x (..., K), w (N, K), bias (N,) or None,
    residual (..., N) or None; all float32 or all float64."""
    dtype = _float_type("x", x)
    w = _matrix("w", w, x.shape[-1], dtype)
    n, rows = w.shape[0], x.reshape(-1, x.shape[-1])
    bias = _optional("bias", bias, (n,), dtype)
    residual = _optional("residual", residual, (*x.shape[:-1], n), dtype)
    if not _in_c(x):
        return reference.linear(x, w, bias, gelu, residual)
    y = rows @ w.T
    if bias is not None or gelu or residual is not None:
        out = _floats(y)
        _check(lib.mg_finish(out, out, _floats(bias), _floats(residual), gelu, *y.shape))
    return y.reshape(*x.shape[:-1], n)


def gelu(x: np.ndarray) -> np.ndarray:
    """x * Phi(x) elementwise, Phi the normal distribution function (no tanh); float32 or float64, any shape."""
    dtype = _float_type("x", x)
    x = _array("x", x, x.shape, dtype)
    if not _in_c(x):
        return reference.gelu(x)
    y = empty(x.shape, F32)
    width = x.shape[-1] if x.ndim else 1
    _check(lib.mg_finish(_floats(y), _floats(x), ffi.NULL, ffi.NULL, True, x.size // width if width else 0, width))
    return y


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis. x (..., D), weight, bias (D,)."""
    dtype = _float_type("x", x)
    x = _array("x", x, x.shape, dtype)
    n = x.shape[-1]
    weight, bias = _array("weight", weight, (n,), dtype), _array("bias", bias, (n,), dtype)
    if not _in_c(x):
        return reference.layer_norm(x, weight, bias, eps)
    y = empty(x.shape, F32)
    _check(lib.mg_layer_norm(_floats(y), _floats(x), _floats(weight), _floats(bias), eps, x.size // n if n else 0, n))
    return y


def layer_norm_rows(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> tuple[np.ndarray, ...]:
    """layer_norm and quantize_rows of it. x (..., D) float32 -> (..., D) float32, (..., D) int8, (M,) float32."""
    x = _array("x", x, x.shape, F32)
    n = x.shape[-1]
    weight, bias = _array("weight", weight, (n,), F32), _array("bias", bias, (n,), F32)
    if not _in_c(x):
        y = reference.layer_norm(x, weight, bias, eps)
        q, scale = reference.quantize_rows(y.reshape(-1, n))
        return y, q.reshape(x.shape), scale
    m = x.size // n if n else 0
    y, q, scale = empty(x.shape, F32), empty(x.shape, I8), np.empty(m, F32)
    _check(lib.mg_layer_norm_rows(_floats(y), ffi.from_buffer(_BYTES, q), _floats(scale), _floats(x), _floats(weight),
                                  _floats(bias), eps, m, n))
    return y, q, scale


def _widened(x: np.ndarray) -> np.ndarray:
    """Keys or values as floats."""
    return reference.from_bf16(x) if x.dtype == U16 else x


def _strided(name: str, x, shape: tuple, dtype: np.dtype) -> np.ndarray:
    """x (B, T, D) after a check; a copy only if its last axis is not dense or a stride is negative."""
    if isinstance(x, np.ndarray) and x.dtype == dtype and x.shape == shape:
        batch, row, column = x.strides
        if column == x.itemsize and batch >= 0 and row >= 0:
            return x
    return _array(name, x, shape, dtype)


def _view(x) -> tuple:
    """pointer, and the strides of batches and rows in elements."""
    batch, row, size = x.strides
    return ffi.from_buffer({2: _HALVES, 4: _FLOATS}[size], x[0, 0]), batch // size, row // size


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, n_head: int, causal=False, gate=None,
              precision="float32") -> np.ndarray:
    """softmax(q kᵀ / sqrt(D / H)) v * gate, head by head -> (B, Tq, D), without a Tq x Tk matrix in memory.

    q (B, Tq, D); k, v (Bk, Tk, D), Bk divides B and row b attends to k[b // (B // Bk)]; all may be views with strides.
    k and v may be bfloat16 (uint16 for NumPy) beside a q of float32.
    gate: None, (B, Tq, H) or (B, Tq, D). causal: query i sees keys j <= i + Tk - Tq, which needs Tq <= Tk.
    precision: float32; bf16 of many queries, where the instruction set can; or int8 with scales found on the way
    (csrc/dynamicattention.c), where all numbers are finite, and D / H at most 32768. float64 stays as it is."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    dtype = _float_type("q", q)
    q = _strided("q", q, q.shape if q.ndim == 3 else (None, None, None), dtype)
    n_batch, t_q, n_state = q.shape
    key_dtype = U16 if dtype == F32 and getattr(k, "dtype", None) == U16 else dtype
    k = _strided("k", k, (*k.shape[:2], n_state) if getattr(k, "ndim", 0) == 3 else (None, None, n_state), key_dtype)
    v = _strided("v", v, k.shape, key_dtype)
    k_batch, t_k, _ = k.shape
    if n_head < 1 or n_state % n_head:
        raise ValueError(f"n_head: expected a divisor of {n_state}, got {n_head}")
    if k_batch == 0 or n_batch % k_batch:
        raise ValueError(f"k: expected a number of rows that divides the {n_batch} of q, got {k_batch}")
    if t_k == 0 or (causal and t_q > t_k):
        raise ValueError(f"k: expected at least {max(1, t_q if causal else 1)} positions, got {t_k}")
    gate_width = 0
    if gate is not None:
        gate_width = n_state // n_head if gate.shape[-1] == n_state else 1
        gate = _array("gate", gate, (n_batch, t_q, n_head * gate_width), dtype)
    if not _in_c(q) or q.size == 0:
        k, v = _widened(k), _widened(v)
        rounded = precision == "int8" and dtype == F32
        return (reference.attention_int8 if rounded else reference.attention)(q, k, v, n_head, causal, gate)
    out = empty((n_batch, t_q, n_state), F32)
    (q_data, *q_strides), (k_data, *k_strides), (v_data, *v_strides) = _view(q), _view(k), _view(v)
    _check(lib.mg_attention(_floats(out), q_data, k_data, v_data, HELD.index(key_dtype), _floats(gate), *q_strides,
                            *k_strides, *v_strides, gate_width, causal, PRECISIONS.index(precision), n_batch,
                            n_batch // k_batch, n_head, t_q, t_k, n_state // n_head))
    return out
