"""Manifest -> windows of sound for training: which utterances share a window, and its samples.

    read_manifest -> Recordings.measure -> utterances -> pack -> Window -> Recordings.audio -> float32 (n,) at 16 kHz

Measuring reads a file's header only; its sound is decoded when a window is first labelled. A `Window` is known by a
hash of its audio (`Recordings.window_id`), under which labels and log-mels are kept.

`full`      utterances fill windows of up to 30 s, PAUSE_S of silence between them; the model hears 30 s each time
`variable`  half of the utterances stay alone; the others fill windows of 5 to 30 s, so that the student keeps hearing
            long windows and late positions; the model hears the window's length, rounded up to 1 s, 2 s at least
`single`    each utterance alone, as evaluation hears it
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from minigate.audio import SAMPLE_RATE, open_audio
from minigate.augment import AugmentOptions, as_fraction, change_gain, change_speed, sped_up_samples
from minigate.errors import FileError, UsageError
from minigate.manifest import Row
from minigate.mel import CHUNK_LENGTH_S, HOP_LENGTH, N_SAMPLES

MODES = ("full", "variable", "single")
PAUSE_S = 0.5  # seconds of digital silence between two utterances of a window
PAUSE = int(PAUSE_S * SAMPLE_RATE)  # samples
PACKED_S = (5, 30)  # seconds; variable mode: a packed window's length is drawn from here
OPEN_WINDOWS = 64  # that a next utterance may still join; bounds the time that packing takes
SHORTEST_S = 0.1  # seconds; less is no recording
LEAST_WINDOW_S = 2  # seconds; variable mode
FRAMES_PER_S = SAMPLE_RATE // HOP_LENGTH  # 100
REPORTED = 10  # unreadable recordings that are named one by one


@dataclass(frozen=True)
class Recording:
    """A row of the manifest and how many samples it has at 16 kHz."""

    row: Row
    samples: int


@dataclass(frozen=True)
class Utterance:
    """Samples start to stop of a recording, played at `speed` and made louder by `gain_db`."""

    recording: Recording
    start: int
    stop: int
    speed: Fraction = Fraction(1)
    gain_db: float = 0.0

    @property
    def samples(self) -> int:
        """How many it has once played at its speed."""
        return sped_up_samples(self.stop - self.start, self.speed)

    @property
    def text(self) -> str | None:
        """The words spoken; None where the manifest has none or the recording had to be cut."""
        whole = self.stop - self.start == self.recording.samples
        return self.recording.row.text if whole else None


@dataclass(frozen=True)
class Window:
    """Utterances that are heard together, at most 30 s with the pauses between them."""

    utterances: tuple[Utterance, ...]

    @cached_property
    def samples(self) -> int:
        return sum(u.samples for u in self.utterances) + PAUSE * (len(self.utterances) - 1)

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE

    @property
    def frames(self) -> int:
        """Frames of log-mel that hold sound, 10 ms each."""
        return self.samples // HOP_LENGTH

    @property
    def rounded_s(self) -> int:
        """Seconds that a student with variable context hears."""
        return max(LEAST_WINDOW_S, -(-self.frames // FRAMES_PER_S))

    def heard_s(self, audio_context: str) -> int:
        """Seconds that a student with this context, "full" or "variable", hears."""
        return self.rounded_s if audio_context == "variable" else CHUNK_LENGTH_S

    @property
    def text(self) -> str | None:
        """The words spoken in it, None unless all utterances have a text."""
        texts = [u.text for u in self.utterances]
        return None if None in texts else " ".join(texts)

    @property
    def natural_speed(self) -> bool:
        """Whether timestamps may be asked for."""
        return all(u.speed == 1 for u in self.utterances)


# --- recordings


class Recordings:
    """The recordings of a manifest: lengths and hashes, remembered in a file, and sound; counts what cannot be read.

    memory: a file of JSON lines, one for each recording whose length or hash was found, valid as long as the
    recording's size and modification time are the same; or None. A line cut off by a kill is ignored.
    A recording that cannot be read is reported and left out, until they are more than `max_unreadable` (a share) of
    all rows: then FileError. Name: the manifest, for messages.
    """

    def __init__(self, name: str, memory: Path | None = None, max_unreadable: float = 0.05,
                 report: Callable[[str], object] = lambda line: print(line, file=sys.stderr)):  # fmt: skip
        if not 0 <= max_unreadable <= 1:
            raise UsageError(f"max_unreadable: expected a share from 0 to 1, got {max_unreadable}")
        self.name, self.memory, self.max_unreadable, self.report = name, memory, max_unreadable, report
        self.total = 0  # rows measured
        self.unreadable: dict[str, str] = {}  # name in the manifest -> why
        self._known = _recall(memory)
        self._ids: dict[Window, str] = {}

    def measure(self, rows: Iterable[Row]) -> list[Recording]:
        """Rows -> those that can be read, in order, with their lengths. FileError for too many that cannot, or none."""
        found = []
        for row in rows:
            self.total += 1
            try:
                found.append(Recording(row, self._length(row)))
            except FileError as error:
                self._note(row, error)
        self._check()
        if not found:
            raise FileError(f"{self.name}: expected a recording that can be read, got none of {self.total}: "
                            f"{next(iter(self.unreadable.values()))}")
        return found

    def fail(self, recording: Recording, error: FileError) -> None:
        """Count a recording whose sound turned out to be damaged. FileError when they are too many now."""
        self._note(recording.row, error)
        self._check()

    def window_id(self, window: Window) -> str:
        """32 hexadecimal digits, the same for the same audio: a hash of its utterances' samples, as decoded, and of
        what assembles them (order, cuts, speeds, gains, pause). Raises DamagedRecording."""
        if window not in self._ids:
            hashed = hashlib.sha256(f"minigate window 1, pause {PAUSE}".encode())
            for u in window.utterances:
                hashed.update(f"\n{self._hash(u.recording)} {u.start} {u.stop} {u.speed} {u.gain_db!r}".encode())
            self._ids[window] = hashed.hexdigest()[:32]
        return self._ids[window]

    def audio(self, window: Window) -> np.ndarray:
        """-> the window's samples (n,) float32. Raises DamagedRecording."""
        parts = []
        for u in window.utterances:
            if parts:
                parts.append(np.zeros(PAUSE, np.float32))
            parts.append(change_gain(change_speed(self._sound(u), u.speed), u.gain_db))
        return np.concatenate(parts)

    def _note(self, row: Row, error: FileError) -> None:
        if row.name not in self.unreadable:
            self.unreadable[row.name] = str(error)
            if len(self.unreadable) <= REPORTED:
                self.report(f"{self.name}, line {row.line}: left out: {error}")
            if len(self.unreadable) == REPORTED:
                self.report(f"{self.name}: further recordings that cannot be read are left out without a word")

    def _check(self) -> None:
        bad = len(self.unreadable)
        if bad > self.max_unreadable * self.total:
            first = next(iter(self.unreadable.values()))
            raise FileError(f"{self.name}: expected at most {100 * self.max_unreadable:g} % of the recordings to be "
                            f"unreadable, got {bad} of {self.total}, for instance {first}")

    def _length(self, row: Row) -> int:
        samples = self._remembered(row).get("samples")
        if samples is None:
            samples = header_samples(row.file)
            if samples is None:
                samples = sum(map(len, open_audio(row.file).chunks()))
            self._remember(row, samples=samples)
        if samples < SHORTEST_S * SAMPLE_RATE:
            raise FileError(f"{row.file}: expected at least {SHORTEST_S} s, got {samples / SAMPLE_RATE:.3f} s")
        return samples

    def _hash(self, recording: Recording) -> str:
        """sha256 of all samples as little-endian float32."""
        known = self._remembered(recording.row)
        if "sha256" not in known:
            hashed, total = hashlib.sha256(), 0
            for chunk in _chunks(recording):
                hashed.update(np.asarray(chunk, "<f4").tobytes())
                total += len(chunk)
            _check_length(recording, recording.samples, total)
            known = self._remember(recording.row, samples=total, sha256=hashed.hexdigest())
        return known["sha256"]

    def _sound(self, u: Utterance) -> np.ndarray:
        """(stop - start,) float32, as recorded. What lies before it is decoded too, what lies behind it is not."""
        held, at = [], 0
        for chunk in _chunks(u.recording):
            held.append(chunk[max(0, u.start - at) :])
            at += len(chunk)
            if at >= u.stop:
                break
        sound = np.concatenate(held)[: u.stop - u.start]
        _check_length(u.recording, u.stop - u.start, len(sound))
        return sound

    def _remembered(self, row: Row) -> dict:
        known = self._known.get(os.path.abspath(row.file), {})
        return known if known and known["stat"] == _stat(row.file) else {}

    def _remember(self, row: Row, **facts) -> dict:
        facts = {"file": os.path.abspath(row.file), "stat": _stat(row.file), **facts}
        self._known[facts["file"]] = facts
        if self.memory:
            try:
                self.memory.parent.mkdir(parents=True, exist_ok=True)
                with open(self.memory, "a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps(facts))  # a line that a kill cut off ends here
            except OSError as error:
                raise FileError(f"{self.memory}: cannot be written: {error.strerror or error}") from None
        return facts


class DamagedRecording(FileError):
    """A recording was measured, but its sound cannot be had. For `Recordings.fail`."""

    def __init__(self, recording: Recording, message: str):
        super().__init__(message)
        self.recording = recording


def _chunks(recording: Recording):
    try:
        yield from open_audio(recording.row.file).chunks()
    except FileError as error:
        raise DamagedRecording(recording, str(error)) from None


def _check_length(recording: Recording, expected: int, got: int) -> None:
    if got != expected:
        raise DamagedRecording(recording, f"{recording.row.file}: expected {expected} samples as measured before, "
                                          f"got {got}: it is damaged or was changed")  # fmt: skip


def _recall(memory: Path | None) -> dict[str, dict]:
    """File of JSON lines -> facts by file, the last line wins; lines that are not ours are passed over."""
    known = {}
    if memory and memory.exists():
        for line in memory.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                facts = json.loads(line)
                known[facts["file"]] = facts if "stat" in facts else {}
            except (ValueError, KeyError, TypeError):
                continue
    return known


def _stat(file: Path) -> list[int]:
    """Size in bytes, modification time in nanoseconds; zeros for what is not there."""
    try:
        found = os.stat(file)
    except OSError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]


