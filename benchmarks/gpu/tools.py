"""compute-sanitizer and ncu: how gpu_check.py calls them, and what their output says.

Neither changes a setting of the card: ncu is told to leave the clocks alone (--clock-control none), which is not its default.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import Any

SANITIZERS = ["memcheck", "racecheck", "synccheck", "initcheck"]
FOUND = 86  # compute-sanitizer's exit status where it found something: no other program's
METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written", "gpu__time_duration.sum": "nanoseconds"}
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1, "us": 1e3, "usecond": 1e3, "nsecond": 1, "ms": 1e6}
REFUSED = {
    "ERR_NVGPUCTRPERM": "the driver does not permit this user to read performance counters",
    "LibraryNotLoaded": "the profiler's library does not load here",
    "Device not supported": "the tool does not support this device",
    "No supported GPU": "the tool does not support this device",
}
# The first name after the namespaces, of which an anonymous one is written in several ways.
KERNEL = re.compile(r"kl_ext::cuda::(?:(?:<unnamed>|\(anonymous namespace\)|\{anonymous\}|_GLOBAL__N__\w+)::)?(\w+)\s*[<(]")
# ncu selects kl_ext's kernels by their whole names, and prints them without the namespaces around all of it.
PRINTED_BY_NCU = re.compile(r"^(?:void )?(?:[\w<>(){} ]*?::)*?(\w+)\s*[<(]")
MAIN_KERNELS = {
    "forward",
    "backward",
    "sum_rows",
    "sum_columns",
}  # of which a call has one; the others end a sum or begin a mean


def sanitizer_command(program: str, tool: str, help_text: str, target: list[str]) -> list[str]:
    """The target under a tool, which watches the kernels of kl_ext alone; initcheck must see who else writes."""
    option = next((name for name in ("--kernel-name", "--kernel-regex", "--filter") if f"{name} " in help_text), None)
    only = [option, "kns=kl_ext"] if option and tool != "initcheck" else []
    return [program, "--tool", tool, "--show-backtrace", "device", "--error-exitcode", str(FOUND), *only, *target]


def parse_sanitizer(output: str) -> dict[str, Any]:
    """How many errors there are, and of them the reports that name one of kl_ext's kernels."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) ", output)
    reports, report = [], ""
    for line in output.splitlines():
        text = line.removeprefix("=========")
        if text == line:
            continue
        if text.startswith(" ") and not text.startswith("  ") and not re.match(r" (?:Saved|and is|COMPUTE)", text):
            reports.append(report)
            report = ""
        report += text + "\n"
    named = [text for text in [*reports, report] if any(_names_a_kernel(line) for line in text.splitlines())]
    return {
        "errors": int(summary[1]) if summary else None,
        "in_kl_ext": len(named),
        "of_calls": output.count("Program hit "),  # CUDA functions that returned an error, which torch may expect
        "first": named[0][:1500] if named else None,
        "refused": refusal(output),
    }


def _names_a_kernel(line: str) -> bool:
    return bool(KERNEL.search(line) or "kl_ext4cuda" in line) and "Host Frame" not in line


def refusal(output: str) -> str | None:
    """Why a tool does not work here, if it says so."""
    return next((reason for text, reason in REFUSED.items() if text in output), None)


def ncu_command(program: str, target: list[str]) -> list[str]:
    """The target with the bytes and the time of each kernel of kl_ext as CSV."""
    kernels = ["--kernel-name-base", "demangled", "--kernel-name", "regex:kl_ext"]
    leave = ["--clock-control", "none", "--cache-control", "all"]
    output = ["--csv", "--print-units", "base", "--target-processes", "all"]
    return [program, "--metrics", ",".join(METRICS), *kernels, *leave, *output, *target]


def parse_ncu(output: str) -> list[dict[str, Any]]:
    """The kernels in order: name, bytes read and written, nanoseconds."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        name, metric = PRINTED_BY_NCU.match(row.get("Kernel Name") or ""), METRICS.get(row.get("Metric Name") or "")
        if name and metric:
            value = float(row["Metric Value"].replace(",", "")) * UNITS.get(row["Metric Unit"], 1)
            kernels.setdefault(row["ID"], {"kernel": name[1]})[metric] = value
    return list(kernels.values())


def match(kernels: list[dict[str, Any]], cases: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Each case with the bytes of its kernels: the main one and those that end it. None where they do not correspond."""
    groups: list[list[dict[str, Any]]] = []
    for kernel in kernels:
        if kernel["kernel"] in MAIN_KERNELS:
            groups.append([])
        if groups and kernel["kernel"] != "divide_each":  # one number's, of the case after it
            groups[-1].append(kernel)
    if len(groups) != len(cases):
        return None
    rows = []
    for case, group in zip(cases, groups, strict=True):
        moved = sum(kernel.get("read", 0) + kernel.get("written", 0) for kernel in group)
        time = sum(kernel.get("nanoseconds", 0) for kernel in group)
        share = {"dram_bytes": moved, "of_least": moved / case["least_bytes"], "microseconds": time / 1e3}
        rows.append({**case, "kernels": len(group), **share})
    return rows


# What stands in for the tools in a dry run: they run the target, and print what the tools printed of something else.

RECORDED_SANITIZER = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<float>>(int)+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x7f0000000000 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""
# The kernel's name and what was measured of it; the columns around them are as ncu prints them.
_NCU_COLUMNS = """\
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"""
_NCU_LINE = """\
"{}","1","python3","127.0.0.1","void {}","1","7","(256, 1, 1)","(1184, 1, 1)","0","9.0",\
"Command line profiler metrics","{}","{}","{}"
"""
_NCU_FORWARD = (
    "forward<math::StandardDivergence, 0, float, float, float, Vectors<4, 1>>(T6::Plan<kInputs+1>, math::Settings<T3>)"
)
_NCU_SUM = "sum_rows<Forward<math::Divergence>, 0, float, float, float, VectorTerms<4>>(T6::Plan<kOperands>, SumShape<T3>)"
_NCU_MEASURED = [
    ("0", _NCU_FORWARD, "dram__bytes_read.sum", "byte", "6,710,000"),
    ("0", _NCU_FORWARD, "dram__bytes_write.sum", "byte", "3,300,000"),
    ("0", _NCU_FORWARD, "gpu__time_duration.sum", "ns", "5,120"),
    ("1", _NCU_SUM, "dram__bytes_read.sum", "Mbyte", "6"),
    ("1", _NCU_SUM, "dram__bytes_write.sum", "Mbyte", "4"),
    ("2", "unnamed>::sum_partials<float>(const T1 *, long, T1 *)", "dram__bytes_read.sum", "byte", "1,000"),
]
RECORDED_NCU = (
    "==PROF== Connected to process 1 (/usr/bin/python3)\n==PROF== Disconnected from process 1\n"
    + _NCU_COLUMNS
    + "".join(_NCU_LINE.format(*measured) for measured in _NCU_MEASURED)
)


def stub(folder: Path, name: str) -> Path:
    """A program that takes the tool's options and runs the target under no tool."""
    recorded = RECORDED_SANITIZER if name == "compute-sanitizer" else RECORDED_NCU
    (folder / f"{name}.txt").write_text(recorded)
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in --help) echo "  --kernel-name arg"; exit;; --version) echo "a stub"; exit;; esac\n'
        f'while [ "$1" != "{sys.executable}" ]; do shift; done\n'
        f'"$@"; status=$?\ncat "{folder}/{name}.txt"\nexit $status\n'
    )
    path.chmod(0o755)
    return path
