#!/usr/bin/env python3
"""The paper's table from models and recordings: what each arithmetic does to the word error rate of each model.

usage: python tools/reproduce.py MODEL... --test MANIFEST.tsv --calibration MANIFEST.tsv --results RESULTS.jsonl
           [--schemes SCHEME[:WEIGHTS][+EXTRA…]...] [--limit N] [--finished] [--threads N] …

Models are float files. For each there is a row in float and one for every scheme: w8a8-static (the whole graph in
integers), w8a8-dynamic, w8, and linears-only, which is w8a8-static in NumPy without the residual stream and attention,
as most publications have it. WEIGHTS: per-tensor or per-channel; both unless told. An EXTRA makes a row of its own:
smoothquant (0.5), equalize, bias-correction, rotate, error-feedback, error-diffusion, or paper (the layers that the
paper keeps in float):

    python tools/reproduce.py tiny.en.safetensors student.safetensors --test test.tsv --calibration train.tsv \\
        --results results.jsonl --schemes linears-only w8a8-static w8a8-static:per-tensor+smoothquant w8a8-dynamic w8

Each row is written to RESULTS as soon as it is finished, under a key that hashes model, manifests and options; rows
that are there are not computed again, so a run may be stopped and started at will, with other models and schemes too.
A key knows nothing of the code: begin a new file when that has changed what is computed. The table goes to standard
output, Markdown; progress to standard error. --finished computes nothing and prints the rows that there are.
"""

import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minigate import __version__, checkpoint, evaluate, kernels, progress, wer  # noqa: E402
from minigate.calibrate import CalibrationOptions, Speech, greedy_tokens, with_operators  # noqa: E402
from minigate.command import FAILED, check_stdout, run_main, say, show  # noqa: E402
from minigate.devset import spread  # noqa: E402
from minigate.errors import FileError, UsageError  # noqa: E402
from minigate.manifest import Row, read_manifest  # noqa: E402
from minigate.mel import MelWindows  # noqa: E402
from minigate.model import Model, find, load  # noqa: E402
from minigate.options import ArgumentParser, TranscribeOptions, as_number, as_whole, errors_name_flags  # noqa: E402
from minigate.outlierreport import measure_rows  # noqa: E402
from minigate.quantize import Prepared, check_float, prepare  # noqa: E402
from minigate.quantizeoptions import GRANULARITIES, QuantizeOptions, name_flag  # noqa: E402
from minigate.quantsim import Simulated  # noqa: E402
from minigate.ranges import METHODS  # noqa: E402
from minigate.report import sha256  # noqa: E402
from minigate.transcribe import context_frames  # noqa: E402
from tools.bench import processor  # noqa: E402
from tools.resulttable import PARTS, Results, markdown  # noqa: E402

PROG = "python tools/reproduce.py"
LINEARS_ONLY = "linears-only"
SCHEMES = (LINEARS_ONLY, *checkpoint.SCHEMES)
EXTRAS = {  # options of quantization
    "smoothquant": {"smoothquant": 0.5}, "equalize": {"equalize": True}, "bias-correction": {"bias_correction": True},
    "rotate": {"rotate": True}, "error-feedback": {"error_feedback": True},
    "error-diffusion": {"error_diffusion": True}, "paper": {"keep_float": ("paper",)},
}  # fmt: skip
MOVING = ("smoothquant", "equalize", "rotate")  # change the float model's activations
ACCENTED = ("speechocean762",)  # sources whose speakers have an accent
ROW_VERSION = 2  # of what a row holds
OUTLIER_UTTERANCES = 16  # measured for max abs and kurtosis, spread over the test manifest


# --- what is asked for


@dataclass(frozen=True)
class Variant:
    """An arithmetic: float, or a scheme with the granularity of its weights and extras."""

    scheme: str = "float"
    weights: str = ""
    extras: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " + ".join([f"{self.scheme} {self.weights}".strip(), *self.extras])

    @property
    def options(self) -> QuantizeOptions:
        scheme = "w8a8-static" if self.scheme == LINEARS_ONLY else self.scheme
        return QuantizeOptions(scheme, self.weights, **{k: v for e in self.extras for k, v in EXTRAS[e].items()})


FLOAT = Variant()


