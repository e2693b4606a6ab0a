"""The network against its formulas in float64, stage by stage; the cache; what it refuses."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest

from minigate import attention
from minigate.int8weights import dequantize
from minigate.model import Model, find, load
from minigate.options import TranscribeOptions
from minigate.quantize import quantize_dynamic
from tests.toy import DIMS, Plain, toy_model

RTOL = 2e-5  # float32 against float64, relative to the largest value


def close(got, expected, rtol=RTOL):
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * np.abs(expected).max())


def inputs(seed=0, windows=2, tokens=7):
    rng = np.random.default_rng(seed)
    mel = rng.standard_normal((windows, DIMS["n_mels"], 2 * DIMS["n_audio_ctx"])).astype(np.float32)
    return mel, rng.integers(0, DIMS["n_vocab"], (windows, tokens))


@pytest.mark.parametrize("kind", attention.GATE_KINDS)
def test_encoder_then_decoder(kind):
    metadata, tensors = toy_model(kind)
    model, plain = Model(metadata, tensors), Plain(metadata, tensors)
    mel, tokens = inputs()
    xa = plain.encode(mel)
    close(model.encode(mel), xa)
    xa = xa.astype(np.float32)
    close(model.decode(tokens, model.start(xa), all_positions=True), plain.decode(tokens, xa.astype(np.float64)))


def test_windows_are_encoded_in_parts():
    metadata, tensors = toy_model()
    model, mel = Model({**metadata, "audio_context": "variable"}, tensors), inputs(windows=5)[0]
    third = 2 * (DIMS["n_audio_ctx"] // 3)  # of a window: 3 together, then 2
    for some in (mel, mel[..., :third]):
        close(model.encode(some), np.concatenate([model.encode(window[None]) for window in some]))


def test_token_by_token_equals_all_at_once():
    model = Model(*toy_model("per_head"))
    mel, tokens = inputs()
    xa = model.encode(mel)
    expected = model.decode(tokens, model.start(xa), all_positions=True)
    cache = model.start(xa)
    for i in range(tokens.shape[1]):
        close(model.decode(tokens[:, i : i + 1], cache), expected[:, i])
    assert cache.length == tokens.shape[1]


def test_groups_share_a_window_and_rows_can_move():
    model = Model(*toy_model())
    mel, _ = inputs()
    tokens = np.random.default_rng(1).integers(0, DIMS["n_vocab"], (6, 5))
    xa = model.encode(mel)
    cache = model.start(xa)
    model.decode(tokens[::3, :2], cache)
    tokens[:, :2] = np.repeat(tokens[::3, :2], 3, axis=0)
    cache.repeat(3)
    model.decode(tokens[:, 2:4], cache)
    rows = np.array([2, 0, 0, 3, 5, 4])
    cache.reorder(rows)
    got = model.decode(tokens[:, 4:], cache)
    for i, row in enumerate(rows):
        own = np.concatenate([tokens[row, :4], tokens[i, 4:]])[None]
        close(got[i], model.decode(own, model.start(xa[i // 3 : i // 3 + 1]))[0])


@pytest.mark.parametrize("kept", [[0, 2], [1, 2], [2]])
@pytest.mark.parametrize("make", [lambda *model: model, quantize_dynamic])
def test_windows_can_be_dropped(make, kept):
    model = Model(*make(*toy_model()))
    mel, tokens = inputs(windows=3)
    cache = model.start(model.encode(mel))
    model.decode(tokens[:, :4], cache)
    cache.keep(np.array(kept))
    close(
        model.decode(tokens[kept, 4:], cache),
        model.decode(tokens[kept], model.start(model.encode(mel[kept]))),
    )


def test_int8_is_close_to_its_own_weights_in_float():
    metadata, tensors = quantize_dynamic(*toy_model("per_head"))
    int8, float32 = Model(metadata, tensors), Model(*dequantize(metadata, tensors))
    mel, tokens = inputs()
    xa = float32.encode(mel)
    close(int8.encode(mel), xa, rtol=0.05)
    expected = float32.decode(tokens, float32.start(xa), all_positions=True)
    got = int8.decode(tokens, int8.start(xa), all_positions=True)
    close(got, expected, rtol=0.05)
    assert not np.array_equal(got, expected)


def test_variable_context_takes_shorter_windows():
    metadata, tensors = toy_model()
    mel = inputs()[0][:, :, :24]
    with pytest.raises(ValueError, match=r"mel: expected shape \(B, 8, 40\), B at least 1, got \(2, 8, 24\)"):
        Model(metadata, tensors).encode(mel)
    close(Model({**metadata, "audio_context": "variable"}, tensors).encode(mel), Plain(metadata, tensors).encode(mel))


@pytest.mark.parametrize("make", [lambda *model: model, quantize_dynamic])
def test_a_batch_without_windows_is_refused(make):
    with pytest.raises(ValueError, match=r"mel: expected shape \(B, 8, 40\), B at least 1, got \(0, 8, 40\)"):
        Model(*make(*toy_model())).encode(inputs()[0][:0])


def test_two_threads_and_a_forked_child_share_a_model():
    model = Model(*quantize_dynamic(*toy_model()))
    mel, tokens = inputs()
    expected = model.decode(tokens, model.start(model.encode(mel)))

    def once(_):
        return np.array_equal(model.decode(tokens, model.start(model.encode(mel))), expected)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(once, range(20)))
    child = os.fork()
    if child == 0:
        os._exit(0 if once(0) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_too_many_tokens_are_refused():
    model = Model(*toy_model())
    cache = model.start(model.encode(inputs()[0]))
    with pytest.raises(ValueError, match="tokens: expected at most 16 positions in all, got 17"):
        model.decode(np.zeros((2, 17), int), cache)
    with pytest.raises(ValueError, match=r"tokens: expected shape \(2, T\) like the cache, got \(3, 1\)"):
        model.decode(np.zeros((3, 1), int), cache)


def test_an_unknown_model_names_the_embedded_ones_or_the_converter(tmp_path):
    for name in ("huge.xx", "", "no/such/file"):
        with pytest.raises(ValueError, match=f"model: expected a model file or an embedded model .*got '{name}'"):
            find(name)
    tmp_path.joinpath("x.pt").touch()
    for path in (tmp_path, tmp_path / "x.pt"):
        with pytest.raises(ValueError, match=f"got {path}; make one of it with python -m minigate.convert {path} OUT"):
            find(path)
    with pytest.raises(ValueError, match="model: expected a model file, got 'xxx.*: File name too long"):
        find("x" * 300)


def test_documented_options_are_the_options():
    names = {field.name for field in fields(TranscribeOptions)}
    for field in fields(TranscribeOptions):
        shown = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        assert f"{field.name}={shown}" in " ".join(Model.transcribe.__doc__.split()), field.name
    assert len(names) == 16


def test_what_was_trained_here_knows_no_prompts():
    metadata, tensors = toy_model()
    trained = {"source": "student of toy", "teacher": {"source": "toy"}, "training": {"steps": 2}}
    for provenance, knows in (
        (metadata["provenance"], True), (trained, False), ({"source": "x", "made_from": trained}, False),
        ({**trained, "training": None}, True), ({"source": "x", "teacher": trained, "training": None}, True),
        ({"source": "x", "made_from": {"source": "y"}}, True), ({"source": "x", "made_from": "y"}, True),
    ):  # fmt: skip
        assert Model({**metadata, "provenance": provenance}, tensors).knows_prompts == knows, provenance
    assert [load(name).knows_prompts for name in ("tiny.en-w8a8-dynamic", "tiny.en-gated-w8a8")] == [True, False]


@pytest.mark.parametrize("threads", [0, 2.5, "2", True, 10**6])
def test_threads_out_of_range(threads):
    with pytest.raises(ValueError, match="threads: expected 1 to 256, got "):
        load(threads=threads)
