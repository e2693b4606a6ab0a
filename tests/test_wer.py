"""Word errors, the simple normaliser and the bootstrap, against plain implementations and known answers."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from minigate import wer
from minigate.wer import Errors, bootstrap, count_errors, normalise_simple, paired_difference, rates


@pytest.mark.parametrize("reference, hypothesis, expected", [
    ("", "", (0, 0, 0, 0)),
    ("a b c", "a b c", (0, 0, 0, 3)),
    ("a b c", "", (0, 3, 0, 3)),
    ("", "a b c", (0, 0, 3, 0)),
    ("a b c", "a x c", (1, 0, 0, 3)),
    ("a b c", "a c", (0, 1, 0, 3)),
    ("a b c", "a b b c", (0, 0, 1, 3)),
    ("a b", "b a", (2, 0, 0, 2)),  # two substitutions, not a deletion and an insertion: the same number of errors
    ("the cat sat on the mat", "cat sat on a mat mat", (1, 1, 1, 6)),
    ("yes", "yes yes yes yes yes", (0, 0, 4, 1)),
])
def test_known_alignments(reference, hypothesis, expected):
    found = count_errors(reference.split(), hypothesis.split())
    assert (found.substitutions, found.deletions, found.insertions, found.words) == expected


def plain_errors(reference, hypothesis):
    """The textbook table; a cell is (errors, -substitutions, substitutions, deletions, insertions)."""
    table = {(0, 0): (0, 0, 0, 0, 0)}
    for i in range(len(reference) + 1):
        for j in range(len(hypothesis) + 1):
            ways = []
            if i:
                e, k, s, d, n = table[i - 1, j]
                ways.append((e + 1, k, s, d + 1, n))
            if j:
                e, k, s, d, n = table[i, j - 1]
                ways.append((e + 1, k, s, d, n + 1))
            if i and j:
                e, k, s, d, n = table[i - 1, j - 1]
                ways.append((e, k, s, d, n) if reference[i - 1] == hypothesis[j - 1] else (e + 1, k - 1, s + 1, d, n))
            table[i, j] = min(ways, default=table[0, 0])
    return Errors(*table[len(reference), len(hypothesis)][2:], len(reference))


def test_count_errors_equals_the_textbook_table():
    rng = np.random.default_rng(1)
    for _ in range(150):
        reference, hypothesis = (list(rng.choice(list("abcd"), size=rng.integers(0, 13))) for _ in range(2))
        assert count_errors(reference, hypothesis) == plain_errors(reference, hypothesis)


def test_count_errors_equals_jiwer():
    jiwer = pytest.importorskip("jiwer")
    rng = np.random.default_rng(2)
    for _ in range(100):
        reference, hypothesis = (" ".join(rng.choice(list("abcdef"), size=rng.integers(1, 20))) for _ in range(2))
        ours, theirs = count_errors(reference.split(), hypothesis.split()), jiwer.process_words(reference, hypothesis)
        assert ours.total == theirs.substitutions + theirs.deletions + theirs.insertions
        assert ours.insertions - ours.deletions == theirs.insertions - theirs.deletions


def test_capped_errors_stop_at_the_reference():
    assert count_errors(["yes"], ["no"] * 220).total == 220
    assert count_errors(["yes"], ["no"] * 220).capped == 1
    assert count_errors(["a", "b", "c"], ["a", "c"]).capped == 1


@pytest.mark.parametrize("text, expected", [
    ("I guess that's a \"no\".", "i guess that's a no"),
    ("I guess that\u2019s \u2018mine\u2019!", "i guess that's mine"),
    ("'Tis the dogs' o'clock", "tis the dogs o'clock"),
    ("Well-known; (laughs) yes [MUSIC] <unk> no\u2026", "well known yes no"),
    ("\uff28\uff45\ufb01 caf\u00e9 cafe\u0301", "hefi caf\u00e9 caf\u00e9"),
    ("It's $3.50, 100%", "it's 3 50 100"),
    (" \u00a0\t--  ", ""),
    ("\u0928\u092e\u0938\u094d\u0924\u0947", "\u0928\u092e\u0938\u094d\u0924\u0947"),
])
def test_simple_normaliser(text, expected):
    assert normalise_simple(text) == expected
    assert normalise_simple(expected) == expected


def test_normaliser_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper_normalizer", None)
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    assert wer.load_normaliser() == ("simple", normalise_simple)


def test_whisper_normaliser_when_installed():
    pytest.importorskip("whisper_normalizer")
    name, normalise = wer.load_normaliser()
    assert name == "whisper-english"
    assert normalise("Mr. Brown won't pay twenty-one dollars, um, for colour.") == \
        "mister brown will not pay $21 for color"


def test_rates():
    found = rates([Errors(1, 0, 0, 4), Errors(0, 1, 9, 2), Errors(0, 0, 0, 4)])
    assert (found["wer"], found["wer_capped"], found["words"]) == (1.1, 0.3, 10)
    assert (found["substitutions"], found["deletions"], found["insertions"]) == (1, 1, 9)
    assert found["ci95"][0] < 1.1 < found["ci95"][1] and found["ci95_capped"][0] < 0.3 < found["ci95_capped"][1]


def test_rates_without_words():
    found = rates([])
    assert found["wer"] is found["ci95"] is found["wer_capped"] is found["ci95_capped"] is None
    assert rates([Errors(0, 0, 2, 0)])["wer"] is None


def test_interval_of_a_known_distribution():
    """One word each, wrong with p = 0.3: the interval is the binomial's, 0.3 +- 1.96 sqrt(0.21 / 400)."""
    errors = [Errors(int(i < 120), 0, 0, 1) for i in range(400)]
    low, high = rates(errors)["ci95"]
    assert abs(low - (0.3 - 0.0449)) < 0.005 and abs(high - (0.3 + 0.0449)) < 0.005


