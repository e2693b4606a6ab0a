#!/usr/bin/env python3
"""Time whole training steps against PyTorch: interleaved, medians of the ratios with spread, as a Markdown table.

usage: python tools/bench_training.py [--torch PYTHON] [--dims tiny.en] [--windows 8] [--seconds 10] [--tokens 40]

A step is forward, all losses, backward, clipping and AdamW of a full-depth gated student (per_head) with random
weights; mel and labels are there already. PyTorch runs openai/whisper's modules with F.scaled_dot_product_attention,
eager, in float32 and under bfloat16 autocast, with its fused AdamW. Every engine is a process of its own; in each round
every engine takes one step, in turn. Peak memory is that of the process.

    python tools/bench_training.py --torch REF/bin/python --outlier-weight 0.1
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STATES = {"tiny.en": (384, 6, 4, 51864), "base": (512, 8, 6, 51865)}  # n_state, n_head, n_layer, n_vocab
GATE_INIT = 0.5
LR, GATE_LR, DECAY, BETAS, EPS, CLIP = 2e-5, 2e-4, 0.01, (0.9, 0.999), 1e-8, 1.0
KL, CE, TEMPERATURE, TAU = 0.8, 1.0, 2.0, 6.0


def sizes(o: dict) -> dict:
    state, heads, layers, vocab = STATES[o["dims"]]
    return dict(n_mels=80, n_audio_ctx=50 * o["seconds"], n_audio_state=state, n_audio_head=heads,
                n_audio_layer=layers, n_vocab=vocab, n_text_ctx=448, n_text_state=state, n_text_head=heads,
                n_text_layer=layers)  # fmt: skip


def data(o: dict) -> dict[str, np.ndarray]:
    """One batch, the same for all engines."""
    rng, dims, rows = np.random.default_rng(0), sizes(o), (o["windows"], o["tokens"])
    state = dims["n_audio_state"]
    return dict(
        mel=rng.standard_normal((o["windows"], 80, 100 * o["seconds"])).astype(np.float32),
        tokens=rng.integers(0, 50000, rows), targets=rng.integers(0, 50000, rows),
        teacher_hidden=rng.standard_normal((*rows, state)).astype(np.float16),
        embedding=(0.05 * rng.standard_normal((dims["n_vocab"], state))).astype(np.float32),
    )  # fmt: skip


# --- in the engine's own process: options -> a function that takes one step and returns the loss ---


def engine_minigate(o: dict):
    from minigate import kernels, optim, step, tape
    from minigate.batches import Batch
    from minigate.checkpoint import tensor_shapes
    from minigate.distill import DistillOptions
    from minigate.model import Dims

    kernels.set_threads(o["threads"])
    rng, dims, d = np.random.default_rng(1), sizes(o), data(o)
    tensors = {}
    for name, shape in tensor_shapes(dims, "per_head").items():
        fan_in = int(np.prod(shape[1:])) or 1
        gain = len(shape) == 1 and name.endswith(".weight")
        tensors[name] = (np.ones(shape) if gain else rng.standard_normal(shape) / fan_in**0.5).astype(np.float32)
        if ".gate." in name:
            tensors[name][...] = 0
    metadata = {"dims": dims, "gate": {"kind": "per_head", "init": GATE_INIT, "scale": 1 / GATE_INIT}}
    options = DistillOptions(kl_weight=KL, ce_weight=CE, temperature=TEMPERATURE, outlier_weight=o["outlier_weight"],
                             outlier_tau=TAU)  # fmt: skip
    ops = tape.Recorded(metadata, tensors, bf16=o["precision"] == "bf16")
    del tensors
    student = step.Distillation(ops, Dims(**dims), options, d["embedding"])
    adamw = optim.AdamW(ops.p, optim.OptimOptions(lr=LR, gate_lr=GATE_LR, weight_decay=DECAY, clip_norm=CLIP),
                        {"encoder.positional_embedding"})  # fmt: skip
    batch = Batch((), d["mel"], d["tokens"], d["targets"], d["teacher_hidden"],
                  np.full(o["windows"], 50 * o["seconds"]), float(o["windows"] * o["seconds"]))  # fmt: skip

    def one_step() -> float:
        ops.grads.clear()
        losses = student.forward_backward(batch)
        norm = adamw.norm(ops.grads)
        adamw.step(ops.grads, LR, GATE_LR, optim.clip_scale(norm, CLIP))
        return losses.loss(options)

    return one_step


def torch_student(dims: dict):
    """openai/whisper's network with a per_head gate in each attention."""
    import torch
    import torch.nn.functional as F
    import whisper.model
    from torch import nn

    class Gated(nn.Module):
        def __init__(self, n_state: int, n_head: int):
            super().__init__()
            self.n_head = n_head
            self.query, self.value, self.out = (nn.Linear(n_state, n_state) for _ in range(3))
            self.key = nn.Linear(n_state, n_state, bias=False)
            self.gate_weight = nn.Parameter(torch.zeros(n_head, n_state // n_head))
            self.gate_bias = nn.Parameter(torch.zeros(n_head))

        def forward(self, x, xa=None, mask=None, kv_cache=None):
            heard = x if xa is None else xa
            q, k, v = (m(y).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                       for m, y in ((self.query, x), (self.key, heard), (self.value, heard)))  # fmt: skip
            a = F.scaled_dot_product_attention(q, k, v, is_causal=mask is not None).transpose(1, 2)
            logits = (x.unflatten(-1, (self.n_head, -1)) * self.gate_weight).sum(-1) + self.gate_bias
            gate = torch.sigmoid(logits) / GATE_INIT
            return self.out((a * gate[..., None]).flatten(2)), None

    kept = {name: getattr(whisper.model, name) for name in ("MultiHeadAttention", "LayerNorm", "Linear", "Conv1d")}
    replacements = (Gated, nn.LayerNorm, nn.Linear, nn.Conv1d)
    for name, replacement in zip(kept, replacements, strict=True):
        setattr(whisper.model, name, replacement)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims))
    for name, original in kept.items():
        setattr(whisper.model, name, original)
    return model


