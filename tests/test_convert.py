"""The converter: three layouts become one file, errors are one line, nothing partial is left."""

import hashlib
import json
import os
import tracemalloc

import numpy as np
import pytest

from minigate import checkpoint, convert, quantize
from tests.layouts import VOCABULARY, random_model, toy_model, write_ctranslate2, write_huggingface, write_pt


@pytest.fixture
def layouts(tmp_path):
    """-> dims, float32 tensors that are exact in float16, and the same model in three layouts."""
    dims, tensors = random_model(n_vocab=51864, n_audio_state=8, n_text_state=8)
    tensors = {name: array.astype(np.float16).astype(np.float32) for name, array in tensors.items()}
    write_pt(tmp_path / "m.pt", dims, tensors)
    write_huggingface(tmp_path / "m-hf", dims, tensors)
    write_ctranslate2(tmp_path / "m-ct2", dims, tensors, vocabulary=None)
    (tmp_path / "m-hf/tokenizer.json").unlink()
    return dims, tensors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_three_layouts_one_model(tmp_path, layouts, dtype, capsys):
    dims, tensors = layouts
    parameters = sum(array.size for array in tensors.values())
    for source in ("m.pt", "m-hf", "m-ct2"):
        out = tmp_path / "toy.safetensors"
        assert convert.main([str(tmp_path / source), str(out), "--dtype", dtype]) == 0
        stdout, stderr = capsys.readouterr()
        assert stdout == f"{out}: toy, {parameters} parameters, {out.stat().st_size / 1e6:.1f} MB\n" and stderr == ""
        model = checkpoint.read(out)
        assert model.metadata["name"] == "toy" and model.metadata["dims"] == dims
        assert model.metadata["provenance"]["source"] == source and str(tmp_path) not in json.dumps(model.metadata)
        for name, array in tensors.items():
            assert model.tensors[name].dtype == dtype
            np.testing.assert_array_equal(model.tensors[name], array)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-ct2", "m-hf", "m.pt", "toy.safetensors"]


def test_provenance(tmp_path):
    dims, tensors = random_model()
    write_huggingface(tmp_path / "one", dims, tensors)
    write_huggingface(tmp_path / "two", dims, tensors, shards=2)
    one = convert.convert(tmp_path / "one", tmp_path / "a.safetensors").metadata["provenance"]
    weights = (tmp_path / "one/model.safetensors").read_bytes()
    assert one == {"source": "one", "sha256": hashlib.sha256(weights).hexdigest(), "layout": "huggingface",
                   "command": "python -m minigate.convert one a.safetensors --dtype float32"}
    two = convert.convert(tmp_path / "two", tmp_path / "b.safetensors").metadata["provenance"]
    assert set(two["sha256"]) == {"model-1-of-2.safetensors", "model-2-of-2.safetensors"}


def test_source_in_the_working_folder(tmp_path, monkeypatch):
    write_huggingface(tmp_path / "here", *random_model())
    monkeypatch.chdir(tmp_path / "here")
    assert convert.convert(".", "out.safetensors").metadata["provenance"]["source"] == "here"


def test_what_a_folder_says_is_kept(tmp_path):
    write_ctranslate2(tmp_path / "m", *random_model(), "int8")
    model = convert.convert(tmp_path / "m", tmp_path / "out.safetensors")
    assert model.metadata["alignment_heads"] == [[0, 1]] and model.metadata["suppress_tokens"] == [1, 2, 260]
    assert checkpoint.unpack_vocabulary(model.tensors[checkpoint.VOCABULARY]) == VOCABULARY


