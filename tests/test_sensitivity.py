"""What layers cost, and which are kept: on a toy with one layer that is worse than the others."""

import numpy as np
import pytest

from minigate import calibrate, checkpoint, graph, quantsim, sensitivity
from minigate.quantize import with_quantization
from minigate.sensitivity import Cost, Judge
from tests.test_calibrate import hearing_toy, speech
from tests.test_quantize import CALIBRATION

STREAM = "decoder.blocks.0.mlp.2"  # read by decoder.ln alone: the toy has one block
READERS = {STREAM, "decoder.ln"}


def judged(folder, scheme="w8a8-static", stream_range=None, gate="none"):
    """A judge; stream_range spoils the residual stream's grid."""
    metadata, tensors = hearing_toy(gate, n_audio_ctx=30)
    found = speech(folder, metadata, (0.6, 1.1))
    observed = calibrate.observe(metadata, tensors, found)
    ranges = calibrate.find_ranges(observed, found, calibrate.CalibrationOptions(batches=1))
    if stream_range:
        ranges[STREAM] = [-stream_range, stream_range]
    extra = {"ranges": ranges, "calibration": CALIBRATION} if scheme == "w8a8-static" else None
    return Judge(with_quantization(metadata, scheme, "per-tensor", [], found=extra), tensors, tensors, found)


def test_log_softmax_and_divergence():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 5)).astype(np.float32) * 4
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (a, b))
    logs = sensitivity.log_softmax(a), sensitivity.log_softmax(b)
    np.testing.assert_allclose(logs[0], np.log(p), atol=1e-5)
    assert sensitivity.divergence(*logs) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert sensitivity.divergence(logs[0], logs[0]) == 0
    assert sensitivity.divergence(logs[0], np.full_like(b, np.nan)) == np.inf


def test_everything_in_float_costs_nothing_and_the_cost_is_a_mean_over_tokens(tmp_path):
    judge = judged(tmp_path)
    none, some, whole = judge.costs([judge.layers, READERS, []])
    assert none < 1e-6 < some and some != whole
    total = positions = 0
    for i in range(2):
        logits = []
        for operators in (judge.plain, judge.simulated):
            model = calibrate.with_operators(judge.model, operators)
            cache = model.start(model.encode(judge.speech.mel(i)))
            logits.append(sensitivity.log_softmax(model.decode(judge.speech.tokens[i], cache, True)[0]))
        total += sensitivity.divergence(*logits)
        positions += len(logits[0])
    assert whole == pytest.approx(total / positions, rel=1e-5)


@pytest.mark.parametrize("gate", ["none", "per_head"])
def test_keeping_is_what_a_model_made_so_computes(tmp_path, gate):
    judge, tensors = judged(tmp_path, gate=gate), hearing_toy(gate, n_audio_ctx=30)[1]
    metadata = judge.simulated.metadata
    for kept in ([STREAM, "decoder.embed"], ["encoder.positional_embedding", "decoder.blocks.0.attn", "encoder.conv1"]):
        made = quantsim.Simulated(quantsim.with_keep_float(metadata, kept), tensors)
        got = judge.simulated.keeping(kept, judge.plain)
        assert got.kept == made.kept and got.held_float == made.held_float
        for name, array in made.p.items():
            np.testing.assert_array_equal(got.p[name], array)
    assert judge.simulated.kept == set()


def test_shared_encoder_outputs_are_those_of_each_choice(tmp_path, monkeypatch):
    judge = judged(tmp_path)
    choices = [[], ["decoder.ln"], ["encoder.blocks.0.mlp.2"], ["decoder.blocks.0.cross_attn.key"], judge.layers]
    together = judge.costs(choices)
    apart = [judge.costs([choice])[0] for choice in choices]
    assert together == apart
    calls = []
    monkeypatch.setattr(calibrate.Model, "encode", lambda self, mel, encode=calibrate.Model.encode: (
        calls.append(1), encode(self, mel))[1])  # fmt: skip
    judge.costs([[], ["decoder.ln"], ["decoder.blocks.0.attn"]])
    assert len(calls) == 2 * 2  # the float model's and one other for each window


def test_the_dearest_layers_come_first(tmp_path):
    judge = judged(tmp_path, stream_range=200.0)
    whole, costs = sensitivity.sensitivity(judge)
    assert {cost.layer for cost in costs} == set(graph.modules(judge.model.metadata["dims"]))
    assert [cost.alone for cost in costs] == sorted((cost.alone for cost in costs), reverse=True)
    assert costs[0].layer == "decoder.ln" and costs[0].alone > 5 * costs[1].alone
    assert costs[0].without < 0.5 * whole
    by_layer = {cost.layer: cost for cost in costs}
    others = [layer for layer in judge.layers if layer != STREAM]
    assert by_layer[STREAM].alone == judge.costs([others])[0]
    assert by_layer[STREAM].without == judge.costs([[STREAM]])[0]


