"""The kernels of processors that these tests do not run on: tests/isas, compiled with the extension's own sources and
flags. For AArch64 it runs under an emulator, once with dot products and once without; for AMX it runs here, with tiles
in plain C in the place of the processor's (tests/isas/amxemulation.h), and for AVX-VNNI with AVX-512's encoding."""

import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from minigate import kernels

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "tests" / "isas"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"      # of Debian
KERNELS = {"dot_panel, pack_rows", "score_panel", "sum_panel", "value_panel", "score_keys", "sum_values",
           "weigh, weigh_diffused", "weigh_some", "finish", "quantize_row", "layer_norm_row", "attention",
           "attention_heard"}
SANITIZED = {"avx2product.c", "avxvnni.c", "amx.c", "amxbf16.c", "trial.c", "dispatch.c", "avx512vnni.c",
             "avx512bf16.c", "avx512bf16attention.c", "calls.c", "product.c", "staticattention.c", "dynamicattention.c",
             "heardattention.c"}
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
needs_arm = pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} (packages {PACKAGES})")


def run(command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False, **options)


def build(folder, compiler, steps, *link):
    """The program, in a folder of its own; steps: files and the flags that they get besides the extension's."""
    flags = [*description()["FLAGS"], "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    for files, more in steps:
        result = run([compiler, *flags, *more, "-c", *files], cwd=folder)
        assert result.returncode == 0, result.stderr
    result = run([compiler, *flags, *folder.glob("*.o"), "-lm", "-o", folder / "isas", *link])
    assert result.returncode == 0, result.stderr
    return folder / "isas"


def description():
    return runpy.run_path(str(ROOT / "csrc" / "build.py"))


def sources():
    return [ROOT / "csrc" / name for name in description()["SOURCES"]], sorted(CHECKS.glob("*.c"))


def kernels_in(output):
    """What the program says that it has tested: instruction set -> kernels."""
    found, tested = {}, None
    for line in output.splitlines():
        if line.startswith("  "):
            tested.add(line.strip().partition(":")[0])
        else:
            tested = found.setdefault(line, set())
    return found


def check(command, usable):
    result = run([*command, *usable])
    print(f"{command[:-1]}:\n{result.stdout}{result.stderr}")
    assert result.returncode == 0, f"{result.stdout.splitlines()[-1:]} {result.stderr}"
    found = kernels_in(result.stdout)
    assert list(found) == [*usable, "all agree"]
    assert all(found[name] >= KERNELS for name in usable if name != "portable")
    return found


# ---- AArch64 ----

def build_arm(folder, *flags):
    csrc, checks = sources()     # gcc 12.2 has an internal error on floats.c at -O3
    return build(folder, COMPILER, [(csrc, flags), (checks, [*flags, "-O2"])], *flags, "-static")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_arm(tmp_path_factory.mktemp("isas"))


@needs_arm
@pytest.mark.parametrize(("cpu", "usable"), [("cortex-a53", ["portable", "neon"]),
                                             ("max", ["portable", "neon", "neondot"])])
def test_neon_equals_the_portable_kernels(program, cpu, usable):
    check([EMULATOR, "-cpu", cpu, program], usable)


@needs_arm
@pytest.mark.slow
def test_neon_has_no_undefined_behaviour(tmp_path):
    program = build_arm(tmp_path, "-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    check([EMULATOR, "-cpu", "max", program], ["portable", "neon", "neondot"])


@needs_arm
def test_a_processor_without_dot_products_is_not_taken_for_one_with_them(program):
    result = run([EMULATOR, "-cpu", "cortex-a53", program, "portable", "neon", "neondot"])
    assert result.returncode == 1 and "neondot is not usable, expected is neondot" in result.stdout


# ---- AMX, AVX-VNNI ----

def reason_against_emulation():
    """What the program needs of this machine and does not find; "" if nothing."""
    if platform.machine() != "x86_64":
        return f"{platform.machine()} cannot run the rest of their kernels"
    if not kernels.isas().get("avx512vnni"):
        return "cpu lacks avx512vnni, which runs the rest of their kernels"
    return "" if shutil.which("gcc") else "no gcc"


needs_vnni = pytest.mark.skipif(bool(reason_against_emulation()), reason=reason_against_emulation())


@needs_vnni
def test_emulated_amx_and_avxvnni_equal_the_portable_kernels_and_pass_their_trials(tmp_path):
    csrc, checks = sources()
    sanitized = [path for path in csrc if path.name in SANITIZED]
    others = [path for path in csrc if path not in sanitized]
    emulated = ["-O1", "-DMG_AMX_EMULATED", "-DMG_EVEX_VNNI", f"-I{CHECKS}"]
    steps = [(others, emulated), ([*sanitized, *checks], [*emulated, *SANITIZERS])]
    bf16 = {"product in bfloat16", "attention in bfloat16"} if all(kernels.features()["avx512_bf16"]) else set()
    found = check([build(tmp_path, "gcc", steps, *SANITIZERS)], ["portable", "avx2", "avxvnni", "avx512vnni", "amx"])
    assert found["amx"] >= bf16

