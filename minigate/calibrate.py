"""Manifest -> the windows that a model is calibrated on -> what its points hold on them -> their ranges.

    Speech(manifest, …) --windows--> observe(float model, …) --records--> find_ranges(…) -> {point: [low, high]}

A window is heard as transcription hears it: a recording, or a piece of at most 30 s of a longer one, alone; 30 s of
log-mel, or with audio_context `variable` the window's whole seconds, rounded up, 2 at least. The decoder is given the
tokens that the float model itself finds greedily, with timestamps, so that transcripts are not needed.

A batch is BATCH windows; when there are fewer windows than the batches need, they are used again from the first on.
Which recordings are taken, and in which order, follows from the seed.

T positions, D n_state, K inputs.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from minigate import data, progress
from minigate.decoding import decode
from minigate.errors import FileError
from minigate.manifest import read_manifest
from minigate.mel import MelWindows
from minigate.model import Model
from minigate.options import Checks, DecodingOptions
from minigate.quantsim import Observed
from minigate.ranges import METHODS, Record, range_of

BATCH = 8  # windows


@dataclass(frozen=True)
class CalibrationOptions:
    """How ranges are found. Raises UsageError for a value outside its range."""

    ranges: str = "minmax"  # or running, percentile, mse
    percentile: float = 99.999  # per cent of the values that a range reaches to, for ranges="percentile"
    batches: int = 16  # of BATCH windows
    seed: int = 0  # chooses the recordings

    def __post_init__(self):
        check = Checks(self)
        check.choice("ranges", METHODS)
        check.number("percentile", 50, 100, above=True)
        check.whole("batches", 1)
        check.whole("seed", 0)


class Speech:
    """The windows of a calibration, for models with these dims and this audio context.

    windows  those there are, each once, in the order of their use
    sha256   of their sound
    tokens   what the decoder is given, by window; found by `observe`
    Raises FileError for a manifest without a recording that can be read; those that cannot be are reported.
    """

    def __init__(self, manifest: str | Path, metadata: Mapping, batches: int, seed: int = 0,
                 report: Callable[[str], object] = progress.say):  # fmt: skip
        self.dims, self.variable = metadata["dims"], metadata["audio_context"] == "variable"
        self.recordings = data.Recordings(str(manifest), max_unreadable=1, report=report)
        self.wanted = batches * BATCH
        self.windows = self._choose(manifest, seed)
        self.tokens: dict[int, np.ndarray] = {}

    @property
    def batches(self) -> list[list[int]]:
        """The windows of each batch."""
        return [[i % len(self.windows) for i in range(start, start + BATCH)] for start in range(0, self.wanted, BATCH)]

    def times(self, i: int) -> int:
        """How often window i is used."""
        return len(range(i, self.wanted, len(self.windows)))

    @cached_property
    def sha256(self) -> str:
        ids = "\n".join(self.recordings.window_id(window) for window in self.windows)
        return hashlib.sha256(ids.encode()).hexdigest()

    def mel(self, i: int) -> np.ndarray:
        """-> (1, n_mels, frames) float32 of window i."""
        window = self.windows[i]
        frames = 2 * self.dims["n_audio_ctx"]
        if self.variable:
            frames = min(frames, window.rounded_s * data.FRAMES_PER_S)
        mel, _ = MelWindows(self.recordings.audio(window), self.dims["n_mels"]).window(0)
        return mel[None, :, :frames]

    def _choose(self, manifest: str | Path, seed: int) -> list[data.Window]:
        """As many windows as are wanted, if there are so many. Recordings are measured as they are needed."""
        rows = read_manifest(manifest)
        order = np.random.default_rng(seed).permutation(len(rows))
        windows: list[data.Window] = []
        for i in order:
            windows += self._windows(rows[i])
            if len(windows) >= self.wanted:
                break
        if not windows:
            raise FileError(f"{manifest}: expected a recording that can be read, got none of {len(rows)}: "
                            f"{next(iter(self.recordings.unreadable.values()))}")  # fmt: skip
        return windows[: self.wanted]

    def _windows(self, row) -> list[data.Window]:
        """Of one recording; none if it cannot be read, which is reported."""
        try:
            [recording] = self.recordings.measure([row])
            windows = [data.Window((utterance,)) for utterance in data.cut(recording)]
            self.recordings.window_id(windows[0])  # decodes it
        except data.DamagedRecording as error:
            self.recordings.fail(error.recording, error)
        except FileError:
            pass  # counted by measure
        else:
            return windows
        return []


def with_operators(model: Model, operators) -> Model:
    """The model computing with other operators."""
    other = copy.copy(model)
    other.ops = operators
    return other


def greedy_tokens(model: Model, xa: np.ndarray, language: str | None = None) -> np.ndarray:
    """xa (1, T, D) -> what the decoder hears while transcribing it, (1, n): the opening and the text found."""
    [found] = decode(model, xa, DecodingOptions(language=language))
    opening = model.tokenizer.sot_sequence(found.language, "transcribe", timestamps=True)
    return np.array([[*opening, *found.tokens][: model.dims.n_text_ctx]])


def observe(metadata: dict, tensors: Mapping[str, np.ndarray], speech: Speech, histograms: bool = False,
            means: bool = False, moments: bool = False, shown: bool = False) -> Observed:  # fmt: skip
    """A float model and its calibration windows -> the operators that have seen all of them.

    histograms, means, moments: as in `quantsim.Observed`. shown: a progress bar on stderr. Raises FileError, which
    names the point, for one that was never reached or holds NaN or infinity.
    """
    model, observed = Model(metadata, tensors), Observed(metadata, tensors, histograms, means, moments)
    watched = with_operators(model, observed)
    with progress.bar(len(speech.windows), "calibration", " windows", shown=shown) as bar, np.errstate(all="ignore"):
        for i in range(len(speech.windows)):
            observed.window, observed.times = i, speech.times(i)
            xa = watched.encode(speech.mel(i))
            check_finite(observed.records)
            if i not in speech.tokens:
                speech.tokens[i] = greedy_tokens(model, xa)
            watched.decode(speech.tokens[i], watched.start(xa), all_positions=True)
            check_finite(observed.records)
            bar.update()
    for point, record in observed.records.items():
        if not record.bounds:
            raise FileError(f"calibration: expected values of {point}, got none: no window reached it")
    return observed


def check_finite(records: Mapping[str, Record]) -> None:
    """Raise FileError for a point that holds NaN or infinity."""
    for point, record in records.items():
        for low, high in record.bounds.values():
            if not math.isfinite(high - low):
                raise FileError(f"calibration: expected finite values of {point}, got {low} to {high}")


def find_ranges(observed: Observed, speech: Speech, options: CalibrationOptions) -> dict[str, list[float]]:
    """-> [low, high] of every point, for the metadata's `ranges`. observed needs histograms for percentile and mse."""
    found = {}
    for point, record in observed.records.items():
        found[point] = list(range_of(record, options.ranges, speech.batches, options.percentile))
    return found


def needs_histograms(options: CalibrationOptions) -> bool:
    return options.ranges in ("percentile", "mse")


def description(speech: Speech, options: CalibrationOptions) -> dict:
    """For the metadata's `calibration`."""
    percentile = options.percentile if options.ranges == "percentile" else None
    return {"method": options.ranges, "percentile": percentile, "batches": options.batches, "seed": options.seed,
            "windows": len(speech.windows), "sha256": speech.sha256}  # fmt: skip


def channel_maxima(observed: Observed) -> dict[str, np.ndarray]:
    """Point -> the largest magnitude of each channel (D,)."""
    return {point: record.largest() for point, record in observed.records.items()}


def mean_inputs(observed: Observed) -> dict[str, np.ndarray]:
    """Linear or convolution -> the mean of what it multiplies (K,), a convolution's as `ops.conv_rows` orders it."""
    return {name: (total / count).astype(np.float32) for name, (total, count) in observed.inputs.items()}
