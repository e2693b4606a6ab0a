"""A run's folder: whole checkpoints, cut logs, and runs that are not overwritten."""

import errno
import json
import os

import numpy as np
import pytest

from minigate import tensorfile
from minigate.errors import FileError, UsageError
from minigate.runfolder import Checkpoint, RunFolder

TENSORS = {"student.a": np.arange(3, dtype=np.float32), "optimizer.steps": np.array(7)}


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.prepare(resume=False)
    yield made
    made.close()


def test_a_checkpoint_comes_back(folder):
    assert folder.load() is None
    folder.save(Checkpoint(TENSORS, {"step": 7, "order": {"epoch": 1}}))
    found = folder.load()
    assert found.facts["step"] == 7 and found.facts["order"] == {"epoch": 1}
    assert found.part("student.")["a"].tolist() == [0, 1, 2] and found.part("optimizer.")["steps"] == 7


@pytest.mark.parametrize("pairs", [{}, {"format": "minigate", "minigate": "{}"}, {"format": "minigate training"},
                                   {"format": "minigate training", "minigate": "{"},
                                   {"format": "minigate training", "minigate": '{"format_version": 99}'}])  # fmt: skip
def test_other_files_are_no_checkpoints(folder, pairs):
    tensorfile.write(folder.checkpoint, TENSORS, pairs)
    with pytest.raises(FileError, match="expected a checkpoint of this version"):
        folder.load()


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "log.jsonl", "student.safetensors",
                                  "student-ema.safetensors"])  # fmt: skip
def test_a_folder_with_a_run_is_refused(folder, name):
    (folder.path / "labels").mkdir()
    folder.prepare(resume=False)
    (folder.path / name).touch()
    with pytest.raises(UsageError, match=f"--output: expected a folder without a run, got .*{name}.*--resume"):
        folder.prepare(resume=False)
    folder.prepare(resume=True)


def test_what_a_killed_process_left_is_removed(folder):
    left, other = folder.path / ".checkpoint.safetensors.1f.tmp", folder.path / ".other.tmp"
    left.touch()
    other.touch()
    folder.prepare(resume=False)
    assert not left.exists() and other.exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be used as a folder: Not a directory"):
        RunFolder(tmp_path / "file" / "run").prepare(resume=False)


def steps(folder):
    return [json.loads(line)["step"] for line in folder.log_file.read_text().splitlines()]


def test_lines_behind_the_checkpoint_and_half_lines_are_cut(folder):
    folder.open_log(0)
    for step in range(1, 6):
        folder.log({"step": step, "loss": 0.5})
    folder.close()
    with folder.log_file.open("a") as file:
        file.write('{"step": 3, "lo')
    folder.open_log(3)
    assert steps(folder) == [1, 2, 3]
    folder.log({"step": 4, "loss": 0.25})
    assert steps(folder) == [1, 2, 3, 4]
    folder.close()
    folder.log_file.write_bytes(folder.log_file.read_bytes() + b'{"other": 1}\nnonsense\n\xff\n{"step": 4}')
    folder.open_log(4)
    assert steps(folder) == [1, 2, 3, 4]


def test_a_full_disk_leaves_the_last_checkpoint_whole(folder, monkeypatch):
    folder.save(Checkpoint(TENSORS, {"step": 7}))

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="checkpoint.safetensors: cannot be written: No space left on device"):
        folder.save(Checkpoint({**TENSORS, "student.a": np.zeros(3, np.float32)}, {"step": 8}))
    assert folder.load().facts["step"] == 7
    assert [file.name for file in folder.path.iterdir()] == ["checkpoint.safetensors"]


def test_numbers_that_json_has_not_are_null(folder):
    folder.open_log(0)
    folder.log({"step": 1, "loss": float("nan"), "dev": {"loss": float("inf"), "kl": 0.5, "wer": None}})
    (line,) = folder.log_file.read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": None, "dev": {"loss": None, "kl": 0.5, "wer": None}}


def test_a_log_that_cannot_be_written(folder):
    folder.open_log(0)
    folder._log.close()
    folder._log = open("/dev/full", "w")
    with pytest.raises(FileError, match="log.jsonl: cannot be written: No space left on device"):
        folder.log({"step": 1})
