"""The picture of outliers: what it shows, where it goes, and what is said without matplotlib."""

import sys

import numpy as np
import pytest

from minigate import outlierplot
from minigate.errors import FileError, UsageError
from minigate.ranges import Record


def report(name, **tensors):
    """tensors: (max_abs, kurtosis) by name with _ for a full stop."""
    figures = {key.replace("__", "."): {"max_abs": m, "kurtosis": k} for key, (m, k) in tensors.items()}
    return {"name": name, "utterances": ["a", "b"], "tensors": figures}


A = report("one", encoder__blocks__0__mlp__0=(5, 3), encoder__blocks__0__attn=(1, 900), encoder__ln_post=(50, 2),
           decoder__blocks__0__attn__out=(4, 4), decoder__ln=(2, 5))  # fmt: skip
B = report("two", encoder__blocks__0__mlp__0=(5, 3), encoder__blocks__0__attn=(1, 9), encoder__ln_post=(5, 2),
           decoder__ln=(20, 8), encoder__blocks__1__mlp__2=(1, 1))  # fmt: skip


def recorded(*arrays):
    record = Record(histogram=True)
    for i, x in enumerate(arrays):
        record.see(np.asarray(x, np.float32)[:, None], i)
    return record


def normal(scale=1.0, seed=0):
    return recorded(scale * np.random.default_rng(seed).standard_normal(1000))


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


def test_the_share_of_values_between_edges():
    x = np.concatenate([np.random.default_rng(0).uniform(-9, 9, 100_000), [-600.0], np.zeros(20_000), [350.0]])
    edges = np.array([-700, -550, -400, -9, -4, -1, 0.5, 10, 300, 400.0])  # -600 and 350 are alone
    found = outlierplot.share(recorded(x), edges)
    np.testing.assert_allclose(found, np.histogram(x.astype(np.float32), edges)[0] / len(x), atol=2e-4)
    assert found[1] == found[7] == 0 < found[0] and found.sum() == pytest.approx(1)


def test_the_caption_counts_int8_steps():
    x = np.linspace(-1, 1, 10_000)
    assert outlierplot.caption(recorded(x)) == "99.9 % of the values share 255 of int8's 255 steps"
    assert outlierplot.caption(recorded(x, [99])) == "99.9 % of the values share 5 of int8's 255 steps"  # 2 of 100
    assert outlierplot.caption(recorded(x + 2)) == "99.9 % of the values share 169 of int8's 255 steps"  # 2 of 3
    for n, steps in ((4, 5), (8, 255)):  # of 10 000 at either end: 5 are not the bulk's
        assert f"share {steps} of" in outlierplot.caption(recorded(x, [-50] * n, [50] * n))
    assert outlierplot.caption(recorded(np.zeros(5))) == "99.9 % of the values share 1 of int8's 255 steps"


@pytest.mark.parametrize("reports, name", [([A], "a.svg"), ([A, B], "a.png")])
def test_a_picture(tmp_path, reports, name):
    pytest.importorskip("matplotlib")
    records = [{tensor: normal(10**i, i) for tensor in r["tensors"]} for i, r in enumerate(reports)]
    outlierplot.draw(str(tmp_path / name), reports, records)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG" if name == "a.png" else b"<?xml") and len(data) > 20_000
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_both_models_are_in_every_panel(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, part, **rest: (figures.append(figure), part.touch()))
    records = [{tensor: normal() for tensor in r["tensors"]} for r in (A, B)]
    outlierplot.draw(str(tmp_path / "a.png"), [A, B], records)
    with pytest.raises(FileError, match="expected a file that can be written"):
        outlierplot.draw(str(tmp_path / "no" / "a.png"), [A, B], records)
    figure = figures[0]
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
