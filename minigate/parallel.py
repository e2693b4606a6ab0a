"""Training by several processes at once: the few exchanges that data parallel steps need, through MPI.

    mpiexec -n 4 python -m minigate.train …

Every process holds the whole student, takes its share of each batch and adds its gradients to the others'; what comes
out is the same on all of them, so their weights stay equal. A process on its own (`Alone`) makes the same calls, which
then do nothing. Every process must make every call, in the same order.
"""

import os
import sys
from collections.abc import Mapping

import numpy as np

from minigate import threads
from minigate.errors import UsageError

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")  # one is set in every process that a launcher started


class Alone:
    """One process."""

    rank, ranks = 0, 1
    neighbours = 1  # processes on this machine, itself included

    def total(self, array: np.ndarray) -> np.ndarray:
        """-> the sum over all processes of arrays of one shape, float64."""
        return np.asarray(array, np.float64)

    def total_gradients(self, grads: dict[str, np.ndarray], params: Mapping[str, np.ndarray]) -> None:
        """grads, of `params`, become the sums over all processes; a missing one counts as zeros."""

    def largest(self, number: int) -> int:
        """-> the largest of all processes' numbers."""
        return number

    def gather(self, items: list) -> list:
        """-> the lists of all processes, one after the other."""
        return items

    def wait(self) -> None:
        """Until all processes are here."""

    def abort(self, code: int) -> None:
        """End all processes when one cannot go on: the others would wait for it."""


class Mpi(Alone):
    """One of the processes of an MPI communicator (mpi4py)."""

    def __init__(self, comm):
        from mpi4py import MPI

        self._mpi, self._comm = MPI, comm
        self.rank, self.ranks = comm.Get_rank(), comm.Get_size()
        own_machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.neighbours = own_machine.Get_size()
        own_machine.Free()

    def total(self, array):
        summed = np.array(array, np.float64)
        self._comm.Allreduce(self._mpi.IN_PLACE, summed)
        return summed

    def total_gradients(self, grads, params):
        for name in sorted(params):
            if name not in grads:
                grads[name] = np.zeros_like(params[name])
            self._comm.Allreduce(self._mpi.IN_PLACE, grads[name])

    def largest(self, number):
        return self._comm.allreduce(number, self._mpi.MAX)

    def gather(self, items):
        return [item for part in self._comm.allgather(items) for item in part]

    def wait(self):
        self._comm.Barrier()

    def abort(self, code):
        sys.stderr.flush()
        self._comm.Abort(code)


def connect(environ: Mapping[str, str] = os.environ) -> Alone:
    """-> this process among those that a launcher (mpiexec, srun --mpi) started, or on its own.

    mpi4py is imported only where a launcher is. UsageError when it is missing there.
    """
    if not any(name in environ for name in LAUNCHED):
        return Alone()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        raise UsageError(f"mpiexec: expected mpi4py and an MPI library, got {' '.join(str(error).split())}; "
                         "pip install 'minigate[mpi]', or start one process without mpiexec") from None
    return Mpi(MPI.COMM_WORLD) if MPI.COMM_WORLD.Get_size() > 1 else Alone()


def fair_threads(processes: Alone) -> int:
    """-> the cores that this process may use, its share of the machine where it has neighbours."""
    return max(1, min(threads.available(), (os.cpu_count() or 1) // processes.neighbours))
