"""Which utterances share a window, what a window sounds like and is known by, and recordings that cannot be read."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from sounds import RATE, measured, write_manifest, write_wav

from minigate.audio import read_audio
from minigate.augment import AugmentOptions
from minigate.data import (
    MODES,
    PAUSE,
    DamagedRecording,
    Recording,
    Recordings,
    Utterance,
    Window,
    cut,
    header_samples,
    make_windows,
    plan_hash,
)
from minigate.errors import FileError, UsageError
from minigate.manifest import Row, read_manifest

WINDOW = 30 * RATE  # samples


def imagined(count: int, seed: int = 0, longest_s: float = 20) -> list[Recording]:
    """Recordings without files: to pack them, their lengths are enough."""
    lengths = np.random.default_rng(seed).integers(RATE // 5, int(longest_s * RATE), count)
    return [Recording(Row(f"{i}.wav", Path(f"{i}.wav"), f"text {i}", "", "", i + 2), int(n))
            for i, n in enumerate(lengths)]  # fmt: skip


# --- packing


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("augment", [None, AugmentOptions(speeds=(0.9, 1.0, 1.1), gain_db=6)])
def test_every_utterance_once_in_windows_of_30_s_at_most(mode, augment):
    recordings = imagined(400, longest_s=70)
    windows = make_windows(recordings, mode, seed=3, augment=augment)
    assert max(w.samples for w in windows) <= WINDOW
    heard = Counter()
    for window in windows:
        for u in window.utterances:
            heard[u.recording.row.name, u.speed] += u.stop - u.start
    speeds = [Fraction(9, 10), 1, Fraction(11, 10)] if augment else [1]
    assert heard == {(r.row.name, s): r.samples for r in recordings for s in speeds}


def test_full_mode_fills_its_windows():
    windows = make_windows(imagined(2000), "full", seed=0)
    assert np.mean([w.samples for w in windows]) > 0.95 * WINDOW


def test_variable_mode_leaves_half_alone_and_fills_windows_of_every_length():
    recordings = imagined(2001, longest_s=8)
    windows = make_windows(recordings, "variable", seed=0)
    assert sum(len(w.utterances) == 1 for w in windows) >= 1001
    packed_s = [w.seconds for w in windows if len(w.utterances) > 1]
    assert sum(len(w.utterances) for w in windows if len(w.utterances) > 1) > 900
    assert min(packed_s) < 8 and max(packed_s) > 27 and 12 < np.mean(packed_s) < 20


def test_half_of_the_utterances_are_alone_where_all_would_find_room():
    windows = make_windows(imagined(201, longest_s=1), "variable", seed=0)
    assert 101 <= sum(len(w.utterances) == 1 for w in windows) <= 103


@pytest.mark.parametrize("mode", ["full", "variable"])
def test_windows_follow_from_the_seed(mode):
    plans = [plan_hash(make_windows(imagined(100), mode, seed, AugmentOptions(gain_db=3))) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_a_long_recording_is_cut_into_equal_pieces_without_a_text():
    recording = Recording(imagined(1)[0].row, 61 * RATE + 1)
    pieces = cut(recording)
    assert [u.start for u in pieces[1:]] == [u.stop for u in pieces[:-1]]
    assert pieces[0].start == 0 and pieces[-1].stop == recording.samples
    assert {u.stop - u.start for u in pieces} == {325333, 325334}
    assert [u.text for u in pieces] == [None] * 3
    assert [u.text for u in cut(Recording(recording.row, WINDOW))] == ["text 0"]
    slow = cut(Recording(recording.row, WINDOW), Fraction(9, 10))
    assert len(slow) == 2 and all(u.samples <= WINDOW for u in slow)


def test_lengths_of_a_window():
    def window(*samples):
        return Window(tuple(Utterance(recording, 0, n) for n in samples))

    recording = imagined(1)[0]
    assert window(RATE, 2 * RATE).samples == 3 * RATE + PAUSE
    assert [window(n).rounded_s for n in (1600, 2 * RATE + 159, 2 * RATE + 160, WINDOW)] == [2, 2, 3, 30]
    assert window(2 * RATE + 159).frames == 200


def test_a_window_has_a_text_if_all_its_utterances_have_one():
    with_text, other = imagined(2)
    without = Recording(Row("x", Path("x"), None, "", "", 9), 5)
    whole = [Utterance(r, 0, r.samples) for r in (with_text, other, without)]
    assert Window(tuple(whole[:2])).text == "text 0 text 1"
    assert Window((whole[0], whole[2])).text is None


def test_unknown_mode():
    with pytest.raises(UsageError, match="mode: expected one of full variable single, got 'short'"):
        make_windows(imagined(1), "short", 0)


# --- sound and identity


def test_audio_is_the_utterances_with_pauses_between(tmp_path):
    recordings, found = measured(tmp_path, [0.5, 0.25])
    window = Window((Utterance(found[1], 0, 4000), Utterance(found[0], 1000, 5000, gain_db=-20.0)))
    audio = recordings.audio(window)
    assert audio.dtype == np.float32 and len(audio) == window.samples
    np.testing.assert_array_equal(audio[:4000], read_audio(tmp_path / "1.wav"))
    assert not audio[4000 : 4000 + PAUSE].any()
    np.testing.assert_allclose(audio[4000 + PAUSE :], read_audio(tmp_path / "0.wav")[1000:5000] / 10, rtol=1e-6)


def test_a_piece_far_into_a_recording(tmp_path):
    """Behind several of the chunks in which it is decoded."""
    recordings, found = measured(tmp_path, [45])
    late = cut(found[0])[1]
    np.testing.assert_array_equal(recordings.audio(Window((late,))), read_audio(tmp_path / "0.wav")[late.start :])


def test_speed_changes_length_and_pitch(tmp_path):
    recordings, found = measured(tmp_path, [0.5])
    for window in make_windows(found, "single", 0, AugmentOptions(speeds=(0.9, 1.1))):
        assert len(recordings.audio(window)) == window.samples == -(-8000 // window.utterances[0].speed)
        assert not window.natural_speed


def test_a_window_is_known_by_its_audio(tmp_path):
    recordings, found = measured(tmp_path, [0.5, 0.25])
    write_wav(tmp_path / "copy" / "other.wav", 8000, seed=0)
    copy = Recording(Row("other", tmp_path / "copy" / "other.wav", None, "", "", 2), 8000)
    a, b = (Utterance(r, 0, r.samples) for r in found)
    the_same = [(a,), (Utterance(copy, 0, 8000),)]
    varied = [Utterance(found[0], 0, 7999), Utterance(found[0], 1, 8000), Utterance(found[0], 0, 8000, Fraction(9, 10)),
              Utterance(found[0], 0, 8000, gain_db=1.5)]  # fmt: skip
    others = [(b,), (a, b), (b, a), *((u,) for u in varied)]
    assert len({recordings.window_id(Window(w)) for w in the_same}) == 1
    assert len({recordings.window_id(Window(w)) for w in [*the_same, *others]}) == 1 + len(others)
    assert len(recordings.window_id(Window((a,)))) == 32


# --- what is remembered, and what cannot be read


def test_hashes_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    memory = tmp_path / "cache" / "recordings.jsonl"
    recordings, found = measured(tmp_path, [0.5, 0.25], memory=memory)
    ids = [recordings.window_id(w) for w in make_windows(found, "single", 0)]
    with open(memory, "a") as file:
        file.write('\n{"file": "cut off by a ki')
    with monkeypatch.context() as patched:
        patched.setattr("minigate.data.open_audio", lambda file: pytest.fail("opened again"))
        again = Recordings("list", memory)
        found = again.measure(read_manifest(tmp_path / "list.tsv"))
        assert [again.window_id(w) for w in make_windows(found, "single", 0)] == ids
    write_wav(tmp_path / "0.wav", 9000, seed=7)
    found = (changed := Recordings("list", memory)).measure(read_manifest(tmp_path / "list.tsv"))
    new = [changed.window_id(w) for w in make_windows(found, "single", 0)]
    assert found[0].samples == 9000 and new[0] != ids[0] and new[1] == ids[1]
    assert all(json.loads(line)["file"] for line in memory.read_text().splitlines()[-2:])


def test_unreadable_recordings_are_reported_and_left_out_up_to_a_share(tmp_path):
    path = write_manifest(tmp_path, [0.3] * 10)
    (tmp_path / "3.wav").write_bytes(b"no sound at all, whatever it is called")
    (tmp_path / "7.wav").unlink()
    said = []
    found = Recordings("list.tsv", max_unreadable=0.2, report=said.append).measure(read_manifest(path))
    assert [r.row.name for r in found] == [f"{i}.wav" for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert len(said) == 2 and said[0].startswith("list.tsv, line 5: left out: ") and "7.wav" in said[1]
    with pytest.raises(FileError, match="list.tsv: expected at most 5 % of .* got 2 of 10, for") as error:
        Recordings("list.tsv", report=said.append).measure(read_manifest(path))
    assert "\n" not in str(error.value)


def test_no_readable_recording_at_all(tmp_path):
    path = write_manifest(tmp_path, [0.3, 0.05])
    (tmp_path / "0.wav").unlink()
    with pytest.raises(FileError, match="expected a recording that can be read, got none of 2: .*0.wav"):
        Recordings("list.tsv", max_unreadable=1, report=lambda line: None).measure(read_manifest(path))


def test_sound_that_is_not_as_long_as_its_header_says_is_damaged(tmp_path):
    recordings, found = measured(tmp_path, [1, 1, 1], max_unreadable=0.4)
    write_wav(tmp_path / "1.wav", 5000)
    window = Window((Utterance(found[1], 0, found[1].samples),))
    for ask in (recordings.window_id, recordings.audio):
        with pytest.raises(DamagedRecording, match="1.wav: expected 16000 samples .*, got 5000") as error:
            ask(window)
    for _ in range(2):  # the same one counts once
        recordings.fail(error.value.recording, error.value)
    with pytest.raises(FileError, match="at most 40 %"):
        recordings.fail(found[2], error.value)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_length_by_header_is_the_decoded_length(tmp_path, rate):
    write_wav(tmp_path / "a.wav", 5003, rate=rate)
    assert header_samples(tmp_path / "a.wav") == len(read_audio(tmp_path / "a.wav"))


def test_share_out_of_range():
    with pytest.raises(UsageError, match="max_unreadable: expected a share from 0 to 1, got 5"):
        Recordings("list.tsv", max_unreadable=5)
