"""How many threads: the cores that this process may use, and holding NumPy's BLAS to a number."""

import ctypes
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

# OpenBLAS as NumPy's wheels bundle it (64 and 32 bit integers), and as systems install it
OPENBLAS_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads",
                  "openblas_{}_num_threads64_", "openblas_{}_num_threads")


def available() -> int:
    """The cores that this process may use: its affinity mask, and a container's share of processor time (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):   # no such file; "max": no limit
        pass
    return max(1, cores)


@cache
def blas_functions() -> tuple[Callable, Callable] | None:
    """(set, get) the number of threads of the OpenBLAS that NumPy is linked to; None for any other library."""
    try:
        from numpy.linalg import _umath_linalg  # private: a NumPy without it keeps its own number of threads

        library = ctypes.CDLL(_umath_linalg.__file__)   # loaded already; its dependencies are searched with it
    except (ImportError, OSError):
        return None
    for name in OPENBLAS_NAMES:
        try:
            return getattr(library, name.format("set")), getattr(library, name.format("get"))
        except AttributeError:
            continue
    return None


def limit_blas(n: int) -> None:
    """Holds BLAS to n threads if it is an OpenBLAS; leaves any other alone."""
    functions = blas_functions()
    if functions is not None:
        functions[0](ctypes.c_int(n))
