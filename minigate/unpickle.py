"""Files made by torch.save, read without torch and without executing anything that is in them.

In: a zip file with NAME/data.pkl (a pickle) and NAME/data/KEY (one storage each, uncompressed). Out: the dicts, lists
and numbers of the pickle, with Tensor in the place of tensors: read-only views of the mapped file.
pickletools takes the pickle apart, and the few opcodes that torch.save writes are interpreted here. They can build
dicts, lists, tuples and Tensor, nothing else. (A subclass of pickle.Unpickler would still let BUILD write into whatever
find_class returns, and allocate whatever memory a damaged memo index asks for.)
Sources: CPython's pickletools for the opcodes, torch/serialization.py and torch/_utils.py for the layout.
"""
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigate.errors import FileError
from minigate.tensorfile import bfloat16_to_float32, map_file, show

LOCAL_HEADER = 30  # bytes of a zip member's header before its name
ORDERED_DICT, REBUILD, PARAMETER = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2",
                                    "torch._utils _rebuild_parameter")
STORAGES = {"torch DoubleStorage": "<f8", "torch FloatStorage": "<f4", "torch HalfStorage": "<f2",
            "torch BFloat16Storage": "bfloat16", "torch LongStorage": "<i8", "torch IntStorage": "<i4",
            "torch ShortStorage": "<i2", "torch CharStorage": "i1", "torch ByteStorage": "u1", "torch BoolStorage": "?"}
