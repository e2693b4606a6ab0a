"""The climb from sound to text against openai/whisper, stage by stage, so that the first wrong stage is the one named.

Golden files: tools/make_golden.py.  `embedded`: the model that the package carries, its weights as float32, on
weights/sample.wav, and the same in integers beside it.  `random80`, `random128`: small random multilingual models.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from minigate import checkpoint
from minigate.audio import read_audio
from minigate.decoding import decode, detect_language
from minigate.mel import N_SAMPLES, log_mel
from minigate.model import Model
from minigate.official import official_vocabulary
from minigate.options import DecodingOptions
from minigate.quantize import dequantize
from minigate.tokenizer import pack_vocabulary
from tests import check
from tests.check import hold

RANDOM = {"random80": (80, 51865), "random128": (128, 51866)}
DECODED = {name: sorted(check.golden_json(name)["decode"]) for name in ("embedded", *RANDOM)}
AGREEMENT = 0.95  # share of positions at which integers and float32 name the same likeliest token


@cache
def model_of(name: str) -> Model:
    """A golden file's model, in float32."""
    if name == "embedded":
        file = checkpoint.read(check.EMBEDDED)
        return Model(*dequantize(file.metadata, file.tensors), name="dequantized")
    dims = check.random_dims(*RANDOM[name])
    vocabulary = official_vocabulary(dims["n_vocab"])
    shapes = checkpoint.tensor_shapes(dims)
    tensors = {tensor: check.random_tensor(tensor, shape, len(vocabulary)) for tensor, shape in shapes.items()}
    tensors[checkpoint.VOCABULARY] = pack_vocabulary(vocabulary)
    return Model(checkpoint.make_metadata(name, dims, {}), tensors, name=name)


@cache
def integer_model() -> Model:
    file = checkpoint.read(check.EMBEDDED)
    return Model(file.metadata, file.tensors, name="integers")


@cache
def sample() -> np.ndarray:
    return read_audio(check.SAMPLE)


@cache
def mel_of(name: str) -> np.ndarray:
    """The window that a golden file was made from (n_mels, 3000)."""
    if name != "embedded":
        return check.random_mel(RANDOM[name][0])
    return log_mel(sample(), padding=N_SAMPLES - len(sample()))


@cache
def heard(name: str) -> np.ndarray:
    """xa (1, T, D)."""
    return model_of(name).encode(mel_of(name)[None])


