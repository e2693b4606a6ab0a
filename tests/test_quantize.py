"""A float model to a quantized one: the three schemes, calibration and helpers, the command line."""

import json

import numpy as np
import pytest

from minigate import calibrate, checkpoint, graph, quantize, quantizereport, tensorfile
from minigate.calibrate import CalibrationOptions
from minigate.errors import UsageError
from minigate.model import Model
from minigate.ops import conv_matrix
from minigate.quantizeoptions import QuantizeOptions
from tests.sounds import write_manifest
from tests.test_calibrate import hearing_toy, speech
from tests.test_errorfeedback import output_error
from tests.toy import DIMS, toy_model

CALIBRATION = {"method": "minmax", "percentile": None, "batches": 16, "seed": 0, "windows": 8, "sha256": "0"}


def quantized(scheme, gate="none", **options):
    """A toy model, with made-up ranges if it is static."""
    metadata, tensors = toy_model(gate)
    if scheme == "w8a8-static":
        ranges = {point: [-1.0, 2.5] for point in graph.points(DIMS, gate)}
        return quantize.quantize_static(metadata, tensors, ranges, CALIBRATION, **options)
    chosen = {"w8a8-dynamic": quantize.quantize_dynamic, "w8": quantize.quantize_w8}[scheme]
    return chosen(metadata, tensors, **options)


@pytest.mark.parametrize("gate", ["none", "per_head_mlp"])
@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_a_scheme_makes_a_model_that_is_accepted(scheme, gate):
    metadata, tensors = quantized(scheme, gate)
    checkpoint.check(metadata, tensors)
    quantization = metadata["quantization"]
    assert quantization["scheme"] == scheme and quantization["keep_float"] == []
    assert quantization["helpers"] == quantize.NO_HELPERS
    static = scheme == "w8a8-static"
    assert ("ranges" in quantization, "calibration" in quantization) == (static, static)
    int8 = {name for name, array in tensors.items() if array.dtype == np.int8}
    positions = {"encoder.positional_embedding", "decoder.positional_embedding"} if static else set()
    assert int8 == {f"{layer}.weight" for layer in checkpoint.quantizable(DIMS)} | positions
    assert tensors["decoder.token_embedding.scale"].shape == (() if static else (DIMS["n_vocab"],))


@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
@pytest.mark.parametrize("weights", ["per-tensor", "per-channel"])
def test_weights_and_what_stays_float_are_options_of_every_scheme(scheme, weights):
    kept = ["encoder.blocks.1", "decoder.embed"]
    metadata, tensors = quantized(scheme, weights=weights, keep_float=kept, helpers={"equalize": True})
    checkpoint.check(metadata, tensors)
    assert tensors["encoder.blocks.1.mlp.2.weight"].dtype == np.float32
    assert tensors["encoder.blocks.0.mlp.2.scale"].shape == ((32,) if weights == "per-channel" else ())
    expanded = graph.expand_keep_float(kept, DIMS)
    stored = metadata["quantization"]["keep_float"]
    assert stored == [module for module in expanded if module in checkpoint.keepable(DIMS, scheme)]
    assert ("encoder.blocks.1.attn" in stored) == (scheme != "w8") and "encoder.blocks.1.mlp.2" in stored
    assert tensors["decoder.positional_embedding"].dtype == np.float32
    assert (tensors["encoder.positional_embedding"].dtype == np.int8) == (scheme == "w8a8-static")
    assert metadata["quantization"]["helpers"] == {**quantize.NO_HELPERS, "equalize": True}


def test_probabilities_are_diffused_only_where_they_have_fixed_steps():
    for scheme in ("w8a8-dynamic", "w8"):
        with pytest.raises(UsageError, match=f"helpers: expected no error_diffusion in {scheme}"):
            quantize.quantized(*toy_model(), scheme, "per-channel", helpers={"error_diffusion": True})


def test_a_models_own_tensors_stay_as_they_are():
    metadata, tensors = toy_model()
    before = {name: array.copy() for name, array in tensors.items()}
    quantize.quantize_dynamic(metadata, tensors)
    assert metadata["quantization"] is None
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_a_quantized_model_is_refused(scheme):
    with pytest.raises(UsageError, match=f"expected a float model, got one quantized as {scheme}"):
        quantize.quantize_dynamic(*quantized(scheme))


def test_an_unknown_layer_is_refused():
    with pytest.raises(UsageError, match="got 'encoder.blocks.1.mpl'; the nearest is encoder.blocks.1.mlp"):
        quantized("w8", keep_float=["encoder.blocks.1.mpl"])