def test_our_own_float_model_in_another_dtype_and_in_place(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata, tensors = toy_model("per_head", n_vocab=256 + 1608)
    checkpoint.write(path, metadata, tensors)
    for dtype in ("float16", "float32"):
        model = convert.convert(path, path, dtype)
        for name, array in tensors.items():
            expected = array.astype(np.float16) if array.dtype == np.float32 else array
            np.testing.assert_array_equal(model.tensors[name], expected)
    assert model.metadata["gate"] == metadata["gate"] and model.metadata["name"] == "a"
    assert model.metadata["provenance"]["made_from"]["made_from"] == metadata["provenance"]


def refused(capsys, *arguments) -> str:
    """Runs the command line, which must fail with one line -> that line."""
    assert convert.main([str(a) for a in arguments]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1 and stderr.startswith("python -m minigate.convert: error: ")
    return stderr


def test_file_errors_are_one_line_and_leave_nothing(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert "gone.pt: expected a file or folder" in refused(capsys, tmp_path / "gone.pt", out)
    (tmp_path / "bad.pt").write_bytes(b"PK\3\4")
    assert "bad.pt: expected a zip file" in refused(capsys, tmp_path / "bad.pt", out)
    checkpoint.write(tmp_path / "q.safetensors", *quantize.quantize_dynamic(*toy_model()))
    assert "q.safetensors: expected a float model" in refused(capsys, tmp_path / "q.safetensors", out)
    dims, tensors = random_model()
    tensors["encoder.conv1.bias"][3] = 1e6
    write_huggingface(tmp_path / "big", dims, tensors, "float32")
    said = refused(capsys, tmp_path / "big", out, "--dtype", "float16")
    assert "encoder.conv1.bias" in said and "expected values within float16, got 1000000.0" in said
    tensors["encoder.conv1.bias"][3] = np.nan
    write_huggingface(tmp_path / "big", dims, tensors, "float32")
    assert "tensor encoder.conv1.bias: expected finite values, got" in refused(capsys, tmp_path / "big", out)
    assert not out.exists() and not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_unwritable_folder_and_full_disk(tmp_path, capsys, monkeypatch):
    write_huggingface(tmp_path / "m", *random_model())
    out = tmp_path / "missing/out.safetensors"
    assert "missing/out.safetensors: cannot be written: No such file" in refused(capsys, tmp_path / "m", out)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out.safetensors"
    assert "out.safetensors: cannot be written: No space left" in refused(capsys, tmp_path / "m", out)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("arguments, said", [
    (["src.pt", "out.pt"], "OUT: expected a name that ends in .safetensors, got out.pt"),
    (["src.pt"], "required: OUT"),
    (["src.pt", "out.safetensors", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["src.pt", "out.safetensors", "--fast"], "unrecognized arguments: --fast"),
])  # fmt: skip
def test_usage_errors_are_one_line(capsys, arguments, said):
    try:
        code = convert.main(arguments)
    except SystemExit as stop:
        code = stop.code
    stdout, stderr = capsys.readouterr()
    assert code == 2 and stdout == "" and said in stderr and stderr.count("\n") == 1


def test_progress_of_large_models(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    write_huggingface(tmp_path / "m", *random_model())
    monkeypatch.setattr(convert, "SHOW_PROGRESS", 1)
    assert convert.main([str(tmp_path / "m"), str(tmp_path / "out.safetensors")]) == 0
    stdout, stderr = capsys.readouterr()
    assert "writing: 100%" in stderr.replace("\r", "\n") and stdout.count("\n") == 1


def test_tensors_are_converted_one_by_one(tmp_path):
    dims, tensors = random_model(n_audio_state=128, n_text_state=128, n_audio_layer=12)
    write_ctranslate2(tmp_path / "m", dims, tensors, "int8")
    tracemalloc.start()
    convert.convert(tmp_path / "m", tmp_path / "out.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest, total = max(a.nbytes for a in tensors.values()), sum(a.nbytes for a in tensors.values())
    assert total > 9e6 and peak < 3 * largest + 1e6


def test_ctrl_c_and_closed_streams(tmp_path, capsys, monkeypatch):
    write_huggingface(tmp_path / "m", *random_model())
    out = tmp_path / "out.safetensors"

    def interrupt(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(os, "fsync", interrupt)
        assert convert.main([str(tmp_path / "m"), str(out)]) == 130
    assert capsys.readouterr() == ("", "") and [path.name for path in tmp_path.iterdir()] == ["m"]
    with monkeypatch.context() as closed:
        closed.setattr("sys.stdout", None)
        assert convert.main([str(tmp_path / "m"), str(out)]) == 1
    assert "standard output: expected an open stream" in capsys.readouterr().err and not out.exists()
