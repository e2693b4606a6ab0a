"""A teacher small enough that tests can train on it, and the arguments of a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigate import checkpoint
from tests.sounds import write_manifest
from tests.toy import toy_model

SECONDS = (0.6, 1.1, 1.4, 0.9, 2.3, 1.7, 0.5, 1.2)  # of the recordings


def make_teacher(path: Path, seed: int = 0, **dims) -> Path:
    """It hears 30 s, which the loop needs, and writes up to 6 tokens."""
    metadata, tensors = toy_model(
        seed=seed, n_audio_ctx=1500, n_text_ctx=12, n_vocab=1864, n_audio_layer=1, n_text_layer=1, **dims)  # fmt: skip
    checkpoint.write(path, metadata, tensors)
    return path


def arguments(folder: Path, output: str = "run", **options) -> list[str]:
    """Of a run in `folder`, whose teacher, recordings and labels its runs share. None: not given."""
    if not (folder / "teacher.safetensors").exists():
        make_teacher(folder / "teacher.safetensors")
        write_manifest(folder / "train", SECONDS)
        write_manifest(folder / "dev", SECONDS[:3], texts=["a word", "", "and another"])
    options = {
        "teacher": folder / "teacher.safetensors", "train": folder / "train" / "list.tsv",
        "dev": folder / "dev" / "list.tsv", "output": folder / output, "label_cache": folder / "labels",
        "mel_cache": folder / "mels", "steps": 6, "gate": "per_head", "audio_context": "variable", "batch_seconds": 6,
        "max_compression_ratio": "none", "warmup": 2, "lr": 1e-3, "threads": 1, **options,
    }  # fmt: skip
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]


def mpiexec(ranks: int, command: list[str]) -> subprocess.CompletedProcess:
    """Run a command as so many processes; the test is skipped where that is not possible."""
    pytest.importorskip("mpi4py", exc_type=ImportError)
    path = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not path:
        pytest.skip("mpiexec is not installed")
    environ = {
        **os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }  # fmt: skip
    return subprocess.run([path, "-n", str(ranks), *command], env=environ, capture_output=True, text=True, timeout=120)
