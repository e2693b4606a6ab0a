#!/usr/bin/env python3
"""Make tests/golden/training.npz: gradients and ten steps of distillation by openai/whisper's network under torch's
autograd, AdamW and clipping, in float64 (extra `reference`). Run by hand, from the clone's root:

    pip install -e '.[reference]' && python tools/make_golden_training.py

Model, batch and options are those of tests/training.py. For each kind of gate: `KIND.losses` (10, 6) total, kl, ce,
hidden, outlier, norm of the gradient before clipping; `KIND.grad.NAME` samples of the first step's gradients.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import whisper.model
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minigate.attention import GATE_HIDDEN, GATE_KINDS  # noqa: E402
from tests import check, training  # noqa: E402

SELECTED = ("conv1.weight", "conv2.bias", "encoder.blocks.0.attn.", "encoder.blocks.1.mlp.0.weight", "ln_post.bias",
            "token_embedding", "decoder.positional_embedding", "decoder.blocks.1.cross_attn.", "decoder.ln.weight",
            "decoder.blocks.0.mlp_ln.weight")  # fmt: skip
HEADS = training.DIMS["n_audio_head"]


class PerHead(nn.Module):
    """Gate logits of each head from its own slice of h."""

    def __init__(self, n_state: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(HEADS, n_state // HEADS))
        self.bias = nn.Parameter(torch.zeros(HEADS))

    def forward(self, h):
        return (h.unflatten(-1, (HEADS, -1)) * self.weight).sum(-1) + self.bias


class PerHeadMlp(nn.Module):
    """The same with a hidden layer: parameters 0.weight, 0.bias, 2.weight, 2.bias."""

    def __init__(self, n_state: int):
        super().__init__()
        self.add_module("0", nn.ParameterDict({"weight": torch.zeros(HEADS, GATE_HIDDEN, n_state // HEADS),
                                               "bias": torch.zeros(HEADS, GATE_HIDDEN)}))  # fmt: skip
        self.add_module("2", nn.ParameterDict({"weight": torch.zeros(HEADS, GATE_HIDDEN), "bias": torch.zeros(HEADS)}))

    def forward(self, h):
        first, second = self._modules["0"], self._modules["2"]
        own = h.unflatten(-1, (HEADS, 1, -1))
        return (torch.relu((own * first["weight"]).sum(-1) + first["bias"]) * second["weight"]).sum(-1) + second["bias"]


def gated_attention(kind: str) -> type:
    """openai/whisper's MultiHeadAttention with a gate before its output projection."""

    class Gated(whisper.model.MultiHeadAttention):
        def __init__(self, n_state: int, n_head: int):
            super().__init__(n_state, n_head)
            makers = {"per_head": PerHead, "per_head_mlp": PerHeadMlp, "all_heads": lambda n: nn.Linear(n, n_head),
                      "elementwise": lambda n: nn.Linear(n, n)}  # fmt: skip
            if kind != "none":
                self.gate = makers[kind](n_state)

        def forward(self, x, xa=None, mask=None, kv_cache=None):
            source = x if xa is None else xa
            q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                       for y in (self.query(x), self.key(source), self.value(source)))  # fmt: skip
            score = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            if mask is not None:
                score = score + mask[: x.shape[1], : x.shape[1]].to(score.dtype)
            out = (score.softmax(-1) @ v).transpose(1, 2)
            if kind != "none":
                gate = torch.sigmoid(self.gate(x)) / training.GATE_INIT
                out = out * (gate.unflatten(-1, (self.n_head, -1)) if kind == "elementwise" else gate[..., None])
            return self.out(out.flatten(2)), None

    return Gated


