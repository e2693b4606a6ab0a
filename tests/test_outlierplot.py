"""The picture of outliers: what it shows, where it goes, and what is said without matplotlib."""

import sys

import numpy as np
import pytest

from minigate import outlierplot
from minigate.errors import FileError, UsageError
from minigate.histogram import Histogram


def report(name, **tensors):
    """tensors: (max_abs, kurtosis) by name with _ for a full stop."""
    figures = {key.replace("__", "."): {"max_abs": m, "kurtosis": k} for key, (m, k) in tensors.items()}
    return {"name": name, "utterances": ["a", "b"], "tensors": figures}


A = report("one", encoder__blocks__0__mlp__0=(5, 3), encoder__blocks__0__attn=(1, 900), encoder__ln_post=(50, 2),
           decoder__blocks__0__attn__out=(4, 4), decoder__ln=(2, 5))  # fmt: skip
B = report("two", encoder__blocks__0__mlp__0=(5, 3), encoder__blocks__0__attn=(1, 9), encoder__ln_post=(5, 2),
           decoder__ln=(20, 8), encoder__blocks__1__mlp__2=(1, 1))  # fmt: skip


def histogram(scale=1.0, seed=0):
    h = Histogram()
    h.add((scale * np.random.default_rng(seed).standard_normal(1000)).astype(np.float32))
    return h


def test_the_worst_tensors_are_those_of_any_model():
    assert outlierplot.worst([A]) == ["encoder.ln_post", "encoder.blocks.0.attn", "encoder.blocks.0.mlp.0",
                                      "decoder.ln"]  # fmt: skip
    assert outlierplot.worst([A, B])[2] == "decoder.ln"


def test_blocks():
    assert outlierplot.block_of("encoder.blocks.3.mlp_ln input") == "encoder 3"
    assert outlierplot.block_of("decoder.ln input") == "decoder end"


def test_names_of_several_models_block_by_block():
    names = ["encoder.blocks.0.a", "decoder.blocks.0.a", "decoder.ln", "encoder.blocks.10.a", "encoder.blocks.9.b",
             "encoder.blocks.9.a", "encoder.ln_post input", "decoder.blocks.1.a", "decoder.ln"]  # fmt: skip
    assert outlierplot.in_order(names) == [names[i] for i in (0, 4, 5, 3, 6, 1, 7, 2)]


def test_rebinned_counts_are_shared_among_the_bins():
    h = histogram()
    counts = outlierplot.rebinned(h, np.linspace(-8, 8, 41))
    assert counts.sum() == pytest.approx(1000)
    np.testing.assert_array_equal(outlierplot.rebinned(h, h.edges()), h.counts)


def test_the_caption_counts_int8_steps():
    h = Histogram()
    h.add(np.linspace(-1, 1, 10_000).astype(np.float32))
    assert outlierplot.caption(h) == "99.9 % of the values share 255 of int8's 255 steps"
    h.add(np.array([99.0], np.float32))
    assert outlierplot.caption(h) == "99.9 % of the values share 5 of int8's 255 steps"  # 2 of 100 in 255 steps


def test_constants_have_a_caption():
    h = Histogram()
    h.add(np.zeros(5, np.float32))
    assert outlierplot.caption(h) == "99.9 % of the values share 1 of int8's 255 steps"


@pytest.mark.parametrize("reports", [[A], [A, B]])
@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_picture(tmp_path, reports, name):
    pytest.importorskip("matplotlib")
    histograms = [{tensor: histogram(10**i, i) for tensor in r["tensors"]} for i, r in enumerate(reports)]
    outlierplot.draw(str(tmp_path / name), reports, histograms)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG" if name == "a.png" else b"<?xml") and len(data) > 20_000
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(FileError, match="expected a file that can be written"):
        outlierplot.draw(str(tmp_path / "no" / name), reports, histograms)


def test_both_models_are_in_every_panel(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, part, **rest: (figures.append(figure), part.touch()))
    tensors = [{tensor: histogram() for tensor in r["tensors"]} for r in (A, B)]
    outlierplot.draw(str(tmp_path / "a.png"), [A, B], tensors)
    [figure] = figures
    assert len(figure.axes) == 2 + outlierplot.WORST
    for axes in figure.axes:
        shown = [text.get_text() for text in axes.get_legend().get_texts()]
        assert {"one", "two"} <= set(shown) and axes.get_yscale() == "log"
    points = {(float(x), float(y)) for line in figure.axes[1].lines for x, y in zip(*line.get_data(), strict=True)}
    assert {y for _, y in points} >= {900, 9, 8}


def test_what_is_wrong_is_said_before_the_work(monkeypatch):
    with pytest.raises(UsageError, match=r"--plot: expected a name that ends in .png or .pdf or .svg, got x.gif"):
        outlierplot.check("x.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"--plot: expected matplotlib.*pip install 'minigate\[plot\]'"):
        outlierplot.check("x.PNG")
