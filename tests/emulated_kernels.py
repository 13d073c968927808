"""The CUDA kernels on the CPU: their own sources, compiled as C++ under an emulation of CUDA, and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

import points

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # in the order of csrc/cuda/kernels.h
NARROW, WIDE = (-30.0, 20.0), (-math.inf, math.inf)
THREADS = 256
GUARD = 64  # bytes on either side of a result that nothing may touch


@functools.cache
def library() -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "tests/cuda_emulation/driver.cpp"]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-Wall", "-Wextra"]
    header = ["-include", str(ROOT / "tests/cuda_emulation/emulation.h")]
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]

        def compile_one(source: Path, out: str) -> None:
            subprocess.run([compiler, *flags, *header, "-x", "c++", "-c", str(source), "-o", out], check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        subprocess.run([compiler, "-shared", *objects, "-o", f"{folder}/libemulated.so"], check=True)
        return ctypes.CDLL(f"{folder}/libemulated.so")


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


def inputs_of(loss: str) -> int:
    return 2 if loss == "kl_div_single_loss" else 4


def values(rng: numpy.random.Generator, loss: str, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Inputs from all over the format: subnormal, huge and non-finite results come with them."""
    source = points.wide_single if loss == "kl_div_single_loss" else points.wide_pair
    columns = source(rng, max(math.prod(shape), 1), numpy.float64 if dtype == torch.float64 else numpy.float32)
    for column in columns:
        column[rng.random(len(column)) < 0.02] = rng.choice([numpy.nan, numpy.inf, -numpy.inf])
    return [torch.from_numpy(column[: math.prod(shape)].copy()).view(tuple(shape)).to(dtype) for column in columns]
