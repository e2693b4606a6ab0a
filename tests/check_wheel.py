"""Run by CI with a bare interpreter (numpy and cffi alone): the installed wheel transcribes a float32 array.

usage: python check_wheel.py WHEEL [--no-extension]
"""

import importlib.util
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np

import minigate
from minigate import kernels
from minigate.model import weights_folder

CODE_LIMIT = 2_000_000  # bytes of the package without its weights
HERE = Path(__file__).parent


def main(wheel: str, *flags: str) -> int:
    installed = Path(minigate.__file__).parent
    problems = []
    if installed == HERE.parent / "minigate":
        problems.append(f"expected an installed package, got the source tree {installed}")
    for name in ("scipy", "soundfile", "tqdm"):
        if importlib.util.find_spec(name):
            problems.append(f"expected an environment without {name}")
    if kernels.compiled == ("--no-extension" in flags):
        problems.append(f"compiled: expected {not kernels.compiled}, got {kernels.compiled}")
    with zipfile.ZipFile(wheel) as z:
        size = sum(i.file_size for i in z.infolist() if not i.filename.startswith("minigate/weights/"))
    if size > CODE_LIMIT:
        problems.append(f"package without weights: expected at most {CODE_LIMIT} bytes, got {size}")
    with wave.open(str(weights_folder() / "sample.wav")) as sample:
        audio = np.frombuffer(sample.readframes(sample.getnframes()), np.int16).astype(np.float32) / 32768
    text = minigate.load().transcribe(audio).text.strip()
    if len(text.split()) < 10:
        problems.append(f"transcript: expected the sample's words, got {text!r}")
    print(f"{installed.name} {minigate.__version__}, {size} bytes of code, {kernels.isa()}: {text}")
    for problem in problems:
        print(f"check_wheel: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
