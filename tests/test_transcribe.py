"""The long form, rule by rule. A window goes by the frame it begins at; a scripted model says what it holds."""

import numpy as np
import pytest

from minigate import transcribe as module
from minigate.decoding import DecodingResult
from minigate.errors import FileError, UsageError
from minigate.options import TranscribeOptions
from minigate.transcribe import Transcription, cut, has_failed, is_silence, transcribe
from tests.scripted import ENGLISH as T
from tests.scripted import LOW, ScriptedModel, multilingual, says

ASK, NOT, AND, SO = T.encode(" ask not and so")
SURE = 30.0  # a logit that leaves nothing to the others


def at(seconds: float) -> int:
    return T.timestamp_begin + round(seconds / 0.02)


class Windows:
    """MelWindows of which only mel[0, 0] says something: the first frame."""

    def __init__(self, n_frames):
        self.n_frames, self.duration_s = n_frames, n_frames / 100

    def ended(self, seek):
        return seek >= self.n_frames

    def window(self, seek):
        mel = np.full((80, 3000), seek, np.float32)
        return mel, min(3000, self.n_frames - seek)

    def language_window(self):
        return self.window(0)[0]


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    """`audio` is the number of frames here, unless it is an array."""
    real = module.MelWindows
    fake = lambda audio, n_mels: Windows(audio) if isinstance(audio, int) else real(audio, n_mels)  # noqa: E731
    monkeypatch.setattr(module, "MelWindows", fake)


def run(texts, n_frames, likely=SURE, tokenizer=T, **options):
    model = ScriptedModel(says(texts, tokenizer, likely), tokenizer)
    return transcribe(model, n_frames, **{"language": "en", **options}), model


def times_and_texts(result):
    return [(s.seek, s.start, s.end, s.text) for s in result.segments]


# --- windows and segments


def test_the_next_window_begins_where_the_last_complete_segment_ended():
    texts = {
        0: [at(0), ASK, at(2), at(2.5), NOT, at(7), at(7), AND],
        700: [at(0.5), AND, at(3)],
    }
    result, model = run(texts, 3500)
    assert times_and_texts(result) == [(0, 0.0, 2.0, " ask"), (0, 2.5, 7.0, " not"), (700, 7.0, 10.0, " and")]
    assert model.starts == [0, 700]
    assert [s.id for s in result.segments] == [0, 1, 2]
    assert result.segments[1].tokens == [at(2.5), NOT, at(7)]
    assert result.text == " ask not and" and result.language == "en"


def test_a_single_timestamp_ends_the_last_segment_and_the_window():
    result, model = run({0: [at(0), ASK, at(2), at(2), NOT, at(7)], 3000: [at(0), SO, at(1)]}, 3100)
    assert times_and_texts(result) == [(0, 0.0, 2.0, " ask"), (0, 2.0, 7.0, " not"), (3000, 30.0, 31.0, " so")]


def test_without_an_end_a_segment_lasts_as_long_as_the_recording():
    result, _ = run({0: [at(0), ASK], 3000: [at(0), NOT]}, 3250)
    assert times_and_texts(result) == [(0, 0.0, 30.0, " ask"), (3000, 30.0, 32.5, " not")]


def test_without_timestamps_a_window_is_a_segment():
    result, model = run({0: [ASK, NOT], 3000: [AND]}, 3250, without_timestamps=True)
    assert times_and_texts(result) == [(0, 0.0, 30.0, " ask not"), (3000, 30.0, 32.5, " and")]
    assert result.segments[0].tokens == [ASK, NOT]
    result, _ = run({0: [ASK, at(1), at(1), NOT]}, 2000, without_timestamps=True)  # even if there are some
    assert times_and_texts(result) == [(0, 0.0, 20.0, " ask not")]


@pytest.mark.parametrize("tokens, pieces, advance", [
    ([], [(0.0, 20.0, [])], 2000),
    ([at(0)], [(0.0, 20.0, [at(0)])], 2000),
    ([at(1), ASK], [(0.0, 1.0, [at(1), ASK])], 2000),
    ([at(0), ASK, at(3)], [(0.0, 3.0, [at(0), ASK, at(3)])], 2000),
    ([at(0), ASK, at(3), at(3)], [(0.0, 3.0, [at(0), ASK, at(3)])], 300),
    ([at(0), ASK, at(3), at(4), NOT], [(0.0, 3.0, [at(0), ASK, at(3)])], 300),
    ([at(0), ASK, at(3), at(4), NOT, at(5)], [(0.0, 3.0, [at(0), ASK, at(3)]), (4.0, 5.0, [at(4), NOT, at(5)])], 2000),
])  # fmt: skip
def test_cut(tokens, pieces, advance):
    assert cut(tokens, T.timestamp_begin, 2000, 2) == (pieces, advance)


