"""The losses of distillation, each with its gradient, and their options.

In: what a student and its teacher computed on one batch. Out: values as Python floats for the log, and gradients with
respect to the student's arrays, float32 or float64 like these.

    loss = kl_weight * kl + ce_weight * ce + hidden_weight * hidden + step.OutlierPenalty's value

`scale` multiplies a gradient but not a value: the share of a micro-batch in the whole batch.

M label tokens, V n_vocab, B batch, T time, D n_state, A an activation of any shape.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from minigate import training_kernels
from minigate.errors import UsageError
from minigate.optim import sum_squares
from minigate.options import Checks

OUTLIER_GROUPS = ("block", "mlp", "final-norm", "mlp-hidden")
OUTLIER_UNITS = ("value", "rms")
FINAL_NORMS = ("encoder.ln_post", "decoder.ln")
CHUNK_BYTES = 1 << 19  # rows of logits differentiated at one time; some seven arrays of this size exist
BLOCK = 1 << 15  # elements of an activation at one time: stays in the second-level cache


@dataclass(frozen=True)
class DistillOptions:
    """Weights, temperature and outlier penalty. Raises UsageError for a value outside its range.

    Distil-Whisper's paper (Gandhi et al., arXiv 2311.00430) and code disagree: the paper has 0.8 * KL + 1.0 * CE, our
    defaults; its run_distillation.py has 0.8, a literal, before the CE, and 1.0 as the KL's default. The temperature
    and its square before the KL are the code's alone, where evaluation uses temperature 1.
    """

    kl_weight: float = 0.8  # of temperature² * KL(teacher ‖ student)
    ce_weight: float = 1.0  # of the cross-entropy on the pseudo-labels
    hidden_weight: float = 0.0  # of the mean squared difference of the encoders' outputs
    temperature: float = 2.0  # divides both models' logits in the KL, not in the cross-entropy
    outlier_weight: float = 0.0  # of the mean over tensors of log(1 + E[(|A| / (outlier_tau * unit))^outlier_power])
    outlier_tau: float = 6.0  # above this an activation counts much, below it little
    outlier_decoder_tau: float | None = None  # the same in the decoder's blocks, whose values are smaller; None: equal
    outlier_unit: str = "value"  # of tau: value, as it stands, or rms, multiples of each window's root mean square
    outlier_unit_most: float | None = None  # largest rms taken as a unit: beyond it values are large in any case
    outlier_power: float = 4.0  # above 1, or the gradient jumps at 0
    outlier_tensors: str | Iterable[str] = OUTLIER_GROUPS[:3]  # any of OUTLIER_GROUPS, or a string of them with commas

    def __post_init__(self):
        check = Checks(self)
        weights = ("kl_weight", "ce_weight", "hidden_weight", "outlier_weight")
        for name in weights:
            check.number(name, 0)
        for name in ("temperature", "outlier_tau"):
            check.number(name, 0, above=True)
        check.number("outlier_decoder_tau", 0, above=True, optional=True)
        check.number("outlier_power", 1, above=True)
        check.choice("outlier_unit", OUTLIER_UNITS)
        check.number("outlier_unit_most", 0, above=True, optional=True)
        if self.outlier_unit_most is not None and self.outlier_unit != "rms":
            check.refuse("outlier_unit_most", "none where outlier_unit is not rms", self.outlier_unit_most)
        if not any(getattr(self, name) for name in weights):
            raise UsageError(f"{', '.join(weights)}: expected one above 0 at least, got 0 for all")
        groups = self.outlier_tensors
        names = tuple(groups.split(",") if isinstance(groups, str) else groups)
        if not names or len(set(names)) < len(names) or not set(names) <= set(OUTLIER_GROUPS):
            check.refuse("outlier_tensors", f"some of {', '.join(OUTLIER_GROUPS)}, each once", groups)
        check.set("outlier_tensors", names)

    def tau(self, name: str) -> float:
        """Of a penalized tensor, by its name."""
        own = self.outlier_decoder_tau if name.startswith("decoder.blocks.") else None
        return self.outlier_tau if own is None else own


# --- on the logits ---


def kl_ce(
    logits: np.ndarray,
    teacher_logits: np.ndarray | None,
    targets: np.ndarray,
    options: DistillOptions,
    scale: float = 1.0,
    out: np.ndarray | None = None,
) -> tuple[tuple[float, float], np.ndarray]:
    """logits teacher_logits (M, V), targets (M,) -> (kl, ce), dlogits (M, V): softmax and losses in one derivative.

    kl = T² KL(softmax(teacher_logits / T) ‖ softmax(logits / T)), T the temperature; ce = -log softmax(logits)[target];
    both without their weights and averaged over the rows with a target of 0 or more, 0 if there is none.
    dlogits is the gradient of scale * (kl_weight * kl + ce_weight * ce), 0 in the rows that do not count.
    teacher_logits, of any float type, may be None when kl_weight is 0: kl is 0 then. `out` receives dlogits and may be
    `logits`. Beyond it only a few rows are held at one time. ValueError when the shapes do not fit.
    """
    _check_logits(logits, teacher_logits, targets, options)
    dlogits = np.empty_like(logits) if out is None else out
    if training_kernels.in_c(logits, dlogits):
        return _kl_ce_in_c(logits, teacher_logits, targets, options, scale, dlogits), dlogits
    scored = np.flatnonzero(targets >= 0)
    dlogits[targets < 0] = 0
    n_rows = max(1, CHUNK_BYTES // (logits.itemsize * logits.shape[1]))
    kl = ce = 0.0
    for start in range(0, len(scored), n_rows):
        rows = scored[start : start + n_rows]
        ce_part, gradient = _ce(logits[rows], targets[rows])
        ce += ce_part
        gradient *= options.ce_weight * scale / len(scored)
        if teacher_logits is not None:
            kl_part, kl_gradient = _kl(logits[rows], teacher_logits[rows], options.temperature)
            kl += kl_part
            kl_gradient *= options.kl_weight * scale / len(scored)
            gradient += kl_gradient
        dlogits[rows] = gradient
    n = max(1, len(scored))
    return (kl / n, ce / n), dlogits


def _kl_ce_in_c(logits, teacher_logits, targets, options, scale, dlogits) -> tuple[float, float]:
    """-> (kl, ce); dlogits is filled. Values are summed in float64."""
    n, temperature = max(1, np.count_nonzero(targets >= 0)), options.temperature
    if teacher_logits is not None:
        teacher_logits = np.ascontiguousarray(teacher_logits, np.float32)
    values = training_kernels.logit_losses(
        logits, teacher_logits, targets.astype(np.int64, copy=False), temperature,
        options.kl_weight * temperature * scale / n, options.ce_weight * scale / n, dlogits)  # fmt: skip
    kl, ce = values.sum(0) / n
    return float(temperature**2 * kl), float(ce)


def _check_logits(logits, teacher_logits, targets, options) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"targets: expected shape (M,) for logits (M, V), got {targets.shape} for {logits.shape}")
    if len(targets) and targets.max() >= logits.shape[1]:
        raise ValueError(f"targets: expected tokens below {logits.shape[1]}, got {targets.max()}")
    if teacher_logits is None and options.kl_weight:
        raise ValueError(f"teacher_logits: expected an array for a kl_weight of {options.kl_weight}, got None")
    if teacher_logits is not None and teacher_logits.shape != logits.shape:
        raise ValueError(f"teacher_logits: expected shape {logits.shape} like logits, got {teacher_logits.shape}")


def _log_softmax(x):
    """x (r, V), which becomes log softmax(x) -> softmax(x)."""
    x -= x.max(axis=1, keepdims=True)
    e = np.exp(x)
    total = e.sum(axis=1, keepdims=True)
    x -= np.log(total)
    e /= total
    return e


def _ce(z, targets):
    """z (r, V), overwritten -> the rows' sum of -log softmax(z)[target], its gradient softmax(z) - onehot(target)."""
    rows = np.arange(len(z))
    p = _log_softmax(z)
    p[rows, targets] -= 1
    return -float(z[rows, targets].sum(dtype=np.float64)), p


