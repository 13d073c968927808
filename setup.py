"""Drives CMakeLists.txt, the one definition of the build. Everything static about the package is in pyproject.toml.

Environment: MAX_JOBS (compilers at a time), KL_EXT_CMAKE_ARGS (more arguments for CMake), KL_EXT_LOCAL_VERSION (what follows
the + in the version of this build, as in pt213cpu); CMakeLists.txt names the rest.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

sys.path.insert(0, str(Path(__file__).resolve().parent / "cmake"))
import build_requirements
import torch_info

SOURCE = Path(__file__).resolve().parent
LOCAL_VERSION = f"+{local}" if (local := os.environ.get("KL_EXT_LOCAL_VERSION")) else ""

# The environment's own CMake and Ninja, where it is used without being activated.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])

# The date of the files in a wheel, so that two builds give the same: any will do, and this one is Hatch's.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1580601600")


def default_jobs() -> int:
    """A compiler for each core, as long as each finds a gibibyte of memory, which is more than nvcc takes for these files."""
    found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    memory = int(found[1]) >> 20 if found else 1
    return max(1, min(len(os.sched_getaffinity(0)), memory))


class CMakeBuild(build_ext):
    """Builds everything compiled with CMake, which installs it (kl_ext/_C, kl_ext/lib) and what C++ programs take besides
    (kl_ext/include, kl_ext/share)."""

    def build_extension(self, ext: setuptools.Extension) -> None:
        # An isolated build has its tools in a new folder each time: nothing may be remembered but the objects.
        (self.folder / "CMakeCache.txt").unlink(missing_ok=True)
        self.run_cmake(
            *("-S", SOURCE, "-B", self.folder, "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DKL_EXT_LOCAL_VERSION={LOCAL_VERSION}",
            *shlex.split(os.environ.get("KL_EXT_CMAKE_ARGS", "")),
        )
        self.run_cmake("--build", self.folder, "--parallel", os.environ.get("MAX_JOBS") or str(default_jobs()))
        if not self.editable_mode:
            self.install_into(Path(self.build_lib) / "kl_ext")

    def copy_extensions_to_source(self) -> None:
        self.install_into(SOURCE / "kl_ext")

    def install_into(self, package: Path) -> None:
        self.run_cmake("--install", self.folder, "--prefix", package.resolve())

    @property
    def folder(self) -> Path:
        """Objects are kept for each Python and torch they were compiled for."""
        python = f"cp{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
        return SOURCE / "build" / f"{python}-torch{torch_info.require()['version']}"

    def run_cmake(self, *arguments: str | Path) -> None:
        completed = subprocess.run(["cmake", *arguments])
        if completed.returncode:
            sys.exit(f"kl_ext: CMake stopped with status {completed.returncode}; what is wrong stands above.")


class Metadata(egg_info):
    """With the local version of this build: the setup.cfg of an sdist says that there is none."""

    def finalize_options(self) -> None:
        self.tag_build = LOCAL_VERSION
        super().finalize_options()


if "sdist" in sys.argv:
    requirement = f"torch>={torch_info.MINIMUM}"
else:
    build_requirements.check_tools()
    requirement = f"torch=={torch_info.require()['minor']}.*"  # a binary serves the minor version it was built against

(SOURCE / "build").mkdir(exist_ok=True)
for leftover in (SOURCE / "build").glob("lib*"):  # setuptools would pack modules that have been deleted since
    shutil.rmtree(leftover)

setuptools.setup(
    install_requires=[requirement],
    ext_modules=[setuptools.Extension("kl_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "egg_info": Metadata},
    options={"egg_info": {"egg_base": "." if "sdist" in sys.argv else "build"}},
)
