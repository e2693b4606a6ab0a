"""A model and recordings -> its outliers and no-op heads, as a report, a table and a picture.

    manifest --Row--> log-mel --forward through Observer--> Watch --report--> table, JSON, plot

The encoder hears the first 30 s of each recording; the decoder is given, all at once, the greedy tokens that the
measured model itself finds there. A report is a dict as json.dump takes it; the metrics of tensors are in outliers.py,
those of heads in attentionmass.py.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minigate import kernels, outlierplot, progress
from minigate import model as network
from minigate.attentionmass import AttentionMass
from minigate.batches import AUDIO_CONTEXTS
from minigate.calibrate import greedy_tokens
from minigate.command import FAILED, check_stdout, memory_as_file_error, run_main, say, show
from minigate.devset import spread
from minigate.errors import FileError, UsageError
from minigate.evaluate import versions
from minigate.manifest import Row, read_manifest
from minigate.mel import MelWindows
from minigate.model import Model, find, load
from minigate.options import ArgumentParser, TranscribeOptions, as_whole, errors_name_flags
from minigate.outliers import SIGMAS, Meter, Observer, hidden_dimensions
from minigate.ranges import Record
from minigate.report import aligned, check_target, sha256, write_json
from minigate.transcribe import check_options, context_frames

PROG = "python -m minigate.outliers"
REPORT = "minigate outliers"  # marks our JSON
UTTERANCES = 16  # measured by default
DIMENSIONS = 5  # hidden dimensions shown
HEADS = 10  # heads shown with all their figures
TENSOR_COLUMNS = ("max abs", "kurtosis", f"> {SIGMAS} σ", "dimension", "share %")
HEAD_COLUMNS = ("mass %", "queries %", "value", "gate", "position", "there %")


# --- measuring


@dataclass
class Watch:
    """What is seen of one model."""

    meter: Meter = field(default_factory=Meter)
    mass: AttentionMass = field(default_factory=AttentionMass)
    records: dict[str, Record] | None = None  # histograms by tensor, where they are wanted
    utterances: list[str] = field(default_factory=list)  # names in the manifest
    tokens: int = 0  # given to the decoder
    positions: int = 0  # of the encoder

    def see(self, name: str, x: np.ndarray) -> None:
        if not np.isfinite(x.sum(dtype=np.float64)):
            raise FileError(f"model: expected finite activations, got NaN or infinity in {name}")
        self.meter.see(name, x)
        if self.records is not None:
            self.records.setdefault(name, Record(histogram=True)).see(x, len(self.utterances))


def observe(model: Model, mel: np.ndarray, language: str | None, watch: Watch) -> None:
    """mel (1, n_mels, T) -> a forward with every tensor measured, the decoder on the model's own greedy tokens."""
    ops, dims = Observer(model.ops, watch.see, watch.mass.see), model.dims
    xa = network.encoder(ops, dims, mel)
    tokens = greedy_tokens(model, xa, language)
    cross = network.cross_keys_values(ops, dims, xa)
    ops.norm("decoder.ln", network.decoder(ops, dims, tokens, network.Whole(cross)))
    watch.tokens += tokens.size
    watch.positions += xa.shape[1]


def measure_rows(model: Model, rows: Iterable[Row], context: str, language: str | None, histograms: bool = False,
                 failed: Callable[[Row, FileError], None] = lambda row, error: None) -> Watch:  # fmt: skip
    """Rows -> what is seen of them; those that cannot be read are handed to `failed`. FileError if none can be.

    context: full, every window 30 s long; variable, as long as this model hears it in transcription.
    """
    watch, last = Watch(records={} if histograms else None), None
    for row in rows:
        try:
            mel, n_frames = MelWindows(row.file, model.dims.n_mels).window(0)
        except FileError as error:
            last = error
            failed(row, error)
            continue
        frames = context_frames(model, n_frames) if context == "variable" else mel.shape[1]
        with memory_as_file_error(str(row.file)):
            observe(model, mel[None, :, :frames], language, watch)
        watch.utterances.append(row.name)
    if not watch.utterances:
        raise FileError(f"manifest: expected a recording that can be read, got none: {last or 'no rows'}")
    return watch


