"""The kernels that bench_kernels.py times: their arguments, how their results are checked, and what they are compared
with: a roof, NumPy, and for some a product's size that ONNX Runtime is given.

M rows, K inputs, N outputs; T frames; n_state and n_head of tiny and base.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from minigate import kernels, packing, reference, static_reference
from minigate import static_kernels as static
from minigate import training_kernels as training
from minigate.heard_kernels import Heard, attention_heard, pack_heard
from minigate.mel import N_SAMPLES, log_mel

ROTATED = 1 << 26  # bytes of weights, or keys and values, about as many as a token of base reads: more than caches hold
LEAST_ROTATED = 8
T = 1500  # frames that the encoder sees
PRODUCTS = [(T, 384, 384), (T, 1536, 384), (T, 384, 1536), (T, 512, 512), (T, 2048, 512), (T, 512, 2048)]  # M, N, K
ROWS = [(51864, 384), (51865, 512), (384, 384), (1536, 384), (384, 1536), (512, 512)]  # N, K of one row
HEADS = [(384, 6), (512, 8)]  # n_state, n_head of tiny and base
TURNS = 20000  # of peak.c's loops in a call, under 0.1 ms
UNITS = {"TOPS": 1e12, "TFLOP/s": 1e12, "GB/s": 1e9}  # operations or bytes a second
RELATIVE = 4e-6  # of a float32 result, relative to the largest magnitude
ATTENTION = {"float32": 6e-6, "bf16": 1e-2, "int8": 5e-2}  # of attention's result; both sides sum in float32
Run = Callable[[], object]


def heard(x: np.ndarray, n_head: int, is_values: bool) -> Heard:
    """Keys or values (1, T, D) as the decoder keeps those of the encoder's output."""
    q, scale = kernels.quantize_rows(x[0])
    return pack_heard(q[None], scale[None], n_head, is_values)


HOLD = {"float32": lambda x: x, "bf16": reference.to_bf16}  # keys and values, by how they are kept


@dataclass
class Case:
    """A kernel and what it is compared with. work: operations or bytes of a call, unit: one of UNITS.

    check exits if the result is wrong. roof: one function for each thread, which together do roof_work."""

    name: str
    run: Run
    check: Run
    work: float
    unit: str
    roof: list[Run] | None = None
    roof_work: float = 0.0
    numpy: Run | None = None
    product: tuple[int, int, int] | None = None


def equal(name: str, got: np.ndarray, wanted: np.ndarray, steps: int = 0) -> None:
    worst = np.abs(got.astype(np.int64) - wanted).max(initial=0)
    if got.shape != wanted.shape or worst > steps:
        raise SystemExit(f"bench_kernels: {name}: {worst} away from reference.py")


def close(name: str, got: np.ndarray, wanted: np.ndarray, relative: float = RELATIVE) -> None:
    error, bound = np.abs(got - wanted).max(initial=0), relative * np.abs(wanted).max(initial=0)
    if got.shape != wanted.shape or not error <= bound:
        raise SystemExit(f"bench_kernels: {name}: {error:.2g} away from reference.py, expected at most {bound:.2g}")


# --- roofs ---


