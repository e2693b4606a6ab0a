"""The table of OpenAI's models and their two vocabularies."""

import base64
import gzip
import hashlib

import numpy as np
import pytest

from minigate.errors import FileError
from minigate.official import ALIGNMENT_HEADS, official_name, official_vocabulary
from minigate.tokenizer import pack_vocabulary

N_STATE_LAYERS_HEADS = {
    "tiny": (384, 4, 6), "base": (512, 6, 8), "small": (768, 12, 12), "medium": (1024, 24, 16),
    "large-v1": (1280, 32, 20), "large-v2": (1280, 32, 20), "large-v3": (1280, 32, 20), "large-v3-turbo": (1280, 4, 20),
}  # fmt: skip
GPT2 = "b83936794d5c58d4bf7f24cb0100cd291b9306d80ba0e2ff11988886d2d9c1ec"  # SHA-256 of the packed vocabularies
MULTILINGUAL = "00ff1b63cf399a3f2cf903b1fcdc8c580662b9c5bb1333d29c8b8bcff6fef6c7"


def dims_of(name):
    n_state, n_layer, _ = N_STATE_LAYERS_HEADS[name.removesuffix(".en")]
    v3 = name.startswith("large-v3")
    return dict(n_audio_state=n_state, n_audio_layer=32 if name == "large-v3-turbo" else n_layer, n_text_layer=n_layer,
                n_mels=128 if v3 else 80, n_vocab=51864 if name.endswith(".en") else 51866 if v3 else 51865)


@pytest.mark.parametrize("name", list(ALIGNMENT_HEADS))
def test_names_and_alignment_heads(name):
    _, n_layer, n_head = N_STATE_LAYERS_HEADS[name.removesuffix(".en")]
    heads = ALIGNMENT_HEADS[name]
    assert heads == sorted(heads) and all(0 <= layer < n_layer and 0 <= head < n_head for layer, head in heads)
    assert official_name(dims_of(name), f"whisper-{name}") == name
    assert official_name(dims_of(name), f"models--WHISPER_{name.replace('-', '_').upper()}") == name
    if name not in ("large-v1", "large-v2"):
        assert official_name(dims_of(name)) == name


def test_dims_that_tell_nothing():
    assert official_name(dims_of("large-v2"), "large") is None
    assert official_name({**dims_of("small"), "n_text_layer": 4}) is None


@pytest.mark.parametrize("n_vocab, size, digest", [
    (51864, 50256, GPT2),
    (51865, 50257, MULTILINGUAL),
    (51866, 50257, MULTILINGUAL),
    (51900, 50257, MULTILINGUAL),
])  # fmt: skip
def test_vocabularies(n_vocab, size, digest):
    tokens = official_vocabulary(n_vocab)
    assert len(tokens) == len(set(tokens)) == size and sorted(tokens[:256]) == [bytes([i]) for i in range(256)]
    assert hashlib.sha256(pack_vocabulary(tokens)).hexdigest() == digest


def test_no_vocabulary_for_other_sizes():
    with pytest.raises(FileError, match="n_vocab: expected at least 51864 .*, got 51863"):
        official_vocabulary(51863)


def test_what_openai_whisper_holds():
    whisper = pytest.importorskip("whisper")
    from whisper.tokenizer import get_encoding

    for n_vocab, name in ((51864, "gpt2"), (51865, "multilingual")):
        ranks = get_encoding(name)._mergeable_ranks
        assert official_vocabulary(n_vocab) == sorted(ranks, key=ranks.get)
    for name, heads in ALIGNMENT_HEADS.items():
        _, n_layer, n_head = N_STATE_LAYERS_HEADS[name.removesuffix(".en")]
        mask = np.frombuffer(gzip.decompress(base64.b85decode(whisper._ALIGNMENT_HEADS[name])), bool)
        assert np.argwhere(mask.reshape(n_layer, n_head)).tolist() == heads