def engine_torch(o: dict):
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(o["threads"])
    torch.manual_seed(1)
    model, d = torch_student(sizes(o)), {n: torch.tensor(a) for n, a in data(o).items()}
    model.encoder.positional_embedding.requires_grad_(False)
    gates = [p for n, p in model.named_parameters() if "gate" in n]
    matrices = [p for n, p in model.named_parameters() if "gate" not in n and p.ndim > 1]
    others = [p for n, p in model.named_parameters() if "gate" not in n and p.ndim == 1]
    groups = [dict(params=gates, lr=GATE_LR, weight_decay=0.0), dict(params=matrices, weight_decay=DECAY),
              dict(params=others, weight_decay=0.0)]  # fmt: skip
    adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    seen, scored = [], d["targets"] >= 0
    if o["outlier_weight"]:
        penalized = [b for side in (model.encoder, model.decoder) for b in side.blocks]
        penalized += [b.mlp[2] for b in penalized] + [model.encoder.ln_post, model.decoder.ln]
        for module in penalized:
            module.register_forward_hook(lambda m, i, y: seen.append(y[0] if isinstance(y, tuple) else y))
    hidden = []
    model.decoder.ln.register_forward_hook(lambda m, i, y: hidden.append(y))
    embedding = model.decoder.token_embedding

    def decode(tokens, xa):
        """openai/whisper's decoder up to its final norm: only scored positions get logits."""
        x = embedding(tokens) + model.decoder.positional_embedding[: tokens.shape[1]]
        for block in model.decoder.blocks:
            x = block(x, xa, mask=model.decoder.mask)
        return model.decoder.ln(x)

    def loss_of():
        seen.clear()
        h = decode(d["tokens"], model.encoder(d["mel"]))[scored]
        logits = F.linear(h, embedding.weight).float()
        with torch.no_grad():
            teacher = F.linear(d["teacher_hidden"][scored].float(), d["embedding"]).float()
            soft = F.log_softmax(teacher / TEMPERATURE, -1)
        kl = F.kl_div(F.log_softmax(logits / TEMPERATURE, -1), soft, reduction="batchmean", log_target=True)
        loss = KL * TEMPERATURE**2 * kl + CE * F.cross_entropy(logits, d["targets"][scored])
        if o["outlier_weight"]:
            means = [(a.float() / TAU).square().square().mean() for a in seen]  # pow is slower
            loss = loss + o["outlier_weight"] * torch.log1p(torch.stack(means)).mean()
        return loss

    def one_step() -> float:
        adamw.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=o["precision"] == "bf16"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        return loss.item()

    return one_step


