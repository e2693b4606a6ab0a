"""audio.py: formats, rates, channels, pipes; chunks against the whole; every kind of bad input."""

import io
import os
import stat
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minigate.audio import SAMPLE_RATE, open_audio, read_audio, resample
from minigate.errors import FileError, UsageError

soundfile = pytest.importorskip("soundfile")
signal = pytest.importorskip("scipy.signal")

SAMPLE = Path(__file__).parent.parent / "weights" / "sample.wav"

PCM_STEP = 1 / 32768
PIECES_TOLERANCE = 1e-7  # of samples within ±1: pieces against the whole
RESAMPLE_TOLERANCE = 2e-6  # float32 against float64


def speech_like(seconds, rate, channels=1, seed=0):
    """-> float32 (f, c) within ±0.5, little of it above a quarter of the rate, channels unlike each other."""
    rng = np.random.default_rng(seed)
    wave = rng.standard_normal((round(seconds * rate), channels))
    wave = signal.lfilter(*signal.butter(4, 0.25), wave, axis=0)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def write(path, wave, rate, **options):
    soundfile.write(path, wave, rate, **options)
    return str(path)


# Formats, rates, channels


LOSSLESS = [("wav", "PCM_16", PCM_STEP), ("wav", "FLOAT", 0), ("flac", None, PCM_STEP)]
LOSSY = [("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS"), ("mp3", "MP3", None)]


@pytest.mark.parametrize(("extension", "subtype", "tolerance"), LOSSLESS)
def test_lossless_formats(tmp_path, extension, subtype, tolerance):
    wave = speech_like(2.3, SAMPLE_RATE)[:, 0]
    audio = read_audio(write(tmp_path / f"a.{extension}", wave, SAMPLE_RATE, subtype=subtype))
    assert audio.dtype == np.float32 and audio.shape == wave.shape
    np.testing.assert_allclose(audio, wave, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("extension", "format", "subtype"), LOSSY)
def test_lossy_formats(tmp_path, extension, format, subtype):
    if format not in soundfile.available_formats():
        pytest.skip(f"libsndfile lacks {extension}")
    wave = read_audio(SAMPLE)[: 16000 * 6]
    audio = read_audio(write(tmp_path / f"a.{extension}", wave, SAMPLE_RATE, format=format, subtype=subtype))
    assert abs(len(audio) - len(wave)) <= 1200  # an mp3 may begin and end with a frame of its own
    n = min(len(audio), len(wave))
    match = signal.correlate(audio[:n], wave[:n])
    assert match.max() > 0.97 * np.linalg.norm(audio[:n]) * np.linalg.norm(wave[:n])
    assert abs(int(match.argmax()) - (n - 1)) <= 1200


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_pieces_equal_the_whole(tmp_path, rate, channels):
    wave = speech_like(5.37, rate, channels)
    path = write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    mono = wave.astype(np.float64).mean(axis=1)
    audio = read_audio(path)
    assert len(audio) == -(-len(wave) * SAMPLE_RATE // rate)
    np.testing.assert_allclose(audio, signal.resample_poly(mono, SAMPLE_RATE, rate), atol=RESAMPLE_TOLERANCE, rtol=0)
    chunks = list(open_audio(path).chunks())
    assert len(chunks) > 1 or rate == SAMPLE_RATE and channels == 1
    np.testing.assert_array_equal(np.concatenate(chunks), audio)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 44101])
@pytest.mark.parametrize("chunk", [100, 4410, 10**7])
def test_resampling_does_not_depend_on_the_chunks(monkeypatch, rate, chunk):
    wave = speech_like(4.5, rate)[:, 0]
    pieces = np.concatenate(list(resample((wave[i : i + chunk] for i in range(0, len(wave), chunk)), rate)))
    monkeypatch.setattr("minigate.audio.PIECE_S", 1000)
    (whole,) = resample([wave], rate)
    assert pieces.shape == whole.shape and pieces.dtype == np.float32
    np.testing.assert_allclose(pieces, whole, atol=PIECES_TOLERANCE, rtol=0)


@pytest.mark.parametrize("rate", [8000, 44100, 96000])
def test_resampling_keeps_a_tone_and_drops_what_aliases(rate):
    t = np.arange(rate * 3) / rate
    audio = np.concatenate(list(resample([np.sin(2 * np.pi * 440 * t).astype(np.float32)], rate)))
    expected = np.sin(2 * np.pi * 440 * np.arange(len(audio)) / SAMPLE_RATE)
    np.testing.assert_allclose(audio[200:-200], expected[200:-200], atol=5e-3)
    if rate > 2 * 12000:
        (audio,) = resample([np.sin(2 * np.pi * 12000 * t[:rate]).astype(np.float32)], rate)
        assert np.abs(audio[200:-200]).max() < 0.01


