"""Text <-> token ids.

A vocabulary is a list of byte strings in rank order: the id of an ordinary token is its place in the list.
"""

import numpy as np

from minigate.errors import FileError


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
