"""What `make test-exhaustive` runs finds nothing in the formulas, and what is wrong in copies; the pages quote its report."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import exhaustive

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no compiler")


class Fault(NamedTuple):
    """Faults of one copy cannot be taken for each other: no slice that is to show one depends on another."""

    copy: int
    header: str
    right: str
    wrong: str


class Slice(NamedTuple):
    """A part of a piece, where a fault shows in one quantity."""

    piece: int
    first: int
    quantity: str
    fault: Fault
    points: int = 1 << 18


KINDS = [piece.kind for piece in exhaustive.PIECES]
SINGLE, STANDARD, RATIO, BFLOAT16, FLOAT16, CLIMB = map(
    KINDS.index, ["single", "standard", "ratio", "bfloat16", "float16", "climb"]
)
WIDE = SINGLE + 1

# Of bits: 0.5, 50 and 0.97; pairs with a log_var_p of 0.5.
SLICES = [
    Slice(SINGLE, 0x3F000000, "value", Fault(0, "exponential.h", "0x1.55555ap-2f", "0x1.555580p-2f")),
    Slice(WIDE, 0x3F000000, "value", Fault(0, "exponential.h", "0x1.55555ap-2f", "0x1.555580p-2f")),
    Slice(SINGLE, 0x3E900000, "gradient", Fault(1, "exponential.h", "0x1.555558p-3f", "0x1.555800p-3f")),
    Slice(SINGLE, 0x42480000, "gradient", Fault(0, "gaussian.h", "is_within(x, low, high) ? gradient : T(0)", "gradient")),
    Slice(STANDARD, 0x3F400000, "value", Fault(0, "normal.h", "0x1.000034p-2f", "0x1.000400p-2f")),
    Slice(STANDARD, 0x3F780000, "gradient", Fault(2, "normal.h", "fma(-inverse, fma(-inverse, p, T(1)), rounded)", "rounded")),
    Slice(RATIO, 0x3F400000, "value", Fault(0, "normal.h", "0x1.000034p-2f", "0x1.000400p-2f")),
    Slice(RATIO, 0x3F780000, "gradient of scale_q", Fault(0, "normal.h", "fma(gap, inverse, T(2))", "T(2)")),
    Slice(BFLOAT16, 0x3F003E00, "value", Fault(0, "half.h", "& 1)) + 0x7fff", "& 1)) + 0x7000")),
    Slice(FLOAT16, 0x38003400, "gradient of log_var_p", Fault(0, "half.h", "0x38000000u + 0x0fffu", "0x38000000u + 0x0e00u")),
    Slice(CLIMB, 0, "value", Fault(2, "gaussian.h", "step, use>(difference, error)", "step, use>(difference, T(0))")),
    Slice(CLIMB, 0, "gradient of log_var_p", Fault(1, "exponential.h", "0x1.555558p-3f", "0x1.555800p-3f")),
    Slice(CLIMB, 0, "gradient of means", Fault(1, "exponential.h", "0x1.555558p-3f", "0x1.555800p-3f")),
    Slice(CLIMB, 0, "gradient of log_var_q", Fault(1, "exponential.h", "0x1.555558p-3f", "0x1.555800p-3f")),
]


def beyond(program: Path, part: Slice, seed: int) -> set[str]:
    """The quantities that are beyond their bounds."""
    piece = exhaustive.PIECES[part.piece]
    points, found = exhaustive.search(program, piece, first=part.first, points=part.points, seed=seed)
    assert points >= part.points
    worst = exhaustive.judged(piece, found)
    return {quantity for quantity, bound in piece.bounds.items() if not worst[quantity].error <= bound}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exhaustive.build(tmp_path_factory.mktemp("exhaustive") / "search")


@pytest.fixture(scope="module")
def wrong_programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    programs = []
    for copy in range(1 + max(part.fault.copy for part in SLICES)):
        folder = tmp_path_factory.mktemp("exhaustive_wrong")
        shutil.copytree(ROOT / "csrc" / "math", folder / "math")
        for fault in {part.fault for part in SLICES if part.fault.copy == copy}:
            header = folder / "math" / fault.header
            text = header.read_text()
            assert fault.right in text, f"{fault.header} no longer has {fault.right}: plant another fault"
            header.write_text(text.replace(fault.right, fault.wrong))
        programs.append(exhaustive.build(folder / "search", folder))
    return programs


@pytest.mark.parametrize("part", SLICES, ids=lambda part: f"{KINDS[part.piece]}-{part.quantity}-{part.first:x}")
def test_faults_are_found_and_only_faults(program: Path, wrong_programs: list[Path], part: Slice, rng) -> None:
    seed = int(rng.integers(10**6))
    assert beyond(program, part, seed) == set()
    assert part.quantity in beyond(wrong_programs[part.fault.copy], part, seed)


def test_every_quantity_of_every_kind_is_among_the_faults() -> None:
    """But for three that share their lines with others."""
    shared = {("ratio", "gradient of scale_p"), *((k, q) for k in ("bfloat16", "float16") for q in exhaustive.HALF)}
    planted = {(KINDS[part.piece], part.quantity) for part in SLICES}
    assert {(piece.kind, quantity) for piece in exhaustive.PIECES for quantity in piece.bounds} <= planted | shared


def test_a_seed_repeats_a_search_with_any_number_of_threads(program: Path, rng) -> None:
    seed, piece = int(rng.integers(10**6)), exhaustive.PIECES[CLIMB]
    runs = [exhaustive.search(program, piece, seed=seed, threads=threads, points=10**6) for threads in (1, 3)]
    assert runs[0] == runs[1]
    assert exhaustive.search(program, piece, seed=seed + 1, points=10**6) != runs[0]


def test_what_is_counted_was_evaluated(program: Path) -> None:
    """A range that ends within a block ends there: the next number is beyond the clamp's last step."""
    piece = exhaustive.PIECES[SINGLE]
    assert exhaustive.search(program, piece, first=0x3F000000, points=5_000_001, threads=3)[0] == 5_000_001
    (_, one), (_, two) = (exhaustive.search(program, piece, first=first, points=1) for first in (0x3F000000, 0x3F000001))
    assert one["value"].inputs[1] == 0.5 and two["value"].inputs[1] == 0.5 + 2.0**-24


