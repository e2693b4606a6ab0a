"""A small random training run that tools/make_golden_training.py makes with torch and tests/test_step.py with us."""

from dataclasses import replace

import numpy as np

from minigate.batches import Batch
from minigate.checkpoint import tensor_shapes
from minigate.distill import DistillOptions
from minigate.optim import OptimOptions
from tests import check

DIMS = dict(
    n_mels=8, n_audio_ctx=20, n_audio_state=32, n_audio_head=4, n_audio_layer=2,
    n_vocab=300, n_text_ctx=12, n_text_state=32, n_text_head=4, n_text_layer=2,
)  # fmt: skip
STEPS = 10
GATE_INIT = 0.4
DISTILL = DistillOptions(kl_weight=0.8, ce_weight=1.0, hidden_weight=0.5, temperature=2.0, outlier_weight=0.3,
                         outlier_tau=2.0, outlier_power=4.0)  # fmt: skip
OPTIM = OptimOptions(lr=3e-4, gate_lr=2e-3, warmup=3, weight_decay=0.1, clip_norm=1.0)
SAMPLES = 48  # elements kept of a gradient


def golden() -> dict[str, np.ndarray]:
    with np.load(check.GOLDEN / "training.npz", allow_pickle=False) as file:
        return dict(file)


def metadata(kind: str) -> dict:
    gate = {"kind": kind} if kind == "none" else {"kind": kind, "init": GATE_INIT, "scale": 1 / GATE_INIT}
    return {"dims": DIMS, "gate": gate}


def tensors(kind: str) -> dict[str, np.ndarray]:
    """Float32; gates are random too, as after some training."""
    return {name: check.random_tensor(name, shape, eot=7) for name, shape in tensor_shapes(DIMS, kind).items()}


def batch() -> tuple[Batch, np.ndarray]:
    """-> three windows of different lengths, the teacher's embedding (V, D)."""
    rng = np.random.RandomState(5)
    targets = rng.randint(0, DIMS["n_vocab"], (3, 9))
    targets[:, :2] = -1
    tokens_in = rng.randint(0, DIMS["n_vocab"], (3, 9))
    for row, end in ((0, 6), (2, 4)):  # shorter rows end as batches.decoder_arrays ends them
        tokens_in[row, end:], targets[row, end:] = targets[row, end - 1], -1
    state = DIMS["n_text_state"]
    made = Batch(
        windows=(), mel=rng.standard_normal((3, DIMS["n_mels"], 2 * DIMS["n_audio_ctx"])).astype(np.float32),
        tokens_in=tokens_in, targets=targets,
        teacher_hidden=(targets[..., None] >= 0) * rng.standard_normal((3, 9, state)).astype(np.float16),
        frames=np.array([20, 13, 7]), seconds=1.0,
    )  # fmt: skip
    xa = rng.standard_normal((3, DIMS["n_audio_ctx"], state)).astype(np.float32)
    made = replace(made, teacher_xa=xa)
    return made, check.random_tensor("teacher.token_embedding.weight", (DIMS["n_vocab"], state), eot=7)


def sample(array: np.ndarray) -> np.ndarray:
    """Elements spread over an array, SAMPLES at most."""
    flat = np.asarray(array).reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
