"""Every layout of every type gives the same tensors; what is wrong with a folder is named."""

import json

import numpy as np
import pytest

from minigate import checkpoint, quantize, readers, tensorfile
from minigate.errors import FileError
from tests import layouts
from tests.layouts import VOCABULARY, random_model, write_ctranslate2, write_huggingface, write_pt

ENGLISH = dict(n_vocab=51864, n_audio_state=8, n_text_state=8)  # the smallest with an official vocabulary


def assert_source(source, dims, expected, kind):
    assert source.dims == dims and source.kind == kind
    assert list(source.tensors) == list(checkpoint.tensor_shapes(dims))
    assert expected.keys() == source.tensors.keys()
    for name, array in expected.items():
        found = source.tensors[name]
        assert tensorfile.kind_of(source.tensors, name) == (found.shape, found.dtype)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_openai(tmp_path, dtype):
    dims, tensors = random_model(**ENGLISH)
    expected = write_pt(tmp_path / "model.pt", dims, tensors, dtype)
    source = readers.read_any(tmp_path / "model.pt")
    assert_source(source, dims, expected, "openai")
    assert len(source.vocabulary) == 50256 and source.alignment_heads is None and source.suppress_tokens is None
    assert source.files == [tmp_path / "model.pt"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"prefix": ""}, {"suffix": "bin"},
                                     {"suffix": "bin", "shards": 2}])
def test_huggingface(tmp_path, dtype, options):
    dims, tensors = random_model()
    expected = write_huggingface(tmp_path / "m", dims, tensors, dtype, **options)
    source = readers.read_any(tmp_path / "m")
    assert_source(source, dims, expected, "huggingface")
    assert source.vocabulary == VOCABULARY and len(source.files) == options.get("shards", 1)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8", "int8_float16", "int8_bfloat16", "int16"])
@pytest.mark.parametrize("version", [5, 6])
def test_ctranslate2(tmp_path, kind, version):
    dims, tensors = random_model()
    expected = write_ctranslate2(tmp_path / "m", dims, tensors, kind, version)
    source = readers.read_any(tmp_path / "m")
    assert_source(source, dims, expected, "ctranslate2")
    assert source.vocabulary == VOCABULARY
    assert source.alignment_heads == [[0, 1]] and source.suppress_tokens == [1, 2, 260]
    if kind == "int8":
        name = "decoder.blocks.0.cross_attn.value.weight"
        assert 0 < np.abs(source.tensors[name] - tensors[name]).max() <= np.abs(tensors[name]).max() / 254 * 1.001


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "vocab.json", "vocabulary.json", "vocabulary.txt"])
def test_vocabularies_of_folders(tmp_path, vocabulary):
    dims, tensors = random_model()
    write_ctranslate2(tmp_path / "m", dims, tensors, vocabulary=vocabulary)
    if vocabulary == "vocab.json":
        tokens = [layouts.spelled(token) for token in VOCABULARY] + ["<|endoftext|>"]
        (tmp_path / "m" / vocabulary).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    assert readers.read_any(tmp_path / "m").vocabulary == VOCABULARY


def test_a_folder_without_vocabulary_gets_the_official_one(tmp_path):
    dims, tensors = random_model(**{**ENGLISH, "n_vocab": 51865})
    write_ctranslate2(tmp_path / "m", dims, tensors, vocabulary=None)
    assert len(readers.read_any(tmp_path / "m").vocabulary) == 50257


def test_aliases_and_a_projection_of_its_own(tmp_path):
    dims, tensors = random_model()
    tensors["encoder.blocks.1.mlp.0.bias"] = tensors["encoder.blocks.0.mlp.0.bias"].copy()

    def change(variables, aliases):
        aliases["encoder/layer_1/ffn/linear_0/bias"] = "encoder/layer_0/ffn/linear_0/bias"
        del variables["encoder/layer_1/ffn/linear_0/bias"]
        variables["decoder/projection/weight"] = variables["decoder/embeddings/weight"]
        variables["decoder/projection/weight_scale"] = variables["decoder/embeddings/weight_scale"]
        del aliases["decoder/projection/weight"]

    expected = write_ctranslate2(tmp_path / "m", dims, tensors, "int8", change=change)
    assert_source(readers.read_any(tmp_path / "m"), dims, expected, "ctranslate2")


