"""A teacher's labels for windows of sound: computed once, kept on disk, and what a student learns from them.

    teacher, window's log-mel padded to 30 s --greedy--> targets --teacher-forced--> hidden

`targets` are the pseudo-label's tokens, the end token included; `hidden` is what the teacher's final layer norm gives
where each of them is predicted, in float16. From it the teacher's logits follow at any temperature:
`hidden @ token_embedding.T`. Greedy decoding obeys the rules of transcription; the logits are those before the rules.

Where the encoders' outputs are compared too, `encoding` is the teacher's for the part of the window that the student
hears, in float16 as well, kept beside the label: to make it anew is to hear 30 s for every window of every step.

A window is labelled either with timestamps or without. Which, its hash decides (`with_timestamps`), so that it stays
so from epoch to epoch, from run to run and whatever the seed is.

Shapes: B windows, T positions of the encoder, n targets, P opening tokens, L positions, D n_state.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigate import decoding, progress, tensorfile, wer
from minigate.data import FRAMES_PER_S, DamagedRecording, Window
from minigate.errors import FileError, UsageError
from minigate.melcache import MelCache
from minigate.options import DecodingOptions

FORMAT_VERSION = 1
WINDOWS_AT_ONCE = 16  # that a teacher works on together; or fewer, so that
BYTES_AT_ONCE = 300_000_000  # of keys and values for its decoder are enough
ABOUT = "labels.json"  # in the cache's folder: whose labels these are


@dataclass(frozen=True)
class LabelOptions:
    """How windows are labelled and which labels are used. Raises UsageError for a value outside its range."""

    language: str | None = "en"  # spoken; None: detected for each window
    timestamp_share: float = 0.5  # of the windows, those at their natural speed, are labelled with timestamps
    max_compression_ratio: float | None = 2.4  # a label that zlib shrinks more is a loop and not used; None: no check
    max_wer: float | None = None  # a label further from the transcript, where there is one, is not used; None: no check

    def __post_init__(self):
        if not 0 <= self.timestamp_share <= 1:
            raise UsageError(f"timestamp_share: expected a share from 0 to 1, got {self.timestamp_share!r}")
        for name in ("max_compression_ratio", "max_wer"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"{name}: expected a number from 0 up, or none, got {value!r}")


@dataclass(frozen=True)
class Label:
    """What a student learns about a window."""

    opening: np.ndarray  # (P,) int32: sot, language and task of a multilingual model, no_timestamps
    targets: np.ndarray  # (n,) int32: the text, then eot unless the text was cut off at the longest length there is
    hidden: np.ndarray  # (n, D) float16: the teacher's final-norm output where targets[i] is predicted

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """-> what goes into the decoder (L,), and what it should predict there (L,), -1 within the opening."""
        tokens = np.concatenate([self.opening, self.targets])
        predicted = tokens[1:].copy()
        predicted[: len(self.opening) - 1] = -1
        return tokens[:-1], predicted


def with_timestamps(window_id: str, natural_speed: bool, share: float) -> bool:
    """Whether a window is labelled with timestamps: `share` of those at their natural speed, chosen by their hash."""
    return natural_speed and int(window_id[:8], 16) < share * 2**32


def sha256_file(path: str | Path) -> str:
    """The hash that tells one teacher from another. Raises FileError."""
    hashed = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from None
    return hashed.hexdigest()


# --- on disk


class LabelCache:
    """Labels by window and kind, one file each, in a folder that belongs to one teacher and one language.

    teacher_hash: `sha256_file` of the teacher. Raises FileError when the folder holds another teacher's labels, or
    cannot be written. Files appear whole; a damaged one counts as missing.
    """

    def __init__(self, folder: Path, teacher_hash: str, language: str | None = "en"):
        self.folder = folder
        about = {"format_version": FORMAT_VERSION, "teacher_sha256": teacher_hash, "language": language}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = self._about()
            if found is None:
                _write_whole(folder / ABOUT, json.dumps(about) + "\n")
                found = about
        except OSError as error:
            raise FileError(f"{folder}: cannot be used as a label cache: {error.strerror or error}") from None
        self.teacher_hash = teacher_hash
        for field, expected in about.items():
            self._check(folder, field, expected, found.get(field))

    def has(self, window_id: str, timestamps: bool) -> bool:
        return self._path(window_id, timestamps).exists()

    def get(self, window_id: str, timestamps: bool) -> Label | None:
        """The label; None when it is missing or damaged. FileError for one that another teacher left here."""
        try:
            metadata, tensors = tensorfile.read(self._path(window_id, timestamps))
            label = Label(*(np.array(tensors[name]) for name in ("opening", "targets", "hidden")))
        except (FileError, KeyError):
            return None
        self._check(self._path(window_id, timestamps), "teacher_sha256", self.teacher_hash,
                    metadata.get("teacher_sha256"))  # fmt: skip
        whole = label.opening.ndim == label.targets.ndim == 1 and label.hidden.ndim == 2
        return label if whole and len(label.targets) == len(label.hidden) and len(label.opening) else None

    def put(self, window_id: str, timestamps: bool, label: Label) -> None:
        """Raises FileError when the disk is full."""
        tensors = {"opening": label.opening, "targets": label.targets, "hidden": label.hidden}
        self._write(self._path(window_id, timestamps), window_id, tensors)

    def encoding(self, window_id: str, positions: int) -> np.ndarray | None:
        """-> (positions, D) float16, mapped; None when it is missing, damaged or shorter. FileError as `get`."""
        path = self._file(window_id, "encoding")
        try:
            metadata, tensors = tensorfile.read(path)
            found = tensors["encoding"]
        except (FileError, KeyError):
            return None
        self._check(path, "teacher_sha256", self.teacher_hash, metadata.get("teacher_sha256"))
        return found[:positions] if found.ndim == 2 and len(found) >= positions else None

    def put_encoding(self, window_id: str, encoding: np.ndarray) -> None:
        """encoding (T, D). Raises FileError when the disk is full."""
        self._write(self._file(window_id, "encoding"), window_id, {"encoding": encoding.astype(np.float16)})

    def _path(self, window_id: str, timestamps: bool) -> Path:
        return self._file(window_id, "timestamps" if timestamps else "text")

    def _file(self, window_id: str, kind: str) -> Path:
        return self.folder / window_id[:2] / f"{window_id}.{kind}"

    def _write(self, path: Path, window_id: str, tensors: dict[str, np.ndarray]) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise FileError(f"{path.parent}: cannot be written: {error.strerror or error}") from None
        tensorfile.write(path, tensors, {"window": window_id, "teacher_sha256": self.teacher_hash})

    def _check(self, where: Path, field: str, expected, got) -> None:
        if got != expected:
            raise FileError(f"{where}: {field}: expected {_short(expected)}, got {_short(got)}, so these are not this "
                            f"run's labels; name another folder with --label-cache, or delete them")  # fmt: skip

    def _about(self) -> dict | None:
        path = self.folder / ABOUT
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise FileError(f"{path}: expected a JSON object, got something else; delete the folder to label anew")
        return found


def _short(value) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else repr(value)


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --- by the teacher


class Labeller:
    """Windows -> labels, from the cache or by the teacher, and which of them are used.

    teacher       a model.Model
    encoding_for  the student's audio context, when the teacher's encodings are wanted too
    left_out      how many labels were not used, by reason
    """

    def __init__(self, teacher, cache: LabelCache, mels: MelCache, options: LabelOptions | None = None,
                 report: Callable[[str], object] = lambda line: print(line, file=sys.stderr),
                 encoding_for: str | None = None):  # fmt: skip
        self.teacher, self.cache, self.mels, self.options = teacher, cache, mels, options or LabelOptions()
        self.encoding_for = encoding_for
        self.recordings = mels.recordings
        self.left_out = {"unreadable": 0, "compression_ratio": 0, "wer": 0}
        self._verdict: dict[Window, bool] = {}  # whether a window is used
        self._normalise = wer.load_normaliser()[1]

    def ensure(self, windows: Iterable[Window], shown: bool = False) -> None:
        """Label those that are not yet; stopped at any time, it goes on where it was. `shown`: with bars on stderr.

        Raises FileError for a full disk, or when too many recordings are unreadable.
        """
        missing, windows = {}, list(windows)
        with progress.bar(len(windows), "hashing sound", " windows", shown=shown) as bar:
            for window in windows:
                key = self._key(window)
                if key and key not in missing and not (self.cache.has(*key) and self._has_encoding(key[0], window)):
                    missing[key] = window
                bar.update()
        order = sorted(missing, key=lambda key: (key[1], missing[key].samples))  # what is alike ends together
        at_once = windows_at_once(self.teacher.dims)
        with progress.bar(len(missing), "labels", " windows", shown=shown) as bar:
            for end in range(len(order) % at_once or at_once, len(order) + 1, at_once):  # the first group may be small:
                keys = order[max(0, end - at_once) : end]  # after a kill the groups still to come are the same
                self._label([(key, missing[key]) for key in keys])
                bar.update(len(keys))

    def usable(self, window: Window) -> Label | None:
        """The window's label, made if it is missing; None when it is not to be used (see `left_out`)."""
        if self._verdict.get(window) is False:
            return None
        key = self._key(window)
        label = self.cache.get(*key) if key else None
        if key and label is None:
            self._label([(key, window)])
            label = self.cache.get(*key) if self._key(window) else None
        if window not in self._verdict:
            reason = self._objection(window, label)
            self._verdict[window] = reason is None
            if reason:
                self.left_out[reason] += 1
        return label if self._verdict[window] else None

    def text(self, label: Label) -> str:
        """What the teacher understood."""
        return self.teacher.tokenizer.decode(label.targets).strip()

    def _key(self, window: Window) -> tuple[str, bool] | None:
        """Window id and whether with timestamps; None when a recording of it is damaged, which is counted."""
        if any(u.recording.row.name in self.recordings.unreadable for u in window.utterances):
            return None
        try:
            window_id = self.recordings.window_id(window)
        except DamagedRecording as error:
            self.recordings.fail(error.recording, error)
            return None
        return window_id, with_timestamps(window_id, window.natural_speed, self.options.timestamp_share)

    def _label(self, missing: Sequence[tuple[tuple[str, bool], Window]]) -> None:
        """Label windows, together, and put them into the cache; those whose sound is damaged are counted."""
        found, mels, frames = [], [], 2 * self.teacher.dims.n_audio_ctx
        for key, window in missing:
            try:
                mels.append(self.mels.padded([window], frames))
                found.append((key, window))
            except DamagedRecording as error:
                self.recordings.fail(error.recording, error)
        if not found:
            return
        xa, keys = self.teacher.encode(np.concatenate(mels)), [key for key, _ in found]
        for (key, window), encoding in zip(found, xa, strict=True):
            if not self._has_encoding(key[0], window):
                self.cache.put_encoding(key[0], encoding[: self._positions(window)])
        for timestamps in (True, False):
            rows = [i for i, key in enumerate(keys) if key[1] is timestamps and self.cache.get(*key) is None]
            if rows:
                for i, label in zip(rows, label_windows(self.teacher, xa[rows], self.options.language, timestamps),
                                    strict=True):  # fmt: skip
                    self.cache.put(*keys[i], label)

    def encoding(self, window: Window) -> np.ndarray | None:
        """-> (T, D) float16 for what the student hears of a window that is usable, made if it is missing; None where
        encodings are not wanted."""
        if self.encoding_for is None:
            return None
        window_id, positions = self.recordings.window_id(window), self._positions(window)
        found = self.cache.encoding(window_id, positions)
        if found is None and (key := self._key(window)):
            self._label([(key, window)])
            found = self.cache.encoding(window_id, positions)
        if found is None:
            names = ", ".join(u.recording.row.name for u in window.utterances)
            raise FileError(f"{self.cache.folder}: expected the teacher's encoding of {names}, got none: the recording "
                            "or the cache was changed or damaged while training")  # fmt: skip
        return found

    def _positions(self, window: Window) -> int:
        return window.heard_s(self.encoding_for) * FRAMES_PER_S // 2

    def _has_encoding(self, window_id: str, window: Window) -> bool:
        """Whether it is there or not wanted."""
        return not self.encoding_for or self.cache.encoding(window_id, self._positions(window)) is not None

    def _objection(self, window: Window, label: Label | None) -> str | None:
        """Why a label is not used, or None."""
        if label is None:
            return "unreadable"
        text, options = self.text(label), self.options
        if options.max_compression_ratio is not None:
            if decoding.compression_ratio(text) > options.max_compression_ratio:
                return "compression_ratio"
        if options.max_wer is not None and window.text is not None:
            errors = wer.count_errors(self._normalise(window.text).split(), self._normalise(text).split())
            if errors.total > options.max_wer * errors.words:
                return "wer"
        return None


