"""float32 (n,) at 16 kHz -> log-mel spectrogram (n_mels, n_frames), as openai/whisper computes it.

`log_mel` takes a recording at once; `MelWindows` walks through one of any length, 30 s at a time, in bounded memory,
and gives the same numbers, since both compute the same blocks of frames.

Shapes: n samples, T frames. Frame t is centred on sample 160 t and hears 200 samples on either side.
"raw" is log10 of the mel energies, floor -10; "scaled" is what the encoder takes.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minigate.audio import SAMPLE_RATE, open_audio
from minigate.errors import FileError, UsageError

N_FFT = 400  # samples, 25 ms: what a frame hears
HOP_LENGTH = 160  # samples, 10 ms, from frame to frame
CHUNK_LENGTH_S = 30  # seconds, the window that Whisper was trained on
N_SAMPLES = CHUNK_LENGTH_S * SAMPLE_RATE  # 480000 samples in a window
N_FRAMES = N_SAMPLES // HOP_LENGTH  # 3000 frames in a window

LEAST_ENERGY = np.float32(1e-10)  # less than that counts as silence
FLOOR = np.float32(-10)  # its log10
DYNAMIC_RANGE = 8  # powers of ten below the loudest, where the spectrogram is clamped
BLOCK_FRAMES = 250  # frames transformed at a time: fits the cache, 2.5 times as fast as 3000
BAND_MELS = 8  # mel bands multiplied at a time: half the work, and too small for BLAS to wait for a second thread
BLOCK_SAMPLES = (BLOCK_FRAMES - 1) * HOP_LENGTH + N_FFT
KEEP_FRAMES = 60 * 100  # of a recording whose spectrogram is kept from the first pass: a minute, 2 MB

# Periodic Hann window; in float64, so that every NumPy transforms in float64 (before 2.0 it has nothing else)
HANN = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)


@functools.cache
def mel_filters(n_mels: int) -> np.ndarray:
    """-> (n_mels, 201) float32, read-only: the weight of each frequency bin in each mel band.

    Triangles of unit area, evenly spaced from 0 to 8000 Hz on Slaney's mel scale: linear below 1000 Hz (15 mels), then
    logarithmic, 27 steps for a factor of 6.4. Source: M. Slaney, Auditory Toolbox, 1998, and librosa.filters.mel, with
    which openai/whisper made its filters. Raises UsageError unless n_mels is a positive integer.
    """
    if not isinstance(n_mels, (int, np.integer)) or n_mels < 1:
        raise UsageError(f"n_mels: expected a positive integer (Whisper has 80 or 128), got {n_mels!r}")
    knee_hz, hz_per_mel, log_step = 1000.0, 200 / 3, np.log(6.4) / 27
    knee = knee_hz / hz_per_mel
    mels = np.linspace(0, knee + np.log(SAMPLE_RATE / 2 / knee_hz) / log_step, n_mels + 2)
    edges = np.where(mels < knee, mels * hz_per_mel, knee_hz * np.exp(log_step * (np.maximum(mels, knee) - knee)))
    bins = np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    filters = (triangles * 2 / (high - low)).astype(np.float32)
    filters.flags.writeable = False
    return filters


@functools.cache
def _bands(n_mels: int) -> list[tuple[slice, slice, np.ndarray]]:
    """mel_filters without most of its zeros -> a few times: mels, the frequency bins that they hear, their weights."""
    filters, bands = mel_filters(n_mels), []
    for start in range(0, n_mels, BAND_MELS):
        mels = slice(start, start + BAND_MELS)
        heard = np.flatnonzero(filters[mels].any(axis=0))
        bins = slice(heard[0], heard[-1] + 1) if len(heard) else slice(0)  # none: hundreds of mels, narrower than a bin
        bands.append((mels, bins, np.ascontiguousarray(filters[mels, bins])))
    return bands


def log_mel(audio: np.ndarray, n_mels: int = 80, padding: int = 0) -> np.ndarray:
    """audio (n,) float32 at 16 kHz, with `padding` zeros appended -> (n_mels, (n + padding) // 160) float32, scaled.

    openai/whisper's log_mel_spectrogram: centred frames, the signal reflected at both ends, the last frame left out.
    Raises UsageError for another dtype or shape, or fewer samples than can be reflected (201 with the padding).
    """
    if not isinstance(audio, np.ndarray) or audio.dtype != np.float32 or audio.ndim != 1:
        got = f"{audio.dtype} {audio.shape}" if isinstance(audio, np.ndarray) else type(audio).__name__
        raise UsageError(f"audio: expected float32 (n,), got {got}")
    if padding < 0 or len(audio) + padding <= N_FFT // 2:
        raise UsageError(f"audio: expected more than {N_FFT // 2} samples, got {len(audio)} and padding {padding}")
    signal = np.pad(np.pad(audio, (0, padding)), N_FFT // 2, mode="reflect")
    n_frames = (len(audio) + padding) // HOP_LENGTH
    raw = np.empty((n_mels, n_frames), np.float32)
    for start in range(0, n_frames, BLOCK_FRAMES):
        first, last = start * HOP_LENGTH, (min(start + BLOCK_FRAMES, n_frames) - 1) * HOP_LENGTH
        raw[:, start : start + BLOCK_FRAMES] = _log_energies(signal[first : last + N_FFT], n_mels)
    return _scaled(raw, raw.max())


def _log_energies(signal: np.ndarray, n_mels: int) -> np.ndarray:
    """signal (>= 400 + 160 (T - 1),) -> raw (n_mels, T) float32: log10 max(mel_filters |DFT|^2, 1e-10)."""
    frames = sliding_window_view(signal, N_FFT)[::HOP_LENGTH]
    spectrum = np.fft.rfft(frames * HANN)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    energies = np.empty((n_mels, len(frames)), np.float32)
    for mels, bins, weights in _bands(n_mels):
        np.matmul(weights, power[:, bins].T, out=energies[mels])
    return np.maximum(np.log10(np.maximum(energies, LEAST_ENERGY)), FLOOR)  # log10 may miss -10 by a digit


def _scaled(raw: np.ndarray, loudest: float) -> np.ndarray:
    """raw, its recording's maximum -> float32, the loudest at (loudest + 4) / 4, nothing more than 2 below it."""
    return (np.maximum(raw, np.float32(loudest - DYNAMIC_RANGE)) + np.float32(4)) / np.float32(4)


def _raw_blocks(chunks: Iterable[np.ndarray], n_mels: int) -> Iterator[np.ndarray]:
    """float32 (n,) chunks -> raw (n_mels, <= 250) blocks, as if silence followed, up to the last frame that hears a
    sample: (n + 200) // 160 + 1 frames, of which the first n // 160 are content."""
    held, begun = np.zeros(0, np.float32), False
    for chunk in itertools.chain(chunks, [np.zeros(N_FFT, np.float32)]):
        held = np.concatenate([held, chunk])
        if not begun and len(held) > N_FFT // 2:
            held, begun = np.concatenate([held[N_FFT // 2 : 0 : -1], held]), True
        while begun and len(held) >= BLOCK_SAMPLES:
            yield _log_energies(held[:BLOCK_SAMPLES], n_mels)
            held = held[BLOCK_FRAMES * HOP_LENGTH :]
    if len(held) >= N_FFT:
        yield _log_energies(held, n_mels)


class MelWindows:
    """The log-mel spectrogram of a recording, 30 s windows of it at a time, in bounded memory.

    The numbers that openai/whisper's `transcribe` sees: the spectrogram of the recording and 30 s of silence behind it,
    clamped by the maximum of the whole; a window takes its frames up to the end of the recording and zeros from there.
    A file or an array is read once for that maximum and once for the windows (up to 5 minutes only once). Standard
    input can be read only once: there the maximum is that of what has been read, which is up to the end of the window
    asked for, rounded up to 2.5 s.

    source      an AudioSource, or anything `open_audio` takes
    n_mels      bands, the model's dims.n_mels
    n_frames    content frames of 10 ms (n // 160); None for standard input until its end was read
    duration_s  seconds; None as n_frames is. Progress is seek / n_frames.
    Raises what `open_audio` and `AudioSource.chunks` raise: for files and arrays at once, standard input on the way.
    """

    def __init__(self, source, n_mels: int = 80):
        self.source = open_audio(source)
        self.n_mels = n_mels
        self.n_frames: int | None = None
        self.duration_s: float | None = None
        self._loudest = FLOOR
        self._start = 0  # first frame still held
        self._held = np.zeros((n_mels, 0), np.float32)  # raw, from _start on
        kept = self._first_pass() if self.source.reopenable else None
        self._blocks = iter(kept) if kept is not None else _raw_blocks(self._counted(), n_mels)

    def _first_pass(self) -> list[np.ndarray] | None:
        """Find the maximum and the length -> all blocks, or None when they are too many to keep."""
        blocks: list[np.ndarray] | None = []
        for number, block in enumerate(_raw_blocks(self._counted(), self.n_mels)):
            self._loudest = max(self._loudest, block.max())
            if number * BLOCK_FRAMES > KEEP_FRAMES:
                blocks = None
            if blocks is not None:
                blocks.append(block)
        return blocks

    def _counted(self) -> Iterator[np.ndarray]:
        """The source's chunks; at their end the length is known. Raises FileError if it is not what it was before."""
        n_samples = 0
        for chunk in self.source.chunks():
            n_samples += len(chunk)
            yield chunk
        n_frames = n_samples // HOP_LENGTH
        if self.n_frames not in (None, n_frames):
            before = self.n_frames * HOP_LENGTH / SAMPLE_RATE
            now = n_samples / SAMPLE_RATE
            raise FileError(f"{self.source.name}: changed while it was read: expected {before:.2f} s, got {now:.2f} s")
        self.n_frames, self.duration_s = n_frames, n_samples / SAMPLE_RATE

    def _hold(self, first: int, last: int) -> None:
        """Hold the frames first to last, or as many of them as there are, and no frame before first."""
        blocks, end = [self._held], self._start + self._held.shape[1]
        while end < last and (block := next(self._blocks, None)) is not None:
            self._loudest = max(self._loudest, block.max())
            end += block.shape[1]
            blocks.append(block)
            if end <= first:  # a jump ahead
                blocks, self._start = [self._held[:, :0]], end
        held = np.concatenate(blocks, axis=1)
        drop = min(first - self._start, held.shape[1])
        self._held = held[:, drop:]
        self._start += drop

    def ended(self, seek: int, keep: int | None = None) -> bool:
        """Whether the recording has no frame `seek`; reads standard input as far as that takes, and what lies before
        seek, or before `keep`, is given up, as by window."""
        if self.n_frames is None:
            self._hold(max(seek if keep is None else keep, self._start), seek + 1)
        return self.n_frames is not None and seek >= self.n_frames

    def window(self, seek: int, size: int = N_FRAMES) -> tuple[np.ndarray, int]:
        """Frames seek to seek + size -> scaled (n_mels, 3000) float32, zeros after its content; frames of content.

        seek may stay or grow from call to call: what lies before it is given up. Raises UsageError for a seek that goes
        back, or a size outside of 1 to 3000; FileError when the source turns out to be damaged.
        """
        if seek < self._start:
            raise UsageError(f"seek: expected at least {self._start}, the start of the last window, got {seek}")
        if not 1 <= size <= N_FRAMES:
            raise UsageError(f"size: expected 1 to {N_FRAMES} frames, got {size}")
        self._hold(seek, seek + size)
        n_content = min(size, self._held.shape[1]) if self._start == seek else 0
        if self.n_frames is not None:
            n_content = max(0, min(n_content, self.n_frames - seek))
        mel = np.zeros((self.n_mels, N_FRAMES), np.float32)
        mel[:, :n_content] = _scaled(self._held[:, :n_content], self._loudest)
        return mel, n_content

    def language_window(self) -> np.ndarray:
        """The first 30 s -> scaled (n_mels, 3000) float32, in which openai/whisper detects the language: here silence
        follows a shorter recording, not zeros as in window(0). Raises UsageError once a later window was taken."""
        if self._start:
            raise UsageError(f"language_window: expected before any later window, got one at frame {self._start}")
        self._hold(0, N_FRAMES)
        raw = np.full((self.n_mels, N_FRAMES), FLOOR)
        n_held = min(N_FRAMES, self._held.shape[1])
        raw[:, :n_held] = self._held[:, :n_held]
        return _scaled(raw, self._loudest)
