"""The safetensors container: named arrays in one file, read through a memory map, written whole or not at all.

In: a file. Out: the header's string pairs, and read-only arrays that share the file's memory (bfloat16 is widened to
float32 on access). Layout: N (8 bytes, little-endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data in one piece without gaps. Source: https://github.com/huggingface/safetensors (format section of its README).

Files written here hold among the string pairs the CRC-32 of the whole file (with zeros in its own place), so that a bit
that changed anywhere is noticed; files without one, from elsewhere, are read without that check.
"""
import json
import math
import mmap
import os
import reprlib
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigate.errors import FileError

MAX_HEADER = 100_000_000  # bytes, the format's own limit
RESIDENT = 8 << 20  # bytes of a mapped file, about, that are in memory while tensors are made of it
ALIGNMENT = 64  # bytes; the data starts at a multiple of it, so large tensors do too
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U64": "<u8", "I32": "<i4",
          "U32": "<u4", "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "?"}
_SHORT = reprlib.Repr()  # bounded in depth and breadth: a few bytes of a file can describe an endless value
_SHORT.maxstring, _SHORT.maxother = 160, 80
NO_CHECKSUM = b'"crc32":"00000000"'  # in the header, in whose place the checksum is written
CODES = {np.dtype(text): code for code, text in DTYPES.items() if code != "BF16"}


@dataclass(frozen=True)
class Entry:
    """A tensor that is made when it is asked for."""
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


class LazyTensors(Mapping[str, np.ndarray]):
    """name -> array, each made when it is asked for: what must be converted is never all in memory at once."""

    def __init__(self, entries: Mapping[str, Entry], mapping: mmap.mmap | None = None):
        self.entries = dict(entries)
        self.mapping = mapping  # where the arrays are, if they are in a file
        self._touched = 0  # bytes

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.entries[name].make()
        self._touched += array.nbytes
        if self._touched > RESIDENT:
            self.release()
        return array

    def release(self) -> None:
        """Give the memory of what was read from the file back to the system, which reads it anew when it is wanted."""
        _give_back(self.mapping)
        self._touched = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


