"""A teacher's labels: what they hold, that they are made once, by this teacher only, and which of them are used."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from sounds import measured, write_wav
from toy import toy_model

from minigate import decoding, labels
from minigate.data import Utterance, Window, make_windows
from minigate.errors import FileError, UsageError
from minigate.labels import Label, LabelCache, Labeller, LabelOptions, with_timestamps
from minigate.melcache import MelCache
from minigate.model import Model
from minigate.options import DecodingOptions

HASH = "a1" * 32
F16 = 2**-11  # relative rounding error of float16
FRAMES = 200  # of log-mel that the teacher hears


@pytest.fixture(scope="module")
def teacher():
    """It hears 2 s: our recordings are 1 s long at most."""
    return Model(*toy_model(n_audio_ctx=FRAMES // 2, n_vocab=1864, n_text_ctx=24, n_audio_layer=1, n_text_layer=1))


@pytest.fixture
def sound(tmp_path):
    recordings, found = measured(tmp_path / "sound", [0.5, 0.75, 1.0, 0.25, 0.3], max_unreadable=0.5)
    return MelCache(recordings, 8), make_windows(found, "single", 0)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# --- what a label is


def test_the_tokens_are_those_of_transcription(teacher, sound):
    mels, windows = sound
    xa = teacher.encode(mels.padded(windows, FRAMES))
    tokenizer = teacher.tokenizer
    for timestamps, opening in ((True, [tokenizer.sot]), (False, [tokenizer.sot, tokenizer.no_timestamps])):
        found = labels.label_windows(teacher, xa, "en", timestamps)
        expected = decoding.decode(teacher, xa, DecodingOptions(language="en", without_timestamps=not timestamps))
        for label, result in zip(found, expected, strict=True):
            text = label.targets[label.targets != tokenizer.eot]
            assert label.opening.tolist() == opening and text.tolist() == result.tokens


def test_the_end_is_a_target_unless_the_text_was_cut_off(teacher, monkeypatch):
    """n_text_ctx 24: a text has 12 tokens at most."""
    texts = [[5, 6, 7], list(range(11)), list(range(12)), []]
    found = [SimpleNamespace(tokens=tokens, language="en") for tokens in texts]
    monkeypatch.setattr(labels.decoding, "decode", lambda *args: found)
    made = labels.label_windows(teacher, np.zeros((4, 10, 32), np.float32), "en", False)
    eot = teacher.tokenizer.eot
    assert [label.targets.tolist() for label in made] == [[5, 6, 7, eot], [*range(11), eot], list(range(12)), [eot]]
    given, predicted = made[0].positions()
    opening = teacher.tokenizer.sot_sequence("en", timestamps=False)
    assert given.tolist() == [*opening, 5, 6, 7]
    assert predicted.tolist() == [-1, 5, 6, 7, eot]


def test_the_teachers_logits_follow_from_hidden(teacher, sound):
    mels, windows = sound
    embedding = teacher.ops.p["decoder.token_embedding.weight"]
    xa = teacher.encode(mels.padded(windows, FRAMES))
    for i, label in enumerate(labels.label_windows(teacher, xa, "en", True)):
        given, predicted = label.positions()
        logits = teacher.decode(given[None], teacher.start(xa[i : i + 1]), all_positions=True)[0][predicted >= 0]
        assert label.hidden.dtype == np.float16 and label.hidden.shape == (len(label.targets), 32)
        found = label.hidden.astype(np.float32) @ embedding.T
        bound = F16 * np.abs(label.hidden.astype(np.float32)) @ np.abs(embedding).T
        assert (np.abs(found - logits) <= bound + 1e-5).all()


def test_rows_of_different_length_do_not_disturb_each_other(teacher):
    xa = np.random.default_rng(0).standard_normal((2, 30, 32)).astype(np.float32)
    pairs = [([257], [5, 6, 7, 8, 9]), ([257, 258], [4])]
    together = labels.teacher_forced(teacher, xa, pairs)
    assert [h.shape for h in together] == [(5, 32), (1, 32)]
    for i, pair in enumerate(pairs):
        (alone,) = labels.teacher_forced(teacher, xa[i : i + 1], [pair])
        np.testing.assert_allclose(together[i].astype(float), alone.astype(float), rtol=2 * F16, atol=1e-4)


def test_timestamps_by_the_windows_hash():
    ids = [f"{i * 0x9E3779B1 % 2**32:08x}" + "0" * 24 for i in range(1000)]
    chosen = {share: {i for i in ids if with_timestamps(i, True, share)} for share in (0, 0.3, 0.5, 1)}
    assert chosen[0] < chosen[0.3] < chosen[0.5] < chosen[1] == set(ids) and not chosen[0]
    assert len(chosen[0.5]) == pytest.approx(500, abs=50)
    assert not any(with_timestamps(i, False, 1) for i in ids)


def test_a_changed_speed_has_no_timestamps(teacher, sound, tmp_path):
    mels, windows = sound
    slow = Window((Utterance(windows[0].utterances[0].recording, 0, 8000, Fraction(9, 10)),))
    labeller = Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels, LabelOptions(timestamp_share=1))
    assert len(labeller.usable(slow).opening) == 2 and len(labeller.usable(windows[0]).opening) == 1


# --- made once


def test_labels_are_made_once(teacher, sound, tmp_path, monkeypatch):
    mels, windows = sound
    Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels).ensure([*windows, windows[0]])
    made = contents(tmp_path / "labels")
    assert len(made) == len(windows) + 1
    monkeypatch.setattr(teacher, "encode", lambda mel: pytest.fail("labelled again"))
    again = Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels)
    again.ensure(windows)
    assert all(again.usable(window) for window in windows) and contents(tmp_path / "labels") == made


def test_a_kill_loses_what_was_under_way_and_nothing_else(teacher, sound, tmp_path, monkeypatch):
    mels, windows = sound
    monkeypatch.setattr(labels, "WINDOWS_AT_ONCE", 2)
    Labeller(teacher, LabelCache(tmp_path / "whole", HASH), mels).ensure(windows)
    encode, calls = teacher.encode, []

    def killed_the_second_time(mel):
        calls.append(len(mel))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(mel)

    monkeypatch.setattr(teacher, "encode", killed_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels).ensure(windows)
    assert len(contents(tmp_path / "labels")) == 1 + 1
    (tmp_path / "labels" / ".labels.json.12.tmp").write_text("{")
    Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels).ensure(windows)
    (tmp_path / "labels" / ".labels.json.12.tmp").unlink()
    assert calls == [1, 2, 2, 2]
    assert contents(tmp_path / "labels") == contents(tmp_path / "whole")


def test_a_damaged_label_is_made_anew(teacher, sound, tmp_path):
    mels, windows = sound
    labeller = Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels)
    made = [labeller.usable(window) for window in windows]
    files = [path for path in (tmp_path / "labels").rglob("*.t*xt*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels)
    for window, label in zip(windows, made, strict=True):
        assert again.usable(window).targets.tolist() == label.targets.tolist()
        np.testing.assert_array_equal(again.usable(window).hidden, label.hidden)


def encodings(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.encoding")}


def test_encodings_are_kept_beside_the_labels_when_asked(teacher, sound, tmp_path, monkeypatch):
    mels, windows = sound
    cache = LabelCache(tmp_path / "labels", HASH)
    plain = Labeller(teacher, cache, mels)
    plain.ensure(windows)
    assert plain.encoding(windows[0]) is None and not encodings(tmp_path)
    before = contents(tmp_path / "labels")
    Labeller(teacher, cache, mels, encoding_for="variable").ensure(windows)  # labels are there already
    made = encodings(tmp_path)
    assert len(made) == len(windows) and contents(tmp_path / "labels").items() >= before.items()
    again = Labeller(teacher, cache, mels, encoding_for="variable")
    path = cache._file(mels.recordings.window_id(windows[0]), "encoding")
    short = np.ones((50, 32), np.float16)  # of a context that heard less
    for damage in (path.unlink, lambda: path.write_bytes(path.read_bytes()[:-9]),
                   lambda: cache.put_encoding(path.stem, short)):  # fmt: skip
        damage()
        found = again.encoding(windows[0])
        expected = teacher.encode(mels.padded(windows[:1], FRAMES))[0, : 50 * windows[0].rounded_s]
        np.testing.assert_array_equal(found, expected.astype(np.float16))
    monkeypatch.setattr(teacher, "encode", lambda mel: pytest.fail("encoded again"))
    again.ensure(windows)


def test_a_full_disk_is_said(teacher, sound, tmp_path, monkeypatch):
    mels, windows = sound
    labeller = Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels)

    def full(path, *rest):
        raise FileError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(labels.tensorfile, "write", full)
    with pytest.raises(FileError, match="No space left"):
        labeller.ensure(windows)


# --- by this teacher


def test_another_teachers_cache_is_refused(teacher, tmp_path):
    LabelCache(tmp_path, HASH)
    LabelCache(tmp_path, HASH)
    with pytest.raises(FileError) as error:
        LabelCache(tmp_path, "b2" * 32)
    assert str(error.value) == (
        f"{tmp_path}: teacher_sha256: expected b2b2b2b2b2b2…, got a1a1a1a1a1a1…, so these are not this run's labels; "
        "name another folder with --label-cache, or delete them"
    )
    with pytest.raises(FileError, match="language: expected 'de', got 'en'"):
        LabelCache(tmp_path, HASH, "de")
    (tmp_path / "labels.json").write_text("[1")
    with pytest.raises(FileError, match="labels.json: expected a JSON object"):
        LabelCache(tmp_path, HASH)


def test_a_single_label_of_another_teacher_is_refused(tmp_path):
    label = Label(np.ones(1, np.int32), np.ones(2, np.int32), np.ones((2, 3), np.float16))
    LabelCache(tmp_path, HASH).put("00" * 16, True, label)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(FileError, match="teacher_sha256: expected b2b2.*got a1a1"):
        LabelCache(tmp_path, "b2" * 32).get("00" * 16, True)


def test_a_cache_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be used as a label cache: File exists"):
        LabelCache(tmp_path / "file", HASH)


def test_hash_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert labels.sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
    with pytest.raises(FileError, match="b: cannot be read: No such file"):
        labels.sha256_file(tmp_path / "b")


# --- which are used


def labelled(teacher, folder, mels, window, text, **options):
    """A labeller whose cache says that the window's words are `text`."""
    cache, options = LabelCache(folder, HASH), LabelOptions(**options)
    tokens = [*teacher.tokenizer.encode(text), teacher.tokenizer.eot]
    window_id = mels.recordings.window_id(window)
    label = Label(np.ones(1, np.int32), np.array(tokens, np.int32), np.zeros((len(tokens), 32), np.float16))
    cache.put(window_id, with_timestamps(window_id, True, options.timestamp_share), label)
    return Labeller(teacher, cache, mels, options)


