"""The engines that bench.py times: in the interpreter of each, one process that loads a model and answers recordings.

This file runs where only NumPy is sure to be there. All engines transcribe alike: greedy, at temperature 0 without
fallback or thresholds, in English, no text as the next window's prompt, and no voice activity detection, but for
faster-whisper's batches, which cannot do without. Each window is padded to 30 s; so does minigate with models whose
context is full, as the embedded tiny.en's and base's is (one of variable context would hear less, and be faster).

Answers are a JSON object a line. Seconds of wall and processor time; MB are 1e6 bytes.
"""

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

BATCH_SIZE = 8  # windows decoded together by the batched engines
MAX_TOKENS = 224  # of a window, as in openai/whisper
Transcribe = Callable[[np.ndarray], str]  # audio (n,) float32 at 16 kHz -> its text


# --- model, threads, timestamps -> a function that transcribes ---


def engine_minigate(model: str, threads: int, timestamps: bool, batch_size: int = 1) -> Transcribe:
    import minigate

    loaded = minigate.load(model, threads)
    options = dict(language="en", temperature=0.0, compression_ratio_threshold=None, logprob_threshold=None,
                   no_speech_threshold=None, condition_on_previous_text=False, without_timestamps=not timestamps,
                   batch_size=batch_size)  # fmt: skip
    return lambda audio: loaded.transcribe(audio, **options).text


def engine_minigate_batched(model: str, threads: int, timestamps: bool) -> Transcribe:
    return engine_minigate(model, threads, timestamps, BATCH_SIZE)


def engine_openvino(model: str, threads: int, timestamps: bool) -> Transcribe:
    import openvino_genai

    pipeline = openvino_genai.WhisperPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1)
    options = dict(max_new_tokens=MAX_TOKENS, num_beams=1, do_sample=False, return_timestamps=timestamps)
    if pipeline.get_generation_config().is_multilingual:
        options |= dict(language="<|en|>", task="transcribe")
    return lambda audio: str(pipeline.generate(audio, **options))


def faster_whisper_options(timestamps: bool) -> dict:
    return dict(language="en", task="transcribe", beam_size=1, best_of=1, temperature=[0.0],
                compression_ratio_threshold=None, log_prob_threshold=None, no_speech_threshold=None,
                condition_on_previous_text=False, without_timestamps=not timestamps)  # fmt: skip


def load_faster_whisper(model: str, threads: int):
    from faster_whisper import WhisperModel

    return WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=threads, num_workers=1,
                        local_files_only=True)  # fmt: skip


def engine_faster_whisper(model: str, threads: int, timestamps: bool) -> Transcribe:
    loaded, options = load_faster_whisper(model, threads), faster_whisper_options(timestamps)
    return lambda audio: "".join(s.text for s in loaded.transcribe(audio, vad_filter=False, **options)[0])


def engine_faster_whisper_batched(model: str, threads: int, timestamps: bool) -> Transcribe:
    from faster_whisper import BatchedInferencePipeline

    loaded = BatchedInferencePipeline(load_faster_whisper(model, threads))
    options = dict(batch_size=BATCH_SIZE, **faster_whisper_options(timestamps))
    return lambda audio: "".join(s.text for s in loaded.transcribe(audio, **options)[0])


def engine_pywhispercpp(model: str, threads: int, timestamps: bool) -> Transcribe:
    from pywhispercpp.model import Model

    loaded = Model(model, params_sampling_strategy=0, redirect_whispercpp_logs_to=None, n_threads=threads,
                   language="en", translate=False, temperature=0.0, temperature_inc=0.0, greedy={"best_of": 1},
                   no_context=True, suppress_blank=True, suppress_nst=True, no_speech_thold=1.0, vad=False,
                   print_progress=False, print_realtime=False, print_timestamps=False)  # fmt: skip
    return lambda audio: " ".join(s.text for s in loaded.transcribe(audio, no_timestamps=not timestamps))


