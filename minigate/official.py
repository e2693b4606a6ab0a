"""Facts on the models that OpenAI published: their dims, which heads align words, which vocabulary they speak.

Source: openai/whisper (MIT), whisper/__init__.py for the alignment heads (its base85 masks, decoded), and
whisper/assets/*.tiktoken for the vocabularies.
"""
import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from minigate.errors import FileError
from minigate.tokenizer import unpack_vocabulary

ENGLISH_VOCAB = 51864  # n_vocab of the English-only models; multilingual ones have 51865 (99 languages) or more
SIZES = {(384, 4, 4): "tiny", (512, 6, 6): "base", (768, 12, 12): "small", (1024, 24, 24): "medium",
         (1280, 32, 32): "large", (1280, 32, 4): "large-v3-turbo"}  # n_state, encoder layers, decoder layers
ALIGNMENT_HEADS = {  # [layer, head] of the cross-attention heads that follow the audio in time
    "tiny.en": [[1, 0], [2, 0], [2, 5], [3, 0], [3, 1], [3, 2], [3, 3], [3, 4]],
    "tiny": [[2, 2], [3, 0], [3, 2], [3, 3], [3, 4], [3, 5]],
    "base.en": [[3, 3], [4, 7], [5, 1], [5, 5], [5, 7]],
    "base": [[3, 1], [4, 2], [4, 3], [4, 7], [5, 1], [5, 2], [5, 4], [5, 6]],
    "small.en": [[6, 6], [7, 0], [7, 3], [7, 8], [8, 2], [8, 5], [8, 7], [9, 0], [9, 4], [9, 8], [9, 10], [10, 0],
                 [10, 1], [10, 2], [10, 3], [10, 6], [10, 11], [11, 2], [11, 4]],
    "small": [[5, 3], [5, 9], [8, 0], [8, 4], [8, 7], [8, 8], [9, 0], [9, 7], [9, 9], [10, 5]],
    "medium.en": [[11, 4], [14, 1], [14, 12], [14, 14], [15, 4], [16, 0], [16, 4], [16, 9], [17, 12], [17, 14], [18, 7],
                  [18, 10], [18, 15], [20, 0], [20, 3], [20, 9], [20, 14], [21, 12]],
    "medium": [[13, 15], [15, 4], [15, 15], [16, 1], [20, 0], [23, 4]],
    "large-v1": [[9, 19], [11, 2], [11, 4], [11, 17], [22, 7], [22, 11], [22, 17], [23, 2], [23, 15]],
    "large-v2": [[10, 12], [13, 17], [16, 11], [16, 12], [16, 13], [17, 15], [17, 16], [18, 4], [18, 11], [18, 19],
                 [19, 11], [21, 2], [21, 3], [22, 3], [22, 9], [22, 12], [23, 5], [23, 7], [23, 13], [25, 5], [26, 1],
                 [26, 12], [27, 15]],
    "large-v3": [[7, 0], [10, 17], [12, 18], [13, 12], [16, 1], [17, 14], [19, 11], [21, 4], [24, 1], [25, 6]],
    "large-v3-turbo": [[2, 4], [2, 11], [3, 3], [3, 6], [3, 11], [3, 14]],
}


def official_name(dims: Mapping[str, int], hint: str = "") -> str | None:
    """The official model with these dims, or None. large-v1 and -v2 share their dims: hint (a file name) must tell."""
    size = SIZES.get((dims["n_audio_state"], dims["n_audio_layer"], dims["n_text_layer"]))
    if size == "large":
        if dims["n_mels"] == 128:
            return "large-v3"
        return next((name for name in ("large-v1", "large-v2") if name in hint.lower().replace("_", "-")), None)
    return f"{size}.en" if size and dims["n_vocab"] == ENGLISH_VOCAB else size


def official_vocabulary(n_vocab: int) -> list[bytes]:
    """The ordinary tokens of a Whisper model with n_vocab ids: 50256 (English-only) or 50257, in rank order."""
    if n_vocab < ENGLISH_VOCAB:
        raise FileError(f"n_vocab: expected at least {ENGLISH_VOCAB} for one of Whisper's vocabularies, got {n_vocab}; "
                        "a folder with its own tokenizer.json can have any")
    name = "gpt2" if n_vocab == ENGLISH_VOCAB else "multilingual"
    packed = gzip.decompress((Path(__file__).with_name("vocab") / f"{name}.gz").read_bytes())
    return unpack_vocabulary(np.frombuffer(packed, np.uint8))