def _kl(z, t, temperature):
    """z t (r, V), overwritten -> the rows' sum of T² KL(q ‖ p), its gradient T (p - q); p = softmax(z / T), q of t."""
    z /= temperature
    t = t.astype(z.dtype, copy=False)
    t /= temperature
    p, q = _log_softmax(z), _log_softmax(t)
    t -= z
    t *= q
    p -= q
    p *= temperature
    return temperature**2 * float(t.sum(dtype=np.float64)), p


# --- on the encoder's output ---


def hidden_mse(xa: np.ndarray, teacher: np.ndarray, frames: np.ndarray, scale: float = 1.0) -> tuple[float, np.ndarray]:
    """xa teacher (B, T, D), frames (B,) -> the mean of (xa - teacher)² over the first frames[b] frames of each row b,
    and scale times its gradient (B, T, D), 0 beyond them. A teacher with a longer context is cut to T by the caller.

    The student's frames alone count: a window that ends early is padding for the teacher. ValueError for shapes that
    do not fit or more than T frames.
    """
    if xa.shape != teacher.shape or xa.ndim != 3:
        raise ValueError(f"teacher: expected shape {xa.shape} (B, T, D) like xa, got {teacher.shape}")
    if frames.shape != xa.shape[:1] or frames.min(initial=0) < 0 or frames.max(initial=0) > xa.shape[1]:
        raise ValueError(f"frames: expected {len(xa)} numbers from 0 to {xa.shape[1]}, got {frames}")
    n = max(1, int(frames.sum()) * xa.shape[2])
    dxa, total = np.zeros_like(xa), 0.0
    for d, x, t, n_frames in zip(dxa, xa, teacher, frames, strict=True):
        d = d[:n_frames]
        np.subtract(x[:n_frames], t[:n_frames], out=d)
        total += float(np.square(d, dtype=np.float64).sum())
        d *= 2 * scale / n
    return total / n, dxa


