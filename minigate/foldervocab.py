"""The vocabulary that a Hugging Face or CTranslate2 folder carries -> the ordinary tokens as bytes, in rank order.

These files write every byte of a token as one printable character (GPT-2's byte_encoder): bytes that are printable in
Latin-1 as themselves, the others as the characters from U+0100 on. Ordinary tokens come before <|endoftext|>.
Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
"""
import json
from pathlib import Path

from minigate.errors import FileError
from minigate.tensorfile import show

EOT = "<|endoftext|>"


def read(folder: Path) -> list[bytes] | None:
    """The first of tokenizer.json, vocab.json, vocabulary.json, vocabulary.txt -> tokens; None where there is none."""
    for name in ("tokenizer.json", "vocab.json", "vocabulary.json", "vocabulary.txt"):
        path = folder / name
        if path.is_file():
            try:
                return _tokens(path)
            except (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError,
                    StopIteration) as error:
                raise FileError(f"{path}: expected a vocabulary of byte-level BPE, got {show(str(error))}") from None
    return None


def _tokens(path: Path) -> list[bytes]:
    text = path.read_bytes().decode()
    content = text.split("\n") if path.suffix == ".txt" else json.loads(text)
    if path.name == "tokenizer.json":
        ids = content["model"]["vocab"]
        _check_merges(ids, content["model"]["merges"])
        content = {**{token["content"]: token["id"] for token in content["added_tokens"]}, **ids}
    pairs = content.items() if isinstance(content, dict) else ((token, i) for i, token in enumerate(content))
    by_id = {i: token for token, i in pairs}
    end = next(i for i, token in by_id.items() if token == EOT)
    alphabet = _alphabet()
    tokens = [bytes(alphabet[char] for char in by_id[i]) for i in range(end)]
    if max(map(len, tokens)) > 255:
        raise ValueError(f"a token of {max(map(len, tokens))} bytes where a model file can hold 255")
    return tokens


def _alphabet() -> dict[str, int]:
    """Character -> the byte it stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _check_merges(ids: dict[str, int], merges: list) -> None:
    """Our tokenizer merges in the order of the ranks: the merges here must lead to ever higher ids."""
    last = -1
    for pair in merges:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        if ids[left + right] <= last:
            raise ValueError(f"the merge {show(pair)} out of the order of the ids")
        last = ids[left + right]
