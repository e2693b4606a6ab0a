"""Sound files are told from raw PCM by their first bytes, PCM of any kind is not taken for one."""

import io

import numpy as np
import pytest

from minigate.signatures import is_sound_file


def frames(header: bytes, length: int, n: int = 4) -> bytes:
    return (header + bytes(length - len(header))) * n


@pytest.mark.parametrize("format", ["WAV", "RF64", "W64", "AIFF", "CAF", "AU", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_what_libsndfile_writes(format, rate):
    soundfile = pytest.importorskip("soundfile")
    if format not in soundfile.available_formats():
        pytest.skip(f"libsndfile lacks {format}")
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, rate)
    soundfile.write(file, noise, rate, format=format, subtype=soundfile.default_subtype(format))
    assert is_sound_file(file.getvalue()[:32000])


@pytest.mark.parametrize("data", [
    b"\0\0\0\x20ftypM4A " + bytes(500), b"\x1a\x45\xdf\xa3" + bytes(500), b"ID3\x02" + bytes(50),
    b"0&\xb2u\x8ef\xcf\x11" + bytes(50), b"wvpk" + bytes(50),
    frames(b"\xff\xfb\x90\x00", 417),  # MPEG-1 layer III, 128 kbit/s, 44100 Hz: 144 * 128000 / 44100
    frames(b"\xff\xfb\x90\x00", 417, 1) + frames(b"\xff\xfb\x92\x00", 418),  # with padding
    frames(b"\xff\xf3\x40\x00", 104),  # MPEG-2 layer III, 32 kbit/s, 22050 Hz: 72 * 32000 / 22050 = 104
    frames(b"\xff\xe3\x18\x00", 72),  # MPEG-2.5 layer III, 8 kbit/s, 8000 Hz: 72
    frames(b"\xff\xfd\xc4\x00", 768),  # MPEG-1 layer II, 256 kbit/s, 48000 Hz
    frames(b"\xff\xff\x84\x00", 256),  # MPEG-1 layer I, 256 kbit/s, 48000 Hz: 12 * 256000 / 48000 * 4
    frames(b"\xff\xf1\x50\x80\x20\x1f\xfc", 256),  # AAC in ADTS
])  # fmt: skip
def test_compressed(data):
    assert is_sound_file(data)


@pytest.mark.parametrize("data", [
    b"", b"\xff", b"\xff\xfb\x90\x00", bytes(32000), b"\xff" * 32000, b"\xff\xfb" * 16000, b"\xff\xf1" * 16000,
    frames(b"\xff\xfb\x90\x00", 417, 2) + bytes(3000),  # two frames are no stream
    frames(b"\xff\xfb\x90\x00", 417, 2) + frames(b"\xff\xfb\x94\x00", 417),  # of another rate
    frames(b"\xff\xfb\xf0\x00", 417), frames(b"\xff\xfb\x9c\x00", 417), frames(b"\xff\xeb\x90\x00", 417),  # reserved
    frames(b"\xff\xf1\x50\x80\x00\x1f\xfc", 7, 1) + bytes(3000),
])  # fmt: skip
def test_not_a_sound_file(data):
    assert not is_sound_file(data)


def test_pcm_is_never_taken_for_a_file():
    """Quiet sound is full of FF bytes: samples just below 0."""
    rng = np.random.default_rng(0)
    for scale in (1, 3, 30, 300, 3000, 30000):
        for _ in range(200):
            pcm = np.clip(rng.normal(-scale / 2, scale, 4000), -32768, 32767).astype("<i2")
            pcm[0] = -1 - (int(rng.integers(0, 0x20)) << 8)  # FF, then E0 to FF
            assert not is_sound_file(pcm.tobytes())
    tone = (3000 * np.sin(2 * np.pi * np.arange(16000) / 208.5)).astype("<i2")
    assert not any(is_sound_file(tone[i:].tobytes()) for i in range(8000))
