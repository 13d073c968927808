"""Random scripts around the losses, until one of them is wrong: `make fuzz`. A failure is printed as the smallest script.

    make fuzz ARGS="--cases 1000"      the first thousand of today's seed
    make fuzz ARGS="--seed 7"          the same cases again; --first N starts at the case that failed

A run without failures writes docs/reports/fuzz.md.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "reports" / "fuzz.md"
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/fuzz", "tests/support", "tests", "benchmarks")]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import kl_ext  # noqa: E402
from judge import verdict  # noqa: E402
from reports import write_report  # noqa: E402
from scripts import Script, draw  # noqa: E402

# What a line may lose and still be one.
SIMPLER = [
    (r", weight=\w+", ""),
    (r", reduction='\w+'", ""),
    (r", dim=(\([^)]*\)|\[[^]]*\]|-?\d+)", ""),
    (r", keepdim=True", ""),
    (r", dtype=torch\.\w+", ""),
    (r", clamp_min=[^,]+, clamp_max=[^,)]+", ""),
    (r"\.transpose\(0, -1\)\.contiguous\(\)\.transpose\(0, -1\)", ""),
    (r"checkpoint\((lambda .*), [\w, ]+\)$", r"(\1)()"),
    (r"retain_graph=True", ""),
    (r"torch\.b?float(16|32)\b", "torch.float64"),
    (r" \* (0\.001|8|30|1e-6)", ""),
    (r"^A, B, C = \d+", "A, B, C = 1"),
    (r"^A, B, C = (\d+), \d+", r"A, B, C = \1, 1"),
    (r"^A, B, C = (\d+), (\d+), \d+", r"A, B, C = \1, \2, 1"),
    (r"^A, B, C = \d+", "A, B, C = 2"),
    (r"^A, B, C = (\d+), \d+", r"A, B, C = \1, 2"),
    (r"^A, B, C = (\d+), (\d+), \d+", r"A, B, C = \1, \2, 2"),
    (r"^A, B, C = .*", "A, B, C = 2, 2, 2"),
]


def simpler(script: Script) -> Iterator[Script]:
    """The script without one line, or with a simpler one in its place."""
    for i in reversed(range(len(script.lines))):
        yield Script(script.lines[:i] + script.lines[i + 1 :], script.mild)
    for i, line in enumerate(script.lines):
        for pattern, replacement in SIMPLER:
            changed = re.sub(pattern, replacement, line)
            if changed != line:
                yield Script((*script.lines[:i], changed, *script.lines[i + 1 :]), script.mild)


def size(script: Script) -> tuple[int, int, int]:
    return len(script.lines), len(script.code), sum(map(int, re.findall(r"\d+", script.lines[0])))


def smallest(script: Script, kl: Any) -> Script:
    """The script that is left when nothing more can go without another verdict."""
    kind = verdict(script, kl)
    while True:
        for candidate in simpler(script):
            if candidate.lines and size(candidate) < size(script) and verdict(candidate, kl) == kind:
                script = candidate
                break
        else:
            return script


# What a script may contain, for the report.
CONTENTS = {
    "halves of one tensor": r"split\(|chunk\(|narrow\(|unbind\(|::2",
    "a broadcast or expanded input": r"\b1, seed|expand",
    "float16 or bfloat16": r"float16",
    "several dtypes": r"",
    "a weight": r"weight=",
    "a sum or mean": r"reduction='(sum|mean|batchmean)'",
    "NaN or infinity": r"= -?float\(",
    "a hook": r"hook",
    "a change in place": r"\.mul_\(",
    "a checkpoint": r"checkpoint",
    "torch.compile": r"compiled",
    "vmap": r"vmap",
    "forward mode": r"jvp",
    "torch.func.grad": r"func\.grad",
    "second derivatives": r"create_graph",
}


def contents(script: Script) -> list[str]:
    several = len(set(re.findall(r"torch\.b?float\d+", script.code))) > 1
    return [name for name, pattern in CONTENTS.items() if (several if not pattern else re.search(pattern, script.code))]


def judged(seed: int) -> tuple[int, str | None, list[str]]:
    script = draw(seed)
    return seed, verdict(script, kl_ext), contents(script)


def _start() -> None:
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of the run; a new one by default")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--keep-going", action="store_true", help="list all failures in place of reducing the first")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    seeds = range(options.seed * 1_000_000 + options.first, options.seed * 1_000_000 + options.cases)
    failures, seen, start = 0, collections.Counter[str](), time.monotonic()
    # A process grows with the largest scripts and with what was compiled: it ends after a thousand.
    with multiprocessing.get_context("spawn").Pool(initializer=_start, maxtasksperchild=20) as pool:
        for seed, wrong, found in tqdm(
            pool.imap_unordered(judged, seeds, chunksize=50), total=len(seeds), unit=" cases", mininterval=1
        ):
            seen.update(found)
            if wrong is None:
                continue
            failures += 1
            tqdm.write(f"case {seed % 1_000_000}: {wrong}")
            if not options.keep_going:
                pool.terminate()
                print(f"\n# {wrong}\n{smallest(draw(seed), kl_ext)}")
                break
    print(f"{failures} failures")
    if not failures:
        minutes = (time.monotonic() - start) / 60
        rows = [[name, str(seen[name])] for name in CONTENTS]
        found, text = f"0 failures in {len(seeds):,} scripts", f"Their seed was {options.seed}; it took {minutes:.0f} minutes."
        write_report(REPORT, "make fuzz", "tests/fuzz/fuzz.py", found, text, ["scripts with", "number"], rows)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
