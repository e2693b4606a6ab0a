"""`python -m minigate.outliers`: what is measured, the table and the files, bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest

from minigate import checkpoint, model, outlierreport
from minigate.decoding import decode
from minigate.errors import FileError
from minigate.manifest import read_manifest
from minigate.mel import MelWindows
from minigate.model import Model
from minigate.options import DecodingOptions
from minigate.outlierreport import Watch, measure_rows
from minigate.quantize import quantize_dynamic
from tests import check
from tests.sounds import write_manifest
from tests.toy import toy_model

SMALL = dict(n_audio_ctx=1500, n_vocab=1864, n_audio_layer=1, n_text_layer=1)
N_TENSORS = 8 + 2 + 12 + 2


def toy(gate="none", seed=0, context="full", **dims):
    metadata, tensors = toy_model(gate, seed, **SMALL | dims)
    return {**metadata, "audio_context": context, "name": f"toy-{seed}"}, tensors


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("sound"), [0.6, 2.4, 1.1, 0.9])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Model files by name."""
    folder = tmp_path_factory.mktemp("models")
    models = {"plain": toy(), "gated": toy("per_head", 1, "variable", n_text_layer=2), "int8": quantize_dynamic(*toy())}
    for name, (metadata, tensors) in models.items():
        checkpoint.write(folder / f"{name}.safetensors", metadata, tensors)
    return {name: str(folder / f"{name}.safetensors") for name in models}


def run(capsys, *arguments):
    """-> exit code, standard output, standard error."""
    code = outlierreport.main([*map(str, arguments), "--threads", "1"])
    return code, *capsys.readouterr()