# --- with calibration and helpers


class Helpers:
    """Stands for `transforms`: notes the calls and marks the tensors."""

    def __init__(self):
        self.calls = []

    def _marked(self, tensors, name):
        self.calls.append(name)
        return {**tensors, "encoder.ln_post.bias": tensors["encoder.ln_post.bias"] + 1}

    def equalize(self, metadata, tensors):
        return metadata, self._marked(tensors, "equalize")

    def rotate(self, metadata, tensors, seed):
        return {**metadata, "name": f"rotated by {seed}"}, self._marked(tensors, "rotate")

    def smoothquant(self, metadata, tensors, maxima, alpha):
        self.maxima = maxima
        return metadata, self._marked(tensors, f"smoothquant {alpha}")

    def bias_correction(self, metadata, tensors, rounded, means):
        self.rounded, self.means = rounded, means
        return self._marked(tensors, "bias_correction")


@pytest.fixture
def helpers(monkeypatch):
    made = Helpers()
    monkeypatch.setattr(quantize, "transforms", made)
    return made


def prepared(folder, calibration=None, keep_float=(), **options):
    metadata, tensors = hearing_toy("per_head", n_audio_ctx=30)
    calibration = calibration or CalibrationOptions(batches=1, seed=3)
    found = speech(folder, metadata, (0.6, 1.1))
    made = quantize.prepare(metadata, tensors, QuantizeOptions(**options), calibration, found)
    return tensors, made, made.quantized(keep_float)


def test_static_has_the_ranges_of_its_calibration(tmp_path):
    tensors, made, (metadata, quantized_tensors) = prepared(tmp_path, keep_float=["decoder.ln"])
    checkpoint.check(metadata, quantized_tensors)
    observed = calibrate.observe(*hearing_toy("per_head", n_audio_ctx=30), speech(tmp_path, made.metadata, (0.6, 1.1),
                                                                                  seed=3))  # fmt: skip
    low, high = metadata["quantization"]["ranges"]["encoder.blocks.0.mlp.2"]
    record = observed.records["encoder.blocks.0.mlp.2"]
    assert (low, high) == (record.lows.min(), record.highs.max())
    assert metadata["quantization"]["keep_float"] == ["decoder.ln"]
    assert metadata["quantization"]["calibration"]["seed"] == 3 and made.means is None


def test_helpers_come_one_after_the_other_and_ranges_are_those_of_what_they_made(tmp_path, helpers):
    tensors, made, (metadata, _) = prepared(tmp_path, equalize=True, rotate=True, smoothquant=0.5)
    assert helpers.calls == ["equalize", "rotate", "smoothquant 0.5"]
    assert made.metadata["name"] == "rotated by 3"
    np.testing.assert_allclose(made.tensors["encoder.ln_post.bias"], tensors["encoder.ln_post.bias"] + 3, rtol=1e-6)
    assert helpers.maxima["encoder.blocks.0.mlp_ln"].shape == (32,)
    plain = prepared(tmp_path)[2][0]
    ranges = [m["quantization"]["ranges"]["encoder.ln_post"] for m in (metadata, plain)]
    assert ranges[0][1] == pytest.approx(ranges[1][1] + 3, abs=1e-4)
    assert metadata["quantization"]["helpers"] == {"smoothquant": 0.5, "bias_correction": False, "equalize": True,
                                                   "rotate": True, "error_feedback": False,
                                                   "error_diffusion": False}  # fmt: skip


@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_bias_correction_is_given_what_the_weights_become(tmp_path, helpers, scheme):
    kept = ["encoder.conv2"]
    tensors, made, (metadata, out) = prepared(tmp_path, scheme=scheme, bias_correction=True, keep_float=kept)
    assert helpers.calls == ["bias_correction"] and helpers.means["encoder.conv1"].shape == (24,)
    q, scale = out["encoder.conv1.weight"], np.asarray(out["encoder.conv1.scale"])
    np.testing.assert_array_equal(helpers.rounded["encoder.conv1.weight"], q * scale.reshape(-1, 1, 1))
    np.testing.assert_array_equal(helpers.rounded["encoder.conv2.weight"], tensors["encoder.conv2.weight"])
    np.testing.assert_array_equal(out["encoder.ln_post.bias"], tensors["encoder.ln_post.bias"] + 1)
    assert ("ranges" in metadata["quantization"]) == (scheme == "w8a8-static")


