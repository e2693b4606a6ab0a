"""Small random Whisper models in the layouts of others, written by hand: no torch, transformers or ctranslate2 needed.

A writer takes float32 tensors under openai/whisper's names and returns what a reader must find. The other layouts'
names are spelled out here a second time, on purpose.
"""
import json
import struct
import zipfile
from pathlib import Path

import numpy as np

from tests.toy import toy_model

VOCABULARY = [bytes([i]) for i in range(256)] + [b" t", b" a", "ä".encode(), b" ta", b"\n\n", b""]
DIMS = dict(n_mels=4, n_audio_ctx=6, n_audio_state=16, n_audio_head=4, n_audio_layer=2,
            n_vocab=len(VOCABULARY) + 1608, n_text_ctx=5, n_text_state=16, n_text_head=2, n_text_layer=1)
TOP = [("encoder.conv1", "encoder.conv1", "encoder/conv1"), ("encoder.conv2", "encoder.conv2", "encoder/conv2"),
       ("encoder.ln_post", "encoder.layer_norm", "encoder/layer_norm"),
       ("decoder.ln", "decoder.layer_norm", "decoder/layer_norm"),
       ("decoder.token_embedding", "decoder.embed_tokens", "decoder/embeddings")]
SELF = [("attn.query", "self_attn.q_proj", "self_attention/linear_0"),
        ("attn.key", "self_attn.k_proj", "self_attention/linear_0"),
        ("attn.value", "self_attn.v_proj", "self_attention/linear_0"),
        ("attn.out", "self_attn.out_proj", "self_attention/linear_1"),
        ("attn_ln", "self_attn_layer_norm", "self_attention/layer_norm"),
        ("mlp.0", "fc1", "ffn/linear_0"), ("mlp.2", "fc2", "ffn/linear_1"),
        ("mlp_ln", "final_layer_norm", "ffn/layer_norm")]
CROSS = [("cross_attn.query", "encoder_attn.q_proj", "attention/linear_0"),
         ("cross_attn.key", "encoder_attn.k_proj", "attention/linear_1"),
         ("cross_attn.value", "encoder_attn.v_proj", "attention/linear_1"),
         ("cross_attn.out", "encoder_attn.out_proj", "attention/linear_2"),
         ("cross_attn_ln", "encoder_attn_layer_norm", "attention/layer_norm")]


def random_model(**dims: int) -> tuple[dict, dict[str, np.ndarray]]:
    """-> dims, float32 tensors, without the vocabulary."""
    metadata, tensors = toy_model(**{**DIMS, **dims})
    del tensors["tokenizer.vocabulary"]
    return metadata["dims"], tensors


def modules(dims: dict) -> list[tuple[str, str, str]]:
    """Every linear, convolution, norm and embedding: our name, Hugging Face's, CTranslate2's variable."""
    found = list(TOP)
    for side, parts in (("encoder", SELF), ("decoder", SELF + CROSS)):
        for i in range(dims["n_audio_layer" if side == "encoder" else "n_text_layer"]):
            found += [(f"{side}.blocks.{i}.{ours}", f"{side}.layers.{i}.{theirs}", f"{side}/layer_{i}/{variable}")
                      for ours, theirs, variable in parts]
    return found


