"""Fixtures: the instruction sets in turn."""

import pytest

from minigate import kernels


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
