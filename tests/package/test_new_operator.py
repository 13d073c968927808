"""An operator added by the recipe of csrc/README.md: in few files and lines, with all that the others have, and every part that
is left out is missed. The operator is in new_operator.patch, and built here only."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

SOURCE = Path(__file__).resolve().parents[2]
PATCH = Path(__file__).with_name("new_operator.patch")
NAME = "normal_wasserstein"
FILES = re.findall(r"^\+\+\+ b/(.*)", PATCH.read_text(), re.MULTILINE)
# What the build and the tests read of the project.
FOLDERS = (".ci", ".github", "benchmarks", "build_backend", "cmake", "csrc", "docs", "examples", "kl_ext", "tests")
FILES_OF_ROOT = (path.name for path in SOURCE.iterdir() if path.is_file() and path.name != ".git")
PARTS = (*FOLDERS, *FILES_OF_ROOT)


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KL_EXT", "PYTEST"))}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment["PYTHONPATH"] = str(folder)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=folder, env=environment, **streams)


def copy_to(folder: Path, *without: str) -> Path:
    """The project with the patch, but for the parts of some files. Copied is what is not built."""
    for part in PARTS:
        path = SOURCE / part
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "lib", "share")
        shutil.copytree(path, folder / part, ignore=ignored) if path.is_dir() else shutil.copy(path, folder / part)
    applied = run(folder, "git", "apply", "--unsafe-paths", *(f"--exclude={file}" for file in without), PATCH)
    assert applied.returncode == 0, applied.stdout
    return folder


def test_it_takes_at_most_8_files_and_200_lines(tmp_path):
    added = [line for line in PATCH.read_text().splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
    assert len(FILES) <= 8
    assert len(added) <= 200
    copy_to(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = copy_to(tmp_path_factory.mktemp("built"))
    options = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        ["cmake", "-S", ".", "-B", "build", *options],
        ["cmake", "--build", "build"],
        ["cmake", "--install", "build", "--prefix", "kl_ext"],
    ):
        done = run(folder, *command)
        assert done.returncode == 0, done.stdout
    return folder


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


@pytest.mark.slow
def test_it_checks_itself(built):
    done = run(built, sys.executable, "-m", "kl_ext")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_every_suite_covers_it(built):
    done = pytest_in(built, "-rA", "-n", str(os.cpu_count()), "-k", NAME, "tests")
    assert done.returncode == 0, done.stdout
    passed = re.findall(r"^PASSED tests/(\w+)/", done.stdout, re.MULTILINE)
    assert {"values", "autograd", "transforms", "compile", "layouts", "cuda", "package", "errors"} <= set(passed)


def without(built: Path, folder: Path, file: str) -> Path:
    """As if the part of one Python file had been forgotten, with the library that has the operator."""
    copy_to(folder, file)
    for compiled in ("lib", "share"):
        (folder / "kl_ext" / compiled).symlink_to(built / "kl_ext" / compiled)
    for module in (built / "kl_ext").glob("*.so"):
        (folder / "kl_ext" / module.name).symlink_to(module)
    return folder


def compile_in(folder: Path, file: str) -> subprocess.CompletedProcess[str]:
    includes = [f"-I{path}" for path in ("csrc", *include_paths())]
    return run(folder, "c++", "-std=c++20", "-fsyntax-only", "-x", "c++", *includes, file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, compiled, said",
    [
        ("csrc/math/wasserstein.h", "csrc/math/formulas.h", "wasserstein.h: No such file"),
        ("csrc/math/formulas.h", "csrc/library.cpp", "'Wasserstein' is not a member"),
        ("csrc/autograd/formulas.h", "csrc/autograd/autograd.cpp", "incomplete type .*Derivatives<kl_ext::math::Wasserstein>"),
    ],
)
def test_what_is_forgotten_in_cpp_does_not_compile(file, compiled, said, tmp_path):
    done = compile_in(copy_to(tmp_path, file), compiled)
    assert done.returncode != 0
    assert re.search(said, done.stdout.replace("‘", "'").replace("’", "'")), done.stdout


@pytest.mark.slow
def test_a_description_that_is_forgotten_is_missed(tmp_path):
    """With today's library, which lacks the operator."""
    without(SOURCE, tmp_path, "")
    done = run(tmp_path, sys.executable, "-c", "import kl_ext")
    assert done.returncode != 0 and f"'kl_ext' object has no attribute '{NAME}'" in done.stdout, done.stdout


@pytest.mark.slow
def test_a_reference_that_is_forgotten_is_missed(built, tmp_path):
    done = run(without(built, tmp_path, "kl_ext/reference.py"), sys.executable, "-m", "kl_ext")
    assert done.returncode != 0 and f"kl_ext::{NAME}: the self-check does not cover it" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", ["kl_ext/functional.py", "kl_ext/onnx.py", "tests/support/operators.py"])
def test_another_part_that_is_forgotten_fails_a_test(file, built, tmp_path):
    tests = ["tests/package/test_registration.py", "tests/compile/test_onnx.py"]
    done = pytest_in(without(built, tmp_path, file), *tests)
    assert done.returncode != 0 and NAME in done.stdout, done.stdout


def test_every_part_is_left_out_once():
    left_out = {
        *("csrc/math/wasserstein.h", "csrc/math/formulas.h", "csrc/autograd/formulas.h", "csrc/operators.h"),
        *("kl_ext/functional.py", "kl_ext/reference.py", "kl_ext/onnx.py", "tests/support/operators.py"),
    }
    assert set(FILES) == left_out
