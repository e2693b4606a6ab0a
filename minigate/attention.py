"""Gated multi-head attention: the gate's four kinds, and none, and the product of gate and attention.

    out = gate_scale * sigmoid(gate_logits) ⊙ softmax(q kᵀ / sqrt(d_head)) v

`gate_logits` come from the module's query-side input h, the output of its layer norm, also in cross-attention.
With its last linear's weights zero, bias logit(π) and gate_scale 1/π every gate is exactly the identity.
Sources: Bondarenko et al., arXiv 2306.12929; Qiu et al., arXiv 2505.06708 (kind `elementwise`).

B batch, T time, D n_state, H n_head, d_head = D / H.
"""

from collections.abc import Mapping

import numpy as np

from minigate import training_kernels

GATE_KINDS = ("none", "per_head", "per_head_mlp", "all_heads", "elementwise")
GATE_HIDDEN = 4  # hidden size of per_head_mlp


def gate_shapes(kind: str, n_state: int, n_head: int) -> dict[str, tuple[int, ...]]:
    """Parameters of one module's gate: name after `….gate.` -> shape. ValueError for an unknown kind."""
    d_head = n_state // n_head
    shapes = {
        "none": {},
        "per_head": {"weight": (n_head, d_head), "bias": (n_head,)},
        "per_head_mlp": {
            "0.weight": (n_head, GATE_HIDDEN, d_head),
            "0.bias": (n_head, GATE_HIDDEN),
            "2.weight": (n_head, GATE_HIDDEN),
            "2.bias": (n_head,),
        },
        "all_heads": {"weight": (n_head, n_state), "bias": (n_head,)},
        "elementwise": {"weight": (n_state, n_state), "bias": (n_state,)},
    }
    if kind not in shapes:
        raise ValueError(f"gate: expected one of {', '.join(GATE_KINDS)}, got {kind!r}")
    return shapes[kind]


def gate_logits(kind: str, h: np.ndarray, p: Mapping[str, np.ndarray], n_head: int) -> np.ndarray:
    """h (B, T, D), p the module's gate parameters -> (B, T, H), or (B, T, D) for elementwise."""
    if kind in ("all_heads", "elementwise"):
        return h @ p["weight"].T + p["bias"]
    heads = h.reshape(*h.shape[:-1], n_head, -1)  # each head sees its own slice of h
    if kind == "per_head":
        return np.einsum("bthd,hd->bth", heads, p["weight"]) + p["bias"]
    hidden = np.einsum("bthd,hkd->bthk", heads, p["0.weight"]) + p["0.bias"]
    return np.einsum("bthk,hk->bth", np.maximum(hidden, 0), p["2.weight"]) + p["2.bias"]


def gate(kind: str, h: np.ndarray, p: Mapping[str, np.ndarray], n_head: int, scale: float) -> np.ndarray | None:
    """scale * sigmoid(gate_logits), shaped like them; None for kind `none`."""
    if kind == "none":
        return None
    logits = gate_logits(kind, h, p, n_head)
    return (0.5 * scale) * (1 + np.tanh(0.5 * logits))  # sigmoid that cannot overflow


def gate_logits_backward(dlogits, kind: str, h, p: Mapping[str, np.ndarray], n_head: int) -> tuple:
    """dlogits (B, T, H), or (B, T, D) for elementwise -> dh (B, T, D), gradients by parameter name."""
    flat = dlogits.reshape(-1, dlogits.shape[-1])
    if kind in ("all_heads", "elementwise"):
        return dlogits @ p["weight"], {"weight": flat.T @ h.reshape(len(flat), -1), "bias": flat.sum(0)}
    heads = h.reshape(*h.shape[:-1], n_head, -1)
    if kind == "per_head":
        dp = {"weight": np.einsum("bth,bthd->hd", dlogits, heads), "bias": flat.sum(0)}
        return (dlogits[..., None] * p["weight"]).reshape(h.shape), dp
    hidden = np.einsum("bthd,hkd->bthk", heads, p["0.weight"]) + p["0.bias"]
    dhidden = dlogits[..., None] * p["2.weight"] * (hidden > 0)
    dp = {
        "0.weight": np.einsum("bthk,bthd->hkd", dhidden, heads),
        "0.bias": dhidden.sum((0, 1)),
        "2.weight": np.einsum("bth,bthk->hk", dlogits, np.maximum(hidden, 0)),
        "2.bias": flat.sum(0),
    }
    return np.einsum("bthk,hkd->bthd", dhidden, p["0.weight"]).reshape(h.shape), dp


def gated_attention(q, k, v, h, kind: str, p, n_head: int, scale: float, causal: bool, bf16: bool = False) -> tuple:
    """q h (B, T_q, D), k v (B, T_k, D), p the gate's parameters -> out (B, T_q, D), cache: the forward of training."""
    a, lse = training_kernels.attention_lse(q, k, v, n_head, causal)
    g = gate(kind, h, p, n_head, scale)
    out = a if g is None else times_gate(a, g)
    return out, (a, lse, q, k, v, h, g, kind, p, n_head, scale, causal, bf16)


def gated_attention_backward(dout, cache) -> tuple:
    """dout (B, T_q, D) -> dq, dk, dv, dh (None for kind `none`), gradients of the gate by parameter name."""
    a, lse, q, k, v, h, g, kind, p, n_head, scale, causal, bf16 = cache
    if g is None:
        return *training_kernels.attention_backward(dout, a, lse, q, k, v, n_head, causal, bf16), None, {}
    dg = dout * a
    if kind != "elementwise":
        dg = dg.reshape(*dg.shape[:2], n_head, -1).sum(-1)
    dlogits = dg * g * (1 - g / g.dtype.type(scale))  # g = scale σ and σ' = σ (1 - σ)
    dh, dp = gate_logits_backward(dlogits, kind, h, p, n_head)
    da = times_gate(dout, g)
    return *training_kernels.attention_backward(da, a, lse, q, k, v, n_head, causal, bf16), dh, dp


def times_gate(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """x (B, T, D), g (B, T, H) or (B, T, D) -> x times its head's, or its own, gate."""
    return (x.reshape(*g.shape, -1) * g[..., None]).reshape(x.shape)