def label_windows(teacher, xa: np.ndarray, language: str | None, timestamps: bool) -> list[Label]:
    """xa (B, T, D) of the teacher's encoder -> B labels: greedy, then the hidden states along the tokens found."""
    options = DecodingOptions(language=language, without_timestamps=not timestamps)
    tokenizer, n_ctx = teacher.tokenizer, teacher.dims.n_text_ctx
    pairs = []
    for result in decoding.decode(teacher, xa, options):
        opening = tokenizer.sot_sequence(result.language, "transcribe", timestamps)
        longest = min(n_ctx // 2, n_ctx + 1 - len(opening))  # tokens that decoding may find
        end = [tokenizer.eot] if len(result.tokens) < longest else []
        pairs.append((opening, [*result.tokens, *end]))
    hidden = teacher_forced(teacher, xa, pairs)
    return [Label(np.array(opening, np.int32), np.array(targets, np.int32), h)
            for (opening, targets), h in zip(pairs, hidden, strict=True)]  # fmt: skip


def teacher_forced(teacher, xa: np.ndarray, pairs: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    """xa (B, T, D), (opening, targets) of each window -> (n, D) float16 each, where the targets are predicted."""
    rows = [[*opening, *targets][:-1] for opening, targets in pairs]
    tokens = np.full((len(rows), max(map(len, rows))), teacher.tokenizer.eot)  # behind a row's end: heard by none
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    hidden = teacher.hidden(tokens, teacher.start(xa)).astype(np.float16)
    return [h[len(opening) - 1 :][: len(targets)] for h, (opening, targets) in zip(hidden, pairs, strict=True)]


def windows_at_once(dims) -> int:
    """How many windows the teacher labels together: 16 for tiny, 8 for base."""
    window_bytes = 2 * 4 * dims.n_audio_ctx * dims.n_text_state * dims.n_text_layer  # float32 keys and values
    return max(1, min(WINDOWS_AT_ONCE, BYTES_AT_ONCE // window_bytes))
