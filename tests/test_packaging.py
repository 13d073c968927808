"""What others see of the package: the source distribution, CMake's find_package, type checkers, uv and pip."""

import importlib.metadata
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from kl_ext import _library

SOURCE = Path(__file__).resolve().parent.parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP", "UV", "KL_EXT"))}
ENVIRONMENT["PIP_CONFIG_FILE"] = os.devnull
ENVIRONMENT["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=cwd, env={**ENVIRONMENT, **environment}, text=True, timeout=120, **streams)


# The source distribution.


def test_the_sdist_holds_the_whole_checkout(tmp_path):
    """So that whatever its tests and pages read is there."""
    if not (SOURCE / ".git").exists():
        pytest.skip("this folder is no git checkout")
    listings = [run("git", "ls-files", "-z", *more, cwd=SOURCE) for more in ([], ["--others", "--exclude-standard"])]
    tracked, others = ({name for name in said.stdout.split("\0") if (SOURCE / name).is_file()} for said in listings)
    copy = tmp_path / "copy"  # the build writes beside the sources
    for name in tracked | others:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE / name, copy / name)
    script = "import sys, kl_ext_build; print(kl_ext_build.build_sdist(sys.argv[1]))"
    built = run(sys.executable, "-c", script, tmp_path, cwd=copy, PYTHONPATH="build_backend")
    assert built.returncode == 0, built.stdout
    with tarfile.open(tmp_path / built.stdout.splitlines()[-1]) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert tracked <= held, sorted(tracked - held)
    assert {name.partition("/")[0] for name in held - tracked - others} <= {"PKG-INFO", "setup.cfg", "kl_ext.egg-info"}


# CMake.


@pytest.mark.parametrize(
    "wanted, is_found", [("", True), ("0.1", True), ("0.1.0", True), ("0.0", False), ("0.9", False), ("1.0", False)]
)
def test_find_package_looks_at_the_version(wanted, is_found, tmp_path):
    """Before 1.0, another minor version is another interface."""
    assert _library.build_facts().version.startswith("0.1."), "the versions above are chosen for 0.1"
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.25)\nproject(user LANGUAGES NONE)\nfind_package(kl_ext {wanted} QUIET)\n"
        "message(STATUS FOUND=${kl_ext_FOUND})\n"
    )
    said = run("cmake", "-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={_library.PACKAGE}", cwd=tmp_path)
    assert said.returncode == 0, said.stdout
    assert f"FOUND={int(is_found)}\n" in said.stdout


# Type checkers, and the source folder on the path.


def test_mypy_finds_the_installed_package(tmp_path):
    pytest.importorskip("mypy", reason="the extra `check` has it")
    (tmp_path / "user.py").write_text("import kl_ext\n\nreveal_type(kl_ext.kl_div_single_loss)\n")
    # torch takes mypy half a minute and is not the question.
    (tmp_path / "mypy.ini").write_text("[mypy]\ncache_dir = /dev/null\n[mypy-torch.*]\nfollow_imports = skip\n")
    said = run(sys.executable, "-m", "mypy", "user.py", cwd=tmp_path)
    assert said.returncode == 0, said.stdout
    assert "(mu: Any, log_var: Any, *, clamp_min: float" in said.stdout.replace("builtins.", "")


def test_the_source_folder_on_the_path_offers_nothing_but_the_package():
    """An editable install puts it there. Folders without __init__.py give way to a package anywhere on the path."""
    assert {module.name for module in pkgutil.iter_modules([str(SOURCE)])} == {"kl_ext", "setup"}
    import cmake

    assert not Path(cmake.__file__).is_relative_to(SOURCE / "cmake")