def report(model: Model, watch: Watch) -> dict:
    """What is seen of one model -> its report."""
    return {
        "name": model.name, "gate": model.metadata["gate"], "quantization": model.metadata["quantization"],
        "audio_context": model.metadata["audio_context"], "utterances": watch.utterances, "tokens": watch.tokens,
        "positions": watch.positions, **watch.meter.summary(),
        "hidden_dimensions": {side: hidden_dimensions(watch.meter.seen, side) for side in ("encoder", "decoder")},
        "attention": watch.mass.summary(),
    }  # fmt: skip


# --- the table


def table(reports: Sequence[dict], context: str) -> str:
    """Reports of one model, or of two on the same utterances -> text."""
    marks = [""] if len(reports) == 1 else [f" {letter}" for letter in "AB"]
    each = list(zip(marks, reports, strict=True))
    lines = [f"{mark.strip()}  {_about(r, context)}".strip() for mark, r in each]
    lines += ["the decoder is given the measured model's own greedy tokens; figures are means over utterances", ""]
    lines += aligned(_tensor_rows(reports, marks))
    lines += [f"worst{mark}: max abs in {r['max_abs_tensor']}, kurtosis in {r['kurtosis_tensor']}" for mark, r in each]
    lines += ["", f"hidden dimensions with most values above {SIGMAS} σ in the residual stream, and their share of all"]
    lines += aligned([_dimension_row(f"{side}{mark}", side, r) for side in ("encoder", "decoder") for mark, r in each])
    lines += ["", "attention: % of a head's probability that one key position receives, mean over queries; even: of a",
              "head that spreads it evenly"]  # fmt: skip
    lines += aligned(_mass_rows(each))
    lines += ["", "heads that put most on one position; queries: % of them that give it more than 50 %; value: length "
              "of its", "value to the mean, small where a head does nothing; there: % of utterances with it there"]
    lines += aligned(_head_rows(reports, marks))
    return "\n".join(line.rstrip() for line in lines)


def _about(r: dict, context: str) -> str:
    cut = context == "variable" and r["audio_context"] == "variable"
    scheme = f", {r['quantization']['scheme']}" if r["quantization"] else ""
    windows = "windows as long as transcription hears them" if cut else "windows padded to 30 s"
    return (f"{r['name']}: gate {r['gate']['kind']}{scheme}, {len(r['utterances'])} utterances, {windows}, "
            f"{r['tokens']} tokens")  # fmt: skip


def _side_by_side(what: str, columns: Sequence[str], marks: Sequence[str],
                  rows: Iterable[tuple[str, Sequence[tuple[str, ...]]]]) -> list[tuple[str, ...]]:  # fmt: skip
    """Rows of a name and each model's cells -> rows with the models' cells of one column next to each other."""
    head = (what, *(f"{column}{mark}" for column in columns for mark in marks))
    return [head, *((name, *(cell for column in zip(*cells, strict=True) for cell in column)) for name, cells in rows)]


def _tensor_rows(reports: Sequence[dict], marks: Sequence[str]) -> list[tuple[str, ...]]:
    """A row for each tensor of any model, in the order of the network, and one for all of them."""
    names = outlierplot.in_order(name for r in reports for name in r["tensors"])
    rows = [(name, [_tensor_cells(r["tensors"].get(name)) for r in reports]) for name in names]
    rows.append(("all: largest, mean, sum", [_tensor_cells({**r, "dimension": None}) for r in reports]))
    return _side_by_side("tensor", TENSOR_COLUMNS, marks, rows)


