"""What comes next, from logits: suppression, the largest, and what they are softmax of, in C; without it, and with
MINIGATE_ISA=numpy, by reference.py. See kernels.py, whose instruction set and threads this shares.

V n_vocab, K candidates.
"""

from typing import NamedTuple

import numpy as np

from minigate import reference
from minigate.kernels import F32, _array, _check, _floats, _in_c, _matrix, compiled

if compiled:
    from minigate._kernels import ffi, lib

    _IDS, _TOTALS = ffi.typeof("int64_t[]"), ffi.typeof("double[]")

I64 = np.dtype(np.int64)


class Choice(NamedTuple):
    """Candidates of each row: the largest logits, descending, of equals the smaller id first. Where fewer are above
    -inf, the rest is -inf, and its ids mean nothing."""

    ids: np.ndarray  # (rows, K) int64
    values: np.ndarray  # (rows, K) float32
    totals: np.ndarray  # (rows,) float64: sums of exp(logit - the largest)

    def logprobs(self, values: np.ndarray) -> np.ndarray:
        """values (rows, …), some of the logits -> their log-softmax, float32."""
        with np.errstate(divide="ignore", invalid="ignore"):  # a row in which nothing is allowed gives NaN
            return values - self.values[:, :1] - np.log(self.totals).astype(np.float32)[:, None]


def choose(logits: np.ndarray, never: np.ndarray, ranges: np.ndarray, begin: int, prefer: bool, k: int = 1) -> Choice:
    """logits (rows, V) float32, of which forbidden ones become -inf -> the k largest that are left.

    never (n,) int64: ids that are forbidden. ranges (rows, 4) int64: of the ids below `begin` those from ranges[0] up
    to ranges[1] are allowed, of the others those from ranges[2] up to ranges[3]. prefer: where the others together are
    likelier than the likeliest below `begin`, it is one of them. ValueError for an id or a range outside V."""
    if _matrix("logits", logits, None, F32) is not logits or not logits.flags.writeable:
        raise ValueError("logits: expected a C-ordered array that may be changed in place, got a view or a constant")
    rows, n = logits.shape
    never, ranges = _array("never", never, (None,), I64), _array("ranges", ranges, (rows, 4), I64)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, got {k}")
    if not _in_c(logits):
        _check_ids(never, ranges, begin, n)
        return Choice(*reference.choose(logits, never, ranges, begin, prefer, k))
    ids, values, totals = np.empty((rows, k), I64), np.empty((rows, k), F32), np.empty(rows)
    status = lib.mg_choose(ffi.from_buffer(_IDS, ids), _floats(values), ffi.from_buffer(_TOTALS, totals),
                           _floats(logits), ffi.from_buffer(_IDS, never), ffi.from_buffer(_IDS, ranges), len(never),
                           begin, prefer, k, rows, n)  # fmt: skip
    if status == lib.MG_BAD_VALUE:
        _check_ids(never, ranges, begin, n)
    _check(status)
    return Choice(ids, values, totals)


def _check_ids(never: np.ndarray, ranges: np.ndarray, begin: int, n: int) -> None:
    """ValueError for an id or a range outside the vocabulary of n."""
    if never.size and not 0 <= never.min() <= never.max() < n:
        raise ValueError(f"never: expected 0 to {n - 1}, got {never.min()} to {never.max()}")
    for first, end, middle, last in ranges.tolist():
        if not 0 <= first <= end <= begin <= middle <= last <= n:
            raise ValueError(f"ranges: expected 0 <= first <= end <= {begin} <= first <= end <= {n}, got "
                             f"{first}, {end}, {middle}, {last}")  # fmt: skip
