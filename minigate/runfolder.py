"""The folder of a training run: checkpoint, log and results, and what is there when a run begins.

    checkpoint.safetensors    all that a run needs to go on; replaced whole, so there is always a good one
    log.jsonl                 a line of JSON for each step
    student.safetensors       the result, a model file; student-ema.safetensors beside it when asked for
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigate import tensorfile
from minigate.errors import FileError, UsageError

FORMAT = "minigate training"
FORMAT_VERSION = 1


def finite(value):
    """value with None for the numbers that JSON has not, in dicts too."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after a step. tensors: "student.NAME" and "optimizer.NAME"; facts: the rest, as JSON."""

    tensors: Mapping[str, np.ndarray]
    facts: dict

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """-> the tensors whose names begin with it, without it."""
        return {name.removeprefix(prefix): self.tensors[name] for name in self.tensors if name.startswith(prefix)}


class RunFolder:
    """DIR of --output."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint, self.log_file = path / "checkpoint.safetensors", path / "log.jsonl"
        self.student, self.student_ema = path / "student.safetensors", path / "student-ema.safetensors"
        self._log = None

    def prepare(self, resume: bool) -> None:
        """Make the folder; remove what a killed process left half written. UsageError when it holds a run that is not
        to be resumed, FileError when it cannot be made."""
        held = [f.name for f in (self.checkpoint, self.log_file, self.student, self.student_ema) if f.exists()]
        if held and not resume:
            raise UsageError(f"--output: expected a folder without a run, got {self.path} with {', '.join(held)}; "
                             "--resume continues it")  # fmt: skip
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in (self.checkpoint, self.student, self.student_ema):
                for left_over in self.path.glob(f".{file.name}.*.tmp"):
                    left_over.unlink()
        except OSError as error:
            raise FileError(f"{self.path}: cannot be used as a folder: {error.strerror or error}") from None

    # --- checkpoint

    def load(self) -> Checkpoint | None:
        """-> the checkpoint, or None where there is none. FileError when it is not one of ours."""
        if not self.checkpoint.exists():
            return None
        pairs, tensors = tensorfile.read(self.checkpoint)
        try:
            facts = json.loads(pairs["minigate"]) if pairs.get("format") == FORMAT else None
        except (KeyError, ValueError):
            facts = None
        if not isinstance(facts, dict) or facts.get("format_version") != FORMAT_VERSION:
            raise FileError(f"{self.checkpoint}: expected a checkpoint of this version, got something else")
        return Checkpoint(tensors, facts)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint, after the log's lines are on disk. FileError; the one before stays whole then."""
        if self._log:
            self._write_log(lambda: os.fsync(self._log.fileno()))
        facts = {"format_version": FORMAT_VERSION, **checkpoint.facts}
        tensorfile.write(self.checkpoint, checkpoint.tensors, {"format": FORMAT, "minigate": json.dumps(facts)})

    # --- log

    def open_log(self, last_step: int) -> None:
        """Go on writing after the lines of steps 1 to last_step; later ones, and half a line, are cut."""
        kept = []
        with suppress(FileNotFoundError):
            for line in self.log_file.read_bytes().splitlines(keepends=True):
                with suppress(ValueError, KeyError, TypeError):
                    if line.endswith(b"\n") and json.loads(line)["step"] <= last_step:
                        kept.append(line)
        temporary = self.path / ".log.jsonl.tmp"
        try:
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, self.log_file)
            self._log = open(self.log_file, "a", encoding="utf-8")
        except OSError as error:
            raise FileError(f"{self.log_file}: cannot be written: {error.strerror or error}") from None

    def log(self, line: dict) -> None:
        """Add a line; a number that is not finite becomes null. FileError for a full disk."""
        text = json.dumps(finite(line), allow_nan=False)
        self._write_log(lambda: (self._log.write(text + "\n"), self._log.flush()))

    def close(self) -> None:
        if self._log:
            with suppress(OSError):  # a full disk: said when the line was written
                self._log.close()
            self._log = None

    def _write_log(self, write) -> None:
        try:
            write()
        except OSError as error:
            raise FileError(f"{self.log_file}: cannot be written: {error.strerror or error}") from None
