"""Opening, language, no-speech, batches and results of one window, with a model that says what the test wants."""

import zlib

import numpy as np
import pytest

from minigate.decoding import compression_ratio, decode, detect_language
from minigate.errors import UsageError
from minigate.options import DecodingOptions
from tests.scripted import ENGLISH as T
from tests.scripted import LOW, ScriptedModel, heard, logits, multilingual, says

BEGIN = T.timestamp_begin
TEXT = T.encode(" ask not")


@pytest.fixture(scope="module")
def many():
    return multilingual()


def opening_of(model, **options):
    """The tokens before the text, as the decoder saw them: with one token to decode it is called for no other."""
    seen = []
    script = model.script
    model.script = lambda window, attempt, tokens: seen.append(list(tokens)) or script(window, attempt, tokens)
    decode(model, heard(3), DecodingOptions(sample_len=1, **options))
    return seen[-1]


def test_result_of_a_window():
    model = ScriptedModel(says({3: [BEGIN, *TEXT, BEGIN + 100]}))
    [result] = decode(model, heard(3))
    assert result.tokens == [BEGIN, *TEXT, BEGIN + 100]
    assert result.text == "ask not" and result.language == "en" and result.language_probs is None
    assert result.temperature == 0.0 and -1e-4 < result.avg_logprob <= 0
    assert result.compression_ratio == compression_ratio("ask not")


def test_avg_logprob_counts_the_end():
    row, end = {TEXT[0]: 3.0, TEXT[1]: 2.5, T.eot: 4.0}, {T.eot: 5.0, TEXT[1]: 4.5}
    model = ScriptedModel(lambda w, a, tokens: row if tokens[-1] != TEXT[0] else end)
    [result] = decode(model, heard(3), DecodingOptions(without_timestamps=True, suppress_tokens=()))
    allowed = np.ones(T.n_vocab, bool)
    allowed[[T.transcribe, T.translate, T.sot, T.sot_prev, T.sot_lm, T.no_speech]] = False
    last = np.log(np.exp(logits(T, end)[allowed].astype(float)).sum())
    allowed[[T.encode(" ")[0], T.eot]] = False  # no blank at first
    first = np.log(np.exp(logits(T, row)[allowed].astype(float)).sum())
    assert result.avg_logprob == pytest.approx((3.0 - first + 5.0 - last) / 2, abs=1e-6)


@pytest.mark.parametrize("options, opening", [
    (dict(), [T.sot]),
    (dict(without_timestamps=True), [T.sot, T.no_timestamps]),
    (dict(prompt=(65, 66)), [T.sot_prev, 65, 66, T.sot]),
    (dict(prompt=tuple(range(40)), without_timestamps=True), [T.sot_prev, *range(9, 40), T.sot, T.no_timestamps]),
])  # fmt: skip
def test_opening_of_an_english_model(options, opening):
    model = ScriptedModel(says({3: [BEGIN, *TEXT]}), n_text_ctx=64)
    assert opening_of(model, **options) == opening


def test_opening_of_a_multilingual_model(many):
    model = ScriptedModel(says({3: [many.timestamp_begin, 300]}, many), many)
    german = many.language_token("de")
    assert opening_of(model, language="german") == [many.sot, german, many.transcribe]
    options = dict(language="de", task="translate", without_timestamps=True, prompt=(65,))
    opening = [many.sot_prev, 65, many.sot, german, many.translate, many.no_timestamps]
    assert opening_of(model, **options) == opening


def test_no_speech_is_read_at_sot(many):
    def script(window, attempt, tokens):
        if tokens[-1] == many.sot:
            return {many.no_speech: 1.0, 70: 2.0}
        return {many.eot: 5.0, many.timestamp_begin: 9.0 - 5 * (tokens[-1] >= many.timestamp_begin)}

    model = ScriptedModel(script, many)
    [result] = decode(model, heard(3), DecodingOptions(language="de", prompt=(65, 66)))
    total = np.exp(logits(many, {many.no_speech: 1.0, 70: 2.0}).astype(float)).sum()
    assert result.no_speech_prob == pytest.approx(np.exp(1.0) / total, rel=1e-5)