def test_layers_that_are_kept_anyway_are_not_listed(tmp_path):
    judge = judged(tmp_path)
    whole, costs = sensitivity.sensitivity(judge, ["encoder.ln_post"])
    assert "encoder.ln_post" not in {cost.layer for cost in costs}
    assert whole == judge.costs([["encoder.ln_post"]])[0]


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8"])
def test_schemes_without_points_have_layers_with_weights_and_attention_in_int8(tmp_path, scheme):
    judge = judged(tmp_path, scheme)
    dims = judge.model.metadata["dims"]
    blocks = range(dims["n_audio_layer"] if scheme == "w8a8-dynamic" else 0)
    attention = {f"encoder.blocks.{i}.attn" for i in blocks}
    assert judge.layers and set(judge.layers) == {*checkpoint.quantizable(dims), *attention}
    whole, nothing, *alone = judge.costs([[], judge.layers, sorted(set(judge.layers) - attention)])
    assert nothing < 1e-5 < whole
    assert not attention or alone[0] > 1e-6  # what rounding in attention costs


def test_few_layers_meet_the_budget(tmp_path):
    judge = judged(tmp_path, stream_range=200.0)
    whole, best = judge.costs([[], ["decoder.ln"]])
    budget = 1.2 * best
    chosen, cost = sensitivity.auto_keep_float(judge, budget)
    assert cost <= budget < whole and cost == judge.costs([chosen])[0]
    assert chosen == ["decoder.ln"]
    assert sensitivity.auto_keep_float(judge, 2 * whole) == ([], whole)


class Scripted:
    """A judge whose layers have made-up costs, which add up; `pair` costs unless both of it are kept."""

    def __init__(self, costs, pair=()):
        self.own, self.pair, self.layers = costs, set(pair), list(costs)
        self.model = type("Model", (), {"metadata": {"dims": hearing_toy()[0]["dims"]}})
        self.calls = 0

    def costs(self, choices, what=""):
        self.calls += len(choices)
        return [sum(cost for layer, cost in self.own.items() if layer not in kept)
                + (10.0 if self.pair - set(kept) else 0.0) for kept in choices]  # fmt: skip


NAMES = ["encoder.conv1", "encoder.conv2", "encoder.ln_post", "decoder.embed", "decoder.ln", "decoder.token_embedding"]


def test_layers_that_harm_together_are_kept_together_and_no_others():
    own = dict(zip(NAMES, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))
    judge = Scripted(own, pair=(NAMES[1], NAMES[4]))
    chosen, cost = sensitivity.auto_keep_float(judge, 2.0)
    assert set(chosen) == {NAMES[1], NAMES[4]} and cost == pytest.approx(1.4)
    chosen, cost = sensitivity.auto_keep_float(judge, 1.0)
    assert cost <= 1.0 and {NAMES[1], NAMES[4]} < set(chosen) and len(chosen) == 3


def test_layers_that_turn_out_not_to_be_needed_are_given_up():
    judge = Scripted(dict(zip(NAMES, (0.1, 0.2, 5.0, 0.1, 0.1, 0.1), strict=True)))
    chosen, cost = sensitivity.auto_keep_float(judge, 0.7, ranking=NAMES)
    assert chosen == [NAMES[2]] and cost == pytest.approx(0.6)


def test_a_budget_of_nothing_keeps_everything():
    chosen, cost = sensitivity.auto_keep_float(Scripted(dict.fromkeys(NAMES, 1.0)), 0.0)
    assert set(chosen) == set(NAMES) and cost == 0


def test_what_the_user_keeps_stays_kept():
    judge = Scripted(dict.fromkeys(NAMES, 1.0))
    chosen, _ = sensitivity.auto_keep_float(judge, 3.0, [NAMES[5]])
    assert NAMES[5] in chosen and len(chosen) == 3


@pytest.mark.parametrize("most", [0, 1, 2, 7, 100])
def test_the_least_count_is_found_by_bisection(most):
    for needed in range(most + 1):
        asked = []
        found, cost = sensitivity.least_count(lambda n: asked.append(n) or float(needed - n), most, 0.0)  # noqa: B023
        assert found == needed and len(asked) <= 9 and (cost == 0)


def test_the_table_is_aligned_and_names_its_unit():
    text = sensitivity.table(1.5, [Cost("encoder.ln_post", 1.25, 0.5), Cost("mel", 0.0, 1.5)])
    head, columns, *rows = text.splitlines()
    assert head == "KL to the float model in nats per token; everything in int8: 1.50000"
    assert rows[0].split() == ["encoder.ln_post", "1.25000", "0.50000"] and len({len(row) for row in rows}) == 1
