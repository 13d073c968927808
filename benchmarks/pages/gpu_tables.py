"""The tables of a result of gpu_check.py, and how such a result becomes one that can be committed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cells import table

Result = dict[str, Any]
Found = dict[str, Any]
OTHERS = ["plain torch", "torch.compile"]
SIZES = ["1 GiB", "256 MiB", "L2"]
DTYPES = ["float32", "bfloat16"]
# Operator, reduction, q.
MAIN = {
    "single, elementwise": ("kl_div_single_loss", "none", "standard"),
    "pair, elementwise": ("kl_div_pair_loss", "none", "full"),
    "batchmean": ("gaussian_kl_div", "batchmean", "standard"),
    "learned prior, batchmean": ("gaussian_kl_div", "batchmean", "prior"),
}
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[\w.+~-]+/)+")


def stages_of(result: Result) -> dict[str, Found]:
    """What was found on a GPU; a dry run is no measurement."""
    if result["dry_run"]:
        raise SystemExit("table.py: a dry run of gpu_check.py measures nothing")
    stages: dict[str, Found] = result["stages"]
    return stages


def measured(result: Result) -> list[Found]:
    """The rows of the bandwidth stage that have a number."""
    return [row for row in stages_of(result)["bandwidth"]["rows"] if "kl_ext" in row]


def machine(result: Result) -> str:
    """One line on the GPU machine."""
    facts = stages_of(result)["environment"]
    commit = (result["commit"] or "unknown")[:10]
    return f"{facts['devices'][0]['name']}, torch {facts['torch']}, kl_ext {commit}, {result['date'][:10]}.\n"


def stages(result: Result) -> str:
    """A row for each stage: what ran, what failed, what was left out and why."""
    rows = []
    for name, found in stages_of(result).items():
        about = "; ".join(about_stage(found)).replace("|", r"\|").replace("\n", " ")
        rows.append([name, found["status"], f"{found['seconds']:.0f}", about])
    return table(["stage", "status", "seconds", "found"], rows)


def about_stage(found: Found) -> list[str]:
    """What there is to say of any stage."""
    about = [str(found[part]) for part in ("problems", "missing", "reason", "refused", "not_collected") if found.get(part)]
    if found.get("devices"):
        about.append(f"torch {found['torch']}, CUDA {found['torch_cuda']}, Python {found['python']}, {found['cores']} cores")
    if target := re.search(r"TORCH_CUDA_ARCH_LIST=(\S+)", found.get("command", "")):
        about.append(f"for compute capability {target[1]}")
    runs = {"": found, **found.get("runs", {})}
    about += [f"{name}: {outcomes(run)}".removeprefix(": ") for name, run in runs.items() if isinstance(run.get("passed"), int)]
    if "rows" in found and "of" in found:
        counts = [f"{sum(name in row for row in found['rows'])} with {name}" for name in (*OTHERS, "max-autotune")]
        about.append(f"{len(found['rows'])} of {found['of']} rows, {', '.join(counts)}")
    if launches := found.get("launches"):
        about.append(f"{launches['calls']} calls{'' if launches['complete'] else ', not all that there are'}")
        about.append(f"{len(launches['wrong'])} results unlike the CPU's")
        about.append(f"{found['errors']} errors, {found['in_kl_ext']} in kl_ext")
    if "kernels" in found:
        about.append(f"{len(found['kernels'])} kernels, which are not those of the cases")
    if "most" in found:
        about.append(f"at most {found['most']:.1%} of the fewest bytes")
    return about


def outcomes(run: Found) -> str:
    """Of a run of pytest."""
    failing = list(dict.fromkeys(failure["test"].partition("::")[0] for failure in run["failures"]))
    more = ["…"] * (run["failed"] > len(run["failures"]))
    parts = [f"{run['passed']} passed", f"{run['failed']} failed" + (f" ({', '.join(failing + more)})" if failing else "")]
    reasons = ", ".join(f"{reason} ({count})" for reason, count in run["skipped"].items())
    parts += [f"{sum(run['skipped'].values())} skipped: {reasons}"] if reasons else []
    parts += [f"{count} not run for want of {module}" for module, count in run["lacking"].items()]
    parts += ["it did not end in time"] * (not run.get("ended", True))
    return ", ".join(parts)


def goals(result: Result) -> str:
    """A row for each goal; the worst case where it was missed."""
    rows = []
    for goal in stages_of(result)["bandwidth"]["goals"]:
        worst = "{:.3f}: {}".format(*goal["missed"][0]) if goal["missed"] else ""
        rows.append([goal["goal"], f"{goal['met']} of {goal['of']}", worst])
    return table(["goal", "met", "worst"], rows)


def bandwidth(result: Result) -> str:
    """Each cell: the share of the bandwidth of a copy."""
    return _by_size(result, lambda row: f"{row['share_of_copy']:.1%}")


def ratios(result: Result) -> str:
    """Each cell: the times of plain torch / torch.compile / max-autotune, as multiples of kl_ext's; a dash: not measured."""
    return _by_size(result, lambda row: " / ".join(_ratio(row, name, 2) for name in (*OTHERS, "max-autotune")))


