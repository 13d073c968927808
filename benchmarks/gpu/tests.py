"""The test-suite as stages of gpu_check.py: what runs on the GPU, and what could not be collected."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from .context import ROOT, Context, Found, save

NEEDED_BY_TESTS = ["expecttest", "hypothesis", "matplotlib", "mpmath", "numpy", "pytest", "sklearn", "tqdm"]
NO_CUDA = re.compile("without CUDA|no CUDA device")  # a reason to skip that no GPU machine may give
LARGE_FILES = ["tests/cuda/test_cuda.py", "tests/layouts/test_layouts.py"]
LARGE = "2_to_the_31 or (cuda and 31_bits)"  # tests that want the memory of the card for themselves


def counts(path: Path) -> Found:
    """What report.py has written so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    outcomes = [json.loads(line) for line in dict.fromkeys(lines)]  # pytest-xdist tells what was not collected once a worker
    lacking: Counter[str] = Counter()
    for one in outcomes:  # an import within a test, of torch's own as well
        module = re.match(r"ModuleNotFoundError: No module named '(\w+)", one["message"])
        if one["outcome"] == "failed" and module and module[1] in NEEDED_BY_TESTS:
            one["outcome"] = "lacking"
            lacking[module[1]] += 1
    number = Counter(one["outcome"] for one in outcomes)
    return {
        "passed": number["passed"],
        "failed": number["failed"],
        "lacking": dict(lacking),  # tests that failed for want of a module
        "skipped": dict(Counter(one["message"] for one in outcomes if one["outcome"] == "skipped")),
        "failures": [one for one in outcomes if one["outcome"] == "failed"][:40],
    }


def run_tests(context: Context, name: str, seconds: float, *arguments: str, workers: int = 1) -> Found:
    """One run of pytest; more workers where pytest-xdist is there. What it had found counts when the time is over."""
    path = context.folder / f"{name}_outcomes.txt"
    path.unlink(missing_ok=True)
    seed = os.environ.setdefault("KL_EXT_TEST_SEED", str(int.from_bytes(os.urandom(4), "big")))
    parallel = ["-n", str(workers)] if workers > 1 and find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "gpu.report", "--outcomes", str(path), *parallel, *arguments]
    print(shlex.join(command), flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // workers)) if parallel else None
    variables = {"OMP_NUM_THREADS": threads} if threads else {}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables})
    try:
        exit_status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        exit_status = None
    found = counts(path)
    wrong = exit_status not in ((0, 1) if found["lacking"] else (0,)) or not found["passed"] or found["failed"]
    if not context.dry_run:
        wrong = wrong or any(NO_CUDA.search(reason) for reason in found["skipped"])
    status = "failed" if wrong else "partial" if found["lacking"] else "passed"
    about = {"status": status, "exit_status": exit_status, "ended": exit_status is not None, "seed": seed}
    return {**about, "workers": workers if parallel else 1, **found}


def workers() -> int:
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def bits(context: Context) -> Found:
    """GPU results equal to the CPU's, bit by bit, of the hash in the repository, and 20 runs equal to each other."""
    files = ["tests/values/test_one_hash.py", "tests/values/test_device_bits.py"]
    if context.dry_run:
        return run_tests(context, "bits", context.seconds, *files, "-k", "cpu and (empty or moved or give_the_hash)")
    os.environ.update(variables_of_the_build())
    chosen = [*files, "tests/values/test_determinism.py", "-k", "cuda"]
    return run_tests(context, "bits", context.seconds - 5, *chosen, workers=workers())


def variables_of_the_build() -> dict[str, str]:
    """What tests/package/test_build.py takes as the build's own: only there to be read."""
    import kl_ext

    names = kl_ext._library.build_facts().cuda_architectures
    real = [re.sub(r"^(\d+)(\d)", r"\1.\2", name.removesuffix("-real")) for name in names]
    return {"TORCH_CUDA_ARCH_LIST": ";".join(real)} if real else {}


def not_collected(chosen: list[str]) -> dict[str, str]:
    """Test files that cannot be imported here, and why."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--continue-on-collection-errors", *chosen]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return collection_errors(output)


def collection_errors(output: str) -> dict[str, str]:
    """The files in which pytest reports an error while collecting, and the error."""
    files = dict.fromkeys(re.findall(r"^ERROR (\S+\.py)", output, re.MULTILINE), "")
    for file in files:
        block = re.search(rf"ERROR collecting {re.escape(file)} _*\n(.*?)(?=\n_{{5,}}|\n=====)", output, re.DOTALL)
        problems = re.findall(r"^E\s+(.*)", block[1], re.MULTILINE) if block else []
        files[file] = problems[-1] if problems else ""
    return files


def tests(context: Context) -> Found:
    """Every test that runs on the GPU; what wants the card's memory for itself first, and alone."""
    start = time.monotonic()
    missing = [name for name in NEEDED_BY_TESTS if find_spec(name) is None]
    dry = ["tests/package/test_examples_docs.py", "tests/cuda/test_cuda.py"]
    ignored = not_collected(dry if context.dry_run else [])
    ignore = [f"--ignore={file}" for file in ignored]
    if context.dry_run:
        runs = {"small": run_tests(context, "tests", context.seconds, *ignore, *dry)}
    else:
        os.environ.update(variables_of_the_build())
        many = f"cuda and not (emulation or check_sass or device_bits) and not ({LARGE})"
        large = run_tests(context, "tests_large", 0.3 * context.seconds, *LARGE_FILES, "--slow", "-k", LARGE, *ignore)
        save(context, {"status": "failed", "runs": {"large": large}, "missing": missing, "not_collected": ignored})
        left = context.seconds - (time.monotonic() - start) - 5
        runs = {"large": large, "small": run_tests(context, "tests", left, "-k", many, *ignore, workers=workers())}
    failed = any(run["status"] == "failed" for run in runs.values())
    skipped = sum(sum(run["skipped"].values()) for run in runs.values())
    complete = not ignored and (context.dry_run or not skipped) and all(run["status"] == "passed" for run in runs.values())
    status = "failed" if failed else "passed" if complete else "partial"
    return {"status": status, "runs": runs, "missing": missing, "not_collected": ignored}