def build(kind: str) -> nn.Module:
    """The student in float64."""
    kept = whisper.model.MultiHeadAttention, whisper.model.LayerNorm
    whisper.model.MultiHeadAttention, whisper.model.LayerNorm = gated_attention(kind), nn.LayerNorm
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**training.DIMS))
    whisper.model.MultiHeadAttention, whisper.model.LayerNorm = kept
    found = model.load_state_dict({n: torch.tensor(t) for n, t in training.tensors(kind).items()}, strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise ValueError(f"tensors: expected those of {kind}, got {found}")
    return model.double()


def watch(model: nn.Module) -> dict[str, torch.Tensor]:
    """-> where each forward leaves the penalized tensors and the final norms' output, by name."""
    seen = {}
    wanted = {n for n, m in model.named_modules() if isinstance(m, whisper.model.ResidualAttentionBlock)}
    wanted |= {f"{name}.mlp.2" for name in wanted} | {"encoder.ln_post", "decoder.ln"}
    for name, module in model.named_modules():
        if name in wanted:
            module.register_forward_hook(
                lambda m, i, out, name=name: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out))
    return seen


def losses(model: nn.Module, seen: dict) -> list[torch.Tensor]:
    """-> total, kl, ce, hidden, outlier."""
    o, (batch, embedding) = training.DISTILL, training.batch()
    model(torch.tensor(batch.mel).double(), torch.tensor(batch.tokens_in))
    scored = torch.tensor(batch.targets >= 0)
    logits = seen["decoder.ln"][scored] @ model.decoder.token_embedding.weight.T
    teacher = torch.tensor(batch.teacher_hidden).double()[scored] @ torch.tensor(embedding).double().T
    soft = F.log_softmax(logits / o.temperature, -1), F.log_softmax(teacher / o.temperature, -1)
    kl = o.temperature**2 * F.kl_div(*soft, reduction="batchmean", log_target=True)
    ce = F.cross_entropy(logits, torch.tensor(batch.targets)[scored])
    heard = torch.arange(batch.teacher_xa.shape[1])[None] < torch.tensor(batch.frames)[:, None]
    hidden = F.mse_loss(seen["encoder.ln_post"][heard], torch.tensor(batch.teacher_xa).double()[heard])
    penalties = [torch.log1p((a.abs() / o.outlier_tau).pow(o.outlier_power).mean()) for a in seen.values()]
    outlier = o.outlier_weight * torch.stack(penalties).mean()
    return [o.kl_weight * kl + o.ce_weight * ce + o.hidden_weight * hidden + outlier, kl, ce, hidden, outlier]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    o, groups = training.OPTIM, {}
    for name, p in model.named_parameters():
        gate = ".gate." in name
        decayed = name.endswith(".weight") and p.ndim > 1 and not gate
        groups.setdefault((o.gate_lr if gate else o.lr, o.weight_decay if decayed else 0.0), []).append(p)
    made = [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]
    return torch.optim.AdamW(made, betas=(o.beta1, o.beta2), eps=o.eps)


def train(kind: str) -> dict[str, np.ndarray]:
    model, o = build(kind), training.OPTIM
    model.encoder.positional_embedding.requires_grad_(False)
    seen, adamw = watch(model), optimizer(model)
    factors = [min(1, step / o.warmup) if step <= o.warmup else (training.STEPS + 1 - step) / (
        training.STEPS + 1 - o.warmup) for step in range(1, training.STEPS + 1)]  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda done: factors[min(done, training.STEPS - 1)])
    rows, arrays = [], {}
    for step in range(training.STEPS):
        adamw.zero_grad()
        values = losses(model, seen)
        values[0].backward()
        if step == 0:
            arrays = {f"{kind}.grad.{n}": training.sample(p.grad.numpy()).copy() for n, p in model.named_parameters()
                      if any(part in n for part in (*SELECTED, ".gate."))}  # fmt: skip
        norm = nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        rows.append([v.item() for v in (*values, norm)])
        adamw.step()
        schedule.step()
    print(kind, *(f"{row[0]:.4f}" for row in rows))
    return {f"{kind}.losses": np.array(rows), **arrays}


def main() -> int:
    torch.set_num_threads(1)
    arrays = {"versions": np.array([f"torch {torch.__version__}", f"openai-whisper {whisper.__version__}"])}
    for kind in GATE_KINDS:
        arrays |= train(kind)
    path = check.GOLDEN / "training.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
