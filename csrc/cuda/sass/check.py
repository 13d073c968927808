"""Reads the machine code (SASS) of libkl_ext.so, and fails where it is not what the table csrc/cuda/sass.txt says.

    python csrc/cuda/sass/check.py                      (the library of the installed kl_ext; make check-cuda)
    python csrc/cuda/sass/check.py --library FILE       (another one, or an object file of nvcc)
    python csrc/cuda/sass/check.py --write              (and the model into csrc/cuda/README.md)

It prints, for each kernel, its 128-bit loads and stores, how many of the loads come before the arithmetic, and its registers;
then the model of model.py. What is wrong stands at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import model
from listing import Kernel, MissingToolError, UnreadableError, architectures_in, demangled, kernels_in
from names import INPUTS, Name, name_of
from paths import loads_before_use, main_path

FOLDER = Path(__file__).resolve().parent.parent
TABLE = FOLDER / "sass.txt"
ATOMICS = {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS", "SUATOM", "SURED"}  # an order that differs from run to run
LOCAL = {"LDL", "STL"}
OF_INPUTS = {"of2", "of4"}


class Row(NamedTuple):
    """A row of the table."""

    kernel: str
    formula: str
    dtype: str
    access: str
    range: str
    loads: int
    stores: int
    registers: int

    def fits(self, name: Name) -> bool:
        if self.formula in OF_INPUTS and name.formula in INPUTS:
            name = name._replace(formula=f"of{INPUTS[name.formula]}")
        return all(any(fnmatchcase(value, one) for one in word.split("|")) for word, value in zip(self[:5], name))

    def __str__(self) -> str:
        return " ".join(self[:5])


@dataclass
class Facts:
    """What is reported of a kernel for one architecture."""

    name: Name
    registers: int
    loads: int
    stores: int
    loads_before_use: int
    forbidden: list[str]
    cost: model.Cost | None


def read_table(text: str) -> tuple[list[str], list[Row]]:
    """The architectures, and the rows."""
    architectures: list[str] = []
    rows = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words and words[0] == "architectures":
            architectures = words[1:]
        elif words and words != list(Row._fields):
            kernel, formula, dtype, access, reach, *numbers = words
            loads, stores, registers = map(int, numbers)
            rows.append(Row(kernel, formula, dtype, access, reach, loads, stores, registers))
    return architectures, rows


def forbidden_in(kernel: Kernel) -> list[str]:
    """What no kernel may have: local memory, a stack, atomics."""
    opcodes = sorted({i.opcode for i in kernel.instructions if i.name in LOCAL | ATOMICS})
    what = {name: "local memory" if name.partition(".")[0] in LOCAL else "an atomic" for name in opcodes}
    found = [f"{what[name]}: {name}" for name in opcodes]
    found += [f"local memory: {kernel.local} bytes"] if kernel.local else []
    return found + ([f"a stack of {kernel.stack} bytes"] if kernel.stack else [])


def facts_of(kernels: Sequence[Kernel]) -> list[Facts]:
    facts = []
    for name, kernel in zip(map(name_of, demangled([kernel.symbol for kernel in kernels])), kernels):
        loads, stores = kernel.vector_loads, kernel.vector_stores
        path = main_path(kernel.instructions, in_loop=name.sums) if loads else []
        cost = model.cost_of(name, path) if loads else None
        facts.append(Facts(name, kernel.registers, loads, stores, loads_before_use(path), forbidden_in(kernel), cost))
    return sorted(facts, key=lambda fact: fact.name)


def facts_for(library: Path, architecture: str) -> list[Facts]:
    return facts_of(kernels_in(library, architecture))


def faults_of(found: dict[str, list[Facts]], architectures: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Every difference from the table, one line each; found: by architecture."""
    faults = [f"{missing}: no machine code in the library" for missing in architectures if missing not in found]
    for architecture, facts in found.items():
        fitting = [(fact, [row for row in rows if row.fits(fact.name)]) for fact in facts]
        used = {fit[0] for _, fit in fitting if fit}
        faults += [f"{architecture}: no kernel for the row {row}" for row in rows if row not in used]
        for fact, fit in fitting:
            head = f"{architecture}: {fact.name}"
            faults += [f"{head}: {what}" for what in fact.forbidden]
            if not fit:
                faults.append(f"{head}: no row of the table")
                continue
            for what, value, expected in (("loads", fact.loads, fit[0].loads), ("stores", fact.stores, fit[0].stores)):
                if value != expected:
                    faults.append(f"{head}: {value} 128-bit {what}, expected {expected}")
            if fact.registers < 0:
                faults.append(f"{head}: cuobjdump did not say how many registers")
            if fact.registers > fit[0].registers:
                faults.append(f"{head}: {fact.registers} registers, the ceiling is {fit[0].registers}")
    return faults


def report(found: dict[str, list[Facts]], rows: Sequence[Row]) -> list[str]:
    """A line for each kernel, with its registers for each architecture."""
    by_name: dict[Name, dict[str, Facts]] = {}
    for architecture, facts in found.items():
        for fact in facts:
            by_name.setdefault(fact.name, {})[architecture] = fact
    width = max(len(str(name)) for name in by_name)
    head = "  ".join(["128-bit loads, before use, stores", "registers", *(f"{name:>6}" for name in found), "ceiling"])
    lines = [f"{'kernel':{width}}  {head}"]
    for name, facts_by in sorted(by_name.items()):
        some = list(facts_by.values())
        counts = [sorted({getattr(fact, what) for fact in some}) for what in ("loads", "loads_before_use", "stores")]
        cells = ["-".join(str(n) for n in {values[0]: 0, values[-1]: 0}) for values in counts]  # the least and the most
        registers = "  ".join(f"{facts_by[a].registers if a in facts_by else '':>6}" for a in found)
        ceiling = next((str(row.registers) for row in rows if row.fits(name)), "")
        lines.append(f"{name!s:{width}}  {cells[0]:>13} {cells[1]:>11} {cells[2]:>7}  {'':9}  {registers}  {ceiling:>7}")
    return lines


def default_library() -> Path:
    package = importlib.util.find_spec("kl_ext")
    if package is None or package.origin is None:
        sys.exit("check-cuda: kl_ext is not installed for this Python; --library names a library.")
    return Path(package.origin).parent / "lib" / "libkl_ext.so"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--write", action="store_true", help="write the model into csrc/cuda/README.md")
    options = parser.parse_args()
    library = options.library or default_library()
    expected, rows = read_table(TABLE.read_text())
    try:
        architectures = architectures_in(library)
        if not architectures:
            sys.exit(
                f"check-cuda: {library} holds no kernels for GPUs: build it against a CUDA build of torch, with "
                "KL_EXT_CUDA=1 and nvcc."
            )
        with ProcessPoolExecutor(min(len(architectures), os.cpu_count() or 1)) as pool:
            found = dict(zip(architectures, pool.map(partial(facts_for, library), architectures)))
    except (MissingToolError, UnreadableError) as error:
        sys.exit(f"check-cuda: {error}")
    print(*report(found, rows), sep="\n")
    costs = [fact.cost for fact in found.get(model.ARCHITECTURE, []) if fact.cost is not None]
    print("", *model.printed(costs), sep="\n")
    if options.write:
        model.write(FOLDER / "README.md", costs)
    faults = faults_of(found, expected, rows)
    kernels = sum(map(len, found.values()))
    print(f"\n{library}: {kernels} kernels for {', '.join(found)}; {len(faults)} faults", *faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
