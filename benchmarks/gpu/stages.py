"""The stages of gpu_check.py, each run in a process of its own: what it finds as a dictionary, with a status.

passed; failed; partial: nothing failed, and something did not run; unavailable: the tool does not work on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from . import tools
from .context import ROOT, Context, Found, program, said_by, save
from .tests import bits, tests

BUILD_TOOLS = ["cmake", "ninja", "c++", "nvcc"]


def environment(context: Context) -> Found:
    """The machine: nothing is changed, nvidia-smi only answers."""
    import torch

    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
    packages = {}
    for name in ("torch", "triton", "numpy", "setuptools", "pytest", "pytest-xdist"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    found: Found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": packages,
        "programs": {name: program(name) for name in [*BUILD_TOOLS, "compute-sanitizer", "ncu", "nvidia-smi"]},
        "nvidia_smi": said_by("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        "devices": [],
    }
    if nvcc := program("nvcc"):
        found["nvcc"] = (said_by(nvcc, "--version") or "").splitlines()[-1:]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
        found["devices"].append({name: getattr(facts, name, None) for name in names})
    release = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    problems = ["Python older than 3.10"] * (sys.version_info < (3, 10)) + ["torch older than 2.11"] * (release < (2, 11))
    if not context.dry_run and not found["devices"]:
        problems.append("torch sees no GPU")
    return {"status": "failed" if problems else "passed", "problems": problems, **found}


def missing_for_the_build() -> list[str]:
    """What setup.py needs and this environment lacks."""
    missing = [name for name in BUILD_TOOLS if program(name) is None]
    try:
        release = int(metadata.version("setuptools").split(".")[0])
    except metadata.PackageNotFoundError:
        release = 0
    return missing + ["setuptools>=77"] * (release < 77)


def build(context: Context) -> Found:
    """In the source folder, for this GPU alone, without a network: nothing is installed."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    capability = (9, 0)
    if not context.dry_run:
        import torch

        capability = torch.cuda.get_device_capability()
    variables = {"KL_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability), "MAX_JOBS": str(os.cpu_count())}
    shown = " ".join([*(f"{name}={value}" for name, value in variables.items()), shlex.join(command)])
    found: Found = {"command": shown, "missing": missing_for_the_build()}
    print(shown)
    if context.dry_run:
        return {"status": "passed", **found}
    if found["missing"]:
        return {"status": "failed", **found}
    completed = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables})
    if completed.returncode:
        return {"status": "failed", "exit_status": completed.returncode, **found}
    report = subprocess.run([sys.executable, "-m", "kl_ext"], cwd=ROOT, capture_output=True, text=True)
    print(report.stdout, report.stderr)
    return {"status": "failed" if report.returncode else "passed", "report": report.stdout.splitlines(), **found}


def bandwidth(context: Context) -> Found:
    """The table of bandwidth.py, and the goals."""
    path = context.folder / "bandwidth_rows.json"
    path.unlink(missing_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(context.folder / "inductor"))
    command = [sys.executable, "-m", "gpu.bandwidth", "--device", context.device, "--result", str(path)]
    if context.dry_run:
        command += ["--rows", "4", "--rounds", "2"]
    process = subprocess.Popen([*command, "--seconds", str(max(20.0, context.seconds - 25))])
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        if path.exists():
            save(context, {"status": "failed", **summary(json.loads(path.read_text()))})
    if not path.exists():
        return {"status": "failed", "exit_status": process.returncode}
    found = summary(json.loads(path.read_text()))
    complete = all(other in row for row in found["rows"] for other in ("kl_ext", "plain torch", "torch.compile"))
    complete = complete and len(found["rows"]) == found["of"]
    status = "failed" if process.returncode else "passed" if complete or context.dry_run else "partial"
    return {"status": status, **found}


def summary(measured: Found) -> Found:
    """The measurements with the goals."""
    return {"goals": goals(measured["rows"]), **measured}


def goals(rows: list[Found]) -> list[Found]:
    """What is wanted of an H100: shares of the copy at 1 GiB, and never slower than torch.compile."""
    large = [row for row in rows if row["size"] == "1 GiB" and "share_of_copy" in row]
    strict = [row for row in large if row["dtype"] == "float32" and not row["is_reduction"]]
    shares = {"float32, elementwise, 1 GiB: at least 95 % of a copy": (strict, 0.95)}
    shares["bfloat16 and reductions, 1 GiB: at least 90 % of a copy"] = ([row for row in large if row not in strict], 0.9)
    found = [_goal(goal, [(row["share_of_copy"], row) for row in chosen], least) for goal, (chosen, least) in shares.items()]
    for mode in ("torch.compile", "max-autotune"):
        ratios = [(row[mode]["ratio"], row) for row in rows if mode in row]
        found.append(_goal(f"never slower than {mode}", ratios, 1.0))
    return found


