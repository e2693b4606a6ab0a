"""How much of an attention head's probability falls on a single key position: heads that try to do nothing.

    Observer(ops, see, mass.see) --q, k, v, gate per module and utterance--> AttentionMass --summary--> figures per head

Softmax must put its probability somewhere. A head with nothing to say puts it on one position, the sink, whose value
is small, and grows large scores to do so: Bondarenko et al., arXiv 2306.12929. The mass of a position is the
probability that it receives, mean over the queries; the position with the largest mass is the head's sink, as in
Gu et al., arXiv 2410.10781, but over all positions rather than the first, since Whisper's encoder is not causal.

T_q queries, T_k keys, D n_state, H n_head, d = D / H.
"""

from collections import Counter
from dataclasses import astuple, dataclass

import numpy as np

MOST = 0.5  # a query that gives its sink more than this has given it most of its attention


@dataclass(frozen=True)
class Sink:
    """Of one head in one utterance."""

    mass: float  # probability that the sink receives, mean over queries
    queries: float  # share of the queries that give it more than MOST
    value: float  # length of its value / mean length of all keys' values: small where the head does nothing
    gate: float  # factor on the head's output, mean over queries; 1 without a gate
    position: int  # of the key: 20 ms each in the encoder's and the cross-attention, tokens in the decoder's own


def sinks(q: np.ndarray, k: np.ndarray, v: np.ndarray, gate: np.ndarray | None, n_head: int,
          causal: bool) -> list[Sink]:  # fmt: skip
    """q (T_q, D), k v (T_k, D), gate (T_q, H), (T_q, D) or None -> a Sink for each head; one (T_q, T_k) at a time."""
    q, k, v = (x.reshape(len(x), n_head, -1).swapaxes(0, 1) for x in (q, k, v))  # (H, T, d)
    lengths = np.linalg.norm(v, axis=2)  # (H, T_k)
    gates = np.ones(n_head) if gate is None else gate.reshape(len(gate), n_head, -1).mean((0, 2), dtype=np.float64)
    found = []
    for head in range(n_head):
        p = probabilities(q[head], k[head], causal)
        mass = p.mean(axis=0, dtype=np.float64)
        position = int(mass.argmax())
        mean_length = float(lengths[head].mean())
        found.append(Sink(
            mass=float(mass[position]), queries=float((p[:, position] > MOST).mean()),
            value=float(lengths[head, position]) / mean_length if mean_length else 1.0,
            gate=float(gates[head]), position=position,
        ))  # fmt: skip
    return found


def probabilities(q: np.ndarray, k: np.ndarray, causal: bool) -> np.ndarray:
    """q (T_q, d), k (T_k, d) of one head -> softmax(q kᵀ / sqrt(d)) (T_q, T_k)."""
    p = q @ k.T
    p *= p.dtype.type(q.shape[1] ** -0.5)
    if causal:
        p[~np.tri(*p.shape, p.shape[1] - p.shape[0], dtype=bool)] = -np.inf
    p -= p.max(axis=1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    return p


def even_mass(t_q: int, t_k: int, causal: bool) -> float:
    """The sink's mass of a head that spreads its probability evenly over the keys it sees."""
    return float((1 / np.arange(t_k - t_q + 1, t_k + 1)).mean()) if causal else 1 / t_k


class AttentionMass:
    """Gathers Sinks: `seen[module]` has a list of one for each head, and `even[module]` an even_mass, per utterance."""

    def __init__(self):
        self.seen: dict[str, list[list[Sink]]] = {}
        self.even: dict[str, list[float]] = {}

    def see(self, name: str, q, k, v, gate, n_head: int, causal: bool) -> None:
        """For Observer: q (1, T_q, D) and so on, one utterance."""
        g = None if gate is None else gate[0]
        self.seen.setdefault(name, []).append(sinks(q[0], k[0], v[0], g, n_head, causal))
        self.even.setdefault(name, []).append(even_mass(q.shape[1], k.shape[1], causal))

    def summary(self) -> dict[str, dict]:
        """-> by module {even, heads: a dict for each head with the means over utterances, the sink's position that is
        the commonest, and the share of the utterances that have it there}."""
        return {name: {"even": float(np.mean(self.even[name])),
                       "heads": [_means(head) for head in zip(*utterances, strict=True)]}
                for name, utterances in self.seen.items()}  # fmt: skip


def _means(found: tuple[Sink, ...]) -> dict:
    """One head in all utterances."""
    mass, queries, value, gate, _ = (float(x) for x in np.mean([astuple(s) for s in found], axis=0))
    [(position, times)] = Counter(s.position for s in found).most_common(1)
    return {"mass": mass, "queries": queries, "value": value, "gate": gate, "position": position,
            "position_share": times / len(found)}  # fmt: skip
