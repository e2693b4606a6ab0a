"""One step of distillation: a batch through the student, the losses, and back to gradients.

    batch --encoder, decoder--> xa, logits --losses against the teacher's--> value, and gradients in `ops.grads`

A batch may be a share of a larger one, which several processes hold (parallel.py) or several calls see one after the
other (accumulation): `Share` says which part of each mean it is, so that values and gradients of all parts add up to
those of the whole.

B windows, T positions of the encoder, L of the decoder, M positions with a target, D n_state, V n_vocab.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from minigate import distill, model, training_kernels
from minigate.batches import Batch
from minigate.distill import DistillOptions
from minigate.parallel import Alone
from minigate.tape import Recorded

ROWS = 128  # of the teacher's logits that exist at one time


@dataclass(frozen=True)
class Share:
    """What part a batch is of the whole batch of a step."""

    tokens: float = 1.0  # of the targets: the means of kl and ce
    frames: float = 1.0  # of the positions of sound: the mean of hidden
    windows: float = 1.0  # of the windows that all processes see in this call: the penalty's means, within the log
    calls: float = 1.0  # 1 / number of calls of this step: the penalty outside of the log


WHOLE = Share()


@dataclass(frozen=True)
class Losses:
    """A batch's part of each mean, without weights but for the penalty's. Parts add up."""

    kl: float = 0.0
    ce: float = 0.0
    hidden: float = 0.0
    outlier: float = 0.0

    def array(self) -> np.ndarray:
        return np.array(astuple(self))

    def loss(self, options: DistillOptions) -> float:
        """The weighted sum that the gradients are of."""
        return (options.kl_weight * self.kl + options.ce_weight * self.ce
                + options.hidden_weight * self.hidden + self.outlier)  # fmt: skip


def shares(batches: Sequence[Batch | None], processes: Alone) -> list[Share]:
    """The batches of a step's calls, None where this process has no window -> the share of each.

    Calls in which no process has a window do not count.
    """
    counts = np.array([((b.targets >= 0).sum(), b.frames.sum(), len(b.mel)) if b else (0, 0, 0) for b in batches])
    totals = processes.total(counts)
    tokens, frames, _ = np.maximum(totals.sum(0), 1)
    calls = 1 / max(1, np.count_nonzero(totals[:, 2]))
    return [Share(own[0] / tokens, own[1] / frames, own[2] / max(1, total[2]), calls)
            for own, total in zip(counts, totals, strict=True)]  # fmt: skip


def lengthen(batch: Batch, length: int) -> Batch:
    """The batch with decoder rows of `length` positions, filled up as `batches.decoder_arrays` does."""
    more = length - batch.targets.shape[1]
    if more <= 0:
        return batch
    last = np.array([row[row >= 0][-1] for row in batch.targets])
    return replace(
        batch,
        tokens_in=np.concatenate([batch.tokens_in, np.repeat(last[:, None], more, 1)], 1),
        targets=np.pad(batch.targets, ((0, 0), (0, more)), constant_values=-1),
        teacher_hidden=np.pad(batch.teacher_hidden, ((0, 0), (0, more), (0, 0))),
    )


class OutlierPenalty:
    """outlier_weight * mean over n_tensors tensors of log(1 + E[(|A| / (tau * unit))^power]), for `tape.Recorded`, of a
    batch whose parts may lie in several processes. Padded positions count like others, in a window's rms too.

    For a tensor whose parts have means m_r and make up w_r of it, log(1 + Σ w_r m_r) = log(Σ w_r exp(v_r)) with the
    parts' own values v_r = log(1 + m_r): one exchange of numbers between forward and backward, and each part's
    gradient is multiplied with w_r exp(v_r) / Σ w_r exp(v_r).
    """

    def __init__(self, options: DistillOptions, n_tensors: int):
        self.options, self.n_tensors = options, n_tensors
        self.reset()

    def reset(self) -> None:
        """Begin a forward."""
        self._values: list[float] = []
        self._factors = None

    def forward(self, name: str, a: np.ndarray) -> tuple | None:
        """-> what `backward` needs of a tensor, or None when it is not penalized."""
        o = self.options
        if distill.penalty_group(name) not in o.outlier_tensors:
            return None
        value, cache = distill.outlier(a, o.tau(name), o.outlier_power, o.outlier_unit, o.outlier_unit_most)
        self._values.append(value)
        return len(self._values) - 1, cache

    def settle(self, share: Share, processes: Alone) -> float:
        """Between forward and backward, by all processes -> this part of the penalty; parts add up.

        A process without a window, and so without a forward, has a share of 0. RuntimeError when n_tensors is wrong.
        """
        if share.windows and len(self._values) != self.n_tensors:
            raise RuntimeError(f"outlier penalty: expected {self.n_tensors} tensors, got {len(self._values)}")
        values = np.array(self._values) if share.windows else np.zeros(self.n_tensors)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the loss
            own = share.windows * np.exp(values)
            whole = processes.total(own)
            weight = share.calls * self.options.outlier_weight
            self._factors = weight / self.n_tensors * own / whole
            return share.windows * weight * float(np.log(whole).mean()) if share.windows else 0.0

    def backward(self, cache: tuple) -> np.ndarray:
        """What forward gave -> the gradient with respect to its tensor."""
        tensor, inner = cache
        return distill.outlier_backward(float(self._factors[tensor]), inner)


class Distillation:
    """A student under training and what its losses compare with.

    ops              of the student; their penalty is made here
    embedding        (V, D) float32, the teacher's, from which its logits come
    encoder_frozen   the backward ends at the encoder's output, and of its forward nothing is kept
    """

    def __init__(self, ops: Recorded, dims: model.Dims, options: DistillOptions, embedding: np.ndarray,
                 encoder_frozen: bool = False, processes: Alone | None = None):  # fmt: skip
        self.ops, self.dims, self.options, self.embedding = ops, dims, options, embedding
        self.encoder_frozen, self.processes = encoder_frozen, processes or Alone()
        n_tensors = distill.n_penalized(vars(dims), options.outlier_tensors)
        ops.penalty = OutlierPenalty(options, n_tensors) if options.outlier_weight else None

    def forward_backward(self, batch: Batch | None, share: Share = WHOLE) -> Losses:
        """Add the gradients of this part of the loss to `ops.grads` -> the part of each loss.

        The batch has the teacher's encoder output when hidden_weight is not 0. batch None: this process has no window
        here, but must call all the same.
        """
        length = self.processes.largest(0 if batch is None else batch.targets.shape[1])
        if batch is None:
            return Losses(outlier=self._settle(share, self.processes))
        losses, dxa, dhidden = self._losses(lengthen(batch, length), share, self.processes)
        self._backward(dxa, dhidden)
        return losses

    def losses(self, batch: Batch) -> Losses:
        """The batch's losses alone: no gradients, and no other process takes part."""
        losses, _, _ = self._losses(batch, WHOLE, Alone())
        self.ops.stack.clear()
        return losses

    def _losses(self, batch, share, processes):
        """-> losses, dxa (B, T, D) or None, and the scored positions with the gradient of their logits (M, V)."""
        ops, options = self.ops, self.options
        if ops.penalty:
            ops.penalty.reset()
        xa = model.encoder(ops, self.dims, batch.mel.astype(ops.dtype, copy=False))
        if self.encoder_frozen:
            ops.stack.clear()
        x = model.decoder(ops, self.dims, batch.tokens_in, model.Whole(model.cross_keys_values(ops, self.dims, xa)))
        hidden = ops.norm("decoder.ln", x)
        scored = np.nonzero(batch.targets >= 0)
        logits = ops.logits(hidden[scored])
        outlier = self._settle(share, processes)
        kl, ce = compare_logits(logits, batch.teacher_hidden[scored], self.embedding, batch.targets[scored],
                                options, share.tokens, ops.bf16)  # fmt: skip
        mse, dxa = 0.0, None
        if options.hidden_weight:
            teacher_xa = batch.teacher_xa[:, : xa.shape[1]].astype(ops.dtype, copy=False)
            mse, dxa = distill.hidden_mse(xa, teacher_xa, batch.frames, share.frames * options.hidden_weight)
        losses = Losses(share.tokens * kl, share.tokens * ce, share.frames * mse, outlier)
        return losses, dxa, (hidden.shape, scored, logits)

    def _settle(self, share, processes) -> float:
        return self.ops.penalty.settle(share, processes) if self.ops.penalty else 0.0

    def _backward(self, dxa, dhidden) -> None:
        ops, (shape, scored, dlogits) = self.ops, dhidden
        dx = np.zeros(shape, ops.dtype)
        dx[scored] = ops.linear_backward("decoder.token_embedding", dlogits)[0]
        dcross = model.decoder_backward(ops, self.dims, ops.norm_backward("decoder.ln", dx))
        from_decoder = model.cross_keys_values_backward(ops, self.dims, dcross)
        if not self.encoder_frozen:
            model.encoder_backward(ops, self.dims, model.plus(dxa, from_decoder))


def compare_logits(logits, teacher_hidden, embedding, targets, options: DistillOptions, scale: float,
                   bf16: bool) -> tuple[float, float]:  # fmt: skip
    """logits (M, V), which become the gradient of scale * (kl_weight * kl + ce_weight * ce); teacher_hidden (M, D)
    float16, embedding (V, D), targets (M,) -> kl, ce, means over the M rows. The teacher's logits, ROWS of them at a
    time, are made in the student's precision."""
    kl = ce = 0.0
    for start in range(0, len(logits), ROWS):
        rows = slice(start, start + ROWS)
        part = len(targets[rows]) / len(targets)
        teacher = None
        if options.kl_weight:
            teacher = training_kernels.product_nt(teacher_hidden[rows].astype(logits.dtype), embedding, None, bf16)
        values, _ = distill.kl_ce(logits[rows], teacher, targets[rows], options, scale * part, out=logits[rows])
        kl, ce = kl + part * values[0], ce + part * values[1]
    return kl, ce
