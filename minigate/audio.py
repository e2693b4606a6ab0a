"""Sound from anywhere -> float32 at 16 kHz, mono, full scale ±1, in chunks of bounded size.

In: the path of a sound file, '-' (raw PCM on standard input) or an array. Out: `AudioSource.chunks()`, each float32
(n,). What is not at 16 kHz is resampled piece by piece with enough overlap that the pieces equal the whole.

Shapes: n samples at 16 kHz, f samples at the file's own rate, c channels.
"""

import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from minigate.errors import FileError, UsageError
from minigate.signatures import is_sound_file

SAMPLE_RATE = 16000  # samples per second, what Whisper hears
PCM_SCALE = 1 / 32768  # 16-bit integers to ±1
MAX_ABS = 1e15  # a larger sample overflows float32 when the spectrum squares it; speech is within ±1
MAX_RATIO = 100_000  # greatest term of the reduced rate : 16000; the filter is 20 times as long
MIN_RATE, MAX_RATE = 1000, 768000  # Hz, outside of which a header is taken for damaged
READ_VALUES = 1 << 16  # values (samples times channels) decoded at a time
PIECE_S = 2  # seconds resampled at a time
UNKNOWN_LENGTH = (1 << 63) - 1  # frames that libsndfile reports for a stream whose header does not tell


@dataclass(frozen=True)
class AudioSource:
    """One recording, opened when its chunks are asked for.

    name        what error messages call it: the path, "standard input" or "audio" (an array)
    reopenable  chunks() may be called again and yields the same samples (not so for standard input)
    """

    name: str
    reopenable: bool
    _open: Callable[[], Iterator[np.ndarray]]

    def chunks(self) -> Iterator[np.ndarray]:
        """-> float32 (n,) one after the other, 16 kHz mono, none empty, none longer than 30 s or so.

        Raises FileError, at the first chunk or later: not audio, not one sample in it, NaN or infinite samples.
        """
        total = 0
        for chunk in self._open():
            total += len(chunk)
            if len(chunk):
                yield chunk
        if not total:
            raise FileError(f"{self.name}: expected a recording, got 0 samples")


def open_audio(source) -> AudioSource:
    """A path, '-' (raw 16 kHz s16le mono PCM on standard input), an array (n,) or an AudioSource -> AudioSource.

    Files: whatever libsndfile reads (wav, flac, ogg, opus, mp3 ...) and, with ffmpeg on the PATH, what that reads; any
    rate; channels are averaged. Arrays are 16 kHz mono: floating point within ±1, or int16, which is divided by 32768.
    Raises FileError for a path that names no readable file, UsageError for an argument of the wrong kind.
    """
    if isinstance(source, AudioSource):
        return source
    if isinstance(source, np.ndarray):
        return _array_source(source)
    path = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(path, str):
        raise UsageError(f"audio: expected a path, '-' or a float32 array (n,), got {type(source).__name__}")
    if path == "-":
        return AudioSource("standard input", False, _stdin_chunks)
    _check_path(path)
    return AudioSource(path, True, lambda: _file_chunks(path))


def read_audio(source) -> np.ndarray:
    """Anything that `open_audio` takes -> the whole recording, float32 (n,). Raises as it and its chunks do."""
    return np.concatenate(list(open_audio(source).chunks()))


# Arrays and raw PCM


def _array_source(audio: np.ndarray) -> AudioSource:
    if audio.ndim != 1 or not (audio.dtype.kind == "f" or audio.dtype == np.int16):
        raise UsageError(
            f"audio: expected float32 (n,) at 16 kHz, mono (float64, float16 and int16 are converted), "
            f"got {audio.dtype} {audio.shape}"
        )

    def chunks() -> Iterator[np.ndarray]:
        step = 30 * SAMPLE_RATE
        for start in range(0, len(audio), step):
            part = audio[start : start + step]
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is reported
                yield part.astype(np.float32) * np.float32(PCM_SCALE if audio.dtype == np.int16 else 1)

    return AudioSource("audio", True, lambda: _finite(chunks(), "audio", SAMPLE_RATE))


def _stdin_chunks() -> Iterator[np.ndarray]:
    name = "standard input"
    if sys.stdin is None:
        raise FileError(f"{name}: expected raw PCM, got a closed stream")
    try:
        yield from _pcm_chunks(sys.stdin.buffer, name, _refuse_sound_file)
    except OSError as error:
        raise FileError(f"{name}: expected raw PCM, got: {error.strerror or error}") from None


