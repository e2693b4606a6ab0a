#!/usr/bin/env python3
"""Time whole transcriptions against other engines: interleaved, medians, ratios with spread, as a Markdown table.

usage: python tools/bench.py MANIFEST.tsv --engine minigate:MODEL [--engine NAME:MODEL@PYTHON …] [--threads 1 2]

Each engine runs in a process of its own, with the interpreter of its virtual environment where one is named, and keeps
its model loaded. Audio is decoded before the clock starts; the first call is not counted. Greedy, temperature 0 without
fallback, without timestamps, no previous text. In each round every engine transcribes all recordings once, in turn.

    python tools/bench.py test.tsv --engine minigate:tiny.en-w8a8-dynamic --engine whisper:tiny.en.pt@REF/bin/python
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

# --- in the engine's own process: a function that loads a model and returns audio (n,) -> text ---


def engine_minigate(model: str, threads: int):
    import minigate

    loaded = minigate.load(model, threads)
    options = dict(language="en", temperature=0.0, without_timestamps=True, condition_on_previous_text=False)
    return lambda audio: loaded.transcribe(audio, **options).text


def engine_whisper(model: str, threads: int):
    """openai/whisper on torch, float32."""
    import torch
    import whisper

    torch.set_num_threads(threads)
    loaded = whisper.load_model(model, device="cpu")
    options = dict(language="en", temperature=0.0, without_timestamps=True, condition_on_previous_text=False)
    options["fp16"] = False
    return lambda audio: loaded.transcribe(audio, **options)["text"]


ENGINES = {"minigate": engine_minigate, "whisper": engine_whisper}


def work(engine: str, model: str, threads: int) -> None:
    """Load, say so with the seconds it took, then answer one recording (a path to .npy) a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    start = time.perf_counter()
    transcribe = ENGINES[engine](model, threads)
    print(json.dumps({"load_s": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        audio = np.load(line.strip())
        start, cpu = time.perf_counter(), time.process_time()
        text = transcribe(audio)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "text": text, "peak_mb": peak / 1e3}), file=answers, flush=True)


# --- in the parent ---


class Engine:
    """One engine's process; `seconds` collects the wall time of each round."""

    def __init__(self, spec: str, threads: int):
        self.spec, self.seconds, self.cpu = spec, [], []
        name, _, rest = spec.partition(":")
        model, _, python = rest.partition("@")
        if name not in ENGINES or not model:
            raise SystemExit(f"bench: --engine: expected NAME:MODEL[@PYTHON], NAME of {', '.join(ENGINES)}, got {spec}")
        self.label = f"{name} {Path(model).name.removesuffix('.safetensors').removesuffix('.pt')}"
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        command = [python or sys.executable, __file__, "--work", name, model, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.load_s = self.answer()["load_s"]

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: {self.spec}: the engine stopped, exit code {self.process.wait()}")
        return json.loads(line)

    def transcribe(self, path: str) -> dict:
        print(path, file=self.process.stdin, flush=True)
        return self.answer()

    def round(self, paths: list[str], count: bool = True) -> None:
        answers = [self.transcribe(p) for p in paths]
        self.texts, self.peak_mb = [a["text"] for a in answers], answers[-1]["peak_mb"]
        if count:
            self.seconds.append(sum(a["wall_s"] for a in answers))
            self.cpu.append(sum(a["cpu_s"] for a in answers))

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(specs: list[str], paths: list[str], threads: int, rounds: int) -> list[Engine]:
    engines = [Engine(spec, threads) for spec in specs]
    for engine in engines:
        engine.round(paths[:1], count=False)
    for _ in range(rounds):
        for engine in engines:
            engine.round(paths)
    for engine in engines:
        engine.stop()
    return engines


def processor() -> str:
    """Name and cores, as far as the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def row(engine: Engine, first: Engine, threads: int, references: list[str]) -> str:
    from minigate.wer import count_errors, load_normaliser, rates

    normalise = load_normaliser()[1]
    pairs = zip(references, engine.texts, strict=True)
    wer = rates([count_errors(normalise(r).split(), normalise(t).split()) for r, t in pairs])["wer"]
    ratios = sorted(a / b for a, b in zip(engine.seconds, first.seconds, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    times = f"{median(engine.seconds):.2f} | {median(engine.cpu):.2f} | {median(ratios):.2f} ({spread})"
    return f"| {engine.label} | {threads} | {times} | {engine.load_s:.2f} | {engine.peak_mb:.0f} | {100 * wer:.1f} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="tab-separated, columns path and text")
    parser.add_argument("--engine", action="append", required=True, help="NAME:MODEL[@PYTHON]; the first is ratio 1")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="default 2")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--limit", type=int, default=12, help="recordings, spread over the manifest; default 12")
    args = parser.parse_args(argv)
    from minigate.audio import read_audio
    from minigate.manifest import read_manifest

    rows = [r for r in read_manifest(args.manifest) if r.text]
    rows = rows[:: max(1, len(rows) // args.limit)][: args.limit]
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.npy" for i in range(len(rows))]
        total = 0
        for path, item in zip(paths, rows, strict=True):
            audio = read_audio(item.file)
            total += len(audio) / 16000
            np.save(path, audio)
        print(f"{processor()}; {len(rows)} recordings, {total:.0f} s; {args.rounds} rounds, interleaved\n")
        print("| engine | threads | wall s | CPU s | times the first (spread) | load s | peak MB | WER |")
        print("|---" * 8 + "|")
        for threads in args.threads:
            engines = measure(args.engine, paths, threads, args.rounds)
            for engine in engines:
                print(row(engine, engines[0], threads, [r.text for r in rows]), flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:4], int(sys.argv[4]))
    else:
        sys.exit(main())
