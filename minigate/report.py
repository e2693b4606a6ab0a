"""The file of an evaluation: a report as JSON, read and written; evaluate.py says what is in it. Tables as text.

    report --check_target, write_json--> OUT.json --read_report--> report
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from minigate.errors import FileError

COUNTS = ("substitutions", "deletions", "insertions", "words")  # of an utterance
REPORT = "minigate evaluation"  # marks our JSON


def read_report(path: str | Path) -> dict:
    """JSON that --json wrote -> report.  FileError when it is something else."""
    try:
        report = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise FileError(f"{path}: expected a readable file, got {error.strerror or error}") from error
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or report.get("format") != REPORT or not _is_complete(report):
        raise FileError(f"{path}: expected results of python -m minigate.evaluate MODEL MANIFEST.tsv --json {path}, "
                        "got something else")
    return report


def _is_complete(report: dict) -> bool:
    """Whether what compare() reads is there."""
    def right(u) -> bool:
        if not isinstance(u, dict) or not isinstance(u.get("path"), str) or "reference" not in u:
            return False
        counts = [u.get(name) for name in COUNTS]
        scored = isinstance(u["reference"], str) and all(type(n) is int and n >= 0 for n in counts)
        return u["reference"] is None or scored

    lists = [report.get(name) for name in ("utterances", "failed")]
    return (isinstance(report.get("normaliser"), str) and all(isinstance(x, list) for x in lists)
            and all(map(right, lists[0])) and all(isinstance(failure, dict) for failure in lists[1]))


def check_target(path: str | Path, flag: str = "--json") -> None:
    """FileError when write_whole could not write path, the value of `flag`: said before the work, not after."""
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        status = None
    except OSError as error:
        raise FileError(f"{flag}: expected a file that can be written, got {path}: {error.strerror}") from None
    if status and not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
        raise FileError(f"{flag}: expected a regular file, got {path}, {kind}")
    if status and not os.access(path, os.W_OK):
        raise FileError(f"{flag}: expected a file that can be written, got {path}, which is read-only")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise FileError(f"{flag}: expected a file in a folder that can be written to, got {path}")


def write_json(path: str | Path, report: dict) -> None:
    """As write_whole does."""
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    # undecodable bytes of names, \udcXX here, are JSON in this form
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """write(another name in the same folder), then rename: there is the whole file, or what was there before."""
    path = Path(path)
    part = path.with_name(f".minigate-{os.urandom(8).hex()}.part")
    try:
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{path}: expected a file that can be written, got {error.strerror or error}") from error


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of cells -> lines with the cells in columns, the first one left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def percent(rate: float | None, sign: str = "") -> str:
    return "-" if rate is None else f"{100 * rate:{sign}.2f}"


def interval(bounds: Sequence[float] | None, sign: str = "") -> str:
    """Two rates -> per cent, "1.23 to 4.56"."""
    return "-" if bounds is None else f"{percent(bounds[0], sign)} to {percent(bounds[1], sign)}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
