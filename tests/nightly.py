"""Run the tests that are too slow for `make test`, and report what they did in docs/nightly.md: `make nightly`."""

import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "nightly.md"
sys.path.insert(0, str(ROOT / "benchmarks"))

from measure.machine import describe_machine  # noqa: E402


class Recorder:
    """The outcome of each test, and how long it took with its fixtures."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def render(recorder: Recorder) -> str:
    machine = describe_machine("cpu")
    rows = [f"| {name} | {outcome} | {recorder.seconds[name]:.0f} s |" for name, outcome in recorder.outcomes.items()]
    return "\n".join(
        [
            "# The last `make nightly`",
            "",
            f"{datetime.now(timezone.utc):%Y-%m-%d}, commit {machine['commit']}, torch {torch.__version__}, Python "
            f"{platform.python_version()}, {machine['cores']} cores of {machine['cpu']} ({machine['cpu_capability']}).",
            "Written by tests/nightly.py.",
            "",
            "| test | outcome | time |",
            "| ---- | ------- | ---: |",
            *rows,
            "",
        ]
    )


def main() -> int:
    recorder = Recorder()
    status = pytest.main(["--slow", "-m", "slow", *sys.argv[1:]], plugins=[recorder])
    REPORT.write_text(render(recorder))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
