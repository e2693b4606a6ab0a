"""Whisper's encoder and decoder: log-mel in, logits out. The network is written here once, for every arithmetic
(and the decoder's blocks once more in csrc/decoder.c and staticdecoder.c, for speed: `in_one_call`).

`encoder` and `decoder` are lists of calls to a small set of coarse operators (`ops`), which know the parameters by
name and decide in which numbers to compute: `ops.Float` in float32, the others (OPERATORS) on int8 weights. Activations
are opaque here: what one operator returns is only ever given to another.

B batch (rows), T time, D n_state, V n_vocab. Time is the second axis throughout: x (B, T, D).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from minigate import checkpoint, int8, kernels
from minigate.errors import FileError
from minigate.heard_kernels import Heard
from minigate.ops import Float
from minigate.static import Static
from minigate.tokenizer import Tokenizer, unpack_vocabulary

DEFAULT_MODEL = "tiny.en-w8a8-dynamic"
FIRST_MULTILINGUAL_VOCAB = 51865
OPERATORS = {None: Float, "w8a8-dynamic": int8.Dynamic, "w8a8-static": Static, "w8": int8.WeightOnly}  # by scheme
FOREIGN = (".pt", ".bin")  # models in other layouts, which convert reads


@dataclass(frozen=True)
class Dims:
    """Sizes, named as in openai/whisper."""

    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_vocab: int
    n_text_ctx: int
    n_text_state: int
    n_text_head: int
    n_text_layer: int


# --- the network: coarse operators in the order the data meets them ---


def encoder(ops, dims: Dims, mel: np.ndarray):
    """mel (B, n_mels, T_mel) -> xa (B, T_mel / 2, D)."""
    x = ops.conv("encoder.conv1", mel.transpose(0, 2, 1), stride=1)
    x = ops.conv("encoder.conv2", x, stride=2)
    x = ops.add_positions("encoder.positional_embedding", x)
    for i in range(dims.n_audio_layer):
        block = f"encoder.blocks.{i}"
        x = self_attention(ops, block, x, dims.n_audio_head)
        x = mlp(ops, block, x)
    return ops.values(ops.norm("encoder.ln_post", x))


def cross_keys_values(ops, dims: Dims, xa: np.ndarray) -> list[tuple]:
    """xa (B, T_audio, D) -> k, v (B, T_audio, D) for each layer of the decoder."""
    h = ops.rows(xa)
    modules = [f"decoder.blocks.{i}.cross_attn" for i in range(dims.n_text_layer)]
    return [(ops.linear(f"{m}.key", h), ops.linear(f"{m}.value", h)) for m in modules]


def decoder(ops, dims: Dims, tokens: np.ndarray, cache: "Cache", in_one_call: Callable | None = None):
    """tokens (B, T) -> x (B, T, D) before the final layer norm; the cache grows by T positions.

    in_one_call: what does the same as `decoder_blocks`, where there is such a thing (`ops.in_one_call`)."""
    x = ops.embed(tokens, cache.length)
    x = in_one_call(x, cache) if in_one_call else decoder_blocks(ops, dims, x, cache)
    cache.length += tokens.shape[1]
    return x


def decoder_blocks(ops, dims: Dims, x, cache: "Cache"):
    """x (B, T, D), embedded -> x (B, T, D), T positions more in the cache."""
    for i in range(dims.n_text_layer):
        block = f"decoder.blocks.{i}"
        x = self_attention(ops, block, x, dims.n_text_head, cache=cache, layer=i)
        x = cross_attention(ops, block, x, dims.n_text_head, *cache.cross[i])
        x = mlp(ops, block, x)
    return x


def self_attention(ops, block: str, x, n_head: int, cache: "Cache | None" = None, layer: int = 0):
    """x + out(attention(attn_ln(x))); causal where there is a cache."""
    h = ops.norm(f"{block}.attn_ln", x)
    q = ops.linear(f"{block}.attn.query", h)
    k = ops.linear(f"{block}.attn.key", h)
    v = ops.linear(f"{block}.attn.value", h)
    if cache is not None:
        k, v = cache.extend(layer, k, v)
    a = ops.attention(f"{block}.attn", q, k, v, h, n_head, causal=cache is not None)
    return ops.linear(f"{block}.attn.out", a, residual=x)


def cross_attention(ops, block: str, x, n_head: int, k, v):
    """x + out(attention to the encoder's keys and values)."""
    h = ops.norm(f"{block}.cross_attn_ln", x)
    q = ops.linear(f"{block}.cross_attn.query", h)
    a = ops.attention(f"{block}.cross_attn", q, k, v, h, n_head, causal=False)
    return ops.linear(f"{block}.cross_attn.out", a, residual=x)


def mlp(ops, block: str, x):
    """x + mlp.2(gelu(mlp.0(mlp_ln(x))))."""
    h = ops.norm(f"{block}.mlp_ln", x)
    h = ops.linear(f"{block}.mlp.0", h, gelu=True)
    return ops.linear(f"{block}.mlp.2", h, residual=x)


# --- the same lists reversed: from the gradient of a forward's result, dx (B, T, D), to that of its input ---


def encoder_backward(ops, dims: Dims, dxa: np.ndarray) -> None:
    """dxa (B, T_mel / 2, D). The positions are constants."""
    dx = ops.norm_backward("encoder.ln_post", dxa)
    for i in reversed(range(dims.n_audio_layer)):
        block = f"encoder.blocks.{i}"
        dx = mlp_backward(ops, block, dx)
        dx = self_attention_backward(ops, block, dx)
    dx = ops.conv_backward("encoder.conv2", dx)
    ops.conv_backward("encoder.conv1", dx, dx_wanted=False)


def cross_keys_values_backward(ops, dims: Dims, dcross: list[tuple]) -> np.ndarray:
    """The gradients of k, v for each layer -> dxa (B, T_audio, D), summed over the layers."""
    dxa = 0
    for i in reversed(range(dims.n_text_layer)):
        module, (dk, dv) = f"decoder.blocks.{i}.cross_attn", dcross[i]
        dxa = dxa + ops.linear_backward(f"{module}.value", dv)[0]
        dxa = dxa + ops.linear_backward(f"{module}.key", dk)[0]
    return dxa


def decoder_backward(ops, dims: Dims, dx: np.ndarray) -> list[tuple]:
    """dx (B, T, D) -> the gradients of the cross k, v for each layer."""
    dcross = []
    for i in reversed(range(dims.n_text_layer)):
        block = f"decoder.blocks.{i}"
        dx = mlp_backward(ops, block, dx)
        dx, dk, dv = cross_attention_backward(ops, block, dx)
        dx = self_attention_backward(ops, block, dx)
        dcross.append((dk, dv))
    ops.embed_backward(dx)
    return dcross[::-1]


def self_attention_backward(ops, block: str, dy):
    da, dx = ops.linear_backward(f"{block}.attn.out", dy)
    dq, dk, dv, dh = ops.attention_backward(f"{block}.attn", da)
    dh = plus(dh, ops.linear_backward(f"{block}.attn.value", dv)[0])
    dh = plus(dh, ops.linear_backward(f"{block}.attn.key", dk)[0])
    dh = plus(dh, ops.linear_backward(f"{block}.attn.query", dq)[0])
    return dx + ops.norm_backward(f"{block}.attn_ln", dh)


def cross_attention_backward(ops, block: str, dy):
    """-> dx, and dk, dv (B, T_audio, D)."""
    da, dx = ops.linear_backward(f"{block}.cross_attn.out", dy)
    dq, dk, dv, dh = ops.attention_backward(f"{block}.cross_attn", da)
    dh = plus(dh, ops.linear_backward(f"{block}.cross_attn.query", dq)[0])
    return dx + ops.norm_backward(f"{block}.cross_attn_ln", dh), dk, dv


def mlp_backward(ops, block: str, dy):
    dh, dx = ops.linear_backward(f"{block}.mlp.2", dy)
    dh, _ = ops.linear_backward(f"{block}.mlp.0", dh)
    return dx + ops.norm_backward(f"{block}.mlp_ln", dh)


def plus(a, b):
    """a + b, where a may be None: there was no gradient yet."""
    return b if a is None else a + b


class Whole:
    """A decoder's cache for training: all positions at once, nothing kept from call to call."""

    def __init__(self, cross: list[tuple]):
        self.cross = cross
        self.length = 0

    def extend(self, layer: int, k, v):
        return k, v


class Cache:
    """Keys and values of the decoder: `cross` computed once from xa, the others grown token by token.

    A group of rows (the beams or samples of one window) shares one window's cross keys and values: row r listens to
    window r // group.
    """

    def __init__(self, cross: list[tuple], n_ctx: int):
        self.cross = cross  # per layer: k, v (B, T_audio, D), arrays or Heard
        self.rows = cross[0][0].shape[0]  # one for each window at first
        self.length = 0  # positions so far
        self.n_ctx = n_ctx
        self._own: list[list[np.ndarray] | None] = [None] * len(cross)  # per layer: k, v (rows, n_ctx, D)

    def own(self, layer: int, n_state: int, dtype: np.dtype) -> list[np.ndarray]:
        """k, v (rows, n_ctx, D) of a layer's tokens, filled as far as `length`."""
        if self._own[layer] is None:
            self._own[layer] = [np.empty((self.rows, self.n_ctx, n_state), dtype) for _ in "kv"]
        return self._own[layer]

    def extend(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """k, v (rows, T, D) of the new positions -> views (rows, length + T, D) of all."""
        own, end = self.own(layer, k.shape[2], k.dtype), self.length + k.shape[1]
        for kept, new in zip(own, (k, v), strict=True):
            kept[:, self.length : end] = new
        return own[0][:, :end], own[1][:, :end]

    def repeat(self, group: int) -> None:
        """Every row becomes a group of equal rows."""
        if group > 1:
            kernels.release_memory()  # of the encoder; each row is going to have its own keys and values
            self._take(np.repeat(np.arange(self.rows), group))

    def reorder(self, rows: np.ndarray) -> None:
        """Row i becomes what row rows[i] was. Rows may only move inside the group that shares a window."""
        rows = np.asarray(rows)
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        for pair in self._own:
            for kept in pair or ():
                kept[moved, : self.length] = kept[rows[moved], : self.length]

    def keep(self, windows: np.ndarray) -> None:
        """Keep these windows only (indices into B, ascending) with all rows of their groups."""
        windows = np.asarray(windows)
        group = self.rows // self.cross[0][0].shape[0]
        rows = (windows[:, None] * group + np.arange(group)).ravel()
        self.cross = [tuple(_kept(x, windows) for x in pair) for pair in self.cross]
        self._take(rows)

    def _take(self, rows: np.ndarray) -> None:
        """The rows become these of the old ones, copied as far as they are filled."""
        for pair in self._own:
            for i, old in enumerate(pair or ()):
                pair[i] = np.empty((len(rows), *old.shape[1:]), old.dtype)
                pair[i][:, : self.length] = old[rows, : self.length]
        self.rows = len(rows)


def _kept(x: np.ndarray | Heard, windows: np.ndarray) -> np.ndarray | Heard:
    """x (B, …)[windows], ascending, moved to the front of x: nothing is allocated."""
    if isinstance(x, Heard):
        return x.with_arrays(tuple(_kept(array, windows) for array in x.arrays))
    for to, window in enumerate(windows):
        if to != window:
            x[to] = x[window]
    return x[: len(windows)]


class Model:
    """A loaded model. Stateless between calls: threads may share it."""

    def __init__(self, metadata: dict, tensors, name: str = ""):
        self.metadata = metadata
        self.name = name
        self.dims = Dims(**metadata["dims"])
        scheme = (metadata.get("quantization") or {}).get("scheme")
        self.ops = OPERATORS[scheme](metadata, tensors)
        self._vocabulary = np.asarray(tensors["tokenizer.vocabulary"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(unpack_vocabulary(self._vocabulary), self.dims.n_vocab)

    @property
    def is_multilingual(self) -> bool:
        return self.dims.n_vocab >= FIRST_MULTILINGUAL_VOCAB

    @property
    def knows_prompts(self) -> bool:
        """Whether it was trained with text before a window, as OpenAI's were. `minigate.train` gives a student none:
        any that it trained is taken for one that leaves out much of what it hears behind a prompt."""
        provenance = self.metadata["provenance"]
        while isinstance(provenance, dict):
            if provenance.get("training"):
                return False
            provenance = provenance.get("made_from")
        return True

    def encode(self, mel: np.ndarray) -> np.ndarray:
        """mel (B, n_mels, 3000) float32 -> xa (B, n_audio_ctx, D) float32.

        A model with audio_context `variable` takes any even number of frames up to 3000. Windows are encoded one after
        the other, or as many together as make a full one, which is as fast and takes less memory.
        """
        full = 2 * self.dims.n_audio_ctx
        frames = mel.shape[-1]
        fits = frames == full or (
            self.metadata.get("audio_context") == "variable" and frames % 2 == 0 and 0 < frames <= full
        )
        if mel.ndim != 3 or mel.shape[1] != self.dims.n_mels or not fits or not len(mel):
            raise ValueError(f"mel: expected shape (B, {self.dims.n_mels}, {full}), B at least 1, got {mel.shape}")
        some = max(1, full // frames)  # windows at a time
        parts = [encoder(self.ops, self.dims, np.asarray(mel[i : i + some], np.float32))
                 for i in range(0, len(mel), some)]  # fmt: skip
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def start(self, xa: np.ndarray) -> Cache:
        """xa (B, T, D) -> a cache of B rows, row r listening to window r; `Cache.repeat` makes groups of them."""
        return Cache(cross_keys_values(self.ops, self.dims, xa), self.dims.n_text_ctx)

    def decode(self, tokens: np.ndarray, cache: Cache, all_positions: bool = False) -> np.ndarray:
        """tokens (rows, T) -> logits (rows, V) of the last position, or (rows, T, V), float32.

        ValueError when the shape does not fit the cache or the context of n_text_ctx is full.
        """
        x = self._decode(tokens, cache)
        logits = self.ops.logits(self.ops.norm("decoder.ln", x if all_positions else self.ops.last(x)))
        return logits if all_positions else logits[:, 0]

    def hidden(self, tokens: np.ndarray, cache: Cache) -> np.ndarray:
        """tokens (rows, T) -> the final layer norm's output (rows, T, D) float32, from which the logits are made."""
        return self.ops.values(self.ops.norm("decoder.ln", self._decode(tokens, cache)))

    def _decode(self, tokens: np.ndarray, cache: Cache):
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[0] != cache.rows or not tokens.size:
            raise ValueError(f"tokens: expected shape ({cache.rows}, T) like the cache, got {tokens.shape}")
        if cache.length + tokens.shape[1] > self.dims.n_text_ctx:
            total = cache.length + tokens.shape[1]
            raise ValueError(f"tokens: expected at most {self.dims.n_text_ctx} positions in all, got {total}")
        return decoder(self.ops, self.dims, tokens, cache, self.ops.in_one_call())

    def transcribe(self, audio, **options):
        """A path, '-' or an array (16 kHz mono, float32 in [-1, 1]) -> Result with text, segments, language.

        options, with their defaults: language=None, task="transcribe", beam_size=1, patience=1.0, length_penalty=None,
        best_of=5, temperature=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), compression_ratio_threshold=2.4, logprob_threshold=-1.0,
        no_speech_threshold=0.6, condition_on_previous_text=None, initial_prompt=None, hotwords=None,
        suppress_tokens="-1", without_timestamps=False, batch_size=1 (see `options.TranscribeOptions`),
        on_segment=None and on_progress=None (see `transcribe.transcribe`). Raises UsageError for an option, FileError
        for the recording.
        """
        from minigate.transcribe import transcribe

        return transcribe(self, audio, **options)

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {asdict(self.dims)})"


def weights_folder() -> Path:
    """The embedded models: inside an installed package, beside it in a clone."""
    inside = Path(__file__).parent / "weights"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "weights"


def find(name_or_path: str | Path | None = None) -> Path:
    """The path of a model file, or of an embedded model by its name. FileError lists the names there are."""
    wanted = Path(DEFAULT_MODEL if name_or_path is None else name_or_path)
    embedded = weights_folder() / f"{wanted}.safetensors"
    try:
        if wanted.is_dir() and name_or_path != "" or wanted.suffix in FOREIGN and wanted.is_file():
            helps = f"python -m minigate.convert {wanted} OUT.safetensors"
            raise FileError(f"model: expected a model file of ours, got {wanted}; make one of it with {helps}")
        if wanted.is_file():
            return wanted
        if name_or_path != "" and wanted.parent == Path() and embedded.is_file():
            return embedded
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise FileError(f"model: expected a model file, got {str(name_or_path)!r}: {error.strerror}") from None
    names = ", ".join(sorted(p.stem for p in weights_folder().glob("*.safetensors"))) or "none"
    raise FileError(f"model: expected a model file or an embedded model ({names}), got {str(name_or_path)!r}")


def load(name_or_path: str | Path | None = None, threads: int | None = None) -> Model:
    """Load a model file or an embedded model by name (None: the default one).

    threads: of the whole process, for all models; None leaves them as they are, at first all cores this process may
    use. Raises FileError for the model, UsageError for threads or MINIGATE_ISA.
    """
    kernels.isa()
    if threads is not None:
        kernels.set_threads(threads)
    path = find(name_or_path)
    file = checkpoint.read(path)
    model = Model(file.metadata, file.tensors, name=path.stem)
    file.tensors.release()
    return model
