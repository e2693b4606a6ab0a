"""The loop: bit for bit resumption, interrupts, skipped steps, full disks, what is trained."""

import errno
import json
import os
import signal

import numpy as np
import pytest

from minigate import checkpoint, kernels, train, trainer
from minigate.step import Distillation, Losses
from minigate.trainer import Stop, Trainer
from tests.runs import arguments


@pytest.fixture(scope="module", autouse=True)
def same_threads():
    before = kernels.threads()
    yield
    kernels.set_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def run(folder, output, *more, **options):
    return train.main([*arguments(folder, output, **options), "--quiet", *more])


def tensors(folder, output, name="student"):
    return dict(checkpoint.read(folder / output / f"{name}.safetensors").tensors)


def lines(folder, output):
    """Without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "elapsed_s"} for row in rows]


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run of eight steps with all that has a state: accumulation, average, augmentation, losses."""
    assert run(folder, "whole", **RICH) == 0
    return (folder / "whole" / "student.safetensors").read_bytes()


RICH = dict(steps=8, checkpoint_every=3, eval_every=5, accumulate=2, ema_decay=0.9, outlier_weight=0.1, outlier_tau=1,
            hidden_weight=0.1, noise_share=0.5, time_masks=1, freq_masks=1, freq_mask_bins=3)  # fmt: skip


# --- what a run leaves


def test_a_line_a_step_and_figures_now_and_then(folder, whole):
    rows = lines(folder, "whole")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(np.isfinite(list(row.values())[:8]).all() for row in rows)
    assert [row["step"] for row in rows if "dev" in row] == [5, 8]
    for row in rows:
        weighted = 0.8 * row["kl"] + row["ce"] + 0.1 * row["hidden"] + row["outlier"]
        assert row["loss"] == pytest.approx(weighted) and row["hidden"] > 0 and row["outlier"] > 0
    assert [row["lr"] for row in rows[:3]] == [0.5e-3, 1e-3, pytest.approx(6 / 7 * 1e-3)]
    assert rows[0]["gate_lr"] == 1e-4
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_students_are_model_files(folder, whole):
    plain, average = (checkpoint.read(folder / "whole" / f"{name}.safetensors") for name in ("student", "student-ema"))
    assert plain.metadata["audio_context"] == "variable" and plain.metadata["gate"]["kind"] == "per_head"
    training = plain.metadata["provenance"]["training"]
    assert training["lr"] == 1e-3 and training["steps"] == 8 and str(folder) not in json.dumps(plain.metadata)
    assert "--gate per_head --audio-context variable --batch-seconds 6.0 --accumulate 2" in training["command"]
    kept = trainer.RunFolder(folder / "whole").load()
    for name in ("decoder.blocks.0.mlp.0.weight", "encoder.blocks.0.attn.gate.bias"):
        np.testing.assert_array_equal(plain.tensors[name], kept.tensors[f"student.{name}"])
        np.testing.assert_array_equal(average.tensors[name], kept.tensors[f"optimizer.average.{name}"])
        assert not np.array_equal(plain.tensors[name], average.tensors[name])
    assert plain.tensors.keys() == average.tensors.keys()


# --- resumption


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_goes_on_bit_for_bit(folder, whole, monkeypatch, capsys, stop, code):
    output, one_step = f"stopped-{code}", Trainer.train_step

    def interrupted(self):
        line = one_step(self)
        if line["step"] == 4:  # between two checkpoints
            signal.raise_signal(stop)
        return line

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert run(folder, output, **RICH) == code
    assert "interrupted: after step 4, saved; --resume continues" in capsys.readouterr().err
    assert not (folder / output / "student.safetensors").exists() and len(lines(folder, output)) == 4
    assert trainer.RunFolder(folder / output).load().facts["step"] == 4
    assert run(folder, output, "--resume", **RICH) == 0
    assert (folder / output / "student.safetensors").read_bytes() == whole
    assert (folder / output / "student-ema.safetensors").read_bytes() == (
        folder / "whole" / "student-ema.safetensors").read_bytes()  # fmt: skip
    assert lines(folder, output) == lines(folder, "whole")


def test_an_interrupt_during_the_figures_is_obeyed(folder, whole, monkeypatch):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(trainer.DevSet, "transcripts", interrupted)
        assert run(folder, "looking", **RICH) == 130
    assert "dev" not in lines(folder, "looking")[4]
    assert run(folder, "looking", "--resume", **RICH) == 0
    assert (folder / "looking" / "student.safetensors").read_bytes() == whole


def test_signals_mean_afterwards_what_they_did_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[1]
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_interrupt_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_finished_run_resumed_only_writes_its_student(folder, whole):
    for name in ("student", "student-ema"):
        (folder / "whole" / f"{name}.safetensors").unlink()
    rows = lines(folder, "whole")
    assert run(folder, "whole", "--resume", **RICH) == 0
    assert (folder / "whole" / "student.safetensors").read_bytes() == whole and lines(folder, "whole") == rows


def test_a_run_may_be_made_longer(folder):
    assert run(folder, "longer", steps=2) == 0
    assert run(folder, "longer", "--resume", steps=4) == 0
    rows = lines(folder, "longer")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["lr"] for row in rows] == pytest.approx([0.5e-3, 1e-3, 2 / 3 * 1e-3, 1 / 3 * 1e-3])


