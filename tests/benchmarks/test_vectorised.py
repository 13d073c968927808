"""Every CPU kernel of the formulas runs in vectors: read from its code, and from the instructions it takes."""

import re
import shutil
import subprocess
import sys

import pytest

from emulated_kernels import ROOT
from kl_ext import _library

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests" / "values"))
import test_one_hash
from instructions import count

VECTORS = {"AVX2": "%ymm", "AVX512": "%zmm"}
# Of each formula, the ranges that it has.
FORMULAS = {
    "StandardDivergence": (0, 1),
    "Divergence": (0, 1),
    "DivergenceGivenQ": (0,),
    "StandardNormalDivergence": (1,),
    "NormalDivergence": (1,),
}
# The fused operations of the polynomial alone, and of gradients that have none. A word of bfloat16 is two numbers.
FUSED = {"float": 6, "double": 12, "kl_ext::math::Half": 6, "kl_ext::math::BFloat16": 12}
GRADIENTS = {"StandardNormalDivergence": 2, "NormalDivergence": 7}


def fused_operations(formula, function, storage):
    if formula in GRADIENTS and function.startswith("backward"):
        return GRADIENTS[formula] * (1 + ("BFloat16" in storage))
    return FUSED[storage]


KERNELS = {
    f"{function}<kl_ext::math::{formula}, (kl_ext::math::Range){wide}, {storage}>": fused_operations(formula, function, storage)
    for formula, ranges in FORMULAS.items()
    for function in ("forward", "backward", "accumulate", "sum_chunks", "sum_row_chunks")
    + (("backward_to_lanes",) if "GivenQ" in formula else ("backward_of_one",))
    for wide in ranges
    for storage in FUSED
    if storage in ("float", "double") or not ("GivenQ" in formula or function == "accumulate")
}
# With a weight, for numbers of the arithmetic types.
KERNELS |= {
    f"{function}<kl_ext::math::Weighted<kl_ext::math::{formula}>, (kl_ext::math::Range){wide}, {storage}>": fused_operations(
        formula, function, storage
    )
    for formula, ranges in FORMULAS.items()
    for function in ("forward", "backward", "accumulate", "sum_chunks", "sum_row_chunks")
    for wide in ranges
    for storage in ("float", "double")
}


def disassembled(file) -> dict[str, str]:
    """The kernels by name."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    dump = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", file], check=True, capture_output=True, text=True
    ).stdout
    return dict(re.findall(r"^[0-9a-f]+ <(?:void )?(kl_ext::cpu::[^\n]*)>:\n(.*?)(?:\n\n|\Z)", dump, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    return disassembled(_library.LIBRARY)


def assert_in_whole_vectors(code, capability):
    for kernel, expected in KERNELS.items():
        [body] = [
            text
            for name, text in code.items()
            if name.startswith(f"kl_ext::cpu::{capability}::(anonymous namespace)::{kernel}(")
        ]
        fused = [
            line for line in body.splitlines() if re.search(r"vfn?m(add|sub)[0-9]+p[sd]", line) and VECTORS[capability] in line
        ]
        assert len(fused) >= expected, f"{capability}: {kernel} has {len(fused)} in whole vectors"


@pytest.mark.parametrize("capability", VECTORS)
def test_the_formulas_are_computed_in_whole_vectors(code, capability):
    if capability not in _library.build_facts().cpu_capabilities:
        pytest.skip(f"built without {capability}")
    assert_in_whole_vectors(code, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", VECTORS)
@pytest.mark.parametrize("version", range(14, 21))
def test_clang_computes_them_in_whole_vectors(version, capability, tmp_path):
    compiler = f"clang++-{version}"
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    flags = [
        *test_one_hash.FLAGS,
        *test_one_hash.VECTORS[capability],
        f"-DKL_EXT_CPU_CAPABILITY={capability}",
        "-Wno-pass-failed",
    ]
    subprocess.run(
        [compiler, *flags, "-I", ROOT / "csrc", "-c", ROOT / "csrc/cpu/kernels.cpp", "-o", tmp_path / "o"], check=True
    )


def test_a_count_above_its_ceiling_or_without_one_is_reported():
    ceilings = {"single Float": 5.0, "call single": 0.5}
    assert count.compare({"single Float": 4.9, "call single": 0.5}, ceilings) == []
    assert count.compare({"single Float": 5.1, "call single": 0.5}, ceilings) == ["single Float: 5.1 is above 5.0"]
    assert count.compare({"single Float": 5.0}, ceilings) == ["call single: not counted"]
    assert count.compare({"new": 1.0, "single Float": 5.0, "call single": 0.1}, ceilings) == ["new: has no ceiling"]


def test_counts_are_read_from_the_dumps_of_callgrind():
    dump = "version: 1\ndesc: Trigger: Client Request: call add grad\n\nevents: Ir\nsummary: 2143520\n\nfn=(1) f\n0 2600\n"
    assert count.read(dump) == ("call add grad", 2143520)
    assert count.read(dump.replace("Client Request: call add grad", "Program termination")) is None
    counts = {"call add": 1000, "call add grad": 2000, "call single": 500, "call single grad": 3000, "single Float": 4096 * 5}
    assert count.relative(counts) == {"call single": 0.5, "call single grad": 1.5, "single Float": 5.0}