def test_segments_without_words_or_length_stay_empty_in_their_place():
    blank = T.encode(" ")
    result, model = run({0: [at(0), ASK, at(2), at(2), *blank, at(3), at(3), NOT, at(4), at(4)],
                         400: [at(0), *blank], 3400: [at(0), AND]}, 3500)  # fmt: skip
    assert [(s.text, s.tokens) for s in result.segments] == [
        (" ask", [at(0), ASK, at(2)]), ("", []), (" not", [at(3), NOT, at(4)]), ("", []), (" and", [at(0), AND])]
    assert result.text == " ask not and" and [s.id for s in result.segments] == [0, 1, 2, 3, 4]
    assert prompts(model)[-1] == [at(0), ASK, at(2), at(3), NOT, at(4)]


def test_a_segment_without_length_is_empty(monkeypatch):
    result = DecodingResult([at(1), ASK, at(1), at(1), NOT, at(2)], "", "en", None, 0.0, 0.0, 0.0, 1.0)
    monkeypatch.setattr(module, "decode", lambda *arguments: [result])  # the rules for timestamps forbid it
    assert [(s.start, s.end, s.text) for s in run({}, 2000)[0].segments] == [(1.0, 1.0, ""), (1.0, 2.0, " not")]


def test_a_character_split_between_segments_is_whole_in_the_text():
    first, second = "é".encode()
    result, _ = run({0: [at(0), ASK, first, at(2), at(2), second, at(3)]}, 3000)
    assert [s.text for s in result.segments] == [" ask\ufffd", "\ufffd"] and result.text == " aské"


def test_nothing_is_found_in_less_than_a_frame():
    result, model = run({}, 0)
    assert result.to_dict() == {"text": "", "segments": [], "language": "en"} and model.starts == []


# --- what precedes the text


def prompts(model):
    """The tokens between sot_prev and sot, for each start of a window."""
    return [tokens[1:-1] for tokens in model.openings]


THREE = {0: [at(0), ASK], 3000: [at(0), NOT], 6000: [at(0), AND]}


def test_the_previous_text_is_the_prompt():
    _, model = run(THREE, 9000)
    assert prompts(model) == [[], [at(0), ASK], [at(0), ASK, at(0), NOT]]
    _, model = run(THREE, 9000, condition_on_previous_text=False)
    assert prompts(model) == [[], [], []]


def test_a_model_that_knows_no_prompts_is_given_none_unasked():
    for asked, expected in ((None, [[SO], [], []]), (True, [[SO], [SO, at(0), ASK], [SO, at(0), ASK, at(0), NOT]])):
        model = ScriptedModel(says(THREE, T, SURE))
        model.knows_prompts = False
        transcribe(model, 9000, language="en", condition_on_previous_text=asked, initial_prompt="so")
        assert prompts(model) == expected


def test_initial_prompt():
    _, model = run(THREE, 9000, initial_prompt="  so my ")
    assert prompts(model) == [T.encode(" so my"), T.encode(" so my") + [at(0), ASK],
                              T.encode(" so my") + [at(0), ASK, at(0), NOT]]  # fmt: skip
    _, model = run(THREE, 9000, initial_prompt="so my", condition_on_previous_text=False)
    assert prompts(model) == [T.encode(" so my"), [], []]
    result, model = run(THREE, 9000, initial_prompt=" ")
    assert prompts(model)[0] == [] and result.text == " ask not and"


def test_hotwords_precede_every_window_and_come_first():
    hot = T.encode(" Americans")
    _, model = run(THREE, 9000, hotwords="Americans", condition_on_previous_text=False)
    assert prompts(model) == [hot, hot, hot]
    _, model = run(THREE, 9000, hotwords="Americans", initial_prompt="so")
    assert prompts(model)[1] == hot + [SO, at(0), ASK]


def test_the_prompt_has_its_space():
    long = "so" + " so" * 299
    _, model = run(THREE, 9000, initial_prompt=long, hotwords="my fellow")
    hot = T.encode(" my fellow")
    assert prompts(model)[0] == hot + [SO] * (223 - len(hot))
    assert prompts(model)[1] == hot + [SO] * (223 - len(hot) - 2) + [at(0), ASK]
    _, model = run(THREE, 9000, hotwords=long, initial_prompt="my")
    assert prompts(model) == [[SO] * 223] * 3


def test_text_from_a_high_temperature_is_no_prompt():
    for temperature, expected in ((0.4, [ASK]), (0.6, [])):
        _, model = run({0: [ASK], 3000: [NOT]}, 6000, without_timestamps=True, temperature=temperature, best_of=1)
        assert prompts(model)[1] == expected