@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_error_feedback_makes_what_every_layer_gives_err_less_in_the_same_scales(tmp_path, scheme):
    _, made, (metadata, out) = prepared(tmp_path, scheme=scheme, error_feedback=True, weights="per-tensor",
                                        keep_float=["encoder.conv2"])  # fmt: skip
    tensors, _, (_, plain) = prepared(tmp_path, scheme=scheme, weights="per-tensor")
    assert metadata["quantization"]["helpers"]["error_feedback"] is True
    assert out["encoder.conv2.weight"].dtype != np.int8
    layers = [layer for layer in checkpoint.quantizable(metadata["dims"]) if layer != "encoder.conv2"]
    for layer in layers:
        w, found, near = (t[f"{layer}.weight"] for t in (tensors, out, plain))
        assert found.shape == w.shape and out[f"{layer}.scale"] == plain[f"{layer}.scale"]
        w, found, near = (conv_matrix(x) if x.ndim == 3 else x for x in (w, found * out[f"{layer}.scale"],
                                                                         near * plain[f"{layer}.scale"]))  # fmt: skip
        errors = [output_error(w, x, made.moments[layer]) for x in (found, near)]
        assert errors[0] < 0.95 * errors[1], layer


@pytest.mark.parametrize("scheme", checkpoint.SCHEMES)
def test_with_every_helper_the_file_is_accepted_and_computes_what_the_float_model_does(tmp_path, scheme):
    options = {"equalize": True, "rotate": True, "smoothquant": 0.5, "bias_correction": True, "error_feedback": True,
               "error_diffusion": scheme == "w8a8-static"}  # fmt: skip
    tensors, made, (metadata, out) = prepared(tmp_path, scheme=scheme, weights="per-channel", **options)
    path = tmp_path / "out.safetensors"
    checkpoint.write(path, metadata, out)
    file = checkpoint.read(path)
    assert file.metadata["gate"]["kind"] == "all_heads" and file.metadata["quantization"]["helpers"] == options
    heard, tokens = speech(tmp_path, metadata, (0.6, 1.1)).mel(0), np.array([[1, 2, 3, 4, 5, 6]])
    plain = Model(hearing_toy("per_head", n_audio_ctx=30)[0], tensors)
    models = [plain, Model(made.metadata, made.tensors), Model(file.metadata, file.tensors)]
    expected, same, rounded = (m.decode(tokens, m.start(m.encode(heard)), all_positions=True) for m in models)
    np.testing.assert_allclose(same, expected, atol=1e-3)
    assert 0 < np.abs(rounded - expected).mean() < 0.2 * np.abs(expected).mean()


def test_without_speech_where_it_is_needed():
    with pytest.raises(UsageError, match="speech: expected a calibration set"):
        quantize.prepare(*toy_model(), QuantizeOptions(), CalibrationOptions())
    made = quantize.prepare(*toy_model(), QuantizeOptions(scheme="w8"), CalibrationOptions())
    checkpoint.check(*made.quantized([]))


# --- the command line


@pytest.fixture
def folder(tmp_path):
    """A float model and a manifest of two recordings."""
    checkpoint.write(tmp_path / "toy.safetensors", *hearing_toy("per_head", n_audio_ctx=30))
    write_manifest(tmp_path / "speech", (0.6, 1.1))
    return tmp_path


def run(folder, *arguments, model="toy.safetensors", output="out.safetensors"):
    out = [] if output is None else ["--output", str(folder / output)]
    return quantize.main([str(folder / model), *out, *map(str, arguments)])


def calibration(folder):
    return ["--calibration", folder / "speech" / "list.tsv", "--batches", 1, "--quiet"]


def test_a_static_model_is_written_and_inspected(folder, capsys):
    assert run(folder, *calibration(folder), "--keep-float", "paper", "decoder.ln", "--ranges", "mse") == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{folder}/out.safetensors: w8a8-static, weights per-tensor, ") and said.err == ""
    file = checkpoint.read(folder / "out.safetensors")
    assert file.metadata["name"] == "out" and file.metadata["quantization"]["calibration"]["method"] == "mse"
    command = file.metadata["provenance"]["quantized_by"]
    assert command.startswith("python -m minigate.quantize toy.safetensors --output out.safetensors --calibration list")
    assert str(folder) not in command
    assert file.metadata["quantization"]["keep_float"][-2:] == ["encoder.ln_post", "decoder.ln"]
    assert quantize.main(["--inspect", str(folder / "out.safetensors")]) == 0
    text = capsys.readouterr().out
    assert text == quantizereport.inspect(file.metadata, file.tensors) + "\n" and "encoder.ln_post" in text


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8"])
def test_the_other_schemes_need_no_calibration(folder, scheme, capsys):
    assert run(folder, "--scheme", scheme, "--weights", "per-tensor") == 0
    quantization = checkpoint.read(folder / "out.safetensors").metadata["quantization"]
    assert quantization["scheme"] == scheme and quantization["weights"] == "per-tensor"


