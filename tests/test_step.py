"""One step of distillation: torch's gradients and losses, shares of a batch, frozen encoder, the penalty's parts."""

from dataclasses import replace

import numpy as np
import pytest

from minigate import attention, distill, model, optim, step, tape
from minigate.parallel import Alone
from tests import check, training
from tests.gradients import check_gradient

GOLDEN = 1e-10  # relative, our float64 against torch's: gradients of the first step
TEN_STEPS = 1e-6  # the same, ten steps later: AdamW makes as much of small gradients' last digits as of large ones'
FLOAT32 = 2e-4
BF16 = 2e-2


def distillation(kind="per_head", dtype=np.float64, options=training.DISTILL, bf16=False, **more):
    ops = tape.Recorded(training.metadata(kind), training.tensors(kind), dtype, bf16)
    return step.Distillation(ops, model.Dims(**training.DIMS), options, training.batch()[1].astype(dtype), **more)


def rows(batch, places):
    """A batch of some of the windows."""
    places = list(places)
    arrays = ("mel", "tokens_in", "targets", "teacher_hidden", "frames", "teacher_xa")
    return replace(batch, **{name: getattr(batch, name)[places] for name in arrays})


def shorten(batch):
    """As decoder_arrays would make it: no longer than the longest row."""
    length = int((batch.targets >= 0).nonzero()[1].max()) + 1
    cut = {name: getattr(batch, name)[:, :length] for name in ("tokens_in", "targets", "teacher_hidden")}
    return replace(batch, **cut)


def total(parts):
    return step.Losses(*sum(part.array() for part in parts))


# --- against torch ---


def train(kind, dtype, bf16=False):
    """-> (10, 6) like KIND.losses, and the first step's gradients."""
    batch, _ = training.batch()
    student, table, first = distillation(kind, dtype, bf16=bf16), [], None
    frozen = {"encoder.positional_embedding"}
    adamw = optim.AdamW(student.ops.p, training.OPTIM, frozen)
    for number in range(1, training.STEPS + 1):
        student.ops.grads.clear()
        losses = student.forward_backward(batch)
        first = first or {name: g.copy() for name, g in student.ops.grads.items()}
        norm = adamw.norm(student.ops.grads)
        table.append([losses.loss(training.DISTILL), *losses.array(), norm])
        factor = optim.schedule(number, training.STEPS, training.OPTIM.warmup)
        scale = optim.clip_scale(norm, training.OPTIM.clip_norm)
        adamw.step(student.ops.grads, training.OPTIM.lr * factor, training.OPTIM.gate_lr * factor, scale)
    assert not student.ops.stack
    return np.array(table), first


@pytest.mark.parametrize("kind", attention.GATE_KINDS)
def test_gradients_and_ten_losses_are_torchs(kind):
    golden = training.golden()
    table, grads = train(kind, np.float64)
    names = [name.split(".grad.")[1] for name in golden if name.startswith(f"{kind}.grad.")]
    assert len(names) >= 20 and (kind == "none") == (not any(".gate." in name for name in names))
    check.hold(*(check.relative_bar(name, training.sample(grads[name]), golden[f"{kind}.grad.{name}"], GOLDEN)
                 for name in names))  # fmt: skip
    np.testing.assert_allclose(table, golden[f"{kind}.losses"], rtol=TEN_STEPS)


def test_losses_in_float32_and_bf16_are_torchs():
    golden = training.golden()["elementwise.losses"]
    np.testing.assert_allclose(train("elementwise", np.float32)[0], golden, rtol=FLOAT32)
    np.testing.assert_allclose(train("elementwise", np.float32, bf16=True)[0][:, 0], golden[:, 0], rtol=BF16)


# --- the whole step's gradient ---


def test_gradient_of_the_loss_along_a_direction():
    options = replace(training.DISTILL, outlier_tensors=distill.OUTLIER_GROUPS)
    student, (batch, _) = distillation("all_heads", options=options), training.batch()
    student.forward_backward(batch)
    for name in ("encoder.conv1.weight", "decoder.token_embedding.weight", "encoder.blocks.1.mlp.2.weight",
                 "encoder.blocks.1.mlp.0.weight", "decoder.blocks.0.cross_attn.key.weight"):  # fmt: skip
        value = student.ops.p[name]

        def f(x, value=value):
            value[...] = x
            return student.losses(batch).loss(options)

        start = value.copy()
        check_gradient(f, start, student.ops.grads[name], np.random.default_rng(0), rtol=1e-5)
        value[...] = start