def _tensor_cells(t: dict | None) -> tuple[str, ...]:
    if t is None:
        return ("",) * len(TENSOR_COLUMNS)
    dimension = ("-", "-") if t["dimension"] is None else (str(t["dimension"]), f"{100 * t['share']:.0f}")
    return (f"{t['max_abs']:.1f}", f"{t['kurtosis']:.1f}", f"{t['above_6_sigma']:.0f}", *dimension)


def _dimension_row(name: str, side: str, r: dict) -> tuple[str, ...]:
    cells = [f"{d['dimension']} ({100 * d['share']:.1f} %)" for d in r["hidden_dimensions"][side][:DIMENSIONS]]
    return (name, *cells, *[""] * (DIMENSIONS - len(cells)))


def _mass_rows(each: Sequence[tuple[str, dict]]) -> list[tuple[str, ...]]:
    """A row for each attention module, a column for each head, model beside model."""
    widths = [max(len(module["heads"]) for module in r["attention"].values()) for _, r in each]
    heads = [[f"even{mark}", *map(str, range(width))] for (mark, _), width in zip(each, widths, strict=True)]
    rows = [("module, head", *(cell for cells in heads for cell in cells))]
    for name in outlierplot.in_order(name for _, r in each for name in r["attention"]):
        cells = []
        for (_, r), width in zip(each, widths, strict=True):
            module, found = r["attention"].get(name), []
            if module:
                found = [f"{100 * module['even']:.1f}", *(f"{100 * head['mass']:.0f}" for head in module["heads"])]
            cells += found + [""] * (1 + width - len(found))
        rows.append((name, *cells))
    return rows


def _head_rows(reports: Sequence[dict], marks: Sequence[str]) -> list[tuple[str, ...]]:
    """The heads with the largest masses beyond what even spreading gives, in any model."""
    excess: dict[tuple[str, int], float] = {}
    for r in reports:
        for name, module in r["attention"].items():
            for i, head in enumerate(module["heads"]):
                excess[name, i] = max(excess.get((name, i), 0.0), head["mass"] - module["even"])
    order = sorted(excess, key=lambda head: -excess[head])[:HEADS]
    rows = [(f"{name} {i}", [_head_cells(r["attention"].get(name, {}).get("heads", [])[i : i + 1]) for r in reports])
            for name, i in order]  # fmt: skip
    return _side_by_side("module, head", HEAD_COLUMNS, marks, rows)


def _head_cells(heads: Sequence[dict]) -> tuple[str, ...]:
    """One head, or none where the model has none there."""
    if not heads:
        return ("",) * len(HEAD_COLUMNS)
    [h] = heads
    return (f"{100 * h['mass']:.0f}", f"{100 * h['queries']:.0f}", f"{h['value']:.2f}", f"{h['gate']:.2f}",
            str(h["position"]), f"{100 * h['position_share']:.0f}")  # fmt: skip


# --- the command line


def build_parser() -> ArgumentParser:
    """The command line of `python -m minigate.outliers`."""
    parser = ArgumentParser(prog=PROG, description="Outliers of a model's activations, the hidden dimensions that hold "
                            "them, and the attention heads that try to do nothing: tables to standard output.")
    parser.add_argument("model", metavar="MODEL", help="model file, or name of an embedded model")
    parser.add_argument("manifest", metavar="MANIFEST.tsv", help="tab-separated, with a column path; texts are not "
                        "needed; of recordings longer than 30 s the first 30 s are heard")
    parser.add_argument("--compare", metavar="MODEL2", help="measure this model too and print both side by side")
    parser.add_argument("--json", metavar="OUT", help="write all figures there")
    parser.add_argument("--plot", metavar="OUT.png", help="draw largest values, kurtosis and the histograms of the "
                        "worst tensors; .pdf and .svg too; needs the extra plot (pip install 'minigate[plot]')")
    parser.add_argument("--audio-context", choices=AUDIO_CONTEXTS, default="full", help="full: every window is padded "
                        "to 30 s; variable: each model hears windows as in transcription, cut if it was trained so "
                        "(default: full)")
    parser.add_argument("--utterances", type=as_whole, default=UTTERANCES, metavar="N",
                        help=f"recordings to measure, spread over the manifest (default: {UTTERANCES})")
    parser.add_argument("--language", default="en", metavar="CODE", help="language spoken, or auto (default: en)")
    parser.add_argument("--threads", type=as_whole, metavar="N",
                        help="threads to compute with (default: the cores this process may use)")
    return parser


