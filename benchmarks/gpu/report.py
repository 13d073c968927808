"""A pytest plugin: the outcome of every test as a line of JSON, at once: a run that is killed leaves what it has found.

python -m pytest -p gpu.report --outcomes FILE    (with benchmarks/ on PYTHONPATH)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, help="file for the outcome of every test")


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers report to one process
        config.pluginmanager.register(Recorder(config.getoption("outcomes")))


class Recorder:
    """Writes the lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def write(self, report: Any, outcome: str, message: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"test": report.nodeid, "outcome": outcome, "message": message}) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        """Of files: one that is skipped for want of a module is not collected in silence."""
        if not report.passed:
            message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)[-500:]
            self.write(report, report.outcome, message.removeprefix("Skipped: "))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.write(report, "skipped", reason.removeprefix("Skipped: "))
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.write(report, "failed", crash.message[:500] if crash else str(report.longrepr)[-500:])
        elif report.when == "call":
            self.write(report, "passed", "")
