"""Installing in every documented way, in fresh virtual environments: minutes each, so `make nightly` runs them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).resolve().parents[2]
MINOR = ".".join(torch.__version__.split(".")[:2])
DROPPED = ("PYTHONPATH", "KL_EXT_TORCH_VERSION", "KL_EXT_CMAKE_ARGS", "PIP_BUILD_TRACKER", "UV")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in DROPPED}
ENVIRONMENT["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path | str = "/", **environment: str) -> str:
    """What the command prints; pip shows the build's own words on stderr."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    completed = subprocess.run(command, cwd=cwd, env={**ENVIRONMENT, **environment}, text=True, **streams)
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy, so that nothing is built in the folder under test; its objects serve every test of this file."""
    target = tmp_path_factory.mktemp("sources") / "kl_ext"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "lib", "share", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(SOURCE, target, ignore=ignored)
    return target


class Environment:
    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder)
        self.python = folder / "bin" / "python"
        self.packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"

    def pip(self, *arguments: str | Path, **environment: str) -> str:
        return run(self.python, "-m", "pip", *arguments, **environment)

    def check(self) -> str:
        """The report's self-check passes; returns the report."""
        return run(self.python, "-m", "kl_ext")


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def with_torch(environment) -> Environment:
    """The torch of this environment, seen through a path file instead of copied: pip finds it installed."""
    (environment.packages / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return environment


def assert_torch_untouched(environment: Environment) -> None:
    assert not (environment.packages / "torch").exists()
    assert run(environment.python, "-c", "import torch; print(torch.__version__)").strip() == torch.__version__


def test_pip_install_builds_against_the_torch_there_is(with_torch, sources):
    said = with_torch.pip("install", "-v", sources)
    assert f"kl_ext: building against torch {torch.__version__} in " in said
    assert f"torch=={MINOR}.*" in run(with_torch.python, "-c", "import importlib.metadata as m; print(m.requires('kl_ext'))")
    assert f"against torch {torch.__version__}" in with_torch.check()
    assert (with_torch.packages / "kl_ext/lib/libkl_ext.so").exists()
    assert_torch_untouched(with_torch)


def test_pip_install_editable(with_torch, sources, tmp_path):
    with_torch.pip("install", "-e", sources)
    assert f" in {sources}/kl_ext\n" in with_torch.check()
    assert_torch_untouched(with_torch)
    pytest.importorskip("mypy", reason="the extra `check` has it")
    typed = "import kl_ext; reveal_type(kl_ext.kl_div_single_loss)"
    options = ("--cache-dir", os.devnull, "--python-executable", with_torch.python)
    assert "(mu: torch._tensor.Tensor" in run(sys.executable, "-m", "mypy", *options, "-c", typed, cwd=tmp_path)
    shutil.copytree(SOURCE / "kl_ext", tmp_path / "kl_ext", ignore=shutil.ignore_patterns("*.so", "lib", "share"))
    elsewhere = subprocess.run([with_torch.python, "-c", "import kl_ext"], cwd=tmp_path, capture_output=True, text=True)
    assert f"the package, which is installed in {sources}/kl_ext: start Python elsewhere." in elsewhere.stderr
    assert "Rebuild" not in elsewhere.stderr
    for built in ("include", "lib", "share"):
        shutil.rmtree(sources / "kl_ext" / built)
    for built in (sources / "kl_ext").glob("*.so"):
        built.unlink()


def test_pip_install_without_build_isolation(with_torch, sources):
    with_torch.pip("install", "setuptools>=77", "cmake", "ninja")
    with_torch.pip("install", "--no-build-isolation", sources)
    with_torch.check()
    assert_torch_untouched(with_torch)


def test_missing_build_requirements_are_named_without_build_isolation(with_torch, sources):
    (with_torch.packages / "torch.pth").unlink()  # and with it a newer setuptools, CMake and Ninja
    completed = subprocess.run(
        [with_torch.python, "-m", "pip", "install", "--no-build-isolation", sources],
        env={**ENVIRONMENT, "PATH": "/bin"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 1
    said = completed.stdout + completed.stderr
    assert "the build requirements come from your environment, which lacks setuptools>=77" in said
    assert f"Install them first: {with_torch.python} -m pip install 'setuptools>=77' 'cmake>=3.25' 'ninja'" in said


@pytest.fixture
def with_torch_for_uv(with_torch) -> Environment:
    """uv takes for installed what has its metadata in the environment itself."""
    for metadata in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        if not metadata.name.startswith(("kl_ext-", "setuptools-", "cmake-", "ninja-", "pip-")):
            shutil.copytree(metadata, with_torch.packages / metadata.name)
    return with_torch


def test_the_command_that_uv_is_told_builds_against_the_torch_there_is(with_torch_for_uv, sources, tmp_path):
    environment = with_torch_for_uv
    variables = {"VIRTUAL_ENV": str(environment.python.parent.parent), "UV_CACHE_DIR": str(tmp_path / "cache")}
    refused = subprocess.run(
        ["uv", "pip", "install", sources], cwd=tmp_path, env={**ENVIRONMENT, **variables}, capture_output=True, text=True
    )
    assert refused.returncode != 0
    (command,) = re.findall(r"^ +(uv pip install .* && .*)$", refused.stderr, re.MULTILINE)
    run("bash", "-c", command, cwd=sources, **variables)
    environment.check()
    assert_torch_untouched(environment)
    # With the requirements there, the plain command is enough in the source folder.
    run("uv", "pip", "install", "--reinstall-package", "kl_ext", ".", cwd=sources, **variables)
    environment.check()
    assert_torch_untouched(environment)


def test_a_wheel_is_built_from_the_sdist_and_installs(with_torch, sources, tmp_path):
    script = "import sys; sys.path.insert(0, 'build_backend'); import kl_ext_build as b; print(b.build_sdist(sys.argv[1]))"
    with_torch.pip("install", "setuptools>=77")
    name = run(with_torch.python, "-c", script, tmp_path, cwd=sources).splitlines()[-1]
    with_torch.pip("wheel", "--no-deps", "-w", tmp_path, tmp_path / name)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        metadata = archive.read(next(file for file in files if file.endswith("METADATA"))).decode()
    assert f"Requires-Dist: torch=={MINOR}.*" in metadata
    assert "Requires-Python: >=3.10" in metadata
    with_torch.pip("install", "--no-deps", wheel)
    with_torch.check()
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path)
    run_tests_of_the_tree(with_torch, tmp_path / name.removesuffix(".tar.gz"))


def run_tests_of_the_tree(environment: Environment, unpacked: Path) -> None:
    """Those that read its files and need no build, against the installed package."""
    others = re.compile("install|gpu_check|emulation")
    files = (unpacked / "tests").rglob("test_*.py")
    tests = [file for file in files if "__file__" in file.read_text() and not others.search(file.name)]
    assert len(tests) > 5
    # Not from the folder, which `python -m` would put first on the path: its kl_ext is not compiled.
    run(environment.python, "-m", "pytest", "-p", "no:cacheprovider", *tests, cwd="/")


def test_pip_install_fetches_torch_where_there_is_none(environment, sources):
    release = torch.__version__.split("+")[0]
    said = environment.pip("install", "-v", sources, KL_EXT_TORCH_VERSION=release)
    assert f"building against torch=={release}, fetched for this build" in said
    assert f"against torch {release}" in environment.check()
