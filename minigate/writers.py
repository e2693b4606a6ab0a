"""Segments -> txt, srt, vtt, tsv and json, each segment written as soon as it is found.

The bytes are those of openai/whisper's writers (without its options for words). One difference: NaN and infinity,
which it puts into JSON though JSON has no word for them, become null.

    stems = plan_outputs(format, output_dir, inputs)  # once, before any work: finds all that the options get wrong
    with Outputs(format, output_dir, stem) as outputs:
        outputs.segment(segment)  # for every segment
        outputs.end(result)  # once
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from minigate.errors import FileError, UsageError
from minigate.result import Result, Segment

FORMATS = ("txt", "srt", "vtt", "tsv", "json")
HEADERS = {"vtt": "WEBVTT\n\n", "tsv": "start\tend\ttext\n"}
STDIN_STEM = "stdin"


def clock(seconds: float, decimal_mark: str = ".", always_hours: bool = False) -> str:
    """Seconds -> "[HH:]MM:SS.mmm", rounded to the nearest millisecond; hours when there are any or `always_hours`.

    Raises ValueError for a time below 0 or not finite.
    """
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds: expected a finite time of at least 0, got {seconds}")
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    prefix = f"{hours:02d}:" if hours or always_hours else ""
    return f"{prefix}{minutes:02d}:{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"


# One function per format that knows segments: number (1, 2, 3 …), segment -> what to write.


def txt_lines(number: int, segment: Segment) -> str:
    """The text alone."""
    return f"{segment.text.strip()}\n"


def srt_lines(number: int, segment: Segment) -> str:
    """SubRip: number, times with a decimal comma, text, blank line."""
    start, end = clock(segment.start, ",", always_hours=True), clock(segment.end, ",", always_hours=True)
    return f"{number}\n{start} --> {end}\n{_cue_text(segment)}\n\n"


def vtt_lines(number: int, segment: Segment) -> str:
    """WebVTT: times, text, blank line."""
    return f"{clock(segment.start)} --> {clock(segment.end)}\n{_cue_text(segment)}\n\n"


def tsv_lines(number: int, segment: Segment) -> str:
    """Start and end in whole milliseconds and the text, with tabs between and none in the text."""
    text = segment.text.strip().replace("\t", " ")
    return f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{text}\n"


def _cue_text(segment: Segment) -> str:
    return segment.text.strip().replace("-->", "->")  # an arrow in the text would read as times


SEGMENT_LINES: dict[str, Callable[[int, Segment], str]] = {
    "txt": txt_lines,
    "srt": srt_lines,
    "vtt": vtt_lines,
    "tsv": tsv_lines,
}


class Writer:
    """One format to one text stream, in the order begin, segment …, end. Raises FileError when it cannot write."""

    def __init__(self, format: str, file: TextIO, name: str):
        """format: one of FORMATS. name: the file's, for errors."""
        self.format = format
        self.file = file
        self.name = name
        self.count = 0  # segments so far

    def begin(self):
        """Writes the header of those formats that have one."""
        self.write(HEADERS.get(self.format, ""))

    def segment(self, segment: Segment):
        """Writes the next segment; json waits for the end."""
        self.count += 1
        if self.format != "json":
            self.write(SEGMENT_LINES[self.format](self.count, segment))

    def end(self, result: Result):
        """Writes json, which has to wait for the whole text: one line, without a line end."""
        if self.format == "json":
            self.write(json.dumps(result.to_dict(), allow_nan=False))

    def write(self, text: str):
        """Writes and flushes; a character that the stream's encoding lacks becomes a question mark."""
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        with _os_errors_as_file_errors(self.name):
            self.file.write(text.encode(encoding, "replace").decode(encoding))
            self.file.flush()


