#!/usr/bin/env python3
"""Time the kernels against what the processor can do, NumPy and ONNX Runtime: interleaved, medians, ratios with spread,
as a Markdown table.

usage: python tools/bench_kernels.py [--threads 1 2] [--onnxruntime PYTHON] [--rounds 5] [--only TEXT]

First each result is checked against reference.py: integers exactly, static attention within one step (both round what
may lie half way between two) or, diffused, two, floats within a tolerance. Then, in each round, the kernel, its roof
and its rivals run in turn, each as often as fills 50 ms. The roofs (peak.c, which needs a C compiler that has OpenMP):

products, attention     what the instruction does in a loop of nothing else, in a thread of Python's for each of the
                        kernel's (empty if peak.c has no loop for the instruction set)
one row, one query      reading: a sum in C, by OpenMP's threads, of an array of as many bytes. Each call has another
                        array, and other weights, or keys and values: at least 8, and 64 MB or more of them, as the
                        decoder of base reads for a token. Rows are called from C too, as a decoder calls them
element by element      copying: NumPy's copyto of the mean of the bytes that are read and written

NumPy: the product in float32 (without what follows it), else the same function in reference.py; log-mel is NumPy's and
BLAS's itself. ONNX Runtime: MatMulInteger, the product alone, in a process of its own (bench_onnxruntime.py).

    python tools/bench_kernels.py --threads 1 2 --onnxruntime ORT/bin/python
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minigate import kernels  # noqa: E402
from tools.bench import DISTURBED, command_line, commit, processor, ratio  # noqa: E402
from tools.benchcases import UNITS, Case, Peaks, cases  # noqa: E402

FILL_S = 0.05  # seconds that each candidate runs in a round
SETTLE_S = 0.2  # seconds before a round, in which the threads of the one before stop waiting in a loop: NumPy's BLAS
WARM_UP = 4  # a candidate runs first, untimed, a fourth as often: who followed the pause was slower
COLUMNS = ("kernel", "threads", "rate", "roof", "share of the roof (spread)", "times as fast as NumPy (spread)",
           "as ONNX Runtime (spread)")  # fmt: skip
Timed = Callable[[int], float]  # repeats -> seconds of one call, their mean


class OnnxRuntime:
    """Its process, which answers the seconds of products."""

    def __init__(self, python: str, threads: int):
        command = [python, str(ROOT / "tools" / "bench_onnxruntime.py"), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self.answer()

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench_kernels: ONNX Runtime stopped, exit code {self.process.wait()}")
        return line.strip()

    def timed(self, size: tuple[int, int, int]) -> Timed:
        def run(repeats: int) -> float:
            print(*size, repeats, file=self.process.stdin, flush=True)
            return float(self.answer())

        return run

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def repeated(function: Callable, repeats: int) -> None:
    for _ in range(repeats):
        function()


def timed(functions: list[Callable], pool: ThreadPoolExecutor) -> Timed:
    """One function in this thread, several in a thread each."""

    def run(repeats: int) -> float:
        start = time.perf_counter()
        if len(functions) == 1:
            repeated(functions[0], repeats)
        else:
            list(pool.map(repeated, functions, [repeats] * len(functions)))
        return (time.perf_counter() - start) / repeats

    return run


def measure(case: Case, rounds: int, onnxruntime: OnnxRuntime | None, pool) -> tuple[dict[str, list[float]], int]:
    """-> seconds of one call in each round, of ours and of what there is to compare with; rounds in which our only
    thread had to wait for more than 12 % of its time."""
    candidates = {"ours": timed([case.run], pool)}
    if case.roof:
        candidates["roof"] = timed(case.roof, pool)
    if case.numpy:
        candidates["numpy"] = timed([case.numpy], pool)
    if case.product and onnxruntime:
        candidates["onnxruntime"] = onnxruntime.timed(case.product)
    repeats, waited = {}, 0
    for name, run in candidates.items():
        run(1)
        repeats[name] = max(1, round(FILL_S / run(1)))
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        time.sleep(SETTLE_S)
        for name, run in candidates.items():
            run(1 + repeats[name] // WARM_UP)
            cpu = time.process_time()
            seconds[name].append(run(repeats[name]))
            wall, cpu = seconds[name][-1] * repeats[name], time.process_time() - cpu
            waited += name == "ours" and kernels.threads() == 1 and wall > DISTURBED * cpu
    return seconds, waited


def row(case: Case, seconds: dict[str, list[float]], threads: int) -> str:
    ours = seconds["ours"]
    rate, roof, share = [case.work / UNITS[case.unit] / s for s in ours], "", ""
    digits = 1 if case.unit == "GB/s" else 3
    if "roof" in seconds:
        roofs = [case.roof_work / UNITS[case.unit] / s for s in seconds["roof"]]
        roof, share = f"{median(roofs):.{digits}f}", ratio(rate, roofs)
    rivals = [ratio(seconds[name], ours) if name in seconds else "" for name in ("numpy", "onnxruntime")]
    shown = f"{median(rate):.{digits}f} {case.unit}"
    return "| " + " | ".join([case.name, str(threads), shown, roof, share, *rivals]) + " |"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--onnxruntime", metavar="PYTHON", help="an interpreter with onnxruntime and onnx")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains it; default: all")
    args = parser.parse_args(argv)
    remarks = []
    with tempfile.TemporaryDirectory() as folder:
        peaks = Peaks(folder)
        print(f"{processor()}, {kernels.isa()}; {commit()}; {args.rounds} rounds, interleaved; "
              f"{command_line('bench_kernels.py', argv)}\n")  # fmt: skip
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
        for threads in args.threads:
            kernels.set_threads(threads)
            onnxruntime = OnnxRuntime(args.onnxruntime, threads) if args.onnxruntime else None
            with ThreadPoolExecutor(threads) as pool:
                for case in cases(peaks, threads, args.only):
                    case.check()
                    seconds, waited = measure(case, args.rounds, onnxruntime, pool)
                    print(row(case, seconds, threads), flush=True)
                    if waited:
                        remarks.append(f"Disturbed: {case.name}, threads {threads}, {waited} of {args.rounds} rounds")
            if onnxruntime:
                onnxruntime.stop()
                remarks.append(f"ONNX Runtime {onnxruntime.version}, threads {threads}")
    if remarks:
        print("", *remarks, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
