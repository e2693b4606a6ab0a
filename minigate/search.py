"""Logits step by step -> texts: greedy, sampling, beam search; the order and the ties of openai/whisper.

A search decodes several windows at once, `group` rows for each: `tokens` (rows, n) is what it chose so far, row r
belongs to window r // group. It is given the logits (rows, V) of the next position, forbidden ones at -inf, and of
each row the largest, `candidates` of them, and extends every row by one token. A window is `done` when nothing more can
change its texts; `keep` drops windows, `texts` hands them over.

V n_vocab, W windows, K candidates of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from minigate.choice_kernels import Choice


@dataclass(frozen=True)
class Text:
    """A decoded text: its tokens without the end token, and the sum of all log-probabilities, the end's included."""

    tokens: list[int]
    sum_logprob: float


def best_text(texts: list[Text], length_penalty: float | None) -> Text:
    """The likeliest text for its length n: sum / n, or sum / ((5 + n) / 6)^length_penalty as in Google NMT
    (arXiv 1609.08144, equation 14). The first of equals."""

    def score(text: Text) -> float:
        n = len(text.tokens)
        return text.sum_logprob / (max(n, 1) if length_penalty is None else ((5 + n) / 6) ** length_penalty)

    return max(texts, key=score)


def before_end(tokens: np.ndarray, eot: int) -> list[int]:
    """tokens (n,) up to the first end token."""
    ends = np.flatnonzero(tokens == eot)
    return tokens[: ends[0] if len(ends) else None].tolist()


class Sampler:
    """Every row by itself: the likeliest token at temperature 0, else a draw from softmax(logits / temperature).

    Draws come from one generator per window, with the window's own seed: its texts depend neither on the windows beside
    it nor on the machine's threads. It is Python's, since NumPy's would load OpenSSL, 5 MB.
    """

    candidates = 1

    def __init__(self, seeds: Sequence[tuple[int, ...]], group: int, eot: int, temperature: float):
        windows = len(seeds)
        self.group, self.eot, self.temperature = group, eot, temperature
        self.tokens = np.empty((windows * group, 0), int)
        self.sum_logprob = np.zeros(windows * group, np.float32)
        self.ended = np.zeros(windows * group, bool)
        self.random = [Random(repr(tuple(map(int, seed)))) for seed in seeds]

    def step(self, logits: np.ndarray, choice: Choice) -> None:
        """logits (rows, V), choice of one: extend every row; one that has ended gets end tokens."""
        chosen, values = choice.ids[:, 0].copy(), choice.values
        if self.temperature > 0:
            chosen = self._draw(logits)
            values = np.take_along_axis(logits, chosen[:, None], axis=1)
        self.sum_logprob += np.where(self.ended, 0, choice.logprobs(values)[:, 0])
        chosen[self.ended] = self.eot
        self.ended |= chosen == self.eot
        self.tokens = np.concatenate([self.tokens, chosen[:, None]], axis=1)

    def _draw(self, logits: np.ndarray) -> np.ndarray:
        """One token per row, by the inverse of the cumulative distribution."""
        uniform = [random.random() for random in self.random for _ in range(self.group)]  # in [0, 1)
        return np.array([self._draw_one(row, u) for row, u in zip(logits, uniform, strict=True)])

    def _draw_one(self, logits: np.ndarray, uniform: float) -> int:
        mass = np.exp((logits - logits.max()) / np.float32(self.temperature)).cumsum(dtype=np.float64)
        return np.searchsorted(mass, uniform * mass[-1], side="right")

    def done(self) -> np.ndarray:
        """(W,) whether all rows of a window have ended."""
        return self.ended.reshape(-1, self.group).all(axis=1)

    def keep(self, windows: np.ndarray) -> None:
        """Go on with these windows only, indices into those of now."""
        rows = (windows[:, None] * self.group + np.arange(self.group)).ravel()
        self.tokens, self.sum_logprob, self.ended = self.tokens[rows], self.sum_logprob[rows], self.ended[rows]
        self.random = [self.random[window] for window in windows]

    def texts(self, window: int) -> list[Text]:
        """The window's texts, one per row."""
        rows = range(window * self.group, (window + 1) * self.group)
        return [Text(before_end(self.tokens[row], self.eot), float(self.sum_logprob[row])) for row in rows]


class Beam:
    """Beam search with patience (arXiv 2204.05424): a window is done with round(group * patience) finished texts.

    A step ranks the group + 1 likeliest continuations of each row together; those that end before the group-th best
    that goes on are finished texts.
    """

    def __init__(self, windows: int, group: int, eot: int, patience: float):
        self.group, self.eot, self.candidates = group, eot, group + 1
        self.enough = round(group * patience)
        self.tokens = np.empty((windows * group, 0), int)
        self.sum_logprob = np.zeros(windows * group, np.float32)
        self.finished: list[list[Text]] = [[] for _ in range(windows)]

    def step(self, logits: np.ndarray, choice: Choice) -> np.ndarray:
        """logits (rows, V), choice of `candidates` -> the old row (rows,) that each new one extends."""
        ids = choice.ids
        scores = self.sum_logprob[:, None] + choice.logprobs(choice.values)  # (rows, K)
        sources = np.empty(len(logits), int)
        chosen = np.empty(len(logits), int)
        for window in range(len(self.finished)):
            first = window * self.group
            rows = slice(first, first + (self.group if self.tokens.shape[1] else 1))  # all rows are equal at first
            order = np.argsort(-scores[rows], axis=None, kind="stable")
            source, token, score = first + order // ids.shape[1], ids[rows].ravel()[order], scores[rows].ravel()[order]
            going_on = np.flatnonzero(token != self.eot)[: self.group]
            for i in np.flatnonzero(token[: going_on[-1]] == self.eot):
                self._finish(window, source[i], score[i])
            into = slice(first, first + self.group)
            sources[into], chosen[into], self.sum_logprob[into] = source[going_on], token[going_on], score[going_on]
        self.tokens = np.concatenate([self.tokens[sources], chosen[:, None]], axis=1)
        return sources

    def _finish(self, window: int, row: int, score: float) -> None:
        if len(self.finished[window]) < self.enough and score > -np.inf:
            self.finished[window].append(Text(self.tokens[row].tolist(), float(score)))

    def done(self) -> np.ndarray:
        """(W,) whether a window has enough finished texts, or no row that could still become one."""
        dead = np.isneginf(self.sum_logprob).reshape(-1, self.group).all(axis=1)
        return dead | [len(texts) >= self.enough for texts in self.finished]

    def keep(self, windows: np.ndarray) -> None:
        """Go on with these windows only, indices into those of now."""
        rows = (windows[:, None] * self.group + np.arange(self.group)).ravel()
        self.tokens, self.sum_logprob = self.tokens[rows], self.sum_logprob[rows]
        self.finished = [self.finished[window] for window in windows]

    def texts(self, window: int) -> list[Text]:
        """The window's finished texts, and its likeliest unfinished ones where they are fewer than the group."""
        first = window * self.group  # a step leaves the rows of a window in descending order
        rows = range(first, first + max(self.group - len(self.finished[window]), 0))
        unfinished = [Text(self.tokens[row].tolist(), float(self.sum_logprob[row])) for row in rows]
        return self.finished[window] + unfinished
