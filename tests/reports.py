"""Reports of what runs too long for `make test`: a page each in docs/reports, and a line in docs/reliability.md."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measure.machine import describe_machine

TABLE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


def commit() -> str:
    """Seven digits of that of the sources, marked where they differ from it; empty outside a checkout."""
    full = describe_machine("cpu")["commit"] or ""
    return full[:7] + full[40:]


def write_report(
    path: Path, command: str, program: str, found: str, text: str, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A page with the date, the commit, the machine, what was found in a few words, and a table of it."""
    machine, date = describe_machine("cpu"), f"{datetime.now(timezone.utc):%Y-%m-%d}"
    lines = [
        f"# The last `{command}`",
        "",
        f"{date}, commit {machine['commit']}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {machine['cores']} cores of {machine['cpu']} ({machine['cpu_capability']}).",
        f"Written by {program}.",
        "",
        f"Found: {found}.",
        *(["", text] if text else []),
        "",
        *("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)),
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    TABLE.write_text(with_result(TABLE.read_text(), path.name, found, date))


def with_result(page: str, name: str, found: str, date: str) -> str:
    """The page whose table has this result of the report, instead of the one before."""
    cells = rf"\[[^\]\n]*\]\(reports/{re.escape(name)}\) \| [^|\n]* \|"
    changed, lines = re.subn(cells, lambda _: f"[{found}](reports/{name}) | {date} |", page)
    if lines != 1:
        raise ValueError(f"{TABLE} has {lines} lines for {name}, not one")
    return changed