def test_heads_where_the_file_does_not_say(tmp_path):
    dims, tensors = random_model(n_audio_state=128, n_text_state=128, n_audio_head=2, n_text_head=2)
    write_huggingface(tmp_path / "m", dims, tensors)
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config["encoder_attention_heads"], config["decoder_attention_heads"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert readers.read_any(tmp_path / "m").dims == dims


@pytest.mark.parametrize("generation, heads, tokens", [
    ({}, None, [5, 6]),
    ({"suppress_tokens": [7]}, None, [7]),
    ({"suppress_tokens": [], "alignment_heads": [[0, 0]]}, [[0, 0]], []),
    ({"suppress_tokens": None}, None, None),
    ({"alignment_heads": [[0, 0], [1, 0]]}, None, [5, 6]),  # a teacher's heads: this decoder has one layer
])  # fmt: skip
def test_generation_config(tmp_path, generation, heads, tokens):
    dims, tensors = random_model()
    write_huggingface(tmp_path / "m", dims, tensors)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "suppress_tokens": [5, 6]}))
    (tmp_path / "m/generation_config.json").write_text(json.dumps(generation))
    source = readers.read_any(tmp_path / "m")
    assert source.alignment_heads == heads and source.suppress_tokens == tokens


def test_our_own_model_files(tmp_path):
    metadata, tensors = layouts.toy_model("per_head", n_vocab=256 + 1608)
    checkpoint.write(tmp_path / "a.safetensors", metadata, tensors)
    source = readers.read_any(tmp_path / "a.safetensors")
    assert source.kind == "minigate" and source.gate == metadata["gate"] and source.provenance == {"source": "toy"}
    assert {**source.tensors, checkpoint.VOCABULARY: 0}.keys() == tensors.keys()
    checkpoint.write(tmp_path / "b.safetensors", *quantize.quantize_dynamic(metadata, tensors))
    with pytest.raises(FileError, match="b.safetensors: expected a float model, got one quantized as w8a8-dynamic"):
        readers.read_any(tmp_path / "b.safetensors")


# --- what is wrong ---


HALF = np.float16([1])