class Peaks:
    """The loops of peak.c, which it compiles into a folder."""

    def __init__(self, folder: str):
        compiler = next(filter(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")), None)
        source, target = Path(__file__).with_name("peak.c"), Path(folder, "peak.so")
        options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        if not compiler or subprocess.run([compiler, *options, source, "-o", target]).returncode != 0:
            raise SystemExit("bench_kernels: peak.c needs a C compiler that has OpenMP")
        self.library = ctypes.CDLL(str(target))
        self.library.sums.restype = ctypes.c_int64

    def __call__(self, kind: str, threads: int) -> tuple[list[Run] | None, float]:
        """kind: int8, float32 or bf16 -> roof, roof_work."""
        if kind == "bf16" and not training.has_bf16():
            kind = "float32"
        loop = getattr(self.library, f"{kernels.isa()}_{kind}", None)
        if loop is None:
            return None, 0.0
        loop.restype, loop.argtypes = ctypes.c_double, [ctypes.c_size_t]
        return [lambda: loop(TURNS)] * threads, threads * loop(TURNS)

    def reading(self, n_bytes: int, count: int, threads: int) -> tuple[list[Run], float]:
        """Of `count` arrays of n_bytes each -> roof, roof_work."""
        words, room = ctypes.c_size_t(n_bytes // 8), packing.Room()  # memory like that of weights
        arrays = [room.take(8 * words.value).view(np.int64) for _ in range(count)]
        for x in arrays:
            x[:] = 1
        pointers = addresses([x.ctypes.data for x in arrays])

        def run():
            return self.library.sums(pointers, ctypes.c_size_t(count), words, threads)

        run.arrays = arrays  # which must live as long
        return [run], 8.0 * words.value * count


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def addresses(numbers: list[int]) -> ctypes.Array:
    return (ctypes.c_void_p * len(numbers))(*numbers)


def copying(moved: float, threads: int) -> tuple[list[Run], float]:
    """moved: bytes read and written."""
    source, target = np.ones(int(moved / 2), np.uint8), np.ones(int(moved / 2), np.uint8)
    parts = zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
    return [lambda to=to, from_=from_: np.copyto(to, from_) for to, from_ in parts], moved


# --- cases ---


def int8s(rng, *shape: int) -> np.ndarray:
    return rng.integers(-127, 128, shape).astype(np.int8)


def floats(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def rotation(items: list) -> Callable:
    """-> a function that returns the next of them, for ever."""
    return itertools.cycle(items).__next__


class Makers:
    """One function for each kind of case: name, sizes -> Case."""

    def __init__(self, peaks: Peaks, threads: int):
        self.peaks, self.threads, self.rng = peaks, threads, np.random.default_rng(0)

    def product(self, name: str, m: int, n: int, k: int, finished: bool) -> Case:
        """finished: linear_int8, which scales and adds a bias; else matmul_int8."""
        q, w = int8s(self.rng, m, k), int8s(self.rng, n, k)
        a_scale, w_scale, bias = abs(floats(self.rng, m)), abs(floats(self.rng, n)) / k, floats(self.rng, n)
        packed, x, w_float = packing.pack_int8(w), q.astype(np.float32), w.T.astype(np.float32, order="C")

        def run():
            if finished:
                return kernels.linear_int8(q, a_scale, packed, w_scale, bias)
            return kernels.matmul_int8(q, packed)

        def check():
            if finished:
                close(name, run(), reference.linear_int8(q, a_scale, w, w_scale, bias))
            else:
                equal(name, run(), reference.matmul_int8(q, w))

        return Case(name, run, check, 2.0 * m * n * k, "TOPS", *self.peaks("int8", self.threads), lambda: x @ w_float,
                    (m, n, k))  # fmt: skip

    def one_row(self, name: str, n: int, k: int) -> Case:
        """linear_int8 of one row, with other weights in each of `count` calls, which peak.c makes, as decoder.c
        does: what Python takes for a call is as much as half of the smallest of them."""
        count = max(LEAST_ROTATED, ROTATED // (n * k))
        plain = [int8s(self.rng, n, k) for _ in range(LEAST_ROTATED)]
        room = packing.Room()  # as those of a model
        packed = [packing.pack_int8(plain[i % LEAST_ROTATED], room) for i in range(count)]
        w_float = [plain[i % LEAST_ROTATED].astype(np.float32).T for i in range(max(2, count // 4))]
        q, a_scale, w_scale = int8s(self.rng, 1, k), abs(floats(self.rng, 1)), abs(floats(self.rng, n)) / k
        x, y = q.astype(np.float32), np.empty((1, n), np.float32)
        ffi, lib, loop = kernels.ffi, kernels.lib, self.peaks.library.rows
        product = ctypes.c_void_p(int(ffi.cast("uintptr_t", ffi.addressof(lib, "mg_linear_int8"))))
        weights = addresses([int(ffi.cast("uintptr_t", p.pointer())) for p in packed])
        sizes = [ctypes.c_size_t(size) for size in (n, k)]

        def products(weights, count: int) -> None:
            before, after = [pointer(a) for a in (y, q, a_scale)], (pointer(w_scale), ctypes.c_size_t(count), *sizes)
            if loop(product, *before, weights, *after) != lib.MG_OK:
                raise SystemExit(f"{name}: the extension reports an error")

        def check():
            for i in range(count):
                products(addresses([weights[i]]), 1)
                close(name, y, reference.linear_int8(q, a_scale, plain[i % LEAST_ROTATED], w_scale))
            equal(name, kernels.matmul_int8(q, packed[0]), reference.matmul_int8(q, plain[0]))

        def by_numpy():
            for i in range(count):
                x @ w_float[i % len(w_float)]

        roof = self.peaks.reading(n * k, count, self.threads)
        return Case(name, partial(products, weights, count), check, count * n * k, "GB/s", *roof, by_numpy)

    def attention(self, name: str, n_state: int, n_head: int, precision: str) -> Case:
        q, k, v = (floats(self.rng, 1, T, n_state) for _ in range(3))

        def run():
            return kernels.attention(q, k, v, n_head, precision=precision)

        def by_numpy():
            return reference.attention(q, k, v, n_head)

        def check():
            close(name, run(), by_numpy(), ATTENTION[precision])

        roof = self.peaks(precision, self.threads)
        return Case(name, run, check, 4.0 * T * T * n_state, "TFLOP/s", *roof, by_numpy)

    def static_attention(self, name: str, n_state: int, n_head: int, diffuse: bool = False) -> Case:
        grid = static.Grid(0.01, -3)
        q, k, v = (static.Tensor(int8s(self.rng, 1, T, n_state), grid) for _ in range(3))

        def run():
            return static.attention(q, k, v, n_head, grid, diffuse=diffuse)

        def by_numpy():
            return static_reference.attention(q, k, v, n_head, grid, diffuse=diffuse)

        def check():
            equal(name, run(), by_numpy(), steps=2 if diffuse else 1)

        roof = self.peaks("int8", self.threads)
        return Case(name, run, check, 4.0 * T * T * n_state, "TOPS", *roof, by_numpy)

    def one_query(self, name: str, n_state: int, n_head: int, held: str) -> Case:
        """Other keys and values in each call."""
        n_bytes = 2 * T * {"float32": 4 * n_state, "bf16": 2 * n_state, "int8": n_state + 4}[held]
        count = max(LEAST_ROTATED, ROTATED // n_bytes)
        q, floating = floats(self.rng, 1, 1, n_state), [floats(self.rng, 2, 1, T, n_state) for _ in range(count)]
        others = rotation(floating)
        if held == "int8":  # those of the encoder's output
            pairs = rotation([[heard(x, n_head, i == 1) for i, x in enumerate(pair)] for pair in floating])
        else:
            pairs = rotation([[HOLD[held](x) for x in pair] for pair in floating])

        def run():
            return attention_heard(q, *pairs()) if held == "int8" else kernels.attention(q, *pairs(), n_head)

        def by_numpy():
            return reference.attention(q, *others(), n_head)

        def check():
            for _ in range(count):
                close(name, run(), by_numpy(), ATTENTION[held])

        roof = self.peaks.reading(n_bytes, count, self.threads)
        return Case(name, run, check, n_bytes, "GB/s", *roof, by_numpy)

    def layer_norm(self, name: str, n_state: int) -> Case:
        x, weight, bias = floats(self.rng, T, n_state), floats(self.rng, n_state), floats(self.rng, n_state)
        run, by_numpy = partial(kernels.layer_norm, x, weight, bias), partial(reference.layer_norm, x, weight, bias)
        return self.copied(name, run, lambda: close(name, run(), by_numpy()), 8 * x.size, by_numpy)

    def gelu(self, name: str, n: int) -> Case:
        x = floats(self.rng, T, n)
        run, by_numpy = partial(kernels.gelu, x), partial(reference.gelu, x)
        return self.copied(name, run, lambda: close(name, run(), by_numpy()), 8 * x.size, by_numpy)

    def quantize_rows(self, name: str, n: int) -> Case:
        x = floats(self.rng, T, n)
        run, by_numpy = partial(kernels.quantize_rows, x), partial(reference.quantize_rows, x)

        def check():
            (q, scale), (wanted_q, wanted_scale) = run(), by_numpy()
            equal(name, q, wanted_q)
            equal(name, scale.view(np.int32), wanted_scale.view(np.int32))

        return self.copied(name, run, check, 5 * x.size, by_numpy)

    def log_mel(self, name: str) -> Case:
        audio = floats(self.rng, N_SAMPLES) / 10
        moved = audio.nbytes + log_mel(audio).nbytes
        return self.copied(name, partial(log_mel, audio), lambda: None, moved, None)

    def copied(self, name: str, run: Run, check: Run, moved: int, by_numpy: Run | None) -> Case:
        """A kernel whose roof is a copy."""
        return Case(name, run, check, moved, "GB/s", *copying(moved, self.threads), by_numpy)


def cases(peaks: Peaks, threads: int, only: str = "") -> Iterator[Case]:
    """Those whose name contains `only`, made one after the other."""
    make = Makers(peaks, threads)
    makers = {}
    for kernel, finished in (("linear_int8", True), ("matmul_int8", False)):
        makers |= {f"{kernel} {m}×{n}×{k}": partial(make.product, m=m, n=n, k=k, finished=finished)
                   for m, n, k in PRODUCTS}  # fmt: skip
    makers |= {f"linear_int8 1×{n}×{k}": partial(make.one_row, n=n, k=k) for n, k in ROWS}
    for n_state, n_head in HEADS:
        sizes = dict(n_state=n_state, n_head=n_head)
        many, one = f"attention {T}×{T}×{n_state}", f"attention 1×{T}×{n_state}"
        makers |= {f"{many}, {kind}": partial(make.attention, precision=kind, **sizes) for kind in ATTENTION}
        makers[f"{many}, static int8"] = partial(make.static_attention, **sizes)
        makers[f"{many}, static int8, diffused"] = partial(make.static_attention, diffuse=True, **sizes)
        makers |= {f"{one}, keys in {kind}": partial(make.one_query, held=kind, **sizes) for kind in (*HOLD, "int8")}
    for n_state, _ in HEADS:
        makers[f"layer_norm {T}×{n_state}"] = partial(make.layer_norm, n_state=n_state)
        makers[f"gelu {T}×{4 * n_state}"] = partial(make.gelu, n=4 * n_state)
        makers |= {f"quantize_rows {T}×{n}": partial(make.quantize_rows, n=n) for n in (n_state, 4 * n_state)}
    makers["log-mel, 30 s"] = make.log_mel
    for name, maker in makers.items():
        if only in name:
            yield maker(name)
