"""Reports on outliers -> a picture: largest values and kurtosis block by block, histograms of the worst tensors.

Drawn with matplotlib (extra `plot`), imported when it is needed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from minigate.errors import UsageError
from minigate.ranges import Record, central
from minigate.report import write_whole

FORMATS = (".png", ".pdf", ".svg")
COLOURS = ("tab:blue", "tab:orange")  # of the first and of the second model
KINDS = (  # ends of a tensor's name, what it is, marker
    ((" input",), "residual stream", "o"),
    (("_ln", ".ln_post", ".ln"), "layer norm's output", "s"),
    (("attn", ".out"), "attention's output", "^"),
    (("",), "MLP", "D"),
)
WORST = 4  # histograms
BARS = 160  # in a histogram, of both models together
INT8_STEPS = 255
BULK = 0.999  # of a tensor's values, the share that the histogram's caption speaks of
NORMAL_KURTOSIS = 3


def check(path: str) -> None:
    """UsageError unless path can be a picture's name and matplotlib is there: said before the work, not after."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"--plot: expected a name that ends in {' or '.join(FORMATS)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot: expected matplotlib, which is not installed; "
                         "pip install 'minigate[plot]' brings it") from None  # fmt: skip


def draw(path: str, reports: Sequence[dict], records: Sequence[Mapping[str, Record]]) -> None:
    """Reports and histograms by tensor, of one model or of two, -> a file, whole or not at all. FileError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 15), layout="constrained")
    grid = figure.add_gridspec(4, 2, height_ratios=(1.15, 1.15, 1, 1))
    names = " (blue) and ".join(r["name"] for r in reports) + (" (orange)" if len(reports) > 1 else "")
    figure.suptitle(f"Outliers in the activations of {names}, means over {len(reports[0]['utterances'])} utterances",
                    fontsize=14)  # fmt: skip
    _depth(figure.add_subplot(grid[0, :]), reports, "max_abs", "largest absolute value",
           "Largest value of each tensor, block by block: int8 has 255 steps for all that lies below it")
    _depth(figure.add_subplot(grid[1, :]), reports, "kurtosis", "kurtosis",
           "Kurtosis of each tensor: 3 for a normal distribution (dotted), thousands for a few huge values among small")
    figure.axes[1].axhline(NORMAL_KURTOSIS, color="grey", linestyle=":")
    for i, name in enumerate(worst(reports)):
        _histogram(figure.add_subplot(grid[2 + i // 2, i % 2]), name, reports, [r.get(name) for r in records])
    kind = Path(path).suffix[1:].lower()
    write_whole(path, lambda part: figure.savefig(part, format=kind, dpi=110))


def worst(reports: Sequence[dict]) -> list[str]:
    """The tensors with the largest absolute values and those with the largest kurtosis, in turn, of all models."""
    names = list(dict.fromkeys(name for r in reports for name in r["tensors"]))
    orders = [sorted(names, key=lambda name: -max(r["tensors"][name][key] for r in reports if name in r["tensors"]))
              for key in ("max_abs", "kurtosis")]  # fmt: skip
    return list(dict.fromkeys(name for pair in zip(*orders, strict=True) for name in pair))[:WORST]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of tensors or modules, of several models -> each once, block by block."""
    def place(name: str) -> tuple:
        side, *rest = name.split(".")
        return side != "encoder", int(rest[1]) if rest[0] == "blocks" else math.inf

    return sorted(dict.fromkeys(names), key=place)


def block_of(name: str) -> str:
    """A tensor's place in the network: "encoder 3", or "encoder end" for a final layer norm."""
    side, _, rest = name.partition(".")
    return f"{side} {rest.split('.')[1]}" if rest.startswith("blocks.") else f"{side} end"


