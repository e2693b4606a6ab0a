"""Whisper as others store it -> dims, tensors with openai/whisper's names, vocabulary.

In: an OpenAI .pt file, a Hugging Face folder (config.json, and model.safetensors or pytorch_model.bin, sharded or not),
a CTranslate2 folder (model.bin), or a float model file of our own. Out: a Source, whose tensors have the shapes that
its dims demand and are made one by one when asked for. Nothing in the files is executed.
"""
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minigate import checkpoint, ctranslate2, foldervocab, tensorfile, unpickle
from minigate.errors import FileError
from minigate.official import ALIGNMENT_HEADS, official_name, official_vocabulary
from minigate.tensorfile import Entry, LazyTensors, show
from minigate.tokenizer import Tokenizer, unpack_vocabulary

HEAD_SIZE = 64  # channels of a head in every Whisper model, where a file does not say how many heads there are
HUGGINGFACE = {"layers": "blocks", "fc1": "mlp.0", "fc2": "mlp.2", "self_attn": "attn", "encoder_attn": "cross_attn",
               "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out", "final_layer_norm": "mlp_ln",
               "self_attn_layer_norm": "attn_ln", "encoder_attn_layer_norm": "cross_attn_ln",
               "embed_tokens": "token_embedding"}  # part of a name there -> part of openai/whisper's name
WHOLE = {"encoder.layer_norm": "encoder.ln_post", "decoder.layer_norm": "decoder.ln",
         ".embed_positions.weight": ".positional_embedding"}
CONFIG = {"num_mel_bins": "n_mels", "d_model": "n_text_state", "encoder_layers": "n_audio_layer",
          "decoder_layers": "n_text_layer", "vocab_size": "n_vocab", "max_source_positions": "n_audio_ctx",
          "max_target_positions": "n_text_ctx"}  # config.json must agree with the tensors
EMBEDDING, OUTPUT = "decoder.token_embedding.weight", "proj_out.weight"  # the latter is the former once more


@dataclass(frozen=True)
class Source:
    """A model that has been read."""
    dims: dict[str, int]
    tensors: LazyTensors  # float32 or float16
    vocabulary: list[bytes]  # ordinary tokens in rank order
    alignment_heads: list[list[int]] | None
    suppress_tokens: list[int] | None
    kind: str  # openai, huggingface, ctranslate2 or minigate
    files: list[Path]  # where the weights are
    gate: dict = field(default_factory=lambda: {"kind": "none"})
    audio_context: str = "full"
    provenance: dict | None = None  # of a model file of our own


def read_any(src: str | Path) -> Source:
    """File or folder -> Source; the kind is found out from the content. Raises FileError naming what is wrong."""
    path = Path(src)
    if not os.path.exists(path):
        raise FileError(f"{path}: expected a file or folder, got nothing there")
    if path.is_dir():
        if (path / "model.bin").is_file():
            return _read_ctranslate2(path)
        if files := _huggingface_files(path):
            return _read_huggingface(path, files)
        raise FileError(f"{path}: expected a folder with model.safetensors, pytorch_model.bin or model.bin, got none")
    if tensorfile.map_file(path)[:4].tobytes() == b"PK\3\4":
        return _read_openai(path)
    if path.suffix == ".safetensors":
        return _read_own(path)
    raise FileError(f"{path}: expected an OpenAI .pt file (zip), a .safetensors model of minigate, or the folder of a "
                    "Hugging Face or CTranslate2 model")


def _read_openai(path: Path) -> Source:
    content = unpickle.read(path)
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise FileError(f"{path}: expected an OpenAI checkpoint with dims and model_state_dict, got "
                        f"{show(list(content) if isinstance(content, dict) else type(content).__name__)}")
    dims = content.get("dims")
    checkpoint.check_dims(path, dims)
    entries = _torch_entries(path, content["model_state_dict"])
    return _finish(path, "openai", [path], dims, entries, None, {}, path.stem)


def _torch_entries(path: Path, state: dict) -> dict[str, Entry]:
    """A state dict of torch -> entries."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, unpickle.Tensor):
            raise FileError(f"{path}: {show(name)}: expected a tensor, got a {type(tensor).__name__}")
    return {name: Entry(tensor.shape, tensor.dtype, tensor.array) for name, tensor in state.items()}


def _huggingface_files(folder: Path) -> list[Path]:
    """The files with the weights, in order; none where this is no Hugging Face folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            shards = _json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(
                    isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()):
                raise FileError(f"{index}: weight_map: expected names of files in this folder, got {show(shards)}")
            return [folder / shard for shard in sorted(set(shards.values()))]
    return []


def _read_huggingface(folder: Path, files: list[Path]) -> Source:
    config = _json(folder / "config.json")
    for key, value in (("model_type", "whisper"), ("activation_function", "gelu"), ("scale_embedding", False)):
        if config.get(key, value) != value:
            raise FileError(f"{folder / 'config.json'}: {key}: expected {value}, got {show(config[key])}")
    entries = {}
    for path in files:
        found = tensorfile.read(path)[1].entries if path.suffix == ".safetensors" else _torch_entries(
            path, _dict(path, unpickle.read(path)))
        for name, entry in found.items():
            if entries.setdefault(_openai_name(name), entry) is not entry:
                raise FileError(f"{path}: tensor {show(name)}: expected once in all files, got it twice")
    output = entries.pop(OUTPUT, None)
    if output and EMBEDDING in entries and not np.array_equal(output.make(), entries[EMBEDDING].make()):
        raise FileError(f"{folder}: tensor {OUTPUT}: expected the token embedding's values, got others")
    dims = _dims(folder, entries, config.get("encoder_attention_heads"), config.get("decoder_attention_heads"))
    for key, dim in CONFIG.items():
        if config.get(key, dims[dim]) != dims[dim]:
            raise FileError(f"{folder / 'config.json'}: {key}: expected {dims[dim]} like the tensors, "
                            f"got {show(config[key])}")
    generation = folder / "generation_config.json"
    settings = config | (_json(generation) if generation.is_file() else {})
    return _finish(folder, "huggingface", files, dims, entries, foldervocab.read(folder), settings,
                   f"{folder.absolute().name} {config.get('_name_or_path')}")


