"""Windows -> batches for training: in which order, and the arrays that a step needs.

    windows --Order--> Draw (which windows, how long) --Batches.load--> Batch (arrays)

The order follows from (seed, epoch) alone; a position in it is two numbers, which a checkpoint keeps. A global batch is
the same however many processes share it: process r of n takes every n-th window of it, from the r-th on.

`full`: every window is 30 s long for the model. `variable`: a batch holds windows of about the same length, and is as
long as the longest of them, rounded up to 1 s; shorter ones are padded with zeros like the end of a recording in
transcription. The student's log-mel is the beginning of the teacher's. A share of its windows can be heard padded to
30 s in every epoch, others each time: a student that never hears long silence keeps its teacher's outliers there.

Shapes: B windows, T frames of 10 ms, L decoder positions, D n_state of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minigate import augment
from minigate.augment import AugmentOptions
from minigate.data import FRAMES_PER_S, MODES, Window, plan_hash
from minigate.errors import FileError, UsageError
from minigate.labels import Label, Labeller
from minigate.mel import CHUNK_LENGTH_S
from minigate.melcache import pad

AUDIO_CONTEXTS = MODES[:2]


@dataclass(frozen=True)
class Draw:
    """The windows of a global batch, not loaded yet."""

    epoch: int  # from 0
    windows: tuple[Window, ...]
    length_s: int  # seconds that the model hears of each


@dataclass(frozen=True)
class Batch:
    """What a step needs. Rows are windows whose labels are used."""

    windows: tuple[Window, ...]
    mel: np.ndarray  # (B, n_mels, T) float32, the student's input; T = 100 * Draw.length_s
    tokens_in: np.ndarray  # (B, L) int64: opening and text; of no meaning behind a row's end
    targets: np.ndarray  # (B, L) int64: the next token; -1 within the opening and behind a row's end
    teacher_hidden: np.ndarray  # (B, L, D) float16: teacher's final-norm output where targets >= 0, zeros elsewhere
    frames: np.ndarray  # (B,) int64: positions of the encoder's output, 20 ms each, that are the window's own length
    seconds: float  # of sound, without padding
    teacher_xa: np.ndarray | None = None  # (B, T / 2, D) float16: the teacher's, in a row's own frames


class Order:
    """Every window once an epoch, in batches of at most batch_seconds as the model hears them, one window at least.

    padded_share: of the windows of an epoch, chosen anew for each, those that the model hears as 30 s.
    The position moves with next(); state() and restore() keep it. Order and batches are those of (seed, epoch).
    """

    def __init__(self, windows: Sequence[Window], audio_context: str, batch_seconds: float, seed: int,
                 padded_share: float = 0.0):  # fmt: skip
        if audio_context not in AUDIO_CONTEXTS:
            raise UsageError(f"audio_context: expected one of {' '.join(AUDIO_CONTEXTS)}, got {audio_context!r}")
        if not batch_seconds > 0:
            raise UsageError(f"batch_seconds: expected a number above 0, got {batch_seconds!r}")
        if not windows:
            raise FileError("training data: expected a window of sound at least, got none")
        self.windows, self.seed = list(windows), seed
        self.batch_seconds, self.padded_share = batch_seconds, padded_share
        self.length_s = np.array([w.heard_s(audio_context) for w in windows])
        self.data = f"{plan_hash(windows)[:32]} {audio_context} {batch_seconds:g} {seed} {padded_share:g}"
        self.epoch, self.index = 0, 0  # of the batch that next() gives
        self._batches = self._epoch(0)

    def next(self) -> Draw:
        """The batch at the position, which moves on, into the next epoch after the last one."""
        members, length_s = self._batches[self.index]
        draw = Draw(self.epoch, tuple(self.windows[i] for i in members), length_s)
        self.index += 1
        if self.index == len(self._batches):
            self.epoch, self.index = self.epoch + 1, 0
            self._batches = self._epoch(self.epoch)
        return draw

    def upcoming(self, count: int) -> list[Window]:
        """The windows, each once, of the next `count` batches. The position stays."""
        kept, found = self.state(), {}
        for _ in range(min(count, 2 * len(self.windows))):  # what is longer has every window
            found.update(dict.fromkeys(self.next().windows))
        self.restore(kept)
        return list(found)

    def state(self) -> dict:
        """The position, for json.dump."""
        return {"epoch": self.epoch, "index": self.index, "data": self.data}

    def restore(self, state: dict) -> None:
        """Go to a position. FileError when it is one in other data, or in another order."""
        if state["data"] != self.data:
            raise FileError("training data: expected the windows, audio context, batch seconds, seed and padded share "
                            f"of the checkpoint ({state['data']}), got {self.data}")  # fmt: skip
        self._batches = self._epoch(state["epoch"])
        self.epoch, self.index = state["epoch"], state["index"]

    def _epoch(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        """-> for each batch its windows' places and the seconds heard of each. Windows in random order are sorted by
        length, cut into batches as full as they may be, and these are shuffled."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.windows))
        length_s = self.length_s
        if self.padded_share:
            length_s = np.where(random.random(len(length_s)) < self.padded_share, CHUNK_LENGTH_S, length_s)
        order = order[np.argsort(length_s[order], kind="stable")]
        batches, start = [], 0
        for end in range(1, len(order) + 1):
            longer = end == len(order) or (end + 1 - start) * length_s[order[end]] > self.batch_seconds
            if longer:
                batches.append((order[start:end], int(length_s[order[end - 1]])))
                start = end
        return [batches[i] for i in random.permutation(len(batches))]