def test_chunks_can_be_read_again_and_memory_is_bounded(tmp_path):
    wave = speech_like(3, 44100, 2)
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 44100, 2) as file:
        for _ in range(40):
            file.write(wave)
    source = open_audio(tmp_path / "a.flac")  # 2 minutes: 42 MB decoded, 7.7 MB at 16 kHz mono
    assert source.reopenable and source.name == str(tmp_path / "a.flac")
    next(source.chunks())  # imports scipy
    tracemalloc.start()
    try:
        total = sum(len(chunk) for chunk in source.chunks())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 120 * SAMPLE_RATE
    assert peak < 4e6, f"{peak / 1e6:.1f} MB"


# Arrays and pipes


def test_arrays():
    audio = speech_like(31, SAMPLE_RATE)[:, 0]
    for array in (audio, audio.astype(np.float64), audio.astype(">f4"), np.repeat(audio, 2)[::2]):
        result = read_audio(array)
        assert result.dtype == np.float32 and result.dtype.isnative
        np.testing.assert_array_equal(result, audio)
    np.testing.assert_array_equal(read_audio(np.array([-32768, 0, 16384], np.int16)), np.float32([-1, 0, 0.5]))
    source = open_audio(audio)
    assert source.reopenable and open_audio(source) is source and len(list(source.chunks())) == 2


@pytest.mark.parametrize(("audio", "got"), [
    (np.zeros((2, 9), np.float32), r"float32 \(2, 9\)"), (np.array(1, np.float32), r"float32 \(\)"),
    (np.zeros(9, np.int32), r"int32 \(9,\)"), ([0.0, 0.1], "list"), (None, "NoneType"), (b"a.wav", "bytes"),
])  # fmt: skip
def test_arguments_of_the_wrong_kind(audio, got):
    with pytest.raises(UsageError, match=f"^audio: expected .*float32.*, got {got}"):
        open_audio(audio)


def standard_input(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return open_audio("-")


def test_standard_input(monkeypatch):
    pcm = np.random.default_rng(0).integers(-32768, 32768, 70001).astype("<i2")
    source = standard_input(monkeypatch, pcm.tobytes())
    assert not source.reopenable and source.name == "standard input"
    chunks = list(source.chunks())
    assert len(chunks) == 5
    np.testing.assert_array_equal(np.concatenate(chunks), pcm / np.float32(32768))


@pytest.mark.parametrize(("data", "message"), [
    (b"", "expected a recording, got 0 samples"),
    (bytes(40001), "expected 16-bit samples, two bytes each, got 40001 bytes"),
    (b"RIFF" + bytes(4000), "expected raw 16-bit little-endian PCM at 16 kHz, mono, got a sound file .*ffmpeg -i"),
    (bytes(4) + b"ftypM4A " + bytes(4000), "expected raw 16-bit .*ftyp"),
])  # fmt: skip
def test_standard_input_that_is_not_pcm(monkeypatch, data, message):
    with pytest.raises(FileError, match=f"^standard input: {message}"):
        read_audio(standard_input(monkeypatch, data))


def test_standard_input_that_is_closed_or_write_only(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FileError, match="^standard input: expected raw PCM, got a closed stream$"):
        read_audio("-")
    with open(tmp_path / "a", "w") as file:
        monkeypatch.setattr(sys, "stdin", file)
        with pytest.raises(FileError, match="^standard input: expected raw PCM, got: "):
            read_audio("-")


def fake_ffmpeg(folder, monkeypatch, body):
    """An `ffmpeg` of a few lines of Python, alone on the PATH."""
    script = folder / "bin" / "ffmpeg"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport os, sys, time\n{textwrap.dedent(body)}")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent))


@pytest.fixture
def m4a(tmp_path):
    path = tmp_path / "a:b.m4a"
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(500))
    return str(path)


def test_other_containers_without_ffmpeg(m4a, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileError, match=r"a:b.m4a: expected a sound file .*Format not recognised.*install ffmpeg"):
        read_audio(m4a)