def logits_of(model: Model, xa: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Teacher-forced: tokens (T,) -> logits (T, V)."""
    return model.decode(tokens[None], model.start(xa), all_positions=True)[0]


# --- the climb

def test_weights_are_those_of_the_golden_file():
    file = checkpoint.read(check.EMBEDDED)
    assert check.tensor_digest(file.tensors) == check.golden_json("embedded")["tensors"], \
        "another embedded model: run tools/make_golden.py"


def test_mel():
    golden = check.golden_arrays("embedded")
    mel = mel_of("embedded")
    hold(check.largest_bar("mel", mel[:, golden["frames"]], golden["mel"], check.MEL),
         check.largest_bar("mel, mean of each band", mel.mean(axis=1), golden["mel_mean"], check.MEL))


@pytest.mark.parametrize("name", DECODED)
def test_encoder(name):
    golden = check.golden_arrays(name)
    stages = check.encoder_stages(model_of(name), mel_of(name))
    hold(*(check.relative_bar(stage, found[golden["positions"]], golden[stage]) for stage, found in stages.items()))


@pytest.mark.parametrize("name", DECODED)
def test_logits(name):
    golden = check.golden_arrays(name)
    logits = logits_of(model_of(name), heard(name), golden["tokens"])
    hold(*check.logit_bars("teacher-forced", logits, golden["top_ids"], golden["top"]),
         check.largest_bar("last position", logits[-1, :: check.LAST_STEP], golden["last"], check.LOGIT))


@pytest.mark.parametrize("name", RANDOM)
def test_language(name):
    golden = check.golden_json(name)["language"]
    [found] = detect_language(model_of(name), heard(name))
    assert found.keys() == golden.keys()
    hold(check.largest_bar("language", list(found.values()), [golden[code] for code in found], check.PROBABILITY))


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in DECODED.items() for case in cases])
def test_one_window(name, case):
    golden = check.golden_json(name)["decode"][case]
    [found] = decode(model_of(name), heard(name), DecodingOptions(**golden["options"]))
    hold(check.token_bar(case, found.tokens, golden["tokens"]),
         check.largest_bar("avg_logprob", found.avg_logprob, golden["avg_logprob"], check.PROBABILITY),
         check.largest_bar("no_speech_prob", found.no_speech_prob, golden["no_speech_prob"], check.PROBABILITY))
    assert found.language == golden["language"]
    if name == "embedded":  # random models babble language tokens, which openai/whisper writes out and we do not
        assert found.text == golden["text"]


def test_whole_recording():
    hold(*recording_bars("sample", sample()))


@pytest.mark.slow
def test_whole_recording_with_a_prompt():
    hold(*recording_bars("prompted", sample()))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["long", "long_no_condition"])
def test_long_recording(case):
    hold(*recording_bars(case, check.long_recording(sample())))


def recording_bars(case: str, sound: np.ndarray) -> list[check.Bar]:
    golden = check.golden_json("embedded")["transcribe"][case]
    found = model_of("embedded").transcribe(sound, language="en", temperature=0.0, **golden["options"])
    return check.result_bars(case, found.to_dict(), golden)


# --- the same weights in integers

def test_integers_agree_with_float():
    golden = check.golden_arrays("embedded")
    model = integer_model()
    logits = logits_of(model, model.encode(mel_of("embedded")[None]), golden["tokens"])
    agreement = float((logits.argmax(axis=1) == golden["top_ids"][:, 0]).mean())
    assert agreement >= AGREEMENT, f"expected at least {AGREEMENT}, got {agreement:.3f}"


def test_integers_give_the_same_text():
    golden = check.golden_json("embedded")["decode"]["greedy"]
    model = integer_model()
    [found] = decode(model, model.encode(mel_of("embedded")[None]), DecodingOptions(**golden["options"]))
    assert found.text == golden["text"]


# --- the bars themselves

def test_bars_can_be_missed():
    top_ids, top = np.array([[3, 1, 0]]), np.array([[5.0, 4.0, 3.99]])
    good = np.array([[4.0, 4.0, 0.0, 5.0]])
    assert all(bar.ok for bar in check.logit_bars("", good, top_ids, top))  # 4 and 3.99: too close to have an order
    worse = good + [[0, 1.5, 0, 0]], good + [[0, 0, 4.1, 0]]
    assert [[bar.ok for bar in check.logit_bars("", x, top_ids, top)] for x in worse] == [[False, False], [True, False]]
    assert check.token_bar("", [1, 2], [1, 2]).ok
    assert check.token_bar("", [1, 2], [1, 3]).note == "token 1: expected 3, got 2"
    assert check.token_bar("", [1], [1, 3]).value == check.token_bar("", [1, 3], [1]).value == 1
    assert not check.relative_bar("", [1.0, 1.0], [1.0, 1.01]).ok and check.relative_bar("", [1.0], [1.0005]).ok
    assert not check.largest_bar("", [np.nan], [0.0], 1.0).ok
    with pytest.raises(AssertionError, match="MISS b"):
        hold(check.Bar("a", 0, 1), check.Bar("b", 2, 1, "here"))


def test_result_bars_can_be_missed():
    def result(**change):
        segment = dict(seek=0, start=0.0, end=1.0, tokens=[5], text=" a", avg_logprob=-0.5, no_speech_prob=0.1,
                       compression_ratio=1.0)
        return {"text": " a", "segments": [{**segment, **change}]}

    assert all(bar.ok for bar in check.result_bars("", result(), result()))
    for change in (dict(seek=2), dict(start=0.02), dict(end=0.98), dict(tokens=[6]), dict(text=" b"),
                   dict(avg_logprob=-0.51), dict(no_speech_prob=0.12), dict(compression_ratio=1.1)):
        assert sum(not bar.ok for bar in check.result_bars("", result(**change), result())) == 1, change
    assert not check.result_bars("", {"text": "", "segments": []}, result())[0].ok
