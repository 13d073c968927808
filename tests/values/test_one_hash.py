"""The CPU kernels give the same bits whatever compiles them and whatever they run on: one hash of a million results."""

from __future__ import annotations

import filecmp
import hashlib
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.utils.cpp_extension

from kl_ext import _library

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("every_kernel.cpp")  # prints a hash of each kernel's results
HASH = "b23e70dec217f60a"  # of all that it prints
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
ARM, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


def printed(compiler: str, flags: list[str], capability: str, kernels: Path, folder: Path, *emulator: str) -> list[str]:
    program = folder / "every_kernel"
    flags = [*flags, f"-DKL_EXT_CPU_CAPABILITY={capability}", "-I", str(ROOT / "csrc")]
    subprocess.run([compiler, *flags, PROGRAM, kernels, "-o", program], check=True)
    return subprocess.run([*emulator, program], check=True, capture_output=True, text=True).stdout.splitlines()


def assert_same(lines: list[str]) -> None:
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == HASH


def runs_here(capability: str) -> bool:
    order = list(VECTORS)
    here = torch.backends.cpu.get_cpu_capability()
    return capability == "DEFAULT" or (here in order and order.index(here) >= order.index(capability))


def needs(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")


def built_kernels(capability: str) -> Path:
    """The object file that the loaded library was linked from."""
    for library in ROOT.glob("build/*/libkl_ext.so"):
        if filecmp.cmp(library, _library.LIBRARY, shallow=False):
            for kernels in library.parent.glob(f"CMakeFiles/kl_ext_kernels_{capability}.dir/csrc/cpu/kernels.cpp.o"):
                return kernels
    pytest.skip("the library was not built in this source folder, or not for these vectors")


@pytest.mark.parametrize("capability", VECTORS)
def test_the_kernels_of_this_build_give_the_hash(capability: str, tmp_path: Path) -> None:
    if not runs_here(capability):
        pytest.skip(f"this processor has no {capability}")
    needs("g++")
    lines = printed("g++", FLAGS, capability, built_kernels(capability), tmp_path)
    assert len(lines) > 100
    assert len({line.split()[-1] for line in lines}) > 0.9 * len(lines), "kernels that compute nothing"
    assert_same(lines)


def test_a_wrong_bit_changes_the_hash(tmp_path: Path) -> None:
    needs("g++")
    lines = printed("g++", FLAGS, "DEFAULT", built_kernels("DEFAULT"), tmp_path)
    with pytest.raises(AssertionError):
        assert_same([*lines[:-1], lines[-1][:-1] + ("0" if lines[-1][-1] != "0" else "1")])


def test_the_flags_are_those_of_the_build() -> None:
    build = (ROOT / "CMakeLists.txt").read_text()
    (kernels,) = re.findall(r"^ *(-O3 .*?) \$\{flags", build, re.MULTILINE)
    assert set(kernels.split()) <= set(FLAGS)
    assert "-ffp-contract=off" in build
    for capability, flags in VECTORS.items():
        assert not flags or f"set(flags_{capability} {' '.join(flags)})" in build


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
@pytest.mark.parametrize("capability", VECTORS)
@pytest.mark.parametrize("level", ["-O2", "-O3"])
@pytest.mark.parametrize("compiler", ["g++", *COMPILERS])
def test_every_compiler_gives_the_hash(compiler: str, level: str, capability: str, tmp_path: Path) -> None:
    if not runs_here(capability):
        pytest.skip(f"this processor has no {capability}")
    needs(compiler)
    flags = [*FLAGS, level, *VECTORS[capability]]
    assert_same(printed(compiler, flags, capability, ROOT / "csrc" / "cpu" / "kernels.cpp", tmp_path))


@pytest.mark.slow
def test_arm_gives_the_hash(tmp_path: Path) -> None:
    needs(ARM, EMULATOR)  # on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user
    kernels = ROOT / "csrc" / "cpu" / "kernels.cpp"
    assert_same(printed(ARM, FLAGS, "DEFAULT", kernels, tmp_path, EMULATOR, "-L", LIBRARIES))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"there is no {ARM}")
def test_the_library_compiles_for_arm() -> None:
    """Against the headers of this torch; there is no library of torch for ARM here to link with."""
    sources = [path for folder in ("csrc", "csrc/autograd", "csrc/cpu") for path in sorted((ROOT / folder).glob("*.cpp"))]
    sources = [path for path in sources if path.name not in ("bindings.cpp", "python.cpp", "kernels.cpp")]
    includes = [f"-isystem{folder}" for folder in torch.utils.cpp_extension.include_paths()]
    for source in sources:
        subprocess.run([ARM, "-std=c++20", "-fsyntax-only", "-I", ROOT / "csrc", *includes, source], check=True)
