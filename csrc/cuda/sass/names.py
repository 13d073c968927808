"""What a kernel's C++ name says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = {"double": "float64", "float": "float32", "BFloat16": "bfloat16", "Half": "float16"}
# Of each formula of csrc/math. Where threads keep what is of q, they read but the inputs of p.
HEADERS = (Path(__file__).resolve().parents[2] / "math").glob("*.h")
FORMULA = re.compile(r"^struct (\w+) : Formula \{.*?kInputs = (\d+);", re.MULTILINE | re.DOTALL)
INPUTS = {name: int(count) for header in HEADERS for name, count in FORMULA.findall(header.read_text())}
INPUTS |= {f"{name}GivenQ": count // 2 for name, count in INPUTS.items()}
GROUPS = {"64": "lanes", "1024": "chunks"}
RANGES = {"(Range)0": "narrow", "(Range)1": "wide"}


class Name(NamedTuple):
    """A kernel in the words of the table; "-" where a word does not apply. An unknown kernel is its C++ name."""

    kernel: str  # forward, backward; with _rows or _columns those that sum, _shared_ if threads share lanes; or of finish.cu
    formula: str = "-"
    dtype: str = "-"  # of the inputs, and after -> of the result where it has another; of the arithmetic where strided
    access: str = "-"  # rows, vectors, strided; of what a sum leaves, chunks or lanes
    range: str = "-"

    @property
    def sums(self) -> bool:
        return self.kernel.endswith(("_rows", "_columns"))

    def __str__(self) -> str:
        return " ".join(word for word in self if word != "-")


def arguments_of(text: str) -> list[str]:
    """`A<B, C>, D` cut at its outer commas."""
    cut, depth = [""], 0
    for letter in text:
        depth += (letter == "<") - (letter == ">")
        if letter == "," and depth == 0:
            cut.append("")
        else:
            cut[-1] += letter
    return [argument.strip() for argument in cut]


def name_of(demangled: str) -> Name:
    """The words for a kernel's C++ name without parameters."""
    text = re.sub(r"^void |\bkl_ext::|\bcuda::|\bmath::|\(anonymous namespace\)::", "", demangled).replace("> >", ">>")
    function, _, rest = text.rstrip().partition("<")
    arguments = arguments_of(rest.removesuffix(">"))
    try:
        if len(arguments) <= 2:
            return Name(function, "-", DTYPES[arguments[0]], *(GROUPS[group] for group in arguments[1:]))
        shares = arguments.pop() in ("true", "(bool)1") if len(arguments) == 7 else False
        formula, reach, arithmetic, inputs, result, access = arguments
        given = ""
        if function.startswith("sum_"):
            function = function.replace("_", "_shared_") if shares else function
            if formula.startswith("GivenQ<"):
                formula, given = formula.removeprefix("GivenQ<").removesuffix(">"), "GivenQ"
            direction, _, formula = formula.removesuffix(">").partition("<")
            function = f"{direction.lower()}{function.removeprefix('sum')}"
        dtype = DTYPES[arithmetic if inputs == "void" else inputs] + ("" if inputs == result else f"->{DTYPES[result]}")
        if access.startswith("Strided"):
            access = "strided"
        elif access.startswith(("Row", "Vector")):
            access = "rows" if access.startswith("Row") or "true" in access else "vectors"
        weighted = formula.startswith("Weighted<")
        formula = formula.removeprefix("Weighted<").removesuffix(">" * weighted)
        INPUTS[formula]  # else an unknown one
        return Name(function, ("Weighted" if weighted else "") + formula + given, dtype, access, RANGES[reach])
    except (KeyError, ValueError):
        return Name(text.replace(" ", ""))