def header_samples(file: Path) -> int | None:
    """Length at 16 kHz by the header alone; None where only decoding can tell (mp3, what libsndfile does not read).

    Raises FileError when there is no such file.
    """
    open_audio(file)
    try:
        import soundfile

        info = soundfile.info(str(file))
    except (ImportError, OSError, RuntimeError, TypeError):  # decoding says it better; TypeError: a name in .raw
        return None
    if info.format == "MP3" or not 0 < info.frames < 1 << 62:
        return None
    return -(-info.frames * SAMPLE_RATE // info.samplerate)


# --- windows


def cut(recording: Recording, speed: Fraction = Fraction(1)) -> list[Utterance]:
    """A recording -> itself, or as few equal pieces as are at most 30 s each at this speed."""
    most = int(N_SAMPLES * speed)
    pieces = -(-recording.samples // most)
    edges = [recording.samples * i // pieces for i in range(pieces + 1)]
    return [Utterance(recording, a, b, speed) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def make_windows(recordings: Sequence[Recording], mode: str, seed: int,
                 augment: AugmentOptions | None = None) -> list[Window]:  # fmt: skip
    """Every utterance in one window, for each speed; which ones share a window follows from the seed alone.

    Gains are drawn here, once: the teacher hears them.
    """
    if mode not in MODES:
        raise UsageError(f"mode: expected one of {' '.join(MODES)}, got {mode!r}")
    augment = augment or AugmentOptions()
    windows = []
    for number, speed in enumerate(augment.speeds):
        random = np.random.default_rng([seed, number])
        utterances = [u for recording in recordings for u in cut(recording, as_fraction(speed))]
        if augment.gain_db:
            gains = random.uniform(-augment.gain_db, augment.gain_db, len(utterances)).round(1)
            utterances = [Utterance(u.recording, u.start, u.stop, u.speed, float(g))
                          for u, g in zip(utterances, gains, strict=True)]  # fmt: skip
        windows += pack(utterances, mode, random)
    return windows


def pack(utterances: Sequence[Utterance], mode: str, random: np.random.Generator) -> list[Window]:
    """Utterances of at most 30 s -> windows by the mode's rule, see above."""
    if mode == "single":
        return [Window((u,)) for u in utterances]
    shuffled = [utterances[i] for i in random.permutation(len(utterances))]
    if mode == "full":
        return fill(shuffled, lambda: N_SAMPLES)
    alone = -(-len(shuffled) // 2)
    least, most = (s * SAMPLE_RATE for s in PACKED_S)
    packed = fill(shuffled[alone:], lambda: int(random.integers(least, most + 1)))
    return [Window((u,)) for u in shuffled[:alone]] + packed


def fill(utterances: Iterable[Utterance], limit: Callable[[], int]) -> list[Window]:
    """Each utterance joins the first open window that has room for it and a pause, or opens one of limit() samples.

    An utterance that is longer than its window's limit has it for itself.
    """
    windows: list[list[Utterance]] = []
    open_windows: list[list[int]] = []  # room in samples, place in windows
    for u in utterances:
        needed = PAUSE + u.samples
        for space in open_windows:
            if space[0] >= needed:
                space[0] -= needed
                windows[space[1]].append(u)
                break
        else:
            open_windows.append([limit() + PAUSE - needed, len(windows)])
            windows.append([u])
            if len(open_windows) > OPEN_WINDOWS:
                open_windows.remove(min(open_windows))
    return [Window(tuple(members)) for members in windows]


def plan_hash(windows: Iterable[Window]) -> str:
    """What a saved position in the data holds for: sha256 over names, cuts, speeds and gains of all windows."""
    hashed = hashlib.sha256()
    for window in windows:
        for u in window.utterances:
            name = json.dumps(u.recording.row.name)
            hashed.update(f"{name} {u.start} {u.stop} {u.speed} {u.gain_db!r}\n".encode())
        hashed.update(b"\n")
    return hashed.hexdigest()


