"""Progress: lines of their own in a file, a bar on a terminal, silence when told."""

import io
import sys

import pytest

from minigate import progress


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_a_file_gets_lines_and_a_terminal_a_bar(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    with progress.bar(3, "work", "piece", done=1) as bar:
        bar.set_postfix_str("going well")
        bar.update()
        progress.say("a word between")
        bar.update()
    text = sys.stderr.getvalue()
    lines = text.splitlines()
    assert "a word between" in lines and "3/3" in lines[-1] and "1/3" in text
    assert ("\r" in text) == terminal
    assert not any(line.strip("\r ") == "" for line in lines) or terminal


def test_silence(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    for total, shown in ((5, False), (0, True)):
        with progress.bar(total, "work", "piece", shown=shown) as bar:
            bar.update()
    assert not sys.stderr.getvalue()


def test_without_tqdm_only_what_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(False))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.bar(2, "work", "piece") as bar:
        bar.set_postfix_str("x")
        bar.update()
    progress.say("done")
    assert sys.stderr.getvalue() == "done\n"
