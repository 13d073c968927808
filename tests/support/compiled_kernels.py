"""The CPU kernels from any compiler: their hash, and which of them are not vectorised."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import hashed

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests/values/every_kernel.cpp"  # prints the lines of hashed.py
KERNELS = ROOT / "csrc/cpu/kernels.cpp"
OBJECTS = ROOT / "build/compilers"
# As CMakeLists.txt compiles the portable kernels; then what it adds for others.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
VECTORS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
COMPILERS = [
    f"{name}-{version}" for name, versions in {"g++": range(10, 16), "clang++": range(14, 21)}.items() for version in versions
]
LEVELS = ("-O2", "-O3")
ARM, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


def needs(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")


def runs_here(capability: str) -> bool:
    order = list(VECTORS)
    here = torch.backends.cpu.get_cpu_capability()
    return capability == "DEFAULT" or (here in order and order.index(here) >= order.index(capability))


def flags_of(capability: str, csrc: Path = ROOT / "csrc") -> list[str]:
    return [*FLAGS, *VECTORS[capability], f"-DKL_EXT_CPU_CAPABILITY={capability}", "-I", str(csrc)]


def kernels_of(compiler: str, level: str, capability: str) -> Path:
    """The object file of the kernels, compiled again where a source has changed."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    out = OBJECTS / f"{compiler}{level}-{capability}.o"
    sources = [path for folder in ("math", "cpu") for path in (ROOT / "csrc" / folder).glob("*.*")]
    if not out.exists() or out.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        new = out.with_suffix(".new")
        quiet = ["-Wno-pass-failed"] if "clang" in compiler else []
        subprocess.run([compiler, *flags_of(capability), level, *quiet, "-c", KERNELS, "-o", new], check=True)
        new.rename(out)
    return out


def printed(compiler: str, flags: Sequence[str], kernels: Path, folder: Path, *emulator: str) -> list[str]:
    """What every_kernel.cpp prints with these kernels."""
    program = folder / "every_kernel"
    subprocess.run([compiler, *flags, PROGRAM, kernels, "-o", program], check=True)
    return subprocess.run([*emulator, program], check=True, capture_output=True, text=True).stdout.splitlines()


def hash_of(compiler: str, level: str, capability: str, folder: Path) -> str:
    emulator = [EMULATOR, "-L", LIBRARIES] if compiler == ARM else []
    kernels = kernels_of(compiler, level, capability)
    return hashed.hash_of(printed(compiler, flags_of(capability), kernels, folder, *emulator))


# Of each formula, the ranges that it has.
_FORMULAS = {
    "StandardDivergence": (0, 1),
    "Divergence": (0, 1),
    "DivergenceGivenQ": (0,),
    "StandardNormalDivergence": (1,),
    "NormalDivergence": (1,),
}
# The fused operations of the polynomial alone, and of gradients that have none. A word of bfloat16 is two numbers.
_FUSED = {"float": 6, "double": 12, "kl_ext::math::Half": 6, "kl_ext::math::BFloat16": 12}
_GRADIENTS = {"StandardNormalDivergence": 2, "NormalDivergence": 7}


def _fused_operations(formula: str, function: str, storage: str) -> int:
    if formula in _GRADIENTS and function.startswith("backward"):
        return _GRADIENTS[formula] * (1 + ("BFloat16" in storage))
    return _FUSED[storage]


# The least number of fused operations of every kernel of a formula.
VECTORISED = {
    f"{function}<kl_ext::math::{formula}, (kl_ext::math::Range){wide}, {storage}>": _fused_operations(
        formula, function, storage
    )
    for formula, ranges in _FORMULAS.items()
    for function in ("forward", "backward", "accumulate", "sum_chunks", "sum_row_chunks")
    + (("backward_to_lanes",) if "GivenQ" in formula else ("backward_of_one",))
    for wide in ranges
    for storage in _FUSED
    if storage in ("float", "double") or not ("GivenQ" in formula or function == "accumulate")
}
# With a weight, for numbers of the arithmetic types.
VECTORISED |= {
    f"{function}<kl_ext::math::Weighted<kl_ext::math::{formula}>, (kl_ext::math::Range){wide}, {storage}>": _fused_operations(
        formula, function, storage
    )
    for formula, ranges in _FORMULAS.items()
    for function in ("forward", "backward", "accumulate", "sum_chunks", "sum_row_chunks")
    for wide in ranges
    for storage in ("float", "double")
}
_REGISTERS = {"AVX2": "%ymm", "AVX512": "%zmm"}


def disassembled(file: Path) -> dict[str, str]:
    """The kernels by name."""
    needs("objdump")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(file)]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r"^[0-9a-f]+ <(?:void )?(kl_ext::cpu::[^\n]*)>:\n(.*?)(?:\n\n|\Z)", dump, re.MULTILINE | re.DOTALL))


def not_vectorised(code: dict[str, str], capability: str) -> list[str]:
    """The kernels of the instruction set whose fused operations are not in whole vectors."""
    wrong = []
    for kernel, expected in VECTORISED.items():
        start = f"kl_ext::cpu::{capability}::(anonymous namespace)::{kernel}("
        [body] = [text for name, text in code.items() if name.startswith(start)]
        lines = [x for x in body.splitlines() if re.search(r"vfn?m(add|sub)[0-9]+p[sd]", x)]
        found = sum(_REGISTERS[capability] in line for line in lines)
        if found < expected:
            wrong.append(f"{kernel}: {found} of {expected}")
    return wrong
