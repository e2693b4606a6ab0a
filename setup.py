"""Builds and installs minigate. Without a working C compiler the package is installed all the same and runs on NumPy.

MINIGATE_REQUIRE_EXTENSION=1 makes a failed build an error; MINIGATE_CFLAGS appends compiler flags (csrc/build.py).
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("MINIGATE_REQUIRE_EXTENSION", "") not in ("", "0")


class OptionalBuild(build_ext):
    """build_ext that gives up the extension, with one warning, when the compiler is missing or fails."""

    def run(self):
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            if REQUIRED:
                raise
            reason = str(error).partition("\n")[0][:160]
            print(f"WARNING: minigate is installed without its C extension and will be slow: {reason}", file=sys.stderr)
            self.extensions = []
            self.distribution.minigate_on_numpy = True


class TaggedWheel(bdist_wheel):
    """bdist_wheel that names a wheel without the extension py3-none-any, so that it cannot pass for one with it."""

    def get_tag(self):
        return ("py3", "none", "any") if getattr(self.distribution, "minigate_on_numpy", False) else super().get_tag()


def version() -> str:
    """__version__ of minigate/__init__.py, without importing it."""
    text = (ROOT / "minigate" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


readme = ROOT / "README.md"
setup(
    name="minigate",
    version=version(),
    description="Whisper speech recognition in NumPy plus a small C extension, with gated attention and integers",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    install_requires=["numpy", "cffi", "soundfile", "scipy", "tqdm"],
    extras_require={
        "test": ["pytest"],
        "plot": ["matplotlib"],
        "eval": ["jiwer", "whisper-normalizer"],
        "mpi": ["mpi4py"],
        "reference": ["torch", "openai-whisper"],
    },
    packages=["minigate", "minigate.weights"],
    package_dir={"minigate.weights": "weights"},
    package_data={"minigate": ["vocab/*.gz", "vocab/*.md"], "minigate.weights": ["*.safetensors", "*.md", "*.wav"]},
    cffi_modules=["csrc/build.py:ffi"],
    cmdclass={"build_ext": OptionalBuild, "bdist_wheel": TaggedWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
