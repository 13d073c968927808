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

SOURCE = Path(__file__).resolve().parents[2]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP", "UV", "KL_EXT"))}
ENVIRONMENT["PIP_CONFIG_FILE"] = os.devnull
ENVIRONMENT["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
ENVIRONMENT["COLUMNS"] = "1000"  # uv breaks the lines of its messages there


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


# The extras. The site is built with its own alone: test_site.py.


@pytest.mark.parametrize(
    ("extra", "program"),
    [
        ("demo", "examples/train_vae.py"),
        ("bench", "benchmarks/bench.py"),
        ("bench", "benchmarks/gpu_check.py"),
        ("wheels", "build_backend/wheels.py"),
    ],
)
def test_an_extra_brings_all_that_its_program_imports(extra, program):
    only_extra = SOURCE / "tests" / "support" / "only_extra.py"
    done = run(sys.executable, only_extra, extra, SOURCE / program, "--help", cwd=SOURCE)
    assert done.returncode == 0, done.stdout


# CMake.


def find_package(wanted: str, torch_version: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Of torch there are the names of its CMake files. test_cpp.py builds programs, with a real torch."""
    (folder / "TorchConfig.cmake").touch()
    (folder / "TorchConfigVersion.cmake").write_text(
        f"set(PACKAGE_VERSION {torch_version})\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n"
    )
    (folder / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.25)\nproject(user LANGUAGES NONE)\nfind_package(kl_ext {wanted} REQUIRED)\n"
    )
    options = (f"-DCMAKE_PREFIX_PATH={_library.PACKAGE}", f"-DTorch_DIR={folder}")
    return run("cmake", "-S", ".", "-B", "build", *options, cwd=folder)


RELEASE, *_ = _library.build_facts().torch_version.partition("+")


@pytest.mark.parametrize(
    "wanted, is_found", [("", True), ("0.2", True), ("0.2.0", True), ("0.1", False), ("0.9", False), ("1.0", False)]
)
def test_find_package_looks_at_the_version(wanted, is_found, tmp_path):
    """Before 1.0, another minor version is another interface."""
    assert _library.build_facts().version.startswith("0.2."), "the versions above are chosen for 0.2"
    said = find_package(wanted, RELEASE, tmp_path)
    assert (said.returncode == 0) == is_found, said.stdout
    assert is_found or f'compatible with requested version "{wanted}"' in " ".join(said.stdout.split())


def test_find_package_refuses_a_torch_of_another_minor_version(tmp_path):
    major, minor, _ = RELEASE.split(".", 2)
    assert find_package("", f"{major}.{minor}.99", tmp_path).returncode == 0
    for other in (f"{major}.{minor}9.0", f"{major}.{int(minor) - 1}.0", f"1{major}.{minor}.0"):
        said = find_package("", other, tmp_path)
        assert said.returncode != 0
        expected = f"kl_ext was built against torch {_library.build_facts().torch_version}, and CMake found torch {other} in"
        assert expected in " ".join(said.stdout.split())


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


# uv and pip, without a network. A wheel with metadata alone is enough where nothing is built.


def write_metadata(packages: Path, name: str, version: str) -> None:
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{file},,\n" for file in ("METADATA", "WHEEL", "RECORD")))


def write_wheel(folder: Path, root: Path, files: list[Path], name: str, version: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file in files:
            wheel.write(root / file, file)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """What the build requires: this environment's setuptools, which the build backend imports, and names of tools."""
    folder = tmp_path_factory.mktemp("wheels")
    setuptools = importlib.metadata.distribution("setuptools")
    files = [Path(file) for file in setuptools.files or [] if ".." not in file.parts and file.suffix != ".pyc"]
    write_wheel(folder, Path(str(setuptools.locate_file(""))), files, "setuptools", setuptools.version)
    for name, version in (("cmake", "4.0"), ("ninja", "1.11")):
        root = tmp_path_factory.mktemp(name)
        write_metadata(root, name, version)
        write_wheel(folder, root, [file.relative_to(root) for file in root.glob("*/*")], name, version)
    return folder


class Environment:
    """Made by uv, with what passes for a torch 2.13.0, or with none."""

    def __init__(self, folder: Path, wheels: Path, with_torch: bool = True) -> None:
        self.folder = folder
        self.wheels = wheels
        self.python = folder / "bin" / "python"
        self.packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        made = self.uv("venv", "--python", sys.executable, folder, cwd=folder.parent)
        assert made.returncode == 0, made.stdout
        if with_torch:
            write_metadata(self.packages, "torch", "2.13.0")
            (self.packages / "torch").mkdir()
            (self.packages / "torch" / "__init__.py").touch()
            (self.packages / "torch" / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda = None\n")
        self.before = self.holds()

    def holds(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.packages.rglob("*") if file.is_file()}

    def uv(self, *command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        offline = {"UV_OFFLINE": "1", "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(self.wheels)}
        environment = {**offline, "UV_CACHE_DIR": str(self.folder.parent / "cache"), **environment}
        return run("uv", *command, cwd=cwd, VIRTUAL_ENV=str(self.folder), **environment)


@pytest.fixture
def environment(tmp_path, wheels) -> Environment:
    return Environment(tmp_path / "environment", wheels)


REQUIREMENTS = "'setuptools>=77' 'cmake>=3.25' 'ninja'"


@pytest.mark.parametrize("command", [("pip", "install"), ("pip", "install", "-e"), ("build", "--wheel")], ids=" ".join)
def test_uv_is_refused_where_its_isolation_hides_torch(command, environment, tmp_path):
    said = environment.uv(*command, SOURCE, cwd=tmp_path)
    assert said.returncode != 0
    assert "isolated in an environment that does not see your torch" in said.stdout
    advice = f"    uv pip install {REQUIREMENTS} && uv pip install --no-build-isolation .\n"
    assert advice in said.stdout
    assert advice in (SOURCE / "docs" / "start.md").read_text()
    assert "KL_EXT_TORCH_VERSION" in said.stdout
    assert environment.holds() == environment.before


def test_uv_in_the_source_folder_uses_the_environment_and_says_what_it_lacks(environment):
    said = environment.uv("pip", "install", ".", cwd=SOURCE)
    assert said.returncode != 0
    assert "come from your environment, which lacks setuptools>=77" in said.stdout
    assert f"Install them first: uv pip install {REQUIREMENTS}\n" in said.stdout
    assert environment.holds() == environment.before


def test_uv_goes_on_where_the_torch_to_fetch_is_named(environment, tmp_path):
    said = environment.uv("pip", "install", SOURCE, cwd=tmp_path, KL_EXT_TORCH_VERSION="2.14.1")
    assert said.returncode != 0
    assert "torch==2.14.1" in said.stdout.replace("\n", " ")
    assert "does not see your torch" not in said.stdout


def test_pip_goes_on_where_there_is_no_torch(tmp_path, wheels):
    python = Environment(tmp_path / "environment", wheels, with_torch=False).python
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-v", "--no-index", "--find-links", wheels]
    said = run(*pip, SOURCE, cwd=tmp_path)
    assert said.returncode != 0
    assert "building against torch>=2.11, fetched for this build" in said.stdout
    assert "No matching distribution found for torch>=2.11" in said.stdout
