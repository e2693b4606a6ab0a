"""Log-mels of windows: what transcription sees, the same from the cache, within its bounds, whatever lies in it."""

import numpy as np
import pytest
from sounds import measured

from minigate import melcache
from minigate.audio import read_audio
from minigate.data import DamagedRecording, make_windows
from minigate.errors import FileError
from minigate.mel import MelWindows
from minigate.melcache import MelCache

N_MELS = 8


@pytest.fixture
def sound(tmp_path):
    recordings, found = measured(tmp_path / "sound", [0.5, 2.345, 1.0])
    return recordings, make_windows(found, "single", 0)


def test_it_is_what_transcription_sees(sound, tmp_path):
    recordings, windows = sound
    cache = MelCache(recordings, N_MELS, tmp_path / "mel")
    for window in windows:
        seen, frames = MelWindows(read_audio(window.utterances[0].recording.row.file), N_MELS).window(0)
        assert frames == window.frames
        found = cache.padded([window], 3000)[0]
        np.testing.assert_allclose(found, seen, rtol=0, atol=1.7e-5)
        assert not found[:, frames:].any()


def test_from_the_cache_or_not_it_is_the_same_to_the_bit(sound, tmp_path, monkeypatch):
    recordings, windows = sound
    without = MelCache(recordings, N_MELS).padded(windows, 300)
    first = MelCache(recordings, N_MELS, tmp_path / "mel").padded(windows, 300)
    monkeypatch.setattr(recordings, "audio", lambda window: pytest.fail("decoded again"))
    again = MelCache(recordings, N_MELS, tmp_path / "mel").padded(windows, 300)
    assert without.dtype == np.float32 and without.shape == (3, N_MELS, 300)
    np.testing.assert_array_equal(first, without)
    np.testing.assert_array_equal(again, without)


def test_damaged_files_are_made_anew_and_cut_off_ones_ignored(sound, tmp_path):
    recordings, windows = sound
    folder = tmp_path / "mel"
    fresh = MelCache(recordings, N_MELS, folder).padded(windows, 300)
    files = sorted(folder.rglob("*.mel"))
    files[0].write_bytes(files[0].read_bytes()[:-10])
    files[1].write_bytes(files[2].read_bytes())  # whole, but another window's
    files[1].with_name("." + files[1].name + ".0.tmp").write_bytes(b"cut off")
    np.testing.assert_array_equal(MelCache(recordings, N_MELS, folder).padded(windows, 300), fresh)
    assert files[0].read_bytes()[-10:] != b"" and len(sorted(folder.rglob("*.mel"))) == 3
    np.testing.assert_array_equal(MelCache(recordings, N_MELS, folder).padded(windows, 300), fresh)


def test_it_does_not_grow_beyond_its_bound(sound, tmp_path):
    recordings, windows = sound
    bound = 2 * N_MELS * windows[1].frames + 1000
    for _ in range(2):
        cache = MelCache(recordings, N_MELS, tmp_path / "mel", max_bytes=bound)
        assert cache.padded(windows[1:], 300)[1].any()
        files = list((tmp_path / "mel").rglob("*.mel"))
        assert len(files) == 1 and files[0].stat().st_size <= bound


def test_a_full_disk_ends_the_caching_not_the_run(sound, tmp_path, monkeypatch):
    recordings, windows = sound
    said = []

    def full(path, *rest):
        raise FileError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(melcache.tensorfile, "write", full)
    cache = MelCache(recordings, N_MELS, tmp_path / "mel", report=said.append)
    np.testing.assert_array_equal(cache.padded(windows, 300), MelCache(recordings, N_MELS).padded(windows, 300))
    assert len(said) == 1 and said[0].endswith("No space left on device; log-mels are no longer cached")


def test_steps_cover_the_whole_range():
    mel = np.linspace(-0.75, 1.25, 1001, dtype=np.float32)[None]
    steps, top = melcache.pack(mel)
    assert steps.min() == 0 and steps.max() == 65535 and top == np.float32(1.25)
    np.testing.assert_allclose(melcache.unpack(steps, top), mel, rtol=0, atol=1.6e-5)


def test_damaged_sound(sound):
    recordings, windows = sound
    windows[0].utterances[0].recording.row.file.write_bytes(b"")
    with pytest.raises(DamagedRecording):
        MelCache(recordings, N_MELS).content(windows[0])
