"""`make test-matrix`: what it covers, how it tells that a binary was refused, and that the pages promise what it has tested."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_ext import _library

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cmake"), str(ROOT / "tests")]

import matrix  # noqa: E402
import torch_info  # noqa: E402
from matrix import Cell, Results  # noqa: E402

PYTHONS = re.findall(r'Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
TABLES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "reports" / "matrix.md").read_text().splitlines()
    if line.startswith("|") and "---" not in line
]


def test_every_supported_python_and_torch_is_a_cell():
    assert sorted({cell.python for cell in matrix.CELLS if cell.has_gil}) == PYTHONS
    start = (ROOT / "docs" / "start.md").read_text()
    assert f"| Python | {PYTHONS[0]} to {PYTHONS[-1]} |" in start
    minors = [int(cell.torch.removeprefix("2.")) for cell in matrix.TORCHES]
    assert minors == list(range(minors[0], minors[0] + len(minors)))
    assert matrix.TORCHES[0].torch == torch_info.MINIMUM
    assert f"| torch | {torch_info.MINIMUM} or later." in start


def test_each_binary_is_tried_in_the_cells_beside_it():
    for row in matrix.ROWS:
        for cell in row:
            assert 2 * (len(row) - 1) == sum(a in row and b in row for a, b in matrix.PAIRS)
            assert any(a == cell for a, _ in matrix.PAIRS) and any(b == cell for _, b in matrix.PAIRS)


@pytest.mark.parametrize("cell", matrix.CELLS, ids=lambda cell: cell.name)
def test_the_report_has_a_row_for_each_cell_and_no_failure(cell: Cell):
    rows = [row for row in TABLES if len(row) == 9 and row[0].endswith("GIL") != cell.has_gil]
    (row,) = (row for row in rows if row[0].startswith(cell.python.rstrip("t")) and row[1].startswith(cell.torch))
    assert row == matrix.row_of(cell, matrix.load().cells.get(cell.name, {"stopped": "not run"}))
    build, check, passed, failed = row[3:7]
    if build.endswith(" s"):
        assert (check, failed) == ("ok", "0")
        assert int(passed.replace(",", "")) > 100
    else:
        assert build == "not run" or build.startswith("not available: ")


@pytest.mark.parametrize("pair", matrix.PAIRS, ids=lambda pair: f"{pair[0].name} under {pair[1].name}")
def test_the_report_has_a_row_for_each_pair_and_no_failure(pair: tuple[Cell, Cell]):
    (row,) = (row for row in TABLES if len(row) == 3 and row[:2] == [cell.name for cell in pair])
    assert row[2].startswith("refused: *kl_ext: ") or row[2] in ("not run", "not available")


# A pair, without two environments: a package of which the facts say that it was built for another torch.


@pytest.fixture
def pair(tmp_path, monkeypatch) -> tuple[Cell, Cell, Results]:
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(Cell, "executable", property(lambda cell: Path(sys.executable)))
    binary, cell = Cell("3.11", "2.99"), Cell("3.11", "2.100")
    package = binary.source / "kl_ext"
    shutil.copytree(_library.PACKAGE, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    facts = {name: value for name, value in vars(_library.build_facts()).items() if not name.startswith("_")}
    text = "".join(f"{name} = {value!r}\n" for name, value in facts.items())
    (package / "_C.py").write_text(text + "torch_version, torch_cuda_version = '2.99.0', None\n")
    cell.folder.mkdir()
    return binary, cell, Results({binary.name: {"torch": "2.99.0"}, cell.name: {"torch": str(torch.__version__)}}, {})


def change(binary: Cell, old: str, new: str) -> None:
    file = binary.source / "kl_ext" / "_library.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_a_refused_binary_is_told_by_its_message(pair):
    running = _library.described(str(torch.__version__), torch.version.cuda)
    said = f"refused: *kl_ext: built against torch 2.99.0 (CPU), and this is {running}: the minor version and the CUDA major"
    assert matrix.refused(*pair).startswith(said)


@pytest.mark.parametrize(
    "old, new",
    [
        ("    check()\n", ""),
        ('raise ImportError(\n            f"kl_ext: built', 'raise RuntimeError(\n            f"kl_ext: built'),
        ("{described(*running)}", "another"),
        ("{described(built.torch_version, built.torch_cuda_version)}", "another"),
        ("{_REBUILD}", ""),
    ],
    ids=["without the check", "another error", "without this version", "without that version", "without the cure"],
)
def test_a_binary_that_is_not_refused_as_it_should_be_has_failed(old, new, pair):
    change(pair[0], old, new)
    assert matrix.refused(*pair).startswith("FAILED: ")


def test_a_binary_of_another_python_is_refused_with_the_message_for_that(pair):
    binary, cell, results = pair
    other = Cell("3.99", cell.torch)
    (binary.source / "kl_ext" / "_C.py").unlink()
    cell.folder.rename(other.folder)
    results.cells[other.name] = results.cells.pop(cell.name)
    said = matrix.refused(binary, other, results)
    assert said.startswith("refused: *kl_ext: ") and "has no compiled part for this Python" in said


def test_a_binary_that_is_missing_is_said_to_be(pair):
    shutil.rmtree(pair[0].source)
    assert matrix.refused(*pair) == "not available"


# Rows.


RESULT: dict[str, Any] = {"python": "3.11.7", "torch": "2.11.0", "commit": "1234567", "build": 100.4, "check": True}
RESULT |= {"passed": 1234, "failed": 0, "skipped": 5, "test": 600.0}


@pytest.mark.parametrize(
    "changed, cells",
    [
        ({}, ["100 s", "ok", "1,234", "0", "5", "600 s"]),
        ({"check": False}, ["100 s", "FAILED", "1,234", "0", "5", "600 s"]),
        ({"stopped": "the build failed"}, ["FAILED: the build failed", *[""] * 5]),
    ],
    ids=str,
)
def test_what_the_report_says_of_a_cell(changed, cells):
    assert matrix.row_of(Cell("3.11", "2.11"), RESULT | changed) == ["3.11.7", "2.11.0", "1234567", *cells]


def test_what_the_report_says_of_a_cell_without_its_python(tmp_path, monkeypatch):
    for name in ("FOLDER", "ENVIRONMENTS"):
        monkeypatch.setattr(matrix, name, tmp_path / name)
    monkeypatch.setattr(matrix.shutil, "which", lambda name: None)
    cell = Cell("3.99", "2.11")
    result = matrix.try_cell(cell, [])
    assert matrix.row_of(cell, result) == [
        "3.99",
        "2.11",
        result["commit"],
        "not available: no such Python was found",
        *[""] * 5,
    ]


def test_the_outcomes_are_those_of_the_tests(tmp_path):
    (tmp_path / "test_these.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_a(): pass\ndef test_b(): pass\ndef test_c(): assert False\ndef test_d(): pytest.skip('why')\n"
        "def test_e(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junit-xml=junit.xml", "test_these.py"]
    subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    found = matrix.outcomes(tmp_path / "junit.xml")
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 2, 1)