def _by_size(result: Result, cell: Callable[[Found], str]) -> str:
    """A row for each case and dtype, a column for each size."""
    found = measured(result)
    sizes = [size for size in reversed(SIZES) if any(row["size"] == size for row in found)]
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in found:
        cases.setdefault((row["case"], row["dtype"]), {})[row["size"]] = cell(row)
    return table(
        ["case", "dtype", *sizes], [[*case, *(cells.get(size, "") for size in sizes)] for case, cells in cases.items()]
    )


def _ratio(row: Found, name: str, digits: int) -> str:
    return f"{row[name]['ratio']:.{digits}f}" if name in row else "–"


def summary(result: Result) -> str:
    """The main workloads; each cell: the share of a copy's bandwidth / plain torch / torch.compile."""
    columns = [(dtype, size) for dtype in DTYPES for size in ("1 GiB", "L2")]

    def cell(row: Found) -> str:
        return f"{row['share_of_copy']:.0%} / {_ratio(row, OTHERS[0], 1)} / {_ratio(row, OTHERS[1], 2)}"

    rows = []
    for name, direction, of_case in _main(result):
        cells = {(row["dtype"], row["size"]): cell(row) for row in of_case}
        rows.append([name, direction, *(cells.get(column, "–") for column in columns)])
    return table(["workload", "pass", *(f"{dtype}, {size}" for dtype, size in columns)], rows)


def calls(result: Result) -> str:
    """The main workloads in L2: microseconds in a CUDA graph, and called from Python."""
    names = ["kl_ext", *OTHERS]

    def cell(row: Found, part: str) -> str:
        return " / ".join(f"{row[name][part]:.1f}" if part in row.get(name, {}) else "–" for name in names)

    rows = [
        [name, direction, row["dtype"], cell(row, "us"), cell(row, "called_us")]
        for name, direction, of_case in _main(result)
        for row in of_case
        if row["size"] == "L2"
    ]
    return table(["workload", "pass", "dtype", "in a graph, µs", "from Python, µs"], rows) or "Not measured.\n"


def _main(result: Result) -> list[tuple[str, str, list[Found]]]:
    """Workload, direction and what was measured of them."""
    found = measured(result)
    chosen = []
    for name, key in MAIN.items():
        for direction in ("forward", "backward"):
            of_case = [
                row for row in found if (row["operator"], row["reduction"], row["q"], row["direction"]) == (*key, direction)
            ]
            chosen += [(name, direction, of_case)] if of_case else []
    return chosen


def moved(result: Result) -> str:
    """The bytes that ncu has counted, as a share of the fewest that there can be."""
    found = stages_of(result)["ncu"]
    if not found.get("rows"):
        return f"Nothing was counted: the stage ncu is {found['status']}.\n"
    cases: dict[str, dict[str, Found]] = {}
    for row in found["rows"]:
        cases.setdefault(row["case"], {})[row["dtype"]] = row
    rows = []
    for case, by_dtype in cases.items():
        launches = " / ".join(str(by_dtype[dtype]["kernels"]) if dtype in by_dtype else "–" for dtype in DTYPES)
        rows.append([case, launches, *(f"{by_dtype[x]['of_least']:.1%}" if x in by_dtype else "–" for x in DTYPES)])
    return table(["case", "kernels", *DTYPES], rows)


KINDS: dict[str, Callable[[Result], str]] = {
    "gpu_machine": machine,
    "gpu_summary": summary,
    "gpu_stages": stages,
    "gpu_goals": goals,
    "gpu_bandwidth": bandwidth,
    "gpu_ratios": ratios,
    "gpu_calls": calls,
    "gpu_bytes": moved,
}


def take(path: Path, to: Path) -> None:
    """A result as it is committed: six digits, a row a line, and nothing of where things lie on the machine."""
    result = json.loads(path.read_text())
    stages_of(result).get("environment", {}).pop("platform", None)
    to.write_text(_written(_clean(result)) + "\n")


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return FOLDERS.sub("", value) if isinstance(value, str) else value


def _written(value: Any, depth: int = 1) -> str:
    if not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        parts, ends = [json.dumps(one, ensure_ascii=False) for one in value], "[]"
    else:
        parts, ends = [f"{json.dumps(key)}: {_written(one, depth + 1)}" for key, one in value.items()], "{}"
    return f"{ends[0]}\n{' ' * depth}" + f",\n{' ' * depth}".join(parts) + f"\n{' ' * (depth - 1)}{ends[1]}"
