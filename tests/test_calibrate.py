"""Calibration: which windows, how a model hears them, and what follows from them."""

import numpy as np
import pytest

from minigate import calibrate, checkpoint, graph, quantsim
from minigate.calibrate import CalibrationOptions, Speech
from minigate.decoding import decode
from minigate.errors import FileError, UsageError
from minigate.mel import MelWindows
from minigate.model import Model
from minigate.options import DecodingOptions
from tests.sounds import RATE, write_manifest, write_wav
from tests.toy import toy_model

SECONDS = (0.6, 1.1, 3.4, 0.9)


def hearing_toy(gate="none", audio_context="full", **dims):
    """A toy that hears 3 s and writes up to 6 tokens."""
    dims = {"n_audio_ctx": 150, "n_text_ctx": 12, "n_vocab": 1864, "n_audio_layer": 1, "n_text_layer": 1, **dims}
    metadata, tensors = toy_model(gate, **dims)
    return {**metadata, "audio_context": audio_context}, tensors


def speech(folder, metadata, seconds=SECONDS, batches=1, **options):
    return Speech(write_manifest(folder, seconds), metadata, batches, report=lambda line: None, **options)


def names(found):
    return [window.utterances[0].recording.row.name for window in found.windows]


def test_a_shorter_set_is_used_again_from_the_first_window_on(tmp_path):
    found = speech(tmp_path, hearing_toy()[0], batches=2)
    assert len(found.windows) == 4
    assert found.batches == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert [found.times(i) for i in range(4)] == [4, 4, 4, 4]
    three = speech(tmp_path / "three", hearing_toy()[0], SECONDS[:3])
    assert three.batches == [[0, 1, 2, 0, 1, 2, 0, 1]] and [three.times(i) for i in range(3)] == [3, 3, 2]


def test_no_more_windows_than_wanted_and_the_seed_chooses(tmp_path):
    seconds = [0.2] * 20
    chosen = [names(speech(tmp_path, hearing_toy()[0], seconds, seed=seed)) for seed in (0, 0, 1)]
    assert all(len(set(found)) == 8 for found in chosen)
    assert chosen[0] == chosen[1] != chosen[2]
    assert sorted(chosen[0]) != chosen[0]


def test_the_hash_is_that_of_the_sound(tmp_path):
    metadata = hearing_toy()[0]
    first = speech(tmp_path, metadata)
    assert first.sha256 == speech(tmp_path, metadata).sha256
    write_wav(tmp_path / "2.wav", round(3.4 * RATE), seed=77)
    changed = Speech(tmp_path / "list.tsv", metadata, 1)
    assert first.sha256 != changed.sha256 and len(first.sha256) == 64


def test_recordings_that_cannot_be_read_are_left_out_and_reported(tmp_path):
    manifest, said = write_manifest(tmp_path, SECONDS), []
    (tmp_path / "0.wav").unlink()
    (tmp_path / "3.wav").write_bytes(b"no sound")
    with open(tmp_path / "1.wav", "r+b") as file:  # the header is whole, the sound is not
        file.truncate(2000)
    found = Speech(manifest, hearing_toy()[0], 1, report=said.append)
    assert names(found) == ["2.wav"]
    assert all(any(name in line for line in said) for name in ("0.wav", "1.wav", "3.wav"))


def test_a_manifest_without_readable_sound_is_an_error(tmp_path):
    manifest = write_manifest(tmp_path, SECONDS)
    for i in range(4):
        (tmp_path / f"{i}.wav").write_bytes(b"no sound")
    with pytest.raises(FileError, match=r"list.tsv: expected a recording that can be read, got none of 4: .*\.wav"):
        Speech(manifest, hearing_toy()[0], 1, report=lambda line: None)


def test_long_recordings_are_cut_into_windows(tmp_path):
    found = speech(tmp_path, hearing_toy()[0], [61])
    assert len(found.windows) == 3 and all(window.seconds <= 30 for window in found.windows)


def test_windows_are_padded_to_30_s_or_cut_to_their_seconds(tmp_path):
    full, variable = (speech(tmp_path, hearing_toy(audio_context=context, n_audio_ctx=1500)[0])
                      for context in ("full", "variable"))  # fmt: skip
    for i, window in enumerate(full.windows):
        audio = full.recordings.audio(window)
        heard, frames = MelWindows(audio, 8).window(0)
        np.testing.assert_array_equal(full.mel(i), heard[None])
        rounded = {0.6: 200, 1.1: 200, 3.4: 400, 0.9: 200}[len(audio) / RATE]
        np.testing.assert_array_equal(variable.mel(i), heard[None, :, :rounded])
        assert frames <= rounded


def test_the_decoder_is_given_the_models_own_text_with_timestamps(tmp_path):
    metadata, tensors = hearing_toy()
    found, model = speech(tmp_path, metadata), Model(metadata, tensors)
    calibrate.observe(metadata, tensors, found)
    tokens = found.tokens[0]
    assert tokens[0, 0] == model.tokenizer.sot and tokens[0, 1] >= model.tokenizer.timestamp_begin
    [text] = decode(model, model.encode(found.mel(0)), DecodingOptions())
    assert tokens[0, 1:].tolist() == text.tokens and text.tokens


