"""Students: full depth computes the teacher's function, kept layers move, what is not possible is refused."""

import numpy as np
import pytest

from minigate import attention, checkpoint, student
from minigate.model import Model
from minigate.quantize import quantize_dynamic
from minigate.student import choose_layers, frozen_names, make_student
from tests.toy import toy_model

KINDS = attention.GATE_KINDS
DIMS = {"n_vocab": 300}  # the toy's vocabulary of 256 bytes fits


def logits(metadata, tensors, seed=0):
    rng = np.random.default_rng(seed)
    model = Model(metadata, tensors)
    mel = rng.standard_normal((2, 8, 40)).astype(np.float32)
    tokens = rng.integers(0, 90, (2, 7))
    return model.decode(tokens, model.start(model.encode(mel)), all_positions=True)


@pytest.mark.parametrize("init", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_full_depth_student_has_its_teachers_logits(kind, init):
    teacher = toy_model()
    metadata, tensors = make_student(*teacher, gate=kind, gate_init=init)
    np.testing.assert_allclose(logits(metadata, tensors), logits(*teacher), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_gates_are_there_and_count(kind):
    metadata, tensors = make_student(*toy_model(), gate=kind)
    expected = logits(metadata, tensors)
    last = "2." if kind == "per_head_mlp" else ""
    for module in ("encoder.blocks.1.attn", "decoder.blocks.0.attn", "decoder.blocks.1.cross_attn"):
        changed = dict(tensors)
        changed[f"{module}.gate.{last}weight"] = tensors[f"{module}.gate.{last}weight"] + 1
        assert np.abs(logits(metadata, changed) - expected).max() > 1e-3


@pytest.mark.parametrize("layers", [(3, 3), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_a_whole_model_file(tmp_path, kind, layers):
    teacher = toy_model(n_audio_layer=3, n_text_layer=3, **DIMS)
    metadata, tensors = make_student(*teacher, *layers, gate=kind, audio_context="variable")
    checkpoint.write(tmp_path / "student.safetensors", metadata, tensors)
    file = checkpoint.read(tmp_path / "student.safetensors")
    assert (file.metadata["dims"]["n_audio_layer"], file.metadata["dims"]["n_text_layer"]) == layers
    assert file.metadata["audio_context"] == "variable"
    assert file.metadata["gate"] == ({"kind": kind} if kind == "none" else {"kind": kind, "init": 0.5, "scale": 2.0})


def test_layers_move_and_copies_do_not_share_memory():
    metadata, tensors = toy_model(n_audio_layer=5, n_text_layer=4)
    tensors["decoder.ln.weight"] = tensors["decoder.ln.weight"].astype(np.float16)
    metadata["provenance"] = {"source": "toy.pt", "sha256": "12ab"}
    made, out = make_student(metadata, tensors, 3, 2)
    assert made["name"] == "toy-student"
    assert made["provenance"] == {
        "source": "student of toy", "teacher": {"name": "toy", "source": "toy.pt", "sha256": "12ab"},
        "encoder_layers": [0, 2, 4], "decoder_layers": [0, 3], "seed": 0,
    }  # fmt: skip
    for name, moved in (
        ("encoder.blocks.2.mlp.0.weight", "encoder.blocks.4.mlp.0.weight"),
        ("encoder.blocks.1.attn.key.weight", "encoder.blocks.2.attn.key.weight"),
        ("decoder.blocks.1.cross_attn_ln.bias", "decoder.blocks.3.cross_attn_ln.bias"),
        ("decoder.ln.weight", "decoder.ln.weight"),
        ("tokenizer.vocabulary", "tokenizer.vocabulary"),
    ):
        np.testing.assert_array_equal(out[name], tensors[moved])
        assert out[name].dtype == (np.uint8 if name.startswith("token") else np.float32)
        assert out[name].flags.writeable and not np.shares_memory(out[name], tensors[moved])
    assert metadata["dims"]["n_audio_layer"] == 5 and metadata["name"] == "toy"


@pytest.mark.parametrize(
    ("n_layers", "n_kept", "expected"),
    [
        (4, 4, [0, 1, 2, 3]), (4, None, [0, 1, 2, 3]), (4, 3, [0, 1, 3]), (4, 2, [0, 3]), (4, 1, [3]), (1, 1, [0]),
        (6, 4, [0, 1, 3, 5]), (32, 5, [0, 7, 15, 23, 31]),
    ],
)  # fmt: skip
def test_layers_are_evenly_spaced(n_layers, n_kept, expected):
    assert choose_layers("encoder_layers", n_layers, n_kept) == expected


def test_alignment_heads_move_with_their_layers():
    metadata, tensors = toy_model(n_text_layer=4)
    metadata["alignment_heads"] = [[1, 0], [3, 2], [0, 1]]
    assert make_student(metadata, tensors)[0]["alignment_heads"] == [[1, 0], [3, 2], [0, 1]]
    assert make_student(metadata, tensors, None, 2)[0]["alignment_heads"] == [[1, 2], [0, 1]]
    metadata["alignment_heads"] = [[1, 0]]
    assert make_student(metadata, tensors, None, 2)[0]["alignment_heads"] is None
    metadata["alignment_heads"] = None
    assert make_student(metadata, tensors)[0]["alignment_heads"] is None


def test_the_hidden_layer_of_a_gate_comes_from_the_seed():
    name = "decoder.blocks.0.cross_attn.gate.0.weight"
    weights = [make_student(*toy_model(), gate="per_head_mlp", seed=seed)[1][name] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).all()
    dims = {
        f"n_{part}_{what}": n for part in ("audio", "text") for what, n in (("state", 512), ("head", 8), ("layer", 4))
    }
    gates = student.start_gates(dims, "per_head_mlp", 0.5, np.random.default_rng(0))
    assert gates[name].std() == pytest.approx(np.sqrt(2 / 64), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_layers": 0}, "encoder_layers: expected 1 to 2, the teacher's, got 0"),
        ({"decoder_layers": 3}, "decoder_layers: expected 1 to 2, the teacher's, got 3"),
        ({"encoder_layers": 1.5}, "encoder_layers: expected 1 to 2, the teacher's, got 1.5"),
        ({"gate": "head"}, "gate: expected one of none, per_head.*, got 'head'"),
        ({"gate": "per_head", "gate_init": 0}, "gate_init: expected a number above 0 and below 1, got 0"),
        ({"gate": "per_head", "gate_init": 1.0}, "gate_init: expected a number above 0 and below 1, got 1.0"),
        ({"gate": "per_head", "gate_init": float("nan")}, "gate_init: expected a number"),
        ({"audio_context": "short"}, "audio_context: expected full or variable, got 'short'"),
    ],
)
def test_what_is_not_possible(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_student(*toy_model(), **arguments)


def test_teachers_that_are_refused():
    with pytest.raises(
        ValueError, match="teacher: expected a float model, got toy, quantized as w8a8-dynamic; make one"
    ):
        make_student(*quantize_dynamic(*toy_model()))
    with pytest.raises(ValueError, match="teacher: expected a model without gates, got toy with gate per_head"):
        make_student(*toy_model("per_head"))


def test_frozen_parts():
    names = make_student(*toy_model(), gate="per_head")[1].keys() - {"tokenizer.vocabulary"}
    positions = "encoder.positional_embedding"
    assert frozen_names(names, []) == {positions}
    assert frozen_names(names, ["encoder"]) == {n for n in names if n.startswith("encoder.")}
    assert frozen_names(names, ["gates"]) == {n for n in names if ".gate." in n} | {positions}
    embeddings = {"decoder.token_embedding.weight", "decoder.positional_embedding"}
    assert frozen_names(names, ["embedding"]) == embeddings | {positions}
    with pytest.raises(ValueError, match="freeze: expected some of encoder, decoder, embedding, gates, got 'head'"):
        frozen_names(names, ["encoder", "head"])
    with pytest.raises(ValueError, match="freeze: expected something left to train, got encoder, decoder"):
        frozen_names(names, ["encoder", "decoder"])
