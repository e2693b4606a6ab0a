"""`python -m minigate.train` from outside: SIGKILL, several processes, bad input, the untouched student."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from minigate import checkpoint, kernels, load, train
from minigate.runfolder import Checkpoint, RunFolder
from tests.runs import arguments, make_teacher, mpiexec
from tests.sounds import write_manifest
from tests.toy import toy_model

STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def same_threads():
    before = kernels.threads()
    yield
    kernels.set_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def rows(folder, output):
    return [json.loads(line) for line in (folder / output / "log.jsonl").read_text().splitlines()]


def command(given):
    return [sys.executable, "-m", "minigate.train", *given]


def start(given, **options):
    return subprocess.Popen(command(given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# --- killed


def test_a_killed_run_goes_on_bit_for_bit(folder):
    options = dict(steps=STEPS, checkpoint_every=4, eval_every=1000, outlier_weight=0.1, ema_decay=0.99)
    assert train.main([*arguments(folder, "whole", **options), "--quiet"]) == 0
    given = arguments(folder, "killed", **options)
    after = random.randrange(1, STEPS - 4)  # lines of the log
    process, log = start(given), folder / "killed" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= after):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    resumed = start([*given, "--resume"])
    out, error = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, error
    for name in ("student", "student-ema"):
        whole, killed = (folder / output / f"{name}.safetensors" for output in ("whole", "killed"))
        assert killed.read_bytes() == whole.read_bytes(), f"{name}, killed after {after} lines"
    assert [row["step"] for row in rows(folder, "killed")] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows(folder, "killed")] == [row["loss"] for row in rows(folder, "whole")]
    assert f"step {STEPS}: dev: loss" in error and f"{STEPS}/{STEPS}" in error
    assert out.startswith(f"{folder / 'killed' / 'student.safetensors'}: toy-student, {STEPS} steps")


# --- several processes


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(folder):
    """Batches of 6 s, of one or more windows: in some steps a process has none."""
    options = dict(steps=5, eval_every=5, accumulate=2, outlier_weight=0.3, outlier_tau=1, hidden_weight=0.1)
    assert train.main([*arguments(folder, "one", **options), "--quiet"]) == 0
    launched = mpiexec(2, command(arguments(folder, "two", **options)))
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("toy-student, 5 steps") == 1
    one, two = rows(folder, "one"), rows(folder, "two")
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5]
    for name in ("loss", "kl", "ce", "hidden", "outlier", "norm", "seconds"):
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-4, err_msg=name)
    assert two[4]["dev"]["loss"] == pytest.approx(one[4]["dev"]["loss"], rel=1e-4)
    assert two[4]["dev"]["wer"]["utterances"] == one[4]["dev"]["wer"]["utterances"] == 2
    assert two[4]["dev"]["outliers"]["kurtosis"] == pytest.approx(one[4]["dev"]["outliers"]["kurtosis"], rel=1e-3)
    expected, found = (checkpoint.read(folder / name / "student.safetensors").tensors for name in ("one", "two"))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=5e-4, err_msg=name)


@pytest.mark.slow
def test_an_error_of_several_processes_ends_them_all(folder):
    launched = mpiexec(2, command(arguments(folder, "two-refused", train=folder / "missing.tsv")))
    assert launched.returncode not in (0, None)
    assert "missing.tsv: expected a readable manifest" in launched.stderr and "Traceback" not in launched.stderr


# --- without a step


@pytest.mark.parametrize("kind", ["none", "per_head_mlp"])
def test_no_steps_write_the_untouched_student(folder, capsys, kind):
    given = arguments(folder, f"untouched-{kind}", steps=0, gate=kind, train=None, dev=None)
    assert "--audio-context=variable" in given
    assert train.main(given) == 0
    path = folder / f"untouched-{kind}" / "student.safetensors"
    assert capsys.readouterr().out == f"{path}: toy-student, 0 steps, {path.stat().st_size / 1e6:.1f} MB\n"
    student, teacher = load(path), load(folder / "teacher.safetensors")
    assert student.metadata["audio_context"] == "full" and student.metadata["gate"]["kind"] == kind
    mel = np.random.default_rng(0).standard_normal((1, 8, 3000)).astype(np.float32)
    tokens = np.array([[1, 2, 3]])
    logits = [m.decode(tokens, m.start(m.encode(mel)), all_positions=True) for m in (student, teacher)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
    assert [file.name for file in path.parent.iterdir()] == ["student.safetensors"]


def test_runs_with_one_pack_seed_share_their_labels(tmp_path):
    labels = []
    for number, options in enumerate(({"seed": 0}, {"seed": 1, "pack_seed": 0, "padded_share": 0.3}, {"seed": 1})):
        given = arguments(tmp_path, f"run{number}", steps=3, batch_seconds=100, mel_cache=None, **options)
        assert train.main(given) == 0
        labels.append(len(list((tmp_path / "labels").glob("*/*"))))
    assert labels[0] == labels[1] < labels[2]
    students = [(tmp_path / f"run{n}" / "student.safetensors").read_bytes() for n in range(2)]
    assert students[0] != students[1]


# --- bad input: one line


@pytest.fixture(scope="module")
def finished(folder):
    assert train.main([*arguments(folder, "finished", steps=1), "--quiet"]) == 0
    (folder / "other").mkdir()
    make_teacher(folder / "other" / "teacher.safetensors", seed=1)
    write_manifest(folder / "bad", [0.01, 0.02])
    return folder


def refused(capsys, given, code):
    """The line."""
    assert train.main(given) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[-1].startswith("python -m minigate.train: error: ") and captured.err.endswith("\n")
    return lines[-1].removeprefix("python -m minigate.train: error: ")


@pytest.mark.parametrize(("options", "more", "code", "message"), [
    ({"gate": "door"}, [], 2, "--gate: expected none or per_head"),
    ({"gate_init": 1.5}, [], 2, "--gate-init: expected a number above 0 and below 1, got 1.5"),
    ({"encoder_layers": 3}, [], 2, "--encoder-layers: expected 1 to 1, the teacher's, got 3"),
    ({}, ["--freeze", "nose"], 2, "--freeze: expected some of"),
    ({"outlier_weight": -1}, [], 2, "--outlier-weight: expected a number of at least 0"),
    ({"train": "missing.tsv"}, [], 1, "missing.tsv: expected a readable manifest, got No such file or directory"),
    ({"teacher": "missing.safetensors"}, [], 1, "model: expected a model file"),
])  # fmt: skip
def test_impossible_options(finished, capsys, options, more, code, message):
    assert message in refused(capsys, [*arguments(finished, "never", **options), *more], code)


def test_a_manifest_without_readable_audio(finished, capsys):
    line = refused(capsys, arguments(finished, "never", train=finished / "bad" / "list.tsv"), 1)
    assert "expected at most 5 % of the recordings to be unreadable, got 1 of 1" in line or "got 2 of 2" in line


def test_labels_of_another_teacher(finished, capsys):
    line = refused(capsys, arguments(finished, "never", teacher=finished / "other" / "teacher.safetensors"), 1)
    assert "teacher_sha256: expected" in line and "--label-cache" in line


def test_a_folder_that_holds_a_run(finished, capsys):
    assert "expected a folder without a run" in refused(capsys, arguments(finished, "finished", steps=1), 2)


@pytest.mark.parametrize(("options", "code", "message"), [
    ({"lr": 2e-3}, 2, "--lr: expected 0.001 like the run in"),
    ({"gate": "none"}, 2, "--gate: expected per_head like the run in"),
    ({"seed": 1}, 2, "--seed: expected 0 like the run in"),
    ({"steps": 0}, 2, "--steps: expected 1 at least"),
    ({"teacher": "other/teacher.safetensors", "label_cache": None}, 1, "checkpoint.safetensors: teacher_sha256: exp"),
    ({"train": "dev/list.tsv"}, 1, "training data: expected the windows"),
])  # fmt: skip
def test_a_run_is_not_resumed_as_another(finished, capsys, options, code, message):
    before = (finished / "finished" / "student.safetensors").read_bytes()
    options = {k: finished / v if k in ("teacher", "train") else v for k, v in options.items()}
    given = [*arguments(finished, "finished", **{"steps": 1, **options}), "--resume"]
    assert message in refused(capsys, given, code)
    assert (finished / "finished" / "student.safetensors").read_bytes() == before


def test_a_checkpoint_of_other_dims(finished, capsys):
    """The same teacher by its hash, but other layers: only a changed file can be that."""
    shutil.copytree(finished / "finished", finished / "dims")
    folder = RunFolder(finished / "dims")
    kept = folder.load()
    wrong = {**kept.tensors, "student.decoder.ln.bias": np.zeros(31, np.float32)}
    folder.save(Checkpoint(wrong, kept.facts))
    line = refused(capsys, [*arguments(finished, "dims", steps=1), "--resume"], 1)
    assert "checkpoint.safetensors: tensor decoder.ln.bias: expected shape (32,), got (31,)" in line


def test_a_gated_teacher_is_refused(finished, capsys):
    metadata, tensors = toy_model("per_head", n_audio_ctx=1500, n_vocab=1864)
    checkpoint.write(finished / "gated.safetensors", metadata, tensors)
    line = refused(capsys, arguments(finished, "never", teacher=finished / "gated.safetensors"), 2)
    assert "--teacher: expected a model without gates" in line


def test_ctrl_c_before_the_first_step(finished, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Labeller, "ensure", interrupted)
    assert train.main([*arguments(finished, "early"), "--quiet"]) == 130
    assert not (finished / "early" / "checkpoint.safetensors").exists()
