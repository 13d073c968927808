"""docs/export.md: what it says of a new process is what happens in one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kl_ext import _library

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text()
SAVE, LOAD = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PROGRAM = re.search(r"```cpp\n(.*?)```", PAGE, re.DOTALL)
WITHOUT = re.findall(r"^\| `(torch.*?)` \| `?(.*?)`? \|$", PAGE, re.MULTILINE)

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or "CXX" in os.environ), reason="AOTInductor needs a C++ compiler")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_library.PACKAGE.parent)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def python(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-W", "ignore", "-c", script, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In which a process has saved a model as the page does."""
    folder = tmp_path_factory.mktemp("saved")
    saved = python(SAVE, folder)
    assert saved.returncode == 0, saved.stderr
    return folder


def test_a_process_that_imports_kl_ext_loads_everything(folder: Path) -> None:
    loaded = python(LOAD, folder)
    assert loaded.returncode == 0, loaded.stderr


def test_without_the_import_torch_says_what_the_page_says(folder: Path) -> None:
    """In one process: what fails registers nothing. What imports kl_ext by itself comes last."""
    assert [message.partition(":")[0] for _, message in WITHOUT] == [
        *["RuntimeError"] * 2,
        "AttributeError",
        "RuntimeError",
        "nothing",
    ]
    script = f"""
import sys, torch
for call in {[call for call, _ in WITHOUT[:4]]!r}:
    try:
        eval(call)
    except Exception as error:
        print(f"{{type(error).__name__}}: " + " ".join(str(error).split()))
"""
    without = python(script + f"{WITHOUT[4][0]}; print('kl_ext' in sys.modules)", folder)
    assert without.returncode == 0, without.stderr
    *errors, imported = without.stdout.splitlines()
    assert imported == "True"
    for line, (call, message) in zip(errors, WITHOUT[:4], strict=True):
        assert line.startswith(message), call
    reason = "We failed to resolve torch.ops.kl_ext.gaussian_kl_div.default to an operator."
    assert reason in without.stderr
    assert reason in " ".join(PAGE.split())


def test_the_library_is_all_that_a_model_needs(folder: Path) -> None:
    library = f"torch.ops.load_library({str(_library.LIBRARY)!r})"
    calls = [line for line in LOAD.splitlines() if line.startswith("assert") and "traced" not in line]
    assert len(calls) == 4
    ran = python("\n".join(["import sys, torch", library, "inputs = (torch.ones(4, 3), torch.zeros(4, 3))", *calls]), folder)
    assert ran.returncode == 0, ran.stderr


def test_a_cpp_program_opens_the_library(folder: Path) -> None:
    assert PROGRAM is not None
    (folder / "main.cpp").write_text(PROGRAM[1])
    torch_folder = Path(torch.__path__[0])
    libraries = [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    compiler = os.environ.get("CXX", "g++")
    built = run(compiler, "-std=c++20", f"-I{torch_folder}/include", "main.cpp", "-o", "main", *libraries, cwd=folder)
    assert built.returncode == 0, built.stderr
    ran = run(folder / "main", _library.LIBRARY, cwd=folder)
    assert (ran.returncode, ran.stdout) == (0, "1.5\n"), ran.stderr
    without = run(folder / "main", torch_folder / "lib" / "libc10.so", cwd=folder)
    assert without.returncode != 0
    assert "Could not find schema for kl_ext::gaussian_kl_div." in without.stderr
    assert run(folder / "main", "missing.so", cwd=folder).returncode == 1
