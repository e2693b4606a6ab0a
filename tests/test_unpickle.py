"""torch.save's files: every element type, views, and that nothing in a hostile file is executed."""

import copyreg
import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest

from minigate import unpickle
from minigate.errors import FileError
from tests.layouts import Pickle, stored, write_zip

X = np.arange(24, dtype=np.float32).reshape(4, 6)


def write(path, body: bytes, builder: Pickle | None = None, **options):
    return write_zip(path, b"\x80\x02" + body + b".", builder.storages if builder else [], **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_of_every_float_type(tmp_path, dtype):
    raw, value = stored(np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4), dtype)
    builder = Pickle()
    path = write(tmp_path / "a.pt", builder.value({"x": (raw, dtype), "n": 5}), builder)
    content = unpickle.read(path)
    tensor = content["x"]
    assert content["n"] == 5 and tensor.shape == (2, 3, 4) and tensor.dtype == tensor.array().dtype == value.dtype
    np.testing.assert_array_equal(tensor.array(), value)
    assert dtype == "bfloat16" or not tensor.array().flags.writeable


@pytest.mark.parametrize("view, expected", [
    (dict(shape=(6, 4), strides=(1, 6)), X.T),
    (dict(shape=(2, 3), strides=(6, 2), offset=7), X[1:3, 1::2]),
    (dict(shape=(), strides=(), offset=23), X[3, 5]),
    (dict(shape=(0, 6), strides=(6, 1)), X[:0]),
    (dict(shape=(3,), strides=(0,), offset=4), np.full(3, 4, np.float32)),
])  # fmt: skip
def test_strided_views(tmp_path, view, expected):
    builder = Pickle()
    path = write(tmp_path / "a.pt", builder.tensor(X, "float32", **view), builder)
    np.testing.assert_array_equal(unpickle.read(path).array(), expected)


@pytest.mark.parametrize("view", [
    dict(shape=(25,), strides=(1,)),
    dict(shape=(4,), strides=(8,)),
    dict(shape=(4, 6), strides=(6, 1), offset=1),
    dict(shape=(1,), strides=(1,), offset=24),
    dict(shape=(0,), strides=(1,), offset=25),
    dict(shape=(1 << 30, 1 << 30), strides=(0, 0)),
    dict(shape=(-1,), strides=(1,)),
    dict(shape=(2,), strides=(-1,), offset=5),
    dict(shape=(2,), strides=(1,), offset=-1),
    dict(shape=(2, 2), strides=(1,)),
])  # fmt: skip
def test_views_outside_their_storage(tmp_path, view):
    builder = Pickle()
    path = write(tmp_path / "a.pt", builder.tensor(X, "float32", **view), builder)
    with pytest.raises(FileError, match="a.pt: data.pkl: tensor: expected"):
        unpickle.read(path)


def test_a_storage_shared_by_two_tensors_and_a_state_dict_with_metadata(tmp_path):
    builder = Pickle()
    tensor = builder.tensor(X, "float32")
    body = (b"ccollections\nOrderedDict\n)R(" + builder.value("a") + tensor + b"q\x05" + builder.value("b") + b"h\x05u"
            + b"}" + builder.value("_metadata") + b"ccollections\nOrderedDict\n)Rsb")
    content = unpickle.read(write(tmp_path / "a.pt", body, builder, byteorder=None))
    assert list(content) == ["a", "b"] and content["a"] is content["b"]