def test_bootstrap_is_seeded_and_keeps_rows_together(monkeypatch):
    table = np.array([[1, 10], [2, 20], [3, 30]])
    sums = bootstrap(table, seed=3, resamples=50)
    assert sums.shape == (50, 2) and np.array_equal(sums[:, 0] * 10, sums[:, 1])
    assert np.array_equal(sums, bootstrap(table, seed=3, resamples=50))
    assert not np.array_equal(sums, bootstrap(table, seed=4, resamples=50))
    monkeypatch.setattr(wer, "DRAWS_AT_ONCE", 7)  # two resamples at once, the last chunk too
    assert np.array_equal(sums, bootstrap(table, seed=3, resamples=50))


def test_paired_difference_is_sharper_than_the_intervals():
    """Hard and easy utterances, each system far from certain; ours has one error less in every second one."""
    theirs = [Errors(1 + 9 * (i % 5 == 0), 0, 0, 10) for i in range(100)]
    ours = [Errors(e.substitutions - i % 2, 0, 0, 10) for i, e in enumerate(theirs)]
    found = paired_difference(ours, theirs)
    assert found["wer"] == found["wer_capped"] == -0.05
    assert -0.065 < found["ci95"][0] < -0.05 < found["ci95"][1] < -0.035
    assert rates(ours)["ci95"][1] > rates(theirs)["ci95"][0]
    assert paired_difference(ours, ours) == {"wer": 0, "ci95": [0, 0], "wer_capped": 0, "ci95_capped": [0, 0]}


def test_paired_difference_caps_each_side():
    found = paired_difference([Errors(0, 0, 50, 1)], [Errors(0, 0, 0, 1)])
    assert (found["wer"], found["wer_capped"]) == (50.0, 1.0)


def test_paired_difference_wants_the_same_references():
    with pytest.raises(ValueError, match="theirs: expected the same references"):
        paired_difference([Errors(0, 0, 0, 3)], [Errors(0, 0, 0, 4)])