def parse_variants(texts: Iterable[str]) -> list[Variant]:
    """SCHEME[:WEIGHTS][+EXTRA…] -> variants, each once, float first. UsageError."""
    found = [FLOAT]
    for text in texts:
        first, *extras = text.split("+")
        refused = "error-diffusion" in extras and not text.startswith("w8a8-static")  # only there are steps of 1/255
        scheme, colon, weights = first.partition(":")
        if scheme not in SCHEMES or colon and weights not in GRANULARITIES or not set(extras) <= set(EXTRAS) or refused:
            raise UsageError(f"--schemes: expected {' or '.join(SCHEMES)}, with :{' or :'.join(GRANULARITIES)} behind "
                             f"it and any of +{' +'.join(EXTRAS)} (the last but one of w8a8-static alone), "
                             f"got {text!r}")  # fmt: skip
        found += [Variant(scheme, w, tuple(sorted(set(extras)))) for w in ((weights,) if colon else GRANULARITIES)]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Subject:
    """A float model: what the table calls it, its file."""

    label: str
    path: Path
    sha256: str


def find_subjects(names: Sequence[str]) -> list[Subject]:
    """Models, each with its file's stem as label, and its folder's name where stems are the same."""
    paths = [find(name) for name in names]
    for path in paths:
        try:
            check_float(checkpoint.read(path).metadata)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    stems = Counter(path.stem for path in paths)
    labels = [path.stem if stems[path.stem] == 1 else f"{path.resolve().parent.name}/{path.stem}" for path in paths]
    return [Subject(label, path, sha256(path)) for label, path in zip(labels, paths, strict=True)]


# --- computing a row


