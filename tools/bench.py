#!/usr/bin/env python3
"""Time whole transcriptions against other engines: interleaved, medians, ratios with spread, as a Markdown table.

usage: python tools/bench.py MANIFEST.tsv --engines SPEC... [--engines SPEC...] [--threads 1 2] [--long FILE] [--busy]

A SPEC is [ENVIRONMENT=VALUE ]NAME:MODEL[@PYTHON]; NAMEs, and how all are made to do the same, are in peers.py. Each
--engines is a set that is compared, the first of it with ratio 1. Each engine runs in a process of its own, with the
interpreter of its virtual environment where one is named, and keeps its model loaded. Audio is decoded before the clock
starts; the first call is not counted. In each round every engine of a set transcribes all recordings once, in turn.

Short recordings of the manifest are transcribed without timestamps, a long one (--long, or --join: recordings of the
manifest one after the other, with pauses) with them; engines whose names end in -batched get only that.

    python tools/bench.py test.tsv --threads 1 2 --join 360 --busy --engines minigate:tiny.en-w8a8-dynamic \\
        minigate-batched:tiny.en-w8a8-dynamic openvino:tiny.en-ov-int8@OV/bin/python \\
        'CT2_FORCE_CPU_ISA=AVX2 faster-whisper:tiny.en-ct2@FW/bin/python' whisper:tiny.en.pt@REF/bin/python

Columns: wall and processor time of a round, and how many times the first engine's wall time, round by round; start: of
import and load, in brackets until the first text is there (of a long recording: of its first 30 s), without the start
of Python and NumPy; peak memory of the process, in brackets what of it Python with NumPy does not have; what is
installed on top of NumPy, model files apart; pooled word error rate; with --busy, how many times as long a round takes
while another process spins on one core, if the engine has threads for all of them. Rounds of one thread whose wall time
is more than 12 % above processor time were disturbed by others, and are named below the table.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minigate import threads as cores  # noqa: E402
from minigate.audio import SAMPLE_RATE, read_audio  # noqa: E402
from minigate.manifest import Row, read_manifest  # noqa: E402
from minigate.wer import count_errors, load_normaliser  # noqa: E402
from tools.peers import ENGINES  # noqa: E402

PEERS = ROOT / "tools" / "peers.py"
SPEC = re.compile(r"(?P<env>(?:[A-Za-z_]\w*=\S* +)*)(?P<name>[\w-]+):(?P<model>[^@]+)(?:@(?P<python>.+))?")
SUFFIXES = (".safetensors", ".pt", ".bin")
DISTURBED = 1.12  # times processor time; one thread needs no more wall time on a quiet machine
PAUSE_S = 0.5  # between recordings that are joined
WARM_UP_S = 30  # of a long recording, for the first call
BATCHED = "-batched"
COLUMNS = ("engine", "speech", "threads", "wall s", "CPU s", "times the first (spread)", "start s (first text)",
           "peak MB (beyond NumPy)", "installed MB", "WER")  # fmt: skip


@dataclass
class Speech:
    """Recordings (paths of .npy), the words in them, and one for the first call, which is not counted."""

    label: str
    paths: list[str]
    references: list[str] | None
    first: str
    timestamps: bool = False


# --- one engine ---


class Engine:
    """One engine and its process. For each round: `seconds` wall, `cpu`; for each start: `starts` until the model is
    loaded, `first_texts` until the first recording is transcribed, both in seconds."""

    def __init__(self, spec: str, threads: int, timestamps: bool):
        match = SPEC.fullmatch(spec)
        if not match or match["name"] not in ENGINES:
            raise SystemExit(f"bench: --engines: expected [ENVIRONMENT=VALUE ]NAME:MODEL[@PYTHON], NAME of "
                             f"{', '.join(ENGINES)}, got {spec}")  # fmt: skip
        name, model, own = match["name"], match["model"], match["env"].split()
        self.name, self.threads, self.process = name, threads, None
        shown = Path(model).stem if model.endswith(SUFFIXES) else Path(model).name
        self.label = " ".join([*own, name, shown])
        self.env = {**os.environ, **{f"{x}_NUM_THREADS": str(threads) for x in ("OMP", "OPENBLAS", "MKL")}}
        self.env.pop("PYTHONPATH", None)
        if not match["python"]:
            self.env["PYTHONPATH"] = str(ROOT)
        self.env |= dict(pair.split("=", 1) for pair in own)
        self.python = [match["python"] or sys.executable, str(PEERS)]
        self.command = [*self.python, "--work", name, model, str(threads), "timestamps" if timestamps else "plain"]
        self.seconds, self.cpu, self.starts, self.first_texts = [], [], [], []
        self.texts, self.peak_mb, self.bare_mb, self.busy, self.same_texts = [], 0.0, 0.0, None, True

    def about(self) -> dict:
        """Versions and installed_mb, from its interpreter."""
        command = [*self.python, "--about", self.name]
        return json.loads(subprocess.run(command, env=self.env, stdout=subprocess.PIPE, text=True, check=True).stdout)

    def start(self, first: str) -> None:
        """A new process, up to the first text."""
        self.stop()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, env=self.env)
        loaded = self.answer()
        self.bare_mb = loaded["bare_mb"]
        self.starts.append(loaded["load_s"])
        self.first_texts.append(loaded["load_s"] + self.transcribe(first)["wall_s"])

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: {self.label}: the engine stopped, exit code {self.process.wait()}")
        return json.loads(line)

    def transcribe(self, path: str) -> dict:
        print(path, file=self.process.stdin, flush=True)
        return self.answer()

    def round(self, paths: list[str]) -> float:
        """-> wall seconds."""
        answers = [self.transcribe(path) for path in paths]
        texts = [a["text"] for a in answers]
        self.same_texts &= texts == (self.texts or texts)
        self.texts, self.peak_mb = texts, answers[-1]["peak_mb"]
        self.seconds.append(sum(a["wall_s"] for a in answers))
        self.cpu.append(sum(a["cpu_s"] for a in answers))
        return self.seconds[-1]

    def round_beside_another(self, paths: list[str]) -> None:
        """One more, which is not counted with the others."""
        with spinning():
            wall = self.round(paths)
        self.seconds.pop()
        self.cpu.pop()
        self.busy = wall / median(self.seconds)

    def disturbed(self) -> list[int]:
        """The rounds, from 1, in which the only thread had to wait."""
        rounds = enumerate(zip(self.seconds, self.cpu, strict=True), 1)
        return [i for i, (wall, cpu) in rounds if self.threads == 1 and wall > DISTURBED * cpu]

    def stop(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


@contextmanager
def spinning():
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def measure(specs: list[str], speech: Speech, threads: int, rounds: int, busy: bool) -> list[Engine]:
    """The engines of a set, started `rounds` times in turn, then timed in as many rounds."""
    engines = [Engine(spec, threads, speech.timestamps) for spec in specs]
    for _ in range(rounds):
        for engine in engines:
            engine.start(speech.first)
    for _ in range(rounds):
        for engine in engines:
            engine.round(speech.paths)
    for engine in engines:
        if busy and threads >= cores.available():
            engine.round_beside_another(speech.paths)
    for engine in engines:
        engine.stop()
    return engines


# --- what they hear ---


def save(path: str, audio: np.ndarray) -> str:
    np.save(path, audio)
    return path


def short_speech(rows: list[Row], folder: str) -> Speech:
    audios = [read_audio(row.file) for row in rows]
    paths = [save(f"{folder}/{i}.npy", audio) for i, audio in enumerate(audios)]
    seconds = sum(map(len, audios)) / SAMPLE_RATE
    return Speech(f"{len(rows)} short, {seconds:.0f} s", paths, [row.text for row in rows], paths[0])


def long_speech(audio: np.ndarray, text: str | None, folder: str) -> Speech:
    first = save(f"{folder}/first.npy", audio[: WARM_UP_S * SAMPLE_RATE])
    path = save(f"{folder}/long.npy", audio)
    return Speech(f"long, {len(audio) / SAMPLE_RATE:.0f} s", [path], None if text is None else [text], first, True)


def joined(rows: list[Row], seconds: float, seed: int) -> tuple[np.ndarray, str]:
    """Recordings in a random order, with pauses, until there are so many seconds; -> audio, text."""
    parts, words, missing = [], [], int(seconds * SAMPLE_RATE)
    for i in np.random.default_rng(seed).permutation(len(rows)):
        parts += [read_audio(rows[i].file), np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)]
        words.append(rows[i].text)
        missing -= sum(map(len, parts[-2:]))
        if missing <= 0:
            break
    return np.concatenate(parts), " ".join(words)


def speeches(args: argparse.Namespace, folder: str) -> list[Speech]:
    rows = [row for row in read_manifest(args.manifest) if row.text]
    found = []
    if args.limit:
        found.append(short_speech(rows[:: max(1, len(rows) // args.limit)][: args.limit], folder))
    if args.long:
        text = Path(args.long_text).read_text(encoding="utf-8") if args.long_text else None
        found.append(long_speech(read_audio(args.long), text, folder))
    elif args.join:
        found.append(long_speech(*joined(rows, args.join, args.seed), folder))
    return found


# --- the table ---


def processor() -> str:
    """Name and cores, as far as the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return f"commit {result.stdout.strip()}"


