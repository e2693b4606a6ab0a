"""Outlier metrics: the numbers of a tensor, which tensors are seen, and how they are summed up."""

import numpy as np
import pytest
from scipy import stats

from minigate import model, outliers
from minigate.attention import gate
from minigate.outliers import Figures, Meter, Observer
from minigate.quantize import quantized
from tests.toy import DIMS, toy_model


def test_the_numbers_of_a_tensor():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 30)).astype(np.float32) + 5
    x[3, 7], x[9, 7], x[50, 20] = 40, -30, 36
    found = outliers.measure(x)
    assert found.max_abs == 40
    assert found.kurtosis == pytest.approx(stats.kurtosis(x.astype(np.float64), axis=None, fisher=False), rel=1e-5)
    far = np.abs(x - x.mean()) > 6 * x.std()
    assert far.sum() == 3 and found.above.tolist() == far.sum(0).tolist()


def test_the_largest_value_may_be_negative_and_the_shape_have_more_axes():
    x = np.random.default_rng(0).standard_normal((2, 50, 4)).astype(np.float32)
    x[1, 0, 2] = -70
    found = outliers.measure(x)
    assert found.max_abs == 70 and found.above.tolist() == [0, 0, 1, 0]


def test_huge_and_constant_tensors_have_finite_numbers():
    x = np.ones((10, 100), np.float32)
    assert outliers.measure(x).kurtosis == 0 and not outliers.measure(x).above.any()
    x[0, 0] = 3e15  # its fourth power is beyond float32
    assert outliers.measure(x).kurtosis == pytest.approx(999, rel=1e-2)


def watched(scheme=None, see_attention=None):
    """-> a network's operators, what an observer saw, its results without and with an observer."""
    metadata, tensors = toy_model("per_head")
    dims, rng, seen = model.Dims(**metadata["dims"]), np.random.default_rng(0), {}
    plain = model.OPERATORS[scheme](*(quantized(metadata, tensors, scheme, "per-channel") if scheme else
                                      (metadata, tensors)))  # fmt: skip
    mel = rng.standard_normal((1, DIMS["n_mels"], 2 * DIMS["n_audio_ctx"])).astype(np.float32)
    tokens = rng.integers(0, DIMS["n_vocab"], (1, 5))
    results = []
    for o in (plain, Observer(plain, lambda name, x: seen.setdefault(name, []).append(x), see_attention)):
        xa = model.encoder(o, dims, mel)
        x = model.decoder(o, dims, tokens, model.Whole(model.cross_keys_values(o, dims, xa)))
        results.append(o.values(o.norm("decoder.ln", x)))
    return plain, seen, results


@pytest.mark.parametrize("scheme", [None, "w8a8-dynamic", "w8"])
def test_an_observer_changes_nothing_and_sees_every_tensor_once(scheme):
    _, seen, (plain, observed) = watched(scheme)
    np.testing.assert_allclose(observed, plain, rtol=1e-5, atol=1e-5)
    attentions = {"encoder": ["attn"], "decoder": ["attn", "cross_attn"]}
    modules = [(f"{side}.blocks.{i}", attentions[side]) for side in attentions for i in range(2)]
    norms = [f"{block}.{part}_ln" for block, parts in modules for part in (*parts, "mlp")]
    norms += ["encoder.ln_post", "decoder.ln"]
    expected = {*norms, *(f"{norm} input" for norm in norms)}
    expected |= {f"{block}.{part}{end}" for block, parts in modules for part in parts for end in ("", ".out")}
    expected |= {f"{block}.mlp.{i}" for block, _ in modules for i in (0, 2)}
    assert seen.keys() == expected and all(len(arrays) == 1 for arrays in seen.values())


def test_linears_are_seen_before_gelu_and_residual():
    plain, seen, _ = watched()
    block = {name.removeprefix("encoder.blocks.0."): arrays[0] for name, arrays in seen.items()}
    np.testing.assert_allclose(block["mlp.0"], plain.linear("encoder.blocks.0.mlp.0", block["mlp_ln"]), rtol=1e-6)
    np.testing.assert_allclose(block["attn.out"], plain.linear("encoder.blocks.0.attn.out", block["attn"]), rtol=1e-6)
    after = block["mlp_ln input"] + block["mlp.2"]
    np.testing.assert_allclose(seen["encoder.blocks.1.attn_ln input"][0], after, rtol=1e-6)


def test_attention_is_handed_over_with_its_gate():
    handed = {}
    plain, seen, _ = watched(see_attention=lambda name, *rest: handed.setdefault(name, rest))
    assert len(handed) == 2 + 2 * 2
    for name, (q, k, v, g, n_head, causal) in handed.items():
        assert causal == (name.startswith("decoder.") and name.endswith(".attn")) and n_head == DIMS["n_audio_head"]
        h = seen[f"{name}_ln"][0]
        np.testing.assert_allclose(q, plain.linear(f"{name}.query", h), rtol=1e-6)
        assert k.shape == v.shape and k.shape[1] == (5 if causal else DIMS["n_audio_ctx"])
        np.testing.assert_array_equal(g, gate("per_head", h, plain.gates[name], n_head, plain.gate_scale))


def test_hidden_dimensions_of_the_residual_stream():
    def figures(*above):
        return Figures(1, 3, np.array(above))

    seen = {"encoder.blocks.0.attn_ln input": [figures(0, 2, 0, 6), figures(0, 0, 0, 4)],
            "encoder.blocks.0.mlp.2": [figures(0, 0, 3, 0), figures(0, 0, 1, 0)],
            "encoder.ln_post": [figures(0, 0, 1, 0)] * 2,
            "encoder.blocks.0.attn": [figures(99, 0, 0, 0)] * 2,  # heads' dimensions
            "encoder.blocks.0.mlp.0": [figures(*[9] * 16)] * 2,  # neurons
            "decoder.blocks.0.attn.out": [figures(1, 0, 0, 0)] * 2,
            "decoder.ln": [figures(0, 0, 0, 0)] * 2}  # fmt: skip
    assert outliers.hidden_dimensions(seen, "encoder") == [
        {"dimension": 3, "count": 5, "share": 5 / 9}, {"dimension": 2, "count": 3, "share": 3 / 9},
        {"dimension": 1, "count": 1, "share": 1 / 9},
    ]  # fmt: skip
    assert outliers.hidden_dimensions(seen, "decoder") == [{"dimension": 0, "count": 1, "share": 1}]
    assert outliers.hidden_dimensions({"decoder.ln": [figures(0, 0)]}, "decoder") == []


def test_means_over_utterances_and_the_worst_over_tensors():
    def figures(max_abs, kurtosis, *above):
        return Figures(max_abs, kurtosis, np.array(above))

    meter = Meter([("a", figures(10, 4, 0, 0)), ("b", figures(1, 100, 1, 5)), ("a", figures(20, 8, 0, 0)),
                   ("b", figures(3, 300, 0, 2))])  # fmt: skip
    found = meter.summary()
    assert found["max_abs"] == 15 and found["max_abs_tensor"] == "a"
    assert found["kurtosis"] == (6 + 200) / 2 and found["kurtosis_tensor"] == "b"
    assert found["above_6_sigma"] == 4
    expected = {"max_abs": 2, "kurtosis": 200, "above_6_sigma": 4, "dimension": 1, "share": 3.5 / 4}
    assert found["tensors"]["b"] == expected
    assert found["tensors"]["a"]["dimension"] is None
    assert Meter(meter.items()).summary() == found
    with pytest.raises(ValueError, match="expected an utterance at least"):
        Meter().summary()
