"""Run the tests that are too slow for `make test`, and report what they did in docs/reports/nightly.md: `make nightly`."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from reports import write_report

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "reports" / "nightly.md"


class Recorder:
    """The outcome of each test, and how long it took with its fixtures."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def main() -> int:
    recorder = Recorder()
    status = pytest.main(["--slow", "-m", "slow", *sys.argv[1:]], plugins=[recorder])
    rows = [[name, outcome, f"{recorder.seconds[name]:.0f} s"] for name, outcome in recorder.outcomes.items()]
    counts = Counter(recorder.outcomes.values())
    found = f"{counts['failed']} of {counts['passed'] + counts['failed']} tests failed"
    write_report(REPORT, "make nightly", "tests/nightly.py", found, "", ["test", "outcome", "time"], rows)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
