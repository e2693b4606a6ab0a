"""The kernels of processors that these tests do not run on: tests/isas, compiled for AArch64 with the extension's own
flags and sources, and run under an emulator, once with dot products and once without."""

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"      # of Debian
KERNELS = {"dot_panel, pack_rows", "score_panel", "sum_panel", "score_keys", "sum_values", "weigh", "finish",
           "quantize_row", "layer_norm_row", "attention"}
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} (packages {PACKAGES})")


def run(command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False, **options)


def build(folder, *flags):
    """The program, in a folder of its own."""
    description = runpy.run_path(str(ROOT / "csrc" / "build.py"))
    compiler = [COMPILER, *description["FLAGS"], "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *flags]
    checks = sorted((ROOT / "tests" / "isas").glob("*.c"))
    steps = ([*compiler, "-c", *(ROOT / "csrc" / name for name in description["SOURCES"])],
             [*compiler, "-O2", "-c", *checks])     # gcc 12.2 has an internal error on floats.c at -O3
    for step in steps:
        result = run(step, cwd=folder)
        assert result.returncode == 0, result.stderr
    result = run([*compiler, "-static", *folder.glob("*.o"), "-lm", "-o", folder / "isas"])
    assert result.returncode == 0, result.stderr
    return folder / "isas"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("isas"))


def kernels_in(output):
    """What the program says that it has tested: instruction set -> kernels."""
    found, kernels = {}, None
    for line in output.splitlines():
        if line.startswith("  "):
            kernels.add(line.strip().partition(":")[0])
        else:
            kernels = found.setdefault(line, set())
    return found


def check(program, cpu, usable):
    result = run([EMULATOR, "-cpu", cpu, program, *usable])
    print(f"{cpu}:\n{result.stdout}{result.stderr}")
    assert result.returncode == 0, f"{cpu}: {result.stdout.splitlines()[-1:]} {result.stderr}"
    found = kernels_in(result.stdout)
    assert list(found) == [*usable, "all agree"]
    assert all(found[name] >= KERNELS for name in usable if name != "portable")


@pytest.mark.parametrize(("cpu", "usable"), [("cortex-a53", ["portable", "neon"]),
                                             ("max", ["portable", "neon", "neondot"])])
def test_neon_equals_the_portable_kernels(program, cpu, usable):
    check(program, cpu, usable)


@pytest.mark.slow
def test_neon_has_no_undefined_behaviour(tmp_path):
    program = build(tmp_path, "-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    check(program, "max", ["portable", "neon", "neondot"])


def test_a_processor_without_dot_products_is_not_taken_for_one_with_them(program):
    result = run([EMULATOR, "-cpu", "cortex-a53", program, "portable", "neon", "neondot"])
    assert result.returncode == 1 and "neondot is not usable, expected is neondot" in result.stdout
