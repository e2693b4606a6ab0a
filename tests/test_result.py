"""Segment and Result as JSON."""

import json
import math

import numpy as np

from minigate.result import Result, Segment


def test_dicts_have_the_keys_of_whisper_in_its_order():
    segment = Segment(0, 3000, 30.0, 31.5, " Hi.", [50363, 15902, 13], 0.2, -0.5, 0.8, 0.01)
    result = Result(" Hi.", [segment], "en").to_dict()
    assert list(result) == ["text", "segments", "language"]
    assert list(result["segments"][0]) == [
        "id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio",
        "no_speech_prob",
    ]  # fmt: skip
    assert list(result["segments"][0].values()) == [
        0, 3000, 30.0, 31.5, " Hi.", [50363, 15902, 13], 0.2, -0.5, 0.8, 0.01,
    ]  # fmt: skip


def test_numpy_numbers_and_non_finite_numbers_become_json():
    segment = Segment(
        np.int64(1), np.int32(5), np.float32(0.5), math.inf, "x", list(np.arange(2)), 0, -math.inf, math.nan, np.nan
    )
    written = json.loads(json.dumps(segment.to_dict(), allow_nan=False))
    assert written["seek"] == 5 and written["start"] == 0.5 and written["tokens"] == [0, 1]
    assert [written[key] for key in ("end", "avg_logprob", "compression_ratio", "no_speech_prob")] == [None] * 4
