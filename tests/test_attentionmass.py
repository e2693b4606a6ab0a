"""Sinks of attention heads: where they are, how much they receive, what they are worth."""

import numpy as np
import pytest

from minigate import attentionmass
from minigate.attentionmass import AttentionMass, Sink, even_mass, probabilities, sinks


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def qkv(t_q=7, t_k=9, d=8, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((t, d)).astype(np.float32) for t in (t_q, t_k, t_k)]


@pytest.mark.parametrize("t_k, causal", [(9, False), (7, True), (9, True)])
def test_probabilities(t_k, causal):
    q, k, _ = (x.astype(np.float64) for x in qkv(t_k=t_k))
    scores = q @ k.T / np.sqrt(8)
    if causal:
        scores[np.arange(t_k) > np.arange(7)[:, None] + t_k - 7] = -np.inf
    np.testing.assert_allclose(probabilities(q, k, causal), softmax(scores), rtol=1e-12)


def test_a_sink_is_found_in_its_head():
    q, k, v = qkv(t_q=10)
    q[:, 4:] = np.abs(q[:, 4:]) + 2
    k[:, 4:] = 0
    k[5, 4:] = 10  # head 1 looks at key 5
    v[5, 4:] *= 0.01
    q[:3, 4:] = 0  # but for three queries, which spread evenly
    first, second = sinks(q, k, v, None, 2, causal=False)
    assert second.position == 5 and second.queries == 0.7 and second.gate == 1
    assert second.mass == pytest.approx(0.7 + 0.3 / 9, abs=1e-4) and second.value < 0.05
    p = softmax(q[:, :4] @ k[:, :4].T / 2).mean(0)
    assert first.position == p.argmax() and first.mass == pytest.approx(p.max(), rel=1e-5)
    lengths = np.linalg.norm(v[:, :4], axis=1)
    assert first.value == pytest.approx(lengths[first.position] / lengths.mean(), rel=1e-5)


def test_more_than_half_is_asked_of_the_sink_not_of_any_key():
    k = np.array([[1, 0], [0, 1]], np.float32)
    q = np.array([[50, 0], [50, 0], [0, 50]], np.float32)
    [sink] = sinks(q, k, k, None, 1, causal=False)
    assert sink.position == 0 and sink.queries == pytest.approx(2 / 3) and sink.mass == pytest.approx(2 / 3)


def test_gates_are_means_of_a_heads_own():
    q, k, v = qkv()
    per_head = np.arange(14, dtype=np.float32).reshape(7, 2)
    assert [s.gate for s in sinks(q, k, v, per_head, 2, False)] == [6, 7]
    elementwise = np.tile(np.arange(8, dtype=np.float32), (7, 1))
    assert [s.gate for s in sinks(q, k, v, elementwise, 2, False)] == [1.5, 5.5]


@pytest.mark.parametrize("t_q, t_k, causal", [(5, 9, False), (6, 6, True), (2, 6, True)])
def test_even_mass_is_what_equal_scores_give(t_q, t_k, causal):
    p = probabilities(np.zeros((t_q, 4)), np.ones((t_k, 4)), causal)
    assert even_mass(t_q, t_k, causal) == pytest.approx(p.mean(0).max())


def test_means_over_utterances(monkeypatch):
    found = iter([[Sink(0.2, 0.1, 1.0, 0.5, 7)], [Sink(0.4, 0.3, 2.0, 1.5, 3)], [Sink(0.6, 0.2, 0.0, 1.0, 7)]])
    monkeypatch.setattr(attentionmass, "sinks", lambda *args: next(found))
    mass, x = AttentionMass(), np.zeros((1, 4, 8))
    for t_k in (4, 8, 8):
        mass.see("m", x, np.zeros((1, t_k, 8)), np.zeros((1, t_k, 8)), None, 1, False)
    summary = mass.summary()
    assert summary.keys() == {"m"} and summary["m"]["even"] == pytest.approx(0.5 / 3)
    [head] = summary["m"]["heads"]
    assert head == pytest.approx({"mass": 0.4, "queries": 0.2, "value": 1, "gate": 1, "position": 7,
                                  "position_share": 2 / 3})  # fmt: skip
    assert isinstance(head["position"], int)
