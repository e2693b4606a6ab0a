"""mel.py against openai/whisper's numbers (golden/mel.npz), against the formula, and the windows against the whole."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minigate import mel as mel_module
from minigate.audio import SAMPLE_RATE, AudioSource, read_audio
from minigate.errors import FileError, UsageError
from minigate.mel import HOP_LENGTH, N_FFT, N_FRAMES, N_SAMPLES, MelWindows, log_mel, mel_filters

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "weights" / "sample.wav"

FILTER_TOLERANCE = 1e-8  # float32 rounding of weights below 0.03
MEL_TOLERANCE = 1e-4  # openai/whisper's own float32 transform is that far from exact where there is little energy
BLOCK_TOLERANCE = 1e-6  # of values within 2: where a sum is cut into blocks, or done in float64, the last digit differs

# Columns that golden/mel.npz holds
SYNTHETIC_FRAMES = [0, 1, 2, 57, 113, 200, 249, 250, 251, 305, 310, 311]
SAMPLE_FRAMES = [0, 1, 2, 100, 444, 777, 1001, 1499, 1750, 1893, 1894, 1895, 1896, 1897, 2500]


@pytest.fixture(scope="module")
def golden():
    with np.load(HERE / "golden" / "mel.npz") as arrays:
        return dict(arrays)


def synthetic_signal():
    t = np.arange(50001) / SAMPLE_RATE
    loud = 0.4 * np.sin(2 * np.pi * (100 * t + 1200 * t * t)) * (1 + np.sin(2 * np.pi * 3 * t)) / 2
    return (loud + 0.01 * np.sin(2 * np.pi * 1100 * t * t)).astype(np.float32)


def noise(n, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def assert_near(got, expected, tolerance=BLOCK_TOLERANCE):
    np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)


def stream(audio, chunk=4321):
    """Like standard input: chunks of a size that fits nothing, readable once."""
    return AudioSource("stream", False, lambda: (audio[i : i + chunk] for i in range(0, len(audio), chunk)))


@pytest.mark.parametrize("n_mels", [80, 128])
def test_filters_are_openais(golden, n_mels):
    filters = mel_filters(n_mels)
    assert filters.dtype == np.float32 and filters.shape == (n_mels, N_FFT // 2 + 1)
    assert_near(filters, golden[f"filters_{n_mels}"], FILTER_TOLERANCE)


@pytest.mark.parametrize("n_mels", [0, -1, 80.0, "80"])
def test_filters_reject(n_mels):
    with pytest.raises(UsageError, match="n_mels: expected a positive integer"):
        mel_filters(n_mels)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_is_openais(golden, n_mels):
    synthetic = log_mel(synthetic_signal(), n_mels)
    assert synthetic.shape == (n_mels, 312) and synthetic.dtype == np.float32
    assert_near(synthetic[:, SYNTHETIC_FRAMES], golden[f"synthetic_{n_mels}"], MEL_TOLERANCE)
    sample = log_mel(read_audio(SAMPLE), n_mels, padding=N_SAMPLES)
    assert sample.shape == (n_mels, 1895 + N_FRAMES)
    assert_near(sample[:, SAMPLE_FRAMES], golden[f"sample_{n_mels}"], MEL_TOLERANCE)


@pytest.mark.parametrize("n", [201, 319, 320, 399, 400, 401, 1000, 40239, 40240, 40400])
def test_log_mel_is_the_formula(n):
    """Against sums over cosines and sines in float64; lengths round the reflection and the blocks of 250 frames."""
    audio = noise(n)
    padded = np.concatenate([audio[200:0:-1], audio, audio[-2:-202:-1]]).astype(np.float64)
    t = np.arange(N_FFT)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * t / N_FFT)
    wave = window[:, None] * np.exp(-2j * np.pi * np.outer(t, np.arange(201)) / N_FFT)
    frames = np.stack([padded[i * HOP_LENGTH :][:N_FFT] for i in range(n // HOP_LENGTH)])
    raw = np.log10(np.maximum(np.abs(frames @ wave) ** 2 @ mel_filters(80).T.astype(np.float64), 1e-10)).T
    expected = (np.maximum(raw, raw.max() - 8) + 4) / 4
    assert_near(log_mel(audio), expected, BLOCK_TOLERANCE)


def test_log_mel_of_silence():
    np.testing.assert_array_equal(log_mel(np.zeros(16000, np.float32)), np.full((80, 100), -1.5, np.float32))


def test_log_mel_clamps_at_eight_powers_of_ten():
    tone = np.sin(2 * np.pi * 1000 / SAMPLE_RATE * np.arange(8000))
    mel = log_mel(np.concatenate([np.zeros(8000), tone]).astype(np.float32))
    assert mel.max() - mel.min() == pytest.approx(2)


def test_log_mel_rejects():
    for audio in (np.zeros(1000), np.zeros(1000, np.int16), np.zeros((2, 1000), np.float32), [0.0] * 1000):
        with pytest.raises(UsageError, match=r"audio: expected float32 \(n,\), got"):
            log_mel(audio)
    for n in (0, 1, 200):  # openai/whisper's fails there as well: there is nothing to reflect
        with pytest.raises(UsageError, match="expected more than 200 samples"):
            log_mel(np.zeros(n, np.float32))
        assert log_mel(np.zeros(n, np.float32), padding=400).shape == (80, (n + 400) // 160)


def walk(windows, audio, n_mels=80, steps=(3000,)):
    """Compare every window with its part of the whole spectrogram, seeking on by `steps` in turn."""
    whole = log_mel(audio, n_mels, padding=N_SAMPLES)
    n_frames = whole.shape[1] - N_FRAMES
    seek = number = 0
    while seek < n_frames:
        assert not windows.ended(seek)
        size = min(N_FRAMES, n_frames - seek)
        mel, n_content = windows.window(seek)
        assert mel.shape == (n_mels, N_FRAMES) and mel.dtype == np.float32 and mel.flags.c_contiguous
        assert n_content == size
        assert_near(mel[:, :size], whole[:, seek : seek + size])
        assert not mel[:, size:].any()
        seek += steps[number % len(steps)]
        number += 1
    assert windows.ended(n_frames) and windows.ended(n_frames + 5000)
    assert windows.n_frames == n_frames and windows.duration_s == len(audio) / SAMPLE_RATE
    assert windows.window(max(seek, n_frames))[1] == 0


# round a hop, half a transform, a transform, a block of 250 frames, a window
LENGTHS = [1, 100, 159, 160, 161, 199, 200, 201, 399, 400, 401, 39999, 40000, 40039, 40040, 40041, 40240]


@pytest.mark.parametrize("n", [*LENGTHS, 479999, 480000, 480200, 700001])
def test_windows_equal_the_whole(n):
    audio = noise(n)
    walk(MelWindows(audio), audio)
    audio[0] = 100  # so that the running maximum of a stream is the maximum of the whole from the first window on
    walk(MelWindows(stream(audio)), audio)


@pytest.mark.parametrize("steps", [(1000,), (1, 2, 700), (2999, 251, 0), (250,), (2600, 2, 2)])
def test_windows_at_any_seek(steps):
    audio = noise(16000 * 70 + 77)
    walk(MelWindows(audio, 128), audio, 128, steps)


def test_windows_of_silence_and_sample():
    walk(MelWindows(np.zeros(500000, np.float32)), np.zeros(500000, np.float32))
    walk(MelWindows(SAMPLE), read_audio(SAMPLE), steps=(700,))


def test_window_of_a_given_size():
    audio = noise(16000 * 40)
    whole = log_mel(audio, padding=N_SAMPLES)
    mel, n_content = MelWindows(audio).window(100, 1234)
    assert n_content == 1234
    assert_near(mel[:, :1234], whole[:, 100:1334])
    assert not mel[:, 1234:].any()


@pytest.mark.parametrize("n", [50, 16000 * 11 + 3, 479990, 16000 * 40])
def test_language_window_is_followed_by_silence(n):
    audio = noise(n)
    for source in (audio, stream(audio)):
        windows = MelWindows(source)
        mel = windows.language_window()
        expected = log_mel(audio, padding=N_SAMPLES)[:, :N_FRAMES]
        assert_near(mel, expected)
        assert windows.window(0)[1] == min(N_FRAMES, n // HOP_LENGTH)


def test_language_window_after_a_later_window():
    windows = MelWindows(noise(16000 * 40))
    windows.window(1000)
    with pytest.raises(UsageError, match="language_window: expected before any later window"):
        windows.language_window()


def test_the_loudest_frame_may_lie_behind_the_content():
    """n is no multiple of the hop: the last samples are loudest in a frame that clamps the windows and is in none."""
    audio = noise(16000 * 2 + 159) * np.float32(1e-4)
    audio[-1] = 1
    whole = log_mel(audio, padding=N_SAMPLES)
    assert whole[:, :200].max() < whole.max()
    walk(MelWindows(audio), audio)


def test_file_uses_the_maximum_of_the_whole():
    audio = noise(16000 * 65)
    audio[: 16000 * 40] *= np.float32(1e-4)  # the last 25 s are 80 dB louder, and clamp the first window
    assert np.abs(log_mel(audio)[:, :N_FRAMES] - log_mel(audio[: 16000 * 40])[:, :N_FRAMES]).max() > 0.1
    walk(MelWindows(audio), audio)


def test_stream_uses_the_running_maximum():
    audio = noise(16000 * 65)
    audio[: 16000 * 40] *= np.float32(1e-4)  # the last 25 s are 80 dB louder
    whole = log_mel(audio, padding=N_SAMPLES)
    windows = MelWindows(stream(audio))
    assert windows.n_frames is None and windows.duration_s is None
    first, n_content = windows.window(0)
    assert n_content == N_FRAMES and windows.n_frames is None
    quiet = log_mel(audio[: 16000 * 40])
    assert_near(first, quiet[:, :N_FRAMES])
    assert np.abs(first - whole[:, :N_FRAMES]).max() > 0.1
    second, _ = windows.window(3000)
    assert_near(second, whole[:, 3000:6000])
    assert not windows.ended(6000) and windows.ended(6500) and windows.n_frames == 6500


def test_stream_does_not_depend_on_its_chunks():
    audio = noise(16000 * 50)
    audio[16000 * 31] = 50
    expected, _ = MelWindows(stream(audio)).window(0)
    for chunk in (160, 16000, 10**6):
        np.testing.assert_array_equal(MelWindows(stream(audio, chunk)).window(0)[0], expected)


def test_second_pass_equals_what_is_kept(monkeypatch):
    audio = noise(16000 * 70 + 123)
    monkeypatch.setattr(mel_module, "KEEP_FRAMES", 1000)
    passes = []
    source = AudioSource("counted", True, lambda: passes.append(1) or iter([audio]))
    walk(MelWindows(source), audio, steps=(1700,))
    assert len(passes) == 2
    monkeypatch.setattr(mel_module, "KEEP_FRAMES", 30000)
    walk(MelWindows(source), audio, steps=(1700,))
    assert len(passes) == 3


def test_source_that_changes_between_the_passes(monkeypatch):
    monkeypatch.setattr(mel_module, "KEEP_FRAMES", 0)
    lengths = iter([16000 * 20, 16000 * 10])
    windows = MelWindows(AudioSource("x.wav", True, lambda: iter([noise(next(lengths))])))
    with pytest.raises(FileError, match="x.wav: changed while it was read: expected 20.00 s, got 10.00 s"):
        windows.window(0)


def test_windows_reject():
    windows = MelWindows(noise(16000 * 40))
    windows.window(500)
    with pytest.raises(UsageError, match="seek: expected at least 500"):
        windows.window(499)
    for size in (0, 3001):
        with pytest.raises(UsageError, match="size: expected 1 to 3000 frames"):
            windows.window(500, size)


@pytest.mark.parametrize("reopenable", [True, False])
def test_memory_is_bounded(reopenable, monkeypatch):
    """10 minutes: 38 MB of samples, 19 MB of spectrogram; walked through, and jumped over."""
    monkeypatch.setattr(mel_module, "KEEP_FRAMES", 3000)
    minute = noise(16000 * 60)
    source = AudioSource("long", reopenable, lambda: (second for _ in range(10) for second in np.split(minute, 60)))
    for step in (3000, 59000):
        tracemalloc.start()
        try:
            windows, seek = MelWindows(source), 0
            while not windows.ended(seek):
                windows.window(seek)
                seek += step
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert windows.n_frames == 60000
        assert peak < 8e6, f"{peak / 1e6:.1f} MB"