def _depth(axes, reports: Sequence[dict], key: str, label: str, title: str) -> None:
    """A point for each tensor over its block, and a line through each block's largest."""
    blocks = list(dict.fromkeys(map(block_of, in_order(name for r in reports for name in r["tensors"]))))
    for number, (r, colour) in enumerate(zip(reports, COLOURS, strict=False)):
        shift = 0.16 * (number - (len(reports) - 1) / 2)
        top: dict[int, tuple[float, str]] = {}
        for name, figures in r["tensors"].items():
            x, y = blocks.index(block_of(name)), figures[key]
            marker = next(marker for ends, _, marker in KINDS if name.endswith(ends))
            axes.plot(x + shift, y, marker, color=colour, markersize=6, alpha=0.6, markeredgewidth=0)
            top[x] = max(top.get(x, (0.0, "")), (y, name))
        for side in ("encoder", "decoder"):
            places = [x for x in sorted(top) if blocks[x].startswith(side)]
            axes.plot([x + shift for x in places], [top[x][0] for x in places], color=colour,
                      label=r["name"] if side == "encoder" else None)  # fmt: skip
        _name_highest(axes, top, shift, colour, above=not number)
    for _, what, marker in KINDS:
        axes.plot([], [], marker, color="grey", label=what)
    axes.set_yscale("log")
    axes.margins(y=0.3)  # room for the legend
    axes.set_xticks(range(len(blocks)), blocks, rotation=30, ha="right")
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylabel(f"{label} (log scale)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=9, ncols=len(reports) + len(KINDS), loc="lower left")


def _name_highest(axes, top: Mapping[int, tuple[float, str]], shift: float, colour: str, above: bool) -> None:
    """top: by block the largest figure and its tensor."""
    x = max(top, key=lambda place: top[place][0])
    y, name = top[x]
    axes.annotate(f"{name}: {y:.0f}", (x + shift, y), (0, 6) if above else (9, 0), textcoords="offset points",
                  fontsize=9, color=colour, ha="center" if above else "left")  # fmt: skip


def _histogram(axes, name: str, reports: Sequence[dict], records: Sequence[Record | None]) -> None:
    """One tensor's values in all models, on one grid of bins."""
    there = [(r, record, colour) for r, record, colour in zip(reports, records, COLOURS, strict=False) if record]
    ends = np.array([bounds(record) for _, record, _ in there])
    low, high = ends[:, 0].min(), ends[:, 1].max()
    edges = np.linspace(low, high, BARS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    lines = []
    for r, record, colour in there:
        axes.stairs(share(record, edges), edges, fill=True, color=colour, alpha=0.45, label=r["name"])
        for end in bounds(record):
            axes.axvline(end, color=colour, linestyle="--", linewidth=1)
        lines.append(f"{r['name']}: {caption(record)}")
    axes.set_yscale("log")
    axes.set_xlabel("value (dashed: the smallest and the largest, which int8 per tensor must reach)")
    axes.set_ylabel("share of the values (log)")
    before = " (before GELU)" if name.endswith(".mlp.0") else ""
    axes.set_title("\n".join([name + before, *lines]), loc="left", fontsize=10)
    axes.legend(fontsize=9)


def bounds(record: Record) -> tuple[float, float]:
    """The smallest and the largest value."""
    return float(record.lows.min()), float(record.highs.max())


def share(record: Record, edges: np.ndarray) -> np.ndarray:
    """edges (n + 1,) ascending -> share of the values between each two (n,); those of a bin of the record that an edge
    cuts are taken for evenly spread in it."""
    used = np.flatnonzero(record.counts).astype(np.uint32)
    bins = np.stack([used << 16, (used + 1) << 16], axis=1).view(np.float32).astype(np.float64)  # from, to; (m, 2)
    order = np.argsort(bins.sum(axis=1))
    below = np.cumsum(record.counts[used][order])
    steps = np.stack([np.concatenate([[0], below[:-1]]), below], axis=1)  # values below from and to
    inside = np.interp(edges, np.sort(bins[order], axis=1).ravel(), steps.ravel())
    return np.diff(inside) / below[-1]


def caption(record: Record) -> str:
    """How many of int8's steps the bulk of the values has for itself."""
    low, high = bounds(record)
    step = (max(high, 0.0) - min(low, 0.0)) / INT8_STEPS
    first, last = central(record, (1 + BULK) / 2, low, high)
    steps = (last - first) / step if step else 0.0
    return f"{100 * BULK:g} % of the values share {max(1, round(steps))} of int8's {INT8_STEPS} steps"
