"""Run stress.py with libraries compiled with -fsanitize=thread, and fail where a report is kl_ext's: `make test-tsan`.

A run of the usual time writes docs/reports/tsan.md.

torch and Python are not compiled so. ThreadSanitizer sees their calls of the C library but neither their reads and writes nor
their atomics, and so it may report them without cause. A report is kl_ext's if its code made one of the two accesses, or is
among the innermost callers of whatever else is reported. A crash counts in any case.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "build" / "tsan" / "package"
PAGE = ROOT / "docs" / "reports" / "tsan.md"
sys.path.insert(0, str(HERE.parent))

from reports import write_report  # noqa: E402

MODULE = re.compile(r"^ +#\d+ .*?\(([^()]*)\+0x[0-9a-f]+\)", re.MULTILINE)
ACCESS = re.compile(r"  (?:previous )?(?:atomic )?(?:write|read) of size", re.IGNORECASE)
REPORT = re.compile(r"^(?:WARNING|==\d+==ERROR): ThreadSanitizer.*?^(?:=====|SUMMARY)", re.MULTILINE | re.DOTALL)
TEXT = """\
Eight threads share leaves, graphs, the memory for results and the choice of kernels. Meanwhile another thread sets environment
variables, the process forks, and another process ends while its threads compute. A report is kl_ext's where its code made one
of the accesses. torch and Python are not compiled with ThreadSanitizer, which reports some of what they do without cause."""
OURS = ("libkl_ext.so", "_bindings.", "_C.")


def is_ours(report: str) -> bool:
    if not report.startswith("WARNING"):
        return True
    stacks = re.split(r"\n\n|(?=\n  \S)", report)
    accesses = [stack for stack in stacks if ACCESS.match(stack.strip("\n"))]
    for stack in accesses or stacks:
        called = [Path(module).name for module in MODULE.findall(stack)]
        called = [name for name in called if not name.startswith("libtsan")]
        if any(name.startswith(OURS) for name in called[: 1 if accesses else 3]):
            return True
    return False


def reports_of(*command: str) -> tuple[int, list[str]]:
    """The status of a Python program, and what ThreadSanitizer says about it."""
    preloaded = subprocess.check_output(["g++", "-print-file-name=libtsan.so"], text=True).strip()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "log_path": f"{folder}/report",
            "suppressions": str(HERE / "tsan.supp"),
            "exitcode": "0",  # the program's own status
            "die_after_fork": "0",
            "history_size": "7",
            "report_thread_leaks": "0",
        }
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")])),
            "LD_PRELOAD": preloaded,
            "TSAN_OPTIONS": " ".join(f"{name}={value}" for name, value in options.items()),
            "OMP_THREAD_LIMIT": "1",  # ThreadSanitizer does not see the barriers of libgomp
        }
        status = subprocess.run([sys.executable, *command], env=environment).returncode
        return status, [text for log in Path(folder).iterdir() for text in REPORT.findall(log.read_text(errors="replace"))]


def innermost(report: str) -> str:
    """The library that made the access, or called what made it."""
    called = [Path(module).name for module in MODULE.findall(report)]
    return next((name for name in called if not name.startswith("libtsan")), "unknown")


def main() -> int:
    library = PACKAGE / "kl_ext" / "lib" / "libkl_ext.so"
    if b"__tsan_init" not in library.read_bytes():
        sys.exit(f"{library} is not compiled with -fsanitize=thread")
    start = time.monotonic()
    status, reports = reports_of(str(HERE / "stress.py"), *sys.argv[1:])
    seconds = time.monotonic() - start
    ours = [report for report in reports if is_ours(report)]
    print(*ours, sep="\n")
    print(f"stress.py ended with status {status}; {len(reports)} reports, {len(ours)} of them kl_ext's")
    if not sys.argv[1:]:
        found = f"{len(ours)} reports of kl_ext" + ("" if status == 0 else f", status {status}")
        text = f"{TEXT}\nIt took {seconds:.0f} seconds."
        counts = Counter(map(innermost, reports))
        rows = [[name, str(count)] for name, count in counts.most_common()]
        write_report(PAGE, "make test-tsan", "tests/threads/tsan.py", found, text, ["reports of others", "number"], rows)
    return 1 if ours or status else 0


if __name__ == "__main__":
    sys.exit(main())