def _goal(goal: str, values: list[tuple[float, Found]], least: float) -> Found:
    missed = sorted(((value, f"{row['case']}, {row['dtype']}, {row['size']}") for value, row in values if value < least))
    return {"goal": goal, "least": least, "of": len(values), "met": len(values) - len(missed), "missed": missed}


def tool(context: Context, name: str) -> str | None:
    return str(tools.stub(context.folder, name)) if context.dry_run else program(name)


def run_tool(context: Context, command: list[str]) -> tuple[str, int]:
    """The output and the exit status of a tool over launches.py; the caching allocator hides what lies beyond a tensor."""
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print(shlex.join(command), flush=True)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, **streams) as process:
        lines = []
        for line in process.stdout or []:
            lines.append(line)
            print(line, end="", flush=True)
    return "".join(lines), process.returncode


def last_json(output: str, field: str) -> Found | None:
    """What launches.py has printed among the words of a tool."""
    lines = [line for line in output.splitlines() if line.startswith("{") and f'"{field}"' in line]
    return json.loads(lines[-1]) if lines else None


def sanitizer(name: str) -> Callable[[Context], Found]:
    def stage(context: Context) -> Found:
        where = tool(context, "compute-sanitizer")
        if where is None:
            return {"status": "unavailable", "reason": "compute-sanitizer is not on this machine"}
        launches = [sys.executable, "-m", "gpu.launches", "--device", context.device]
        launches += ["--calls", "20"] if context.dry_run else ["--seconds", str(max(5.0, context.seconds - 15))]
        command = tools.sanitizer_command(where, name, said_by(where, "--help") or "", launches)
        output, exit_status = run_tool(context, command)
        parsed, done = tools.parse_sanitizer(output), last_json(output, "calls")
        found = {"exit_status": exit_status, **parsed, "launches": done}
        if parsed["refused"]:
            return {"status": "unavailable", **found}
        ours = parsed["in_kl_ext"]
        if name != "initcheck" and not context.dry_run:  # kl_ext's kernels alone were watched
            ours = max(ours, (parsed["errors"] or 0) - parsed["of_calls"])
        if ours or done is None or done["wrong"] or parsed["errors"] is None or exit_status not in (0, tools.FOUND):
            return {"status": "failed", **found}
        return {"status": "passed" if done["complete"] or context.dry_run else "partial", **found}

    return stage


def ncu(context: Context) -> Found:
    """The bytes that each operator moves to and from the memory of the card, against the fewest."""
    where = tool(context, "ncu")
    if where is None:
        return {"status": "unavailable", "reason": "ncu is not on this machine"}
    size, limit = (10_000_000, ["--calls", "2"]) if context.dry_run else (512 * 2**20, [])
    launches = [sys.executable, "-m", "gpu.launches", "--device", context.device, "--bytes", str(size), *limit]
    output, exit_status = run_tool(context, tools.ncu_command(where, launches))
    if reason := tools.refusal(output):
        return {"status": "unavailable", "reason": reason}
    kernels, listed = tools.parse_ncu(output), last_json(output, "cases")
    rows = tools.match(kernels, listed["cases"]) if listed else None
    if exit_status or not rows:
        return {"status": "failed", "exit_status": exit_status, "kernels": kernels}
    return {"status": "passed", "most": max(row["of_least"] for row in rows), "rows": rows}


# Seconds, 600 in all; what a stage leaves over goes to those after it.
STAGES: dict[str, tuple[float, Callable[[Context], Found]]] = {
    "environment": (15, environment),
    "build": (90, build),
    "bits": (45, bits),
    "tests": (150, tests),
    "bandwidth": (150, bandwidth),
    "memcheck": (25, sanitizer("memcheck")),
    "racecheck": (60, sanitizer("racecheck")),
    "synccheck": (20, sanitizer("synccheck")),
    "initcheck": (20, sanitizer("initcheck")),
    "ncu": (25, ncu),
}