def test_the_decoder_hears_its_own_greedy_tokens(manifest, monkeypatch):
    student, given = Model(*toy("per_head", context="variable")), []
    decoder = model.decoder
    monkeypatch.setattr(model, "decoder", lambda ops, dims, tokens, cache, *rest: (
        given.append(tokens) if isinstance(cache, model.Whole) else None, decoder(ops, dims, tokens, cache, *rest))[1])
    rows = read_manifest(manifest)
    watch = measure_rows(student, rows, "variable", "en")
    for row, tokens in zip(rows, given, strict=True):
        mel, n = MelWindows(row.file, 8).window(0)
        [found] = decode(student, student.encode(mel[None, :, : 100 * max(2, -(-n // 100))]), DecodingOptions("en"))
        assert tokens.tolist() == [[student.tokenizer.sot, *found.tokens][: student.dims.n_text_ctx]]
    assert watch.tokens == sum(t.size for t in given) and watch.positions == 50 * (2 + 3 + 2 + 2)
    assert measure_rows(student, rows[:1], "full", "en").positions == 1500


def test_a_full_model_hears_30_s_whatever_is_asked(manifest):
    assert measure_rows(Model(*toy()), read_manifest(manifest)[:1], "variable", "en").positions == 1500


def test_one_model(capsys, manifest, paths, tmp_path):
    code, out, err = run(capsys, paths["plain"], manifest, "--utterances", 2, "--json", tmp_path / "a.json")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "a.json").read_text())
    [r] = found["models"]
    assert found["format"] == "minigate outliers" and found["failed"] == [] and found["audio_context"] == "full"
    assert r["name"] == "plain" and r["utterances"] == ["0.wav", "2.wav"] and len(r["sha256"]) == 64
    assert len(r["tensors"]) == N_TENSORS and r["max_abs"] == max(t["max_abs"] for t in r["tensors"].values())
    assert r["attention"].keys() == {"encoder.blocks.0.attn", "decoder.blocks.0.attn", "decoder.blocks.0.cross_attn"}
    assert all(len(module["heads"]) == 4 for module in r["attention"].values())
    assert sum(d["share"] for d in r["hidden_dimensions"]["encoder"]) in (0, pytest.approx(1))
    lines = out.splitlines()
    assert lines[0].startswith("plain: gate none, 2 utterances, windows padded to 30 s, ") and "own greedy" in lines[1]
    row = lines[3 + list(r["tensors"]).index("encoder.ln_post") + 1].split()
    figures = r["tensors"]["encoder.ln_post"]
    assert row[:3] == ["encoder.ln_post", f"{figures['max_abs']:.1f}", f"{figures['kurtosis']:.1f}"]
    assert f"all: largest, mean, sum  {r['max_abs']:>7.1f}".split() == next(x for x in lines if "all:" in x).split()[:5]
    assert f"worst: max abs in {r['max_abs_tensor']}, kurtosis in {r['kurtosis_tensor']}" in lines


def test_two_models_side_by_side(capsys, manifest, paths, tmp_path):
    code, out, err = run(capsys, paths["plain"], manifest, "--compare", paths["gated"], "--utterances", 1,
                         "--audio-context", "variable", "--json", tmp_path / "a.json")  # fmt: skip
    assert (code, err) == (0, "")
    a, b = json.loads((tmp_path / "a.json").read_text())["models"]
    lines = out.splitlines()
    assert lines[0].startswith("A  plain: gate none, 1 utterances, windows padded")
    assert lines[1].startswith("B  gated: gate per_head, 1 utterances, windows as long as")
    name = "encoder.blocks.0.mlp.2"
    row = next(x for x in lines if x.startswith(name)).split()
    assert row[1:3] == [f"{r['tensors'][name]['max_abs']:.1f}" for r in (a, b)]
    only_b = next(x for x in lines if x.startswith("decoder.blocks.1.mlp_ln  ")).split()
    assert only_b[1] == f"{b['tensors']['decoder.blocks.1.mlp_ln']['max_abs']:.1f}"
    heads_from = next(i for i, x in enumerate(lines) if x.startswith("module, head"))
    mass = next(x for x in lines[heads_from:] if x.startswith("decoder.blocks.0.attn ")).split()
    heads = [f"{100 * h['mass']:.0f}" for h in b["attention"]["decoder.blocks.0.attn"]["heads"]]
    assert mass[7:] == heads and a["positions"] == 1500 and b["positions"] == 100
    gates = [h["gate"] for m in b["attention"].values() for h in m["heads"]]
    assert len(set(gates)) == len(gates) and {h["gate"] for m in a["attention"].values() for h in m["heads"]} == {1}


def test_an_int8_model_is_measured_too(capsys, manifest, paths, tmp_path):
    code, out, _ = run(capsys, paths["int8"], manifest, "--utterances", 1, "--compare", paths["plain"], "--json",
                       tmp_path / "a.json")  # fmt: skip
    assert code == 0 and "int8: gate none, w8a8-dynamic" in out
    quantized, plain = json.loads((tmp_path / "a.json").read_text())["models"]
    for name in ("encoder.ln_post input", "encoder.blocks.0.mlp.0"):
        assert quantized["tensors"][name]["max_abs"] == pytest.approx(plain["tensors"][name]["max_abs"], rel=0.1)


def test_a_static_model_is_not(capsys, manifest, paths, monkeypatch):
    static = Model(*toy())
    static.metadata = {**static.metadata, "quantization": {"scheme": "w8a8-static"}}
    monkeypatch.setattr(outlierreport, "load", lambda path, threads: static)
    code, out, err = run(capsys, paths["plain"], manifest)
    assert (code, out) == (2, "") and "expected a float model, w8a8-dynamic or w8, got" in err


def test_the_picture(capsys, manifest, paths, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(capsys, paths["plain"], manifest, "--utterances", 1, "--plot", tmp_path / "a.png")
    assert (code, err) == (0, "") and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_read_is_named_once_and_left_out(capsys, manifest, paths, tmp_path):
    text = manifest.read_text().replace("2.wav", "gone.wav").replace("0.wav", str(manifest.parent / "0.wav"))
    (tmp_path / "list.tsv").write_text("\n".join(text.splitlines()[:1] + text.splitlines()[1::2]) + "\n")
    code, out, err = run(capsys, paths["plain"], tmp_path / "list.tsv", "--compare", paths["int8"], "--json",
                         tmp_path / "a.json")  # fmt: skip
    assert code == 1 and "A  plain: gate none, 1 utterances" in out
    assert err.count("\n") == 1 and "list.tsv, line 3:" in err and "gone.wav" in err
    assert [f["path"] for f in json.loads((tmp_path / "a.json").read_text())["failed"]] == ["gone.wav"]


@pytest.mark.parametrize("arguments, code, said", [
    (["--utterances", "0"], 2, "--utterances: expected a whole number of at least 1, got 0"),
    (["--utterances", "few"], 2, "--utterances: expected a whole number, got 'few'"),
    (["--audio-context", "variable"], 2, "--audio-context: expected full for a model that hears windows of 30 s only"),
    (["--compare", "missing"], 1, "model: expected a model file or an embedded model"),
    (["--language", "de"], 2, "expected en"),
    (["--language", "klingon"], 2, "--language: expected"),
    (["--json", "/no/such/folder/a.json"], 1, "--json: expected a file in a folder"),
    (["--plot", "a.gif"], 2, "--plot: expected a name that ends in .png"),
])  # fmt: skip
def test_bad_input_is_one_line(capsys, manifest, paths, arguments, code, said):
    got, out, err = run(capsys, paths["plain"], manifest, *arguments)
    assert (got, out) == (code, "") and err.count("\n") == 1 and said in err, err
    assert err.startswith("python -m minigate.outliers: error: ")


def test_no_readable_recording(capsys, paths, tmp_path):
    (tmp_path / "list.tsv").write_text("path\ngone.wav\n")
    code, out, err = run(capsys, paths["plain"], tmp_path / "list.tsv")
    assert (code, out) == (1, "") and err.splitlines()[-1].count("expected a recording that can be read, got none") == 1


def test_a_model_without_finite_activations():
    with pytest.raises(FileError, match="expected finite activations, got NaN or infinity in encoder.ln_post"):
        Watch().see("encoder.ln_post", np.array([[0, np.inf]], np.float32))


def test_the_module_is_the_command(manifest, paths):
    command = [sys.executable, "-m", "minigate.outliers", paths["plain"], manifest, "--utterances", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=check.ROOT)
    assert done.returncode == 0 and "encoder.ln_post" in done.stdout, done.stderr