def stored(array: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 -> as stored in float32, float16 or bfloat16 (as u16), and what that is as a float."""
    if dtype == "bfloat16":
        bits = (array.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype), array.astype(dtype)


# --- torch.save ---


class Pickle:
    """Builds the pickle that torch.save makes of dicts and tensors, protocol 2, opcode by opcode."""

    KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}

    def __init__(self):
        self.storages = []

    def value(self, value: object) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(self.value(k) + self.value(v) for k, v in value.items()) + b"u"
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, tuple) and not isinstance(value[0], np.ndarray):
            return b"(" + b"".join(map(self.value, value)) + b"t"
        return self.tensor(*value)

    def tensor(self, array: np.ndarray, dtype: str, shape=None, strides=None, offset=0, numel=None) -> bytes:
        """array: the whole storage; shape, strides (elements) and offset: the tensor's view of it."""
        self.storages.append(array.tobytes())
        shape = array.shape if shape is None else shape
        strides = tuple(s // array.itemsize for s in array.strides) if strides is None else strides
        storage = (b"(" + self.value("storage") + b"ctorch\n" + self.KINDS[dtype].encode() + b"\n"
                   + self.value(str(len(self.storages) - 1)) + self.value("cpu")
                   + self.value(array.size if numel is None else numel) + b"tQ")
        return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + self.value(offset) + self.sizes(shape)
                + self.sizes(strides) + b"\x89ccollections\nOrderedDict\n)Rt" + b"R")

    def sizes(self, sizes: tuple) -> bytes:
        return b"(" + b"".join(self.value(int(n)) for n in sizes) + b"t"


def write_zip(path: Path, pickle: bytes, storages: list[bytes] = (), byteorder: bytes | None = b"little",
              compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", pickle)
        if byteorder is not None:
            archive.writestr("model/byteorder", byteorder)
        for key, data in enumerate(storages):
            archive.writestr(f"model/data/{key}", data)
        archive.writestr("model/version", b"3\n")
    return path


def write_pt(path: Path, dims: dict, tensors: dict[str, np.ndarray], dtype: str = "float16") -> dict[str, np.ndarray]:
    found = {name: stored(array, dtype) for name, array in tensors.items()}
    pickle = Pickle()
    state = {name: (raw, dtype) for name, (raw, _) in found.items()}
    write_zip(path, b"\x80\x02" + pickle.value({"dims": dims, "model_state_dict": state}) + b".", pickle.storages)
    return {name: value for name, (_, value) in found.items()}


# --- safetensors and Hugging Face ---

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def safetensors(header: object, data: bytes = b"") -> bytes:
    """The container by hand: header may be anything that JSON can say, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_huggingface(folder: Path, dims: dict, tensors: dict[str, np.ndarray], dtype: str = "float16", shards: int = 1,
                      prefix: str = "model.", suffix: str = "safetensors") -> dict[str, np.ndarray]:
    """With the prefix comes proj_out.weight, which some files repeat."""
    folder.mkdir(exist_ok=True)
    named = {f"{prefix}{theirs}{leaf}": tensors[ours + leaf] for ours, theirs, _ in modules(dims)
             for leaf in (".weight", ".bias") if ours + leaf in tensors}
    for side in ("encoder", "decoder"):
        named[f"{prefix}{side}.embed_positions.weight"] = tensors[f"{side}.positional_embedding"]
    if prefix:
        named["proj_out.weight"] = tensors["decoder.token_embedding.weight"]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}.{suffix}"] if shards == 1 else [f"{stem}-{i + 1}-of-{shards}.{suffix}" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(named)}
    for name in names:
        write_shard(folder / name, {k: stored(named[k], dtype)[0] for k in named if weight_map[k] == name}, dtype)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "whisper", "d_model": dims["n_text_state"], "encoder_layers": dims["n_audio_layer"],
              "encoder_attention_heads": dims["n_audio_head"], "decoder_attention_heads": dims["n_text_head"],
              "vocab_size": dims["n_vocab"], "num_mel_bins": dims["n_mels"], "activation_function": "gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json")
    return {name: stored(array, dtype)[1] for name, array in tensors.items()}


def write_shard(path: Path, named: dict[str, np.ndarray], dtype: str) -> None:
    """Arrays as stored() makes them -> a .safetensors or .bin file."""
    if path.suffix == ".bin":
        pickle = Pickle()
        body = pickle.value({name: (array, dtype) for name, array in named.items()})
        write_zip(path, b"\x80\x02" + body + b".", pickle.storages)
        return
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in named.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": CODES[dtype], "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    path.write_bytes(safetensors(header, data))


PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [i for i in range(256) if i not in PLAIN]


def spelled(token: bytes) -> str:
    """GPT-2's printable spelling of bytes."""
    return "".join(chr(i) if i in PLAIN else chr(256 + OTHERS.index(i)) for i in token)


def write_tokenizer(path: Path, merges: list | None = None) -> None:
    ids = {spelled(token): i for i, token in enumerate(VOCABULARY)}
    space, a, umlaut = spelled(b" "), spelled(b"\xc3"), spelled(b"\xa4")
    merges = [f"{space} t", f"{space} a", [a, umlaut]] if merges is None else merges  # both spellings are in use
    added = [{"id": len(VOCABULARY) + i, "content": text} for i, text in enumerate(("<|endoftext|>", "<|en|>"))]
    path.write_text(json.dumps({"added_tokens": added, "model": {"vocab": ids, "merges": merges}}))


# --- CTranslate2 ---


def write_ctranslate2(folder: Path, dims: dict, tensors: dict[str, np.ndarray], kind: str = "float16", version: int = 6,
                      vocabulary: str | None = "vocabulary.json", change=None) -> dict[str, np.ndarray]:
    """kind: float32, float16, bfloat16, int8 (the rest float32), int8_float16, int16. change(variables, aliases)."""
    folder.mkdir(exist_ok=True)
    rest = "float32" if kind in ("int8", "int16") else kind.removeprefix("int8_")
    variables = {"encoder/num_heads": np.int16(dims["n_audio_head"]), "decoder/activation": np.int8(3),
                 "decoder/num_heads": np.int16(dims["n_text_head"])}
    expected = {}
    for variable, parts in _fused(dims, tensors).items():
        array = np.concatenate(list(parts.values()))
        if kind.startswith("int") and variable.endswith("/weight"):
            variables[variable], variables[f"{variable}_scale"], value = _quantized(array, kind)
        else:
            variables[variable], value = stored(array, rest)
        ends = np.cumsum([len(part) for part in parts.values()])
        expected |= dict(zip(parts, np.split(value, ends[:-1]), strict=True))
    aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}
    if change:
        change(variables, aliases)
    (folder / "model.bin").write_bytes(model_bin(variables, aliases, version))
    config = {"alignment_heads": [[0, 1]], "suppress_ids": [1, 2, 260], "lang_ids": []}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = [spelled(token) for token in VOCABULARY] + ["<|endoftext|>", "<|startoftranscript|>", "<|en|>"]
    if vocabulary == "tokenizer.json":
        write_tokenizer(folder / vocabulary)
    elif vocabulary:
        text = json.dumps(tokens) if vocabulary.endswith(".json") else "\n".join(tokens) + "\n"
        (folder / vocabulary).write_text(text, "utf-8")
    return {name: expected[name] for name in tensors}


def _fused(dims: dict, tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Variable -> our tensors whose rows it holds, in order. The keys get a bias, which must not matter."""
    parts = {}
    for side in ("encoder", "decoder"):
        name = f"{side}.positional_embedding"
        parts[f"{side}/position_encodings/encodings"] = {name: tensors[name]}
    for ours, _, variable in modules(dims):
        weight, bias = ("/gamma", "/beta") if "layer_norm" in variable else ("/weight", "/bias")
        parts.setdefault(variable + weight, {})[f"{ours}.weight"] = tensors[f"{ours}.weight"]
        if ours != "decoder.token_embedding":
            unused = np.full(dims["n_text_state"], 7, np.float32)
            parts.setdefault(variable + bias, {})[f"{ours}.bias"] = tensors.get(f"{ours}.bias", unused)
    return parts


def _quantized(array: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> integers, scale (they are array * scale), and their value."""
    flat = array.reshape(len(array), -1)
    if kind == "int16":
        scale = np.float32(1024 / np.abs(flat).max())
        q = np.rint(flat * scale).astype(np.int16)
    else:
        scale = (127 / np.abs(flat).max(1)).astype(np.float32)
        q = np.rint(flat * scale[:, None]).astype(np.int8)
    value = (q / (scale if kind == "int16" else scale[:, None])).astype(np.float32)
    return q.reshape(array.shape), scale, value.reshape(array.shape)


def model_bin(variables: dict[str, np.ndarray], aliases: dict[str, str], version: int = 6,
              specification: str = "WhisperSpec") -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value.encode()) + 1) + value.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "uint16": 5}
    out = struct.pack("<I", version) + text(specification) + struct.pack("<II", 3, len(variables))
    for name, array in sorted(variables.items()):
        shape = np.shape(array)
        out += text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
        out += struct.pack("<BI", kinds[array.dtype.name], array.nbytes) + array.tobytes()
    return out + struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases.items())