def command_line(script: str, argv: list[str]) -> str:
    """As it was given, but of a path only the name, and of an interpreter its environment's too."""

    def short(match: re.Match) -> str:
        parts = Path(match[0]).parts
        return "/".join(parts[-3:] if parts[-2] == "bin" else parts[-1:])

    shown = [re.sub(r"[^\s:@=]*/[^\s:@=]+", short, word) for word in argv]
    return " ".join([f"python tools/{script}", *(f"'{word}'" if " " in word else word for word in shown)])


def ratio(numerators: list[float], denominators: list[float], digits: int = 2) -> str:
    """Round by round: "median (lowest to highest)"."""
    found = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    middle, low, high = (f"{x:.{digits}f}" for x in (median(found), found[0], found[-1]))
    return f"{middle} ({low} to {high})"


def word_error_rate(references: list[str] | None, texts: list[str]) -> str:
    """Pooled, in percent."""
    if references is None:
        return ""
    normalise = load_normaliser()[1]
    pairs = zip(references, texts, strict=True)
    errors = [count_errors(normalise(r).split(), normalise(t).split()) for r, t in pairs]
    return f"{100 * sum(e.total for e in errors) / max(1, sum(e.words for e in errors)):.1f}"


def row(engine: Engine, first: Engine, speech: Speech, installed_mb: float | None, busy: bool) -> str:
    cells = [engine.label, speech.label, str(engine.threads), f"{median(engine.seconds):.2f}",
             f"{median(engine.cpu):.2f}", ratio(engine.seconds, first.seconds),
             f"{median(engine.starts):.2f} ({median(engine.first_texts):.2f})",
             f"{engine.peak_mb:.0f} ({engine.peak_mb - engine.bare_mb:.0f})",
             "?" if installed_mb is None else f"{installed_mb:.0f}",
             word_error_rate(speech.references, engine.texts)]  # fmt: skip
    if busy:
        cells.append("" if engine.busy is None else f"{engine.busy:.2f}")
    return "| " + " | ".join(cells) + " |"


