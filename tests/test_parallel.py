"""Exchanges between processes: two through MPI, and one that stands in for itself."""

import json
import sys

import numpy as np
import pytest

from minigate import parallel
from minigate.errors import UsageError
from tests.runs import mpiexec

EXCHANGES = """
import json
import numpy as np
from minigate import parallel
p = parallel.connect()
grads = {"both": np.array([1.0, 10.0], np.float32) * (p.rank + 1), "frozen": np.full(1, p.rank)}
if p.rank == 0:
    grads["first"] = np.full((1, 2), 5, np.float32)
params = {"both": np.zeros(2, np.float32), "first": np.zeros((1, 2), np.float32), "none": np.zeros(1, np.float32)}
own = np.array([p.rank, 1])
total = p.total(own)
p.total_gradients(grads, params)
p.wait()
found = [p.rank, p.ranks, p.neighbours, total.tolist(), own.tolist(), p.largest(7 - p.rank), p.gather([p.rank] * 2)]
found = p.gather([[*found, {name: g.tolist() for name, g in grads.items()}]])
if p.rank == 0:
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_exchange():
    done = mpiexec(2, [sys.executable, "-c", EXCHANGES])
    assert done.returncode == 0, done.stderr
    common = [[1, 2], None, 7, [0, 0, 1, 1], {"both": [3, 30], "first": [[5, 5]], "none": [0]}]
    for rank, (own_rank, ranks, neighbours, total, own, largest, gathered, grads) in enumerate(json.loads(done.stdout)):
        assert (own_rank, ranks, neighbours, own) == (rank, 2, 2, [rank, 1])
        assert grads.pop("frozen") == [rank]
        assert [total, None, largest, gathered, grads] == common


@pytest.mark.slow
def test_one_that_gives_up_ends_the_others():
    script = "from minigate import parallel; p = parallel.connect(); p.rank and p.abort(3); p.wait(); print('on')"
    done = mpiexec(2, [sys.executable, "-c", script])
    assert done.returncode != 0 and "on" not in done.stdout.split()


def test_a_process_on_its_own():
    alone = parallel.connect({})
    assert type(alone) is parallel.Alone and (alone.rank, alone.ranks) == (0, 1)
    grads = {"a": np.ones(2, np.float32)}
    alone.total_gradients(grads, {"a": grads["a"], "b": grads["a"]})
    assert grads.keys() == {"a"} and grads["a"].tolist() == [1, 1]
    assert alone.total(np.array([1, 2])).tolist() == [1, 2] and alone.total(np.array([1])).dtype == np.float64
    assert (alone.largest(3), alone.gather([4])) == (3, [4])
    assert alone.wait() is None and alone.abort(1) is None


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"])
def test_a_launcher_without_mpi4py_is_told(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UsageError, match=r"mpiexec: expected mpi4py and an MPI library, .*'minigate\[mpi\]'"):
        parallel.connect({name: "2"})


def test_neighbours_share_the_cores(monkeypatch):
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 8)
    several = parallel.Alone()
    for available, neighbours, threads in ((8, 1, 8), (8, 4, 2), (8, 16, 1), (2, 4, 2), (3, 1, 3)):
        monkeypatch.setattr(parallel.threads, "available", lambda available=available: available)
        several.neighbours = neighbours
        assert parallel.fair_threads(several) == threads