def test_language_is_the_likeliest_of_the_language_tokens(many):
    def script(window, attempt, tokens):
        if tokens == [many.sot]:
            best = "de" if window == 1 else "fr"
            return {many.language_token(best): 2.0, many.language_token("nl"): 1.0, 300: 30.0}
        code = {1: "de", 2: "fr"}[window]
        assert tokens[tokens.index(many.sot) + 1] == many.language_token(code)
        return {many.eot if tokens[-1] >= many.timestamp_begin else many.timestamp_begin: 5.0}

    model = ScriptedModel(script, many)
    probs = detect_language(model, heard(1, 2))
    assert [max(p, key=p.get) for p in probs] == ["de", "fr"]
    assert list(probs[0]) == list(many.all_language_codes) and sum(probs[0].values()) == pytest.approx(1, abs=1e-5)
    assert probs[0]["de"] / probs[0]["nl"] == pytest.approx(np.e, rel=1e-5)
    results = decode(model, heard(1, 2))
    assert [r.language for r in results] == ["de", "fr"] and results[0].language_probs == probs[0]


def test_a_batch_gives_what_single_windows_give():
    rng = np.random.default_rng(0)
    texts = {w: [BEGIN, *rng.integers(65, 90, 3 * w).tolist(), BEGIN + 50 * w] for w in (1, 5, 2, 4)}
    noise = np.random.default_rng(1).normal(size=(9, T.n_vocab)).astype(np.float32)
    fixed = says(texts)

    def script(window, attempt, tokens):
        return logits(T, fixed(window, attempt, tokens)) + 3 * noise[(len(tokens) + window) % 9]

    for options in (DecodingOptions(), DecodingOptions(beam_size=3), DecodingOptions(beam_size=3, patience=2.0)):
        model = ScriptedModel(script)
        together = decode(model, heard(*texts), options)
        rows = [shape[0] for shape in model.calls]
        assert rows.pop(0) == 4  # the opening is read once for all beams of a window
        assert rows[0] > rows[-1] and sorted(rows, reverse=True) == rows  # windows leave when they are done
        assert together == [decode(ScriptedModel(script), heard(w), options)[0] for w in texts]


def test_beam_follows_the_rows_it_keeps():
    """The second-best first word leads to the best text: found by two beams, not by one."""
    a, b, c, d = 65, 66, 67, 68
    following = {(): {a: 1.0, b: 0.9}, (a,): {c: 0.2, d: 0.1, 69: 0.0, 70: 0.0}, (b,): {c: 5.0}, (b, c): {d: 5.0}}

    def script(window, attempt, tokens):
        return following.get(tuple(tokens[2:]), {T.eot: 5.0})  # behind sot, no_timestamps

    options = dict(without_timestamps=True)
    assert decode(ScriptedModel(script), heard(3), DecodingOptions(**options))[0].tokens[0] == a
    assert decode(ScriptedModel(script), heard(3), DecodingOptions(beam_size=2, **options))[0].tokens == [b, c, d]


def test_samples_repeat_and_the_best_of_them_wins():
    row = np.full(T.n_vocab, LOW, np.float32)
    row[65:90] = np.linspace(0, 2, 25)
    row[T.eot] = 1.0
    model = ScriptedModel(lambda w, a, tokens: row)

    def sample(**options):
        return decode(model, heard(3), DecodingOptions(temperature=1.0, without_timestamps=True, **options))[0]

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(best_of=20).avg_logprob > sample(best_of=1).avg_logprob
    assert sample(best_of=3).temperature == 1.0


def test_length_is_bounded():
    endless = ScriptedModel(lambda w, a, tokens: {70: 5.0}, n_text_ctx=64)
    plain = dict(without_timestamps=True)
    assert len(decode(endless, heard(3), DecodingOptions(**plain))[0].tokens) == 32
    assert len(decode(endless, heard(3), DecodingOptions(sample_len=7, **plain))[0].tokens) == 7
    prompted = decode(endless, heard(3), DecodingOptions(prompt=(65,) * 99, sample_len=64, **plain))[0]
    assert len(prompted.tokens) == 64 + 1 - (1 + 31 + 2)  # the last token is decoded from a full context
    assert len(decode(endless, heard(3), DecodingOptions(beam_size=2, **plain))[0].tokens) == 32


def test_what_a_model_cannot_do():
    model = ScriptedModel(says({3: [BEGIN]}))
    with pytest.raises(UsageError, match="language: expected en"):
        decode(model, heard(3), DecodingOptions(language="de"))
    with pytest.raises(UsageError, match="task: expected transcribe"):
        decode(model, heard(3), DecodingOptions(task="translate"))
    with pytest.raises(UsageError, match="suppress_tokens"):
        decode(model, heard(3), DecodingOptions(suppress_tokens=[10**6]))


def test_compression_ratio():
    assert compression_ratio("") == 0
    text = "ä" * 100
    assert compression_ratio(text) == 200 / len(zlib.compress(text.encode()))
