"""AdamW with a learning rate of its own for gates, clipping, the schedule, and an average of the weights.

In: parameters by name, changed in place, and their gradients. Out: nothing but the state for a checkpoint.

    norm = optimizer.norm(grads)
    optimizer.step(grads, lr * factor, gate_lr * factor, clip_scale(norm, clip_norm))   # factor: schedule(step, …)
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from minigate import training_kernels
from minigate.errors import FileError
from minigate.options import Checks

BLOCK = 1 << 14  # elements: the six arrays of a block stay in the second-level cache, 64 KB each in float32
SUM_BLOCK = 1 << 13  # elements: few enough that BLAS wakes no thread, whose start would take longer than the sum


@dataclass(frozen=True)
class OptimOptions:
    """Raises UsageError for a value outside its range."""

    lr: float = 2e-5  # highest learning rate
    gate_lr: float = 2e-4  # the same, of the gates
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.01  # a step takes lr * weight_decay of each decayed weight
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0  # longest gradient, all parameters together
    ema_decay: float = 0.0  # of the average of the weights, below 1; 0: no average

    def __post_init__(self):
        check = Checks(self)
        for name in ("lr", "gate_lr", "weight_decay"):
            check.number(name, 0)
        for name in ("eps", "clip_norm"):
            check.number(name, 0, above=True)
        for name in ("beta1", "beta2", "ema_decay"):
            check.number(name, 0)
            if getattr(self, name) >= 1:
                check.refuse(name, "a number below 1", getattr(self, name))
        check.whole("warmup", 0)


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor of both learning rates in step 1, 2, …, steps: linear up to 1 in step `warmup`, then linear down to
    what would be 0 in step steps + 1. A run of fewer steps than `warmup` ends on the way up.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step: expected 1 to {steps}, got {step}")
    warmup = max(1, warmup)
    return step / warmup if step <= warmup else (steps + 1 - step) / (steps + 1 - warmup)


def clip_scale(norm: float, clip_norm: float) -> float:
    """What gradients of this global norm, which is finite, are multiplied with so that it is at most clip_norm."""
    return min(1.0, clip_norm / norm) if norm > 0 else 1.0


def is_gate(name: str) -> bool:
    return ".gate." in name


def is_decayed(name: str, parameter: np.ndarray) -> bool:
    """Matrices and convolutions; not gains, biases, positions and gates."""
    return name.endswith(".weight") and parameter.ndim > 1 and not is_gate(name)


def sum_squares(x: np.ndarray) -> float:
    """The sum of x², in float64 whatever x is."""
    if training_kernels.in_c(x):
        return training_kernels.sum_squares(x)
    flat, wide = x.reshape(-1), np.empty(SUM_BLOCK, np.float64)
    total = 0.0
    for start in range(0, flat.size, SUM_BLOCK):
        block = flat[start : start + SUM_BLOCK]
        own = wide[: block.size]
        own[:] = block
        total += float(own @ own)
    return total


def adamw(
    p: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    average: np.ndarray | None,
    g: np.ndarray,
    *,
    beta1: float,
    beta2: float,
    g_mean: float,
    g_root: float,
    step: float,
    eps: float,
    shrink: float,
    average_rate: float,
) -> None:
    """One step of AdamW on one parameter: p m v average (n,) change in place, g (n,) does not. All dense, one type.

        m = beta1 * m + g_mean * g            g_mean = (1 - β1) * c, c the factor of clipping
        v = beta2 * v + (g_root * g)²         g_root = sqrt(1 - β2) * c
        p = shrink * p - step * (m / (sqrt(v) + eps))
        average = average + average_rate * (p - average), where there is one

    Each operation is rounded by itself, in this order, without fused multiply-add; the numbers are rounded to the
    arrays' type first. Bias correction is in the numbers: with c2 = sqrt(1 - β2^t), step = lr * c2 / (1 - β1^t),
    eps = ε * c2 and shrink = 1 - lr * decay this is Loshchilov and Hutter's algorithm 2 (arXiv 1711.05101) as PyTorch
    has it.
    """
    room = np.empty(min(BLOCK, p.size), p.dtype)
    for start in range(0, p.size, BLOCK):
        block = slice(start, start + BLOCK)
        pb, mb, vb, gb = p[block], m[block], v[block], g[block]
        t = room[: pb.size]
        mb *= beta1
        mb += np.multiply(gb, g_mean, out=t)
        np.multiply(gb, g_root, out=t)
        t *= t
        vb *= beta2
        vb += t
        np.sqrt(vb, out=t)
        t += eps
        np.divide(mb, t, out=t)
        t *= step
        if shrink != 1:
            pb *= shrink
        pb -= t
        if average is not None:
            ab = average[block]
            np.subtract(pb, ab, out=t)
            t *= average_rate
            ab += t


class AdamW:
    """Owns the moments (and the average) of the parameters that are trained; changes the parameters in place."""

    def __init__(self, params: Mapping[str, np.ndarray], options: OptimOptions, frozen: Collection[str] = ()):
        """params: name -> dense writable array, those in `frozen` are left alone. ValueError for other arrays."""
        for name, p in params.items():
            if not (p.flags.c_contiguous and p.flags.writeable):
                raise ValueError(f"{name}: expected a dense writable array, got strides {p.strides} or a read-only one")
        self.options = options
        self.params = {name: p for name, p in params.items() if name not in frozen}
        self.steps = 0  # taken so far
        self.m = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.average = {name: p.copy() for name, p in self.params.items()} if options.ema_decay else {}

    def norm(self, grads: Mapping[str, np.ndarray]) -> float:
        """The global norm of the gradients of the trained parameters, in float64; not finite if one of them is not.

        ValueError for a missing or misshapen gradient, here and in `step`; frozen parameters need none.
        """
        self._check(grads)
        return math.sqrt(sum(sum_squares(grads[name]) for name in self.params))

    def step(self, grads: Mapping[str, np.ndarray], lr: float, gate_lr: float, scale: float = 1.0) -> None:
        """One step with gradients times `scale` (see clip_scale).

        The average's decay begins at 2 / 11 and rises to ema_decay, (1 + t) / (10 + t) in step t: what a short run
        began with is forgotten.
        """
        self._check(grads)
        self.steps += 1
        t, o = self.steps, self.options
        root1, root2 = math.sqrt(1 - o.beta2), math.sqrt(1 - o.beta2**t)
        for name, p in self.params.items():
            own_lr = gate_lr if is_gate(name) else lr
            gradient = np.asarray(grads[name], p.dtype).reshape(-1)
            update = training_kernels.adamw if training_kernels.in_c(p, gradient) else adamw
            update(
                *(a.reshape(-1) for a in (p, self.m[name], self.v[name])),
                self.average[name].reshape(-1) if self.average else None,
                gradient,
                beta1=o.beta1,
                beta2=o.beta2,
                g_mean=(1 - o.beta1) * scale,
                g_root=root1 * scale,
                step=own_lr * root2 / (1 - o.beta1**t),
                eps=o.eps * root2,
                shrink=1 - own_lr * o.weight_decay if is_decayed(name, p) else 1.0,
                average_rate=1 - min(o.ema_decay, (1 + t) / (10 + t)),
            )

    def _check(self, grads: Mapping[str, np.ndarray]) -> None:
        for name, p in self.params.items():
            if name not in grads or grads[name].shape != p.shape:
                got = grads[name].shape if name in grads else "none"
                raise ValueError(f"{name}: expected a gradient of shape {p.shape}, got {got}")

    def averaged(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """params with the averages in place of the trained ones."""
        return {**params, **self.average}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything but the parameters, as arrays by name: "steps", "m.…", "v.…", "average.…". Not copies."""
        state = {"steps": np.array(self.steps, np.int64)}
        for kind, arrays in self._kinds():
            state |= {f"{kind}.{name}": array for name, array in arrays.items()}
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue, bit for bit, from what state_dict gave. FileError when it is not of these parameters and options;
        nothing is changed then.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            name = min(own.keys() ^ state.keys())
            raise FileError(f"optimizer state: {name}: expected {'an' if name in own else 'no such'} array, "
                            f"got {'none' if name in own else 'one'}")  # fmt: skip
        for name, array in own.items():
            if (array.shape, array.dtype) != (state[name].shape, state[name].dtype):
                raise FileError(f"optimizer state: {name}: expected {array.shape} {array.dtype}, "
                                f"got {state[name].shape} {state[name].dtype}")  # fmt: skip
        self.steps = int(state["steps"])
        for kind, arrays in self._kinds():
            for name, array in arrays.items():
                array[...] = state[f"{kind}.{name}"]

    def _kinds(self):
        return ("m", self.m), ("v", self.v), ("average", self.average)
