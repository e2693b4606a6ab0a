"""A report's file: whole or as before, and refused before the work where it cannot be written."""

import json
import os
from pathlib import Path

import pytest

from minigate.errors import FileError
from minigate.report import check_target, sha256, write_json


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"wer": 0.5})
    with pytest.raises(ValueError):
        write_json(path, {"wer": float("nan")})
    assert json.loads(path.read_text()) == {"wer": 0.5} and [p.name for p in tmp_path.iterdir()] == ["out.json"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="expected a file that can be written"):
        write_json(tmp_path / "folder", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "out.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "out.json"
    path.write_text("older")
    write_text = Path.write_text

    def half(self, text, **options):
        write_text(self, text[: len(text) // 2], **options)
        raise error

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises((KeyboardInterrupt, FileError)):
        write_json(path, {"wer": 0.5})
    assert path.read_text() == "older" and os.listdir(tmp_path) == ["out.json"]


def test_a_name_that_is_not_utf8(tmp_path):
    report = {"manifest": "\udce4.tsv", "text": "zwölf"}
    write_json(tmp_path / "out.json", report)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == report


def test_targets(tmp_path):
    (tmp_path / "old.json").write_text("older")
    for fine in (tmp_path / "new.json", tmp_path / "old.json"):
        check_target(fine)
    os.mkfifo(tmp_path / "pipe")
    for wrong, said in [
        (tmp_path, "expected a regular file, got .*, a folder"),
        (tmp_path / "pipe", "expected a regular file, got .*, a device or pipe"),
        (tmp_path / "no" / "out.json", "expected a file in a folder that can be written to"),
        (tmp_path / "old.json" / "out.json", "expected a file that can be written, got .*: Not a directory"),
        (tmp_path / ("x" * 300), "expected a file that can be written, got .*: File name too long"),
    ]:
        with pytest.raises(FileError, match=f"^--json: {said}"):
            check_target(wrong)
    assert sorted(os.listdir(tmp_path)) == ["old.json", "pipe"] and (tmp_path / "old.json").read_text() == "older"


def test_a_read_only_target(tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("older")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "old.json")
    with pytest.raises(FileError, match="^--json: expected a file that can be written, got .*, which is read-only$"):
        check_target(tmp_path / "old.json")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")  # FIPS 180-2's example