def test_losses_alone_leave_nothing_behind():
    student, (batch, _) = distillation(), training.batch()
    alone = student.losses(batch)
    assert not student.ops.stack and not student.ops.grads
    assert alone == student.forward_backward(batch)


def test_teachers_logits_come_in_pieces(monkeypatch):
    whole, pieces, (batch, _) = distillation(), distillation(), training.batch()
    expected = whole.forward_backward(batch).array()
    monkeypatch.setattr(step, "ROWS", 4)
    np.testing.assert_allclose(pieces.forward_backward(batch).array(), expected, rtol=1e-12)
    for name, gradient in whole.ops.grads.items():
        np.testing.assert_allclose(pieces.ops.grads[name], gradient, rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_teacher_hears_longer_windows_than_the_student():
    student, (batch, _) = distillation(), training.batch()
    longer = np.concatenate([batch.teacher_xa, batch.teacher_xa[:, ::-1]], 1)
    assert student.losses(replace(batch, teacher_xa=longer)) == student.losses(batch)


def test_without_kl_the_teacher_is_not_asked():
    student, (batch, _) = distillation(options=distill.DistillOptions(kl_weight=0)), training.batch()
    student.embedding = None
    losses = student.forward_backward(batch)
    assert losses.kl == 0 and losses.loss(student.options) == losses.ce > 0


# --- shares ---


class Parts(Alone):
    """Stands in for the exchanges of several parts of a batch: sums known beforehand, one queue for all."""

    def __init__(self, totals, longest):
        self.totals, self.longest = totals, longest

    def total(self, array):
        return self.totals

    def largest(self, number):
        return self.longest


@pytest.mark.parametrize("unit", [{}, {"outlier_unit": "rms"}, {"outlier_unit": "rms", "outlier_unit_most": 0.9}])
@pytest.mark.parametrize("cut", [[[0], [1, 2]], [[2, 0], [1]], [[0, 1, 2], []]])
def test_parts_in_processes_add_up_to_the_whole(cut, unit):
    batch, _ = training.batch()
    options = replace(training.DISTILL, **unit)
    whole = distillation(options=options)
    expected = whole.forward_backward(batch)
    batches = [shorten(rows(batch, places)) if places else None for places in cut]
    counts = [np.array([[(b.targets >= 0).sum(), b.frames.sum(), len(b.mel)] if b else [0, 0, 0]]) for b in batches]
    penalties = []

    class Listening(Parts):
        def total(self, array):
            penalties.append(array)
            return array

    shares = [step.shares([b], Parts(np.array(sum(counts), float), 0))[0] for b in batches]
    parts = distillation(processes=Listening(None, batch.targets.shape[1]), options=options)
    for part, share in zip(batches, shares, strict=True):
        parts.forward_backward(part, share)
    parts = distillation(processes=Parts(sum(penalties), batch.targets.shape[1]), options=options)
    found = total([parts.forward_backward(part, share)
                   for part, share in zip(batches, shares, strict=True)])  # fmt: skip
    np.testing.assert_allclose(found.array(), expected.array(), rtol=1e-12)
    for name, gradient in whole.ops.grads.items():
        np.testing.assert_allclose(parts.ops.grads[name], gradient, rtol=1e-9, atol=1e-12, err_msg=name)


def test_accumulated_calls_are_one_mean_over_tokens_and_frames():
    batch, _ = training.batch()
    options = replace(training.DISTILL, outlier_weight=0.0)
    whole, parts = distillation(options=options), distillation(options=options)
    expected = whole.forward_backward(batch)
    batches = [rows(batch, [0]), rows(batch, [1, 2]), None]
    shares = step.shares(batches, Alone())
    assert [share.calls for share in shares] == [0.5] * 3 and [share.windows for share in shares] == [1, 1, 0]
    found = total([parts.forward_backward(b, s) for b, s in zip(batches, shares, strict=True)])
    np.testing.assert_allclose(found.array(), expected.array(), rtol=1e-12)
    for name, gradient in whole.ops.grads.items():
        np.testing.assert_allclose(parts.ops.grads[name], gradient, rtol=1e-9, atol=1e-12, err_msg=name)


def test_accumulated_penalties_are_averaged():
    batch, _ = training.batch()
    parts = [rows(batch, [0]), rows(batch, [1, 2])]
    single = [distillation().losses(part).outlier for part in parts]
    student = distillation()
    shared = [student.forward_backward(part, share).outlier
              for part, share in zip(parts, step.shares(parts, Alone()), strict=True)]  # fmt: skip
    np.testing.assert_allclose(shared, np.array(single) / 2, rtol=1e-12)


def test_lengthened_rows_are_those_of_a_longer_batch():
    batch, _ = training.batch()
    one = shorten(rows(batch, [2]))
    assert one.targets.shape == (1, 4)
    long = step.lengthen(one, 9)
    assert long.targets.tolist() == batch.targets[2:].tolist()
    assert long.tokens_in[0, 4:].tolist() == [batch.targets[2, 3]] * 5
    np.testing.assert_array_equal(long.teacher_hidden, batch.teacher_hidden[2:])
    assert step.lengthen(one, 4) is one


# --- the penalty ---


def test_penalty_is_the_mean_over_its_tensors():
    rng = np.random.default_rng(0)
    options = distill.DistillOptions(outlier_weight=0.1, outlier_decoder_tau=1.5, outlier_tensors="block,final-norm")
    names = (
        "encoder.conv1", "encoder.blocks.0.attn.out", "encoder.blocks.0.attn.out + residual", "encoder.blocks.0.mlp.0",
        "encoder.blocks.0.mlp.2", "encoder.blocks.0.mlp.2 + residual", "encoder.blocks.1.mlp.2 + residual",
        "encoder.ln_post", "decoder.blocks.0.mlp_ln", "decoder.blocks.0.mlp.2 + residual", "decoder.ln",
    )  # fmt: skip
    tensors = {name: 4 * rng.standard_normal((2, 3, 8)) for name in names}
    penalized = [n for n in tensors if n.endswith(("mlp.2 + residual", "ln_post", "decoder.ln"))]

    def value(a, tau):
        """One tensor's part, by the formula."""
        return 0.1 / 5 * np.log(1 + ((np.abs(a) / tau) ** 4).mean())

    taus = {n: 1.5 if n.startswith("decoder.blocks") else 6 for n in penalized}

    penalty = step.OutlierPenalty(options, 5)
    for _ in range(2):  # the second time after a reset
        penalty.reset()
        caches = {n: penalty.forward(n, a) for n, a in tensors.items()}
        assert [n for n, cache in caches.items() if cache is not None] == penalized
        total = penalty.settle(step.WHOLE, Alone())
        assert total == pytest.approx(sum(value(tensors[n], taus[n]) for n in penalized), rel=1e-12)
    for n in penalized:
        check_gradient(lambda a, tau=taus[n]: value(a, tau), tensors[n], penalty.backward(caches[n]), rng)


def test_penalty_counts_its_tensors():
    penalty = step.OutlierPenalty(training.DISTILL, 3)
    penalty.forward("decoder.ln", np.ones((1, 2, 4)))
    assert penalty.forward("decoder.blocks.0.attn.out", np.ones((1, 2, 4))) is None
    with pytest.raises(RuntimeError, match="expected 3 tensors, got 1"):
        penalty.settle(step.WHOLE, Alone())


def test_activations_beyond_float32_show_in_the_loss():
    penalty = step.OutlierPenalty(replace(training.DISTILL, outlier_power=16), 1)
    penalty.forward("decoder.ln", np.full((1, 2, 4), 1e38, np.float32))
    assert not np.isfinite(penalty.settle(step.WHOLE, Alone()))


# --- a frozen encoder ---


def test_frozen_encoder_ends_the_backward():
    batch, _ = training.batch()
    whole, frozen = distillation(), distillation(encoder_frozen=True)
    assert whole.forward_backward(batch) == frozen.forward_backward(batch)
    assert not frozen.ops.stack
    assert frozen.ops.grads.keys() == {name for name in whole.ops.grads if name.startswith("decoder.")}
    for name, gradient in frozen.ops.grads.items():
        np.testing.assert_array_equal(gradient, whole.ops.grads[name], err_msg=name)
