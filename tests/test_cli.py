"""The command line: what goes where, one line and an exit code for each error, nothing left behind."""

import io
import json
import os
import subprocess
import sys
import warnings
import wave
from types import SimpleNamespace

import numpy as np
import pytest

from minigate import __version__, cli
from minigate.checkpoint import write
from minigate.errors import FileError
from minigate.transcribe import Transcription
from tests.scripted import ENGLISH as T
from tests.scripted import ScriptedModel, multilingual
from tests.toy import toy_model

ASK, NOT = T.encode(" ask not")
BEGIN = T.timestamp_begin


def two_segments(window, attempt, tokens):
    said = [BEGIN, ASK, BEGIN + 50, BEGIN + 50, NOT, BEGIN + 75]
    n = len(tokens) - tokens.index(T.sot) - 1
    return {said[n] if n < len(said) else T.eot: 30.0}


def in_german(window, attempt, tokens):
    many = multilingual()
    begin = many.timestamp_begin
    following = {many.sot: many.language_token("de"), many.transcribe: begin, begin: ASK, ASK: many.eot}
    return {following[tokens[-1]]: 30.0}


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """Every name is a model that hears " ask", " not"; "german" one that is multilingual."""

    def load(name, threads):
        if name == "missing":
            raise FileError("model: expected a model file, got 'missing'")
        return ScriptedModel(in_german, multilingual()) if name == "german" else ScriptedModel(two_segments)

    monkeypatch.setattr(cli, "load", load)


