"""Two texts -> word errors; many utterances -> word error rate with its uncertainty.

    text --normalise--> words --count_errors--> Errors per utterance --rates--> pooled WER, --bootstrap--> interval

U utterances, R resamples, C columns.  A rate is a fraction: 0.05 is five percent.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SIMPLE = "simple"
WHISPER = "whisper-english"

RESAMPLES = 10_000
SEED = 0
DRAWS_AT_ONCE = 1_000_000  # bounds the bootstrap's memory to about 20 MB


# --- normalisation

def load_normaliser() -> tuple[str, Callable[[str], str]]:
    """-> (name, text -> text): Whisper's English normaliser when whisper-normalizer is installed, else ours."""
    try:
        from whisper_normalizer.english import EnglishTextNormalizer  # extra `eval`
    except ImportError:
        return SIMPLE, normalise_simple
    return WHISPER, EnglishTextNormalizer()


def normalise_simple(text: str) -> str:
    """Lower-case words separated by single spaces.

    In order: NFKC and lower case; text in [], <> and () goes; typographic apostrophes become '; every character that
    is no letter, digit, mark or apostrophe becomes a space; apostrophes stay inside a word only (don't, o'clock).
    Numbers, contractions, spelling variants and hesitations stay as they are, unlike in Whisper's normaliser.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"\[[^\]]*\]|<[^>]*>|\([^)]*\)", " ", text)
    text = re.sub("[\u2018\u2019\u201b\u02bc\u2032`\u00b4]", "'", text)
    text = "".join(c if c == "'" or unicodedata.category(c)[0] in "LNM" else " " for c in text)
    return " ".join(word for word in (word.strip("'") for word in text.split()) if word)


# --- errors of one utterance

@dataclass(frozen=True)
class Errors:
    """Word errors of a hypothesis against a reference of `words` words."""

    substitutions: int
    deletions: int
    insertions: int
    words: int

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def capped(self) -> int:
        """At most the reference's length, so that one repetition loop cannot rule a pooled rate."""
        return min(self.total, self.words)


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> Errors:
    """Words of both -> Errors of a shortest edit path; among shortest ones, of the one with the most substitutions.

    Levenshtein's recurrence, a row of hypothesis positions at a time.  A deletion or insertion costs `unit`, a
    substitution unit - 1 with unit above every possible number of substitutions, so that the last cell holds the
    number of errors and, as its distance to the next multiple of unit, the number of substitutions.
    """
    n, m = len(reference), len(hypothesis)
    ids = {word: i for i, word in enumerate(dict.fromkeys([*reference, *hypothesis]))}
    heard = np.array([ids[word] for word in hypothesis], dtype=np.int64)
    unit = min(n, m) + 1
    inserted = unit * np.arange(m + 1, dtype=np.int64)
    row = inserted
    for word in reference:
        replaced = row[:-1] + np.where(heard == ids[word], 0, unit - 1)
        step = np.append(row[0] + unit, np.minimum(row[1:] + unit, replaced))
        row = np.minimum.accumulate(step - inserted) + inserted
    total = -(-int(row[-1]) // unit)
    substitutions = total * unit - int(row[-1])
    insertions = (total - substitutions + m - n) // 2  # insertions - deletions = m - n
    return Errors(substitutions, total - substitutions - insertions, insertions, n)


# --- rates of many utterances

def rates(errors: Sequence[Errors], seed: int = SEED) -> dict:
    """Errors of U utterances -> pooled figures; a rate without words, and its interval, is None."""
    table = _table(errors)
    capped, total, words = (int(value) for value in table.sum(axis=0))
    sums = bootstrap(table, seed)
    return {
        "wer": total / words if words else None,
        "ci95": _interval(_ratio(sums[:, 1], sums[:, 2])),
        "wer_capped": capped / words if words else None,
        "ci95_capped": _interval(_ratio(sums[:, 0], sums[:, 2])),
        "substitutions": sum(e.substitutions for e in errors),
        "deletions": sum(e.deletions for e in errors),
        "insertions": sum(e.insertions for e in errors),
        "words": words,
    }


def paired_difference(ours: Sequence[Errors], theirs: Sequence[Errors], seed: int = SEED) -> dict:
    """Errors of the same U utterances by two systems -> ours minus theirs, with the paired bootstrap's intervals.

    Both systems are resampled with the same utterances, so what makes an utterance hard cancels.
    """
    if [e.words for e in ours] != [e.words for e in theirs]:
        raise ValueError("theirs: expected the same references as ours, got other word counts")
    a, b = _table(ours), _table(theirs)
    words = int(a[:, 2].sum())
    sums = bootstrap(np.hstack([a, b]), seed)
    result = {}
    for name, column in (("wer", 1), ("wer_capped", 0)):
        difference = int(a[:, column].sum() - b[:, column].sum())
        result[name] = difference / words if words else None
        result["ci95" if name == "wer" else "ci95_capped"] = _interval(
            _ratio(sums[:, column] - sums[:, column + 3], sums[:, 2]))
    return result


def bootstrap(table: np.ndarray, seed: int = SEED, resamples: int = RESAMPLES) -> np.ndarray:
    """table (U, C) int -> sums (R, C): each resample adds up U rows drawn with replacement.

    Percentile bootstrap over utterances: Bisani and Ney, ICASSP 2004.
    """
    n, columns = table.shape
    sums = np.zeros((resamples, columns), dtype=np.int64)
    if not n:
        return sums
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // n)
    for first in range(0, resamples, at_once):
        rows = rng.integers(0, n, size=(min(at_once, resamples - first), n))
        for column in range(columns):
            sums[first : first + at_once, column] = table[rows, column].sum(axis=1)
    return sums


def _table(errors: Sequence[Errors]) -> np.ndarray:
    """U errors -> (U, 3) int64: capped errors, errors, words."""
    return np.array([(e.capped, e.total, e.words) for e in errors], dtype=np.int64).reshape(-1, 3)


def _ratio(numerator: np.ndarray, words: np.ndarray) -> np.ndarray:
    """(R,), (R,) -> rates of the resamples that have words."""
    return numerator[words > 0] / words[words > 0]


def _interval(values: np.ndarray) -> list[float] | None:
    """Resampled values -> [2.5 %, 97.5 %]."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else None
