"""Gated multi-head attention: the gate's five kinds, and the product of gate and attention.

    out = gate_scale * sigmoid(gate_logits) ⊙ softmax(q kᵀ / sqrt(d_head)) v

`gate_logits` come from the module's query-side input h, the output of its layer norm, also in cross-attention.
With its last linear's weights zero, bias logit(π) and gate_scale 1/π every gate is exactly the identity.
Sources: Bondarenko et al., arXiv 2306.12929; Qiu et al., arXiv 2505.06708 (kind `elementwise`).

B batch, T time, D n_state, H n_head, d_head = D / H.
"""

from collections.abc import Mapping

import numpy as np

from minigate import kernels

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


def gated_attention(
    q, k, v, h, kind: str, p: Mapping[str, np.ndarray], n_head: int, scale: float, causal: bool = False
) -> np.ndarray:
    """q h (B, T_q, D), k v (B or fewer, T_k, D) -> (B, T_q, D), before the output projection."""
    return kernels.attention(q, k, v, n_head, causal=causal, gate=gate(kind, h, p, n_head, scale))