def _refuse_sound_file(name: str, data: bytes) -> None:
    """FileError if the first bytes of a stream belong to a sound file, whose bytes would be heard as noise."""
    if is_sound_file(data):
        raise FileError(
            f"{name}: expected raw 16-bit little-endian PCM at 16 kHz, mono, got a sound file "
            f"(it begins with {data[:8]!r}); give its path instead, or decode it with: "
            f"ffmpeg -i FILE -f s16le -ac 1 -ar {SAMPLE_RATE} -"
        )


def _pcm_chunks(stream, name: str, check: Callable[[str, bytes], None] = lambda name, data: None) -> Iterator:
    """Raw s16le bytes -> float32 chunks of a second. check: of name and the first. FileError for half a sample."""
    total = 0
    while data := stream.read(2 * SAMPLE_RATE):
        if total == 0:
            check(name, data)
        total += len(data)
        yield np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) * np.float32(PCM_SCALE)
    if total % 2:
        raise FileError(f"{name}: expected 16-bit samples, two bytes each, got {total} bytes, an odd number")


# Files


def _check_path(path: str) -> None:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: expected a sound file, got: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise FileError(f"{path}: expected a sound file, got a folder")
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: expected a regular file, got a pipe or device; '-' takes raw 16 kHz s16le PCM")
    if status.st_size == 0:
        raise FileError(f"{path}: expected a sound file, got an empty file (0 bytes)")


def _soundfile(path: str):
    """The soundfile package, which carries libsndfile; imported here since arrays and raw PCM do without."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, the library is not
        reason = str(error).splitlines()[0]
        raise FileError(f"{path}: to read it, soundfile is needed ({reason}): pip install soundfile") from None
    return soundfile


class _Bytes:
    """An open file from byte `start` on, as libsndfile wants it: a file object with nothing before its start.

    It has no name on purpose, for soundfile would take an extension such as .raw from that.
    """

    def __init__(self, data, start: int):
        self.data, self.start = data, start
        data.seek(start)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.data.seek(offset + self.start * (whence == os.SEEK_SET), whence) - self.start

    def tell(self) -> int:
        return self.data.tell() - self.start

    def readinto(self, buffer) -> int:
        return self.data.readinto(buffer)

    def read(self, size: int = -1) -> bytes:
        return self.data.read(size)


def _file_chunks(path: str) -> Iterator[np.ndarray]:
    """libsndfile's reading of a file, or ffmpeg's of one that libsndfile does not know.

    libsndfile ends an mp3 where the first header says, or where the first frame's bit rate makes it guess that the end
    is: too early for joined files (advertisements spliced into podcasts) and for variable bit rate without a header.
    So an mp3 is opened again where it left off, until its bytes are used up.
    """
    soundfile = _soundfile(path)
    try:
        data = open(path, "rb")
    except OSError as error:
        raise FileError(f"{path}: expected a readable file, got: {error.strerror}") from None
    with data:
        size, start = os.fstat(data.fileno()).st_size, 0
        while start < size:
            try:
                part = soundfile.SoundFile(_Bytes(data, start))
            except soundfile.LibsndfileError as error:
                if start == 0:
                    yield from _ffmpeg_chunks(path, error.error_string.rstrip("."))
                return  # after the first part: what follows the sound, such as tags
            with part:
                yield from resample(_finite(_decode(part, path), path, part.samplerate), part.samplerate, path)
                is_mp3, is_ogg = part.format == "MP3", part.format == "OGG"
            end = data.tell()
            if is_ogg and end < size:
                warnings.warn(f"{path}: read the first of several joined streams only; convert it to wav", stacklevel=2)
            if not is_mp3 or end <= start:
                return
            start = end


def _decode(part, path: str) -> Iterator[np.ndarray]:
    """soundfile.SoundFile (f, c) -> float32 (f,) chunks, the mean of the channels.

    A file cut off or damaged on the way gives what comes before, and a warning. Raises FileError if that is nothing.
    """
    block = np.empty((max(1, READ_VALUES // part.channels), part.channels), np.float32)
    weights = np.full(part.channels, 1 / part.channels, np.float32)  # as a product, 30 times as fast as mean(axis=1)
    total = 0
    while True:
        got, fault = _read_block(part, block)
        total += got
        if got:
            yield block[:got] @ weights
        if fault or not got:
            break
    if fault and not total:
        raise FileError(f"{path}: expected a sound file, got a damaged one ({fault})")
    if part.frames == UNKNOWN_LENGTH or (part.format == "MP3" and not fault):
        return  # nothing, or a mere guess, to compare with
    if total < part.frames:
        read_s, full_s = total / part.samplerate, part.frames / part.samplerate
        warnings.warn(f"{path}: cut off or damaged: {read_s:.2f} of {full_s:.2f} s could be read", stacklevel=2)


def _read_block(part, block: np.ndarray) -> tuple[int, str | None]:
    """Fill block (f, c) -> how many frames were decoded, and libsndfile's complaint if it failed on the way."""
    block.fill(np.nan)  # marks what is not written: after a failure nobody else tells where the sound stops
    try:
        return len(part.read(out=block)), None
    except RuntimeError as error:  # soundfile.LibsndfileError
        missing = np.isnan(block[:, 0])
        return int(missing.argmax()) if missing.any() else len(block), str(error).strip() or "decoding failed"


