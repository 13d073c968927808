"""The CPU kernels give the same bits on another processor, here a 64-bit ARM that qemu emulates."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.utils.cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc" / "cpu" / "kernels.cpp", Path(__file__).with_name("every_kernel.cpp")]
# As CMakeLists.txt compiles the portable kernels.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-DKL_EXT_CPU_CAPABILITY=DEFAULT"]
COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


def hashes(compiler: str, folder: Path, *emulator: str) -> list[str]:
    program = folder / compiler.replace("+", "x")
    subprocess.run([compiler, *FLAGS, "-I", ROOT / "csrc", *SOURCES, "-o", program], check=True)
    return subprocess.run([*emulator, program], check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_flags_are_those_of_the_build() -> None:
    build = (ROOT / "CMakeLists.txt").read_text()
    (kernels,) = re.findall(r"^ *(-O3 .*?) \$\{flags", build, re.MULTILINE)
    assert set(kernels.split()) <= set(FLAGS)
    assert "-ffp-contract=off" in build


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares x86-64 with ARM")
def test_every_kernel_gives_the_same_bits_on_arm(tmp_path: Path) -> None:
    for tool in ("g++", COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}; on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user")
    expected = hashes("g++", tmp_path)
    assert len(expected) > 100
    assert len({line.split()[-1] for line in expected}) > 0.9 * len(expected), "kernels that compute nothing"
    assert hashes(COMPILER, tmp_path, EMULATOR, "-L", LIBRARIES) == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}")
def test_the_library_compiles_for_arm() -> None:
    """Against the headers of this torch; there is no library of torch for ARM here to link with."""
    sources = [path for folder in ("csrc", "csrc/autograd", "csrc/cpu") for path in sorted((ROOT / folder).glob("*.cpp"))]
    sources = [path for path in sources if path.name not in ("bindings.cpp", "python.cpp", "kernels.cpp")]
    includes = [f"-isystem{folder}" for folder in torch.utils.cpp_extension.include_paths()]
    for source in sources:
        subprocess.run([COMPILER, "-std=c++20", "-fsyntax-only", "-I", ROOT / "csrc", *includes, source], check=True)
