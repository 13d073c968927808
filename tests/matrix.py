"""Build kl_ext for each torch and each Python that it supports, and test it there: `make test-matrix`.

    make test-matrix ARGS="--only python3.14"     the cells whose names contain this; the others keep their last results
    make test-matrix ARGS="--tests tests/errors"  other tests than the usual ones

A cell is one Python with one torch, in a virtual environment of its own that is kept, .venv-matrix/NAME. Together they take
10 GB with CPU builds of torch, which PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has, and 50 GB with CUDA builds.
The log of each cell is in build/matrix/NAME, and its result in docs/reports/matrix.json, from which the report is written. The
binary of each is then imported in the cells beside it, which must refuse it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "reports" / "matrix.md"
RESULTS = REPORT.with_suffix(".json")
ENVIRONMENTS = ROOT / ".venv-matrix"
FOLDER = ROOT / "build" / "matrix"

# The rest of the suite depends on the processor and the compiler; .github/workflows/matrix.yml runs all of it.
TESTS = (
    *("tests/autograd", "tests/compile", "tests/errors", "tests/tensors", "tests/transforms"),
    *(f"tests/package/test_{name}.py" for name in ("bindings", "library", "registration")),
)
# What the build and these tests take.
REQUIREMENTS = ("setuptools>=77", "cmake>=3.25", "ninja", "diffusers>=0.30", "expecttest>=0.2", "hypothesis>=6.100")
REQUIREMENTS += ("mpmath>=1.3", "numpy>=1.26", "pytest>=8")
# Without a GIL there are no wheels of what diffusers takes, nor of later versions of hypothesis.
WITHOUT_GIL = tuple(name for name in REQUIREMENTS if not name.startswith(("diffusers", "hypothesis")))
WITHOUT_GIL += ("hypothesis>=6.100,<6.113",)


@dataclass(frozen=True)
class Cell:
    python: str  # with a t at the end: without a GIL
    torch: str

    @property
    def name(self) -> str:
        return f"python{self.python}-torch{self.torch}"

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def has_gil(self) -> bool:
        return not self.python.endswith("t")

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def executable(self) -> Path:
        return ENVIRONMENTS / self.name / "bin" / "python"


TORCHES = [Cell("3.11", torch) for torch in ("2.11", "2.12", "2.13", "2.14", "2.15")]
PYTHONS = [Cell("3.10", "2.13"), Cell("3.11", "2.13"), Cell("3.12", "2.13"), Cell("3.13", "2.13"), Cell("3.14", "2.14")]
# Python 3.13 with a GIL, and without one, with the last torch that has wheels for that.
FREE_THREADED = [Cell("3.13", "2.13"), Cell("3.13t", "2.12")]
ROWS = (TORCHES, PYTHONS, FREE_THREADED)
CELLS = list(dict.fromkeys([cell for row in ROWS for cell in row]))
# Both ways: a binary of the first in the environment of the second.
PAIRS = [pair for row in ROWS for a, b in zip(row, row[1:]) for pair in ((a, b), (b, a))]


@dataclass
class Results:
    """Of the last run of each cell and of each pair, by name."""

    cells: dict[str, dict[str, Any]]
    refusals: dict[str, str]  # by the names of both, with "in" between them

    def save(self) -> None:
        RESULTS.write_text(json.dumps(vars(self), indent=1) + "\n")


def load() -> Results:
    return Results(**json.loads(RESULTS.read_text()))


class Stopped(Exception):
    """Why there is nothing more to do in a cell."""


def run(cell: Cell, *command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What it prints goes into the log of the cell."""
    dropped = ("PYTHONPATH", "KL_EXT_TORCH_VERSION")
    environment = {**{name: value for name, value in os.environ.items() if name not in dropped}, "KL_EXT_CUDA": "0"}
    if not cell.has_gil:
        environment["PYTHON_GIL"] = "0"  # also where a module asks for one
    environment["PATH"] = os.pathsep.join([str(cell.executable.parent), os.environ["PATH"]])
    completed = subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with (cell.folder / "log").open("a") as log:
        log.write(f"$ {' '.join(map(str, command))}\n{completed.stdout}[status {completed.returncode}]\n")
    return completed