def test_loops_are_not_used(teacher, sound, tmp_path):
    mels, (loop, speech, *_) = sound
    assert labelled(teacher, tmp_path, mels, loop, "again and " * 20, max_compression_ratio=None).usable(loop)
    labeller = labelled(teacher, tmp_path, mels, speech, "a few words that do not come twice")
    assert labeller.usable(speech)
    for _ in range(2):
        assert labeller.usable(loop) is None
    assert labeller.left_out == {"unreadable": 0, "compression_ratio": 1, "wer": 0}


@pytest.mark.parametrize("transcript, most, used", [
    ("Red green, blue WHITE!", 0.25, True),
    ("red green blue white", 0.5, True),
    ("red green blue white", 0.2, False),
    ("red green blue white", None, True),
    ("", 0.0, True),
])  # fmt: skip
def test_labels_far_from_the_transcript_are_not_used(teacher, tmp_path, transcript, most, used):
    recordings, found = measured(tmp_path / "sound", [0.5], [transcript])
    (window,), mels = make_windows(found, "single", 0), MelCache(recordings, 8)
    labeller = labelled(teacher, tmp_path / "labels", mels, window, " red green blue black", max_wer=most)
    assert (labeller.usable(window) is not None) is used
    assert labeller.left_out["wer"] == (not used)