def notes(engine: Engine, speech: Speech) -> list[str]:
    """What to know about a row, a line each."""
    where = f"{engine.label}, {speech.label}, threads {engine.threads}"
    found = []
    if rounds := engine.disturbed():
        found.append(f"Disturbed: {where}, of {len(engine.seconds)} rounds: {', '.join(map(str, rounds))}")
    if not engine.same_texts:
        found.append(f"Not the same texts in all rounds: {where}")
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("manifest", help="tab-separated, columns path and text")
    parser.add_argument("--engines", nargs="+", action="append", required=True, metavar="SPEC",
                        help="[ENVIRONMENT=VALUE ]NAME:MODEL[@PYTHON]; the first has ratio 1")  # fmt: skip
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="default 2")
    parser.add_argument("--rounds", type=int, default=5, help="and starts; default 5")
    parser.add_argument("--limit", type=int, default=12,
                        help="short recordings, spread over the manifest; 0: none; default 12")  # fmt: skip
    long = parser.add_mutually_exclusive_group()
    long.add_argument("--long", metavar="FILE", help="a long recording too")
    long.add_argument("--join", type=float, metavar="SECONDS", help="a long one of the manifest's recordings too")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which --join takes them (default: 0)")
    parser.add_argument("--long-text", metavar="FILE", help="the words in --long; default: no word error rate")
    parser.add_argument("--busy", action="store_true", help="once more while another process spins on one core")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.long_text and not args.long:
        parser.error("--long-text: expected --long beside it")
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    facts = {spec: Engine(spec, 1, False).about() for specs in args.engines for spec in specs}
    print(f"{processor()}; {commit()}; {args.rounds} rounds, interleaved; {command_line('bench.py', argv)}\n")
    print("; ".join(dict.fromkeys(fact["versions"] for fact in facts.values())), end="\n\n")
    columns = [*COLUMNS, *["beside another process"] * args.busy]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    remarks = []
    with tempfile.TemporaryDirectory() as folder:
        for speech in speeches(args, folder):
            for specs in args.engines:
                chosen = [s for s in specs if speech.timestamps or not SPEC.fullmatch(s)["name"].endswith(BATCHED)]
                for threads in args.threads:
                    engines = measure(chosen, speech, threads, args.rounds, args.busy)
                    for spec, engine in zip(chosen, engines, strict=True):
                        print(row(engine, engines[0], speech, facts[spec]["installed_mb"], args.busy), flush=True)
                        remarks += notes(engine, speech)
    if remarks:
        print("", *remarks, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
