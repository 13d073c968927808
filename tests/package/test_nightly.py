"""`make nightly` reports every slow test: what was run anew, the last results of the others, and what was never run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nightly
import reports

TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
def test_some(n):
    assert n != 2
    if n == 3:
        pytest.skip("why")
"""
LAST = {"passed": 4, "failed": 0, "skipped": 1, "seconds": 70.2, "commit": "1234567"}


def test_results_are_kept_until_a_test_is_run_again_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "nightly.json").write_text(json.dumps({"a.py::test_kept": LAST, "a.py::test_gone": LAST}))
    (tmp_path / "reliability.md").write_text("| slow tests | here | [not run](reports/nightly.md) | never |\n")
    monkeypatch.setattr(reports, "TABLE", tmp_path / "reliability.md")
    monkeypatch.setattr(nightly, "REPORT", tmp_path / "nightly.md")
    monkeypatch.setattr(nightly, "RESULTS", tmp_path / "nightly.json")
    monkeypatch.setattr(nightly, "SLOW", ())
    monkeypatch.setattr(sys, "argv", ["nightly.py", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)])
    monkeypatch.setattr(nightly, "slow_tests", lambda: ["test_some.py::test_some", "a.py::test_kept", "a.py::test_never"])
    assert nightly.main() == 1
    lines = (tmp_path / "nightly.md").read_text().splitlines()
    assert "| test_some.py::test_some | 1 passed, 1 failed, 1 skipped | 0 s | " in "\n".join(lines)
    assert "| a.py::test_kept | 4 passed, 1 skipped | 70 s | 1234567 |" in lines
    assert "| a.py::test_never | not run |  |  |" in lines
    assert list(json.loads((tmp_path / "nightly.json").read_text())) == ["test_some.py::test_some", "a.py::test_kept"]
    assert "[1 of 6 cases failed, 1 tests not run](reports/nightly.md)" in (tmp_path / "reliability.md").read_text()


def test_the_slow_tests_are_those_with_the_mark() -> None:
    names = nightly.slow_tests()
    assert "tests/layouts/test_leaks.py::test_leak_sanitizer_finds_nothing" in names
    assert "tests/layouts/test_leaks.py::test_calls_leave_nothing_behind" not in names
    assert len(names) == len(set(names)) > 10
