"""Write the tables of README.md and benchmarks/README.md from the committed results, so that no number in them is typed.

    python benchmarks/table.py            (rewrite what stands between the marker comments)
    python benchmarks/table.py --check    (exit 1 if that would change anything)

A marker names the table and the result that it shows:

    <!-- table: ratios cpu.json -->
    ... written here ...
    <!-- end of table -->
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGES = [HERE.parent / "README.md", HERE / "README.md"]
MARKER = re.compile(r"(<!-- table: (\w+)(?: (\S+))? -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
OTHERS = ["plain torch", "torch.compile"]
LOSSES = {"kl_div_single_loss": "single", "kl_div_pair_loss": "pair"}

Result = dict[str, Any]


def ratios(result: Result) -> str:
    """A row for each size, a column for each loss and direction: plain torch / torch.compile, as multiples of kl_ext's time."""
    cells = {(row["loss"], row["pass"], row["elements"]): row for row in result["speed"]}
    columns = list(dict.fromkeys((loss, direction) for loss, direction, _ in cells))
    rows = []
    for size in dict.fromkeys(size for _, _, size in cells):
        row = [cells[loss, direction, size] for loss, direction in columns]
        rows.append([elements(size), *(" / ".join(f"{cell[name]['ratio']:.1f}" for name in OTHERS) for cell in row)])
    return table(["elements", *(f"{LOSSES[loss]}, {direction}" for loss, direction in columns)], rows)


def times(result: Result) -> str:
    """A row for each measurement, in microseconds."""
    return _times(result, ["loss", "pass"], lambda row: [LOSSES[row["loss"]], row["pass"]])


def _times(result: Result, head: list[str], names: Callable[[dict[str, Any]], list[str]]) -> str:
    """The medians of all that was timed; the spread is the distance of the quartiles of kl_ext's rounds."""
    timed = list(dict.fromkeys(name for row in result["speed"] for name in row if isinstance(row[name], dict)))
    rows = []
    for row in result["speed"]:
        medians = [f"{row[name]['median_us']:,.1f}" if name in row else "" for name in timed]
        low, high = row["kl_ext"]["quartiles_us"]
        spread = f"{(high - low) / row['kl_ext']['median_us']:.0%}"
        rows.append([*names(row), elements(row["elements"]), *medians, spread])
    return table([*head, "elements", *timed, "spread"], rows)


def accuracy(result: Result) -> str:
    """A row for each loss and distance from the prior; each cell is plain torch / kl_ext."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "below the least value": ("below", share),
        "value lost": ("lost", share),
        "mean, of the true mean": ("mean_ratio", "{:.3f}".format),
        "gradient's error": ("gradient_error", "{:.0e}".format),
    }
    rows = []
    for row in result["accuracy"]:
        pairs = [(form(row["plain torch"][key]), form(row["kl_ext"][key])) for key, form in columns.values()]
        rows.append([LOSSES[row["loss"]], f"{row['distance']:g}", *(" / ".join(pair) for pair in pairs)])
    return table(["loss", "distance", *columns], rows)


def reduction_ratios(result: Result) -> str:
    """A row for each reduction and prior, a column for each width: medians, over sizes and layouts, of both ratios."""
    cases: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    for row in result["speed"]:
        cases.setdefault((row["reduction"], row["prior"]), {}).setdefault(row["width"], []).append(row)
    widths = list(dict.fromkeys(row["width"] for row in result["speed"]))
    rows = []
    for (reduction, prior), by_width in cases.items():
        cells = []
        for width in widths:
            ratios_of = {name: [row[name]["ratio"] for row in by_width.get(width, []) if name in row] for name in OTHERS}
            cells.append(" / ".join(f"{statistics.median(found):.1f}" for found in ratios_of.values() if found))
        rows.append([reduction, prior, *cells])
    return table(["reduction", "prior", *(f"D = {width}" for width in widths)], rows)


def reduction_losses(result: Result) -> str:
    """One line: how often kl_ext was the slower one, and by how much at the worst."""
    counts = []
    for name in OTHERS:
        found = [row for row in result["speed"] if name in row]
        if not found:
            continue
        slower = sum(row[name]["ratio"] < 1 for row in found)
        worst = min(found, key=lambda row: row[name]["ratio"])
        case = f"{worst['reduction']}, D = {worst['width']}, {worst['layout']}, {worst['prior']}, {elements(worst['elements'])}"
        counts.append(f"than {name} in {slower} of {len(found)} rows (least ratio {worst[name]['ratio']:.2f}: {case})")
    return f"kl_ext was slower {' and '.join(counts)}.\n"


def reduction_times(result: Result) -> str:
    """A row for each case and size, in microseconds."""
    keys = ["reduction", "width", "layout", "prior"]
    return _times(result, ["reduction", "D", "layout", "prior"], lambda row: [str(row[key]) for key in keys])


def machine(result: Result) -> str:
    """One line on where the result comes from."""
    facts = result["machine"]
    where = (
        facts["device"] if facts["device"] != facts["cpu"] else f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores"
    )
    return f"{where}, {facts['cpu_capability']}, {result['options']['dtype']}, torch {facts['torch']}, {facts['date']}.\n"


def _of_gpu(result: Result, cell: Callable[[dict[str, Any]], str]) -> str:
    """A row for each case and dtype, a column for each size."""
    rows = measured_on_gpu(result)["bandwidth"]["rows"]
    sizes = [size for size in ("L2", "256 MiB", "1 GiB") if any(row["size"] == size for row in rows)]
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if "kl_ext" in row:
            cases.setdefault((row["case"], row["dtype"]), {})[row["size"]] = cell(row)
    return table(
        ["case", "dtype", *sizes], [[*case, *(cells.get(size, "") for size in sizes)] for case, cells in cases.items()]
    )


def gpu_bandwidth(result: Result) -> str:
    """Each cell: the share of the bandwidth of a copy."""
    return _of_gpu(result, lambda row: f"{row['share_of_copy']:.1%}")


def gpu_ratios(result: Result) -> str:
    """Each cell: the times of plain torch / torch.compile / max-autotune, as multiples of kl_ext's; a dash: not measured."""
    names = (*OTHERS, "max-autotune")
    return _of_gpu(result, lambda row: " / ".join(f"{row[name]['ratio']:.2f}" if name in row else "–" for name in names))


