"""The number of threads: what is available, and BLAS held to it."""

import os

import pytest

from minigate import kernels
from minigate import threads as thread_counts


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
