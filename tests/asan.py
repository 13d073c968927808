"""Run tests with libraries compiled with -fsanitize=address,undefined: `make test-asan`.

The first report of a sanitizer ends its process and so fails the test. torch and Python are not compiled so: AddressSanitizer
sees what they allocate, and not what they read. It sees nothing of the memory that kl_ext maps itself, for results of 128 KiB
and more. Before the tests, planted faults must be found.

Without arguments this is the whole suite, and docs/reports/asan.md is written. Arguments are tests, and options of pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from reports import write_report

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "reports" / "asan.md"
PACKAGE = ROOT / "build" / "asan" / "package"
LEFT_OUT = {
    "tests/benchmarks/test_vectorised.py": "it reads machine code, which the sanitizers change",
    "tests/cuda/test_cuda_emulation": "these kernels are not part of the library: `make test-cuda-emulation` sanitizes them",
    "tests/layouts/test_failing_allocation.py": "it replaces functions of the C library, as AddressSanitizer does",
    "tests/layouts/test_leaks.py": "so does this",
    "tests/layouts/test_long_runs.py": "AddressSanitizer keeps freed memory, and so grows",
    "tests/package/test_cpp.py": "its programs start with an empty environment, and so without AddressSanitizer",
    "tests/package/test_environment.py::test_no_call_asks_the_environment": "it preloads a library of its own",
    "tests/package/test_library.py::test_import_adds_at_most_50_ms_to_torchs": "it takes the time",
    "tests/package/test_site.py::test_a_browser_shows_the_formulas_and_pictures_of_every_page": "no browser starts so",
    "tests/package/test_supply_chain.py::test_no_folder_of_the_build_is_in_what_is_compiled": "reports name source files",
    "tests/package/test_wheels.py::test_auditwheel_adds_a_tag_and_nothing_else": "it adds the sanitizers' libraries",
    "tests/values/test_one_hash.py::test_the_kernels_of_this_build_give_the_hash": "it makes a program without the sanitizers",
}
FOUND = re.compile(r"ERROR: AddressSanitizer: [\w-]+|runtime error: [a-z ]+[a-z]")

# Tensors whose memory is shorter than they say, by one number, or does not begin where a number may. NumPy does not check.
PLANTED = {
    "a number read behind an input": """
        x = too_long(1000)
        kl_ext.kl_div_single_loss(x, torch.zeros(1000))
    """,
    "a number of two bytes read behind an input": """
        x = too_long(1000).view(torch.bfloat16)[:1999]
        kl_ext.gaussian_kl_div(torch.zeros(1999).bfloat16(), x, reduction="sum")
    """,
    "a number written behind a result": """
        x = torch.zeros(1000)
        places = {"grad_mu": too_long(1000), "grad_log_var": torch.zeros(1000)}
        torch.ops.kl_ext.kl_div_single_loss_backward.out(x, x, x, -30, 20, **places)
    """,
    "a number at an odd address": """
        x = torch.frombuffer(bytearray(4004), dtype=torch.float32, offset=1, count=1000)
        kl_ext.kl_div_single_loss(x, x)
    """,
}
# The right numbers come first.
PREPARED = """
import numpy, torch, kl_ext

def too_long(count):
    numbers = numpy.zeros(count - 1, dtype=numpy.float32)
    return torch.from_numpy(numpy.lib.stride_tricks.as_strided(numbers, (count,), (4,)))

assert kl_ext.kl_div_single_loss(torch.zeros(1000), too_long(1001)[:1000]).sum() == 0
print(kl_ext.__file__, flush=True)
"""


def environment() -> dict[str, str]:
    """The sanitizers have to be there before Python allocates anything, and libstdc++ for the exceptions that they follow."""
    libraries = [f"lib{name}.so" for name in ("asan", "ubsan", "stdc++")]
    preloaded = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in libraries]
    return {
        **os.environ,
        "PYTHONPATH": str(PACKAGE),
        "LD_PRELOAD": " ".join(preloaded),
        # Tests ask for more memory than there is. What Python keeps until it ends is no leak.
        "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run(*command: str, **how: Any) -> tuple[subprocess.CompletedProcess[str], str]:
    """Also what was written to the standard error. Python finds the sanitized package in the folder where it starts, too."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        done = subprocess.run([sys.executable, *command], cwd=PACKAGE, env=environment(), text=True, stderr=errors, **how)
        errors.seek(0)
        return done, errors.read()


def planted() -> dict[str, str]:
    """What is said about each planted fault."""
    said = {}
    for fault, code in PLANTED.items():
        done, errors = run("-c", PREPARED + textwrap.dedent(code), stdout=subprocess.PIPE)
        if not done.stdout.startswith(str(PACKAGE)):
            sys.exit(f"the sanitized kl_ext does not work: {done.stdout}{errors}")
        found = FOUND.findall(errors)
        if not found or "/csrc/" not in errors:
            sys.exit(f"{fault} was planted and not found: {errors}")
        said[fault] = found[0]
    return said


def in_root(argument: str) -> str:
    return str(ROOT / argument) if Path(ROOT, argument.partition("::")[0]).exists() else argument


def main() -> int:
    said = planted()
    print(*(f"planted: {fault}\n  found: {what}" for fault, what in said.items()), sep="\n", flush=True)
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        # What a process writes to its standard error is not captured: it would be lost with the process.
        pytest = ["-m", "pytest", "-n", os.environ.get("WORKERS", "2"), f"--junitxml={results}", "-q", "--capture=sys"]
        pytest += [f"--deselect={name}" for name in LEFT_OUT]
        start = time.monotonic()
        done, errors = run(*pytest, *map(in_root, chosen or ["tests"]))
        minutes = (time.monotonic() - start) / 60
        reports = len(FOUND.findall(errors))
        print(errors if done.returncode else "", f"{reports} reports of the sanitizers", sep="\n")
        if not chosen:
            write(list(ElementTree.parse(results).iter("testcase")), reports, said, minutes)
    return done.returncode or min(reports, 1)


def write(cases: list[ElementTree.Element], reports: int, said: dict[str, str], minutes: float) -> None:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts["/".join(case.get("classname", "").split(".")[:2])][outcome] += 1
    outcomes = ("passed", "failure", "error", "skipped")
    rows = [[name, *(str(count[outcome]) for outcome in outcomes)] for name, count in sorted(counts.items())]
    text = [
        f"It took {minutes:.0f} minutes. What AddressSanitizer and UndefinedBehaviorSanitizer said of planted faults:",
        "",
        *(f"- {fault}: `{what}`" for fault, what in said.items()),
        "",
        "Left out:",
        "",
        *(f"- `{name}`: {reason}" for name, reason in LEFT_OUT.items()),
        "",
        "Tests that need a GPU, and slow ones, are skipped:",
    ]
    passed = sum(count["passed"] for count in counts.values())
    found = f"{reports} reports in {passed:,} tests"
    write_report(REPORT, "make test-asan", "tests/asan.py", found, "\n".join(text), ["tests", *outcomes], rows)


if __name__ == "__main__":
    sys.exit(main())
