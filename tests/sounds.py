"""What tests of training data share: recordings of noise in a temporary folder, and their manifest."""

import wave

import numpy as np

from minigate.data import Recordings
from minigate.manifest import read_manifest

RATE = 16000  # Hz


def write_wav(path, samples: int, seed: int = 0, rate: int = RATE) -> None:
    """16-bit mono noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-9000, 9000, samples).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(noise.tobytes())


def write_manifest(folder, seconds, texts=None):
    """Recordings of so many seconds and a manifest of them -> its path."""
    lines = ["path\ttext\tspeaker\tsource"]
    for i, length in enumerate(seconds):
        write_wav(folder / f"{i}.wav", round(length * RATE), seed=i)
        lines.append(f"{i}.wav\t{texts[i] if texts else ''}\tsomeone\tnoise")
    (folder / "list.tsv").write_text("\n".join(lines) + "\n")
    return folder / "list.tsv"


def measured(folder, seconds, texts=None, **options):
    """-> Recordings and what it measured, in the manifest's order. What is unreadable is told to nobody."""
    path = write_manifest(folder, seconds, texts)
    recordings = Recordings(path.name, report=lambda line: None, **options)
    return recordings, recordings.measure(read_manifest(path))
