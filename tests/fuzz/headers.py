"""Fuzz the headers that need no torch with libFuzzer: `make fuzz-cpp`, `make fuzz-cpp ARGS="--seconds 600 sums"`.

A run of all targets without a failure writes docs/reports/fuzz-cpp.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = ROOT / "build" / "fuzz"
REPORT = ROOT / "docs" / "reports" / "fuzz-cpp.md"
TARGETS = re.findall(r'\{"(\w+)", \w+\}', SOURCE.read_text())
# No contraction, as in the build.
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off"]
FUZZER = ["-g1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]


def clang() -> str | None:
    """A clang++ that has libFuzzer: $CLANG, or the first in PATH."""
    names = [os.environ["CLANG"]] if "CLANG" in os.environ else ["clang++", *(f"clang++-{n}" for n in range(24, 12, -1))]
    program = (
        '#include <cstdint>\n#include <cstddef>\nextern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }'
    )
    for name in filter(shutil.which, names):
        command = [name, *FLAGS, *FUZZER, "-x", "c++", "-", "-o", os.devnull]
        if subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0:
            return name
    return None


def build(compiler: str, program: Path, flags: list[str], sources: Path = ROOT / "csrc") -> Path:
    program.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, *FLAGS, *flags, "-w", "-I", sources, SOURCE, "-o", program], check=True)
    return program


def fuzz(program: Path, target: str, *options: str, corpus: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one target; its inputs are kept in the corpus, and one that fails beside it."""
    command = [str(program), f"--target={target}", *options]
    if corpus is not None:
        corpus.mkdir(parents=True, exist_ok=True)
        command += [f"-artifact_prefix={corpus.parent}/{target}-", str(corpus)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="target", help=f"some of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    arguments = parser.parse_args()
    compiler = clang()
    if compiler is None:
        sys.exit("make fuzz-cpp needs a clang++ with libFuzzer; on Debian and Ubuntu: apt install clang-16 libclang-rt-16-dev")
    program = build(compiler, BUILD / "headers", FUZZER)
    rows, failed = [], False
    for target in arguments.targets:
        corpus = BUILD / "corpus" / target
        run = fuzz(program, target, f"-max_total_time={arguments.seconds}", "-print_final_stats=1", corpus=corpus)
        if run.returncode != 0:
            failed = True
            print(f"{target:12} failed:\n{run.stderr}")
            continue
        executions, speed = re.findall(r"stat::(?:number_of_executed_units|average_exec_per_sec): *(\d+)", run.stderr)
        print(f"{target:12} {int(executions):>12,} executions, {int(speed):>9,} per second", flush=True)
        rows.append([target, f"{int(executions):,}"])
    if not failed and arguments.targets == TARGETS:
        sys.path.insert(0, str(ROOT / "tests"))
        from reports import write_report  # it takes torch

        found = f"0 failures in {sum(int(count.replace(',', '')) for _, count in rows) / 1e6:.0f} million inputs"
        text = f"Each target ran for {arguments.seconds} seconds, with {compiler}."
        write_report(REPORT, "make fuzz-cpp", "tests/fuzz/headers.py", found, text, ["target", "inputs"], rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
