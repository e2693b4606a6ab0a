"""Windows of sound -> log-mel as transcription sees them, computed once and kept on disk.

A window's log-mel is `mel.MelWindows(audio).window(0)`: clamped by its own maximum, its frames up to the end of the
sound and zeros from there. So the teacher hears 3000 frames and the student with variable context the first
100 * rounded_s of the very same array. Where transcription has the whole recording in one window, it sees the same.

On disk a value takes 16 bits. The clamp leaves a range of exactly 2 below the loudest value, so that these are steps
of 2 / 65535, an error of at most 1.6e-5: a thirtieth of float16's, a fifth of what our spectrogram may differ from
openai/whisper's. What is used is always the rounded value, whether it was in the cache or not.

Shapes: B windows, T frames of 10 ms.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from minigate import tensorfile
from minigate.data import Recordings, Window
from minigate.errors import FileError
from minigate.mel import MelWindows

STEP = np.float32(2 / 65535)
DEFAULT_MAX_BYTES = 4 << 30  # 30 s of 80 mels take 0.48 MB: more than 70 hours


class MelCache:
    """Log-mels by window, in `folder` (one file each) or, without one, computed each time.

    The folder never grows beyond max_bytes: then what is missing is computed each time, and nothing is given up, since
    every epoch asks for every window once. Files appear whole; one that is damaged is made anew.
    """

    def __init__(self, recordings: Recordings, n_mels: int, folder: Path | None = None,
                 max_bytes: int = DEFAULT_MAX_BYTES,
                 report: Callable[[str], object] = lambda line: print(line, file=sys.stderr)):  # fmt: skip
        self.recordings, self.n_mels, self.folder, self.report = recordings, n_mels, folder, report
        self.room = max_bytes - _size(folder) if folder else 0

    def content(self, window: Window) -> np.ndarray:
        """-> (n_mels, window.frames) float32. Raises data.DamagedRecording."""
        path = self._path(window)
        packed = self._read(path, window.frames) if path else None
        if packed is None:
            packed = pack(self.fresh(self.recordings.audio(window)))
            self._write(path, packed)
        return unpack(*packed)

    def fresh(self, audio: np.ndarray) -> np.ndarray:
        """audio (n,) float32 of a window -> (n_mels, n // 160) float32, not rounded to 16 bits."""
        mel, frames = MelWindows(audio, self.n_mels).window(0)
        return mel[:, :frames]

    def padded(self, windows: Sequence[Window], frames: int) -> np.ndarray:
        """-> (B, n_mels, frames) float32, zeros behind the sound. Raises data.DamagedRecording."""
        return pad([self.content(window) for window in windows], frames)

    def _path(self, window: Window) -> Path | None:
        if not self.folder:
            return None
        name = self.recordings.window_id(window)
        return self.folder / name[:2] / f"{name}-{self.n_mels}.mel"

    def _read(self, path: Path, frames: int) -> tuple[np.ndarray, np.float32] | None:
        if not path.exists():
            return None
        try:
            _, tensors = tensorfile.read(path)
            steps, top = tensors["mel"], tensors["top"]
        except (FileError, KeyError):
            return None
        if steps.shape != (self.n_mels, frames) or steps.dtype != np.uint16 or top.shape != (1,):
            return None
        return steps, top[0]

    def _write(self, path: Path | None, packed: tuple[np.ndarray, np.float32]) -> None:
        if not path or packed[0].nbytes > self.room:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensorfile.write(path, {"mel": packed[0], "top": np.array([packed[1]])}, {})
            self.room -= path.stat().st_size
        except (FileError, OSError) as error:
            self.room = 0
            self.report(f"{error}; log-mels are no longer cached")


def pad(mels: Sequence[np.ndarray], frames: int) -> np.ndarray:
    """B arrays (n_mels, at most `frames`) -> (B, n_mels, frames) float32, zeros behind each."""
    padded = np.zeros((len(mels), mels[0].shape[0], frames), np.float32)
    for row, mel in zip(padded, mels, strict=True):
        row[:, : mel.shape[1]] = mel
    return padded


def pack(mel: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """mel (n_mels, T) float32 within 2 of its maximum -> steps below that, uint16; the maximum."""
    top = mel.max()
    return np.rint((top - mel) / STEP).clip(0, 65535).astype(np.uint16), top


def unpack(steps: np.ndarray, top: np.float32) -> np.ndarray:
    """The reverse of pack -> (n_mels, T) float32."""
    return top - steps * STEP


def _size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
