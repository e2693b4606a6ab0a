"""Which layers a quantized model suffers from: what each costs alone in int8, and what each saves alone in float.

    Judge.costs([what stays float, …]) -> for each the KL of the float model's next-token distribution to the simulated
    quantized one's, in nats, mean over the tokens of the calibration's first batch

A layer is what `checkpoint.keepable` names. A cost is that of a
simulation (`quantsim`), which differs from the kernels by rounding only.

T positions, V n_vocab.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minigate import checkpoint, graph, ops, progress, quantsim
from minigate.calibrate import BATCH, Speech, greedy_tokens, with_operators
from minigate.model import Model
from minigate.report import aligned


@dataclass(frozen=True)
class Cost:
    """Of one layer, KL in nats per token."""

    layer: str
    alone: float  # everything else in float
    without: float  # everything else in int8


class Judge:
    """A quantized model that keeps nothing in float, the float model's tensors, and its calibration windows.

    tensors: the quantized model's, or the float model's once more, which are then rounded to nearest.
    shown: progress on stderr.
    """

    def __init__(self, metadata: Mapping, tensors: Mapping[str, np.ndarray], plain: Mapping[str, np.ndarray],
                 speech: Speech, shown: bool = False):  # fmt: skip
        self.model = Model({**metadata, "quantization": None}, plain)
        self.plain: ops.Float = self.model.ops
        self.simulated = quantsim.simulate(metadata, tensors)
        self.speech, self.shown = speech, shown
        self.layers = layers(metadata)

    def costs(self, choices: Sequence[Iterable[str]], what: str = "sensitivity") -> list[float]:
        """The KL of each choice of layers that stay float."""
        variants = [self.simulated.keeping(kept, self.plain) for kept in choices]
        windows = range(min(BATCH, len(self.speech.windows)))
        totals, positions = np.zeros(len(variants)), 0
        with progress.bar(len(windows) * len(variants), what, " runs", shown=self.shown) as bar:
            for i in windows:
                mel, heard = self.speech.mel(i), {}
                tokens = self._tokens(i, mel)
                expected = log_softmax(self._logits(self.plain, mel, tokens, heard))
                positions += len(expected)
                for j, variant in enumerate(variants):
                    totals[j] += divergence(expected, log_softmax(self._logits(variant, mel, tokens, heard)))
                    bar.update()
        return [float(total) / positions for total in totals]

    def _tokens(self, i: int, mel: np.ndarray) -> np.ndarray:
        if i not in self.speech.tokens:
            self.speech.tokens[i] = greedy_tokens(self.model, self.model.encode(mel))
        return self.speech.tokens[i]

    def _logits(self, operators: ops.Float, mel: np.ndarray, tokens: np.ndarray, heard: dict) -> np.ndarray:
        """-> (T, V). heard: encoder outputs by what they depend on, of this window; many choices share one."""
        model = with_operators(self.model, operators)
        key = encoder_state(operators)
        if key not in heard:
            heard[key] = model.encode(mel)
        return model.decode(tokens, model.start(heard[key]), all_positions=True)[0]


def layers(metadata: Mapping) -> list[str]:
    """What may be kept in float, in the network's order."""
    return checkpoint.keepable(metadata["dims"], metadata["quantization"]["scheme"])


def encoder_state(operators: ops.Float) -> tuple:
    """What an encoder's output depends on, of operators that share their parameters."""
    if not isinstance(operators, quantsim.SimulatedWeights):
        return ()
    kept = frozenset(module for module in operators.kept if module.startswith("encoder."))
    return kept, "encoder.ln_post" in operators.held_float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(T, V) -> (T, V) float32."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """KL(expected ‖ got) of log-probabilities (T, V), in nats, summed over T; infinite where got is NaN."""
    total = float((np.exp(expected) * (expected - got)).sum(dtype=np.float64))
    return max(total, 0.0) if np.isfinite(total) else np.inf


def sensitivity(judge: Judge, kept: Sequence[str] = ()) -> tuple[float, list[Cost]]:
    """What everything in int8 costs but what is kept, and each other layer's cost, the dearest first."""
    others = [layer for layer in judge.layers if layer not in kept]
    alone = [[other for other in judge.layers if other != layer] for layer in others]
    without = [[*kept, layer] for layer in others]
    whole, *costs = judge.costs([kept, *alone, *without])
    found = zip(others, costs[: len(others)], costs[len(others) :], strict=True)
    return whole, sorted((Cost(*each) for each in found), key=lambda cost: -cost.alone)


def auto_keep_float(judge: Judge, budget: float, kept: Sequence[str] = (),
                    ranking: Sequence[str] | None = None) -> tuple[list[str], float]:  # fmt: skip
    """-> few layers, `kept` among them, with which the cost is at most `budget`, and that cost.

    Layers are added by what they cost alone, the dearest first (ranking, if it is known), as few as meet the budget;
    then each that turns out not to be needed is given up again, the cheapest first.
    """
    kept = list(kept)
    if ranking is None:
        others = [layer for layer in judge.layers if layer not in kept]
        alone = judge.costs([[o for o in judge.layers if o != layer] for layer in others], "each layer alone")
        ranking = [layer for _, layer in sorted(zip(alone, others, strict=True), key=lambda pair: -pair[0])]
    count, cost = least_count(lambda n: judge.costs([[*kept, *ranking[:n]]], f"{n} layers")[0], len(ranking), budget)
    added = list(ranking[:count])
    for layer in reversed(added[:-1]):  # with one less than `count` the last is needed
        fewer = [other for other in added if other != layer]
        [cost_of_fewer] = judge.costs([[*kept, *fewer]], f"without {layer}")
        if cost_of_fewer <= budget:
            added, cost = fewer, cost_of_fewer
    return graph.expand_keep_float([*kept, *added], judge.model.metadata["dims"]), cost


def least_count(cost_of: Callable[[int], float], most: int, budget: float) -> tuple[int, float]:
    """The smallest n from 0 to most with cost_of(n) <= budget, and that cost, if the cost falls with n; by bisection.

    cost_of(most) is taken to meet every budget: then all is float.
    """
    low, high, costs = -1, most, {}
    while high - low > 1:
        n = 0 if low < 0 and high == most else (low + high) // 2
        costs[n] = cost_of(n)
        low, high = (low, n) if costs[n] <= budget else (n, high)
    return high, costs.get(high, 0.0)


def table(whole: float, costs: Sequence[Cost]) -> str:
    """-> lines of text, the dearest layer first."""
    rows = [("layer", "alone in int8", "alone in float")]
    rows += [(cost.layer, f"{cost.alone:.5f}", f"{cost.without:.5f}") for cost in costs]
    head = f"KL to the float model in nats per token; everything in int8: {whole:.5f}"
    return "\n".join([head, *aligned(rows)])