class Batches:
    """Draws -> arrays. Labels that are missing are made on the way."""

    def __init__(self, labeller: Labeller, audio_context: str, options: AugmentOptions | None = None, seed: int = 0):
        self.labeller, self.mels = labeller, labeller.mels
        self.audio_context = audio_context
        self.options, self.seed = options or AugmentOptions(), seed

    def load(self, draw: Draw, rank: int = 0, ranks: int = 1) -> Batch | None:
        """This process's share of a global batch; None when it has no window in it whose label is used."""
        labelled = [(window, self.labeller.usable(window)) for window in draw.windows]
        share = [(window, label) for window, label in labelled if label is not None][rank::ranks]
        if not share:
            return None
        windows = tuple(window for window, _ in share)
        tokens_in, targets, hidden = decoder_arrays([label for _, label in share])
        frames = np.array([window.heard_s(self.audio_context) for window in windows]) * FRAMES_PER_S // 2
        mel = pad([self.student_mel(window, draw.epoch) for window in windows], draw.length_s * FRAMES_PER_S)
        encodings = [self.labeller.encoding(window) for window in windows]
        xa = None if encodings[0] is None else pad_encodings(encodings, mel.shape[2] // 2)
        return Batch(windows, mel, tokens_in, targets, hidden, frames, sum(window.seconds for window in windows), xa)

    def student_mel(self, window: Window, epoch: int) -> np.ndarray:
        """-> (n_mels, window.frames) float32, with the noise and the masks of this epoch."""
        recordings = self.mels.recordings
        window_id = recordings.window_id(window)
        mel = None
        if self.options.noise_share:
            random = augment.generator(self.seed, epoch, window_id, augment.NOISE)
            clean = recordings.audio(window)
            heard = augment.add_noise(clean, self.options, random)
            mel = None if heard is clean else self.mels.fresh(heard)
        if mel is None:
            mel = self.mels.content(window)
        return augment.spec_augment(mel, self.options, augment.generator(self.seed, epoch, window_id, augment.MASKS))


def pad_encodings(encodings: Sequence[np.ndarray], positions: int) -> np.ndarray:
    """B of (T, D) float16 -> (B, positions, D), zeros behind a row's end."""
    padded = np.zeros((len(encodings), positions, encodings[0].shape[1]), np.float16)
    for row, encoding in zip(padded, encodings, strict=True):
        row[: len(encoding)] = encoding
    return padded


def decoder_arrays(labels: Sequence[Label]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B labels -> tokens_in (B, L), targets (B, L), teacher_hidden (B, L, D) as in Batch; L is the longest row's."""
    rows = [label.positions() for label in labels]
    length = max(len(given) for given, _ in rows)
    targets = np.full((len(rows), length), -1, np.int64)
    tokens_in = np.empty_like(targets)
    hidden = np.zeros((len(rows), length, labels[0].hidden.shape[1]), np.float16)
    for row, ((given, predicted), label) in enumerate(zip(rows, labels, strict=True)):
        tokens_in[row] = label.targets[-1]  # anything: what is behind the end is heard by no scored position
        tokens_in[row, : len(given)] = given
        targets[row, : len(given)] = predicted
        hidden[row, targets[row] >= 0] = label.hidden
    return tokens_in, targets, hidden
