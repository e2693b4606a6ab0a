"""Word error rate of a model on a manifest of recordings, with its uncertainty, by source, and against other results.

    manifest --Row--> transcribe_rows --utterances, failures--> summarise --report--> JSON, table
                                         two reports --> compare --> difference, paired

usage: python -m minigate.evaluate MODEL MANIFEST.tsv [--json OUT] [--compare OTHER.json] [decoding options]

A report is a dict as json.dump takes it.  Rates are fractions, `seconds` is the length of a recording, `elapsed_s`
what its transcription took, reading the file included, and `rtf` the one over the other.
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path

import numpy as np

from minigate import __version__, kernels, wer
from minigate.command import FAILED, check_stdout, memory_as_file_error, run_main, say, show
from minigate.errors import FileError, UsageError
from minigate.manifest import Row, read_manifest
from minigate.model import Model, find, load
from minigate.options import (
    ArgumentParser,
    TranscribeOptions,
    add_decoding_arguments,
    decoding_options,
    errors_name_flags,
)
from minigate.report import COUNTS, REPORT, aligned, check_target, interval, percent, read_report, sha256, write_json
from minigate.transcribe import check_options
from minigate.wer import Errors

DEFAULTS = {"language": "en", "temperature": 0.0}  # no fallback: a figure that another run gives again
PROG = "python -m minigate.evaluate"


# --- measuring

def transcribe_rows(model: Model, rows: Sequence[Row], options: dict,
                    failed: Callable[[Row, FileError], None] = lambda row, error: None) -> Iterable[dict]:
    """Yield an utterance for each row that can be read, in order; the others are handed to `failed`.

    options: keyword arguments of `transcribe`.  Without a text, reference, errors and the counts are None.
    """
    _, normalise = wer.load_normaliser()
    for row in rows:
        start = time.perf_counter()
        try:
            hypothesis, seconds = _listen(model, row, options)
        except FileError as error:
            failed(row, error)
            continue
        elapsed_s = time.perf_counter() - start
        found = dict.fromkeys(("errors", *COUNTS))
        if row.text is not None:
            counted = wer.count_errors(normalise(row.text).split(), normalise(hypothesis).split())
            found = {"errors": counted.total, **{name: getattr(counted, name) for name in COUNTS}}
        yield {"path": row.name, "source": row.source, "reference": row.text, "hypothesis": hypothesis, **found,
               "seconds": seconds, "elapsed_s": elapsed_s}


def _listen(model: Model, row: Row, options: dict) -> tuple[str, float]:
    """-> text, seconds of sound."""
    seconds = 0.0

    def note(done_s: float, total_s: float | None):
        nonlocal seconds
        seconds = total_s or seconds

    with memory_as_file_error(str(row.file)):
        return model.transcribe(row.file, on_progress=note, **options).text.strip(), seconds


def summarise(utterances: Sequence[dict]) -> dict:
    """Pooled figures of utterances; those without a reference count in rtf only."""
    scored = [_errors(u) for u in utterances if u["reference"] is not None]
    seconds = sum(u["seconds"] for u in utterances)
    elapsed_s = sum(u["elapsed_s"] for u in utterances)
    return {**wer.rates(scored), "scored": len(scored), "without_text": len(utterances) - len(scored),
            "seconds": seconds, "elapsed_s": elapsed_s, "rtf": elapsed_s / seconds if seconds else None}


def by_source(utterances: Sequence[dict], figures: Callable[[list], dict]) -> dict[str, dict]:
    """Source -> figures of its utterances, sources in alphabetical order."""
    names = sorted({u["source"] for u in utterances})
    return {name: figures([u for u in utterances if u["source"] == name]) for name in names}


def evaluate(model: Model, rows: Sequence[Row], options: dict | None = None,
             progress: Callable[[Iterable], Iterable] = iter,
             failed: Callable[[Row, FileError], None] = lambda row, error: None) -> dict:
    """Model, rows of a manifest, options of `transcribe` -> report.  FileError when no row can be read.

    progress wraps the utterances as they come, as tqdm does; failed is told of each row that cannot be read.
    """
    options = {**DEFAULTS, **(options or {})}
    if options.get("condition_on_previous_text") is None:  # a report says what was done
        options["condition_on_previous_text"] = model.knows_prompts
    failures = []

    def note(row: Row, error: FileError):
        failures.append({"path": row.name, "source": row.source, "error": str(error)})
        failed(row, error)

    utterances = list(progress(transcribe_rows(model, rows, options, note)))
    if not utterances:
        raise FileError(f"manifest: expected a recording that can be read, got none of {len(rows)}: "
                        f"{failures[0]['error'] if failures else 'no rows'}")
    return {
        "format": REPORT,
        "model": {"name": model.name, "quantization": model.metadata.get("quantization")},
        **summarise(utterances),
        "failed": failures,
        "peak_mb": peak_mb(),
        "sources": by_source(utterances, summarise),
        "normaliser": wer.load_normaliser()[0],
        "bootstrap": {"resamples": wer.RESAMPLES, "seed": wer.SEED},
        "options": options,
        "threads": kernels.threads(),
        "isa": kernels.isa(),
        "versions": versions(),
        "utterances": utterances,
    }


def peak_mb() -> float | None:
    """The most memory that this process has had resident so far, in 10^6 bytes; None where the system does not say.

    VmHWM where there is one: on Linux ru_maxrss begins with the maximum of the process that started this one.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def versions() -> dict[str, str]:
    """Of all that a figure may depend on."""
    found = {"minigate": __version__, "python": platform.python_version(), "numpy": np.__version__}
    with suppress(metadata.PackageNotFoundError):
        found["whisper-normalizer"] = metadata.version("whisper-normalizer")
    return found