def test_tokens_are_found_once(tmp_path, monkeypatch):
    metadata, tensors = hearing_toy()
    found = speech(tmp_path, metadata)
    calibrate.observe(metadata, tensors, found)
    monkeypatch.setattr(calibrate, "greedy_tokens", None)
    calibrate.observe(metadata, tensors, found)


@pytest.mark.parametrize("context", ["full", "variable"])
@pytest.mark.parametrize("method", ["minmax", "running", "percentile", "mse"])
def test_every_point_has_a_range_and_the_model_is_accepted(tmp_path, method, context):
    metadata, tensors = hearing_toy("per_head", context)
    options = CalibrationOptions(ranges=method, batches=2, percentile=99.9)
    found = speech(tmp_path, metadata, batches=2)
    observed = calibrate.observe(metadata, tensors, found, histograms=calibrate.needs_histograms(options))
    ranges = calibrate.find_ranges(observed, found, options)
    assert ranges.keys() == graph.points(metadata["dims"], "per_head").keys()
    calibration = calibrate.description(found, options)
    assert calibration == {"method": method, "percentile": 99.9 if method == "percentile" else None, "batches": 2,
                           "seed": 0, "windows": 4, "sha256": found.sha256}  # fmt: skip
    quantization = {"scheme": "w8a8-static", "weights": "per-tensor", "keep_float": [], "ranges": ranges,
                    "calibration": calibration}  # fmt: skip
    checkpoint.check_metadata("model", {**metadata, "quantization": quantization})


def test_the_same_seed_gives_the_same_ranges(tmp_path):
    metadata, tensors = hearing_toy()
    options = CalibrationOptions(ranges="running", batches=1)
    found = [speech(tmp_path, metadata) for _ in range(2)]
    first, again = (calibrate.find_ranges(calibrate.observe(metadata, tensors, s), s, options) for s in found)
    assert first == again


def test_minmax_is_what_the_network_holds(tmp_path):
    metadata, tensors = hearing_toy()
    found = speech(tmp_path, metadata)
    observed = calibrate.observe(metadata, tensors, found, means=True)
    ranges = calibrate.find_ranges(observed, found, CalibrationOptions(batches=1))
    model = Model(metadata, tensors)
    outputs = [model.encode(found.mel(i)) for i in range(4)]
    low, high = ranges["encoder.ln_post"]
    assert low == pytest.approx(min(xa.min() for xa in outputs), rel=1e-4)
    assert high == pytest.approx(max(xa.max() for xa in outputs), rel=1e-4)
    largest = np.max([np.abs(xa).max((0, 1)) for xa in outputs], axis=0)
    np.testing.assert_allclose(calibrate.channel_maxima(observed)["encoder.ln_post"], largest, rtol=1e-4)
    rows = np.concatenate([np.repeat(xa, found.times(i), 0)[0] for i, xa in enumerate(outputs)])
    mean = np.mean([xa[0].mean(0) for xa in outputs], axis=0)
    assert len(rows) and found.times(0) == 2
    np.testing.assert_allclose(calibrate.mean_inputs(observed)["decoder.blocks.0.cross_attn.key"], mean, atol=1e-5)


def test_infinite_values_name_the_point(tmp_path):
    metadata, tensors = hearing_toy()
    tensors["encoder.blocks.0.mlp.2.bias"] = np.full(32, 3e38, np.float32)
    tensors["encoder.blocks.0.mlp.2.weight"] = np.full((32, 128), 3e38, np.float32)
    with pytest.raises(FileError, match="calibration: expected finite values of encoder.blocks.0.mlp.2, got"):
        calibrate.observe(metadata, tensors, speech(tmp_path, metadata))


def test_a_point_that_nothing_reaches_is_named(tmp_path, monkeypatch):
    metadata, tensors = hearing_toy()
    monkeypatch.setattr(quantsim.Observed, "norm", lambda self, name, x: quantsim.ops.Float.norm(self, name, x))
    with pytest.raises(FileError, match="expected values of encoder.blocks.0.attn_ln, got none: no window reached it"):
        calibrate.observe(metadata, tensors, speech(tmp_path, metadata))


@pytest.mark.parametrize(("options", "said"), [
    ({"ranges": "mean"}, "ranges: expected minmax or running"), ({"percentile": 50}, "percentile: expected a number"),
    ({"percentile": float("nan")}, "percentile: "), ({"batches": 0}, "batches: expected a whole"),
    ({"seed": -1}, "seed: expected a whole number"),
])  # fmt: skip
def test_options_outside_their_range(options, said):
    with pytest.raises(UsageError, match=said):
        CalibrationOptions(**options)


def test_progress_is_shown_when_asked_for(tmp_path, capsys):
    metadata, tensors = hearing_toy()
    calibrate.observe(metadata, tensors, speech(tmp_path, metadata), shown=True)
    assert "calibration" in capsys.readouterr().err
