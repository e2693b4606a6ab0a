"""Tokenizer against golden/tokenizer.json (tiktoken and openai/whisper), a plain merge loop, and bad input."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from minigate.errors import FileError, UsageError
from minigate.official import official_vocabulary
from minigate.tokenizer import Tokenizer, merge_bytes, pack_vocabulary, split_pieces, unpack_vocabulary

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))
ENGLISH, MULTILINGUAL = 1, 2  # columns of GOLDEN["cases"]
BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    return Tokenizer(official_vocabulary(51864), 51864)


@pytest.fixture(scope="module")
def multilingual() -> Tokenizer:
    return Tokenizer(official_vocabulary(51865), 51865)


@pytest.fixture(scope="module")
def multilingual_100() -> Tokenizer:
    return Tokenizer(official_vocabulary(51866), 51866)


# --- the packed vocabulary


def test_vocabulary_is_packed_with_length_bytes():
    tokens = [b"a", b"", b"xyz", bytes(range(255))]
    packed = pack_vocabulary(tokens)
    assert packed.dtype == np.uint8 and packed[:7].tolist() == [1, 97, 0, 3, 120, 121, 122]
    assert unpack_vocabulary(packed) == tokens
    assert unpack_vocabulary(pack_vocabulary([])) == []


def test_a_token_that_a_length_byte_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="at most 255 bytes a token, got 256 in token 1"):
        pack_vocabulary([b"a", bytes(256)])


@pytest.mark.parametrize("packed", [np.array([2, 97], np.uint8), np.array([1, 97, 1], np.uint8)])
def test_a_vocabulary_that_ends_within_a_token_is_refused(packed):
    with pytest.raises(FileError, match="vocabulary: expected .* up to the end of the last token"):
        unpack_vocabulary(packed)


@pytest.mark.parametrize("packed", [np.array([1, 97], np.int16), np.array([[1, 97]], np.uint8)])
def test_a_vocabulary_of_wrong_dtype_or_shape_is_refused(packed):
    with pytest.raises(FileError, match=r"vocabulary: expected uint8 \(n,\), got"):
        unpack_vocabulary(packed)


# --- encoding and decoding


@pytest.mark.parametrize("name, column", [("english", ENGLISH), ("multilingual", MULTILINGUAL)])
def test_ids_equal_tiktoken(name, column, request):
    tokenizer = request.getfixturevalue(name)
    different = [case[0] for case in GOLDEN["cases"] if tokenizer.encode(case[0]) != case[column]]
    assert len(GOLDEN["cases"]) > 300 and different == []


@pytest.mark.parametrize("name", ["english", "multilingual"])
def test_any_text_comes_back(name, request):
    tokenizer, rng = request.getfixturevalue(name), random.Random(0)
    for _ in range(300):
        points = [rng.randrange(rng.choice([0x80, 0x800, 0xD800, 0x110000])) for _ in range(rng.randrange(40))]
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode_with_timestamps(ids) == text


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("don't I'll x's", ["don", "'t", " I", "'ll", " x", "'s"]),
        ("DON'T 'S", ["DON", "'", "T", " '", "S"]),
        ("a  b   ", ["a", " ", " b", "   "]),
        ("a\n\n b\t.", ["a", "\n\n", " b", "\t", "."]),
        ("x1²½ ٣a", ["x", "1²½", " ٣", "a"]),
        ("1一a", ["1", "一a"]),  # a letter, though Python calls it numeric
        ("a\x1c\x1c b", ["a", "\x1c\x1c", " b"]),  # no white space, though Python's isspace() says so
        ("a\x85\u2028\u3000b", ["a", "\x85\u2028", "\u3000", "b"]),
        ("e\u0301!", ["e", "\u0301!"]),
    ],
)
def test_pieces(text, pieces):
    assert [piece.decode() for piece in split_pieces(text)] == pieces


def test_white_space_is_unicodes():
    """Two equal characters between letters: one piece, but two when they are white space."""
    found = {point for point in range(0x21, 0x3100) if len(split_pieces(f"a{chr(point) * 2}b")) == 4}
    assert found == {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def plain_merge(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as it is defined: again and again the leftmost pair of lowest rank."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_merging_equals_the_plain_loop():
    rng = random.Random(0)
    for _ in range(60):
        tokens = {bytes(rng.choices(b"abc", k=rng.randint(2, 5))): None for _ in range(rng.randint(1, 60))}
        ranks = {token: rank for rank, token in enumerate([*BYTES, *tokens])}
        for _ in range(20):
            piece = bytes(rng.choices(b"abc", k=rng.randint(1, 40)))
            assert merge_bytes(piece, ranks) == plain_merge(piece, ranks)


def test_a_piece_that_is_a_token_needs_no_merges():
    assert Tokenizer([*BYTES, b"abc"], 257 + 1608).encode("abc abcd") == [256, 32, *b"abcd"]


def test_a_long_piece_does_not_take_quadratic_time(english):
    english.encode("x")
    start = time.perf_counter()
    ids = english.encode("ab" * 20_000)  # a quarter of a second; minutes by the plain loop
    assert time.perf_counter() - start < 5
    assert english.decode(ids) == "ab" * 20_000


def test_lone_surrogates_count_as_replacement_characters(english):
    assert english.encode("a\udc80b\ud800") == english.encode("a\ufffdb\ufffd")
    assert english.encode("\ud83d\ude00") == english.encode("\U0001f600")
    assert english.decode(english.encode("\ufeffa")) == "\ufeffa"


def test_special_tokens_in_a_text_are_text(english):
    assert max(english.encode("<|endoftext|><|0.00|>")) < english.eot


def test_decode_leaves_out_special_tokens_and_timestamps(multilingual):
    t = multilingual
    ids = [*t.sot_sequence("en"), t.timestamp_begin, *t.encode(" Hello"), t.timestamp_begin + 54, t.eot]
    assert t.decode(ids) == " Hello"
    written_out = "<|startoftranscript|><|en|><|transcribe|><|0.00|> Hello<|1.08|><|endoftext|>"
    assert t.decode_with_timestamps(ids) == written_out
    assert t.decode_with_timestamps([t.n_vocab - 1]) == "<|30.00|>"
    assert t.decode(np.array(t.encode(" Hello"))) == " Hello"


def test_part_of_a_character_decodes_to_a_replacement_character(english):
    assert english.decode([english.ranks[b"\xe6"], english.ranks[b"A"]]) == "\ufffdA"


@pytest.mark.parametrize("wrong", [-1, 51864])
def test_an_id_out_of_range_is_refused(english, wrong):
    for decode in (english.decode, english.decode_with_timestamps):
        with pytest.raises(ValueError, match=f"ids: expected 0 … 51863, got {wrong}"):
            decode([5, wrong])


def test_only_text_is_encoded(english):
    with pytest.raises(UsageError, match="text: expected str, got bytes"):
        english.encode(b"a")


# --- special tokens


@pytest.mark.parametrize("name, n_vocab", [("english", 51864), ("multilingual", 51865), ("multilingual_100", 51866)])
def test_special_tokens_equal_whisper(name, n_vocab, request):
    tokenizer = request.getfixturevalue(name)
    expected = dict(GOLDEN["specials"][str(n_vocab)])
    assert " ".join(tokenizer.all_language_codes) == expected.pop("all_language_codes")
    assert list(tokenizer.non_speech_tokens) == expected.pop("non_speech_tokens")
    assert {key: getattr(tokenizer, key) for key in expected} == expected
    assert tokenizer.timestamp_begin + 1501 == tokenizer.n_vocab == n_vocab
    assert tokenizer.all_language_tokens == tuple(range(tokenizer.sot + 1, tokenizer.translate))
    assert tokenizer.is_multilingual == (name != "english")


def test_sot_sequence(english, multilingual, multilingual_100):
    assert multilingual.sot_sequence("en") == [50258, 50259, 50359]
    assert multilingual.sot_sequence("German", "translate", timestamps=False) == [50258, 50261, 50358, 50363]
    assert multilingual_100.sot_sequence("yue") == [50258, 50358, 50360]
    assert english.sot_sequence() == english.sot_sequence("English") == [50257]
    assert english.sot_sequence(timestamps=False) == [50257, 50362]


def test_language_token(multilingual, multilingual_100):
    assert multilingual.language_token("Mandarin") == 50260
    assert multilingual_100.language_token("cantonese") == 50358
    for language in ("yue", "cantonese", None, "xx"):
        with pytest.raises(UsageError, match="language: expected one of en zh .* su or its English name, got"):
            multilingual.language_token(language)


def test_what_a_model_cannot_do_is_refused(english, multilingual):
    with pytest.raises(UsageError, match="language: expected en, since the model is English-only, got 'de'"):
        english.sot_sequence("de")
    with pytest.raises(UsageError, match="language: expected one of"):
        english.sot_sequence("nonsense")
    with pytest.raises(UsageError, match="task: expected transcribe, since the model is English-only, got 'translate'"):
        english.sot_sequence(task="translate")
    with pytest.raises(UsageError, match="task: expected one of transcribe translate, got 'sing'"):
        multilingual.sot_sequence("en", "sing")
    with pytest.raises(UsageError, match="language: expected one of .* got None"):
        multilingual.sot_sequence()


def test_a_toy_vocabulary():
    tokenizer = Tokenizer([*BYTES, b"ab"], 257 + 1608)
    assert tokenizer.encode("abé") == [256, 0xC3, 0xA9] and tokenizer.eot == 257
    assert not tokenizer.is_multilingual


@pytest.mark.parametrize(
    "vocabulary, n_vocab, message",
    [
        (BYTES, 51864, "vocabulary: expected 50256 tokens for n_vocab 51864, got 256"),
        (BYTES * 197, 51865, "vocabulary: expected 50257 tokens for n_vocab 51865, got 50432"),
        (BYTES, 51867, "n_vocab: expected 51864, 51865 or 51866, got 51867"),
        (BYTES[1:] + [b"ab"], 256 + 1608, "vocabulary: expected the 256 single bytes as its first tokens"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(vocabulary, n_vocab, message):
    with pytest.raises(FileError, match=message):
        Tokenizer(vocabulary, n_vocab)
