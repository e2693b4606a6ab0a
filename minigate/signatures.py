"""The first bytes of a stream -> whether they are those of a sound file rather than raw 16-bit PCM.

Raw PCM may hold any bytes, so what is taken for a file is what noise shows once in some 2^32 streams: four fixed bytes,
or three frames of compressed sound of one kind, each exactly where the one before ends.
"""

STARTS = (
    b"RIFF", b"RF64", b"riff\x2e\x91\xcf\x11", b"FORM", b"caff", b".snd",  # wav, its long forms, aiff, caf, au
    b"fLaC", b"OggS", b"ID3\x02", b"ID3\x03", b"ID3\x04",  # flac; ogg and opus; the tag before an mp3
    b"\x1a\x45\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"wvpk",  # webm and mkv, wma, wavpack
)  # fmt: skip
MP4_BRAND = b"ftyp"  # at byte 4: m4a, mp4, mov
FRAMES = 3  # in a row

# ISO 11172-3 and 13818-3, kbit/s by the header's index, from 1 on; (MPEG-1?, layer)
BIT_RATES = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MPEG1_RATES = (44100, 48000, 32000)  # Hz; MPEG-2 half and MPEG-2.5 a quarter of it
RATE_DIVISORS = {3: 1, 2: 2, 0: 4}  # by the header's version; 1 is reserved


def is_sound_file(data: bytes) -> bool:
    """data: what a stream begins with, some thousand bytes to see several frames of an mp3 without a tag."""
    return data.startswith(STARTS) or data[4:8] == MP4_BRAND or _has_frames(data)


def _has_frames(data: bytes) -> bool:
    """Whether data begins with frames of MPEG audio or AAC (ADTS), all of the same kind."""
    at, kinds = 0, set()
    for _ in range(FRAMES):
        frame = _frame(data[at : at + 6])
        if frame is None:
            return False
        length, kind = frame
        kinds.add(kind)
        at += length
    return len(kinds) == 1


def _frame(header: bytes) -> tuple[int, tuple] | None:
    """Six bytes -> the frame's length in bytes and what all frames of a stream share; None: not a frame."""
    if len(header) < 6 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # layer 4: reserved, ADTS uses it
    if layer == 4:
        return _adts_frame(header)
    bit_rate, rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or bit_rate in (0, 15) or rate == 3:
        return None
    bits_per_s = 1000 * BIT_RATES[version == 3, layer][bit_rate - 1]
    rate_hz = MPEG1_RATES[rate] // RATE_DIVISORS[version]
    if layer == 1:
        return (12 * bits_per_s // rate_hz + padding) * 4, (version, layer, rate)
    samples = 576 if layer == 3 and version != 3 else 1152
    return samples // 8 * bits_per_s // rate_hz + padding, (version, layer, rate)


def _adts_frame(header: bytes) -> tuple[int, tuple] | None:
    """As _frame, of ISO 13818-7: sync 0xFFF, then the profile, the rate's index and a length of 13 bits."""
    length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    rate = header[2] >> 2 & 15
    if header[1] & 0xF0 != 0xF0 or rate > 12 or length < 7:
        return None
    return length, (header[1], header[2])