# --- comparing

def compare(ours: dict, theirs: dict, where: str) -> dict:
    """Two reports on the same utterances -> ours minus theirs with paired intervals, overall and by source.

    where: the other report's file, for errors.  FileError unless paths, references and normaliser are the same.
    """
    pairs = _pairs(ours, theirs, where)

    def difference(some: list[dict]) -> dict:
        return {**wer.paired_difference([_errors(u) for u in some], [_errors(pairs[u["path"]]) for u in some]),
                "scored": len(some)}

    scored = [u for u in ours["utterances"] if u["reference"] is not None]
    return {"with": where, "model": theirs.get("model"), **difference(scored), "sources": by_source(scored, difference)}


def check_comparable(rows: Sequence[Row], theirs: dict, where: str) -> None:
    """FileError when results on these rows could not be compared with theirs: said before the work, not after."""
    lost = {failure.get("path") for failure in theirs["failed"]}
    planned = [{"path": row.name, "reference": row.text} for row in rows if row.name not in lost]
    _pairs({"utterances": planned, "normaliser": wer.load_normaliser()[0]}, theirs, where)


def _pairs(ours: dict, theirs: dict, where: str) -> dict[str, dict]:
    """Path -> their utterance, of those that have a reference; both sides must have the same ones."""
    if ours["normaliser"] != theirs["normaliser"]:
        raise FileError(f"{where}: normaliser: expected {ours['normaliser']} as here, got {theirs['normaliser']} "
                        "(pip install 'minigate[eval]' brings whisper-english)")
    mine = {u["path"]: u for u in ours["utterances"] if u["reference"] is not None}
    other = {u["path"]: u for u in theirs["utterances"] if u["reference"] is not None}
    if mine.keys() != other.keys():
        here, there = sorted(mine.keys() - other.keys()), sorted(other.keys() - mine.keys())
        raise FileError(f"{where}: utterances: expected the same paths as here, got {len(here)} only here and "
                        f"{len(there)} only there, such as {(here or there)[0]}")
    for path, u in mine.items():
        if u["reference"] != other[path]["reference"] or u.get("words", other[path]["words"]) != other[path]["words"]:
            raise FileError(f"{where}: {path}: expected the reference {u['reference']!r}, "
                            f"got {other[path]['reference']!r} of {other[path]['words']} words")
    return other


def _errors(utterance: dict) -> Errors:
    return Errors(*(utterance[name] for name in COUNTS))


# --- the table

HEAD = ("source", "scored", "words", "WER %", "95 %", "capped %", "95 %", "sub", "del", "ins", "RTF")


def table(report: dict) -> str:
    """The report's figures as text, a line for each source when there are several."""
    sources = report["sources"] if len(report["sources"]) > 1 else {}
    rows = [HEAD, *(_cells(name or "(none)", figures) for name, figures in sources.items()), _cells("all", report)]
    lines = aligned(rows)
    if "comparison" in report:
        lines += ["", f"difference to {report['comparison']['with']} ({_name(report['comparison'].get('model'))}), "
                      "paired; below 0 this one is better"]
        lines += aligned([(HEAD[0], HEAD[1], *HEAD[3:7]), *_comparison_cells(report["comparison"])])
    counts = [f"{n} {what}" for n, what in ((report["without_text"], "without text, not scored"),
                                            (len(report["failed"]), "that cannot be read")) if n]
    peak = f", peak {report['peak_mb']:.0f} MB" if report["peak_mb"] else ""
    lines += ["", f"model {_name(report['model'])}, normaliser {report['normaliser']}, {report['isa']}, "
                  f"{report['threads']} threads{peak}"]
    return "\n".join(lines + ([f"recordings: {', '.join(counts)}"] if counts else []))