def interpreter(cell: Cell) -> str:
    """A Python of this version on the PATH, of pyenv, or of uv, which fetches it."""
    name = f"python{cell.python}"
    candidates = [shutil.which(name), *sorted(Path.home().glob(f".pyenv/versions/{cell.python}.*/bin/{name}"), reverse=True)]
    gil = f"import sysconfig; sys.exit(bool(sysconfig.get_config_var('Py_GIL_DISABLED')) == {cell.has_gil})"
    for candidate in filter(None, candidates):  # a shim of pyenv may lead nowhere, and python3.13 to 3.13t
        if run(cell, candidate, "-c", f"import ensurepip, sys, venv; {gil}").returncode == 0:
            return str(candidate)
    if uv := shutil.which("uv"):
        run(cell, uv, "python", "install", cell.python)
        found = run(cell, uv, "python", "find", "--managed-python", cell.python)
        if found.returncode == 0:
            return found.stdout.strip()
    raise Stopped("not available: no such Python was found")


def make_environment(cell: Cell) -> None:
    ready = ENVIRONMENTS / cell.name / "ready"
    if ready.exists():
        return
    python = interpreter(cell)
    if run(cell, python, "-m", "venv", "--clear", ENVIRONMENTS / cell.name).returncode:
        raise Stopped("no virtual environment")
    requirements = REQUIREMENTS if cell.has_gil else WITHOUT_GIL
    installed = run(cell, cell.executable, "-m", "pip", "install", f"torch=={cell.torch}.*", *requirements)
    if installed.returncode:
        raise Stopped(f"not available: pip found no torch {cell.torch}, or not what the tests take")
    ready.touch()


def copy_sources(target: Path) -> None:
    """What git knows of, as it is now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def outcomes(path: Path) -> dict[str, Any]:
    """The numbers of tests in a JUnit file, and how long they took."""
    suites = list(xml.etree.ElementTree.parse(path).getroot().iter("testsuite"))
    total = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = total["failures"] + total["errors"]
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    return {
        "passed": total["tests"] - failed - total["skipped"],
        "failed": failed,
        "skipped": total["skipped"],
        "test": seconds,
    }


def try_cell(cell: Cell, tests: Sequence[str]) -> dict[str, Any]:
    """Everything that the report says of the cell."""
    from reports import commit

    if not cell.has_gil:
        tests = [*tests, "tests/threads"]
    result: dict[str, Any] = {"commit": commit(), "tests": " ".join(tests)}
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir(parents=True)
    try:
        make_environment(cell)
        facts = "import platform, torch; print(platform.python_version(), torch.__version__)"
        result["python"], result["torch"] = run(cell, cell.executable, "-c", facts).stdout.split()[-2:]
        copy_sources(cell.source)
        start = time.monotonic()
        install = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "-v", "-e", ".")
        built = run(cell, cell.executable, *install, cwd=cell.source)
        result["build"] = time.monotonic() - start
        if built.returncode:
            raise Stopped("the build failed")
        result["check"] = run(cell, cell.executable, "-m", "kl_ext", cwd=cell.source).returncode == 0
        junit = cell.folder / "junit.xml"
        run(cell, cell.executable, "-m", "pytest", "-q", f"--junit-xml={junit}", *tests, cwd=cell.source)
        if not junit.exists():
            raise Stopped("the tests crashed")
        result.update(outcomes(junit))
    except Stopped as reason:
        result["stopped"] = str(reason)
    return result


def refused(binary: Cell, cell: Cell, results: Results) -> str:
    """How the Python of a cell refuses another cell's binary: the message, or what is wrong with it."""
    built, running = (results.cells.get(x.name, {}).get("torch") for x in (binary, cell))
    if not (built and running and (binary.source / "kl_ext" / "lib").exists() and cell.executable.exists()):
        return "not available"
    imported = run(cell, cell.executable, "-c", "import kl_ext", cwd=binary.source)
    if imported.returncode == 0:
        return "FAILED: it was imported"
    message = ["", *imported.stdout.split("\nImportError: ")[1:]][-1].strip()  # after the one that caused it
    if binary.python != cell.python:
        wanted = [f"kl_ext: {binary.source / 'kl_ext'} has no compiled part for this Python"]
    else:
        cure = f"{cell.executable} -m pip install --no-deps ."
        wanted = [f"kl_ext: built against torch {built} (", f"and this is torch {running} (", cure]
    if not all(text in message for text in wanted):
        return f"FAILED: another message, {' '.join(imported.stdout.split())[-200:]!r}"
    return f"refused: *{message.splitlines()[0].replace(str(ROOT), '…')}*"


