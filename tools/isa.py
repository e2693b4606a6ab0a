"""Prints what the kernels can run on: what the chip has, what the operating system saves, what this process may use,
and what was chosen. MINIGATE_ISA forces an instruction set.

    python tools/isa.py
"""

import os
import platform
import sys

from minigate import kernels
from minigate.errors import UsageError


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of equal length as left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    """Prints the tables; exit code 2 if MINIGATE_ISA names what is not usable."""
    print(f"processor: {platform.machine()}, cores this process may use: {kernels.set_threads()}")
    print(f"extension: {'compiled' if kernels.compiled else 'missing'}")
    if features := kernels.features():
        words = [(name, *("yes" if flag else "no" for flag in flags)) for name, flags in features.items()]
        print(table([("feature", "chip has it", "system saves it", "process may use it"), *words]))
    print("\nusable:", " ".join(kernels.usable_isas()))
    print("unusable:", " ".join(name for name, usable in kernels.isas().items() if not usable) or "none")
    forced = os.environ.get("MINIGATE_ISA", "")
    try:
        chosen, reason = kernels.isa(), f"MINIGATE_ISA={forced}" if forced else "the fastest usable"
        if not forced and chosen != kernels.usable_isas()[-1]:
            reason += f" that can be trusted: {kernels.usable_isas()[-1]} failed its trial"
        print("chosen:", chosen, f"({reason})")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
