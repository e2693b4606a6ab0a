"""Small random models for tests, and their network in plain float64 NumPy: the formulas, with nothing shared."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minigate.attention import gate_shapes

DIMS = dict(
    n_mels=8, n_audio_ctx=20, n_audio_state=32, n_audio_head=4, n_audio_layer=2,
    n_vocab=300, n_text_ctx=16, n_text_state=32, n_text_head=4, n_text_layer=2,
)  # fmt: skip


def toy_model(gate: str = "none", seed: int = 0, **dims) -> tuple[dict, dict[str, np.ndarray]]:
    """-> metadata, tensors: every tensor random, a vocabulary of the 256 bytes."""
    rng = np.random.default_rng(seed)
    d = {**DIMS, **dims}
    state, heads = d["n_audio_state"], d["n_audio_head"]
    shapes = {
        "encoder.conv1.weight": (state, d["n_mels"], 3), "encoder.conv1.bias": (state,),
        "encoder.conv2.weight": (state, state, 3), "encoder.conv2.bias": (state,),
        "encoder.positional_embedding": (d["n_audio_ctx"], state),
        "decoder.token_embedding.weight": (d["n_vocab"], state),
        "decoder.positional_embedding": (d["n_text_ctx"], state),
    }  # fmt: skip
    norms = ["encoder.ln_post", "decoder.ln"]
    for side, layers in (("encoder", d["n_audio_layer"]), ("decoder", d["n_text_layer"])):
        for i in range(layers):
            block = f"{side}.blocks.{i}"
            for module in ("attn", "cross_attn") if side == "decoder" else ("attn",):
                norms.append(f"{block}.{module}_ln")
                for part in ("query", "key", "value", "out"):
                    shapes[f"{block}.{module}.{part}.weight"] = (state, state)
                    if part != "key":
                        shapes[f"{block}.{module}.{part}.bias"] = (state,)
                for name, shape in gate_shapes(gate, state, heads).items():
                    shapes[f"{block}.{module}.gate.{name}"] = shape
            norms.append(f"{block}.mlp_ln")
            shapes |= {f"{block}.mlp.0.weight": (4 * state, state), f"{block}.mlp.0.bias": (4 * state,)}
            shapes |= {f"{block}.mlp.2.weight": (state, 4 * state), f"{block}.mlp.2.bias": (state,)}
    tensors = {n: (0.3 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    for n in norms:
        tensors[f"{n}.weight"] = (1 + 0.1 * rng.standard_normal(state)).astype(np.float32)
        tensors[f"{n}.bias"] = (0.1 * rng.standard_normal(state)).astype(np.float32)
    tensors["tokenizer.vocabulary"] = np.stack([np.ones(256, np.uint8), np.arange(256, dtype=np.uint8)], 1).ravel()
    metadata = {
        "format_version": 1, "name": "toy", "dims": d, "quantization": None, "audio_context": "full",
        "gate": {"kind": "none"} if gate == "none" else {"kind": gate, "init": 0.25, "scale": 4.0},
        "alignment_heads": [], "suppress_tokens": None, "provenance": {"source": "toy"},
    }  # fmt: skip
    return metadata, tensors


class Plain:
    """The same network in float64, one formula a line."""

    def __init__(self, metadata: dict, tensors: dict):
        self.d, self.gate = metadata["dims"], metadata["gate"]
        self.p = {n: t.astype(np.float64) for n, t in tensors.items()}

    def encode(self, mel):
        x = self.conv("encoder.conv1", mel.astype(np.float64), 1)
        x = self.conv("encoder.conv2", x, 2).transpose(0, 2, 1)
        x = x + self.p["encoder.positional_embedding"][: x.shape[1]]
        for i in range(self.d["n_audio_layer"]):
            x = self.block(f"encoder.blocks.{i}", x)
        return self.norm("encoder.ln_post", x)

    def decode(self, tokens, xa):
        x = self.p["decoder.token_embedding.weight"][tokens] + self.p["decoder.positional_embedding"][: tokens.shape[1]]
        for i in range(self.d["n_text_layer"]):
            x = self.block(f"decoder.blocks.{i}", x, xa)
        return self.norm("decoder.ln", x) @ self.p["decoder.token_embedding.weight"].T

    def block(self, name, x, xa=None):
        h = self.norm(f"{name}.attn_ln", x)
        x = x + self.attention(f"{name}.attn", h, h, causal=xa is not None)
        if xa is not None:
            x = x + self.attention(f"{name}.cross_attn", self.norm(f"{name}.cross_attn_ln", x), xa, causal=False)
        h = self.gelu(self.linear(f"{name}.mlp.0", self.norm(f"{name}.mlp_ln", x)))
        return x + self.linear(f"{name}.mlp.2", h)

    def attention(self, name, h, xa, causal):
        heads = self.d["n_audio_head"]

        def split(x):
            return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

        q, k, v = (split(self.linear(f"{name}.{n}", x)) for n, x in (("query", h), ("key", xa), ("value", xa)))
        score = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        if causal:
            score = np.where(np.tri(*score.shape[-2:], dtype=bool), score, -np.inf)
        e = np.exp(score - score.max(-1, keepdims=True))
        out = (e / e.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(h.shape)
        return self.linear(f"{name}.out", self.gated(name, h, out, heads))

    def gated(self, name, h, out, heads):
        kind, start = self.gate["kind"], f"{name}.gate."
        p = {n.removeprefix(start): t for n, t in self.p.items() if n.startswith(start)}
        if kind == "none":
            return out
        own = h.reshape(*h.shape[:2], heads, -1)
        logits = {
            "per_head": lambda: (own * p["weight"]).sum(-1) + p["bias"],
            "per_head_mlp": lambda: (np.maximum((own[..., None, :] * p["0.weight"]).sum(-1) + p["0.bias"], 0)
                                     * p["2.weight"]).sum(-1) + p["2.bias"],
            "all_heads": lambda: h @ p["weight"].T + p["bias"],
            "elementwise": lambda: h @ p["weight"].T + p["bias"],
        }[kind]()  # fmt: skip
        g = self.gate["scale"] / (1 + np.exp(-logits))
        return out * (g if kind == "elementwise" else np.repeat(g, h.shape[-1] // heads, axis=-1))

    def linear(self, name, x):
        return x @ self.p[f"{name}.weight"].T + self.p.get(f"{name}.bias", 0)

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def conv(self, name, x, stride):
        """x (B, C, T) -> GELU(conv1d(x)) (B, N, ceil(T / stride))."""
        windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1))), 3, axis=2)[:, :, ::stride]
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"][:, None]
        return self.gelu(np.einsum("bctw,ncw->bnt", windows, weight) + bias)

    @staticmethod
    def gelu(x):
        from scipy.special import erf

        return 0.5 * x * (1 + erf(x / np.sqrt(2)))