def test_without_a_checkpoint_a_run_begins_anew(folder):
    assert run(folder, "anew", steps=2) == 0
    (folder / "anew" / "checkpoint.safetensors").unlink()
    (folder / "anew" / "log.jsonl").write_text('{"step": 1, "loss": 77}\n{"st')
    before = tensors(folder, "anew")
    assert run(folder, "anew", "--resume", steps=2) == 0
    assert [row["step"] for row in lines(folder, "anew")] == [1, 2] and lines(folder, "anew")[0]["loss"] != 77
    assert all(np.array_equal(array, before[name]) for name, array in tensors(folder, "anew").items())


# --- what goes wrong


def test_a_full_disk_while_saving_is_one_line_and_nothing_is_lost(folder, whole, monkeypatch, capsys):
    saves, write = [], trainer.RunFolder.save

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def second_fails(self, kept):
        saves.append(kept.facts["step"])
        with monkeypatch.context() as patch:
            if len(saves) == 2:
                patch.setattr(os, "replace", full)
            write(self, kept)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RunFolder, "save", second_fails)
        assert run(folder, "full", **RICH) == 1
    assert saves == [3, 6]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoint.safetensors: cannot be written: No space left on device" in error
    assert not list((folder / "full").glob(".*"))
    assert run(folder, "full", "--resume", **RICH) == 0
    assert (folder / "full" / "student.safetensors").read_bytes() == whole


def spoil(monkeypatch, steps, what):
    """From the real step on, what(distillation, losses) -> losses in calls number `steps`."""
    calls, real = [], Distillation.forward_backward

    def spoilt(self, *args):
        calls.append(None)
        losses = real(self, *args)
        return what(self, losses) if len(calls) in steps else losses

    monkeypatch.setattr(Distillation, "forward_backward", spoilt)


def infinite_gradient(distillation, losses):
    distillation.ops.grads["decoder.ln.bias"][0] = np.inf
    return losses


@pytest.mark.parametrize("what", [lambda d, losses: Losses(kl=float("nan")), infinite_gradient])
def test_a_step_that_is_not_finite_is_skipped(folder, monkeypatch, what, request):
    output = f"skipped-{request.node.callspec.id}"
    seen, one_step = [], Trainer.train_step

    def watched(self):
        line = one_step(self)
        seen.append(self.ops.p["decoder.ln.bias"].copy())
        return line

    monkeypatch.setattr(Trainer, "train_step", watched)
    spoil(monkeypatch, (2,), what)
    assert run(folder, output, steps=3) == 0
    rows = lines(folder, output)
    assert [row.get("skipped") for row in rows] == [None, 1, None]
    assert None in (rows[1]["loss"], rows[1]["norm"])
    assert np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])


def test_too_many_of_them_end_the_run(folder, monkeypatch, capsys):
    spoil(monkeypatch, (2, 4, 5), infinite_gradient)
    assert run(folder, "broken", steps=6, max_skipped=2, checkpoint_every=1) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "training: 2 steps had a loss or gradient that is not finite, the last one 4" in error
    assert [row["step"] for row in lines(folder, "broken")] == [1, 2, 3, 4]
    assert not (folder / "broken" / "student.safetensors").exists()
    monkeypatch.undo()
    assert run(folder, "broken", "--resume", steps=6, max_skipped=3, checkpoint_every=1) == 0
    assert len(lines(folder, "broken")) == 6
    assert trainer.RunFolder(folder / "broken").load().facts["skipped"] == 1


def test_no_usable_label_is_an_error(folder, capsys, monkeypatch):
    monkeypatch.setattr(train.Batches, "load", lambda *args: None)
    assert run(folder, "useless") == 1
    error = capsys.readouterr().err
    assert "training data: expected a window whose label is used, got none (left out:" in error


# --- what is trained


def test_frozen_parts_stay(folder):
    assert run(folder, "frozen", "--freeze", "encoder", "embedding", steps=2) == 0
    before, after = dict(checkpoint.read(folder / "teacher.safetensors").tensors), tensors(folder, "frozen")
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert {name for name in before if name.startswith("encoder.")} <= same
    assert {"decoder.token_embedding.weight", "decoder.positional_embedding"} <= same
    assert "decoder.blocks.0.mlp.0.weight" not in same


def test_gates_and_weights_have_rates_of_their_own(folder):
    assert run(folder, "rates", steps=2, lr=0, gate_lr=1e-2) == 0
    before, after = dict(checkpoint.read(folder / "teacher.safetensors").tensors), tensors(folder, "rates")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(after[name].any() for name in after if name.endswith("gate.weight"))


def test_accumulated_batches_are_one_step(folder):
    still = dict(lr=0, gate_lr=0)
    assert run(folder, "single", steps=2, **still) == 0
    assert run(folder, "double", steps=1, accumulate=2, **still) == 0
    single, (double,) = lines(folder, "single"), lines(folder, "double")
    assert double["seconds"] == pytest.approx(single[0]["seconds"] + single[1]["seconds"])
    low, high = sorted(row["ce"] for row in single)
    assert low < double["ce"] < high


def test_bf16_is_near_float32(folder):
    for precision in ("float32", "bf16"):
        assert run(folder, precision, steps=3, precision=precision) == 0
    losses = np.array([[row["loss"] for row in lines(folder, output)] for output in ("float32", "bf16")])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    assert (losses[1] != losses[0]).all()
