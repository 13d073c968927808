"""How the tables write numbers, and the markdown around them."""

from __future__ import annotations


def elements(count: int) -> str:
    """4096 as 4 Ki."""
    for unit, name in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return str(count)


def share(value: float) -> str:
    """A share as a percentage; one that is small but not 0 does not look like 0."""
    return "0" if value == 0 else f"{value:.1%}" if value >= 0.001 else "< 0.1%"


def ulps(value: float) -> str:
    """An error in units in the last place, with two digits."""
    return f"{value:.1f}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table that reads well as text too; nothing without rows."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    numeric = [all(row[column][:1].isdigit() or row[column][:1] in "<–" for row in rows) for column in range(len(head))]
    lines = [
        [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True)]
        for row in [head, *rows]
    ]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])