def gpu_goals(result: Result) -> str:
    """A row for each goal; the worst case where it was missed."""
    rows = []
    for goal in measured_on_gpu(result)["bandwidth"]["goals"]:
        worst = "{:.3f}: {}".format(*goal["missed"][0]) if goal["missed"] else ""
        rows.append([goal["goal"], f"{goal['met']} of {goal['of']}", worst])
    return table(["goal", "met", "worst"], rows)


def gpu_machine(result: Result) -> str:
    """One line on the GPU machine."""
    facts = measured_on_gpu(result)["environment"]
    commit = (facts["commit"] or "unknown")[:12]
    return f"{facts['devices'][0]['name']}, torch {facts['torch']}, {result['date'][:10]}, commit {commit}.\n"


def measured_on_gpu(result: Result) -> Result:
    """The stages of gpu_check.py; those of a dry run are no measurement."""
    if result["dry_run"]:
        raise SystemExit("table.py: a dry run of gpu_check.py measures nothing")
    stages: Result = result["stages"]
    return stages


def values() -> str:
    """What the losses are at a few pairs of distributions, beside the textbook divergence of torch.distributions."""
    import torch
    from torch.distributions import Normal, kl_divergence

    import kl_ext

    rows = []
    for mu_p, var_p, mu_q, var_q in ((0, 1, 0, 1), (1, 1, 0, 1), (0, 4, 0, 1), (3, 2, 3, 2), (1, 2, 3, 2)):
        p = torch.tensor([mu_p, var_p], dtype=torch.float64)
        q = torch.tensor([mu_q, var_q], dtype=torch.float64)
        pair = kl_ext.kl_div_pair_loss(p[0], p[1].log(), q[0], q[1].log())
        single = kl_ext.kl_div_single_loss(p[0], p[1].log())
        textbook = kl_divergence(Normal(p[0], p[1].sqrt()), Normal(q[0], q[1].sqrt()))
        standard = (mu_q, var_q) == (0, 1)
        numbers = [f"{textbook:.4f}", f"{pair:.4f}", f"{single:.4f}" if standard else ""]
        rows.append([f"N({mu_p}, {var_p})", f"N({mu_q}, {var_q})", *numbers])
    return table(["p", "q", "KL(p, q)", "pair loss", "single loss of p"], rows)


LOSS_KINDS: dict[str, Callable[[Result], str]] = {"ratios": ratios, "times": times, "accuracy": accuracy, "machine": machine}
REDUCTION_KINDS: dict[str, Callable[[Result], str]] = {
    "reduction_ratios": reduction_ratios,
    "reduction_losses": reduction_losses,
    "reduction_times": reduction_times,
    "machine": machine,
}
GPU_KINDS: dict[str, Callable[[Result], str]] = {
    "gpu_bandwidth": gpu_bandwidth,
    "gpu_ratios": gpu_ratios,
    "gpu_goals": gpu_goals,
    "gpu_machine": gpu_machine,
}
KINDS = LOSS_KINDS | REDUCTION_KINDS | GPU_KINDS


def elements(count: int) -> str:
    """4096 as 4 Ki."""
    for unit, name in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return str(count)


def share(value: float) -> str:
    """A share as a percentage; one that is small but not 0 does not look like 0."""
    return "0" if value == 0 else f"{value:.1%}" if value >= 0.001 else "< 0.1%"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table that reads well as text too."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    numeric = [all(row[column][:1].isdigit() or row[column][:1] in "<" for row in rows) for column in range(len(head))]
    lines = [
        [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True)]
        for row in [head, *rows]
    ]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def fill(text: str) -> str:
    """The page with each marked table as the results have it."""

    def written(match: re.Match[str]) -> str:
        opening, kind, name, _, end = match.groups()
        if (kind not in KINDS) if name else (kind != "values"):
            raise SystemExit(f"table.py: no table {kind!r}; there are {', '.join(KINDS)} of a result, and values of none")
        made = KINDS[kind](json.loads((RESULTS / name).read_text())) if name else values()
        return opening + made + end

    return MARKER.sub(written, text)


def main() -> int:
    """Rewrite the pages, or say which of them are out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of date")
    check = parser.parse_args().check
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