ENGINES = {"minigate": engine_minigate, "torch": engine_torch}


def work(engine: str, options: str) -> None:
    """Make the student, say so, then take one step a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    one_step = ENGINES[engine](json.loads(options))
    print(json.dumps({}), file=answers, flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        loss = one_step()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
        answer = {"wall_s": wall, "cpu_s": cpu, "loss": loss, "peak_mb": peak / 1e3}
        print(json.dumps(answer), file=answers, flush=True)


# --- in the parent ---


class Engine:
    """One engine's process; `steps` collects what it answers."""

    def __init__(self, name: str, python: str, options: dict):
        self.label, self.steps = f"{name} {options['precision']}", []
        threads = str(options["threads"])
        env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        command = [python, __file__, "--work", name, json.dumps(options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench_training: {self.label}: the engine stopped, exit code {self.process.wait()}")
        return json.loads(line)

    def step(self, count: bool = True) -> None:
        print(file=self.process.stdin, flush=True)
        answer = self.answer()
        if count:
            self.steps.append(answer)

    def of(self, key: str) -> list[float]:
        return [step[key] for step in self.steps]

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(options: dict, torch: str | None, precisions: list[str], steps: int) -> list[Engine]:
    """PyTorch's engines, then ours."""
    pythons = {"torch": torch, "minigate": sys.executable}
    engines = [Engine(name, python, {**options, "precision": precision})
               for name, python in pythons.items() if python for precision in precisions]  # fmt: skip
    for number in range(-2, steps):
        for engine in engines:
            engine.step(count=number >= 0)
    for engine in engines:
        engine.stop()
    return engines


def processor() -> str:
    """Name and cores, as far as the system says."""
    names = [x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def row(engine: Engine, first: Engine, seconds: float) -> str:
    """`first` is PyTorch's faster precision; a ratio above 1 is a step faster than its."""
    ratios = sorted(b / a for a, b in zip(engine.of("wall_s"), first.of("wall_s"), strict=True))
    wall = median(engine.of("wall_s"))
    return (f"| {engine.label} | {wall:.2f} | {median(engine.of('cpu_s')):.2f} | {median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {seconds / wall:.1f} | {max(engine.of('peak_mb')):.0f} |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="interpreter with torch and openai-whisper; default: ours alone")
    parser.add_argument("--dims", choices=STATES, default="tiny.en", help="default tiny.en")
    parser.add_argument("--windows", type=int, default=8, help="default 8")
    parser.add_argument("--seconds", type=int, default=10, help="of a window, default 10")
    parser.add_argument("--tokens", type=int, default=40, help="of a window, default 40")
    parser.add_argument("--outlier-weight", type=float, default=0.0, help="default 0")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--steps", type=int, default=20, help="timed, after two others; default 20")
    args = parser.parse_args(argv)
    options = {n: getattr(args, n) for n in ("dims", "windows", "seconds", "tokens", "outlier_weight", "threads")}
    engines = measure(options, args.torch, args.precision, args.steps)
    first = min(engines[: len(args.precision)], key=lambda engine: median(engine.of("wall_s")))
    print(f"{processor()}, {args.threads} threads; {args.dims}, {args.windows} windows of {args.seconds} s, "
          f"{args.tokens} tokens each; outlier weight {args.outlier_weight:g}; {args.steps} steps, interleaved\n")
    print("| engine | wall s | CPU s | times as fast (spread) | audio s per s | peak MB |")
    print("|---" * 6 + "|")
    for engine in engines:
        print(row(engine, first, args.windows * args.seconds), flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:4])
    else:
        sys.exit(main())
