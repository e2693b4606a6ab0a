"""What tests share: golden files, the measures that compare with them, and the inputs that both sides regenerate.

A comparison is a Bar: a name, a measured value and the most it may be.  tests/test_golden.py asserts bars on the
project's golden files, tools/check_reference.py prints them for reference vectors of other models, and
tools/make_golden.py builds its inputs here.

T positions, V n_vocab, D n_state.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from minigate.model import encoder

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
EMBEDDED = ROOT / "weights" / "tiny.en-w8a8-dynamic.safetensors"
SAMPLE = ROOT / "weights" / "sample.wav"
SAMPLE_RATE = 16000  # Hz

MEL = 1e-4  # largest error, in the log-mel's own unit
RELATIVE = 1e-3  # of an activation: norm of the error / norm
LOGIT = 0.02  # largest error; a smaller gap between two logits leaves their order open
PROBABILITY = 1e-3
LAST_STEP = 64  # of the last position's logits a golden file keeps every 64th
SECONDS = 1e-6  # of a time that must be the same

EOT_LOGIT = 7.5  # mean of the random model's end token, whose rivals reach 15 to 20: it wins now and then
NORMS = ("attn_ln", "cross_attn_ln", "mlp_ln", "ln_post", "ln")


@dataclass(frozen=True)
class Bar:
    """A measured value and its limit, both included; `note` says where the worst of it is."""

    name: str
    value: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.value <= self.limit)  # False for NaN

    def __str__(self) -> str:
        tail = f"  {self.note}" if self.note else ""
        return f"{'ok  ' if self.ok else 'MISS'} {self.name:<44} {self.value:<10.3g} limit {self.limit:g}{tail}"


def hold(*bars: Bar) -> None:
    """Fail with every bar that is missed."""
    missed = [str(bar) for bar in bars if not bar.ok]
    assert not missed, "\n" + "\n".join(missed)


# --- golden files

def read_golden(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """PATH.npz and PATH.json -> arrays by name, facts."""
    with np.load(f"{path}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))


@cache
def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/NAME."""
    return read_golden(GOLDEN / name)[0]


@cache
def golden_json(name: str) -> dict:
    """The facts of tests/golden/NAME."""
    return read_golden(GOLDEN / name)[1]


def tensor_digest(tensors) -> str:
    """Names the weights that a golden file was made from, so that another model is noticed."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return sha.hexdigest()


# --- measures

def relative_error(found, expected) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise ValueError(f"found: expected shape {expected.shape}, got {found.shape}")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def relative_bar(name: str, found, expected, limit: float = RELATIVE) -> Bar:
    return Bar(f"{name}: relative error", relative_error(found, expected), limit)


def largest_bar(name: str, found, expected, limit: float) -> Bar:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise ValueError(f"found: expected shape {expected.shape}, got {found.shape}")
    return Bar(f"{name}: largest error", float(np.abs(found - expected).max()), limit)


def logit_bars(name: str, logits: np.ndarray, top_ids: np.ndarray, top: np.ndarray) -> list[Bar]:
    """logits (T, V) against the K largest at every position, top_ids and top (T, K), largest first.

    Their values; and the order of any two of them, and of the K-th against all the rest, wherever the gap is clear.
    """
    rows = np.arange(len(top))[:, None]
    found = logits[rows, top_ids].astype(np.float64)
    clear = top[:, :, None] - top[:, None, :] > LOGIT
    swapped = int((clear & (found[:, :, None] <= found[:, None, :])).sum())
    rest = logits.astype(np.float64)
    rest[rows, top_ids] = -np.inf
    intruders = int((rest > top[:, -1:] + LOGIT).sum())
    return [largest_bar(f"{name}: top-{top.shape[1]} logits", found, top, LOGIT),
            Bar(f"{name}: order of the top {top.shape[1]}", swapped + intruders, 0)]


def token_bar(name: str, found, expected) -> Bar:
    """Number of places at which two sequences differ; the note names the first."""
    found, expected = [int(t) for t in found], [int(t) for t in expected]
    longest = max(len(found), len(expected))
    pad = [-1] * longest
    pairs = list(zip((found + pad)[:longest], (expected + pad)[:longest], strict=True))
    wrong = [i for i, (a, b) in enumerate(pairs) if a != b]
    note = f"token {wrong[0]}: expected {pairs[wrong[0]][1]}, got {pairs[wrong[0]][0]}" if wrong else ""
    return Bar(f"{name}: tokens that differ", len(wrong), 0, note)


def result_bars(name: str, found: dict, expected: dict) -> list[Bar]:
    """A long-form result against openai/whisper's: tokens, times and text the same, figures close.

    Both are dicts of text and segments, as openai/whisper's transcribe() returns them.
    """
    ours, theirs = found["segments"], expected["segments"]
    if len(ours) != len(theirs):
        ends = f"ends {[round(s['end'], 2) for s in ours]}, expected {[round(s['end'], 2) for s in theirs]}"
        return [Bar(f"{name}: segments too many or few", abs(len(ours) - len(theirs)), 0, ends)]

    def column(key):
        return [[float(s[key]) for s in side] or [0.0] for side in (ours, theirs)]

    times = [largest_bar(f"{name}: {key} in s", *column(key), SECONDS) for key in ("start", "end")]
    return [
        token_bar(name, *([t for s in side for t in (s["seek"], *s["tokens"])] for side in (ours, theirs))),
        *times,
        Bar(f"{name}: texts that differ", sum(a["text"] != b["text"] for a, b in zip(ours, theirs, strict=True))
            + (found["text"] != expected["text"]), 0),
        largest_bar(f"{name}: avg_logprob", *column("avg_logprob"), PROBABILITY),
        largest_bar(f"{name}: no_speech_prob", *column("no_speech_prob"), PROBABILITY),
        largest_bar(f"{name}: compression_ratio", *column("compression_ratio"), 1e-6),
    ]


class Listening:
    """Passes every call on to a model's operators and keeps the outputs of those that are named after a parameter."""

    def __init__(self, ops):
        self.ops, self.seen = ops, {}

    def __getattr__(self, name):
        def call(*args, **options):
            out = getattr(self.ops, name)(*args, **options)
            if args and isinstance(args[0], str):
                self.seen[args[0]] = out
            return out

        return call