def passes(result: dict[str, Any]) -> bool:
    return bool(result.get("check")) and result.get("failed") == 0


def row_of(cell: Cell, result: dict[str, Any]) -> list[str]:
    python = result.get("python", cell.python) + ("" if cell.has_gil else " without a GIL")
    versions = [python, result.get("torch", cell.torch), result.get("commit", "")]
    if "stopped" in result:
        return [*versions, f"FAILED: {result['stopped']}" if "torch" in result else result["stopped"], *[""] * 5]
    check = "ok" if result["check"] else "FAILED"
    counts = [f"{result[name]:,}" for name in ("passed", "failed", "skipped")]
    return [*versions, f"{result['build']:.0f} s", check, *counts, f"{result['test']:.0f} s"]


def report(results: Results) -> None:
    from reports import write_report

    pairs = [(a.name, b.name, results.refusals.get(f"{a.name} in {b.name}", "not run")) for a, b in PAIRS]
    tested: dict[str, list[str]] = {}
    for name, result in results.cells.items():
        if "test" in result:
            tested.setdefault(result["tests"], []).append(name)
    text = "\n".join([
        "Each Python and torch is in an environment of its own. kl_ext is built there without CUDA kernels, and tested.",
        "The versions above are those of the program that saw to it.",
        "",
        *(f"- {', '.join(names)}: tested by `{tests}`" for tests, names in tested.items()),
        "",
        "A binary of one under another, which must say so:",
        "",
        "| built for | imported with | |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(pair)} |" for pair in pairs),
        "",
        "What was built and tested:",
    ])  # fmt: skip
    head = ["Python", "torch", "commit", "build", "self-check", "passed", "failed", "skipped", "tests"]
    rows = [row_of(cell, results.cells.get(cell.name, {"stopped": "not run"})) for cell in CELLS]
    passed = sum(passes(result) for result in results.cells.values())
    refusals = sum(text.startswith("refused: ") for _, _, text in pairs)
    found = f"{passed} of {len(CELLS)} pass, {refusals} of {len(PAIRS)} binaries are refused"
    write_report(REPORT, "make test-matrix", "tests/matrix.py", found, text, head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the cells to try, as in torch2.11")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest runs, from the source folder")
    options = parser.parse_args()
    failed = False
    chosen = [cell for cell in CELLS if options.only in cell.name]
    results = load()
    for cell in chosen:
        results.cells[cell.name] = result = try_cell(cell, options.tests)
        results.save()
        print(" | ".join([cell.name, *row_of(cell, result)]), flush=True)
        failed |= not passes(result)
    for binary, cell in PAIRS:
        if cell in chosen or binary in chosen:
            verdict = refused(binary, cell, results)
            if verdict != "not available":
                results.refusals[f"{binary.name} in {cell.name}"] = verdict
            print(" | ".join([binary.name, cell.name, verdict]), flush=True)
            failed |= verdict.startswith("FAILED")
    results.save()
    report(results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
