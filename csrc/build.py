"""Describes the C extension minigate._kernels to cffi; setup.py builds it.

csrc/api.h is the header that C includes and, as it stands, cffi's cdef. Instruction sets are chosen at run time and by
function attributes, so all files share these flags. MINIGATE_CFLAGS appends to them (warnings, sanitizers).
"""

import os
import shlex
from pathlib import Path

from cffi import FFI

FOLDER = Path(__file__).resolve().parent
SOURCES = ("dispatch.c", "pool.c", "memory.c", "pack.c", "calls.c", "attention.c",
           "gate.c", "decoder.c", "staticdecoder.c", "portable.c",
           "avx2.c", "avx2product.c", "avx2attention.c", "avx2backward.c", "avxvnni.c",
           "avx512vnni.c", "avx512attention.c", "avx512backward.c",
           "amx.c", "amxbf16.c", "trial.c", "product.c", "avx512bf16.c", "avx512bf16attention.c",
           "avx512bf16backward.c",
           "training.c", "portablerows.c", "avx2rows.c", "avx512rows.c",
           "staticattention.c", "dynamicattention.c", "heardattention.c",
           "portableint8.c", "avx2int8.c", "avx512int8.c",
           "neon.c", "neonattention.c", "neonint8.c")
HEADERS = ("api.h", "kernels.h", "lanes.h", "lossrows.h", "choicerows.h", "heardrows.h", "rangeloop.h", "rows.h",
           "neon.h", "amx.h", "avx2lists.h", "avx512bf16.h")
FLAGS = ["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
         "-fvisibility=hidden", "-pthread", "-D_GNU_SOURCE"]

PREAMBLE = """
#pragma GCC diagnostic ignored "-Wunused-parameter"    /* in the glue that cffi writes, whatever flags are appended */
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include "kernels.h"
"""

ffi = FFI()
ffi.cdef((FOLDER / "api.h").read_text(encoding="utf-8"))
ffi.set_source(
    "minigate._kernels",
    PREAMBLE,
    sources=[f"csrc/{name}" for name in SOURCES],
    depends=[f"csrc/{name}" for name in (*HEADERS, "build.py")],
    include_dirs=["csrc"],
    extra_compile_args=FLAGS + shlex.split(os.environ.get("MINIGATE_CFLAGS", "")),
    extra_link_args=["-pthread"] + shlex.split(os.environ.get("MINIGATE_CFLAGS", "")),
)
