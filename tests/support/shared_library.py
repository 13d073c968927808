"""Libraries in C++ that tests load into their process or into one of their own."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

OPTIONS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter"]
ROOT = Path(__file__).resolve().parents[2]


def build(source: Path, *libraries: str) -> Path:
    """The library made of this file and linked to these, compiled once for each torch and source."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    paths = library_paths()
    linked = [*(f"-L{path}" for path in paths), *(f"-Wl,-rpath,{path}" for path in paths), *(f"-l{x}" for x in libraries)]
    made_of = [source.read_bytes(), Path(__file__).read_bytes(), f"{torch.__version__} {torch.__file__} {linked}".encode()]
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()
    folder = ROOT / "build" / f"{source.stem}-{digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"lib{source.stem}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            includes = [f"-isystem{path}" for path in include_paths()]
            partial = library.with_suffix(".partial")
            subprocess.run([compiler, *OPTIONS, *includes, str(source), *linked, "-o", str(partial)], check=True)
            partial.rename(library)
    return library
