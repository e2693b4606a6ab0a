"""The safetensors container: round trips, every malformed header, no partial file."""

import json
import os
import stat
import struct
from pathlib import Path

import numpy as np
import pytest

from minigate import tensorfile
from minigate.errors import FileError
from tests.layouts import safetensors

DTYPES = "float64 float32 float16 int64 uint64 int32 uint32 int16 uint16 int8 uint8 bool".split()


def all_dtypes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {f"x.{d}": rng.integers(0, 2 if d == "bool" else 100, (3, 5)).astype(d) for d in DTYPES}
    return arrays | {
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 4), np.float16),
        "ä\n": np.arange(3, dtype=np.uint8),
        "transposed": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "big": np.arange(4, dtype=">i4"),
    }


def assert_same(found, arrays):
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("<") and found[name].shape == np.shape(array), name


def test_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    tensorfile.write(path, all_dtypes(), {"key": "ä"})
    metadata, tensors = tensorfile.read(path)
    assert metadata == {"key": "ä"}
    assert_same(tensors, all_dtypes())
    assert len(tensors) == len(all_dtypes()) and "nothing" not in tensors
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_arrays_are_aligned_read_only_views(tmp_path):
    path = tmp_path / "a.safetensors"
    tensorfile.write(path, all_dtypes(), {})
    assert (8 + struct.unpack("<Q", path.read_bytes()[:8])[0]) % tensorfile.ALIGNMENT == 0
    tensors = tensorfile.read(path)[1]
    for name, array in tensors.items():
        assert array.flags.aligned and not array.flags.writeable, name
        assert array.size == 0 or np.shares_memory(array, tensors[name]), name  # the map's memory, not a copy
    with pytest.raises(ValueError):
        tensors["x.float32"][0, 0] = 1
    path.unlink()
    np.testing.assert_array_equal(tensors["x.int8"], all_dtypes()["x.int8"])  # the map outlives the name