class Work:
    """All that rows have in common: recordings, options, the calibration of the model that is worked on."""

    def __init__(self, args: Namespace, calibration: CalibrationOptions):
        rows = read_manifest(args.test)
        rows = spread(rows, args.limit) if args.limit else rows
        self.rows = [replace(row, source=PARTS[row.source in args.accented]) for row in rows]  # parts as sources
        self.args, self.calibration = args, calibration
        paths = {"test": args.test, "calibration": args.calibration}
        self.hashes = {name: sha256(Path(path)) for name, path in paths.items() if path}
        self._speech: tuple[Subject, Speech] | None = None
        self._prepared: tuple[tuple, Prepared] | None = None

    def key(self, subject: Subject, variant: Variant) -> str:
        """Of all that decides the row's figures, but for the code and the last digits of floating point."""
        facts = {"row": ROW_VERSION, "minigate": __version__, "model": subject.sha256, "variant": str(variant),
                 "test": self.hashes["test"], "limit": self.args.limit, "accented": sorted(self.args.accented),
                 "language": self.args.language, "normaliser": wer.load_normaliser()[0],
                 "outlier_utterances": OUTLIER_UTTERANCES}  # fmt: skip
        if variant != FLOAT:
            usual = asdict(QuantizeOptions())  # so that an option that is new changes no key of a row without it
            facts["options"] = {k: v for k, v in asdict(variant.options).items() if v != usual[k]}
        if variant != FLOAT and variant.options.needs_speech:
            facts |= {"calibration": self.hashes["calibration"], **asdict(self.calibration)}
        elif "rotate" in variant.extras:
            facts["seed"] = self.calibration.seed
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def compute(self, subject: Subject, variant: Variant, plain: dict | None) -> dict:
        """-> the row, for json.dump. plain: the model's row in float, unless this is it. UsageError for a variant that
        this model cannot be made into."""
        start, file = time.monotonic(), checkpoint.read(subject.path)
        model, size, source = self._make(subject, variant, file)
        bar = progress.bar(len(self.rows), f"{subject.label} {variant}", " files")
        with bar:
            report = evaluate.evaluate(model, self.rows, {"language": self.args.language}, lambda xs: _counted(xs, bar),
                                       self._failed)  # fmt: skip
        forced = plain["forced"] if plain else self._own_tokens(model)
        outliers = plain and plain["outliers"]
        if plain is None or set(variant.extras) & set(MOVING):
            outliers = self._outliers(Model(*source))
        return {
            "key": self.key(subject, variant), "model": subject.label, "sha256": subject.sha256,
            "variant": str(variant), "gate": file.metadata["gate"], "penalty": penalty(file.metadata), "bytes": size,
            "report": report, "comparison": plain and evaluate.compare(report, plain["report"], subject.label),
            "agreement": plain and self._agreement(model, forced), "outliers": outliers,
            **({} if plain else {"forced": forced}), "commit": commit(), "processor": processor(),
            "seconds": round(time.monotonic() - start),
            "calibration": asdict(self.calibration) if variant != FLOAT and variant.options.needs_speech else None,
        }  # fmt: skip

    def _make(self, subject: Subject, variant: Variant, file: checkpoint.ModelFile) -> tuple:
        """-> the model to measure, its file's size in bytes (None: there is no file), and metadata and tensors of the
        float model that it was rounded from."""
        source = file.metadata, file.tensors
        if variant == FLOAT:
            return load(subject.path), subject.path.stat().st_size, source
        prepared, kept = self._prepare(subject, variant, file), variant.options.keep_float
        source = prepared.metadata, prepared.tensors
        if variant.scheme == LINEARS_ONLY:
            metadata, tensors = prepared.quantized(kept)
            return with_operators(Model(*source), Simulated(metadata, tensors, linears_only=True)), None, source
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{subject.path.stem}.safetensors")
            checkpoint.write(path, *prepared.quantized(kept))
            return load(path), path.stat().st_size, source

    def _prepare(self, subject: Subject, variant: Variant, file: checkpoint.ModelFile) -> Prepared:
        """What the last variant was made of, where only the granularity, what stays in float or how probabilities are
        rounded differs."""
        options = variant.options
        key = subject, options.scheme, tuple(replace(options, error_diffusion=False).helpers.items())
        if self._prepared is None or self._prepared[0] != key:
            self._prepared, speech = None, self._hear(subject, file) if options.needs_speech else None
            found = prepare(file.metadata, file.tensors, options, self.calibration, speech, shown=True)
            self._prepared = key, found
        return replace(self._prepared[1], options=options)

    def _hear(self, subject: Subject, file: checkpoint.ModelFile) -> Speech:
        """The calibration set; the tokens that the model finds in it are the same for all its variants."""
        if self._speech is None or self._speech[0] != subject:
            c = self.calibration
            self._speech = subject, Speech(self.args.calibration, file.metadata, c.batches, c.seed)
        return self._speech[1]

    def _own_tokens(self, model: Model) -> list[dict]:
        """What the float model finds in each recording's first window, and the most likely token at each position."""
        found = []
        for row, mel in self._windows(model, "tokens"):
            xa = model.encode(mel)
            tokens = greedy_tokens(model, xa, self.args.language)
            found.append({"path": row.name, "part": row.source, "tokens": tokens[0].tolist(),
                          "top1": top1(model, xa, tokens).tolist()})  # fmt: skip
        return found

    def _agreement(self, model: Model, forced: Sequence[dict]) -> dict:
        """part -> [positions at which the most likely token is the float model's, all positions]. Teacher-forced: both
        models' decoders are given the float model's tokens."""
        by_path, found = {f["path"]: f for f in forced}, {}
        for row, mel in self._windows(model, "agreement"):
            f = by_path[row.name]
            same = top1(model, model.encode(mel), np.array([f["tokens"]])) == f["top1"]
            counts = found.setdefault(row.source, [0, 0])
            counts[0] += int(same.sum())
            counts[1] += same.size
        return found

    def _windows(self, model: Model, what: str) -> Iterable[tuple[Row, np.ndarray]]:
        """Each readable recording with its first window (1, n_mels, frames), as transcription hears it."""
        with progress.bar(len(self.rows), what, " files") as bar:
            for row in self.rows:
                try:
                    mel, n_frames = MelWindows(row.file, model.dims.n_mels).window(0)
                except FileError:  # told when it was transcribed
                    continue
                yield row, mel[None, :, : context_frames(model, n_frames)]
                bar.update()

    def _outliers(self, model: Model) -> dict[str, dict]:
        """Of a float model by audio context: every window padded to 30 s and, where the model hears them so, cut."""
        rows, found = spread(self.rows, OUTLIER_UTTERANCES), {}
        for context in dict.fromkeys(("full", model.metadata["audio_context"])):
            summary = measure_rows(model, rows, context, self.args.language).meter.summary()
            names = ("max_abs", "max_abs_tensor", "kurtosis", "kurtosis_tensor")
            found[context] = {name: summary[name] for name in names}
        return found

    def _failed(self, row: Row, error: FileError) -> None:
        progress.say(f"{PROG}: {self.args.test}, line {row.line}: {error}")