# --- temperatures and silence


def found(avg_logprob=-0.5, compression_ratio=1.0, no_speech_prob=0.1):
    return DecodingResult([], "", "en", None, avg_logprob, no_speech_prob, 0.0, compression_ratio)


@pytest.mark.parametrize("values, options, failed, silent", [
    ({}, {}, False, False),
    (dict(avg_logprob=-1.0), {}, False, False),
    (dict(avg_logprob=-1.1), {}, True, False),
    (dict(avg_logprob=-1.1), dict(logprob_threshold=None), False, False),
    (dict(avg_logprob=-1.1), dict(logprob_threshold=-2.0), False, False),
    (dict(compression_ratio=2.4), {}, False, False),
    (dict(compression_ratio=2.5), {}, True, False),
    (dict(compression_ratio=2.5), dict(compression_ratio_threshold=None), False, False),
    (dict(no_speech_prob=0.7), {}, False, False),  # likely text: somebody spoke
    (dict(no_speech_prob=0.7, avg_logprob=-1.1), {}, False, True),
    (dict(no_speech_prob=0.7, avg_logprob=-1.1, compression_ratio=9), {}, False, True),
    (dict(no_speech_prob=0.7, avg_logprob=-1.0), {}, False, True),
    (dict(no_speech_prob=0.6, avg_logprob=-1.1), {}, True, False),
    (dict(no_speech_prob=0.7, avg_logprob=-1.1), dict(no_speech_threshold=None), True, False),
    (dict(no_speech_prob=0.7, avg_logprob=-0.1), dict(logprob_threshold=None), False, True),
    (dict(no_speech_prob=0.7, compression_ratio=9), dict(logprob_threshold=None), True, True),
])  # fmt: skip
def test_what_has_failed_and_what_is_silence(values, options, failed, silent):
    options = TranscribeOptions(**options)
    assert has_failed(found(**values), options) is failed
    assert is_silence(found(**values), options) is silent


def unsure_then(text, sure_from):
    """Says `text`, unsure of it (all tokens nearly alike) before attempt `sure_from`."""

    def script(window, attempt, tokens):
        n = len(tokens) - tokens.index(T.sot) - 2 if T.no_timestamps in tokens else 0
        return {text[n] if n < len(text) else T.eot: SURE if attempt >= sure_from else LOW + 0.5}

    return script


def test_temperatures_are_tried_until_one_passes():
    for sure_from, attempts, temperature in ((0, 1, 0.0), (2, 3, 0.4), (9, 6, 1.0)):
        model = ScriptedModel(unsure_then([ASK, NOT], sure_from))
        result = transcribe(model, 2000, without_timestamps=True, best_of=1)
        assert len(model.starts) == attempts and result.segments[0].temperature == temperature
        if sure_from < 6:
            assert result.text == " ask not"
    model = ScriptedModel(unsure_then([ASK, NOT], 9))
    assert transcribe(model, 2000, without_timestamps=True, temperature=0).segments[0].temperature == 0
    assert len(model.starts) == 1


def test_a_repetitive_text_is_tried_again():
    result, model = run({0: [[at(0)] + [ASK] * 60, [at(0), ASK]]}, 2000)
    assert result.text == " ask" and model.starts == [0, 0] and result.segments[0].temperature == 0.2
    result, model = run({0: [[at(0)] + [ASK] * 60, [at(0), ASK]]}, 2000, compression_ratio_threshold=None)
    assert model.starts == [0]


def test_beams_at_temperature_0_samples_above():
    model = ScriptedModel(unsure_then([ASK], 9))
    transcribe(model, 2000, without_timestamps=True, beam_size=3, patience=2.0, best_of=4, temperature=(0, 0.5))
    assert {shape[0] for shape in model.calls} == {1, 3, 4}  # 1: the opening, once for all


def test_a_recording_gives_the_same_samples_again():
    def once():
        model = ScriptedModel(unsure_then([ASK], 9))
        return transcribe(model, 3500, without_timestamps=True, temperature=1.0, logprob_threshold=None)

    assert once() == once() and once().segments[0].tokens != once().segments[1].tokens


