"""The same bits whatever compiles the kernels and whatever they run on: one hash of all results on a fixed set."""

from __future__ import annotations

import filecmp
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

import compiled_kernels
import hashed
from compiled_kernels import ARM, EMULATOR, ROOT, needs
from kl_ext import _library
from operators import DTYPES, OPERATORS
from ordered_sum import reduced_sum


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return hashed.lines(torch.device("cpu"))


def test_the_operators_give_the_hash(device: torch.device) -> None:
    assert hashed.hash_of(hashed.lines(device)) == hashed.HASH


def test_the_set_has_a_million_numbers_of_every_operator_dtype_weight_and_reduction(lines: list[str]) -> None:
    assert sum(x.numel() for call in hashed.calls() for x in call.inputs(hashed.FLAT)) > 1e6
    names = [line.rpartition(" ")[0] for line in lines]
    assert len(set(names)) == len(names)
    for operator in OPERATORS:
        for dtype in map(hashed.name_of, DTYPES):
            for count in operator.counts:
                for weight in ("unweighted", "weighted", "masked") if operator.reduces else ("unweighted",):
                    of_call = f"{operator} {count} {dtype} wide {weight} "
                    found = {name.removeprefix(of_call) for name in names if name.startswith(of_call)}
                    wanted = {"terms", *(f"gradient{i}" for i in range(count))}
                    wanted |= {"sum", "sum0", "sum1", "mean1", "batchmean"} if operator.reduces else set()
                    wanted |= {f"prior_gradient{i}" for i in range(count)} if count == 4 else set()
                    assert wanted <= found


def test_the_set_holds_every_kind_of_result() -> None:
    """NaN, infinities, zeros and subnormal numbers, so that their bits are compared too."""
    tiny = torch.finfo(torch.float32).tiny
    for call in hashed.calls():
        if call.dtype == torch.float32 and call.range == "wide":
            found = dict(hashed.results(call, torch.device("cpu")))
            assert found["terms"].isnan().any() and found["terms"].isinf().any() and found["terms"].isfinite().any()
            gradients = torch.cat([found[f"gradient{i}"] for i in range(call.count)]).abs()
            assert ((gradients > 0) & (gradients < tiny)).any() and (gradients == 0).any()
            assert all(x.unique().numel() > 100 for x in found.values() if x.numel() == hashed.TERMS)
            assert all(x.isfinite().all() for name, x in found.items() if "sum" in name or "mean" in name)


def test_one_bit_and_another_order_change_the_hash(lines: list[str]) -> None:
    call = next(c for c in hashed.calls() if c.operator.reduces and c.dtype == torch.float32)
    found = dict(hashed.results(call, torch.device("cpu")))
    terms = call.operator.operator(*call.inputs(hashed.FLAT))
    assert torch.equal(reduced_sum(terms, [0]), found["sum"])
    in_another_order = terms.cumsum(0)[-1]
    one_bit = found["terms"].clone().view(torch.int32)
    one_bit[7] ^= 1
    for name, wrong in (("sum", in_another_order), ("terms", one_bit.view(torch.float32))):
        place = lines.index(f"{call} {name} {hashed.checksum(found[name])}")
        changed = [*lines[:place], f"{call} {name} {hashed.checksum(wrong)}", *lines[place + 1 :]]
        assert hashed.hash_of(lines) == hashed.HASH != hashed.hash_of(changed)


def test_the_checksum_tells_the_sign_of_zero_and_no_nan_from_another() -> None:
    nans = torch.tensor([0x7FC00000, 0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    assert len({hashed.checksum(x) for x in nans}) == 1
    assert hashed.checksum(torch.tensor(0.0)) != hashed.checksum(torch.tensor(-0.0))


def built_kernels(capability: str) -> Path:
    """The object file that the loaded library was linked from."""
    for library in ROOT.glob("build/*/libkl_ext.so"):
        if filecmp.cmp(library, _library.LIBRARY, shallow=False):
            for kernels in library.parent.glob(f"CMakeFiles/kl_ext_kernels_{capability}.dir/csrc/cpu/kernels.cpp.o"):
                return kernels
    pytest.skip("the library was not built in this source folder, or not for these vectors")


@pytest.mark.parametrize("capability", compiled_kernels.VECTORS)
def test_the_kernels_of_this_build_give_the_hash(capability: str, tmp_path: Path, lines: list[str]) -> None:
    if not compiled_kernels.runs_here(capability):
        pytest.skip(f"this processor has no {capability}")
    needs("g++")
    printed = compiled_kernels.printed("g++", compiled_kernels.flags_of(capability), built_kernels(capability), tmp_path)
    assert [line for line in printed if line not in lines] == []
    assert hashed.hash_of(printed) == hashed.HASH


def test_the_flags_are_those_of_the_build() -> None:
    build = (ROOT / "CMakeLists.txt").read_text()
    (kernels,) = re.findall(r"^ *(-O3 .*?) \$\{flags", build, re.MULTILINE)
    assert set(kernels.split()) <= set(compiled_kernels.FLAGS)
    assert "-ffp-contract=off" in build
    for capability, flags in compiled_kernels.VECTORS.items():
        assert not flags or f"set(flags_{capability} {' '.join(flags)})" in build


# What a compiler may do wrong, or a change of the sources: a file of csrc, what stands there, and what is put in its place.
FAULTS = {
    "another coefficient": ("math/exponential.h", "0x1.55555ap-2f", "0x1.55555cp-2f"),
    "another order": ("math/summation.h", "kLanes = 64", "kLanes = 32"),
    "a product that is rounded": ("math/platform.h", "__builtin_fmaf(a, b, c)", "a * b + c"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernels_changes_the_hash(fault: str, tmp_path: Path) -> None:
    needs("g++")
    if not compiled_kernels.runs_here("AVX2"):
        pytest.skip("this processor has no AVX2")
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file, there, instead = FAULTS[fault]
    text = (csrc / file).read_text()
    assert there in text
    (csrc / file).write_text(text.replace(there, instead))
    flags = compiled_kernels.flags_of("AVX2", csrc)
    kernels = tmp_path / "kernels.o"
    subprocess.run(["g++", *flags, "-O1", "-c", csrc / "cpu/kernels.cpp", "-o", kernels], check=True)
    assert hashed.hash_of(compiled_kernels.printed("g++", flags, kernels, tmp_path)) != hashed.HASH


@pytest.mark.slow
def test_arm_gives_the_hash(tmp_path: Path) -> None:
    needs(ARM, EMULATOR)  # on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user
    assert compiled_kernels.hash_of(ARM, "-O3", "DEFAULT", tmp_path) == hashed.HASH


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"there is no {ARM}")
def test_the_library_compiles_for_arm() -> None:
    """Against the headers of this torch; there is no library of torch for ARM here to link with."""
    sources = [path for folder in ("csrc", "csrc/autograd", "csrc/cpu") for path in sorted((ROOT / folder).glob("*.cpp"))]
    sources = [path for path in sources if path.name not in ("bindings.cpp", "python.cpp", "kernels.cpp")]
    includes = [f"-isystem{folder}" for folder in torch.utils.cpp_extension.include_paths()]
    for source in sources:
        subprocess.run([ARM, "-std=c++20", "-fsyntax-only", "-I", ROOT / "csrc", *includes, source], check=True)
