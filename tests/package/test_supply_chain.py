"""What a wheel holds and what a build touches: these files, the same in every folder, without a network, in build alone."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from building import SOURCE, tool
from kl_ext import _library

COMPILED = [f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_C", "_bindings")]
COMPILED += ["include/kl_ext/ops.h", "lib/libkl_ext.so"]
COMPILED += [f"share/cmake/kl_ext/kl_extConfig{end}.cmake" for end in ("", "Version")]
METADATA = ["METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"]
LOCK = (SOURCE / ".ci" / "lock.txt").read_text()
BUILD_WHEEL = "import sys, kl_ext_build; kl_ext_build.build_wheel(sys.argv[1])"


def copied_sources(folder: Path) -> Path:
    """What a build takes, without what another has left."""
    ignored = shutil.ignore_patterns(
        ".*", "build", "include", "lib", "share", "*.so", "*.egg-info", "__pycache__", "tests", "docs"
    )
    return Path(shutil.copytree(SOURCE, folder / "sources", ignore=ignored))


def build_wheel(sources: Path, *prefix: str, **environment: str) -> Path:
    """In the folder `build` of the sources."""
    (sources / "build" / "tmp").mkdir(parents=True)
    path = f"{Path(tool('cmake')).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in ("SOURCE_DATE_EPOCH", "KL_EXT_LOCAL_VERSION")}
    given = {**kept, "PATH": path, "PYTHONPATH": "build_backend", "TMPDIR": str(sources / "build" / "tmp"), **environment}
    command = [*prefix, sys.executable, "-c", BUILD_WHEEL, "build"]
    said = subprocess.run(command, cwd=sources, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert said.returncode == 0, said.stdout
    (wheel,) = (sources / "build").glob("*.whl")
    return wheel


def assert_same_and_complete(wheels: list[Path]) -> None:
    """The same bytes; where they are not, the assertion names the files that differ."""
    contents = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            contents.append({entry.filename: (entry.date_time, archive.read(entry)) for entry in archive.infolist()})
    modules = [file.name for file in (SOURCE / "kl_ext").glob("*.py*")]
    version, *_ = (name.split("/")[0] for name in contents[0] if name.endswith("/WHEEL"))
    expected = {f"kl_ext/{name}" for name in [*modules, "py.typed", *COMPILED]} | {f"{version}/{name}" for name in METADATA}
    assert set(contents[0]) == expected
    differ = sorted(name for name in contents[0].keys() | contents[1] if contents[0].get(name) != contents[1].get(name))
    assert not differ
    assert wheels[0].name == wheels[1].name
    assert len({hashlib.sha256(wheel.read_bytes()).digest() for wheel in wheels}) == 1


def test_a_wheel_holds_these_files_and_its_bytes_do_not_depend_on_folder_or_time(tmp_path: Path) -> None:
    """With a CMake that installs what is compiled already. The files of the second folder are a day older."""
    fake = tmp_path / "bin" / "cmake"
    fake.parent.mkdir()
    built = [
        str(file.relative_to(_library.PACKAGE))
        for name in ("*.so", "include/**/*.*", "lib/*", "share/**/*.*")
        for file in _library.PACKAGE.glob(name)
    ]
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = --install ] || exit 0\ncd {_library.PACKAGE} && exec cp -L --parents {" ".join(built)} "$4"\n'
    )
    fake.chmod(0o755)
    wheels = []
    for name, age in (("one", 0), ("another", 86400)):
        (tmp_path / name).mkdir()
        sources = copied_sources(tmp_path / name)
        for file in sources.rglob("*"):
            os.utime(file, (file.stat().st_mtime - age,) * 2)
        wheels.append(build_wheel(sources, "env", f"PATH={fake.parent}:{Path(tool('ninja')).parent}:{os.environ['PATH']}"))
    assert_same_and_complete(wheels)


@pytest.mark.parametrize("name", [*COMPILED[:2], "lib/libkl_ext.so"])
def test_no_folder_of_the_build_is_in_what_is_compiled(name: str) -> None:
    """Neither the sources' nor torch's: torch's checks would put it there."""
    strings = set(re.findall(rb"[ -~]{6,}", (_library.PACKAGE / name).read_bytes()))
    folders = [str(SOURCE).encode(), b"/site-packages/", b"/build/"]
    assert not [text for text in strings if any(folder in text for folder in folders)]
    assert name != "lib/libkl_ext.so" or b"csrc/library.cpp" in strings


# The second `mount` of a folder makes it one of its own, which the remounting of all others leaves writable.
ENCLOSED = """
mount --bind . . && mount --bind build build && mount -o remount,ro,bind . && mount -o remount,ro,bind / && cd "$PWD" || exit 9
if touch setup.py || touch /kl_ext || ! touch build/written; then exit 8; fi 2>/dev/null
exec "$@"
"""


@pytest.mark.slow
def test_a_build_needs_no_network_writes_in_its_folder_alone_and_is_reproducible(tmp_path: Path) -> None:
    """Compiled twice, in two folders, where all else is read-only and there is no network."""
    if subprocess.run(["unshare", "--mount", "--net", "mount", "-o", "remount,ro,bind", "/"]).returncode:
        pytest.skip("needs to be root, to make the file system read-only for a process")
    wheels = []
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        enclosed = ("unshare", "--mount", "--net", "sh", "-c", ENCLOSED, "sh")
        variables = {"HOME": "/nowhere", "CCACHE_DISABLE": "1", "KL_EXT_CUDA": "0"}
        wheels.append(build_wheel(copied_sources(tmp_path / name), *enclosed, **variables))
    assert_same_and_complete(wheels)


# What CI installs.


def test_the_lock_has_what_pyproject_requires_with_hashes_and_ci_uses_it() -> None:
    locked = re.findall(r"^([a-z0-9-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", LOCK, re.MULTILINE)
    assert len(locked) == len(re.findall(r"^[^#\s]", LOCK, re.MULTILINE)) > 50
    versions = {name: version for name, version, _ in locked}
    assert not versions.keys() & {"torch", "triton", "kl-ext"}
    pyproject = (SOURCE / "pyproject.toml").read_text().partition("[tool.")[0]
    required = [Requirement(text) for text in re.findall(r'"([a-z][\w-]*(?:>=[\w.]+)?)"[,\]]', pyproject.replace("'", ""))]
    required = [requirement for requirement in required if requirement.specifier or requirement.name in ("ninja", "uv")]
    assert len(required) > 25
    for requirement in required:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    environments = re.findall(r"^\w+=\((VENV=.*)\)$", (SOURCE / ".ci" / "run").read_text(), re.MULTILINE)
    assert environments and all("LOCK=.ci/lock.txt" in variables.split() for variables in environments)