def test_unaligned_data_is_copied(tmp_path):
    path = tmp_path / "a.safetensors"
    data = b"\1" + np.float32([1.5, -2]).tobytes()
    path.write_bytes(safetensors({"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                                  "a": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}, data))
    array = tensorfile.read(path)[1]["a"]
    assert array.flags.aligned and array.tolist() == [1.5, -2] and not array.flags.writeable


def test_bfloat16_is_widened(tmp_path):
    path = tmp_path / "a.safetensors"
    values = np.float32([1, -3.5, 2.0**-130, np.inf, 1e38])
    bits = (values.view(np.uint32) >> 16).astype("<u2")
    path.write_bytes(safetensors({"a": {"dtype": "BF16", "shape": [5], "data_offsets": [0, 10]}}, bits.tobytes()))
    tensors = tensorfile.read(path)[1]
    assert tensorfile.kind_of(tensors, "a") == ((5,), np.dtype("float32"))
    assert tensors["a"].dtype == np.float32 and (tensors["a"].view(np.uint32) >> 16 == bits).all()


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    arrays = {name: np.ascontiguousarray(a) for name, a in all_dtypes().items() if a.dtype != np.dtype(">i4")}
    tensorfile.write(tmp_path / "ours", arrays, {"k": "v"})
    assert_same(package.load_file(tmp_path / "ours"), arrays)
    package.save_file(arrays, tmp_path / "theirs", metadata={"k": "v"})
    metadata, tensors = tensorfile.read(tmp_path / "theirs")
    assert metadata == {"k": "v"}
    assert_same(tensors, arrays)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def with_entry(**change):
    return {"a": {**ENTRY, **change}}


@pytest.mark.parametrize("content, said", [
    (b"", "at least 8 bytes, got 0"),
    (b"1234567", "at least 8 bytes, got 7"),
    (struct.pack("<Q", 3) + b"{}", "header length: expected at most 2 bytes, got 3"),
    (struct.pack("<Q", 2**63) + b"{}", "header length: expected at most 2"),
    (safetensors(b"\xff\xfe"), "header: expected JSON in UTF-8"),
    (safetensors(b"{"), "header: expected JSON in UTF-8"),
    (safetensors(b"[" * 100_000), "header: expected JSON in UTF-8"),
    (safetensors(b'{"a":' + b"9" * 5000 + b"}"), "header: "),
    (safetensors([1]), "header: expected a JSON object"),
    (safetensors(b" {}"), "header: expected a JSON object from its first byte"),
    (safetensors(b'{"a":1,"a":2}'), "the key 'a' twice"),
    (safetensors(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"0"), "the key 'dtype' twice"),
    (safetensors({"__metadata__": []}), "__metadata__: expected strings by name"),
    (safetensors({"__metadata__": {"a": 1}}), "__metadata__: expected strings by name"),
    (safetensors({"a": 1}), "tensor 'a': expected dtype, shape and data_offsets"),
    (safetensors({"a": {"dtype": "F32", "shape": [0]}}), "tensor 'a': expected dtype, shape and data_offsets"),
    (safetensors(with_entry(more=1)), "tensor 'a': expected dtype, shape and data_offsets"),
    (safetensors(with_entry(dtype="F33"), bytes(8)), "tensor 'a': dtype: expected one of F64"),
    (safetensors(with_entry(dtype=["F32"]), bytes(8)), "tensor 'a': dtype: expected one of F64"),
    (safetensors(with_entry(shape=2), bytes(8)), "tensor 'a': shape: expected a list of non-negative"),
    (safetensors(with_entry(shape=[-2]), bytes(8)), "tensor 'a': shape: expected a list of non-negative"),
    (safetensors(with_entry(shape=[True, 2]), bytes(8)), "tensor 'a': shape: expected a list of non-negative"),
    (safetensors(with_entry(shape=[2.0]), bytes(8)), "tensor 'a': shape: expected a list of non-negative"),
    (safetensors(with_entry(data_offsets=[0]), bytes(8)), r"tensor 'a': data_offsets: expected \[begin, end\]"),
    (safetensors(with_entry(data_offsets=[8, 0]), bytes(8)), r"tensor 'a': data_offsets: expected \[begin, end\]"),
    (safetensors(with_entry(data_offsets=[-8, 0]), bytes(8)), r"tensor 'a': data_offsets: expected \[begin, end\]"),
    (safetensors(with_entry(shape=[3]), bytes(8)), "tensor 'a': data_offsets: expected 12 bytes for F32"),
    (safetensors(with_entry(shape=[2**40, 2**40]), bytes(8)), "tensor 'a': data_offsets: expected"),
    (safetensors(with_entry(), bytes(7)), "tensor 'a': data_offsets: .* truncated"),
    (safetensors(with_entry(data_offsets=[1, 9]), bytes(9)), "tensor 'a': data_offsets: expected to begin at 0"),
    (safetensors(with_entry() | {"b": ENTRY}, bytes(8)), "tensor 'b': data_offsets: expected to begin at 8"),
    (safetensors(with_entry() | {"b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)), "expected to begin at 8"),
    (safetensors(with_entry(), bytes(9)), "expected 8 bytes of data, got 9"),
    (safetensors({}, b"1"), "expected 0 bytes of data, got 1"),
])  # fmt: skip
def test_malformed_headers(tmp_path, content, said):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"bad.safetensors: .*{said}") as error:
        tensorfile.read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


def test_header_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "MAX_HEADER", 10)
    (tmp_path / "a").write_bytes(safetensors(with_entry(), bytes(8)))
    with pytest.raises(FileError, match="header length: expected at most 10 bytes, got "):
        tensorfile.read(tmp_path / "a")


def test_truncation_and_flips_raise_only_file_errors(tmp_path):
    path = tmp_path / "a.safetensors"
    tensorfile.write(path, all_dtypes(), {"key": "value"})
    good, rng, refused = path.read_bytes(), np.random.default_rng(1), 0
    header = 8 + struct.unpack("<Q", good[:8])[0]
    cases = [good[:n] for n in range(0, len(good), 7)]
    for _ in range(300):
        bad = bytearray(good)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        cases.append(bytes(bad))
    for case in cases:
        path.write_bytes(case)
        try:
            for array in tensorfile.read(path)[1].values():
                array.sum()
        except FileError:
            refused += 1
    assert refused > len(cases) / 2


@pytest.mark.parametrize("name, said", [("nothing", "No such file"), (".", "regular file"), ("pipe", "regular file")])
def test_what_is_no_file(tmp_path, name, said):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match=f"cannot be read: .*{said}"):
        tensorfile.read(tmp_path / name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_float_dtype_converts_floats_only(tmp_path, dtype):
    tensorfile.write(tmp_path / "a", {"f": np.float64([1, 2]), "h": np.float16([3]), "i": np.int8([4])}, {}, dtype)
    tensors = tensorfile.read(tmp_path / "a")[1]
    assert [tensors[n].dtype.name for n in "fhi"] == [dtype, dtype, "int8"] and tensors["f"].tolist() == [1, 2]


@pytest.mark.parametrize("array, dtype, said", [
    (np.float32([0, np.nan]), None, "expected finite values, got nan"),
    (np.float16([np.inf]), "float32", "expected finite values, got inf"),
    (np.float32([1, -70000]), "float16", "expected values within float16, got -70000.0"),
    (np.complex64([1]), None, "expected a dtype that safetensors knows, got complex64"),
])  # fmt: skip
def test_what_cannot_be_stored(tmp_path, array, dtype, said):
    with pytest.raises(FileError, match=f"tensor 'x': {said}"):
        tensorfile.write(tmp_path / "a", {"x": array}, {}, dtype)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(descriptor):
        assert [p.name != path.name for p in tmp_path.iterdir()].count(True) == 1  # the temporary file
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="a.safetensors: cannot be written: No space left on device"):
        tensorfile.write(path, all_dtypes(), {})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(n_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorfile.write(tmp_path / "a", all_dtypes(), {}, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_unwritable_folders(tmp_path):
    with pytest.raises(FileError, match="missing/a: cannot be written: No such file or directory"):
        tensorfile.write(tmp_path / "missing" / "a", {}, {})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match="file/a: cannot be written: Not a directory"):
        tensorfile.write(tmp_path / "file" / "a", {}, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder: cannot be written: expected a regular file"):
        tensorfile.write(tmp_path / "folder", {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_progress_counts_every_byte(tmp_path):
    seen = []
    tensorfile.write(tmp_path / "a", all_dtypes(), {}, progress=seen.append)
    assert sum(seen) == sum(a.nbytes for a in all_dtypes().values())


def test_lazy_tensors_are_made_one_by_one():
    made = []

    def make(name):
        return lambda: made.append(name) or np.zeros(2)

    tensors = tensorfile.LazyTensors({n: tensorfile.Entry((2,), np.dtype(float), make(n)) for n in "ab"})
    assert list(tensors) == ["a", "b"] and "a" in tensors and tensorfile.kind_of(tensors, "a")[0] == (2,)
    assert made == []
    assert tensors["b"].shape == (2,) and made == ["b"]


def test_show_is_short_and_on_one_line():
    bomb = [[]]
    for _ in range(60):  # 2**60 elements when written out
        bomb = [bomb, bomb]
    for value in ("x" * 1000, "a\nb\u2028c", bomb, {"k": bomb}, list(range(1000)), json.loads("[" * 50 + "]" * 50)):
        assert len(tensorfile.show(value)) <= 80 and tensorfile.show(value).isprintable()


def test_path_or_text(tmp_path):
    tensorfile.write(str(tmp_path / "a"), {"x": np.int8([1])}, {})
    assert tensorfile.read(str(Path(tmp_path) / "a"))[1]["x"].tolist() == [1]


def test_a_changed_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "whole.safetensors"
    tensorfile.write(path, {"a": np.arange(40, dtype=np.int16)}, {"note": "a model's scale is 0.5"})
    metadata, tensors = tensorfile.read(path)
    assert metadata == {"note": "a model's scale is 0.5"} and tensors["a"][39] == 39
    whole = path.read_bytes()
    for changed in (whole.replace(b"0.5", b"0.6"), whole[:-1] + b"\1", whole.replace(b"note", b"nota")):
        path.write_bytes(changed)
        with pytest.raises(FileError, match="whole.safetensors: expected the CRC-32 '.*', got .*: the file was alt"):
            tensorfile.read(path)
    for digits in ("zzzzzzzz", "", "\ud800"):
        changed = json.dumps({"__metadata__": {"crc32": digits}}).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed)
        with pytest.raises(FileError, match="expected the CRC-32"):
            tensorfile.read(path)


def test_a_link_stays_and_a_device_is_not_replaced(tmp_path):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    tensorfile.write(link, {"a": np.zeros(1, np.int8)}, {})
    assert link.is_symlink() and target.is_file()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe: cannot be written: expected a regular file in its place or none"):
        tensorfile.write(tmp_path / "pipe", {"a": np.zeros(1, np.int8)}, {})
    assert tmp_path.joinpath("pipe").is_fifo()