def _name(model) -> str:
    return str(model.get("name")) if isinstance(model, dict) else "unnamed"


def _cells(name: str, f: dict) -> tuple[str, ...]:
    rtf = "-" if f["rtf"] is None else f"{f['rtf']:.3f}"
    return (name, str(f["scored"]), str(f["words"]), percent(f["wer"]), interval(f["ci95"]), percent(f["wer_capped"]),
            interval(f["ci95_capped"]), str(f["substitutions"]), str(f["deletions"]), str(f["insertions"]), rtf)


def _comparison_cells(comparison: dict) -> list[tuple[str, ...]]:
    sources = comparison["sources"] if len(comparison["sources"]) > 1 else {}
    return [(name or "(none)", str(f["scored"]), percent(f["wer"], "+"), interval(f["ci95"], "+"),
             percent(f["wer_capped"], "+"), interval(f["ci95_capped"], "+"))
            for name, f in [*sources.items(), ("all", comparison)]]


# --- the command line

def build_parser() -> ArgumentParser:
    """The command line of `python -m minigate.evaluate`."""
    parser = ArgumentParser(prog=PROG, description="Word error rate of a model on a manifest of recordings: a table to "
                            "standard output, progress to standard error.")
    parser.add_argument("model", metavar="MODEL", help="model file, or name of an embedded model")
    parser.add_argument("manifest", metavar="MANIFEST.tsv", help="tab-separated columns path and text, and if you like "
                        "source, by which all figures are given too; paths are relative to the manifest")
    parser.add_argument("--json", metavar="OUT", help="write everything there, each utterance included")
    parser.add_argument("--compare", metavar="OTHER.json", help="add the difference to these results of --json on the "
                        "same recordings, with a paired bootstrap")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows (default: all)")
    parser.add_argument("--threads", type=int, metavar="N",
                        help="threads to compute with (default: the cores this process may use)")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings (default: both)")
    add_decoding_arguments(parser, DEFAULTS)
    return parser


def run(args: Namespace) -> int:
    """Parsed arguments -> exit code 0, or 1 when a recording could not be read.  Raises UsageError and FileError."""
    if args.quiet:
        warnings.simplefilter("ignore", UserWarning)
    options = decoding_options(args)
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit: expected a whole number of at least 1, got {args.limit}")
    check_stdout()
    if args.json:
        check_target(args.json)
    rows = read_manifest(args.manifest)[: args.limit]
    other = read_report(args.compare) if args.compare else None
    if other:
        check_comparable(rows, other, args.compare)
    with errors_name_flags():
        path = find(args.model)
        model = load(path, args.threads)
        check_options(model, TranscribeOptions(**options))
    report = {"manifest": str(args.manifest), **_evaluate_with_bar(model, rows, options, args)}
    report["model"]["sha256"] = sha256(path)
    unlike = None
    if other:
        try:
            report["comparison"] = compare(report, other, args.compare)
        except FileError as error:  # another recording could not be read than there: first the results
            unlike = error
    try:
        show(table(report))
    finally:  # whoever stops reading the table, the figures are kept
        if args.json:
            write_json(args.json, report)
    if unlike:
        raise unlike
    return FAILED if report["failed"] else 0


def _evaluate_with_bar(model: Model, rows: Sequence[Row], options: dict, args: Namespace) -> dict:
    """evaluate(), with a bar on a terminal; what cannot be read is told as it is found."""
    bar = None if args.quiet or not sys.stderr.isatty() else _tqdm()

    def progress(utterances: Iterable) -> Iterable:
        return bar(utterances, total=len(rows), unit="file", file=sys.stderr) if bar else utterances

    def failed(row: Row, error: FileError):
        with bar.external_write_mode(file=sys.stderr) if bar else nullcontext():
            say(PROG, f"{args.manifest}, line {row.line}: {error}")

    return evaluate(model, rows, options, progress, failed)


def _tqdm():
    """tqdm's bar where it is installed; a bare install has none."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def main(argv: list[str] | None = None) -> int:
    """Arguments (default: the command line's) -> exit code, after one line on standard error if that is not 0."""
    return run_main(PROG, lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
