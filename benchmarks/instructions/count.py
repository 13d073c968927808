"""Count the instructions of the CPU kernels and of whole calls, and compare them with stated ceilings.

    python benchmarks/instructions/count.py            (`make check-instructions`; needs valgrind and a C++ compiler)
    python benchmarks/instructions/count.py --write    (state new ceilings: what was counted and a tenth more)

Unlike times, instructions are the same on a busy machine: a kernel that is no longer vectorised, a layout that falls to a
slower path, or a call that got longer shows at once. Callgrind, which has no AVX-512, makes torch and kl_ext choose AVX2;
test_vectorised.py looks at the code of both. Counted are one call on 64 x 64 elements, in instructions per element,
calls on 4 elements, in calls of at::add on as many, and calls from Python in the forms that people write, in calls of a form
that is fast (forms.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import kl_ext

HERE = Path(__file__).resolve().parent
CEILINGS = HERE / "ceilings.json"
ELEMENTS, CALLS = 64 * 64, 200  # as in operators.cpp
SLACK = 1.1
WRITTEN, FAST = "form written: ", "form fast: "


def require(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        sys.exit(f"instructions/count.py needs {' and '.join(missing)} (Debian and Ubuntu: apt install valgrind g++).")


def count_forms(folder: Path) -> None:
    """The calls of forms.py: only they are counted, for importing torch takes minutes where every instruction is."""
    library = folder / "callgrind.so"
    subprocess.run(["gcc", "-shared", "-fPIC", HERE / "callgrind.c", "-o", library], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [*valgrind(folder / "counted-forms"), "--instr-atstart=no", sys.executable, HERE / "forms.py", library]
    subprocess.run(command, check=True, env=environment)


def valgrind(out: Path) -> list[str | Path]:
    return ["valgrind", "--tool=callgrind", "--quiet", f"--callgrind-out-file={out}"]


def build(folder: Path) -> Path:
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-ldl"]
    program = folder / "instructions"
    subprocess.run(["g++", "-O1", "-std=c++20", *include, HERE / "operators.cpp", *link, "-o", program], check=True)
    return program


def run(program: Path, folder: Path) -> dict[str, int]:
    """The instructions of each case."""
    library = Path(kl_ext.__file__).parent / "lib" / "libkl_ext.so"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*valgrind(folder / "counted"), program, library], check=True, env=environment)
    count_forms(folder)
    return dict(counts for file in folder.glob("counted*.*") if (counts := read(file.read_text())) is not None)


def read(dump: str) -> tuple[str, int] | None:
    """The case and the instructions of one of callgrind's files."""
    case = re.search(r"^desc: Trigger: Client Request: (.+)$", dump, re.MULTILINE)
    total = re.search(r"^summary: (\d+)$", dump, re.MULTILINE)
    return (case[1], int(total[1])) if case and total else None


def relative(counts: dict[str, int]) -> dict[str, float]:
    """Of calls, in calls of at::add of the same kind; of forms, in those of the fast one; of anything else, per element."""

    def value(case: str) -> float:
        if case.startswith(WRITTEN):
            return counts[case] / counts[case.replace(WRITTEN, FAST)]
        if case.startswith("call "):
            return counts[case] / counts["call add grad" if case.endswith(" grad") else "call add"]
        return counts[case] / ELEMENTS

    return {case: round(value(case), 3) for case in sorted(counts) if not case.startswith(("call add", FAST))}


def compare(measured: dict[str, float], ceilings: dict[str, float]) -> list[str]:
    """What is wrong."""
    above = [
        f"{case}: {measured[case]} is above {ceilings[case]}" for case in ceilings if measured.get(case, 0) > ceilings[case]
    ]
    missing = [f"{case}: not counted" for case in ceilings if case not in measured]
    return above + missing + [f"{case}: has no ceiling" for case in measured if case not in ceilings]


def main() -> int:
    """Count, print and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="state new ceilings")
    options = parser.parse_args()
    require("valgrind", "g++", "gcc")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = relative(run(build(folder), folder))
    if options.write:
        CEILINGS.write_text(json.dumps({case: round(count * SLACK, 2) for case, count in measured.items()}, indent=1) + "\n")
    ceilings = json.loads(CEILINGS.read_text())
    for case, count in measured.items():
        unit = {"call": "calls of add", "form": "fast forms"}.get(case.split()[0], "an element")
        print(f"{case:45} {count:7.2f} {unit:13} at most {ceilings.get(case, float('nan')):7.2f}")
    problems = compare(measured, ceilings)
    print("\n".join(problems) if problems else f"All {len(measured)} counts are below their ceilings.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
