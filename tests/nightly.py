"""Run the tests that are too slow for `make test`, and report what they did in docs/reports/nightly.md: `make nightly`.

    make nightly ARGS="-n 2"              two at a time
    make nightly ARGS="tests/layouts"     some of them; the others keep their last results

The results are in docs/reports/nightly.json, from which the report is written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reports import commit, write_report

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "reports" / "nightly.md"
RESULTS = REPORT.with_suffix(".json")
SLOW = ("--slow", "-m", "slow")
OUTCOMES = ("passed", "failed", "skipped")


class Recorder:
    """The outcome of each test, and how long it took with its fixtures."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def by_function(self) -> dict[str, dict[str, Any]]:
        """Of all cases of a test together."""
        found: dict[str, dict[str, Any]] = {}
        new = {**dict.fromkeys(OUTCOMES, 0), "seconds": 0.0, "commit": commit()}
        for name, outcome in self.outcomes.items():
            of = found.setdefault(function_of(name), {**new})
            of[outcome] += 1
            of["seconds"] += self.seconds[name]
        return found


def function_of(name: str) -> str:
    return name.partition("[")[0]


def slow_tests() -> list[str]:
    # Not from the folder, which `python -m` would put first on the path: its kl_ext may not be compiled.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *SLOW, str(ROOT / "tests")]
    lines = subprocess.run(command, cwd="/", stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return list(dict.fromkeys(function_of(line) for line in lines if "::" in line))


def report(results: dict[str, dict[str, Any]], names: list[str]) -> None:
    rows = []
    total: Counter[str] = Counter()
    for name in names:
        of = results.get(name)
        if of is None:
            rows.append([name, "not run", "", ""])
            continue
        total.update({outcome: of[outcome] for outcome in OUTCOMES})
        said = ", ".join(f"{of[outcome]} {outcome}" for outcome in OUTCOMES if of[outcome])
        rows.append([name, said, f"{of['seconds']:.0f} s", of["commit"]])
    left = sum(name not in results for name in names)
    found = f"{total['failed']} of {total['passed'] + total['failed']} cases failed" + (
        f", {left} tests not run" if left else ""
    )
    write_report(REPORT, "make nightly", "tests/nightly.py", found, "", ["test", "cases", "time", "commit"], rows)


def main() -> int:
    recorder = Recorder()
    status = pytest.main([*SLOW, *sys.argv[1:]], plugins=[recorder])
    names = slow_tests()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= recorder.by_function()
    results = {name: results[name] for name in names if name in results}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report(results, names)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