def test_damaged_sound_is_counted_and_left_out(teacher, sound, tmp_path):
    mels, windows = sound
    labeller = Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels)
    for window in windows[:2]:
        write_wav(window.utterances[0].recording.row.file, 1700)
    labeller.ensure(windows)
    assert [labeller.usable(window) is not None for window in windows] == [False, False, True, True, True]
    assert sorted(mels.recordings.unreadable) == ["0.wav", "1.wav"] and labeller.left_out["unreadable"] == 2
    write_wav(windows[2].utterances[0].recording.row.file, 1700)
    more = MelCache(mels.recordings, 8)
    mels.recordings._ids.clear()
    with pytest.raises(FileError, match="expected at most 50 % .* got 3 of 5"):
        Labeller(teacher, LabelCache(tmp_path / "labels", HASH), more).ensure(windows)


@pytest.mark.parametrize("options, said", [
    (dict(timestamp_share=2), "timestamp_share: expected a share from 0 to 1, got 2"),
    (dict(max_wer=-0.1), "max_wer: expected a number from 0 up, or none, got -0.1"),
    (dict(max_compression_ratio=float("nan")), "max_compression_ratio: expected"),
])  # fmt: skip
def test_values_out_of_range(options, said):
    with pytest.raises(UsageError, match=said):
        LabelOptions(**options)


def test_progress_on_standard_error(teacher, sound, tmp_path, capsys):
    mels, windows = sound
    labeller = Labeller(teacher, LabelCache(tmp_path / "labels", HASH), mels)
    labeller.ensure(windows)
    assert capsys.readouterr() == ("", "")
    Labeller(teacher, LabelCache(tmp_path / "others", HASH), mels).ensure(windows, shown=True)
    out, err = capsys.readouterr()
    assert out == "" and "hashing sound: 100%" in err and "labels: 100%" in err and "5/5" in err