def test_the_flags_are_those_of_the_build() -> None:
    build = (ROOT / "CMakeLists.txt").read_text()
    (kernels,) = re.findall(r"^ *(-O3 .*?) \$\{flags", build, re.MULTILINE)
    assert set(kernels.split()) <= set(exhaustive.FLAGS)
    for capability, flags in exhaustive.VECTORS.items():
        stated = re.search(rf"^set\(flags_{capability} (.*)\)$", build, re.MULTILINE)
        assert (stated[1].split() if stated else []) == flags


# Where the table of docs/numbers.md states the bound of a quantity: its row, and its column of figures.
PAGE = {
    ("single", "value"): ("value against N(0, 1)", 0),
    ("single", "gradient"): ("gradient against N(0, 1)", 0),
    ("standard", "value"): ("value against N(0, 1)", 1),
    ("standard", "gradient"): ("gradient against N(0, 1)", 1),
    ("ratio", "value"): ("value against q", 1),
    ("ratio", "gradient of scale_p"): ("gradient of the spread of p", 1),
    ("ratio", "gradient of scale_q"): ("– of itself, where σp ≥ σq", 1),
    ("climb", "value"): ("value against q", 0),
    ("climb", "gradient of means"): ("gradients of means", 0),
    ("climb", "gradient of log_var_p"): ("gradient of the spread of p", 0),
    ("climb", "gradient of log_var_q"): ("gradient of the spread of q, of the larger of its two terms", 0),
}


def test_the_report_is_of_a_whole_run_and_the_stated_bounds_hold_it() -> None:
    report = [line.strip("| ").split(" | ") for line in exhaustive.REPORT.read_text().splitlines() if line.startswith("| ")]
    table = {(name, quantity): (int(points.replace(",", "")), float(error)) for name, points, quantity, error, *_ in report[2:]}
    page = {}
    for line in (ROOT / "docs" / "numbers.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            page[cells[0]] = [re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell) for cell in cells[1:]]
    assert table.keys() == {(piece.name, quantity) for piece in exhaustive.PIECES for quantity in piece.bounds}
    for piece in exhaustive.PIECES:
        for quantity, bound in piece.bounds.items():
            points, error = table[piece.name, quantity]
            assert points >= piece.points and error <= bound, (piece.name, quantity)
            if (piece.kind, quantity) in PAGE:
                row, column = PAGE[piece.kind, quantity]
                stated = page[row][column]
                assert stated is not None and float(stated[1]) == bound, row
                assert float(stated[2]) >= error, f"numbers.md, {row}: the report has found {error}"