def top1(model: Model, xa: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """xa (1, T, D), tokens (1, n), opening included -> the most likely token wherever text or its end is predicted."""
    logits = model.decode(tokens, model.start(xa), all_positions=True)[0]
    return logits[len(model.tokenizer.sot_sequence("en")) - 1 :].argmax(axis=1)


def penalty(metadata: Mapping) -> dict | None:
    """The outlier penalty that a student was trained with; None without."""
    training = metadata["provenance"].get("training") or {}
    names = [name for name in sorted(training) if name.startswith("outlier_")]
    return {name: training[name] for name in names} if training.get("outlier_weight") else None


def commit() -> str:
    """Of the clone that this file lies in, with + if its files were changed since; empty where git does not say."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _counted(items: Iterable, bar) -> Iterable:
    for item in items:
        yield item
        bar.update()


# --- the command line


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog=PROG, description="Word error rates of models in float and in every scheme of "
                            "quantization, as a Markdown table.")
    add, default = parser.add_argument, CalibrationOptions()
    add("models", metavar="MODEL", nargs="+", help="float model files")
    add("--test", metavar="MANIFEST.tsv", required=True, help="recordings with texts")
    add("--calibration", metavar="MANIFEST.tsv", help="recordings to find ranges on, no texts needed; schemes and "
        "extras that look at activations need it")
    add("--results", metavar="RESULTS.jsonl", type=Path, required=True, help="finished rows: read, and added to")
    add("--schemes", metavar="SCHEME", nargs="+", default=list(SCHEMES), help=f"{', '.join(SCHEMES)}; with "
        f":{' or :'.join(GRANULARITIES)} for one granularity of the weights, with {' '.join(f'+{e}' for e in EXTRAS)} "
        "for a row with these (default: every scheme in both granularities)")  # fmt: skip
    add("--accented", metavar="SOURCE", nargs="*", default=list(ACCENTED), help="sources that are a part of their own; "
        f"the others are the native part (default: {' '.join(ACCENTED)})")  # fmt: skip
    add("--limit", type=as_whole, metavar="N", help="recordings to test, spread over the manifest (default: all)")
    add("--language", default="en", metavar="CODE", help="language spoken, or auto (default: en)")
    add("--ranges", choices=METHODS, default=default.ranges, help="how ranges are found (default: minmax)")
    add("--percentile", type=as_number, default=default.percentile, metavar="P",
        help=f"for --ranges percentile, in %% (default: {default.percentile})")
    add("--batches", type=as_whole, default=default.batches, metavar="N",
        help=f"of 8 windows to calibrate on (default: {default.batches})")
    add("--seed", type=as_whole, default=default.seed, metavar="N",
        help=f"of the calibration's recordings, and of rotations (default: {default.seed})")
    add("--finished", action="store_true", help="compute nothing, print the rows that are finished")
    add("--threads", type=as_whole, metavar="N",
        help="threads to compute with (default: the cores this process may use)")
    return parser


def run(argv: Sequence[str]) -> int:
    """Arguments -> exit code 0, or 1 when a recording could not be read. Raises UsageError and FileError."""
    args = build_parser().parse_args(argv)
    check_stdout()
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit: expected a whole number of at least 1, got {args.limit}")
    variants = parse_variants(args.schemes)
    needy = [str(v) for v in variants[1:] if v.options.needs_speech]
    if needy and not args.calibration:
        raise UsageError(f"--calibration: expected a manifest, which {needy[0]} needs, got none")
    try:
        calibration = CalibrationOptions(args.ranges, args.percentile, args.batches, args.seed)
    except UsageError as error:
        raise name_flag(error) from None
    with errors_name_flags():
        TranscribeOptions(language=args.language)
        kernels.set_threads(args.threads)
        subjects = find_subjects(args.models)
    work, results = Work(args, calibration), Results(args.results)
    refused = {} if args.finished else fill(work, results, subjects, variants)
    wanted = [(subject.label, work.key(subject, variant)) for subject in subjects for variant in variants]
    rows = [{**results.rows[key], "model": label} for label, key in wanted if key in results.rows]
    command = shlex.join([*PROG.split(), *(Path(word).name if "/" in word else word for word in argv)])
    show(markdown(rows, command, refused, missing=len(wanted) - len(rows) - len(refused)))
    return FAILED if any(row["report"]["failed"] for row in rows) else 0


def fill(work: Work, results: Results, subjects: Sequence[Subject], variants: Sequence[Variant]) -> dict[str, str]:
    """Compute the rows that are missing, float first -> those that cannot be made, with the reason."""
    refused, total = {}, len(subjects) * len(variants)
    for i, (subject, variant) in enumerate((s, v) for s in subjects for v in variants):
        key = work.key(subject, variant)
        if key in results.rows:
            continue
        plain = None if variant == FLOAT else results.rows[work.key(subject, FLOAT)]
        try:
            row = work.compute(subject, variant, plain)
        except UsageError as error:
            if variant == FLOAT:
                raise
            refused[f"{subject.label} {variant}"] = str(error)
            say(PROG, f"{subject.label} {variant}: {error}", "warning")
            continue
        results.add(row)
        progress.say(f"row {i + 1} of {total}: {subject.label} {variant}: WER {100 * row['report']['wer']:.2f} %, "
                     f"{row['seconds']} s")  # fmt: skip
    return refused


def main(argv: list[str] | None = None) -> int:
    """Arguments (default: the command line's) -> exit code, after one line on standard error if that is not 0."""
    return run_main(PROG, lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