@pytest.fixture
def sound(tmp_path):
    """Writes two seconds of noise under a name -> its path."""

    def make(name="a.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(0).normal(0, 1000, 32000).astype("<i2")
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(noise.tobytes())
        return str(path)

    return make


def run(capsys, *arguments):
    """-> exit code, standard output, standard error."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def test_text_to_standard_output(capsys, sound):
    assert run(capsys, sound()) == (0, "ask\nnot\n", "")
    code, out, err = run(capsys, sound(), "--format", "srt")
    assert (code, err) == (0, "") and out.startswith("1\n00:00:00,000 --> 00:00:01,000\nask\n\n2\n")
    code, out, err = run(capsys, sound(), sound("b.wav"), "--format", "json")
    results = [json.loads(line) for line in out.splitlines()]
    assert [r["text"] for r in results] == [" ask not"] * 2 and len(results[0]["segments"]) == 2


def test_segments_appear_as_they_are_found(capsys, sound, monkeypatch):
    found = []
    by_window = Transcription.by_window

    def watched(self):
        for segments in by_window(self):
            yield segments
            found.append(capsys.readouterr().out)

    monkeypatch.setattr(Transcription, "by_window", watched)
    run(capsys, sound())
    assert found == ["ask\nnot\n"]


def test_files_in_a_folder(capsys, sound, tmp_path):
    folder = tmp_path / "out" / "deep"
    assert run(capsys, sound(), sound("b.x.wav"), "--output-dir", str(folder), "--format", "all") == (0, "", "")
    assert sorted(os.listdir(folder)) == sorted(f"{s}.{e}" for s in ("a", "b.x") for e in cli.FORMATS)
    assert (folder / "a.txt").read_text() == "ask\nnot\n"
    assert json.loads((folder / "b.x.json").read_text())["language"] == "en"


def test_standard_input(capsys, monkeypatch):
    noise = np.random.default_rng(0).normal(0, 1000, 16000 * 2).astype("<i2").tobytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(noise)))
    assert run(capsys, "-") == (0, "ask\nnot\n", "")


def test_a_failing_file_does_not_stop_the_others(capsys, sound, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    code, out, err = run(capsys, str(tmp_path / "bad.wav"), sound(), str(tmp_path / "none.wav"))
    assert code == 1 and out == "ask\nnot\n"
    lines = err.splitlines()
    assert len(lines) == 2 and "bad.wav: expected a sound file" in lines[0] and "none.wav: expected" in lines[1]
    folder = tmp_path / "out"
    assert run(capsys, str(tmp_path / "bad.wav"), "--output-dir", str(folder))[0] == 1 and os.listdir(folder) == []


@pytest.mark.parametrize("arguments, code, message", [
    ((), 2, "the following arguments are required: FILE"),
    (("--format", "doc"), 2, "argument --format: invalid choice: 'doc'"),
    (("--format", "all"), 2, "--format: expected --output-dir with all"),
    (("b/a.mp3", "--output-dir", "out"), 2, "FILE: expected names that differ"),
    (("--output-dir", "/dev/null/x"), 2, "--output-dir: expected a folder"),
    (("--beam-size", "0"), 2, "--beam-size: expected a whole number from 1 to 100, got 0"),
    (("--language", "klingon"), 2, "--language: expected one of en zh"),
    (("--language", "de"), 2, "--language: expected en, since the model is English-only, got 'de'"),
    (("--task", "translate"), 2, "--task: expected transcribe, since the model is English-only"),
    (("--suppress-tokens", "999999"), 2, "--suppress-tokens: expected ids below"),
    (("--model", "missing"), 1, "model: expected a model file, got 'missing'"),
    (("--unknown",), 2, "unrecognized arguments: --unknown"),
])  # fmt: skip
def test_errors_take_one_line(capsys, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *(["a.wav"] if arguments else []), *arguments)
    assert got == code and out == ""
    assert err.startswith(f"{cli.PROG}: error: {message}") and err.count("\n") == 1
    assert os.listdir(tmp_path) in ([], ["out"])


def test_ctrl_c_leaves_nothing(capsys, sound, tmp_path, monkeypatch):
    by_window = Transcription.by_window

    def interrupted(self):
        yield next(by_window(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(Transcription, "by_window", interrupted)
    folder = tmp_path / "out"
    assert run(capsys, sound(), "--output-dir", str(folder), "--format", "all") == (130, "", "")
    assert os.listdir(folder) == []
    assert run(capsys, sound())[0] == 130


def test_detected_language_is_told_unless_quiet(capsys, sound):
    path = sound()
    assert run(capsys, path, "--model", "german") == (0, "ask\n", f"{path}: language de, german (100%)\n")
    assert run(capsys, path, "--model", "german", "--quiet") == (0, "ask\n", "")
    assert run(capsys, path, "--model", "german", "--language", "German") == (0, "ask\n", "")


def test_warnings_take_one_line(capsys, sound, monkeypatch):
    by_window = Transcription.by_window

    def warned(self):
        warnings.warn("a.wav: cut off:\n0.5 of 2 s could be read", stacklevel=1)
        yield from by_window(self)

    monkeypatch.setattr(Transcription, "by_window", warned)
    line = f"{cli.PROG}: warning: a.wav: cut off: 0.5 of 2 s could be read\n"
    assert run(capsys, sound()) == (0, "ask\nnot\n", line)
    assert run(capsys, sound(), "--quiet") == (0, "ask\nnot\n", "")


def test_a_bar_on_a_terminal_only(capsys, sound, monkeypatch):
    pytest.importorskip("tqdm")
    assert run(capsys, sound())[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, out, err = run(capsys, sound())
    assert out == "ask\nnot\n" and "2/2 s" in err
    assert run(capsys, sound(), "--quiet")[2] == ""


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"minigate {__version__}\n", "")
    code, out, err = run(capsys, "--help")
    assert code == 0 and "--no-condition-on-previous-text" in out and "(default: txt)" in out


def test_help_tells_what_standard_input_lacks(capsys):
    assert "clamped with the running maximum" in " ".join(run(capsys, "--help")[1].split())


def test_too_little_memory_for_one_file_does_not_stop_the_others(capsys, sound, monkeypatch):
    by_window, calls = Transcription.by_window, []

    def first_too_big(self):
        calls.append(self)
        if len(calls) == 1:
            raise MemoryError("kernels: no memory for scratch")
        return by_window(self)

    monkeypatch.setattr(Transcription, "by_window", first_too_big)
    path = sound()
    line = f"{cli.PROG}: error: {path}: expected enough memory, got kernels: no memory for scratch\n"
    assert run(capsys, path, sound("b.wav")) == (1, "ask\nnot\n", line)


def test_no_standard_output(capsys, sound, tmp_path, monkeypatch):
    path = sound()
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert cli.main([path]) == 1
        assert cli.main([path, "--output-dir", str(tmp_path / "out")]) == 0  # which needs none
    line = "error: standard output: expected an open stream, got a closed one\n"
    assert capsys.readouterr().err == f"{cli.PROG}: {line}" and os.listdir(tmp_path / "out") == ["a.txt"]


def test_no_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    line = f"{cli.PROG}: error: standard input: expected raw PCM, got a closed stream\n"
    assert run(capsys, "-") == (1, "", line)


@pytest.mark.parametrize("flags, isa, said", [
    ((), "foo", "MINIGATE_ISA: expected one of"), (("--threads", "0"), "", "--threads: expected 1 to"),
])  # fmt: skip
def test_what_load_refuses_comes_before_any_output(flags, isa, said):
    """In a process of its own, since the instruction set is chosen once; vtt has a header that comes early."""
    command = [sys.executable, "-m", "minigate.transcribe", "none.wav", "--format", "vtt", "--model", "none", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MINIGATE_ISA": isa})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and said in done.stderr


def test_as_a_module_into_a_closed_pipe(sound, tmp_path):
    """A random model of Whisper's window and a small vocabulary."""
    model = str(tmp_path / "toy.safetensors")
    write(model, *toy_model(n_mels=80, n_audio_ctx=1500, n_vocab=256 + 1608, n_text_ctx=20))
    command = [sys.executable, "-m", "minigate.transcribe", sound(), "--model", model, "--temperature", "0",
               "--threads", "1", "--format", "tsv"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("start\tend\ttext\n")
    assert "Traceback" not in done.stderr and "RuntimeWarning" not in done.stderr
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Exception" not in done.stderr