def engine_whisper(model: str, threads: int, timestamps: bool) -> Transcribe:
    """openai/whisper on torch, float32."""
    import torch
    import whisper

    torch.set_num_threads(threads)
    loaded = whisper.load_model(model, device="cpu")
    options = dict(language="en", temperature=0.0, compression_ratio_threshold=None, logprob_threshold=None,
                   no_speech_threshold=None, condition_on_previous_text=False, without_timestamps=not timestamps,
                   fp16=False)  # fmt: skip
    return lambda audio: loaded.transcribe(audio, **options)["text"]


class Peer(NamedTuple):
    """How to load it, its import package and what pip installs: the first distribution, and one that it computes on."""

    load: Callable[[str, int, bool], Transcribe]
    package: str
    distributions: tuple[str, ...]


ENGINES = {
    "minigate": Peer(engine_minigate, "minigate", ("minigate",)),
    "minigate-batched": Peer(engine_minigate_batched, "minigate", ("minigate",)),
    "openvino": Peer(engine_openvino, "openvino_genai", ("openvino-genai",)),
    "faster-whisper": Peer(engine_faster_whisper, "faster_whisper", ("faster-whisper", "ctranslate2")),
    "faster-whisper-batched": Peer(engine_faster_whisper_batched, "faster_whisper", ("faster-whisper", "ctranslate2")),
    "pywhispercpp": Peer(engine_pywhispercpp, "pywhispercpp", ("pywhispercpp",)),
    "whisper": Peer(engine_whisper, "whisper", ("openai-whisper", "torch")),
}


# --- what is installed ---


def installed_mb(distribution: str, package: str) -> float:
    """What `pip install distribution` adds to an interpreter that has NumPy: its files and those of all that it
    requires, without bytecode, which is made on the spot, and without model files."""
    files, seen, todo = set(), {"numpy"}, [distribution]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for other systems
            continue
        files |= {Path(found.locate_file(file)).resolve() for file in found.files or ()}
        todo += [re.match(r"[\w.-]+", r)[0] for r in found.requires or () if not re.search(r"\bextra\s*==", r)]
    for folder in importlib.util.find_spec(package).submodule_search_locations:  # elsewhere, if it runs from a clone
        files |= {file.resolve() for file in Path(folder).rglob("*")}
    kept = [f for f in files if f.suffix not in (".pyc", ".safetensors") and f.is_file()]
    return sum(f.stat().st_size for f in kept) / 1e6


def about(engine: str) -> dict:
    """-> versions, e.g. "faster-whisper 1.2.1, ctranslate2 4.8.5", and installed_mb, None if pip knows nothing."""
    peer = ENGINES[engine]
    try:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in peer.distributions)
    except metadata.PackageNotFoundError:
        return {"versions": engine, "installed_mb": None}
    return {"versions": versions, "installed_mb": installed_mb(peer.distributions[0], peer.package)}


# --- the process ---


def peak_mb() -> float:
    """The most memory that this process has had; Linux."""
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024 / 1e6


def work(engine: str, model: str, threads: int, timestamps: bool) -> None:
    """Import and load, say how long that took and what the process had needed before, which is Python with NumPy; then
    answer one recording (a path to .npy) a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    bare_mb = peak_mb()
    start = time.perf_counter()
    transcribe = ENGINES[engine].load(model, threads, timestamps)
    load_s = time.perf_counter() - start
    print(json.dumps({"load_s": load_s, "bare_mb": bare_mb}), file=answers, flush=True)
    for line in sys.stdin:
        audio = np.load(line.rstrip("\n"))
        start, cpu = time.perf_counter(), time.process_time()
        text = transcribe(audio)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        answer = {"wall_s": wall, "cpu_s": cpu, "text": text, "peak_mb": peak_mb()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--about":
        print(json.dumps(about(sys.argv[2])))
    else:
        work(*sys.argv[2:4], int(sys.argv[4]), sys.argv[5] == "timestamps")  # after --work
