"""Compile the CPU kernels with every compiler there is, and report in docs/reports/compilers.md: `make test-compilers`."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import torch

import compiled_kernels
import hashed
from reports import write_report

REPORT = compiled_kernels.ROOT / "docs" / "reports" / "compilers.md"
HEAD = ["compiler", "level", "instruction set", "the hash", "not in vectors"]
TEXT = f"""\
Every compiler makes the same numbers of a fixed set of inputs of every operator: {{lines}} results with the hash
`{hashed.HASH}` (`tests/support/hashed.py`). The last column counts the kernels of formulas that do not compute in whole
vectors; that matters at `-O3`, at which kl_ext is built. A 64-bit ARM runs under qemu."""


def row(case: tuple[str, str, str]) -> list[str]:
    compiler, level, capability = case
    with tempfile.TemporaryDirectory() as folder:
        if not compiled_kernels.runs_here(capability):
            return [*case, "not on this processor", ""]
        got = compiled_kernels.hash_of(compiler, level, capability, Path(folder))
    said = "equal" if got == hashed.HASH else f"**{got}**"
    if capability == "DEFAULT":
        return [*case, said, ""]
    scalar = compiled_kernels.not_vectorised(compiled_kernels.disassembled(compiled_kernels.kernels_of(*case)), capability)
    if level == "-O3" and scalar:
        print(f"{' '.join(case)}: not in vectors:\n  " + "\n  ".join(scalar))
    return [*case, said, f"{len(scalar)} of {len(compiled_kernels.VECTORISED)}"]


def is_wrong(row: list[str]) -> bool:
    return row[3].startswith("**") or (row[1] == "-O3" and not row[4].startswith("0") and row[4] != "")


def main() -> int:
    there = [name for name in compiled_kernels.COMPILERS if shutil.which(name)]
    cases = list(itertools.product(there, reversed(compiled_kernels.LEVELS), compiled_kernels.VECTORS))
    if shutil.which(compiled_kernels.ARM) and shutil.which(compiled_kernels.EMULATOR):
        cases.append((compiled_kernels.ARM, "-O3", "DEFAULT"))
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, one in enumerate(pool.map(row, cases), 1):
            print(f"{done} of {len(cases)}: {', '.join(one)}", flush=True)
            rows.append(one)
    names = [*compiled_kernels.COMPILERS, compiled_kernels.ARM]
    missing = [[name, "", "", "not installed", ""] for name in names if name not in {case[0] for case in cases}]
    shown = [["aarch64" if one[0] == compiled_kernels.ARM and i == 2 else cell for i, cell in enumerate(one)] for one in rows]
    text = TEXT.format(lines=f"{len(hashed.lines(torch.device('cpu'))):,}")
    ran = [one for one in rows if one[3] != "not on this processor"]
    found = f"{sum(one[3] == 'equal' for one in ran)} of {len(ran)} give the hash"
    write_report(REPORT, "make test-compilers", "tests/compilers.py", found, text, HEAD, [*shown, *missing])
    return int(any(map(is_wrong, rows)))


if __name__ == "__main__":
    sys.exit(main())