def edit_json(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def edit_index(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_tensors(folder, **change):
    """change: tensors by name with double underscores for dots; None takes one away."""
    path = folder / "model.safetensors"
    tensors = dict(tensorfile.read(path)[1]) | {name.replace("__", "."): array for name, array in change.items()}
    layouts.write_shard(path, {name: array for name, array in tensors.items() if array is not None}, "float16")


@pytest.mark.parametrize("spoil, said", [
    (lambda f: (f / "config.json").unlink(), "config.json: expected a JSON file, got 'No such file"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: expected a JSON file"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xff"), "config.json: expected a JSON file"),
    (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: expected a JSON file"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: expected names and values, got a list"),
    (lambda f: edit_json(f / "config.json", model_type="bart"), "config.json: model_type: expected whisper"),
    (lambda f: edit_json(f / "config.json", activation_function="relu"), "activation_function: expected gelu"),
    (lambda f: edit_json(f / "config.json", encoder_layers=3), "encoder_layers: expected 2 like the tensors, got 3"),
    (lambda f: edit_json(f / "config.json", vocab_size=9), "vocab_size: expected 1870 like the tensors, got 9"),
    (lambda f: edit_json(f / "config.json", decoder_attention_heads=3), "dims: expected n_text_state divisible by"),
    (lambda f: edit_json(f / "config.json", decoder_attention_heads="2"), "dims: expected positive integers"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 9), "model.safetensors: header length"),
    (lambda f: (f / "model.safetensors").unlink(), "m: expected a folder with model.safetensors"),
    (lambda f: edit_index(f, {"a": "../x"}), "weight_map: expected names of files in this folder"),
    (lambda f: edit_index(f, {"a": 1}), "weight_map: expected names of files in this folder"),
    (lambda f: edit_index(f, {}), "weight_map: expected names of files in this folder"),
    (lambda f: edit_index(f, None), "weight_map: expected names of files in this folder"),
    (lambda f: edit_index(f, {"a": "gone.safetensors"}), "gone.safetensors: cannot be read"),
    (lambda f: edit_tensors(f, model__encoder__layers__0__lora=HALF), "'encoder.blocks.0.lora': expected none of this"),
    (lambda f: edit_tensors(f, proj_out__weight=np.zeros((1870, 16), np.float16)), "proj_out.weight: expected"),
    (lambda f: edit_tensors(f, model__encoder__layers__1__fc2__bias=HALF), r"mlp.2.bias: .* got \(1,\)"),
    (lambda f: edit_tensors(f, model__encoder__conv1__weight=HALF), "encoder.conv1.weight: expected 3 dimensions"),
    (lambda f: edit_tensors(f, model__encoder__conv2__bias=None), "tensor encoder.conv2.bias: expected for dims"),
    (lambda f: edit_tensors(f, model__decoder__embed_tokens__weight=None), "token_embedding.weight: .* no such tensor"),
    (lambda f: edit_tensors(f, encoder__conv1__bias=HALF), "encoder.conv1.bias.: expected once in all files"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: expected a vocabulary of byte-level BPE"),
    (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json: expected a vocabulary of byte-level BPE"),
    (lambda f: layouts.write_tokenizer(f / "tokenizer.json", ["\u0120 a", "\u0120 t"]), "out of the order of the ids"),
    (lambda f: layouts.write_tokenizer(f / "tokenizer.json", [7]), "tokenizer.json: expected a vocabulary"),
    (lambda f: layouts.write_tokenizer(f / "tokenizer.json", ["q q"]), "tokenizer.json: expected a vocabulary"),
    (lambda f: (f / "generation_config.json").write_text("x"), "generation_config.json: expected a JSON file"),
    (lambda f: edit_json(f / "config.json", suppress_tokens=[1.5]), "m: suppress_tokens: expected null or a list"),
    (lambda f: edit_json(f / "config.json", suppress_tokens=5), "m: suppress_tokens: expected null or a list"),
    (lambda f: edit_json(f / "config.json", alignment_heads=5), "m: alignment_heads: expected null or a list"),
    (lambda f: edit_json(f / "config.json", alignment_heads=[[0, "a"]]), "m: alignment_heads: expected null or a list"),
])  # fmt: skip
def test_bad_huggingface_folders(tmp_path, spoil, said):
    folder = tmp_path / "m"
    write_huggingface(folder, *random_model())
    spoil(folder)
    with pytest.raises(FileError, match=said) as error:
        readers.read_any(folder)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("ids, said", [
    ([*VOCABULARY[:-1], b"\xff" * 256], "a token of 256 bytes where a model file can hold 255"),
    (VOCABULARY[1:], "vocabulary: expected"),
    (VOCABULARY + [b"more"], "vocabulary: expected 262 tokens for n_vocab 1870, got 263"),
])  # fmt: skip
def test_vocabularies_that_do_not_fit(tmp_path, ids, said):
    write_ctranslate2(tmp_path / "m", *random_model())
    tokens = [layouts.spelled(token) for token in ids] + ["<|endoftext|>"]
    (tmp_path / "m/vocabulary.json").write_text(json.dumps(tokens))
    with pytest.raises(FileError, match=said):
        readers.read_any(tmp_path / "m")


ONE_VARIABLE = layouts.model_bin({"a": np.zeros(2, np.float16)}, {})


def remove(name):
    return lambda variables, aliases: variables.pop(name)


def replace(name, value):
    return lambda variables, aliases: variables.update({name: value})


@pytest.mark.parametrize("change, said", [
    (remove("encoder/layer_1/self_attention/layer_norm/gamma"), "variable encoder/layer_1/.*gamma: expected in"),
    (remove("decoder/embeddings/weight"), "variable decoder/embeddings/weight: expected in a Whisper model"),
    (remove("decoder/embeddings/weight_scale"), "variable decoder/embeddings/weight_scale: expected in"),
    (replace("decoder/embeddings/weight_scale", np.float32([1, 2])), r"expected \(\) or \(1870,\) float32"),
    (replace("decoder/embeddings/weight_scale", np.zeros(1870, np.float32)), "expected positive finite numbers"),
    (replace("encoder/layer_0/low_rank/weight", np.zeros((2, 2), np.float32)), "'encoder/layer_0/low_rank/weight': "),
    (replace("encoder/layer_0/self_attention/linear_0/bias", np.zeros(47, np.float32)), "first axis of 3 equal parts"),
    (replace("encoder/layer_0/self_attention/linear_0/bias", np.zeros(51, np.float32)), r"query.bias: expected"),
    (replace("encoder/layer_0/ffn/linear_0/bias", np.zeros(64, np.int32)), r"mlp.0.bias: expected \(64,\) float32"),
    (replace("encoder/num_heads", np.int16(5)), "dims: expected n_audio_state divisible by n_audio_head"),
    (replace("encoder/num_heads", np.int16(-1)), "dims: expected positive integers"),
    (lambda v, a: v.update({"decoder/projection/weight": v["decoder/embeddings/weight"] // 2,
                            "decoder/projection/weight_scale": v["decoder/embeddings/weight_scale"]}),
     "decoder/projection/weight: expected the token embedding's values"),
])  # fmt: skip
def test_bad_ctranslate2_variables(tmp_path, change, said):
    write_ctranslate2(tmp_path / "m", *random_model(), "int8", change=change)
    with pytest.raises(FileError, match=f"model.bin: .*{said}"):
        readers.read_any(tmp_path / "m")


@pytest.mark.parametrize("content, said", [
    (b"", "expected 4 bytes or more, got 0 .not a CTranslate2 model, or truncated"),
    (layouts.model_bin({}, {}, version=3), "binary version: expected one of .4, 5, 6., got 3"),
    (layouts.model_bin({}, {}, version=7), "binary version: expected one of .4, 5, 6., got 7"),
    (layouts.model_bin({}, {}, specification="TransformerSpec"), "expected WhisperSpec, got 'TransformerSpec'"),
    (layouts.model_bin({}, {}) + b"x", "expected 30 bytes, got 31"),
    (layouts.model_bin({}, {}), "variable encoder/conv1/weight: expected in a Whisper model"),
    (ONE_VARIABLE.replace(b"\1\2\0\0\0\4", b"\1\2\0\0\0\6"), "variable 'a': expected .* got type id 6 and 4 bytes"),
    (ONE_VARIABLE.replace(b"\1\2\0\0\0\4", b"\1\3\0\0\0\4"), "variable 'a': expected .* got type id 4 and 4 bytes"),
])  # fmt: skip
def test_bad_ctranslate2_files(tmp_path, content, said):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.bin").write_bytes(content)
    with pytest.raises(FileError, match=f"model.bin: .*{said}"):
        readers.read_any(tmp_path / "m")


@pytest.mark.parametrize("content, said", [
    ([1], "expected an OpenAI checkpoint with dims and model_state_dict, got 'list'"),
    ({"state_dict": 1}, r"expected an OpenAI checkpoint with dims and model_state_dict, got \['state_dict'\]"),
    ({"dims": {}, "model_state_dict": {}}, "dims: expected n_mels"),
    ({"model_state_dict": {}}, "dims: expected n_mels .* got None"),
    ({"dims": layouts.DIMS, "model_state_dict": {"a": 5}}, "'a': expected a tensor, got a int"),
    ({"dims": layouts.DIMS, "model_state_dict": {}}, "tensor encoder.positional_embedding: expected for dims"),
])  # fmt: skip
def test_bad_openai_checkpoints(tmp_path, content, said):
    pickle = layouts.Pickle()
    body = b"](" + pickle.value(1) + b"e" if isinstance(content, list) else pickle.value(content)
    layouts.write_zip(tmp_path / "m.pt", b"\x80\x02" + body + b".", pickle.storages)
    with pytest.raises(FileError, match=f"m.pt: {said}"):
        readers.read_any(tmp_path / "m.pt")


def test_a_vocabulary_that_openai_has_not(tmp_path):
    write_pt(tmp_path / "m.pt", *random_model())
    with pytest.raises(FileError, match="m.pt: n_vocab: expected at least 51864 .*, got 1870"):
        readers.read_any(tmp_path / "m.pt")


def test_what_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.safetensors").write_bytes(layouts.safetensors({"__metadata__": {"format": "pt"}}))
    for name, said in (("gone", "expected a file or folder, got nothing there"), ("empty", "got none"),
                       ("x" * 5000, "expected a file or folder, got nothing there"),
                       ("a.txt", "expected an OpenAI .pt file"), ("b.safetensors", "give the folder")):
        with pytest.raises(FileError, match=f"{name}: .*{said}"):
            readers.read_any(tmp_path / name)


@pytest.mark.parametrize("write", [write_huggingface, write_ctranslate2])
def test_truncation_and_flips_raise_only_file_errors(tmp_path, write):
    folder = tmp_path / "m"
    write(folder, *random_model(n_audio_state=4, n_text_state=4))
    path = folder / ("model.bin" if write is write_ctranslate2 else "model.safetensors")
    good, rng, refused = path.read_bytes(), np.random.default_rng(5), 0
    cases = [good[:n] for n in range(0, len(good), len(good) // 50)]
    for _ in range(100):
        bad = bytearray(good)
        for at in rng.integers(0, 9000, rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        cases.append(bytes(bad))
    for case in cases:
        path.write_bytes(case)
        try:
            for array in readers.read_any(folder).tensors.values():
                array.sum()
        except FileError:
            refused += 1
    assert refused > 55
