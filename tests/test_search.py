"""Searches against plain code: enumeration of all texts, a beam search with dictionaries, counted draws."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from minigate.choice_kernels import choose
from minigate.search import Beam, Sampler, Text, best_text

V, EOT = 40, 3  # tokens 0 1 2 and the end are possible, the others are not
LENGTH = 5


def table(seed: int, possible: int = 4):
    """A random model: tokens so far -> log-probabilities (V,), -inf beyond the possible ones."""

    def row(tokens):
        rng = np.random.default_rng([seed, *tokens])
        logits = np.full(V, -np.inf, np.float32)
        logits[:possible] = 2 * rng.normal(size=possible)
        return logits

    return row


def step(search, logits):
    """A step of the search with all ids allowed."""
    rows, n = logits.shape
    return search.step(logits, choose(logits, np.array([], int), np.array([[0, n, n, n]] * rows), n, False,
                                      search.candidates))  # fmt: skip


def run(search, row, length=LENGTH, windows=1):
    """Step the search up to `length` tokens -> the texts of each window, at the step at which it was done."""
    texts, left = {}, np.arange(windows)
    for n in range(length):
        rows_of = np.repeat(left, search.group)
        step(search, np.stack([row(w, t.tolist()) for w, t in zip(rows_of, search.tokens, strict=True)]))
        done = search.done() | (n == length - 1)
        texts |= {left[i]: search.texts(i) for i in np.flatnonzero(done)}
        left = left[~done]
        if not len(left):
            break
        search.keep(np.flatnonzero(~done))
    return [texts[window] for window in range(windows)]


def logprob(row, tokens):
    """Sum of the log-probabilities of `tokens`, in float64."""
    total = 0.0
    for n, token in enumerate(tokens):
        x = row(tokens[:n]).astype(np.float64)
        total += x[token] - np.log(np.exp(x).sum())
    return total


def every_text(row, length):
    """All texts of up to `length` tokens: those that end by then, and those cut off."""
    for n in range(length):
        for tokens in itertools.product(range(3), repeat=n):
            yield Text(list(tokens), logprob(row, [*tokens, EOT]))
    for tokens in itertools.product(range(3), repeat=length):
        yield Text(list(tokens), logprob(row, list(tokens)))


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_likeliest_of_all_texts(seed):
    row = table(seed)
    expected = max((t for t in every_text(row, 3) if len(t.tokens) < 3), key=lambda t: t.sum_logprob)
    beam = Beam(1, 27, EOT, patience=10.0)
    texts = [t for t in run(beam, lambda _, tokens: row(tokens), 4)[0] if len(t.tokens) < 3]
    got = max(texts, key=lambda t: t.sum_logprob)
    assert got.tokens == expected.tokens
    assert got.sum_logprob == pytest.approx(expected.sum_logprob, abs=1e-5)
    assert len({tuple(t.tokens) for t in texts}) == len(texts) == 1 + 3 + 9


def plain_beam(row, group, enough, length):
    """Beam search as one would say it: beams are (tokens, sum) pairs, sorted by sum."""
    beams, finished = [((), 0.0)], []
    for _ in range(length):
        candidates = []
        for tokens, total in beams:
            scores = row(list(tokens)).astype(np.float64)
            scores -= np.log(np.exp(scores).sum())
            for token in sorted(range(V), key=lambda t: -scores[t])[: group + 1]:
                candidates.append((tokens + (token,), total + scores[token]))
        candidates.sort(key=lambda c: -c[1])
        beams = []
        for tokens, total in candidates:
            if len(beams) == group:
                break
            if tokens[-1] != EOT:
                beams.append((tokens, total))
            elif len(finished) < enough and total > -np.inf:
                finished.append((tokens[:-1], total))
        if len(finished) >= enough:
            break
    return finished + beams[: max(group - len(finished), 0)]


@pytest.mark.parametrize("group, patience", [(1, 1.0), (2, 1.0), (3, 1.0), (3, 2.0), (5, 0.6), (5, 1.0), (2, 3.0)])
def test_beam_equals_a_plain_one(group, patience):
    for seed in range(20):
        row = table(seed, possible=12)
        got = run(Beam(1, group, EOT, patience), lambda _, tokens, row=row: row(tokens), 8)[0]
        expected = plain_beam(row, group, round(group * patience), 8)
        assert [tuple(t.tokens) for t in got] == [tokens for tokens, _ in expected]
        assert [t.sum_logprob for t in got] == pytest.approx([total for _, total in expected], abs=1e-5)


def test_patience_waits_for_more_finished_texts():
    row = table(1)
    counts = [len(run(Beam(1, 2, EOT, p), lambda _, tokens: row(tokens), 30)[0]) for p in (1.0, 2.0, 4.0)]
    assert counts == [2, 4, 8]


def test_beam_returns_the_rows_that_were_extended():
    row = table(3, possible=12)
    beam = Beam(2, 3, EOT, 1.0)
    for _ in range(4):
        before = beam.tokens
        sources = step(beam, np.stack([row(t.tolist()) for t in before]))
        np.testing.assert_array_equal(beam.tokens[:, :-1], before[sources])
        assert (sources // 3 == [0, 0, 0, 1, 1, 1]).all()


def test_a_beam_without_possible_rows_is_done():
    only_end = np.full((2, V), -np.inf, np.float32)
    only_end[:, EOT] = 0
    beam = Beam(1, 2, EOT, patience=5.0)
    step(beam, only_end)
    assert beam.done().all()
    step(beam, only_end)  # an end after what is impossible is none
    assert beam.finished == [[Text([], 0.0)]] and best_text(beam.texts(0), None) == Text([], 0.0)


@pytest.mark.parametrize("new", [lambda: Beam(4, 3, EOT, 1.0), lambda: Sampler([()] * 4, 1, EOT, 0.0),
                                 lambda: Sampler([(6, i) for i in range(4)], 4, EOT, 0.8)])  # fmt: skip
def test_windows_do_not_see_each_other(new):
    rows = [table(seed, possible=12) for seed in range(4)]
    together = run(new(), lambda window, tokens: rows[window](tokens), 12, windows=4)
    assert len({max(len(text.tokens) for text in texts) for texts in together}) > 1  # done at different steps
    for window in range(4):
        one = new()
        one.keep(np.array([window]))
        assert together[window] == run(one, lambda _, tokens, window=window: rows[window](tokens), 12)[0]


def test_greedy_takes_the_likeliest_token_and_counts_the_end():
    row = table(4)
    text = run(Sampler([()], 1, EOT, 0.0), lambda _, tokens: row(tokens), 30)[0][0]
    for n, token in enumerate([*text.tokens, EOT]):
        assert token == row(text.tokens[:n]).argmax()
    assert text.sum_logprob == pytest.approx(logprob(row, [*text.tokens, EOT]), abs=1e-5)


def test_a_row_that_has_ended_stays_so():
    sampler = Sampler([()], 2, EOT, 0.0)
    end, word = np.full(V, -9.0), np.full(V, -9.0)
    end[EOT], word[1] = 0, 0
    step(sampler, np.stack([end, word]).astype(np.float32))
    total = sampler.sum_logprob[0]
    step(sampler, np.stack([word, word]).astype(np.float32))
    assert sampler.tokens.tolist() == [[EOT, EOT], [1, 1]]
    assert sampler.sum_logprob[0] == total and not sampler.done().any()


def test_draws_follow_the_tempered_probabilities():
    temperature, n = 0.5, 20_000
    logits = np.full((n, V), -np.inf, np.float32)
    logits[:, 5:9] = np.log([0.1, 0.2, 0.3, 0.4])
    sampler = Sampler([(0,)], n, EOT, temperature)
    step(sampler, logits)
    share = np.bincount(sampler.tokens[:, 0], minlength=V) / n
    expected = np.array([0.1, 0.2, 0.3, 0.4]) ** 2
    np.testing.assert_allclose(share[5:9], expected / expected.sum(), atol=0.015)
    assert share[5:9].sum() == pytest.approx(1)
    assert sampler.sum_logprob[0] == pytest.approx(np.log([0.1, 0.2, 0.3, 0.4])[sampler.tokens[0, 0] - 5], abs=1e-6)


def test_a_draw_of_0_is_the_first_possible_token():
    sampler = Sampler([()], 1, EOT, 1.0)
    sampler.random = [SimpleNamespace(random=lambda: 0.0)]
    logits = np.full((1, V), -np.inf, np.float32)
    logits[0, [6, 8]] = 0
    step(sampler, logits)
    assert sampler.tokens.tolist() == [[6]]


def test_draws_repeat_with_the_seed_alone():
    logits = np.zeros((3, V), np.float32)

    def draw(seed):
        sampler = Sampler([seed], 3, EOT, 1.0)
        for _ in range(6):
            step(sampler, logits)
        return sampler.tokens.tolist()

    assert draw((1, 2)) == draw((1, 2)) != draw((1, 3))


def test_best_text_by_mean_or_by_penalty():
    short, long = Text([1], -1.0), Text([1, 2, 3, 4], -3.0)
    assert best_text([short, long], None) is long  # -1 against -0.75
    assert best_text([short, long], 0.0) is short  # -1 against -3
    assert best_text([short, long], 1.0) is short  # -1 against -3 / 1.5
    for total, best in ((-1.99, 7), (-2.01, 1)):  # ((5 + 7) / 6) = 2
        assert len(best_text([short, Text([1] * 7, total)], 1.0).tokens) == best
    assert best_text([Text([1, 2], -2.0), short], None).tokens == [1, 2]  # equal: the first
    assert best_text([Text([], -0.5), short], None).tokens == []
