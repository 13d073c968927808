"""Reports of what runs too long for `make test`: one page each in docs/reports."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measure.machine import describe_machine


def write_report(path: Path, command: str, program: str, text: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A page with the date, the commit, the machine and a table."""
    machine = describe_machine("cpu")
    lines = [
        f"# The last `{command}`",
        "",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, commit {machine['commit']}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {machine['cores']} cores of {machine['cpu']} ({machine['cpu_capability']}).",
        f"Written by {program}.",
        *(["", text] if text else []),
        "",
        *("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)),
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