def test_other_containers_through_ffmpeg(tmp_path, m4a, monkeypatch):
    fake_ffmpeg(tmp_path, monkeypatch, """
        words = " ".join(sys.argv[1:])
        assert "-f s16le -ac 1 -ar 16000 -" in words and f"-i file:" in words and "-nostdin" in words, words
        assert os.path.exists(sys.argv[sys.argv.index("-i") + 1].removeprefix("file:"))
        sys.stdout.buffer.write(bytes([0, 64]) * 50000)
        """)
    np.testing.assert_array_equal(read_audio(m4a), np.full(50000, 0.5, np.float32))


def test_ffmpeg_that_fails(tmp_path, m4a, monkeypatch):
    fake_ffmpeg(tmp_path, monkeypatch, "print('first line', file=sys.stderr); sys.exit('moov atom not found')")
    with pytest.raises(FileError, match=r"a:b.m4a: .*libsndfile and ffmpeg reject \(moov atom not found\)$"):
        read_audio(m4a)


def test_ffmpeg_does_not_outlive_its_reader(tmp_path, m4a, monkeypatch):
    pid_file = tmp_path / "pid"
    fake_ffmpeg(
        tmp_path,
        monkeypatch,
        f"""
        open({str(pid_file)!r}, "w").write(str(os.getpid()))
        sys.stdout.buffer.write(bytes(64000))
        sys.stdout.flush()
        time.sleep(60)
        """,
    )
    chunks = open_audio(m4a).chunks()
    next(chunks)
    began = time.monotonic()
    chunks.close()
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


# Bad files


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(FileError, match="none.wav: expected a sound file, got: No such file or directory"):
        open_audio(tmp_path / "none.wav")
    with pytest.raises(FileError, match="expected a sound file, got a folder"):
        open_audio(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="expected a regular file, got a pipe or device; '-' takes raw"):
        open_audio(tmp_path / "pipe")
    (tmp_path / "zero.wav").touch()
    with pytest.raises(FileError, match=r"expected a sound file, got an empty file \(0 bytes\)"):
        open_audio(tmp_path / "zero.wav")


