"""Each rule by the set of tokens that it leaves."""

import numpy as np
import pytest

from minigate.errors import UsageError
from minigate.options import DecodingOptions
from minigate.rules import Rules, suppressed_tokens
from tests.scripted import ENGLISH as T
from tests.scripted import ScriptedModel

MODEL = ScriptedModel(None)
BEGIN = T.timestamp_begin
TEXT = set(range(T.eot))
SPECIAL = set(range(T.eot, BEGIN))
STEERING = {T.transcribe, T.translate, T.sot, T.sot_prev, T.sot_lm, T.no_speech}
NEVER = STEERING | set(T.non_speech_tokens)


def allowed(tokens=(), row=None, **options):
    """The tokens left after `tokens`; all logits 0 unless given."""
    logits = np.zeros((1, T.n_vocab), np.float32) if row is None else np.array([row], np.float32)
    bounds = [[options.pop(name)] if name in options else [] for name in ("sound_s", "whole_s")]
    Rules(MODEL, DecodingOptions(**options), *bounds).choose(logits, np.array([tokens], int).reshape(1, -1))
    return set(np.flatnonzero(logits[0] > -np.inf).tolist())


def text_likely():
    """Logits under which no timestamp is preferred."""
    row = np.zeros(T.n_vocab)
    row[:BEGIN] = 20
    return row


def times(first, last=1500):
    return set(range(BEGIN + first, BEGIN + last + 1))


def test_without_timestamps_only_the_first_token_differs():
    blank = {T.encode(" ")[0], T.eot}
    everything = TEXT | SPECIAL | times(0)
    assert allowed(without_timestamps=True) == everything - NEVER - blank
    assert allowed([65], without_timestamps=True) == everything - NEVER
    assert allowed(without_timestamps=True, suppress_blank=False) == everything - NEVER


def test_first_token_is_an_early_timestamp():
    assert allowed(row=text_likely()) == times(0, 50)
    assert allowed(row=text_likely(), max_initial_timestamp=0.3) == times(0, 15)
    assert allowed(row=text_likely(), max_initial_timestamp=0.0) == times(0, 0)
    assert allowed(row=text_likely(), max_initial_timestamp=None) == times(0)


def test_text_follows_a_start():
    words = TEXT | SPECIAL - {T.no_timestamps}
    assert allowed([BEGIN + 3], text_likely()) == words - NEVER
    assert allowed([BEGIN + 3, 65, BEGIN + 9, BEGIN + 9], text_likely()) == words - NEVER


def test_an_end_is_later_than_its_start():
    later = TEXT | SPECIAL - {T.no_timestamps} | times(4)
    assert allowed([BEGIN + 3, 65], text_likely()) == later - NEVER
    assert allowed([BEGIN + 3, 65, 66], text_likely()) == later - NEVER


def test_after_an_end_comes_a_start_or_the_end_of_text():
    left = SPECIAL - {T.no_timestamps} | times(9)
    assert allowed([BEGIN + 3, 65, BEGIN + 9], text_likely()) == left - NEVER
    assert allowed([BEGIN + 3, 65, BEGIN + 1500], text_likely()) == (SPECIAL - {T.no_timestamps} | times(1500)) - NEVER


def test_no_segment_begins_when_the_sound_is_over():
    ends = SPECIAL - {T.no_timestamps}
    assert allowed([BEGIN, 65, BEGIN + 60], text_likely(), sound_s=2.0) == (ends | times(60, 90)) - NEVER
    for end in (91, 100, 1500):
        assert allowed([BEGIN, 65, BEGIN + end], text_likely(), sound_s=2.0) == ends - NEVER
    assert allowed([BEGIN, 65], text_likely(), sound_s=2.0) & times(0) == times(1)  # an end may be later
    assert allowed(row=text_likely(), sound_s=0.5) == times(0, 15)
    assert allowed(row=text_likely(), sound_s=0.1) == times(0, 0)
    assert allowed([65], without_timestamps=True, sound_s=2.0) == allowed([65], without_timestamps=True)


def test_a_segment_that_begins_in_a_whole_window_has_words():
    begun = [BEGIN, 65, BEGIN + 5, BEGIN + 60]
    assert T.eot in allowed(begun, text_likely(), whole_s=1.2)
    assert allowed(begun, text_likely(), whole_s=1.21) == TEXT - NEVER
    assert T.eot in allowed(begun[:3], text_likely(), whole_s=30.0)  # the text may close
    assert T.eot in allowed(begun[:2], text_likely(), whole_s=30.0)
    assert T.eot in allowed([BEGIN], text_likely(), whole_s=30.0)  # and be none at all
    options = {"without_timestamps": True}
    assert allowed([65], **options, whole_s=30.0) == allowed([65], **options)


def test_text_between_segments_without_a_start_keeps_the_last_time():
    assert allowed([BEGIN, 65, BEGIN + 7, BEGIN + 7, 66], text_likely()) & times(0) == times(8)


def test_a_timestamp_when_all_together_are_likelier_than_any_other_token():
    row = np.full(T.n_vocab, -30.0)
    row[[65, 66]] = 0.0
    row[BEGIN + 10 : BEGIN + 110] = -np.log(100) + 0.01  # together 0.01, likelier than each word
    after = [BEGIN + 3, 67]
    assert allowed(after, row) == times(4)
    row[BEGIN + 10 : BEGIN + 110] -= 0.02
    assert {65, 66} < allowed(after, row)
    row[BEGIN + 10 : BEGIN + 110] += 0.02
    row[65] = 0.02
    assert {65, 66} < allowed(after, row)
    assert allowed([67], row, without_timestamps=True) >= {65, 66}


def test_rows_are_independent():
    rng = np.random.default_rng(0)
    histories = np.array([[BEGIN, 65, 66], [65, BEGIN + 5, BEGIN + 5], [BEGIN + 2, 67, BEGIN + 9], [65, BEGIN, BEGIN]])
    logits = rng.normal(size=(4, T.n_vocab)).astype(np.float32)
    sounds, wholes = [None, 2.0, 0.5, 1.0], [0.0, 1.0, 0.0, 0.5]
    alone = logits.copy()
    for i in range(4):
        one = slice(i, i + 1)
        Rules(MODEL, DecodingOptions(), sounds[one], wholes[one]).choose(alone[one], histories[one])
    rules = Rules(MODEL, DecodingOptions(), sounds, wholes)
    together = logits.copy()
    rules.choose(together, histories)
    np.testing.assert_array_equal(together, alone)
    kept = np.array([3, 1])
    rules.keep(kept)
    some = logits[kept]
    rules.choose(some, histories[kept])
    np.testing.assert_array_equal(some, alone[kept])


def test_suppressed_tokens():
    assert set(suppressed_tokens(MODEL, ())) == STEERING
    assert set(suppressed_tokens(MODEL, (5, -1))) == NEVER | {5}
    own = ScriptedModel(None)
    own.metadata["suppress_tokens"] = [7, 8]
    assert set(suppressed_tokens(own, (-1,))) == STEERING | {7, 8}
    with pytest.raises(UsageError, match=f"suppress_tokens: expected ids below {BEGIN}.*got {BEGIN}$"):
        suppressed_tokens(MODEL, (3, BEGIN))
