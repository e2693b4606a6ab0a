"""Text <-> token ids: GPT-2's byte-level byte-pair encoding with Whisper's special tokens behind it.

A vocabulary is a list of byte strings in rank order: the id of an ordinary token is its place in the list. Behind it
come, without gap: eot, sot, one token per language, translate, transcribe, sot_lm, sot_prev, no_speech,
no_timestamps, and 1501 timestamps from 0.00 to 30.00 s.

Encoding cuts a text into pieces by GPT-2's pattern, then merges within each piece's UTF-8 bytes, always the neighbours
whose union has the lowest rank. Ids are equal to tiktoken's, except where Unicode's categories themselves differ:
\\p{L} and \\p{N} are this Python's (3.10 has Unicode 13, 3.11 14, 3.12 15.0, 3.13 15.1), so that a letter that is
newer than Python is cut like a symbol. Decoding does not depend on it.
"""

import heapq
import re
import unicodedata
from functools import cached_property

import numpy as np

from minigate.errors import FileError, UsageError
from minigate.languages import LANGUAGES, language_code

N_TIMESTAMPS = 1501  # 0.00 to 30.00 s in steps of
TIMESTAMP_STEP_S = 0.02
N_FIXED = 8  # special tokens that are neither language nor timestamp
TASKS = ("transcribe", "translate")

# Whisper's marks of sound that is not speech. A mark is suppressed when it is one token; a note sign also when it is
# several, by its first: all note signs are in U+2640 … U+267F, whose UTF-8 shares two bytes.
MARKS = [
    *"\"#()*+/:;<=>@[\\]^_`{|}~「」『』",
    *"<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split(),
]  # fmt: skip
NOTE_SIGNS = "♩♪♫♬♭♮♯"

