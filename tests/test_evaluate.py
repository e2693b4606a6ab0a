"""The evaluation from manifest to JSON, on a model whose answers are known, and once on the embedded one."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from types import SimpleNamespace

import numpy as np
import pytest

from minigate import audio, evaluate, wer
from minigate.errors import FileError
from minigate.manifest import read_manifest
from minigate.official import official_vocabulary
from minigate.result import Result
from minigate.tokenizer import Tokenizer
from tests import check

ROWS = [  # path, seconds, text, source, what the model hears
    ("a.wav", 1.0, "One two three four.", "clean", "one two three for"),
    ("b.wav", 2.0, "Yes!", "clean", "yes yes yes yes"),
    ("c.wav", 0.5, "It's a \"test\" of words.", "noisy", "its a test words"),
    ("d.wav", 0.5, "", "noisy", "whatever"),
]
TOTALS = {"substitutions": 2, "deletions": 1, "insertions": 3, "words": 10}  # S: four, it's; D: of; I: yes three times


class FakeModel:
    """Reads the recording and answers from a table."""

    name = "fake"
    metadata = {"quantization": None, "suppress_tokens": None}
    knows_prompts = False
    dims = SimpleNamespace(n_audio_ctx=1500, n_text_ctx=448)
    tokenizer = Tokenizer(official_vocabulary(51864), 51864)

    def __init__(self, heard: dict[str, str]):
        self.heard = heard
        self.asked = []

    def transcribe(self, path, on_progress, **options):
        seconds = len(audio.read_audio(path)) / audio.SAMPLE_RATE
        self.asked.append(options)
        on_progress(seconds, seconds)
        return Result(f" {self.heard[path.name]} ", [], "en")


@pytest.fixture(autouse=True)
def simple_normaliser(monkeypatch):
    monkeypatch.setattr(wer, "load_normaliser", lambda: (wer.SIMPLE, wer.normalise_simple))


def write_wav(path, seconds):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, audio.SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(np.zeros(int(seconds * audio.SAMPLE_RATE), np.int16).tobytes())


@pytest.fixture
def manifest(tmp_path):
    lines = ["path\ttext\tsource\tspeaker"]
    for name, seconds, text, source, _ in ROWS:
        write_wav(tmp_path / name, seconds)
        lines.append(f"{name}\t{text}\t{source}\tx")
    path = tmp_path / "list.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def model(monkeypatch, tmp_path):
    fake = FakeModel({row[0]: row[4] for row in ROWS})
    (tmp_path / "fake.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(evaluate, "find", lambda name: tmp_path / "fake.safetensors")
    monkeypatch.setattr(evaluate, "load", lambda path, threads=None: fake)
    return fake


def run(manifest, *arguments):
    return evaluate.main(["fake", str(manifest), "--quiet", *map(str, arguments)])


def report_of(manifest, name="out.json", *arguments):
    path = manifest.parent / name
    assert run(manifest, "--json", path, *arguments) == 0
    return json.loads(path.read_text())


def test_report(manifest, model):
    report = report_of(manifest)
    assert {name: report[name] for name in TOTALS} == TOTALS
    assert report["wer"] == 0.6 and report["wer_capped"] == 0.4  # b's three errors count as one
    assert report["ci95"][0] <= 0.6 <= report["ci95"][1] and report["ci95_capped"][0] <= 0.4 <= report["ci95_capped"][1]
    assert (report["scored"], report["without_text"], report["failed"]) == (3, 1, [])
    assert report["seconds"] == 4.0 and 0 < report["rtf"] == report["elapsed_s"] / 4 and report["peak_mb"] > 10
    assert (report["normaliser"], report["model"]["name"]) == ("simple", "fake")
    assert report["model"]["sha256"].startswith("9a129038d9a0") and report["versions"]["numpy"] == np.__version__


def test_utterances(manifest, model):
    utterances = report_of(manifest)["utterances"]
    assert [u["path"] for u in utterances] == [row[0] for row in ROWS]
    assert utterances[0]["reference"] == "One two three four." and utterances[0]["hypothesis"] == "one two three for"
    assert (utterances[0]["errors"], utterances[0]["words"], utterances[0]["seconds"]) == (1, 4, 1.0)
    assert utterances[3]["reference"] is utterances[3]["errors"] is None and utterances[3]["hypothesis"] == "whatever"


def test_figures_by_source(manifest, model):
    report = report_of(manifest)
    clean, noisy = report["sources"]["clean"], report["sources"]["noisy"]
    assert (clean["wer"], clean["wer_capped"], clean["words"], clean["scored"]) == (4 / 5, 2 / 5, 5, 2)
    assert (noisy["wer"], noisy["scored"], noisy["without_text"], noisy["seconds"]) == (2 / 5, 1, 1, 1.0)
    assert {"ci95", "ci95_capped", "rtf", "substitutions", "deletions", "insertions"} < clean.keys()


def test_options_and_their_defaults(manifest, model):
    options = report_of(manifest)["options"]
    assert (options["temperature"], options["language"], options["without_timestamps"]) == ([0.0], "en", False)
    report = report_of(manifest, "beam.json", "--beam-size", 3, "--without-timestamps", "--initial-prompt", "a b",
                       "--batch-size", 8)
    assert [report["options"][name] for name in ("beam_size", "initial_prompt", "batch_size")] == [3, "a b", 8]
    asked = model.asked[-1]
    assert (asked["beam_size"], asked["without_timestamps"], asked["batch_size"]) == (3, True, 8)


def test_from_python(manifest, model):
    told = []
    (manifest.parent / "a.wav").unlink()
    report = evaluate.evaluate(model, read_manifest(manifest), failed=lambda row, error: told.append(row.line))
    options = {"language": "en", "temperature": 0.0, "condition_on_previous_text": False}  # as the model was trained
    assert model.asked[0] == options == report["options"] and told == [2]


def test_interrupt(manifest, model, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeModel, "transcribe", stop)
    assert run(manifest, "--json", manifest.parent / "out.json") == 130
    assert not (manifest.parent / "out.json").exists()


def test_table(manifest, model, capsys):
    assert run(manifest) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split()[:5] == ["source", "scored", "words", "WER", "%"]
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["clean", "2", "5", "80.00"], ["noisy", "1", "5", "40.00"], ["all", "3", "10", "60.00"]]
    assert "normaliser simple" in out and "1 without text, not scored" in out


def test_limit(manifest, model):
    assert [u["path"] for u in report_of(manifest, "out.json", "--limit", 2)["utterances"]] == ["a.wav", "b.wav"]


def test_unreadable_rows_are_counted_and_the_rest_is_done(manifest, model, capsys):
    (manifest.parent / "a.wav").write_bytes(b"no sound")
    (manifest.parent / "c.wav").unlink()
    assert run(manifest, "--json", manifest.parent / "out.json") == 1
    report = json.loads((manifest.parent / "out.json").read_text())
    assert [(f["path"], f["source"]) for f in report["failed"]] == [("a.wav", "clean"), ("c.wav", "noisy")]
    assert report["words"] == 1 and len(report["utterances"]) == 2
    captured = capsys.readouterr()
    assert "2 that cannot be read" in captured.out
    said = captured.err.splitlines()
    assert len(said) == 2 and said[0].startswith("python -m minigate.evaluate: error: ")
    assert "list.tsv, line 2: " in said[0] and "a.wav: expected a sound file" in said[0]


def test_no_readable_row(manifest, model, capsys):
    for row in ROWS:
        (manifest.parent / row[0]).unlink()
    assert run(manifest, "--json", manifest.parent / "out.json") == 1
    assert "expected a recording that can be read, got none of 4" in capsys.readouterr().err
    assert not (manifest.parent / "out.json").exists()


def test_no_row_with_text(manifest, model):
    manifest.write_text("path\na.wav\n")
    report = report_of(manifest)
    assert report["wer"] is report["wer_capped"] is report["ci95"] is None and report["without_text"] == 1


def test_compare(manifest, model, capsys):
    report_of(manifest, "one.json")
    model.heard["a.wav"] = "one two three four"
    model.heard["b.wav"] = "yes"
    report = report_of(manifest, "two.json", "--compare", manifest.parent / "one.json")
    found = report["comparison"]
    assert (found["wer"], found["wer_capped"], found["scored"]) == (-0.4, -0.2, 3)
    assert found["ci95"][0] <= -0.4 <= found["ci95"][1] <= 0 and found["ci95_capped"][0] <= -0.2
    assert found["sources"]["clean"]["wer"] == -0.8 and found["sources"]["noisy"] == {
        "wer": 0.0, "ci95": [0.0, 0.0], "wer_capped": 0.0, "ci95_capped": [0.0, 0.0], "scored": 1}
    assert "difference to" in capsys.readouterr().out


@pytest.mark.parametrize("change, said", [
    (lambda r: r.update(normaliser="whisper-english"), "normaliser: expected simple as here, got whisper-english"),
    (lambda r: r["utterances"].pop(0), "got 1 only here and 0 only there, such as a.wav"),
    (lambda r: r["utterances"][0].update(path="x.wav"), "got 1 only here and 1 only there, such as a.wav"),
    (lambda r: r["utterances"][0].update(reference="One"), "a.wav: expected the reference 'One two three four.'"),
    (lambda r: r["utterances"][0].update(words=-1), "expected results of python -m minigate.evaluate"),
    (lambda r: r["utterances"][0].update(errors=None, words=None), "expected results of python -m minigate.evaluate"),
    (lambda r: r.pop("normaliser"), "expected results of python -m minigate.evaluate"),
    (lambda r: r.update(utterances=3), "expected results of python -m minigate.evaluate"),
    (lambda r: r.update(format="other"), "expected results of python -m minigate.evaluate"),
])
def test_what_cannot_be_compared_is_refused_before_the_work(manifest, model, capsys, change, said):
    report = report_of(manifest, "one.json")
    change(report)
    (manifest.parent / "one.json").write_text(json.dumps(report))
    model.asked.clear()
    assert run(manifest, "--compare", manifest.parent / "one.json") == 1
    error = capsys.readouterr().err
    assert said in error and "one.json" in error and error.count("\n") == 1 and not model.asked


def test_other_word_counts_mean_another_normaliser(manifest, model, capsys):
    """Seen only when the words are counted; the results themselves are kept."""
    report = report_of(manifest, "one.json")
    report["utterances"][0]["words"] = 5
    (manifest.parent / "one.json").write_text(json.dumps(report))
    assert run(manifest, "--compare", manifest.parent / "one.json", "--json", manifest.parent / "two.json") == 1
    assert "a.wav: expected the reference" in capsys.readouterr().err
    assert "comparison" not in json.loads((manifest.parent / "two.json").read_text())


def test_the_same_recordings_lost_on_both_sides_can_be_compared(manifest, model):
    (manifest.parent / "a.wav").unlink()
    one, two = manifest.parent / "one.json", manifest.parent / "two.json"
    assert run(manifest, "--json", one) == 1
    assert run(manifest, "--json", two, "--compare", one) == 1
    assert json.loads(two.read_text())["comparison"]["scored"] == 2


def test_bad_files_and_arguments(manifest, model, capsys):
    folder = manifest.parent
    (folder / "text.json").write_text("{")
    for arguments, code, said in [
        ((folder / "none.tsv",), 1, "expected a readable manifest"),
        ((manifest, "--json", folder / "no" / "out.json"), 1, "--json: expected a file in a folder that can"),
        ((manifest, "--compare", folder / "none.json"), 1, "none.json: expected a readable file"),
        ((manifest, "--compare", folder / "text.json"), 1, "text.json: expected results of"),
        ((manifest, "--limit", 0), 2, "--limit: expected a whole number of at least 1, got 0"),
        ((manifest, "--language", "de"), 2, "--language: expected en, since the model is English-only"),
        ((manifest, "--beam-size", 0), 2, "--beam-size: expected a whole number from 1 to 100, got 0"),
    ]:
        assert run(*arguments) == code
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not model.asked


def test_a_json_target_is_refused_before_the_work(manifest, model, capsys):
    assert run(manifest, "--json", manifest.parent) == 1
    assert "--json: expected a regular file, got" in capsys.readouterr().err and not model.asked


def test_the_table_comes_before_the_file_and_neither_takes_the_other_along(manifest, model, capsys, monkeypatch):
    target = manifest.parent / "out.json"

    def fail(path, report):
        assert "WER" in capsys.readouterr().out
        raise FileError("out.json: expected a file that can be written, got No space left on device")

    with monkeypatch.context() as full:
        full.setattr(evaluate, "write_json", fail)
        assert run(manifest, "--json", target) == 1
    assert "No space left" in capsys.readouterr().err

    def gone(text):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "show", gone)
    assert run(manifest, "--json", target) == 141 and json.loads(target.read_text())["words"] == 10


def test_too_little_memory_for_one_recording(manifest, model, capsys, monkeypatch):
    transcribe = FakeModel.transcribe

    def too_big(self, path, on_progress, **options):
        if path.name == "a.wav":
            raise MemoryError
        return transcribe(self, path, on_progress, **options)

    monkeypatch.setattr(FakeModel, "transcribe", too_big)
    assert run(manifest, "--json", manifest.parent / "out.json") == 1
    assert "a.wav: expected enough memory, got none left" in capsys.readouterr().err
    assert len(json.loads((manifest.parent / "out.json").read_text())["utterances"]) == 3


def test_no_standard_output(manifest, model, capsys, monkeypatch):
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert run(manifest) == 1
    assert "standard output: expected an open stream" in capsys.readouterr().err and not model.asked


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss survives exec on Linux")
def test_peak_memory_is_not_that_of_the_process_before():
    child = "from minigate.evaluate import peak_mb; print(peak_mb())"
    parent = f"import subprocess, sys; fat = b'x' * 500_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, cwd=check.ROOT)
    assert 10 < float(done.stdout) < 400


@pytest.mark.skipif(not check.EMBEDDED.is_file(), reason="the embedded model is not there")
def test_embedded_model_on_the_sample(tmp_path):
    """The command as a user gives it; the words are those that golden files have for the sample."""
    text = check.golden_json("embedded")["transcribe"]["sample"]["text"]
    (tmp_path / "list.tsv").write_text(f"path\ttext\n{check.SAMPLE}\t{text.strip()}\n")
    command = [sys.executable, "-m", "minigate.evaluate", check.EMBEDDED.stem, tmp_path / "list.tsv", "--json",
               tmp_path / "out.json", "--threads", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=check.ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["wer"] <= 0.05 and report["words"] > 20 and report["threads"] == 2
    assert report["options"]["temperature"] == [0.0] and "all" in done.stdout
