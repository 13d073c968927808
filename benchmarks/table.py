"""Write the tables of the pages from the committed results, so that no number in them is typed.

    python benchmarks/table.py            (rewrite what stands between the marker comments)
    python benchmarks/table.py --check    (exit 1 if that would change anything)
    python benchmarks/table.py --take DIR/gpu_check.json    (copy that to results/gpu.json, without the machine's folders)

A marker names the table and the result that it shows:

    <!-- table: ratios cpu.json -->
    ... written here ...
    <!-- end of table -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from pages import gpu_tables, tables

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGES = [HERE / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
MARKER = re.compile(r"(<!-- table: (\w+)(?: (\S+))? -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def fill(text: str) -> str:
    """The page with each marked table as the results have it."""

    def written(match: re.Match[str]) -> str:
        opening, kind, name, _, end = match.groups()
        kinds = tables.KINDS | gpu_tables.KINDS
        if (kind not in kinds) if name else (kind != "values"):
            raise SystemExit(f"table.py: no table {kind!r}; there are {', '.join(kinds)} of a result, and values of none")
        made = kinds[kind](json.loads((RESULTS / name).read_text())) if name else tables.values()
        return opening + made + end

    return MARKER.sub(written, text)


def main() -> int:
    """Rewrite the pages, or say which of them are out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of date")
    either.add_argument("--take", type=Path, metavar="FILE", help="only copy a result of gpu_check.py to results/gpu.json")
    options = parser.parse_args()
    if options.take:
        gpu_tables.take(options.take, RESULTS / "gpu.json")
        return 0
    check = options.check
    stale = False
    for page in PAGES:
        text = page.read_text()
        if (filled := fill(text)) != text:
            stale = True
            print(f"{'out of date' if check else 'rewritten'}: {page.relative_to(HERE.parent)}")
            if not check:
                page.write_text(filled)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
