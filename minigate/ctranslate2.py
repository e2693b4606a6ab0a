"""CTranslate2's model.bin -> tensors with openai/whisper's names.

The file: binary version, name and revision of the specification, the variables (name, shape, dtype, bytes), the
aliases (name, name). Query, key and value rows are fused into one variable; int8 and int16 weights w come with a scale
s by which they were multiplied: x = w / s. Source: python/ctranslate2/specs/model_spec.py and whisper_spec.py there.
"""
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from minigate.errors import FileError
from minigate.tensorfile import Entry, LazyTensors, bfloat16_to_float32, map_file, show

VERSIONS = (4, 5, 6)  # of the container; 4 brought dtypes, and Whisper came later
DTYPES = ("<f4", "i1", "<i2", "<i4", "<f2", "bfloat16")  # by type id
BLOCK = {  # openai/whisper's module -> CTranslate2's variable, which part of it, of how many
    "attn.query": ("self_attention/linear_0", 0, 3), "attn.key": ("self_attention/linear_0", 1, 3),
    "attn.value": ("self_attention/linear_0", 2, 3), "attn.out": ("self_attention/linear_1", 0, 1),
    "attn_ln": ("self_attention/layer_norm", 0, 1),
    "cross_attn.query": ("attention/linear_0", 0, 1), "cross_attn.key": ("attention/linear_1", 0, 2),
    "cross_attn.value": ("attention/linear_1", 1, 2), "cross_attn.out": ("attention/linear_2", 0, 1),
    "cross_attn_ln": ("attention/layer_norm", 0, 1),
    "mlp.0": ("ffn/linear_0", 0, 1), "mlp.2": ("ffn/linear_1", 0, 1), "mlp_ln": ("ffn/layer_norm", 0, 1)}
TOP = {"encoder.conv1": "encoder/conv1", "encoder.conv2": "encoder/conv2", "encoder.ln_post": "encoder/layer_norm",
       "decoder.ln": "decoder/layer_norm", "decoder.token_embedding": "decoder/embeddings"}
POSITIONS = {f"{side}.positional_embedding": f"{side}/position_encodings/encodings" for side in ("encoder", "decoder")}
OUTPUT = "decoder/projection/weight"  # the token embedding again


def read(path: str | Path) -> tuple[LazyTensors, dict[str, int]]:
    """model.bin -> its tensors as float32 or float16, and its scalars by name (num_heads and the like)."""
    model = _Variables(path, *_parse(path))
    entries = {}
    for name, variable in TOP.items():
        entries |= model.module(name, variable, 0, 1)
    for name, variable in POSITIONS.items():
        entries[name] = model.entry(variable, 0, 1)
    for side, kinds in (("encoder", ("attn", "mlp")), ("decoder", ("attn", "cross_attn", "mlp"))):
        i = 0
        while model.has(f"{side}/layer_{i}/ffn/linear_0/weight"):
            for module, (variable, part, parts) in BLOCK.items():
                if module.startswith(kinds):
                    entries |= model.module(f"{side}.blocks.{i}.{module}", f"{side}/layer_{i}/{variable}", part, parts)
            i += 1
    model.check_output(entries["decoder.token_embedding.weight"])
    model.check_all_used()
    return LazyTensors(entries), model.scalars()


class _Cursor:
    """Reads a mapped file from its start."""

    def __init__(self, path: str | Path):
        self.path, self.raw, self.at = path, map_file(path), 0

    def take(self, size: int) -> np.ndarray:
        self.at += size
        if self.at > self.raw.size:
            raise FileError(f"{self.path}: expected {self.at} bytes or more, got {self.raw.size} "
                            "(not a CTranslate2 model, or truncated)")
        return self.raw[self.at - size:self.at]

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)).tobytes())[0]

    def text(self) -> str:
        value = self.take(self.number("H")).tobytes()
        try:
            return value.removesuffix(b"\0").decode()
        except UnicodeDecodeError:
            raise FileError(f"{self.path}: expected a name in UTF-8, got {show(value)}") from None