def test_silence_is_passed_over():
    def script(window, attempt, tokens):
        sure = {at(0): SURE} if tokens[-1] == T.sot else {ASK: SURE} if tokens[-1] == at(0) else {T.eot: SURE}
        if window == 3000 and tokens[-1] == T.sot:
            sure = {T.no_speech: SURE, at(0): LOW + 1}
        if window == 3000 and tokens[-1] == at(0):
            sure = {i: LOW + 5 for i in range(200)}
        return sure

    model = ScriptedModel(script)
    result = transcribe(model, 7000, initial_prompt="so")
    assert [s.seek for s in result.segments] == [0, 6000] and model.starts == [0, 3000, 6000]
    assert prompts(model)[2] == prompts(model)[1] == [SO, at(0), ASK]
    result = transcribe(ScriptedModel(script), 7000, no_speech_threshold=None, temperature=0)
    assert [s.seek for s in result.segments] == [0, 3000, 6000]


# --- language


def test_language_is_detected_in_the_first_window_and_its_encoding_used_again(monkeypatch):
    many = multilingual()

    def script(window, attempt, tokens):
        if tokens[-1] == many.sot:
            return {many.language_token("de"): 5.0}
        assert tokens[tokens.index(many.sot) + 1] == many.language_token("de")
        begin = many.timestamp_begin
        return {begin if tokens[-1] == many.transcribe else many.eot if tokens[-1] < many.eot else 300: SURE}

    model = ScriptedModel(script, many)
    encoded = []
    monkeypatch.setattr(model, "encode", lambda mel: encoded.append(mel[0, 0, 0]) or ScriptedModel.encode(model, mel))
    transcription = Transcription(model, 6000, TranscribeOptions())
    assert transcription.language == "de" and transcription.language_probs["de"] > 0.99
    assert len(list(transcription)) == 2 and encoded == [0, 3000]
    assert Transcription(model, 6000, TranscribeOptions(language="German")).language_probs is None


def test_what_a_model_cannot_do_is_said_before_the_recording_is_opened():
    model = ScriptedModel(says({}))
    for options in (dict(language="de"), dict(task="translate"), dict(suppress_tokens="99999999")):
        with pytest.raises(UsageError, match=next(iter(options))):
            transcribe(model, "no such file", **options)
    with pytest.raises(FileError, match="no such file"):
        transcribe(model, "no such file", language="English")
    with pytest.raises(UsageError, match="options: expected some of language, .*, got beams"):
        transcribe(model, 3000, beams=5)
    for n_audio_ctx, n_text_ctx in ((1000, 448), (1500, 8)):
        model = ScriptedModel(lambda *_: {}, n_text_ctx=n_text_ctx)
        model.dims.n_audio_ctx = n_audio_ctx
        said = f"model: expected n_audio_ctx 1500 and n_text_ctx of at least 16, got {n_audio_ctx} and {n_text_ctx}"
        with pytest.raises(FileError, match=said):
            transcribe(model, np.zeros(3000, np.float32))


@pytest.mark.parametrize(("frames", "context"), [(30, 200), (200, 200), (201, 300), (2999, 3000), (3000, 3000)])
def test_a_model_of_variable_context_hears_whole_seconds(frames, context):
    model, heard = ScriptedModel(lambda *_: {T.eot: 5.0}), []
    model.encode = lambda mel: heard.append(mel.shape[2]) or np.zeros((1, 1500, 2), np.float32)
    audio = np.random.default_rng(0).standard_normal(160 * frames).astype(np.float32)
    transcribe(model, audio)
    assert heard == [3000]
    model.metadata = {**model.metadata, "audio_context": "variable"}
    transcribe(model, audio)
    assert heard[1:] == [context]


# --- calls back


def test_callbacks_and_iteration():
    seen, progress = [], []
    texts = {0: [at(0), ASK, at(7), at(7), NOT], 700: [at(0), AND, at(29), at(29)]}
    model = ScriptedModel(says(texts, likely=SURE))
    result = transcribe(model, 3500, on_segment=seen.append, on_progress=lambda *s: progress.append(s))
    assert seen == result.segments and progress == [(7.0, 35.0), (35.0, 35.0)]
    transcription = Transcription(model, 3500, TranscribeOptions())
    first = next(iter(transcription))
    assert first.text == " ask" and model.starts[2:] == [0]  # found without looking further
    assert transcription.result().text == " ask"


def test_an_array_of_sound():
    model = ScriptedModel(lambda window, attempt, tokens: {at(0): SURE} if tokens[-1] == T.sot else {
        ASK if tokens[-1] == at(0) else T.eot: SURE})  # fmt: skip
    sound = np.random.default_rng(0).normal(0, 0.1, 16000 * 31).astype(np.float32)
    result = transcribe(model, sound)
    assert times_and_texts(result) == [(0, 0.0, 30.0, " ask"), (3000, 30.0, 31.0, " ask")]
    assert transcribe(model, sound[:159]).segments == []
    with pytest.raises(FileError, match="got 0 samples"):
        transcribe(model, sound[:0])
