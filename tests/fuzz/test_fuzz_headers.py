"""Fuzzing finds nothing in the headers, and finds what is wrong in copies of them. It needs g++ only: see headers.cpp."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import headers

WITHOUT_LIBFUZZER = ["-DKL_EXT_WITHOUT_LIBFUZZER"]
RUNS = {"dividers": 100_000, "chunks": 5_000, "pieces": 3_000, "sum_layouts": 20_000, "sums": 20_000, "halves": 100_000}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


class Fault(NamedTuple):
    target: str
    header: str
    right: str
    wrong: str


LAYOUT_FAULTS = [
    Fault("dividers", "cuda/layout.h", "<< log_divisor) < divisor", "<< log_divisor) + 1 < divisor"),
    Fault("dividers", "cuda/layout.h", "<< 32) / divisor + 1)", "<< 32) / divisor)"),
    Fault("chunks", "cuda/sum_layout.h", "before = (chunks - 1)", "before = (chunks - 2)"),
    Fault("pieces", "cuda/layout.h", "dim, cut, size - cut)", "dim, cut - 1, size - cut + 1)"),
    Fault("pieces", "cuda/layout.h", "while (2 * cut < size) {", "cut = size / 2;\n    while (false) {"),
    Fault("pieces", "cuda/layout.h", "iteration.operand[i]) < KL_EXT_INDICES;", "iteration.operand[i]) < 4 * KL_EXT_INDICES;"),
    Fault("pieces", "cuda/layout.h", "operand.data) % kVectorBytes == 0", "operand.data) % 8 == 0"),
    Fault("sum_layouts", "cuda/sum_layout.h", "for (int i = 0; merges && i", "for (int i = 1; merges && i"),
    Fault(
        "sum_layouts",
        "cuda/sum_layout.h",
        "[result.ndim] = terms.operand[i].strides[dim]",
        "[result.ndim] = terms.operand[i].strides[0]",
    ),
    Fault("sum_layouts", "cuda/sum_layout.h", "fits &= terms.operand[i].strides[1] == 0", "fits &= true"),
    # Strides of 2^32 bytes and more overflow when they are squared.
    Fault(
        "sum_layouts",
        "cuda/sum_layout.h",
        "std::abs(kept_stride) < std::abs(reduced_stride)",
        "kept_stride * kept_stride < reduced_stride * reduced_stride",
    ),
]
ARITHMETIC_FAULTS = [
    Fault("sums", "math/summation.h", "lanes[i] += upper[i]", "lanes[i] += upper[half * columns - 1 - i]"),
    Fault("sums", "math/summation.h", "lanes < kLanes && lanes < n", "lanes < kLanes && 2 * lanes < n"),
    Fault("sums", "cpu/sums.h", "lanes, next(run), done % math::kLanes", "lanes, next(run), 0"),
    Fault("sums", "cpu/sums.h", "    i = 1;\n", "    i = 2;\n"),
    Fault("halves", "math/half.h", "0x0fffu + ((magnitude >> 13) & 1)", "0x1000u"),
    Fault("halves", "math/half.h", "toward_zero | (inexact ? 1 : 0)", "to_bits(nearest)"),
    Fault("halves", "math/half.h", "magnitude < 0x38800000u", "magnitude < 0x38000000u"),
    Fault("halves", "math/half.h", "magnitude >= 0x477ff000u", "magnitude >= 0x477f0000u"),
    Fault("halves", "cpu/groups.h", "from_bits<float>(word & kUpperHalf)", "from_bits<float>(word)"),
]


def run(program: Path, target: str, seed: int = 1) -> subprocess.CompletedProcess[str]:
    return headers.fuzz(program, target, f"-runs={RUNS[target]}", f"-seed={seed}")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return headers.build("g++", tmp_path_factory.mktemp("fuzz") / "headers", WITHOUT_LIBFUZZER)


@needs_compiler
@pytest.mark.parametrize("target", headers.TARGETS)
def test_random_inputs_find_nothing(program, target):
    result = run(program, target)
    assert result.returncode == 0, result.stderr
    assert f"Done {RUNS[target]} runs" in result.stderr


@needs_compiler
def test_faults_are_found_by_the_target_they_concern(tmp_path):
    """A fault in a layout and one in the arithmetic at once, which do not meet: half as many programs to compile."""
    missed = []
    for n, pair in enumerate(itertools.zip_longest(LAYOUT_FAULTS, ARITHMETIC_FAULTS)):
        sources = tmp_path / str(n)
        for folder in ("cpu", "cuda", "math"):
            shutil.copytree(headers.ROOT / "csrc" / folder, sources / folder, ignore=shutil.ignore_patterns("sass*"))
        faults = [fault for fault in pair if fault is not None]
        for fault in faults:
            path = sources / fault.header
            text = path.read_text()
            assert text.count(fault.right) == 1, fault
            path.write_text(text.replace(fault.right, fault.wrong))
        program = headers.build("g++", sources / "headers", WITHOUT_LIBFUZZER, sources)
        for fault in faults:
            result = run(program, fault.target)
            if result.returncode == 0:
                missed.append(fault)
    assert missed == []


@pytest.mark.slow
def test_libfuzzer_finds_nothing(tmp_path):
    compiler = headers.clang()
    if compiler is None:
        pytest.skip("no clang++ with libFuzzer")
    program = headers.build(compiler, tmp_path / "headers", headers.FUZZER)
    for target in headers.TARGETS:
        result = headers.fuzz(program, target, "-runs=10000", "-seed=1", corpus=tmp_path / target)
        assert result.returncode == 0, result.stderr
