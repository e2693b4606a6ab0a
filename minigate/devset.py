"""How a student does on the dev manifest during training: losses, word errors, outliers.

In: the student as it is, and windows of one utterance each, heard as evaluation hears them. Out: figures for the log.
Several processes share the windows among themselves and get the same figures.
"""

from collections.abc import Callable, Sequence

import numpy as np

from minigate import decoding, model, wer
from minigate.batches import Batch, Batches, Draw
from minigate.data import FRAMES_PER_S, Window
from minigate.labels import WINDOWS_AT_ONCE
from minigate.mel import CHUNK_LENGTH_S
from minigate.melcache import pad
from minigate.model import Model
from minigate.options import DecodingOptions
from minigate.outliers import Meter, Observer
from minigate.parallel import Alone
from minigate.step import Distillation
from minigate.wer import Errors


class DevSet:
    """Dev windows, and which of them are transcribed and measured.

    batches         of the dev manifest's labeller, without augmentation
    batch_seconds   most that is computed together
    n_transcribed   windows for the word error rate, spread over the manifest; n_measured of these, spread too, for
                    outliers
    """

    def __init__(self, batches: Batches, windows: Sequence[Window], batch_seconds: float, n_transcribed: int,
                 n_measured: int, processes: Alone):  # fmt: skip
        self.batches, self.windows, self.processes = batches, list(windows), processes
        self.batch_seconds = batch_seconds
        self.n_transcribed, self.n_measured = n_transcribed, n_measured

    def label(self, shown: bool = False) -> None:
        """Have the teacher label all windows, once, before the first figures; drop those that cannot be read."""
        labeller = self.batches.labeller
        labeller.ensure(self._share(self.windows), shown)
        bad = set(self.processes.gather(list(labeller.recordings.unreadable)))
        self.windows = [w for w in self.windows if not any(u.recording.row.name in bad for u in w.utterances)]
        self.transcribed = spread(self.windows, self.n_transcribed)
        self.measured = spread(self.transcribed, self.n_measured)

    def figures(self, distillation: Distillation, student: Model, stopped: Callable[[], bool]) -> dict | None:
        """-> the figures for json.dump, or None when `stopped` said so in the middle."""
        losses = self.losses(distillation, stopped)
        scored = self.transcripts(student, stopped)
        meter = Meter(self.processes.gather(self._see(student, stopped)))
        if self.processes.largest(int(stopped())):
            return None
        return {**losses, **word_errors(scored), "outliers": meter.summary() if meter.seen else None}

    # --- losses

    def losses(self, distillation: Distillation, stopped: Callable[[], bool]) -> dict:
        """Means over all windows, as in training."""
        sums = np.zeros((2, 4))  # values times what they are means over; and that
        options = distillation.options
        for draw in self._share(self._draws(self.windows)):
            batch = None if stopped() else self.batches.load(draw)
            if batch is None:
                continue
            counts = np.array([(batch.targets >= 0).sum()] * 2 + [batch.frames.sum(), len(batch.mel)])
            sums += [counts * distillation.losses(batch).array(), counts]
        sums = self.processes.total(sums)
        kl, ce, hidden, outlier = (float(v) for v in sums[0] / np.maximum(sums[1], 1))
        total = options.kl_weight * kl + options.ce_weight * ce + options.hidden_weight * hidden + outlier
        return {"loss": total, "kl": kl, "ce": ce, "hidden": hidden, "outlier": outlier}

    def _draws(self, windows: Sequence[Window]) -> list[Draw]:
        """Windows of one length together, in the order of their length."""
        draws: list[Draw] = []
        by_length = sorted(windows, key=self._length_s)
        for window in by_length:
            length = self._length_s(window)
            most = max(1, min(WINDOWS_AT_ONCE, int(self.batch_seconds // length)))
            if draws and draws[-1].length_s == length and len(draws[-1].windows) < most:
                draws[-1] = Draw(0, (*draws[-1].windows, window), length)
            else:
                draws.append(Draw(0, (window,), length))
        return draws

    def _length_s(self, window: Window) -> int:
        return window.heard_s(self.batches.audio_context)

    def _share(self, items: Sequence) -> list:
        return items[self.processes.rank :: self.processes.ranks]

    # --- word errors

    def transcripts(self, student: Model, stopped: Callable[[], bool]) -> list[tuple[bool, Errors]]:
        """Greedy, at temperature 0 -> for each window whether it has a transcript, and the errors against that or,
        where there is none, against what the teacher understood."""
        normalise, found = wer.load_normaliser()[1], []
        labeller = self.batches.labeller
        for draw in self._share(self._draws(self.transcribed)):
            if stopped():
                break
            mel = pad([self.batches.student_mel(w, 0) for w in draw.windows], draw.length_s * FRAMES_PER_S)
            sound_s = max(w.seconds for w in draw.windows) if draw.length_s < CHUNK_LENGTH_S else None
            options = DecodingOptions(language=labeller.options.language, sound_s=sound_s)
            results = decoding.decode(student, student.encode(mel), options)
            for window, result in zip(draw.windows, results, strict=True):
                label = labeller.usable(window) if window.text is None else None
                if window.text is None and label is None:
                    continue
                reference = labeller.text(label) if window.text is None else window.text
                errors = wer.count_errors(normalise(reference).split(), normalise(result.text).split())
                found.append((window.text is not None, errors))
        return self.processes.gather(found)

    # --- outliers

    def _see(self, student: Model, stopped: Callable[[], bool]) -> list:
        """This process's measurements."""
        meter = Meter()
        for window in self._share(self.measured):
            batch = None if stopped() else self.batches.load(Draw(0, (window,), self._length_s(window)))
            if batch is not None:
                observe(student, batch, meter)
        return meter.items()


def observe(student: Model, batch: Batch, meter: Meter) -> None:
    """A forward of one window, its label given to the decoder, with every tensor measured."""
    ops, dims = Observer(student.ops, meter.see), student.dims
    xa = model.encoder(ops, dims, batch.mel)
    cross = model.cross_keys_values(ops, dims, xa)
    ops.norm("decoder.ln", model.decoder(ops, dims, batch.tokens_in, model.Whole(cross)))


def word_errors(scored: Sequence[tuple[bool, Errors]]) -> dict:
    """-> rates against transcripts and, in a row of their own, against the teacher's text; None where there is none."""
    rows = {}
    for name, has_text in (("wer", True), ("wer_to_teacher", False)):
        table = np.array([(e.total, e.capped, e.words) for text, e in scored if text is has_text]).reshape(-1, 3)
        total, capped, words = (int(n) for n in table.sum(0))
        rows[name] = {"wer": total / words, "wer_capped": capped / words, "utterances": len(table)} if words else None
    return rows


def spread(items: Sequence, count: int) -> list:
    """`count` of the items, or all, at even distances."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def describe(figures: dict) -> str:
    """A line for the screen."""
    parts = [f"loss {figures['loss']:.4f}"]
    for name, what in (("wer", "WER"), ("wer_to_teacher", "WER to the teacher")):
        row = figures[name]
        if row:
            parts.append(f"{what} {100 * row['wer']:.1f} % (capped {100 * row['wer_capped']:.1f}, {row['utterances']} "
                         "utterances)")  # fmt: skip
    if figures["outliers"]:
        o = figures["outliers"]
        parts.append(f"max abs {o['max_abs']:.1f} ({o['max_abs_tensor']}), mean kurtosis {o['kurtosis']:.1f}")
    return "dev: " + ", ".join(parts)