# GPT-2's pattern, 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, on a text whose
# characters are replaced by their class (see CharacterClasses): one character each, so the places stay the same.
LETTER, DIGIT, SPACE, OTHER = "A0\t."
PIECES = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[Astrevmld]+| ?0+| ?[.']+|[ \t]+(?![^ \t])|[ \t]+",
)
# \s in tiktoken is Unicode's White_Space; Python's str.isspace() would add U+001C … U+001F.
WHITE_SPACE = {*range(0x09, 0x0E), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


class CharacterClasses(dict):
    """Code point -> class for str.translate, filled as characters turn up.

    The blank, the apostrophe and the letters of 's 't 're 've 'm 'll 'd stand for themselves.
    """

    def __init__(self):
        super().__init__({ord(character): character for character in " 'strevmld"})
        self.update(dict.fromkeys(WHITE_SPACE, SPACE))

    def __missing__(self, code_point: int) -> str:
        category = unicodedata.category(chr(code_point))
        self[code_point] = {"L": LETTER, "N": DIGIT}.get(category[0], OTHER)
        return self[code_point]


CLASSES = CharacterClasses()


def pack_vocabulary(vocabulary: list[bytes]) -> np.ndarray:
    """Tokens in rank order -> uint8 (n,): for each token one length byte, then its bytes, as the model file stores it.

    Raises ValueError for a token that is longer than a length byte can say. An empty token is allowed: the
    multilingual vocabulary has one.
    """
    packed = bytearray()
    for rank, token in enumerate(vocabulary):
        if len(token) > 255:
            raise ValueError(f"vocabulary: expected at most 255 bytes a token, got {len(token)} in token {rank}")
        packed.append(len(token))
        packed += token
    return np.frombuffer(bytes(packed), dtype=np.uint8)


def unpack_vocabulary(packed: np.ndarray) -> list[bytes]:
    """uint8 (n,) as pack_vocabulary makes it -> tokens in rank order.

    Raises FileError when dtype or shape are wrong or the last token is cut short.
    """
    packed = np.asarray(packed)
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise FileError(f"vocabulary: expected uint8 (n,), got {packed.dtype} {packed.shape}")
    data = packed.tobytes()
    vocabulary = []
    start, size = 0, len(data)
    while start < size:
        end = start + 1 + data[start]
        vocabulary.append(data[start + 1 : end])
        start = end
    if start != size:
        raise FileError(f"vocabulary: expected {start} bytes up to the end of the last token, got {size}")
    return vocabulary


def split_pieces(text: str) -> list[bytes]:
    """Text without lone surrogates -> the UTF-8 bytes of its pieces, within which byte pairs are merged."""
    classes = text.translate(CLASSES)
    return [text[match.start() : match.end()].encode() for match in PIECES.finditer(classes)]


def merge_bytes(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The ids of a piece that is no token itself. O(n log n) in its n bytes.

    A part is known by the place where it begins; `ends[start]` is where it ends. Parts live in a heap of candidate
    pairs (rank of the union, start, end), of which those that a merge has made obsolete are passed over. Equal ranks
    merge from left to right.
    """
    size = len(piece)
    ends = [*range(1, size + 1), 0]  # ends[size] = 0: nothing begins there
    before = list(range(-1, size))  # start of the part to the left
    pairs = [(ranks[piece[i : i + 2]], i, i + 2) for i in range(size - 1) if piece[i : i + 2] in ranks]
    heapq.heapify(pairs)
    while pairs:
        _, start, end = heapq.heappop(pairs)
        middle = ends[start]
        if ends[middle] != end:
            continue
        ends[start], ends[middle] = end, size  # the swallowed part ends where nothing begins: no pair fits it again
        before[end] = start
        left, right = before[start], ends[end]
        for first, last in ((left, end), (start, right)):
            rank = ranks.get(piece[first:last]) if first >= 0 and last else None
            if rank is not None:
                heapq.heappush(pairs, (rank, first, last))
    ids, start = [], 0
    while start < size:
        ids.append(ranks[piece[start : ends[start]]])
        start = ends[start]
    return ids


class Tokenizer:
    """Whisper's tokens for one model.

    vocabulary: ordinary tokens in rank order (English-only 50256, multilingual 50257), the first 256 single bytes.
    n_vocab: all tokens, as in the model's dims; 51864 English-only, 51865 and 51866 multilingual with 99 and 100
    languages. A smaller n_vocab, len(vocabulary) + 1608, makes an English-only tokenizer for toy models.
    Raises FileError when the two do not fit each other.
    """

    def __init__(self, vocabulary: list[bytes], n_vocab: int):
        self.n_vocab = int(n_vocab)
        self.is_multilingual = self.n_vocab >= 51865
        self.num_languages = self.n_vocab - 51765 - self.is_multilingual if self.n_vocab >= 51864 else 99
        size = self.n_vocab - self.num_languages - N_FIXED - N_TIMESTAMPS
        if self.num_languages > len(LANGUAGES):
            raise FileError(f"n_vocab: expected 51864, 51865 or 51866, got {n_vocab}")
        if len(vocabulary) != size:
            raise FileError(f"vocabulary: expected {size} tokens for n_vocab {n_vocab}, got {len(vocabulary)}")
        if len({token for token in vocabulary[:256] if len(token) == 1}) != 256:
            raise FileError("vocabulary: expected the 256 single bytes as its first tokens, got others")
        self.vocabulary = vocabulary
        self.eot = size
        self.sot = self.eot + 1
        self.translate = self.sot + 1 + self.num_languages
        self.transcribe = self.translate + 1
        self.sot_lm = self.translate + 2
        self.sot_prev = self.translate + 3
        self.no_speech = self.translate + 4
        self.no_timestamps = self.translate + 5
        self.timestamp_begin = self.translate + 6

    # --- text

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """Bytes -> id of every ordinary token; made when text is first encoded."""
        return {token: rank for rank, token in enumerate(self.vocabulary)}

    def encode(self, text: str) -> list[int]:
        """Text -> ids of ordinary tokens, equal to tiktoken's `encode_ordinary`: "<|en|>" in a text is just text.

        A lone surrogate, which has no UTF-8, counts as U+FFFD, as in tiktoken.
        """
        if not isinstance(text, str):
            raise UsageError(f"text: expected str, got {type(text).__name__}")
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for piece in split_pieces(text):
            rank = self.ranks.get(piece)
            if rank is None:
                ids += merge_bytes(piece, self.ranks)
            else:
                ids.append(rank)
        return ids

    def decode(self, ids) -> str:
        """Ids -> text. Special tokens and timestamps are left out, bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside 0 … n_vocab - 1.
        """
        return b"".join(self._bytes(i) for i in ids if not self.eot <= i < self.n_vocab).decode(errors="replace")

    def decode_with_timestamps(self, ids) -> str:
        """Ids -> text with special tokens and timestamps written out, such as "<|en|>" and "<|1.08|>"."""
        return b"".join(self._bytes(i) for i in ids).decode(errors="replace")

    def _bytes(self, i: int) -> bytes:
        if not 0 <= i < self.n_vocab:
            raise ValueError(f"ids: expected 0 … {self.n_vocab - 1}, got {i}")
        if i < self.eot:
            return self.vocabulary[i]
        if i >= self.timestamp_begin:
            return f"<|{(i - self.timestamp_begin) * TIMESTAMP_STEP_S:.2f}|>".encode()
        if self.sot < i < self.translate:
            return f"<|{self.all_language_codes[i - self.sot - 1]}|>".encode()
        fixed = {
            self.eot: "endoftext", self.sot: "startoftranscript", self.translate: "translate",
            self.transcribe: "transcribe", self.sot_lm: "startoflm", self.sot_prev: "startofprev",
            self.no_speech: "nospeech", self.no_timestamps: "notimestamps",
        }  # fmt: skip
        return f"<|{fixed[i]}|>".encode()

    # --- languages and tasks

    @cached_property
    def all_language_codes(self) -> tuple[str, ...]:
        """Codes in the order of their tokens; English-only models have the tokens too, untrained."""
        return tuple(LANGUAGES)[: self.num_languages]

    @cached_property
    def all_language_tokens(self) -> tuple[int, ...]:
        """The ids of all_language_codes, ascending."""
        return tuple(range(self.sot + 1, self.translate))

    def language_code(self, language: str | None) -> str:
        """A code, name or alias -> the code; for an English-only model None counts as English.

        Raises UsageError when the model does not know the language.
        """
        if self.is_multilingual:
            return language_code(language, self.all_language_codes)
        if language is not None and language_code(language) != "en":
            raise UsageError(f"language: expected en, since the model is English-only, got {language!r}")
        return "en"

    def language_token(self, language: str) -> int:
        """A code, name or alias -> its token. Raises UsageError like language_code."""
        return self.sot + 1 + self.all_language_codes.index(self.language_code(language))

    def sot_sequence(self, language: str | None = None, task: str = "transcribe", timestamps: bool = True) -> list[int]:
        """The tokens that open a transcript: sot, then language and task for a multilingual model, then no_timestamps.

        Raises UsageError for an unknown language or task, for None as a multilingual model's language, and for
        anything but English and transcribe with an English-only model.
        """
        language = self.language_code(language)
        if task not in TASKS:
            raise UsageError(f"task: expected one of {' '.join(TASKS)}, got {task!r}")
        sequence = [self.sot]
        if self.is_multilingual:
            sequence += [self.language_token(language), self.transcribe if task == "transcribe" else self.translate]
        elif task != "transcribe":
            raise UsageError(f"task: expected transcribe, since the model is English-only, got {task!r}")
        return sequence if timestamps else [*sequence, self.no_timestamps]

    @cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        """Ids, ascending, that stand for music, brackets and speaker tags: Whisper's suppress_tokens=-1.

        A hyphen and an apostrophe are suppressed at the start of a word, not within.
        """
        tokens = {self.encode(" -")[0], self.encode(" '")[0]}
        for mark in [*MARKS, *NOTE_SIGNS]:
            for ids in (self.encode(mark), self.encode(f" {mark}")):
                if len(ids) == 1 or mark in NOTE_SIGNS:
                    tokens.add(ids[0])
        self.__dict__.pop("ranks", None)  # 5 MB that transcribing rarely wants again
        return tuple(sorted(tokens))