def _ffmpeg_chunks(path: str, reason: str) -> Iterator[np.ndarray]:
    """What libsndfile rejected for `reason`, decoded by ffmpeg: 16-bit PCM, as openai/whisper reads every file."""
    if not shutil.which("ffmpeg"):
        raise FileError(
            f"{path}: expected a sound file (wav, flac, ogg, opus, mp3), got one that libsndfile cannot read "
            f"({reason}); if it is audio or video of another kind (m4a, mp4, webm), install ffmpeg or convert it to wav"
        )
    # "file:" keeps ffmpeg from taking a name such as "-x" or "a:b" for an option or a protocol
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", f"file:{path}"]
    command += ["-f", "s16le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stderr=log, **pipes) as process:
        try:
            yield from _pcm_chunks(process.stdout, path)
        except BaseException:  # the reader has had enough
            process.kill()
            raise
        if process.wait():
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise FileError(f"{path}: expected a sound file, got one that libsndfile and ffmpeg reject ({said[-1]})")


def _finite(chunks: Iterable[np.ndarray], name: str, rate: int) -> Iterator[np.ndarray]:
    """chunks as they come. Raises FileError at the first sample that is NaN, infinite or beyond MAX_ABS."""
    position = 0
    for chunk in chunks:
        fine = np.abs(chunk) <= MAX_ABS
        if not fine.all():
            at = int(fine.argmin())
            where = f"sample {position + at} ({(position + at) / rate:.3f} s)"
            raise FileError(f"{name}: expected finite samples, got {chunk[at]} at {where}")
        position += len(chunk)
        yield chunk


# Resampling


def resample(chunks: Iterable[np.ndarray], rate: int, name: str = "audio") -> Iterator[np.ndarray]:
    """float32 (f,) chunks at `rate` Hz -> float32 chunks at 16 kHz, ceil(f * 16000 / rate) samples in all.

    scipy.signal.resample_poly, piece by piece: a piece begins at a multiple of `down` samples, where input and output
    grids meet, and is seen with as many neighbours as the filter reaches, so that the pieces equal the whole.
    Raises FileError for a rate that no recording has, or whose ratio to 16000 needs too long a filter, and when scipy,
    which only this needs, is missing.
    """
    if rate == SAMPLE_RATE:
        yield from chunks
        return
    if not MIN_RATE <= rate <= MAX_RATE:
        raise FileError(f"{name}: expected a sample rate of {MIN_RATE} to {MAX_RATE} Hz, got {rate}")
    up, down = SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE), rate // math.gcd(rate, SAMPLE_RATE)
    if max(up, down) > MAX_RATIO:
        raise FileError(
            f"{name}: expected a sample rate in a ratio to {SAMPLE_RATE} Hz of whole numbers up to {MAX_RATIO}, got "
            f"{rate} Hz ({down} : {up}); convert it with: ffmpeg -i FILE -ar {SAMPLE_RATE} OUT.wav"
        )
    try:
        from scipy.signal import firwin, resample_poly
    except ImportError as error:
        raise FileError(f"{name}: at {rate} Hz, to resample it scipy is needed ({error}): pip install scipy") from None
    half = 10 * max(up, down)  # taps on either side at rate * up; ten zero crossings, as resample_poly would choose
    taps = firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", 5.0)).astype(np.float32)
    margin = math.ceil(half / up / down) * down  # samples of neighbourhood on either side
    step = max(1, round(PIECE_S * rate / down)) * down
    held = np.zeros(margin, np.float32)  # the margin before the next piece, then what has arrived of it
    for chunk in chunks:
        held = np.concatenate([held, chunk])
        while len(held) >= margin + step + margin:
            piece = resample_poly(held[: margin + step + margin], up, down, window=taps)
            yield piece[margin * up // down : (margin + step) * up // down]
            held = held[step:]
    rest = len(held) - margin
    piece = resample_poly(np.concatenate([held, np.zeros(margin, np.float32)]), up, down, window=taps)
    yield piece[margin * up // down :][: math.ceil(rest * up / down)]