def test_unreadable_file(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(FileError, match="expected a readable file, got: Permission denied"):
        read_audio(path)


@pytest.mark.parametrize("name", ["text.wav", "text.mp3", "text.raw", "text"])
def test_text_is_no_sound(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PATH", "")
    (tmp_path / name).write_text("This is no sound.\n" * 100)
    with pytest.raises(FileError) as caught:
        read_audio(tmp_path / name)
    assert f"{name}: expected a sound file (wav, flac, ogg, opus, mp3), got one that libsndfile" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recording_without_samples(tmp_path):
    path = write(tmp_path / "a.wav", np.zeros((0, 2), np.float32), 44100)
    with pytest.raises(FileError, match="a.wav: expected a recording, got 0 samples"):
        read_audio(path)
    with pytest.raises(FileError, match="audio: expected a recording, got 0 samples"):
        read_audio(np.zeros(0, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
def test_samples_that_are_not_finite(tmp_path, bad):
    wave = speech_like(4, 44100, 2)
    wave[150000, 1] = bad
    path = write(tmp_path / "a.wav", wave, 44100, subtype="FLOAT")
    with pytest.raises(FileError, match=r"a.wav: expected finite samples, got \S+ at sample 150000 \(3.401 s\)$"):
        read_audio(path)
    audio = np.zeros(600000)
    audio[500001] = bad
    with pytest.raises(FileError, match=r"^audio: expected finite samples, got \S+ at sample 500001 \(31.250 s\)$"):
        read_audio(audio)


def test_float64_beyond_float32():
    with pytest.raises(FileError, match="expected finite samples, got inf at sample 1 "):
        read_audio(np.array([0, 1e300]))


@pytest.mark.parametrize("rate", [1, 7, 999, 768001, 767999, 100001])
def test_rate_that_no_recording_has(tmp_path, rate):
    """The last two need a filter of millions of taps: seconds and hundreds of megabytes for a short recording."""
    data = bytearray(Path(write(tmp_path / "a.wav", np.zeros(100, np.float32), 16000)).read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    expected = "a.wav: expected a sample rate (of 1000 to 768000 Hz|in a ratio to 16000 Hz .*)"
    with pytest.raises(FileError, match=f"{expected}, got {rate}( Hz|$)"):
        read_audio(tmp_path / "a.wav")


# Files that are cut off, joined, or written to a pipe


def test_wav_cut_off(tmp_path):
    wave = speech_like(3, SAMPLE_RATE)[:, 0]
    path = Path(write(tmp_path / "a.wav", wave, SAMPLE_RATE, subtype="FLOAT"))
    path.write_bytes(path.read_bytes()[:100001])
    audio = read_audio(path)
    assert 24900 < len(audio) < 25000
    np.testing.assert_array_equal(audio, wave[: len(audio)])


def test_flac_cut_off_gives_what_is_there_and_a_warning(tmp_path):
    wave = speech_like(20, SAMPLE_RATE)[:, 0]
    path = Path(write(tmp_path / "a.flac", wave, SAMPLE_RATE))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"a.flac: cut off or damaged: \d+\.\d\d of 20.00 s could be read"):
        audio = read_audio(path)
    assert 9.2 * SAMPLE_RATE < len(audio) < 10.5 * SAMPLE_RATE  # the last frame before the cut, 4096 samples, counts
    np.testing.assert_allclose(audio, wave[: len(audio)], atol=PCM_STEP)
    path.write_bytes(data[:100])
    with pytest.raises(FileError, match="a.flac: expected a sound file, got a damaged one"):
        read_audio(path)


@pytest.mark.filterwarnings("error")
def test_flac_whose_header_does_not_know_its_length(tmp_path):
    wave = speech_like(5.1, SAMPLE_RATE)[:, 0]
    path = Path(write(tmp_path / "a.flac", wave, SAMPLE_RATE))
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO: 36 bits of total samples, 0 is unknown, as encoders write to a pipe
    data[22:26] = bytes(4)
    path.write_bytes(data)
    np.testing.assert_allclose(read_audio(path), wave, atol=PCM_STEP)


def test_wav_whose_header_does_not_know_its_length(tmp_path):
    wave = speech_like(2, SAMPLE_RATE)[:, 0]
    path = Path(write(tmp_path / "a.wav", wave, SAMPLE_RATE))
    data = path.read_bytes()
    at = data.index(b"data") + 4
    path.write_bytes(data[:4] + b"\xff" * 4 + data[8:at] + b"\xff" * 4 + data[at + 4 :])
    np.testing.assert_allclose(read_audio(path), wave, atol=PCM_STEP)


@pytest.mark.skipif("MP3" not in soundfile.available_formats(), reason="libsndfile lacks mp3")
@pytest.mark.parametrize("rate", [16000, 44100])
def test_mp3_joined_tagged_and_without_header(tmp_path, rate):
    """The first header of a joined mp3 counts the first part; one without a header is guessed from its first frame."""
    quiet, loud = 0.01 * speech_like(6, rate, seed=1), speech_like(14, rate, seed=2)
    data = Path(write(tmp_path / "a.mp3", np.concatenate([quiet, loud])[:, 0], rate, format="MP3")).read_bytes()
    once = read_audio(tmp_path / "a.mp3")
    (tmp_path / "tag.mp3").write_bytes(data + b"TAG" + bytes(125))
    np.testing.assert_array_equal(read_audio(tmp_path / "tag.mp3"), once)
    (tmp_path / "joined.mp3").write_bytes(data + data)
    joined = read_audio(tmp_path / "joined.mp3")
    assert abs(len(joined) - 2 * len(once)) < 2000
    rms = [np.sqrt(np.mean(joined[i * 16000 : (i + 1) * 16000] ** 2)) for i in (2, 8, 22, 28)]
    assert rms[0] < 0.1 * rms[1] and rms[2] < 0.1 * rms[3]
    bare = data[data.index(data[:2], 4) :]
    assert b"Xing" not in bare and b"Info" not in bare
    (tmp_path / "bare.mp3").write_bytes(bare)
    assert abs(len(read_audio(tmp_path / "bare.mp3")) - len(once)) < 5000


def test_ogg_joined_warns(tmp_path):
    data = Path(write(tmp_path / "a.ogg", speech_like(20, SAMPLE_RATE)[:, 0], SAMPLE_RATE)).read_bytes()
    (tmp_path / "a.ogg").write_bytes(data + data)
    with pytest.warns(UserWarning, match="read the first of several joined streams only"):
        assert len(read_audio(tmp_path / "a.ogg")) == 20 * SAMPLE_RATE


# What is missing


def test_without_soundfile_and_scipy(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", speech_like(1, 8000), 8000)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(FileError, match="a.wav: at 8000 Hz, to resample it scipy is needed .*pip install scipy"):
        read_audio(path)
    assert len(read_audio(SAMPLE)) == 303200  # 16 kHz needs none
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(FileError, match="a.wav: to read it, soundfile is needed .*pip install soundfile"):
        read_audio(path)
    assert len(read_audio(np.zeros(1000, np.float32))) == 1000