def encoder_stages(model, mel: np.ndarray) -> dict[str, np.ndarray]:
    """A float model, mel (n_mels, 3000) -> conv, block0 ..., encoder: each (n_audio_ctx, D), in the order of flow."""
    ops = Listening(model.ops)
    encoder(ops, model.dims, mel[None])
    names = {"conv": "encoder.positional_embedding"}
    names |= {f"block{i}": f"encoder.blocks.{i}.mlp.2" for i in range(model.dims.n_audio_layer)}
    return {stage: ops.seen[name][0] for stage, name in {**names, "encoder": "encoder.ln_post"}.items()}


# --- inputs that are regenerated instead of stored

def long_recording(sample: np.ndarray) -> np.ndarray:
    """A recording (n,) -> one that takes several windows: three copies of falling loudness, pauses of 0.3 to 8 s."""
    parts = []
    for gain, pause_s in ((1.0, 0.3), (0.6, 8.0), (0.3, 4.0)):
        parts += [np.float32(gain) * sample, np.zeros(int(pause_s * SAMPLE_RATE), np.float32)]
    return np.concatenate(parts)


def random_mel(n_mels: int, frames: int = 3000) -> np.ndarray:
    """(n_mels, frames) float32 in a log-mel's range, from a stream that NumPy keeps forever."""
    return np.random.RandomState(n_mels).standard_normal((n_mels, frames)).clip(-1, 1.5).astype(np.float32)


def random_dims(n_mels: int, n_vocab: int) -> dict[str, int]:
    """Whisper's shape, small: windows, context and vocabulary as they are, width 64, two layers."""
    return dict(n_mels=n_mels, n_audio_ctx=1500, n_audio_state=64, n_audio_head=2, n_audio_layer=2, n_vocab=n_vocab,
                n_text_ctx=448, n_text_state=64, n_text_head=2, n_text_layer=2)


def random_tensor(name: str, shape: tuple[int, ...], eot: int) -> np.ndarray:
    """The random model's tensor of that name, float32; eot is the end token, which must come up now and then."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape)
    leaf = name.split(".")[-2]
    if name == "decoder.ln.weight":
        pass  # of both signs: logits come through the token embedding, and a token must not call for itself
    elif leaf in NORMS:
        x = 1 + 0.1 * x if name.endswith("weight") else 0.25 * x
    elif name == "decoder.token_embedding.weight":
        x *= 0.45  # logits of standard deviation 4: clear winners, as in a trained model
        towards = random_tensor("decoder.ln.bias", shape[1:], eot)
        x[eot] = 0.3 * x[eot] + EOT_LOGIT * towards / (towards @ towards)
    elif x.ndim > 1 and "positional_embedding" not in name:
        x *= (3.0 if leaf in ("query", "key") else 1.0) / np.sqrt(np.prod(shape[1:]))
    elif x.ndim == 1:
        x *= 0.1
    return x.astype(np.float32)