def test_parameters_lists_and_later_protocols(tmp_path):
    builder = Pickle()
    tensor, hooks = builder.tensor(X, "float32"), b"ccollections\nOrderedDict\n)R"
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x88" + hooks + b"tR"
    content = unpickle.read(write(tmp_path / "a.pt", b"](" + parameter + b"e", builder))
    np.testing.assert_array_equal(content[0].array(), X)
    tuples = [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    plain = {"a": [1, -5, 2**40, 2.5, None, True, False, *tuples], "é": {}, "x": "x" * 300}
    for protocol in (2, 3, 4, 5):
        assert unpickle.read(write_zip(tmp_path / "b.pt", pickle.dumps(plain, protocol))) == plain


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker) -> dict[str, bytes]:
    """Pickles that would make the file marker, or import the module boobytrap, which makes it too."""
    command, source = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    found = {f"{name} {protocol}": pickle.dumps({"dims": Call(function, argument)}, protocol)
             for protocol in range(6)
             for name, function, argument in (("system", os.system, command), ("eval", eval, source),
                                              ("exec", exec, source))}
    return found | {
        "nested": pickle.dumps([{"a": (1, [Call(os.system, command)])}], 2),
        "argument": pickle.dumps(Call(dict, Call(os.system, command)), 2),
        "import": b"\x80\x02cboobytrap\nanything\n.",
        "stack global": b"\x80\x04\x8c\x09boobytrap\x8c\x08anything\x93.",
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n(" + text + b"t\x81.",
        "newobj_ex": b"\x80\x04cos\nsystem\n(" + text + b"t}\x92.",
        "ext1": b"\x80\x02\x82\x07(" + text + b"tR.",
        "ext2": b"\x80\x02\x83\x07\x00(" + text + b"tR.",
        "ext4": b"\x80\x02\x84\x07\x00\x00\x00(" + text + b"tR.",
        "storage": b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\n" + 2 * b"X\x01\x00\x00\x000" + b"K\x00tQ.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x12_utils.os.system.x\x93(" + text + b"tR.",
        "dict subclass": b"\x80\x02ccollections\nOrderedDict\n(" + text + b"tR.",
        "new of allowed": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "build on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        "reduce of a string": b"\x80\x02X\x09\x00\x00\x00os system(" + text + b"tR.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
        "persistent text": b"Pos.system\n.",
    }


@pytest.fixture
def trap(tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    (tmp_path / "boobytrap.py").write_text(f"open({str(marker)!r}, 'w')\nanything = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    copyreg.add_extension("boobytrap", "anything", 7)
    yield marker
    copyreg.remove_extension("boobytrap", "anything", 7)


def test_nothing_is_executed(tmp_path, trap):
    pickle.loads(hostile(trap)["ext1"][:4] + b".")  # the trap works: pickle itself imports what the extension names
    assert trap.exists() and sys.modules.pop("boobytrap")
    trap.unlink()
    for name, body in hostile(trap).items():
        path = write_zip(tmp_path / "bad.pt", body)
        with pytest.raises(FileError, match="bad.pt: data.pkl: expected") as error:
            unpickle.read(path)
        assert not trap.exists() and "boobytrap" not in sys.modules, name
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, said", [
    ("system 2", "forbidden global 'posix system'"),
    ("system 4", "forbidden global 'posix system'"),
    ("eval 2", "forbidden global '__builtin__ eval'"),
    ("inst", "got INST 'os system'|got STRING"),
    ("import", "forbidden global 'boobytrap anything'"),
    ("stack global", "forbidden global 'boobytrap anything'"),
    ("getattr", "forbidden global 'builtins getattr'"),
    ("ext1", "got EXT1 7"),
    ("new of allowed", "got NEWOBJ"),
    ("build on a function", "expected a dict, got a Global"),
    ("reduce of a string", "expected a Global, got a str"),
    ("dict subclass", "got a call of collections OrderedDict with 1 arguments"),
])  # fmt: skip
def test_the_forbidden_thing_is_named(tmp_path, trap, name, said):
    with pytest.raises(FileError, match=said):
        unpickle.read(write_zip(tmp_path / "bad.pt", hostile(trap)[name]))


def test_memory_bombs_are_cheap(tmp_path):
    huge_memo = b"\x80\x02}r\xff\xff\xff\x7f."
    assert unpickle.read(write_zip(tmp_path / "a.pt", huge_memo)) == {}
    doubling = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"."
    unpickle.read(write_zip(tmp_path / "b.pt", doubling))
    for body in (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", b"\x80\x02\x8b\xff\xff\xff\x7f."):  # lengths beyond the end
        with pytest.raises(FileError):
            unpickle.read(write_zip(tmp_path / "c.pt", body))


@pytest.mark.parametrize("body", [b"", b".", b"\x80\x02", b"\x80\x02}",
                                  b"\x80\x02h\x05.", b"\x80\x02t.", b"\x80\x02}(K\x01u.",
                                  b"\x80\x02}]K\x01s.", b"\x80\x02)K\x01a.", b"\x80\x02R.", b"\xff"])
def test_damaged_pickles(tmp_path, body):
    path = write_zip(tmp_path / "bad.pt", body)
    with pytest.raises(FileError, match="bad.pt: data.pkl: expected"):
        unpickle.read(path)


def test_bad_zip_files(tmp_path):
    path = tmp_path / "bad.pt"
    builder = Pickle()
    body = builder.tensor(X, "float32")
    for options, said in ((dict(byteorder=b"big"), "byteorder: expected little, got b'big'"),
                          (dict(compression=zipfile.ZIP_DEFLATED), "without compression")):
        write(path, body, builder, **options)
        with pytest.raises(FileError, match=f"bad.pt: .*{said}"):
            unpickle.read(path)
    write(path, body)
    with pytest.raises(FileError, match="expected the member 'model/data/0', got none"):
        unpickle.read(path)
    write(path, builder.tensor(X, "float32", numel=23), builder)
    with pytest.raises(FileError, match="storage '1': expected 23 elements, got 24"):
        unpickle.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(FileError, match="expected a zip file with one NAME/data.pkl, got 0"):
        unpickle.read(path)
    path.write_bytes(b"PK\3\4 and nothing more")
    with pytest.raises(FileError, match="expected a zip file as torch.save writes it"):
        unpickle.read(path)


def test_an_altered_weight_is_noticed(tmp_path):
    builder = Pickle()
    path = write(tmp_path / "a.pt", builder.tensor(X, "float32"), builder)
    data = bytearray(path.read_bytes())
    data[data.index(X.tobytes()) + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="model/data/0': expected 96 bytes with checksum .* altered"):
        unpickle.read(path)


def test_truncation_and_flips_raise_only_file_errors(tmp_path):
    builder = Pickle()
    content = {"x": (X, "float32"), "y": (X, "float32"), "n": {"a": 1}}
    path = write(tmp_path / "a.pt", builder.value(content), builder)
    good, rng, refused = path.read_bytes(), np.random.default_rng(3), 0
    body = zipfile.ZipFile(path).read("model/data.pkl")
    cases = [good[:n] for n in range(0, len(good), 11)]
    for i in range(500):
        bad = bytearray(body if i % 2 else good)
        for at in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        cases.append(bytes(write_zip(path, bytes(bad), builder.storages).read_bytes() if i % 2 else bad))
    for case in cases:
        path.write_bytes(case)
        try:
            content = unpickle.read(path)
            for value in content.values() if isinstance(content, dict) else ():
                if isinstance(value, unpickle.Tensor):
                    value.array().sum()
        except FileError:
            refused += 1
    assert refused > len(cases) * 0.6


def test_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    for dtype in ("float32", "float16", "bfloat16", "int64", "uint8", "bool"):
        base = torch.from_numpy(rng.integers(0, 2 if dtype == "bool" else 100, (4, 6))).to(getattr(torch, dtype))
        module = torch.nn.Linear(3, 2)
        view = base[1:, ::2].T
        torch.save({"a": base, "b": view, "state": module.state_dict(), "w": module.weight}, tmp_path / "a.pt")
        content = unpickle.read(tmp_path / "a.pt")
        for name, tensor in (("a", base), ("b", view)):
            expected = tensor.float().numpy() if dtype == "bfloat16" else tensor.numpy()
            np.testing.assert_array_equal(content[name].array(), expected)
        np.testing.assert_array_equal(content["state"]["weight"].array(), module.weight.detach().numpy())
        np.testing.assert_array_equal(content["w"].array(), module.weight.detach().numpy())
