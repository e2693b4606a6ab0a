"""Rows of tools/reproduce.py: the file that keeps them, and the Markdown table that they make.

    Work.compute --row--> Results --> markdown

A row is a dict: model, variant, gate, penalty, bytes, report (of minigate.evaluate), comparison (with the model's row
in float), agreement, outliers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from minigate.errors import FileError
from minigate.report import interval, percent

PARTS = ("native", "accented")  # sources in the rows' reports
HEAD = ("model", "gate", "penalty", "arithmetic", "MB", "WER % (95 %)", "capped % (95 %)", "WER to float (95 %)",
        "capped to float (95 %)", "top-1 %", "max abs", "kurtosis")  # fmt: skip
NOTES = """WER: word error rate; capped: each utterance's errors at most its words. "To float": difference to the same
model in float, paired bootstrap over utterances ({resamples} resamples); above 0 is worse. top-1: teacher-forced on the
float model's tokens, positions with the same most likely token. max abs, kurtosis: of the float model that was rounded,
largest and mean over its tensors, windows padded to 30 s and, behind a stroke, as long as transcription hears them
where it cuts them. MB: 10^6 bytes, the model's file. penalty: weight, τ (that of the encoder, that of the decoder)."""


class Results:
    """Finished rows by key; a line of JSON each, added at the end. A line that a kill cut off is passed over."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            path.open("a").close()  # said before the work, not after
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FileError(f"--results: expected a file that can be read and written, got {path}: {reason}") from None
        for line in lines:
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, row: dict) -> None:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"\n{text}\n")  # after what a kill cut off
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FileError(f"--results: expected a file that can be written, got {self.path}: {error}") from None
        self.rows[row["key"]] = row


def markdown(rows: Sequence[dict], command: str, refused: Mapping[str, str], missing: int) -> str:
    """Finished rows in the table's order -> the text around it, and a table for each part and for the whole.

    refused: variants that cannot be made, with the reason. missing: rows that are not finished.
    """
    lines = [f"`{command}`", ""]
    if rows:
        lines += [_circumstances(rows), "", " ".join(_notes(rows).split())]
        parts = [part for part in PARTS if any(part in row["report"]["sources"] for row in rows)]
        for part in [*parts, None] if len(parts) > 1 else [None]:
            lines += ["", *_table(rows, part)]
    lines += [f"\n{name}: {reason}" for name, reason in refused.items()]
    lines += [f"\n{missing} rows are not finished."] if missing else []
    return "\n".join(lines)


def _circumstances(rows: Sequence[dict]) -> str:
    """Where, when and how the rows came about."""
    def each(values) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "unknown"

    reports = [row["report"] for row in rows]
    parts = [each(row["processor"] for row in rows), each(r["isa"] for r in reports),
             f"{each(r['threads'] for r in reports)} threads", f"commit {each(row['commit'] for row in rows)}",
             f"normaliser {each(r['normaliser'] for r in reports)}"]  # fmt: skip
    calibrated = [row["calibration"] for row in rows if row["calibration"]]
    if calibrated:
        parts.append("calibration " + each(" ".join(f"{k} {v}" for k, v in c.items()) for c in calibrated))
    return "; ".join(parts)


def _notes(rows: Sequence[dict]) -> str:
    return NOTES.format(resamples=rows[0]["report"]["bootstrap"]["resamples"])


def _table(rows: Sequence[dict], part: str | None) -> list[str]:
    """One part's rows, or all recordings'."""
    figures = [row["report"]["sources"].get(part) if part else row["report"] for row in rows]
    first = next(f for f in figures if f)
    lines = [f"### {part or 'all'}: {first['scored']} recordings, {first['words']} words", "",
             _line(HEAD), _line(["---"] * 3 + ["---"] + ["---:"] * (len(HEAD) - 4))]  # fmt: skip
    return lines + [_line(_cells(row, f, part)) for row, f in zip(rows, figures, strict=True) if f]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: dict, figures: dict, part: str | None) -> list[str]:
    difference = row["comparison"]
    if difference and part:
        difference = difference["sources"][part]
    return [
        row["model"], row["gate"]["kind"], _penalty(row["penalty"]), row["variant"],
        f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else "-",
        _rate(figures, "wer", "ci95"), _rate(figures, "wer_capped", "ci95_capped"),
        _rate(difference, "wer", "ci95", "+"), _rate(difference, "wer_capped", "ci95_capped", "+"),
        _agreement(row["agreement"], part), *(_outliers(row["outliers"], name) for name in ("max_abs", "kurtosis")),
    ]  # fmt: skip


def _penalty(found: Mapping | None) -> str:
    """Weight and threshold, with the decoder's own where it has one, and what it is a multiple of."""
    if found is None:
        return "-"
    taus = [found["outlier_tau"], found.get("outlier_decoder_tau")]
    most = found.get("outlier_unit_most")
    unit = (f" rms ≤ {most:g}" if most else " rms") if found.get("outlier_unit") == "rms" else ""
    return f"{found['outlier_weight']:g}, {'/'.join(f'{tau:g}' for tau in taus if tau is not None)}{unit}"


def _rate(figures: dict | None, rate: str, bounds: str, sign: str = "") -> str:
    return "-" if figures is None else f"{percent(figures[rate], sign)} ({interval(figures[bounds], sign)})"


def _agreement(found: Mapping[str, Sequence[int]] | None, part: str | None) -> str:
    counts = [n for name, n in (found or {}).items() if part in (None, name)]
    same, positions = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return f"{100 * same / positions:.2f}" if positions else "-"


def _outliers(found: Mapping[str, Mapping], name: str) -> str:
    return " / ".join(f"{found[context][name]:.1f}" for context in ("full", "variable") if context in found)