# --- on the activations ---


def outlier(a: np.ndarray, tau: float, power: float, unit: str = "value", most: float | None = None
            ) -> tuple[float, tuple]:  # fmt: skip
    """A (B, …) -> log(1 + m), m the mean over B windows of a window's E[(|A| / (tau * unit))^power]; cache.

    unit "value": 1, so that m is a mean over all elements. After TWEO, whose authors leave out the logarithm.
    unit "rms": the window's own sqrt(E[A²]), or `most` where that is less. It is for the shape of a distribution what
    "value" is for its size: a tensor of large but ordinary values is left alone, where "value" shrinks it for ever,
    logits included. Of normally distributed values E[(|A| / rms)^6] is 15.

    With s a window's largest |A|, log m = power * log(s / (tau * unit)) + log E[(|A| / s)^power]: the mean's terms are
    at most 1 and one is 1, so that nothing overflows.
    """
    windows = a.reshape(1, -1) if unit == "value" else a.reshape(len(a), -1)
    largest, totals = np.array([_power_sum(w, power) for w in windows]).T
    squares = np.full(len(windows), np.inf)  # where the unit hangs on A, sum A²
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0, of zeros; what is not finite shows in the loss
        size = np.full(len(windows), float(tau))
        if unit == "rms":
            squares = np.array([sum_squares(w) for w in windows])
            rms = np.sqrt(squares / windows.shape[1])
            size *= rms if most is None else np.minimum(rms, most)
            squares = squares if most is None else np.where(rms > most, np.inf, squares)
        log_m = power * np.log(largest / size) + np.log(totals / windows.shape[1]) - math.log(len(windows))
        log_m[(largest == 0) | (size == 0)] = -np.inf  # silence
        value = float(np.logaddexp.reduce([0.0, *log_m]))
    return value, (a, largest, totals, squares, np.exp(log_m - value), power)


