"""Dev figures: means over all windows, word errors against transcripts or the teacher, windows that are dropped."""

import numpy as np
import pytest

from minigate import devset, model, tape, wer
from minigate.batches import Batches, Draw
from minigate.data import make_windows
from minigate.devset import DevSet, spread, word_errors
from minigate.distill import DistillOptions
from minigate.labels import LabelCache, Labeller, LabelOptions
from minigate.melcache import MelCache
from minigate.model import Model
from minigate.parallel import Alone
from minigate.step import Distillation
from minigate.tape import TOKEN_EMBEDDING
from minigate.wer import Errors
from tests.sounds import measured
from tests.toy import toy_model

SECONDS = [0.6, 2.4, 1.1, 2.2, 0.9]
TEXTS = ["one", "", "a longer text", "", ""]
OPTIONS = DistillOptions(outlier_weight=0.3, outlier_tau=1, hidden_weight=0.2)


def never():
    return False


@pytest.fixture(scope="module")
def student():
    metadata, tensors = toy_model("per_head", n_audio_ctx=1500, n_vocab=1864, n_audio_layer=1, n_text_layer=1)
    return {**metadata, "audio_context": "variable"}, tensors


@pytest.fixture
def dev(tmp_path):
    """A way to make one; its recordings and labels stay."""
    recordings, found = measured(tmp_path / "sound", SECONDS, TEXTS, max_unreadable=0.5)
    teacher = Model(*toy_model(n_audio_ctx=1500, n_vocab=1864, n_audio_layer=1, n_text_layer=1, seed=1))
    labeller = Labeller(teacher, LabelCache(tmp_path / "labels", "ab" * 32), MelCache(recordings, 8),
                        LabelOptions(max_compression_ratio=None), encoding_for="variable")  # fmt: skip

    def make(batch_seconds=80, transcribed=64, measured=64, context="variable"):
        windows = make_windows(found, "single", 0)
        return DevSet(Batches(labeller, context), windows, batch_seconds, transcribed, measured, Alone())

    return make


def distillation(student, labeller):
    ops, dims = tape.Recorded(*student), model.Dims(**student[0]["dims"])
    return Distillation(ops, dims, OPTIONS, labeller.teacher.ops.p[TOKEN_EMBEDDING])


def test_losses_are_means_over_all_windows(dev, student):
    one, many = dev(batch_seconds=1), dev()
    for made in (one, many):
        made.label()
    assert [len(draw.windows) for draw in one._draws(one.windows)] == [1] * 5
    assert [(len(draw.windows), draw.length_s) for draw in many._draws(many.windows)] == [(3, 2), (2, 3)]
    distil = distillation(student, one.batches.labeller)
    found = [made.losses(distil, never) for made in (one, many)]
    parts, weights = [], []
    for window in one.windows:
        batch = one.batches.load(Draw(0, (window,), window.rounded_s))
        parts.append(distil.losses(batch).array())
        weights.append([(batch.targets >= 0).sum()] * 2 + [batch.frames.sum(), 1])
    expected = np.average(parts, axis=0, weights=np.array(weights))
    assert [found[0][name] for name in ("kl", "ce", "hidden", "outlier")] == pytest.approx(expected, rel=1e-5)
    total = 0.8 * expected[0] + expected[1] + 0.2 * expected[2] + expected[3]
    assert found[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert {n: found[1][n] for n in ("kl", "ce", "hidden")} == pytest.approx(
        {n: found[0][n] for n in ("kl", "ce", "hidden")}, rel=1e-4)  # fmt: skip


def test_windows_are_heard_at_their_own_length_or_at_30_s(dev):
    made = dev(context="full")
    assert [(len(draw.windows), draw.length_s) for draw in made._draws(made.windows)] == [(2, 30), (2, 30), (1, 30)]


def test_figures_of_a_student(dev, student, monkeypatch):
    made = dev(transcribed=4, measured=2)
    made.label()
    monkeypatch.setattr(made.batches.labeller, "text", lambda label: "a joke")
    found = made.figures(distillation(student, made.batches.labeller), Model(*student), never)
    assert found["loss"] > 0
    assert len(made.transcribed) == 4 and len(made.measured) == 2
    rows = [found["wer"], found["wer_to_teacher"]]
    assert sum(row["utterances"] for row in rows if row) == 4
    assert len(found["outliers"]["tensors"]) == 8 + 2 + 12 + 2 and found["outliers"]["kurtosis"] > 1
    assert "dev: loss " in devset.describe(found) and "mean kurtosis" in devset.describe(found)
    nothing = {**found, "wer": None, "wer_to_teacher": None, "outliers": None}
    assert devset.describe(nothing) == f"dev: loss {found['loss']:.4f}"


def test_transcripts_are_compared_with_texts_or_with_the_teachers(dev, student, monkeypatch):
    made = dev()
    made.label()
    labeller, heard = made.batches.labeller, []

    def decode(given, xa, options):
        heard.append((xa.shape, options.language, options.temperature))
        return [type("Result", (), {"text": "a longer text"})] * len(xa)

    monkeypatch.setattr(devset.decoding, "decode", decode)
    monkeypatch.setattr(labeller, "text", lambda label: "a longer joke")
    found = made.transcripts(Model(*student), never)
    assert [shape for shape, *_ in heard] == [(3, 100, 32), (2, 150, 32)]
    assert {rest for _, *rest in map(tuple, heard) for rest in [tuple(rest)]} == {("en", 0.0)}
    errors = {True: [], False: []}
    for has_text, e in found:
        errors[has_text].append((e.total, e.words))
    assert sorted(errors[True]) == [(0, 3), (3, 1)] and errors[False] == [(1, 3)] * 3


def test_a_label_that_is_not_used_is_no_reference(dev, student, monkeypatch):
    made = dev()
    made.label()
    monkeypatch.setattr(made.batches.labeller, "usable", lambda window: None)
    assert len(made.transcripts(Model(*student), never)) == 2


def test_what_cannot_be_read_is_dropped(dev, tmp_path):
    made = dev()
    (tmp_path / "sound" / "3.wav").write_bytes((tmp_path / "sound" / "3.wav").read_bytes()[:2000])
    made.label()
    assert [w.utterances[0].recording.row.name for w in made.windows] == ["0.wav", "1.wav", "2.wav", "4.wav"]
    assert len(made.transcribed) == 4


def test_it_stops_when_told(dev, student):
    made = dev()
    made.label()
    distil = distillation(student, made.batches.labeller)
    assert made.figures(distil, Model(*student), lambda: True) is None


def test_word_errors_in_rows_of_their_own():
    scored = [(True, Errors(1, 0, 0, 4)), (True, Errors(0, 0, 9, 2)), (False, Errors(0, 1, 0, 5))]
    found = word_errors(scored)
    assert found["wer"] == {"wer": 10 / 6, "wer_capped": 3 / 6, "utterances": 2}
    assert found["wer_to_teacher"] == {"wer": 1 / 5, "wer_capped": 1 / 5, "utterances": 1}
    assert word_errors([]) == {"wer": None, "wer_to_teacher": None}
    assert wer.Errors is Errors


def test_spread():
    assert spread("abcdefghij", 3) == ["a", "d", "g"]
    assert spread("abc", 9) == ["a", "b", "c"] and spread([], 2) == []
