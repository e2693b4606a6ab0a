"""Manifest -> rows.  A manifest lists recordings: UTF-8, tab-separated, no quoting, the first line names the columns.

`path` must be there; `text` (the words spoken), `speaker` and `source` (the corpus) may be; other columns are ignored.
Relative paths are relative to the manifest's folder.  Blank lines are skipped, a quotation mark is an ordinary
character, and an empty `text` means that no transcript exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minigate.errors import FileError

COLUMNS = ("path", "text", "speaker", "source")


@dataclass(frozen=True)
class Row:
    """One recording: `name` is the path as the manifest writes it, `file` where it lies, `line` counts from 1."""

    name: str
    file: Path
    text: str | None
    speaker: str
    source: str
    line: int


def read_manifest(path: str | Path) -> list[Row]:
    """Path of a manifest -> its rows in file order; FileError names the line and the column that are wrong.

    Whether the recordings themselves are there is not looked at.
    """
    path = Path(path)
    lines = _lines(path)
    header = next(lines, None)
    if header is None:
        raise FileError(f"{path}: expected a header line with a column 'path', got an empty file")
    columns = _columns(path, *header)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in lines:
        row = _row(path, number, line, columns)
        if row.name in seen:
            raise FileError(f"{path}, line {number}, column path: expected each recording once, got {row.name!r} "
                            f"of line {seen[row.name]} again")
        seen[row.name] = number
        rows.append(row)
    if not rows:
        raise FileError(f"{path}: expected at least one row below the header, got none")
    return rows


def _lines(path: Path):
    """Yield (number from 1, line without its end) of every line that is not blank."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: expected a readable manifest, got {error.strerror or error}") from error
    # bytes are split first: str.splitlines would also cut at U+2028 and the like, inside a transcript
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        raw = raw.removesuffix(b"\r")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            column = raw[: error.start].count(b"\t") + 1
            raise FileError(f"{path}, line {number}, column {column}: expected UTF-8, "
                            f"got byte 0x{raw[error.start]:02x}") from error
        if line.strip(" "):
            yield number, line


def _columns(path: Path, number: int, line: str) -> list[str]:
    """The header's column names; each known one may stand there once, `path` must."""
    columns = line.split("\t")
    for name in COLUMNS:
        times = columns.count(name)
        if times > 1:
            raise FileError(f"{path}, line {number}, column {name}: expected it once, got it {times} times")
    if "path" not in columns:
        shown = " ".join(columns)
        raise FileError(f"{path}, line {number}: expected tab-separated column names with 'path' among them, "
                        f"got {shown[:80]!r}")
    return columns


def _row(path: Path, number: int, line: str, columns: list[str]) -> Row:
    fields = line.split("\t")
    if len(fields) != len(columns):
        place = f"column {columns[len(fields)]}" if len(fields) < len(columns) else f"column {len(columns) + 1}"
        raise FileError(f"{path}, line {number}, {place}: expected {len(columns)} tab-separated fields "
                        f"like the header, got {len(fields)}")
    cell = {name: field.strip() for name, field in zip(columns, fields, strict=True) if name in COLUMNS}
    name = cell["path"]
    if name in ("", "-") or "\0" in name:
        raise FileError(f"{path}, line {number}, column path: expected the path of a recording, got {name!r}")
    return Row(name=name, file=path.parent / name, text=cell.get("text") or None, speaker=cell.get("speaker", ""),
               source=cell.get("source", ""), line=number)
