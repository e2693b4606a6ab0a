"""Outlier metrics of a model's activations: how far a few values stick out, tensor by tensor.

    forward through Observer(ops, meter.see) --per tensor and utterance--> Meter --summary--> figures

usage: python -m minigate.outliers MODEL MANIFEST.tsv [--compare MODEL2] [--json OUT] [--plot OUT.png]

The tensors are those that an integer network would have to hold: every layer norm's input and output, every attention's
output before and after its output projection, and the outputs of both linears of every MLP (of the first one before
its GELU, of the others before the residual is added). An utterance is a forward with one row.

Source of the choice: Bondarenko et al., arXiv 2306.12929 (largest absolute value, kurtosis) and Wagner et al.,
Interspeech 2024. B batch, T positions, D hidden size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minigate import kernels
from minigate.attention import gate

SIGMAS = 6  # distance from the mean, in standard deviations, above which a value is an outlier
LINEARS = (".attn.out", ".cross_attn.out", ".mlp.0", ".mlp.2")
RESIDUAL = (" input", "_ln", ".ln_post", ".ln", ".out", ".mlp.2")  # ends of tensors in the residual stream's dimensions


@dataclass(frozen=True)
class Figures:
    """Of one tensor in one utterance."""

    max_abs: float
    kurtosis: float  # Pearson's: 3 for a normal distribution; 0 for a constant
    above: np.ndarray  # (D,) int: values further than SIGMAS σ from the mean, by hidden dimension


def measure(x: np.ndarray) -> Figures:
    """x (…, D) float32 -> Figures. Sums in float64."""
    x = x.reshape(-1, x.shape[-1])
    max_abs = float(max(x.max(), -x.min()))
    squares = x - x.mean(dtype=np.float64).astype(x.dtype)
    squares *= squares
    variance = float(squares.mean(dtype=np.float64))
    if variance == 0:
        return Figures(max_abs, 0.0, np.zeros(x.shape[1], np.int64))
    above = np.count_nonzero(squares > SIGMAS**2 * variance, axis=0)
    squares /= x.dtype.type(variance)  # before the fourth power, which may leave float32's range
    return Figures(max_abs, float(np.square(squares, dtype=np.float64).mean()), above)


class Observer:
    """A model's operators for `model.encoder` and `model.decoder`, which hand every tensor named above to `see`.

    see_attention: called for every attention with name, q (B, T_q, D), k, v (B, T_k, D), gate (B, T_q, H or D) or
    None, n_head, causal.
    """

    def __init__(self, ops, see: Callable[[str, np.ndarray], None], see_attention: Callable | None = None):
        self._ops, self._see, self._see_attention = ops, see, see_attention

    def __getattr__(self, name: str):
        return getattr(self._ops, name)

    def norm(self, name: str, x):
        self._see(f"{name} input", self._values(x))
        y = self._ops.norm(name, x)
        self._see(name, self._values(y))
        return y

    def linear(self, name: str, x, gelu: bool = False, residual=None):
        y = self._ops.linear(name, x)
        if name.endswith(LINEARS):
            self._see(name, y)
        if gelu:
            y = kernels.gelu(y)
        return y if residual is None else y + residual

    def attention(self, name: str, q, k, v, h, n_head: int, causal: bool):
        y = self._ops.attention(name, q, k, v, h, n_head, causal=causal)
        self._see(name, y)
        if self._see_attention:
            g = gate(self._ops.gate_kind, self._values(h), self._ops.gates.get(name), n_head, self._ops.gate_scale)
            k, v = (self._ops.values(x) for x in (k, v))
            self._see_attention(name, q, k, v, g, n_head, causal)
        return y

    def _values(self, x) -> np.ndarray:
        return x if isinstance(x, np.ndarray) else self._ops.values(x)


class Meter:
    """Gathers Figures: `seen[name]` has one for each utterance."""

    def __init__(self, seen: Iterable[tuple[str, Figures]] = ()):
        self.seen: dict[str, list[Figures]] = {}
        for name, figures in seen:
            self.seen.setdefault(name, []).append(figures)

    def see(self, name: str, x: np.ndarray) -> None:
        self.seen.setdefault(name, []).append(measure(x))

    def items(self) -> list[tuple[str, Figures]]:
        """What another Meter can be made of."""
        return [(name, figures) for name, all_of_it in self.seen.items() for figures in all_of_it]

    def summary(self) -> dict:
        """-> for json.dump: per tensor the means over utterances; over tensors the largest max_abs, the mean kurtosis
        and the sum of the counts, with the worst tensor's name. ValueError when nothing was seen."""
        if not self.seen:
            raise ValueError("outliers: expected an utterance at least, got none")
        tensors = {name: _means(figures) for name, figures in self.seen.items()}
        worst = {key: max(tensors, key=lambda name: tensors[name][key]) for key in ("max_abs", "kurtosis")}
        return {
            "max_abs": tensors[worst["max_abs"]]["max_abs"],
            "max_abs_tensor": worst["max_abs"],
            "kurtosis": float(np.mean([t["kurtosis"] for t in tensors.values()])),
            "kurtosis_tensor": worst["kurtosis"],
            "above_6_sigma": float(sum(t["above_6_sigma"] for t in tensors.values())),
            "tensors": tensors,
        }


def hidden_dimensions(seen: Mapping[str, Sequence[Figures]], side: str) -> list[dict]:
    """side: encoder or decoder -> {dimension, count, share} of each dimension of its residual stream with outliers.

    The counts are sums over the tensors in the stream's dimensions (neither attention before its output projection nor
    the first linears of MLPs), means over utterances; the share is of all these; the largest is first.
    """
    names = [name for name in seen if name.startswith(f"{side}.") and name.endswith(RESIDUAL)]
    counts = sum(np.mean([f.above for f in seen[name]], axis=0) for name in names)
    total = float(np.sum(counts))
    order = [int(d) for d in np.argsort(-counts, kind="stable") if counts[d]] if total else []
    return [{"dimension": d, "count": float(counts[d]), "share": float(counts[d]) / total} for d in order]


def _means(figures: list[Figures]) -> dict:
    """One tensor in all utterances -> its means, and the hidden dimension with the largest share of its outliers."""
    by_dimension = np.mean([f.above for f in figures], axis=0)
    total = float(by_dimension.sum())
    dimension = int(by_dimension.argmax())
    return {
        "max_abs": float(np.mean([f.max_abs for f in figures])),
        "kurtosis": float(np.mean([f.kurtosis for f in figures])),
        "above_6_sigma": total,
        "dimension": dimension if total else None,
        "share": float(by_dimension[dimension]) / total if total else 0.0,
    }


if __name__ == "__main__":
    from minigate.outlierreport import main

    raise SystemExit(main())