class Outputs:
    """All that one input is written to: a context manager, in which `segment` is called for each segment, then `end`.

    format: one of FORMATS or "all". output_dir: a folder that is there, or None for standard output, where json ends
    in a newline, so that several inputs give JSON lines. Files are written under temporary names and become
    output_dir/STEM.EXT, replacing older ones, when the block ends; after an exception (KeyboardInterrupt too) or
    without `end` nothing is left of them, but for those that have replaced older ones when a later one cannot be put
    in place.
    Raises UsageError for the format, FileError when a file cannot be written, BrokenPipeError like any print.
    """

    def __init__(self, format: str, output_dir: str | None, stem: str):
        self.formats = _formats(format, output_dir)
        self.output_dir = output_dir
        self.stem = stem
        self.writers: list[Writer] = []
        self.parts: list[str] = []  # temporary name of each writer's file; none for standard output
        self.ended = False

    def __enter__(self) -> "Outputs":
        try:
            if self.output_dir is None:
                self.writers.append(Writer(self.formats[0], sys.stdout, "standard output"))
            else:
                for name in self.formats:
                    self._open(name)
            for writer in self.writers:
                writer.begin()
        except BaseException:
            self._discard()
            raise
        return self

    def segment(self, segment: Segment):
        for writer in self.writers:
            writer.segment(segment)

    def end(self, result: Result):
        for writer in self.writers:
            writer.end(result)
        if self.output_dir is None and self.formats == ("json",):
            self.writers[0].write("\n")
        self.ended = True

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None and self.ended and self.output_dir is not None:
                self._keep()
        finally:
            self._discard()

    def _open(self, format: str):
        path = os.path.join(self.output_dir, f"{self.stem}.{format}")
        part = os.path.join(self.output_dir, f".minigate-{os.urandom(8).hex()}.part")
        self.parts.append(part)
        with _os_errors_as_file_errors(path):
            file = open(part, "x", encoding="utf-8", newline="\n")
        self.writers.append(Writer(format, file, path))

    def _keep(self):
        """Closes all files, then gives them their names.

        When one cannot have its name, those new here are removed again. Those that replaced an older file stay, since
        that is gone, and the FileError names them.
        """
        for writer in self.writers:
            with _os_errors_as_file_errors(writer.name):
                writer.file.close()
        new, over = [], []
        try:
            for writer, part in zip(self.writers, self.parts, strict=True):
                done = over if os.path.lexists(writer.name) else new
                with _os_errors_as_file_errors(writer.name):
                    os.replace(part, writer.name)
                done.append(writer.name)
        except BaseException as error:
            for path in new:
                with suppress(OSError):
                    os.unlink(path)
            if over and isinstance(error, FileError):
                raise FileError(f"{error}; older files that are replaced already: {', '.join(over)}") from error
            raise

    def _discard(self):
        """Closes and removes the temporary files that are still there."""
        for writer in self.writers if self.output_dir is not None else ():
            with suppress(OSError):
                writer.file.close()
        for part in self.parts:
            with suppress(FileNotFoundError):
                os.unlink(part)


def plan_outputs(format: str, output_dir: str | None, inputs: Sequence[str]) -> list[str]:
    """-> the STEM of STEM.EXT for each input; makes output_dir when it is not there.

    Raises UsageError for an unknown format, for "all" without output_dir, for two inputs that would be written to
    the same file, for a folder that cannot be made or written to, and for a target that is there and no regular file.
    """
    formats = _formats(format, output_dir)
    stems = [output_stem(path) for path in inputs]
    if output_dir is None:
        return stems
    inputs_of: dict[str, str] = {}
    for path, stem in zip(inputs, stems, strict=True):
        if stem in inputs_of:
            both = f"{inputs_of[stem]} and {path}, which both give {stem}.*"
            raise UsageError(f"FILE: expected names that differ before the extension, got {both}")
        inputs_of[stem] = path
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir: expected a folder, got {output_dir}: {error.strerror}") from error
    if not os.access(output_dir, os.W_OK | os.X_OK):
        raise UsageError(f"--output-dir: expected a folder that may be written to, got {output_dir}")
    for target in (os.path.join(output_dir, f"{stem}.{name}") for stem in stems for name in formats):
        if os.path.exists(target) and not os.path.isfile(target):
            kind = "a folder" if os.path.isdir(target) else "a device or pipe"
            raise UsageError(f"--output-dir: expected to write {target} as a regular file, got {kind} of that name")
    return stems


def output_stem(path: str) -> str:
    """The file name without folder and last extension, as in openai/whisper; "-" is "stdin"."""
    return STDIN_STEM if path == "-" else os.path.splitext(os.path.basename(path))[0]


def _formats(format: str, output_dir: str | None) -> tuple[str, ...]:
    if format not in (*FORMATS, "all"):
        raise UsageError(f"--format: expected one of {' '.join(FORMATS)} all, got {format}")
    if format == "all" and output_dir is None:
        raise UsageError(f"--format: expected --output-dir with all, or one of {' '.join(FORMATS)}, got all alone")
    return FORMATS if format == "all" else (format,)


@contextmanager
def _os_errors_as_file_errors(path: str):
    try:
        yield
    except BrokenPipeError:  # the reader of standard output has gone: the command line's to answer
        raise
    except OSError as error:
        raise FileError(f"{path}: expected a file that can be written, got {error.strerror}") from error
