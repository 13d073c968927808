"""The CUDA kernels on the CPU: their own sources, compiled as C++ under an emulation of CUDA, and called through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import normal_cases
import points
from operators import DTYPES, OPERATORS, Operator

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests/cuda/cuda_emulation"
STORAGES = (*DTYPES, torch.bool)  # in the order of csrc/cuda/kernels.h
NARROW, WIDE = (-30.0, 20.0), (-math.inf, math.inf)
THREADS = 256
LIBRARY = "libemulated.so"
GUARD = 64  # bytes on either side of a result that nothing may touch


# As make test-cuda-emulation sets it, with what it preloads.
SANITIZED = os.environ.get("KL_EXT_EMULATION_SANITIZE") == "1"
# -O1 would take twice the time to compile, which is most of it.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O0"]
PLAIN_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
ORDERS = ("forward", "reverse", "random")  # in the order of cuda_emulation/block.h


class KernelFault(Exception):
    """What an emulated thread did wrong, and where."""


def compile_emulated(sources: Sequence[Path], folder: Path, sanitize: bool = False, csrc: Path = ROOT / "csrc") -> list[Path]:
    """Object files in the folder, of kernels or of what drives them."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-Wall", "-Wextra"]
    flags += SANITIZE if sanitize else []
    header = ["-include", str(EMULATION / "emulation.h"), "-I", str(csrc)]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        command = [compiler, *flags, *header, "-x", "c++", "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True, env=PLAIN_ENVIRONMENT)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link_emulated(objects: Sequence[Path], out: Path, sanitize: bool = False, shared: bool = True) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    flags = (SANITIZE if sanitize else []) + (["-shared"] if shared else [])
    subprocess.run([str(compiler), *flags, *map(str, objects), "-o", str(out)], check=True, env=PLAIN_ENVIRONMENT)
    return out


@functools.cache
def build() -> Path:
    """The folder with the objects of every kernel and of the driver, and the library that they make. Compiled once for all
    processes that run tests, and again where a source has changed."""
    sources = [path for folder in (ROOT / "csrc/math", ROOT / "csrc/cuda", EMULATION) for path in folder.glob("*.*")]
    digest = hashlib.sha256(str(SANITIZED).encode())
    for path in [*sorted(sources), Path(__file__)]:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"cuda-emulation-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / LIBRARY).exists():
            kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
            objects = compile_emulated([*instances(folder), *kernels, *sorted(EMULATION.glob("*.cpp"))], folder, SANITIZED)
            link_emulated(objects, folder / "linked", SANITIZED).rename(folder / LIBRARY)
    return folder


def objects() -> list[Path]:
    return sorted(build().glob("*.o"))


def formulas() -> list[str]:
    """The list of csrc/math/formulas.h."""
    text = (ROOT / "csrc/math/formulas.h").read_text()
    return re.findall(r"\w+", re.search(r"using Formulas = FormulaList<(.*?)>;", text, re.DOTALL)[1])


def instances(folder: Path) -> list[Path]:
    """The sources that the build makes (cmake/cuda.cmake), each of which enters its functions in the driver's list."""
    template = (ROOT / "csrc/cuda/instance.cu.in").read_text()
    directions = ("forward", "backward", "forward_sum", "backward_sum")
    kernels = [(function, name) for f in formulas() for name in (f, f"Weighted<math::{f}>") for function in directions]
    sources = []
    for function, formula in [*kernels, ("forward_sum", "Weight")]:
        name = f"{function}<math::{formula}>"
        code = f"template decltype({name}) {name};"
        entry = f'const bool entered = emulation::enter("{function} {formula}", {name});'
        sources.append(folder / (re.sub(r"\W", "_", f"{formula}_{function}") + ".cu"))
        driver = f'#include "{EMULATION}/driver.h"\nnamespace kl_ext::cuda::kernels {{\n{entry}\n}}\n'
        sources[-1].write_text(template.replace("@instances@", code) + driver)
    return sources


@functools.cache
def library() -> Emulated:
    return Emulated(build() / LIBRARY)


class Emulated:
    """The functions of cuda_emulation/driver.cpp."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.last_fault.restype = ctypes.c_char_p

    def set_order(self, order: str, seed: int = 0) -> None:
        """In which threads and blocks take turns."""
        self.functions.set_order(ORDERS.index(order), ctypes.c_uint32(seed))

    def set_few_threads(self, few: int) -> None:
        """Launches that sum have small blocks up to so many threads."""
        self.functions.set_few_threads(ctypes.c_int64(few))

    def set_prepares_q(self, prepares: bool) -> None:
        """Whether each block prepares the q that all rows of a sum have, if it has a few rows."""
        self.functions.set_preparing_threads(ctypes.c_int64(1 if prepares else 2**62))

    @contextlib.contextmanager
    def indices(self, count: int) -> Iterator[None]:
        """So many, in place of 2^31, may be counted within a launch."""
        self.functions.set_indices(ctypes.c_int64(count))
        try:
            yield
        finally:
            self.functions.set_indices(ctypes.c_int64(2**31))

    def call(self, function: str, *arguments: Any) -> int:
        launches = self.functions[function](*arguments)
        if launches < 0:
            raise KernelFault(self.functions.last_fault().decode())
        return launches


class Result:
    """A tensor like another for a kernel to write, amid bytes that it must leave alone."""

    def __init__(self, like: Tensor, offset: int = 0):
        size = like.numel() * like.element_size()
        self.bytes = torch.full((size + 2 * GUARD,), 0xAB, dtype=torch.uint8)
        self.start = GUARD + offset * like.element_size()
        self.stop = self.start + size
        self.tensor = self.bytes[self.start : self.stop].view(like.dtype).as_strided(like.shape, like.stride())

    def check(self, expected: Tensor, what: str) -> None:
        assert (self.bytes[: self.start] == 0xAB).all() and (self.bytes[self.stop :] == 0xAB).all(), f"{what}: written outside"
        assert_same_bits(self.tensor, expected, what)


def assert_same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    same = (got.contiguous().view(integer) == expected.contiguous().view(integer)) | (got.isnan() & expected.isnan())
    assert same.all(), (
        f"{what}: {got[~same][:4].tolist()} instead of {expected[~same][:4].tolist()} in {int((~same).sum())} places"
    )


def formula_of(operator: Operator, count: int) -> str:
    """The formula of csrc/math that the kernels of so many inputs have, as csrc/operators.h describes the operator."""
    description = (ROOT / "csrc/operators.h").read_text().partition(f'.name = "{operator.name}"')[2]
    which = "most" if count == operator.count else "least"
    return re.search(rf"\.of_{which} = math::kFormula<math::(\w+)>", description)[1]


def without_q_too(operator: Operator, inputs: list[Tensor]) -> list[list[Tensor]]:
    """The inputs, and those of p alone where no operator takes the formula for them with all its inputs."""
    of_all = {formula_of(other, other.count) for other in OPERATORS}
    return [
        inputs[:count]
        for count in reversed(operator.counts)
        if count == operator.count or formula_of(operator, count) not in of_all
    ]


def values(rng: numpy.random.Generator, operator: Operator, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Inputs from all over the format: subnormal, huge and non-finite results come with them."""
    numel, kind = math.prod(shape), numpy.float64 if dtype == torch.float64 else numpy.float32
    source = normal_cases.pair if operator.has_deviations else points.wide_pair if operator.count == 4 else points.wide_single
    columns = source(rng, max(numel, len(normal_cases.WORST_KNOWN)), kind)
    for column in columns:
        column[rng.random(len(column)) < 0.02] = rng.choice([numpy.nan, numpy.inf, -numpy.inf])
    if operator.has_deviations:
        for deviations in columns[1::2]:
            deviations[rng.random(len(deviations)) < 0.02] *= rng.choice([-1, 0]).astype(kind)
    return [torch.from_numpy(column[:numel].copy()).view(tuple(shape)).to(dtype) for column in columns]