def _openai_name(name: str) -> str:
    """model.decoder.layers.0.encoder_attn.q_proj.weight -> decoder.blocks.0.cross_attn.query.weight"""
    name = ".".join(HUGGINGFACE.get(part, part) for part in name.removeprefix("model.").split("."))
    for theirs, ours in WHOLE.items():
        name = name.replace(theirs, ours)
    return name


def _read_ctranslate2(folder: Path) -> Source:
    path = folder / "model.bin"
    tensors, scalars = ctranslate2.read(path)
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    dims = _dims(path, tensors.entries, scalars.get("encoder/num_heads"), scalars.get("decoder/num_heads"))
    settings = {"alignment_heads": config.get("alignment_heads"), "suppress_tokens": config.get("suppress_ids")}
    return _finish(path, "ctranslate2", [path], dims, tensors.entries, foldervocab.read(folder), settings,
                   folder.absolute().name)


def _read_own(path: Path) -> Source:
    if tensorfile.read(path)[0].get("format") != "minigate":
        raise FileError(f"{path}: expected a model file of minigate; of a Hugging Face model give the folder")
    model = checkpoint.read(path)
    meta, entries = model.metadata, dict(model.tensors.entries)
    if meta["quantization"]:
        raise FileError(f"{path}: expected a float model, got one quantized as {meta['quantization']['scheme']}")
    vocabulary = unpack_vocabulary(entries.pop(checkpoint.VOCABULARY).make())
    return Source(meta["dims"], LazyTensors(entries), vocabulary, meta["alignment_heads"], meta["suppress_tokens"],
                  "minigate", [path], meta["gate"], meta["audio_context"], meta["provenance"])


def _dims(where: Path, entries: Mapping[str, Entry], audio_heads: int | None, text_heads: int | None) -> dict[str, int]:
    """The dims that the tensors' shapes imply."""
    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in entries or len(entries[name].shape) != rank:
            raise FileError(f"{where}: tensor {name}: expected {rank} dimensions, got "
                            f"{entries[name].shape if name in entries else 'no such tensor'}")
        return entries[name].shape

    def layers(side: str) -> int:
        return next(i for i in range(len(entries) + 1) if f"{side}.blocks.{i}.mlp.0.weight" not in entries)

    n_state, n_mels, _ = shape("encoder.conv1.weight", 3)
    n_vocab, n_text_state = shape(EMBEDDING, 2)
    dims = {"n_mels": n_mels, "n_audio_ctx": shape("encoder.positional_embedding", 2)[0], "n_audio_state": n_state,
            "n_audio_head": n_state // HEAD_SIZE if audio_heads is None else audio_heads,
            "n_audio_layer": layers("encoder"), "n_vocab": n_vocab,
            "n_text_ctx": shape("decoder.positional_embedding", 2)[0], "n_text_state": n_text_state,
            "n_text_head": n_text_state // HEAD_SIZE if text_heads is None else text_heads,
            "n_text_layer": layers("decoder")}
    checkpoint.check_dims(where, dims)
    return dims


def _finish(where: Path, kind: str, files: list[Path], dims: dict[str, int], entries: Mapping[str, Entry],
            vocabulary: list[bytes] | None, settings: Mapping, hint: str) -> Source:
    """Check the tensors, put them into openai/whisper's order, fill in what the source does not say."""
    shapes = checkpoint.tensor_shapes(dims)
    checkpoint.check_tensors(where, LazyTensors(entries), {name: (shape, "float") for name, shape in shapes.items()})
    heads, suppressed = _alignment_heads(dims, settings.get("alignment_heads"), hint), settings.get("suppress_tokens")
    checkpoint.check_metadata(where, checkpoint.make_metadata("", dims, {}, alignment_heads=heads,
                                                              suppress_tokens=suppressed))
    try:
        vocabulary = vocabulary or official_vocabulary(dims["n_vocab"])
        Tokenizer(vocabulary, dims["n_vocab"])  # do they fit?
    except FileError as error:
        raise FileError(f"{where}: {error}") from None
    tensors = LazyTensors({name: entries[name] for name in shapes})
    return Source(dims, tensors, vocabulary, heads, suppressed, kind, files)


def _alignment_heads(dims: dict[str, int], heads: object, hint: str) -> object:
    """The source's heads, or the official ones. Distil models came with their teachers' heads, which are of no use."""
    if heads is None:
        return ALIGNMENT_HEADS.get(official_name(dims, hint))
    try:
        fit = all(layer < dims["n_text_layer"] and head < dims["n_text_head"] for layer, head in heads)
    except (TypeError, ValueError):
        return heads  # no list of pairs: an error for check_metadata
    return heads if fit else None


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path}: expected a JSON file, got {show(reason)}") from None
    return _dict(path, content)


def _dict(where: Path, value: object) -> dict:
    if not isinstance(value, dict):
        raise FileError(f"{where}: expected names and values, got a {type(value).__name__}")
    return value