def kind_of(tensors: Mapping[str, np.ndarray], name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a tensor, without making it."""
    tensor = tensors.entries[name] if isinstance(tensors, LazyTensors) else tensors[name]
    return tuple(tensor.shape), tensor.dtype


def show(value: object) -> str:
    """Any value from a file -> at most 80 printable characters on one line, for an error message."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def map_file(path: str | Path) -> np.ndarray:
    """File -> its bytes (n,) u8, read-only and memory-mapped. Raises FileError when it cannot be read."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.frombuffer(b"", np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open_regular(path: str, flags: int) -> int:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "expected a regular file")
    return os.open(path, flags)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bits (...) u16, the upper half of a float32 -> (...) f32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read(path: str | Path) -> tuple[dict[str, str], LazyTensors]:
    """safetensors file -> metadata, tensors in the header's order. Raises FileError naming the file and the field."""
    raw = map_file(path)
    mapping = getattr(raw.base, "obj", None)  # none of an empty file
    header, start = _header(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: header: __metadata__: expected strings by name, got {show(metadata)}")
    data = raw[start:]
    checksum = metadata.pop("crc32", None)
    spans = {name: _span(f"{path}: header: tensor {show(name)}", entry) for name, entry in header.items()}
    _check_tiling(path, spans, data.size)
    if checksum is not None:
        own = _checksum(checksum)
        got = _crc32_of(data, zlib.crc32(raw[:start].tobytes().replace(own, NO_CHECKSUM, 1)), mapping)
        if own != _checksum(f"{got:08x}"):
            raise FileError(f"{path}: expected the CRC-32 {show(checksum)}, got {got:08x}: the file was altered")
    return metadata, LazyTensors({name: _entry(data, *span) for name, span in spans.items()}, mapping)


def _crc32_of(data: np.ndarray, crc: int, mapping: mmap.mmap | None) -> int:
    """crc, of what stands before `data`, -> of both. Pages of a mapped file are given back on the way."""
    for at in range(0, data.size, RESIDENT):
        crc = zlib.crc32(data[at : at + RESIDENT], crc)
        _give_back(mapping)
    return crc


def _give_back(mapping: object) -> None:
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _checksum(digits: str) -> bytes:
    """The header's bytes that name the checksum."""
    return NO_CHECKSUM.replace(b"00000000", digits.encode(errors="replace"))


def _header(path: str | Path, raw: np.ndarray) -> tuple[dict, int]:
    """-> the parsed header, and where the data starts (bytes)."""
    if raw.size < 8:
        raise FileError(f"{path}: expected a safetensors file of at least 8 bytes, got {raw.size}")
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if length > min(MAX_HEADER, raw.size - 8):
        raise FileError(f"{path}: header length: expected at most {min(MAX_HEADER, raw.size - 8)} bytes, got {length} "
                        "(not a safetensors file, or truncated)")
    try:
        header = json.loads(raw[8:8 + length].tobytes().decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: header: expected JSON in UTF-8, got {show(str(error))}") from None
    if not isinstance(header, dict) or raw[8] != ord("{"):
        raise FileError(f"{path}: header: expected a JSON object from its first byte on, got {show(header)}")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {show(repeated)} twice")
    return found


def _span(where: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's header entry -> dtype code, shape, begin and end (bytes from the data's start)."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{where}: expected dtype, shape and data_offsets, got {show(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise FileError(f"{where}: dtype: expected one of {' '.join(DTYPES)}, got {show(code)}")
    if not _is_sizes(shape):
        raise FileError(f"{where}: shape: expected a list of non-negative integers, got {show(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(f"{where}: data_offsets: expected [begin, end], got {show(offsets)}")
    size = math.prod(shape) * np.dtype(DTYPES[code]).itemsize
    if offsets[1] - offsets[0] != size:
        raise FileError(f"{where}: data_offsets: expected {show(size)} bytes for {code} {show(shape)}, "
                        f"got {show(offsets)}")
    return code, tuple(shape), offsets[0], offsets[1]


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)  # bool is an int, hence type()


def _check_tiling(path: str | Path, spans: Mapping[str, tuple], size: int) -> None:
    """The tensors must cover the data (size bytes) exactly: no hole, no overlap, nothing left over."""
    at = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != at or end > size:
            raise FileError(f"{path}: header: tensor {show(name)}: data_offsets: expected to begin at {at} and to end "
                            f"by {size}, got {show([begin, end])} (hole, overlap or truncated file)")
        at = end
    if at != size:
        raise FileError(f"{path}: expected {at} bytes of data, got {size}")


def _entry(data: np.ndarray, code: str, shape: tuple[int, ...], begin: int, end: int) -> Entry:
    def make() -> np.ndarray:
        array = data[begin:end].view(DTYPES[code])
        if code == "BF16":
            array = bfloat16_to_float32(array)
        elif not array.flags.aligned:
            array = array.copy()  # the format does not promise alignment, C code needs it
        array.flags.writeable = False
        return array.reshape(shape)
    return Entry(shape, np.dtype("<f4" if code == "BF16" else DTYPES[code]), make)


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str],
          float_dtype: str | None = None, progress: Callable[[int], object] | None = None) -> None:
    """Write name -> array to a new file that appears under its name only when it is complete and on disk.

    float_dtype: "float32" or "float16" converts every floating tensor. progress is called with the bytes of each
    tensor written. Raises FileError: folder or disk unwritable, dtype unknown to the format, value not finite.
    """
    path = Path(os.path.realpath(path))  # a link stays, what it points to is written
    if path.exists() and not path.is_file():
        raise FileError(f"{path}: cannot be written: expected a regular file in its place or none")
    header, order = _plan(path, tensors, metadata, float_dtype)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            crc = zlib.crc32(header)
            for name in order:
                stored = _stored(path, name, tensors[name], float_dtype).reshape(-1).view(np.uint8)
                file.write(stored)
                crc = zlib.crc32(stored, crc)
                if progress:
                    progress(stored.nbytes)
            file.seek(header.index(NO_CHECKSUM))
            file.write(_checksum(f"{crc:08x}"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # not there: never made, or renamed
            temporary.unlink()


def _plan(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str],
          float_dtype: str | None) -> tuple[bytes, list[str]]:
    """-> the header's bytes with length and padding, and the tensors' names in the order of their data."""
    kinds = {}
    for name in tensors:
        shape, dtype = kind_of(tensors, name)
        dtype = np.dtype(float_dtype) if float_dtype and dtype.kind == "f" else dtype.newbyteorder("<")
        if dtype not in CODES:
            raise FileError(f"{path}: tensor {show(name)}: expected a dtype that safetensors knows, got {dtype}")
        kinds[name] = dtype, shape
    order = sorted(kinds, key=lambda name: -kinds[name][0].itemsize)  # so that every tensor is aligned
    header, at = {"__metadata__": {"crc32": "0" * 8, **metadata}}, 0
    for name in order:
        dtype, shape = kinds[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, order


def _stored(path: Path, name: str, array: np.ndarray, float_dtype: str | None) -> np.ndarray:
    """array -> as it goes into the file: contiguous, little-endian, of float_dtype if it is floating, and finite."""
    with np.errstate(over="ignore"):
        dtype = float_dtype if float_dtype and array.dtype.kind == "f" else array.dtype.newbyteorder("<")
        stored = np.ascontiguousarray(array, dtype).reshape(array.shape)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        kind = "finite values" if not np.isfinite(array).all() else f"values within {stored.dtype}"
        raise FileError(f"{path}: tensor {show(name)}: expected {kind}, got "
                        f"{show(float(array[~np.isfinite(stored)].flat[0]))}")
    return stored
