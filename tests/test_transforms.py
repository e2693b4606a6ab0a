"""Helpers of quantization: the same function with every gate, and what each is for."""

import numpy as np
import pytest

from minigate import attention, checkpoint, quantize, quantsim, transforms
from minigate.calibrate import CalibrationOptions, with_operators
from minigate.checkpoint import INPUT_SCALE, ROTATIONS
from minigate.errors import UsageError
from minigate.int8weights import quantize_weight
from minigate.model import Model
from minigate.ops import conv_matrix
from minigate.quantizeoptions import QuantizeOptions
from tests.test_calibrate import hearing_toy, speech
from tests.toy import DIMS, toy_model

ATOL = 1e-4  # of logits
D = DIMS["n_audio_state"]
ROTATABLE = [kind for kind in attention.GATE_KINDS if kind != "per_head_mlp"]


def outlier_model(kind):
    """A toy model whose layer norms let some channels through twenty times as large."""
    metadata, tensors = toy_model(kind)
    for name in tensors:
        if name.endswith(("_ln.weight", "ln_post.weight", "decoder.ln.weight")):
            tensors[name][[3, 17]] *= 20
            tensors[name.replace("weight", "bias")][3] -= 5
    return metadata, tensors


def inputs():
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((2, DIMS["n_mels"], 2 * DIMS["n_audio_ctx"])).astype(np.float32)
    return mel, rng.integers(0, DIMS["n_vocab"], (2, 7))


def logits(metadata, tensors):
    model = Model(metadata, tensors)
    mel, tokens = inputs()
    return model.decode(tokens, model.start(model.encode(mel)), all_positions=True)


def watched(metadata, tensors):
    """Operator -> its outputs (…, D) and inputs of the linears."""
    model, seen = Model(metadata, tensors), {}
    norm, linear = model.ops.norm, model.ops.linear

    def see_norm(name, x):
        seen[f"{name} input"], seen[name] = x, norm(name, x)
        return seen[name]

    def see_linear(name, x, *args, **options):
        seen[f"{name} input"], seen[name] = x, linear(name, x, *args, **options)
        return seen[name]

    model.ops.norm, model.ops.linear = see_norm, see_linear
    mel, tokens = inputs()
    model.decode(tokens, model.start(model.encode(mel)), all_positions=True)
    return seen


def maxima(metadata, tensors):
    return {name: np.abs(y).max((0, 1)) for name, y in watched(metadata, tensors).items()}


def unchanged(before, after):
    """The copies that a test made before are what the arguments still are."""
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


# --- smoothquant