def run(args: Namespace) -> int:
    """Parsed arguments -> exit code 0, or 1 when a recording could not be read. Raises UsageError and FileError."""
    if args.utterances < 1:
        raise UsageError(f"--utterances: expected a whole number of at least 1, got {args.utterances}")
    check_stdout()
    if args.plot:
        outlierplot.check(args.plot)
        check_target(args.plot, "--plot")
    if args.json:
        check_target(args.json)
    rows = spread(read_manifest(args.manifest), args.utterances)
    names = [args.model, args.compare] if args.compare else [args.model]
    paths, models = [], []
    for name in names:
        with errors_name_flags():
            paths.append(find(name))
            models.append(load(paths[-1], args.threads))
            check(models[-1], args.language)
    if args.audio_context == "variable" and all(m.metadata["audio_context"] != "variable" for m in models):
        raise UsageError(f"--audio-context: expected full for a model that hears windows of 30 s only, such as "
                         f"{models[0].name}, got variable")  # fmt: skip
    lost: dict[str, str] = {}
    watches = [_measure(m, rows, args, lost) for m in models]
    reports = [{**report(m, w), "sha256": sha256(p)} for m, w, p in zip(models, watches, paths, strict=True)]
    try:
        show(table(reports, args.audio_context))
    finally:  # whoever stops reading the table, the figures are kept
        if args.json:
            write_json(args.json, _document(args, reports, lost))
        if args.plot:
            outlierplot.draw(args.plot, reports, [w.records for w in watches])
    return FAILED if lost else 0


def check(model: Model, language: str) -> None:
    """UsageError for a model whose tensors cannot be watched, or a language that it does not know."""
    scheme = (model.metadata["quantization"] or {}).get("scheme")
    if scheme == "w8a8-static":
        raise UsageError(f"model: expected a float model, w8a8-dynamic or w8, got {model.name}, {scheme}: its tensors "
                         "are clipped to fixed ranges; measure the float model that it was made of")  # fmt: skip
    check_options(model, TranscribeOptions(language=language))


def _measure(model: Model, rows: Sequence[Row], args: Namespace, lost: dict[str, str]) -> Watch:
    """measure_rows() with a bar on a terminal; what cannot be read is told, and added to `lost` by name."""
    failures: dict[Row, str] = {}

    def counted(rows: Iterable[Row]) -> Iterable[Row]:
        with progress.bar(len(rows), model.name, " files", shown=sys.stderr.isatty()) as bar:
            for row in rows:
                yield row
                bar.update()

    def failed(row: Row, error: FileError) -> None:
        failures[row] = str(error)

    try:
        return measure_rows(model, counted(rows), args.audio_context, args.language, bool(args.plot), failed)
    finally:
        for row, error in failures.items():
            if row.name not in lost:
                say(PROG, f"{args.manifest}, line {row.line}: {error}")
            lost[row.name] = error


def _document(args: Namespace, reports: list[dict], lost: dict[str, str]) -> dict:
    return {
        "format": REPORT, "manifest": str(args.manifest), "audio_context": args.audio_context,
        "language": args.language, "models": reports,
        "failed": [{"path": name, "error": error} for name, error in lost.items()],
        "threads": kernels.threads(), "isa": kernels.isa(), "versions": versions(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Arguments (default: the command line's) -> exit code, after one line on standard error if that is not 0."""
    return run_main(PROG, lambda: run(build_parser().parse_args(argv)))
