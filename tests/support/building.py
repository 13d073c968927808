"""The build, for tests: what CMake says, and folders that pass for a torch, an nvcc or a GPU where nothing is compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(SOURCE / "cmake"), str(SOURCE / "build_backend")]

import torch_info  # noqa: E402


def tool(name: str) -> str:
    """Where a program of the extra `test` is."""
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert found, "the extra `test` names it"
    return found


def hide_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the build no torch to find."""
    monkeypatch.setattr(torch_info, "_find_here", lambda: None)
    monkeypatch.setattr(torch_info, "_find_outside_isolation", lambda: None)


def make_torch(folder: Path, version: str, cuda: str | None) -> str:
    """A folder for PYTHONPATH: its `torch` is a version file."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return str(folder)


def make_nvcc(folder: Path, release: str) -> str:
    """An nvcc that knows its version."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.99'\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def make_smi(folder: Path, said: str, status: int = 0) -> str:
    """A folder for PATH, with an nvidia-smi that sees GPUs of these compute capabilities."""
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{said}'\nexit {status}\n")
    smi.chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def configure(folder: Path, fails: bool = True, **environment: str) -> str:
    """What CMake says, its lines joined as it breaks them anywhere."""
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    completed = subprocess.run(
        [tool("cmake"), "-S", SOURCE, "-B", folder / "build", *options],
        env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not fails or completed.returncode == 1, completed.stdout
    return " ".join(completed.stdout.split())