def outlier_backward(dvalue: float, cache: tuple) -> np.ndarray:
    """dvalue, a number -> dA like A. Of a window with mean m_b, S = sum |A|^power, m the mean of the m_b:

    dA = dvalue * power * (m_b / B) / (1 + m) * (sign(A) |A|^(power - 1) / S  -  A / sum A² where the unit is A's rms)
    """
    a, largest, totals, squares, shares, power = cache
    windows = a.reshape(len(largest), -1)
    da = np.zeros_like(windows)
    for b in np.flatnonzero(shares != 0):
        factor = dvalue * power * shares[b]
        _power_backward(windows[b], largest[b], factor / largest[b] / totals[b], power, out=da[b])
        if np.isfinite(squares[b]):
            root, kind = math.sqrt(squares[b]), da.dtype.type  # divided in two steps: its square may leave float32
            da[b] -= windows[b] * kind(1 / root) * kind(factor / root)
    return da.reshape(a.shape)


def _power_sum(flat: np.ndarray, power: float) -> tuple[float, float]:
    """-> largest |A|, sum (|A| / largest)^power."""
    if _in_c(flat, power):
        largest = training_kernels.magnitude(flat)
        return largest, training_kernels.power_sum(flat, largest, int(power)) if largest else 0.0
    largest = float(max(flat.max(), -flat.min()))
    total = sum(float(_power(r, power).sum(dtype=np.float64)) for r in _blocks(flat, largest)) if largest else 0.0
    return largest, total if math.isfinite(total) else math.nan


def _power_backward(flat: np.ndarray, largest: float, factor: float, power: float, out: np.ndarray) -> None:
    """out = factor * sign(A) (|A| / largest)^(power - 1)."""
    if _in_c(flat, power):
        training_kernels.power_backward(flat, largest, factor, int(power), out)
        return
    for start, r in zip(range(0, flat.size, BLOCK), _blocks(flat, largest), strict=True):
        block = slice(start, start + BLOCK)
        np.copysign(_power(r, power - 1), flat[block], out=out[block])
        out[block] *= factor


def _blocks(flat, largest):
    """|A| / largest in [0, 1], block by block. Divided, not multiplied by 1 / largest: that may overflow."""
    for start in range(0, flat.size, BLOCK):
        r = np.abs(flat[start : start + BLOCK])
        with np.errstate(invalid="ignore"):  # infinity / infinity: NaN, which the loss then shows
            r /= largest
        yield r


def _in_c(a, power: float) -> bool:
    """Whether the kernels take it: powers that are whole numbers."""
    return power <= 16 and float(power).is_integer() and training_kernels.in_c(a)


def _power(r, power: float):
    """r ** power for r >= 0. Products where power is a small whole number: 3 to 15 times as fast as NumPy's power."""
    if power > 16 or not float(power).is_integer():
        return r**power
    result, power = None, int(power)
    while power:
        if power & 1:
            result = r.copy() if result is None else np.multiply(result, r, out=result)
        power >>= 1
        if power:
            r = r * r
    return result


def penalty_group(name: str) -> str | None:
    """The group of OUTLIER_GROUPS to which a tensor of the training operators belongs, by its name, or None.

    Names: "….mlp.2" the MLP's output, "….mlp.2 + residual" the block's output, the two final layer norms, and
    "….mlp.0" what the MLP's GELU is given.
    """
    if name in FINAL_NORMS:
        return "final-norm"
    ends = {".mlp.2 + residual": "block", ".mlp.2": "mlp", ".mlp.0": "mlp-hidden"}
    return next((group for end, group in ends.items() if name.endswith(end)), None)


def n_penalized(dims: Mapping[str, int], groups: Iterable[str]) -> int:
    """The number of tensors that one forward of a model with these dims has in these groups."""
    layers = dims["n_audio_layer"] + dims["n_text_layer"]
    return sum(len(FINAL_NORMS) if group == "final-norm" else layers for group in groups)
