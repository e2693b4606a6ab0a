"""The coarse operators of `model.py` with their backward: what training computes with.

Each operator remembers what its backward needs on a stack, and each backward takes it off again, so that a model's
backward is its forward's list of calls reversed. Gradients are summed by parameter name in `grads`; the outlier
penalty (`step.OutlierPenalty`) is taken where the tensors arise and joins their gradients on the way back.

B batch, T time, D n_state, K inputs, N outputs, V n_vocab.
"""

from collections.abc import Mapping

import numpy as np

from minigate import attention, layers, ops

TOKEN_EMBEDDING = "decoder.token_embedding.weight"


class Recorded(ops.Float):
    """float32 (float64 for gradient checks), products in bfloat16 when told. Parameters are writable copies."""

    def __init__(self, metadata: dict, tensors: Mapping[str, np.ndarray], dtype=np.float32, bf16=False, penalty=None):
        self.dtype, self.bf16, self.penalty = dtype, bf16, penalty
        self.grads: dict[str, np.ndarray] = {}
        self.stack: list[tuple] = []
        super().__init__(metadata, tensors)

    def prepare(self, name: str, array: np.ndarray) -> np.ndarray:
        return np.array(array, self.dtype)

    def push(self, name: str, *cache) -> None:
        self.stack.append((name, cache))

    def pop(self, name: str) -> tuple:
        """The newest cache. RuntimeError when the backward is not the forward reversed."""
        pushed, cache = self.stack.pop()
        if pushed != name:
            raise RuntimeError(f"backward: expected {pushed}, the newest forward, got {name}")
        return cache

    def add(self, name: str, gradient: np.ndarray | None) -> None:
        """Sum a parameter's gradient."""
        if gradient is None:
            return
        if name in self.grads:
            self.grads[name] += gradient
        else:
            self.grads[name] = np.ascontiguousarray(gradient)

    # --- in the order the data meets them, each followed by its backward ---

    def conv(self, name: str, x, stride: int):
        y, conv_cache = layers.conv1d(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], stride, self.bf16)
        y, gelu_cache = layers.gelu(y)
        self.push(name, conv_cache, gelu_cache)
        return y

    def conv_backward(self, name: str, dy, dx_wanted: bool = True):
        """dy (B, T', N) -> dx (B, T, C), None unless it is wanted."""
        conv_cache, gelu_cache = self.pop(name)
        dx, dweight, dbias = layers.conv1d_backward(layers.gelu_backward(dy, gelu_cache), conv_cache, dx_wanted)
        self.add(f"{name}.weight", dweight)
        self.add(f"{name}.bias", dbias)
        return dx

    # The encoder's positions are constants (sinusoids): add_positions has no backward of its own.

    def embed(self, tokens, offset: int):
        y, cache = layers.embedding(tokens, self.p[TOKEN_EMBEDDING])
        self.push("embed", cache)
        return y + self.p["decoder.positional_embedding"][offset : offset + tokens.shape[1]]

    def embed_backward(self, dy) -> None:
        """dy (B, T, D); the positions start at 0."""
        (cache,) = self.pop("embed")
        if TOKEN_EMBEDDING in self.grads:  # from the logits: no second array of its size is needed
            rows, drows = layers.embedding_rows_backward(dy, cache)
            self.grads[TOKEN_EMBEDDING][rows] += drows
        else:
            self.add(TOKEN_EMBEDDING, layers.embedding_backward(dy, cache))
        dpositions = np.zeros_like(self.p["decoder.positional_embedding"])
        dpositions[: dy.shape[1]] = dy.sum(0)
        self.add("decoder.positional_embedding", dpositions)

    def norm(self, name: str, x):
        y, cache = layers.layer_norm(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])
        self.push(name, cache, self.penalized(name, y))
        return y

    def norm_backward(self, name: str, dy):
        """dy (B, T, D) -> dx (B, T, D)."""
        cache, penalized = self.pop(name)
        dx, dweight, dbias = layers.layer_norm_backward(self.with_penalty(dy, penalized), cache)
        self.add(f"{name}.weight", dweight)
        self.add(f"{name}.bias", dbias)
        return dx

    def linear(self, name: str, x, gelu: bool = False, residual=None):
        y, cache = layers.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), self.bf16)
        gelu_cache, own, total = None, self.penalized(name, y), None
        if gelu:
            y, gelu_cache = layers.gelu(y)
        if residual is not None:
            y = y + residual
            total = self.penalized(f"{name} + residual", y)
        self.push(name, cache, gelu_cache, own, total)
        return y

    def linear_backward(self, name: str, dy):
        """dy (B, T, N) -> dx (B, T, K), dresidual (B, T, N)."""
        cache, gelu_cache, own, total = self.pop(name)
        dresidual = self.with_penalty(dy, total)
        dy = dresidual if gelu_cache is None else layers.gelu_backward(dresidual, gelu_cache)
        dy = self.with_penalty(dy, own)
        dx, dweight, dbias = layers.linear_backward(dy, cache)
        self.add(f"{name}.weight", dweight)
        self.add(f"{name}.bias", dbias)
        return dx, dresidual

    def attention(self, name: str, q, k, v, h, n_head: int, causal: bool):
        gate = self.gates.get(name)
        y, cache = attention.gated_attention(
            q, k, v, h, self.gate_kind, gate, n_head, self.gate_scale, causal, self.bf16
        )
        self.push(name, cache)
        return y

    def attention_backward(self, name: str, dy):
        """dy (B, T_q, D) -> dq, dk, dv, and dh or None where there is no gate."""
        (cache,) = self.pop(name)
        dq, dk, dv, dh, dgate = attention.gated_attention_backward(dy, cache)
        for parameter, gradient in dgate.items():
            self.add(f"{name}.gate.{parameter}", gradient)
        return dq, dk, dv, dh

    def penalized(self, name: str, y):
        """What the penalty's backward needs of y, None where it does not apply."""
        return self.penalty.forward(name, y) if self.penalty else None

    def with_penalty(self, dy, penalized):
        return dy if penalized is None else dy + self.penalty.backward(penalized)