def test_the_same_seed_writes_the_same_file(folder):
    written = []
    for _ in range(2):
        assert run(folder, *calibration(folder)) == 0
        written.append((folder / "out.safetensors").read_bytes())
        (folder / "out.safetensors").unlink()
    assert written[0] == written[1]


def test_progress_is_on_standard_error(folder, capsys):
    assert run(folder, *calibration(folder)[:-1]) == 0
    said = capsys.readouterr()
    assert "calibration" in said.err and said.out.count("\n") == 1


def test_sensitivity_prints_the_layers_and_writes_nothing_unless_told(folder, capsys):
    assert run(folder, *calibration(folder), "--sensitivity", output=None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("KL to the float model in nats per token; everything in int8: 0.")
    assert {line.split()[0] for line in lines[2:]} == set(graph.modules(hearing_toy()[0]["dims"]))
    assert not (folder / "out.safetensors").exists()


def test_a_budget_keeps_layers_in_float(folder, capsys):
    assert run(folder, *calibration(folder), "--auto-keep-float", "1e9") == 0
    assert capsys.readouterr().out.startswith("kept in float: nothing; KL 0.")
    assert checkpoint.read(folder / "out.safetensors").metadata["quantization"]["keep_float"] == []
    assert run(folder, *calibration(folder), "--auto-keep-float", "1e9", "--keep-float", "decoder.ln") == 0
    assert capsys.readouterr().out.startswith("kept in float: decoder.ln; KL 0.")
    assert run(folder, *calibration(folder), "--auto-keep-float", "1e-4", "--scheme", "w8", "--sensitivity") == 0
    kept = checkpoint.read(folder / "out.safetensors").metadata["quantization"]["keep_float"]
    assert kept and f"kept in float: {' '.join(kept)}; KL 0.0000" in capsys.readouterr().out


def damage(folder, what):
    """Makes one thing wrong."""
    metadata, tensors = hearing_toy(n_audio_ctx=30)
    path = folder / "toy.safetensors"
    if what == "quantized":
        checkpoint.write(path, *quantize.quantize_w8(metadata, tensors))
    elif what == "version":
        pairs = {"format": "minigate", "minigate": json.dumps({**metadata, "format_version": 2})}
        tensorfile.write(path, tensors, pairs)
    elif what == "infinite":
        tensors["encoder.blocks.0.mlp.2.weight"] = np.full((32, 128), 3e38, np.float32)
        checkpoint.write(path, metadata, tensors)
    elif what == "silent":
        for i in range(2):
            (folder / "speech" / f"{i}.wav").write_bytes(b"no sound")


@pytest.mark.parametrize(("what", "arguments", "code", "said"), [
    ("quantized", [], 2, "model: expected a float model, got one quantized as w8"),
    ("version", [], 1, "toy.safetensors: format_version: expected 1, for this minigate, got 2"),
    ("infinite", [], 1, "calibration: expected finite values of encoder.blocks.0.mlp.2, got "),
    ("silent", [], 1, "list.tsv: expected a recording that can be read, got none of 2: "),
    (None, ["--keep-float", "encoder.blocks.0.mpl"], 2, "--keep-float: expected a layer, a prefix of layers or paper, "
        "got 'encoder.blocks.0.mpl'; the nearest is encoder.blocks.0.mlp"),
    (None, ["--threads", "0"], 2, "--threads: expected 1 to "),
    (None, ["--calibration", "none.tsv"], 1, "none.tsv: expected a readable manifest"),
    (None, ["--batches", "0"], 2, "--batches: expected a whole number of at least 1, got 0"),
])  # fmt: skip
def test_bad_input_is_one_line(folder, what, arguments, code, said, capsys):
    damage(folder, what)
    assert run(folder, *calibration(folder), *arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("python -m minigate.quantize: error: ") and said in lines[-1]
    assert [line for line in lines[:-1] if "warning: " not in line] == []
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize(("model", "output", "code"), [("no.safetensors", "out.safetensors", 1),
                                                       ("toy.safetensors", "no/out.safetensors", 1)])  # fmt: skip
def test_files_that_are_not_there(folder, model, output, code, capsys):
    assert run(folder, "--scheme", "w8", model=model, output=output) == code
    assert capsys.readouterr().err.count("\n") == 1
