"""The coarse operators of `model.py` in float32: parameters by name, activations (B, T, D) as plain arrays.

Each arithmetic offers the same methods, in the order the data meets them.

B batch, T time, C channels in, D n_state, N outputs, V n_vocab.
"""

from collections.abc import Callable, Mapping

import numpy as np

from minigate import kernels
from minigate.attention import gate_shapes
from minigate.checkpoint import INPUT_SCALE, ROTATIONS
from minigate.gate_kernels import gate
from minigate.hadamard import rotation

CONV_WIDTH = 3  # both convolutions of the stem
CONV_FRAMES = 384  # output frames at a time, whose inputs stand three times in memory


def conv_rows(x: np.ndarray, stride: int, padding: int = 0, first: int = 0, last: int | None = None) -> np.ndarray:
    """x (B, T, C), a frame of padding on either side -> (B, ceil(T / stride), 3 C), a row for each output frame; or for
    those from `first` to `last`, which is not among them."""
    b, t, c = x.shape
    last = -(-t // stride) if last is None else last
    rows = kernels.empty((b, last - first, CONV_WIDTH, c), x.dtype)
    for i in range(CONV_WIDTH):
        at = stride * np.arange(first, last) + i - 1
        inside = slice(int((at < 0).sum()), last - first - int((at >= t).sum()))
        rows[:, : inside.start, i] = rows[:, inside.stop :, i] = padding
        if inside.start < inside.stop:
            rows[:, inside, i] = x[:, at[inside.start] : at[inside.stop - 1] + 1 : stride]
    return rows.reshape(b, last - first, CONV_WIDTH * c)


def conv_matrix(weight: np.ndarray) -> np.ndarray:
    """openai/whisper's (N, C, 3) -> (N, 3 C), in the column order of `conv_rows`."""
    return np.ascontiguousarray(weight.transpose(0, 2, 1)).reshape(weight.shape[0], -1)


def conv_weight(matrix: np.ndarray) -> np.ndarray:
    """`conv_matrix`'s (N, 3 C) -> (N, C, 3)."""
    return np.ascontiguousarray(matrix.reshape(len(matrix), CONV_WIDTH, -1).transpose(0, 2, 1))


class Float:
    """float32, through BLAS and the float kernels. float16 parameters are widened once, here."""

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray]):
        self.gate_kind = metadata["gate"]["kind"]
        self.gate_scale = metadata["gate"].get("scale", 1.0)
        self.p = {name: self.prepare(name, tensors[name]) for name in tensors if self.is_parameter(name)}
        self.gates = self._gates(metadata["dims"])

    def is_parameter(self, name: str) -> bool:
        return name != "tokenizer.vocabulary"

    def prepare(self, name: str, array: np.ndarray):
        """The form in which a parameter is computed with."""
        array = np.asarray(array, np.float32)
        if name in ROTATIONS:
            return rotation(array).astype(np.float32)
        return conv_matrix(array) if array.ndim == 3 and ".conv" in name else array

    def _gates(self, dims: dict) -> dict[str, dict[str, np.ndarray]]:
        """Gate parameters by attention module."""
        names = gate_shapes(self.gate_kind, dims["n_audio_state"], dims["n_audio_head"])
        modules = {name.split(".gate.")[0] for name in self.p if ".gate." in name}
        return {module: {n: self.p[f"{module}.gate.{n}"] for n in names} for module in modules}

    def conv(self, name: str, x: np.ndarray, stride: int) -> np.ndarray:
        """GELU(conv1d(x)), width 3, padding 1: x (B, T, C) -> (B, ceil(T / stride), N)."""
        frames = -(-x.shape[1] // stride)
        first, last = self.repeated(name, x, stride) or (frames - 1, frames - 1)
        y = kernels.empty((len(x), frames, len(self.p[f"{name}.bias"])), x.dtype)
        for start, end in ((0, first + 1), (last + 1, frames)):
            for i in range(start, end, CONV_FRAMES):
                j = min(i + CONV_FRAMES, end)
                y[:, i:j] = self.linear(name, conv_rows(x, stride, 0, i, j), gelu=True)
        y[:, first + 1 : last + 1] = y[:, first : first + 1]
        return y

    def repeated(self, name: str, x: np.ndarray, stride: int) -> tuple[int, int] | None:
        """The first and the last of the convolution's frames that are the same and need to be computed once, if any."""
        return None

    def add_positions(self, name: str, x: np.ndarray) -> np.ndarray:
        """x (B, T, D) + the first T positions."""
        return self.turned(name, x) + self.p[name][: x.shape[1]]

    def turns(self, name: str) -> bool:
        """Whether the residual stream of this name's side is rotated."""
        return f"{name.split('.')[0]}.rotation" in self.p

    def turned(self, name: str, x: np.ndarray) -> np.ndarray:
        """x (B, T, D) into the rotated residual stream of this name's side, or out of it: a rotation is its own
        inverse (hadamard.py)."""
        return kernels.linear_f32(x, self.p[f"{name.split('.')[0]}.rotation"]) if self.turns(name) else x

    def embed(self, tokens: np.ndarray, offset: int) -> np.ndarray:
        """tokens (B, T) at positions offset, offset + 1, … -> (B, T, D)."""
        positions = self.p["decoder.positional_embedding"][offset : offset + tokens.shape[1]]
        return self.input_rows(tokens) + positions

    def input_rows(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T) -> (B, T, D), as they go in."""
        rows = self.token_rows(tokens)
        return self.turned("decoder", rows * self.p[INPUT_SCALE] if INPUT_SCALE in self.p else rows)

    def token_rows(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T) -> their rows (B, T, D) of the logits' matrix."""
        return self.p["decoder.token_embedding.weight"][tokens]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        if name == "decoder.ln" and self.turns(name):  # the logits' matrix, which is the input's too, stays as it is
            return self.turned(name, kernels.layer_norm(x, np.ones_like(weight), np.zeros_like(bias))) * weight + bias
        return kernels.layer_norm(x, weight, bias)

    def rows(self, x: np.ndarray):
        """x (B, T, D) in the form that several `linear` share."""
        return x

    def values(self, x) -> np.ndarray:
        """The float32 array of an activation."""
        return x

    def last(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, D) -> (B, 1, D), the last position."""
        return x[:, -1:]

    def linear(self, name: str, x: np.ndarray, gelu: bool = False, residual: np.ndarray | None = None) -> np.ndarray:
        """x (B, T, D) wᵀ + bias, then GELU, then + residual -> (B, T, N)."""
        return kernels.linear_f32(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), gelu, residual)

    def attention(self, name: str, q, k, v, h, n_head: int, causal: bool) -> np.ndarray:
        """q h (B, T_q, D), k v (B or fewer, T_k, D) -> (B, T_q, D)."""
        return kernels.attention(q, k, v, n_head, causal, self.gate_of(name, h, n_head), self.precision(name))

    def gate_of(self, name: str, h, n_head: int) -> np.ndarray | None:
        """h (B, T, D), as `norm` returns it -> (B, T, H), or (B, T, D) for elementwise; None for kind `none`."""
        return gate(self.gate_kind, self.values(h), self.gates.get(name), n_head, self.gate_scale)

    def in_one_call(self) -> Callable | None:
        """What does the work of `model.decoder_blocks`, x and cache to x, in one call; None where nothing does."""
        return None

    def precision(self, name: str) -> str:
        """In what attention `name` multiplies many queries, as `kernels.attention` has it."""
        return "float32"

    def logits(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, D) -> (B, T, V), through the token embedding."""
        return self.linear("decoder.token_embedding", x)