def _parse(path: str | Path) -> tuple[dict[str, tuple[tuple[int, ...], str, np.ndarray]], dict[str, str]]:
    """-> {variable: (shape, dtype, bytes)} as views of the mapped file, {alias: variable}."""
    file = _Cursor(path)
    version = file.number("I")
    if version not in VERSIONS:
        raise FileError(f"{path}: binary version: expected one of {VERSIONS}, got {version}")
    specification = file.text()
    if specification != "WhisperSpec":
        raise FileError(f"{path}: specification: expected WhisperSpec, got {show(specification)}")
    file.number("I")  # its revision: 1 to 3 have the same variables
    variables = {}
    for _ in range(file.number("I")):
        name = file.text()
        shape = tuple(file.number("I") for _ in range(file.number("B")))
        kind, size = file.number("B"), file.number("I")
        dtype = DTYPES[kind] if kind < len(DTYPES) else None
        if dtype is None or size != math.prod(shape) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize):
            raise FileError(f"{path}: variable {show(name)}: expected a known type id and its bytes for {show(shape)}, "
                            f"got type id {kind} and {size} bytes")
        variables[name] = shape, dtype, file.take(size)
    aliases = {file.text(): file.text() for _ in range(file.number("I"))}
    if file.at != file.raw.size:
        raise FileError(f"{path}: expected {file.at} bytes, got {file.raw.size}")
    return variables, aliases


class _Variables:
    """The variables of one file, by name or alias; remembers which were used."""

    def __init__(self, path: str | Path, variables: Mapping[str, tuple], aliases: Mapping[str, str]):
        self.path, self.variables, self.aliases, self.used = path, variables, aliases, set()

    def has(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.variables

    def get(self, name: str) -> tuple[tuple[int, ...], str, np.ndarray]:
        target = name if name in self.variables else self.aliases.get(name)
        if target not in self.variables:
            raise FileError(f"{self.path}: variable {name}: expected in a Whisper model, got none")
        self.used.add(target)
        return self.variables[target]

    def module(self, name: str, variable: str, part: int, parts: int) -> dict[str, Entry]:
        """The entries of one linear, convolution, norm or embedding under openai/whisper's names."""
        weight, bias = ("gamma", "beta") if variable.endswith("layer_norm") else ("weight", "bias")
        entries = {f"{name}.weight": self.entry(f"{variable}/{weight}", part, parts)}
        if not name.endswith((".key", "token_embedding")):  # a bias of the keys is the same for every score: no effect
            entries[f"{name}.bias"] = self.entry(f"{variable}/{bias}", part, parts)
        return entries

    def entry(self, name: str, part: int, parts: int) -> Entry:
        """One of the equal parts (along the first axis) of a variable."""
        shape, dtype, data = self.get(name)
        if not shape or shape[0] % parts:
            raise FileError(f"{self.path}: variable {name}: expected a first axis of {parts} equal parts, "
                            f"got {show(shape)}")
        rows = slice(part * shape[0] // parts, (part + 1) * shape[0] // parts)
        scale = self.scale(name, shape)[rows] if dtype in ("i1", "<i2") else None
        kind = np.dtype("<f4" if dtype == "bfloat16" or scale is not None else dtype)

        def make() -> np.ndarray:
            values = data.view("<u2" if dtype == "bfloat16" else dtype).reshape(shape)[rows]
            if scale is not None:
                values = values / scale.reshape(-1, *[1] * (len(shape) - 1))
            return bfloat16_to_float32(values) if dtype == "bfloat16" else values
        return Entry((rows.stop - rows.start, *shape[1:]), kind, make)

    def scale(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The scale of an integer weight, one per row: (N,) f32; stored so, or as one number (int16)."""
        target = self.aliases.get(name, name)
        stored, dtype, data = self.get(f"{name}_scale" if self.has(f"{name}_scale") else f"{target}_scale")
        if dtype != "<f4" or stored not in ((), shape[:1]):
            raise FileError(f"{self.path}: variable {name}_scale: expected () or {shape[:1]} float32, "
                            f"got {show(stored)} {dtype}")
        values = np.broadcast_to(data.view(dtype).reshape(stored), shape[:1])
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise FileError(f"{self.path}: variable {name}_scale: expected positive finite numbers")
        return values

    def check_output(self, embedding: Entry) -> None:
        """The output projection, where it is stored at all, must be the token embedding."""
        if self.has(OUTPUT) and not np.array_equal(self.entry(OUTPUT, 0, 1).make(), embedding.make()):
            raise FileError(f"{self.path}: variable {OUTPUT}: expected the token embedding's values, got others")

    def check_all_used(self) -> None:
        unknown = [name for name, (shape, _, _) in self.variables.items() if shape and name not in self.used]
        if unknown:
            raise FileError(f"{self.path}: variable {show(unknown[0])}: expected no such variable in a Whisper model")

    def scalars(self) -> dict[str, int]:
        return {name: int(data.view(dtype)[0]) for name, (shape, dtype, data) in self.variables.items()
                if not shape and dtype in ("i1", "<i2", "<i4")}