ALLOWED = {ORDERED_DICT, REBUILD, PARAMETER, *STORAGES}
MARK = object()
CONSTANTS = {"MARK": MARK, "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
DAMAGE = (zipfile.BadZipFile, struct.error, ValueError, TypeError, LookupError, OverflowError, OSError, EOFError,
          RuntimeError)  # what zipfile and pickletools raise at damaged input


class Global(str):
    """A function or class that the pickle names, as "module name". It stands for itself: nothing is imported."""


@dataclass(frozen=True)
class Storage:
    """Elements of one type, (numel,); bfloat16 as u16."""
    values: np.ndarray
    is_bfloat16: bool


@dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return np.dtype("<f4") if self.storage.is_bfloat16 else self.storage.values.dtype

    def array(self) -> np.ndarray:
        """-> the values: a read-only view, or for bfloat16 a float32 copy."""
        values = self.storage.values[self.offset:]
        steps = [stride * values.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(values, self.shape, steps, writeable=False)
        return bfloat16_to_float32(view) if self.storage.is_bfloat16 else view


def read(path: str | Path) -> object:
    """torch.save's file -> its object with Tensor for every tensor. Raises FileError, also for any forbidden global."""
    raw = map_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
        found = [name for name in members if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise FileError(f"expected a zip file with one NAME/data.pkl, got {len(found)}")
        root = found[0].removesuffix("data.pkl")
        if root + "byteorder" in members:
            order = _member(raw, members, root + "byteorder").tobytes()
            if order != b"little":
                raise FileError(f"byteorder: expected little, got {show(order)}")
        pickle = _member(raw, members, found[0]).tobytes()
        return interpret(pickle, lambda key: _member(raw, members, f"{root}data/{key}"))
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    except DAMAGE as error:
        raise FileError(f"{path}: expected a zip file as torch.save writes it, got {show(str(error))}") from None


def _member(raw: np.ndarray, members: Mapping[str, zipfile.ZipInfo], name: str) -> np.ndarray:
    """One uncompressed zip member -> its bytes (n,) u8, a view of the mapped file, after a check of its checksum."""
    if name not in members:
        raise FileError(f"zip file: expected the member {show(name)}, got none")
    info = members[name]
    header = raw[info.header_offset:info.header_offset + LOCAL_HEADER].tobytes()
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or header[:4] != b"PK\3\4":
        raise FileError(f"{show(name)}: expected a zip member without compression or encryption")
    begin = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))
    data = raw[begin:begin + info.file_size]
    if zlib.crc32(data) != info.CRC:
        raise FileError(f"{show(name)}: expected {info.file_size} bytes with checksum {info.CRC:08x}, got {data.size} "
                        f"with {zlib.crc32(data):08x} (truncated or altered file)")
    return data


def interpret(pickle: bytes, member: Callable[[str], np.ndarray]) -> object:
    """Pickle -> its object. member(key) gives the bytes (n,) u8 of a storage. Raises FileError."""
    machine = _Machine(member)
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except FileError as error:
        raise FileError(f"data.pkl: {error}") from None
    except DAMAGE as error:
        raise FileError(f"data.pkl: expected a pickle as torch.save writes it, got {show(str(error))}") from None


class _Machine:
    """The stack and the memo while one pickle is interpreted."""

    def __init__(self, member: Callable[[str], np.ndarray]):
        self.member, self.stack, self.memo, self.storages = member, [], {}, {}

    def step(self, name: str, argument: object) -> None:
        stack = self.stack
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in LITERALS:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(_allowed(argument))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_allowed(f"{stack[-2]!s} {stack[-1]!s}")]
        elif name not in ("PROTO", "FRAME"):  # these say how to read on, which genops does
            self.build(name, argument)

    def build(self, name: str, argument: object) -> None:
        """The opcodes that put values together."""
        stack = self.stack
        if name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name in TUPLES:
            stack[-TUPLES[name]:] = [tuple(stack[-TUPLES[name]:])]
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop_to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _instance(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop_to_mark() if name == "APPENDS" else [stack.pop()]
            _instance(list, stack[-1]).extend(items)
        elif name == "BINPERSID":
            stack.append(self.storage(*_instance(tuple, stack.pop())))
        elif name == "REDUCE":
            arguments = _instance(tuple, stack.pop())
            stack.append(_call(_instance(Global, stack.pop()), arguments))
        elif name == "BUILD":
            stack.pop()  # the attribute _metadata of a state dict: not needed, not set
            _instance(dict, stack[-1])
        else:
            raise FileError(f"expected a checkpoint that only builds tensors, got {name} {show(argument)}")

    def pop_to_mark(self) -> list:
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:  # below 0 it goes round once more, then off the list: IndexError
            at -= 1
        items = self.stack[at + 1:]
        del self.stack[at:]
        return items

    def storage(self, tag: str, kind: Global, key: str, location: str, numel: int) -> Storage:
        """A persistent id -> Storage. The location (cpu, cuda:0) is where the tensor was: of no meaning here."""
        dtype = STORAGES[_instance(Global, kind)]
        if _instance(str, key) not in self.storages:
            self.storages[key] = self.member(key)
        values = self.storages[key].view("<u2" if dtype == "bfloat16" else dtype)
        if tag != "storage" or values.size != numel:
            raise FileError(f"storage {show(key)}: expected {show(numel)} elements, got {values.size}")
        return Storage(values, dtype == "bfloat16")


def _instance(kind: type, value: object) -> object:
    if type(value) is not kind:
        raise FileError(f"expected a {kind.__name__}, got a {type(value).__name__}")
    return value


def _allowed(name: str) -> Global:
    if name not in ALLOWED:
        raise FileError(f"expected only tensors, got the forbidden global {show(name)} (nothing was executed)")
    return Global(name)


def _call(function: Global, arguments: tuple) -> object:
    """What REDUCE may do."""
    if function == ORDERED_DICT and not arguments:
        return {}
    if function == REBUILD and len(arguments) in (6, 7):
        return _tensor(*arguments[:4])
    if function == PARAMETER and len(arguments) == 3:
        return _instance(Tensor, arguments[0])
    raise FileError(f"expected only tensors, got a call of {function} with {len(arguments)} arguments")


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple) -> Tensor:
    """_rebuild_tensor_v2 with every element inside its storage, and no more elements than the storage has."""
    numel = _instance(Storage, storage).values.size
    sizes = (offset, *_instance(tuple, shape), *_instance(tuple, strides))
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in sizes):
        raise FileError(f"tensor: expected offset, shape and strides as non-negative integers, got {show(sizes)}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > numel or offset > numel or (0 not in shape and last >= numel):
        raise FileError(f"tensor: expected shape {show(shape)}, strides {show(strides)} and offset {show(offset)} "
                        f"within {numel} elements")
    return Tensor(storage, offset, shape, strides)
