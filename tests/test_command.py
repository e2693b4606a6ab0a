"""Each error is one line and an exit code, also where a stream is closed, full, or read by nobody."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from minigate import command
from minigate.errors import FileError, UsageError
from minigate.options import ArgumentParser


def raising(error):
    def run():
        raise error

    return run

ROOT = str(Path(__file__).parent.parent)


@pytest.mark.parametrize("error, code, said", [
    (UsageError("--n: expected 1,\ngot 2"), 2, "prog: error: --n: expected 1, got 2\n"),
    (FileError("a.wav: expected sound, got none"), 1, "prog: error: a.wav: expected sound, got none\n"),
    (MemoryError(), 1, "prog: error: expected enough memory, got none left\n"),
    (MemoryError("Unable to allocate 9 GiB"), 1, "prog: error: expected enough memory, got Unable to allocate 9 GiB\n"),
    (OSError(5, "I/O error"), 1, "prog: error: [Errno 5] I/O error\n"),
    (FileNotFoundError(2, "No such file", "x"), 1, "prog: error: x: No such file\n"),
    (KeyboardInterrupt(), 130, ""), (BrokenPipeError(), 141, ""), (SystemExit(2), 2, ""), (SystemExit(), 0, ""),
])  # fmt: skip
def test_errors(capsys, error, code, said):
    assert command.run_main("prog", raising(error)) == code
    assert capsys.readouterr() == ("", said)


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run_main("prog", raising(ZeroDivisionError()))


def test_result_help_and_warnings(capsys):
    def run():
        warnings.warn("a.wav:\ncut off", stacklevel=1)
        command.show("zwölf")
        return 0

    assert command.run_main("prog", run) == 0
    assert capsys.readouterr() == ("zwölf\n", "prog: warning: a.wav: cut off\n")
    assert command.run_main("prog", lambda: ArgumentParser(prog="prog").parse_args(["--help"])) == 0
    assert capsys.readouterr().out.startswith("usage: prog")


def test_memory_of_one_file():
    with pytest.raises(FileError, match=r"^a.wav: expected enough memory, got no space$"):
        with command.memory_as_file_error("a.wav"):
            raise MemoryError("no space")


SHOW = """
import sys
from minigate.command import run_main, say, show
sys.exit(run_main("prog", lambda: show("result") or 0))
"""
PRINT = SHOW.replace('show("result") or 0', 'print("result") or 0')  # still in the buffer when run() returns
SAY = SHOW.replace('show("result") or 0', 'say("prog", "line") or 3')


def shell(script: str, redirect: str, tmp_path) -> tuple[int, str, str]:
    """-> exit code, standard output, standard error of a Python script under a shell's redirection."""
    env = {**os.environ, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", script], cwd=tmp_path,
                          capture_output=True, text=True, env=env)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", [SHOW, PRINT])
def test_a_full_standard_output(script, tmp_path):
    code, _, err = shell(script, '> "$PWD/out"', tmp_path)
    assert (code, err, (tmp_path / "out").read_text()) == (0, "", "result\n")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n{script}"
    code, _, err = shell(limited, '> "$PWD/out"', tmp_path)
    assert (code, err) == (1, "prog: error: standard output: expected a file that can be written, got File too large\n")


def test_closed_streams(tmp_path):
    closed = "prog: error: standard output: expected an open stream, got a closed one\n"
    assert shell(SHOW, ">&-", tmp_path) == (1, "", closed)
    assert shell(SAY, "2>&-", tmp_path) == (3, "", "")  # the line goes nowhere, not to standard output


@pytest.mark.parametrize("script, stream, code", [(SHOW, "stdout", 141), (PRINT, "stdout", 141), (SAY, "stderr", 3)])
def test_a_reader_that_has_gone(script, stream, code):
    read, write_end = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write_end}
    done = subprocess.run([sys.executable, "-c", script], text=True, cwd=ROOT, **streams)
    os.close(write_end)
    assert done.returncode == code and not done.stdout and not done.stderr
