"""The table of promises says what the last run of each program found, and when."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import reports  # noqa: E402

PAGE = (ROOT / "docs" / "reliability.md").read_text()
REPORTS = sorted((ROOT / "docs" / "reports").glob("*.md"))


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_the_table_says_what_was_found_and_when(report: Path) -> None:
    text = report.read_text()
    command = re.search(r"^# The last `(make [\w-]+)`$", text, re.MULTILINE)
    date = re.search(r"^(\d{4}-\d\d-\d\d), commit [0-9a-f]{40}, ", text, re.MULTILINE)
    found = re.search(r"^Found: (.+)\.$", text, re.MULTILINE)
    assert command and date and found
    (line,) = (line for line in PAGE.splitlines() if f"(reports/{report.name})" in line)
    assert f"`{command[1]}`" in line
    assert line.endswith(f"| [{found[1]}](reports/{report.name}) | {date[1]} |")
    assert f"\nreports/{report.stem}\n" in PAGE


def test_every_promise_has_a_result_and_a_date() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    assert all(len(row) == 4 and all(row) for row in rows)
    assert len(rows) > 10


def test_a_new_result_takes_the_place_of_the_last_one() -> None:
    page = "| a | b | [old](reports/a.md) | 2026-01-01 |\n| c | d | [other](reports/c.md) | 2026-01-02 |\n"
    changed = reports.with_result(page, "a.md", "1 of 2", "2026-02-03")
    assert changed == "| a | b | [1 of 2](reports/a.md) | 2026-02-03 |\n| c | d | [other](reports/c.md) | 2026-01-02 |\n"
    with pytest.raises(ValueError, match=r"0 lines for b\.md"):
        reports.with_result(page, "b.md", "1 of 2", "2026-02-03")