@pytest.mark.parametrize("kind", attention.GATE_KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_leaves_the_logits(kind, alpha):
    metadata, tensors = outlier_model(kind)
    copies = {name: array.copy() for name, array in tensors.items()}
    smooth_metadata, smooth = transforms.smoothquant(metadata, tensors, maxima(metadata, tensors), alpha)
    unchanged(copies, tensors)
    assert smooth_metadata == metadata and smooth.keys() - tensors.keys() == {INPUT_SCALE}
    expected = logits(metadata, tensors)
    np.testing.assert_allclose(logits(smooth_metadata, smooth), expected, atol=ATOL * np.abs(expected).max(), rtol=0)
    gates = [name for name in tensors if ".gate." in name and not np.array_equal(tensors[name], smooth[name])]
    assert bool(gates) == (kind != "none")


def test_smoothing_balances_every_norms_output_with_the_weights_that_read_it():
    metadata, tensors = outlier_model("per_head")
    _, smooth = transforms.smoothquant(metadata, tensors, maxima(metadata, tensors))
    after = maxima(metadata, smooth)
    readers = transforms.norm_readers(metadata, tensors)
    assert set(readers) == {name.removesuffix(".weight") for name in tensors
                            if name.endswith(("_ln.weight", "ln_post.weight", "decoder.ln.weight"))}  # fmt: skip
    assert set(readers["encoder.ln_post"]) == {f"decoder.blocks.{i}.cross_attn.{part}.weight" for i in range(2)
                                               for part in ("key", "value")}  # fmt: skip
    for norm, names in readers.items():
        largest = np.max([np.abs(smooth[name]).max(0) for name in names if ".gate." not in name], axis=0)
        np.testing.assert_allclose(after[norm], largest, rtol=1e-3)  # alpha 0.5: sqrt(max |x| max |W|) in both


def test_smoothing_twice_leaves_the_logits():
    model = outlier_model("none")
    once = transforms.smoothquant(*model, maxima(*model), 0.3)
    twice = transforms.smoothquant(*once, maxima(*once), 0.8)
    expected = logits(*model)
    np.testing.assert_allclose(logits(*twice), expected, atol=ATOL * np.abs(expected).max(), rtol=0)


def test_a_channel_without_effect_stays_finite():
    metadata, tensors = toy_model()
    largest = maxima(metadata, tensors)
    tensors["encoder.blocks.0.mlp_ln.weight"][5] = tensors["encoder.blocks.0.mlp_ln.bias"][5] = 0
    tensors["encoder.blocks.0.mlp.0.weight"][:, 6] = 0
    largest["encoder.blocks.0.mlp_ln"][5] = 0
    for alpha in (0, 0.5, 1):
        _, smooth = transforms.smoothquant(metadata, tensors, largest, alpha)
        assert all(np.isfinite(array).all() for array in smooth.values())
        np.testing.assert_allclose(logits(metadata, smooth), logits(metadata, tensors), atol=1e-2, rtol=0)


# --- equalize


@pytest.mark.parametrize("kind", attention.GATE_KINDS)
def test_equalization_leaves_the_logits(kind):
    metadata, tensors = toy_model(kind)
    copies = {name: array.copy() for name, array in tensors.items()}
    equal_metadata, equal = transforms.equalize(metadata, tensors)
    unchanged(copies, tensors)
    assert equal_metadata == metadata and equal.keys() == tensors.keys()
    np.testing.assert_allclose(logits(metadata, equal), logits(metadata, tensors), atol=ATOL, rtol=0)


def test_equalization_gives_both_sides_of_every_channel_one_range():
    metadata, tensors = toy_model()
    tensors["decoder.blocks.1.cross_attn.value.weight"][4] = 0
    _, equal = transforms.equalize(metadata, tensors)
    modules = transforms.attentions(metadata)
    assert len(modules) == 6
    for module in modules:
        value, out, query, key = (equal[f"{module}.{part}.weight"] for part in ("value", "out", "query", "key"))
        live = np.abs(value).max(1) > 0
        np.testing.assert_allclose(np.abs(value).max(1)[live], np.abs(out).max(0)[live], rtol=1e-5)
        np.testing.assert_allclose(np.abs(query).max(1), np.abs(key).max(1), rtol=1e-5)
    assert live.sum() == D - 1
    changed = {name for name in tensors if not np.array_equal(tensors[name], equal[name])}
    assert not any("mlp" in name or "_ln" in name or "conv" in name for name in changed)


# --- rotate


@pytest.mark.parametrize("kind", ROTATABLE)
@pytest.mark.parametrize("seed", [0, 7])
def test_rotation_leaves_the_logits(kind, seed):
    metadata, tensors = toy_model(kind)
    copies = {name: array.copy() for name, array in tensors.items()}
    rotated_metadata, rotated = transforms.rotate(metadata, tensors, seed)
    unchanged(copies, tensors)
    assert rotated_metadata["gate"]["kind"] == ("all_heads" if kind == "per_head" else kind)
    assert metadata["gate"]["kind"] == kind
    assert rotated.keys() - tensors.keys() == set(ROTATIONS)
    np.testing.assert_allclose(logits(rotated_metadata, rotated), logits(metadata, tensors), atol=ATOL, rtol=0)


@pytest.mark.parametrize(("side", "last"), [("encoder", "ln_post"), ("decoder", "ln")])
def test_rotation_spreads_an_outlier_over_the_residual_stream(side, last):
    metadata, tensors = toy_model()
    tensors[f"{side}.blocks.0.mlp.2.bias"][9] += 300
    before, after = watched(metadata, tensors), watched(*transforms.rotate(metadata, tensors))
    name = f"{side}.{last} input"
    largest = np.abs(before[name]).max()
    assert largest > 250 and np.abs(after[name]).max() < 0.5 * largest
    for x in (f"{side}.blocks.1.attn_ln input", name):  # turned: lengths and means stay
        np.testing.assert_allclose(np.linalg.norm(after[x], axis=-1), np.linalg.norm(before[x], axis=-1), rtol=1e-4)
        np.testing.assert_allclose(after[x].mean(-1), before[x].mean(-1), atol=1e-3)
    np.testing.assert_array_equal(after["encoder.conv2"], before["encoder.conv2"])


def test_seeds_make_different_rotations():
    model = toy_model()
    first, again, other = (transforms.rotate(*model, seed)[1] for seed in (0, 0, 1))
    for name in ROTATIONS:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_a_gate_that_cannot_be_dense_is_refused():
    with pytest.raises(UsageError, match="rotate: expected a gate .* got per_head_mlp, whose heads see a slice each"):
        transforms.rotate(*toy_model("per_head_mlp"))


def test_all_three_together_leave_the_logits():
    model = outlier_model("per_head")
    changed = transforms.rotate(*transforms.equalize(*model))
    changed = transforms.smoothquant(*changed, maxima(*changed))
    expected = logits(*model)
    np.testing.assert_allclose(logits(*changed), expected, atol=ATOL * np.abs(expected).max(), rtol=0)


# --- bias_correction


def test_corrected_biases_restore_the_mean_output():
    metadata, tensors = toy_model()
    seen = watched(metadata, tensors)
    means = {name.removesuffix(" input"): x.reshape(-1, x.shape[-1]).mean(0) for name, x in seen.items()
             if name.endswith(" input") and tensors[f"{name.removesuffix(' input')}.weight"].ndim > 1}  # fmt: skip
    assert {"encoder.conv1", "decoder.token_embedding", "encoder.blocks.1.attn.key"} <= means.keys()
    rounded = {}
    for layer in means:
        q, scale = quantize_weight(tensors[f"{layer}.weight"] * 1.1)  # rounding, and an error with a mean
        rounded[f"{layer}.weight"] = q * scale.reshape(-1, *[1] * (q.ndim - 1))
    corrected = transforms.bias_correction(metadata, tensors, rounded, means)
    assert corrected.keys() == tensors.keys()
    for layer, mean in means.items():
        if f"{layer}.bias" not in tensors:
            continue
        w, wq = tensors[f"{layer}.weight"], rounded[f"{layer}.weight"]
        w, wq = (conv_matrix(w), conv_matrix(wq)) if w.ndim == 3 else (w, wq)
        expected = w @ mean + tensors[f"{layer}.bias"]
        np.testing.assert_allclose(wq @ mean + corrected[f"{layer}.bias"], expected, atol=1e-5)
        assert np.abs(wq @ mean + tensors[f"{layer}.bias"] - expected).max() > 1e-3
    for name in tensors:
        if not name.endswith(".bias") or "_ln" in name or "ln" in name.split(".")[1]:
            np.testing.assert_array_equal(corrected[name], tensors[name])


# --- in a quantized model


@pytest.mark.parametrize("kept", [[], ["encoder.positional_embedding", "decoder.embed"], ["decoder.ln"],
                                  ["decoder.token_embedding"], ["paper", "decoder.blocks.0.mlp.2"]])  # fmt: skip
@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_a_model_of_every_scheme_keeps_what_the_helpers_made(tmp_path, scheme, kept):
    metadata, tensors = hearing_toy("per_head", n_audio_ctx=30)
    options = QuantizeOptions(scheme, "per-channel", smoothquant=0.5, bias_correction=True, equalize=True, rotate=True,
                              error_feedback=True, error_diffusion=scheme == "w8a8-static")  # fmt: skip
    heard = speech(tmp_path, metadata, (0.6, 1.1))
    prepared = quantize.prepare(metadata, tensors, options, CalibrationOptions(batches=1), heard)
    checkpoint.write(tmp_path / "out.safetensors", *prepared.quantized(kept))
    file = checkpoint.read(tmp_path / "out.safetensors")
    assert {file.tensors[name].shape for name in (*ROTATIONS, INPUT_SCALE)} == {(D,)}
    loaded, plain = Model(file.metadata, file.tensors), Model(metadata, tensors)
    simulated = with_operators(loaded, quantsim.simulate(file.metadata, file.tensors))
    real, got, expected = (
        each.decode(heard.tokens[0], each.start(each.encode(heard.mel(0))), all_positions=True)
        for each in (loaded, simulated, plain)
    )
    error = np.abs(got - real) / np.abs(real).max()
    assert np.median(error) < 1e-5 and np.quantile(error, 0.99) < 0.02  # a number between two steps spreads
    assert np.abs(real - expected).mean() < 0.15 * expected.std()
