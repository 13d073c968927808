"""Everything that must be shown on a GPU, in one command, inside ten minutes.

    python benchmarks/gpu_check.py --out DIR            (on a GPU machine: no network, nothing installed, no setting changed)
    python benchmarks/gpu_check.py --out DIR --dry-run  (each stage's plumbing, on any machine, in a minute)
    python benchmarks/gpu_check.py --out DIR --lab      (instead: variants of the sums, timed side by side; also with --dry-run)

Stages, in order: environment; build, of the source folder for this GPU; bits (equal to the CPU's, and in 20 runs); tests;
bandwidth; memcheck, racecheck, synccheck and initcheck of compute-sanitizer; ncu. Each runs in processes of its own, is killed
when its time is over (what a stage leaves over goes to those after it), and is in DIR/gpu_check.json as soon as it ends; what
it printed is in DIR/STAGE.log. Exit status: 1 if a stage failed or ran out of time, 3 if something did not run (partial,
unavailable), 0 if everything ran and passed. Speed fails no stage: the goals that were missed are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from gpu.context import BENCHMARKS, ROOT, Context, Found, said_by, save
from gpu.lab import lab
from gpu.stages import STAGES

LAB = {"lab": (570.0, lab)}
STATUSES = {"passed": 0, "partial": 3, "unavailable": 3, "failed": 1, "timed out": 1}


def run_stage(name: str, command: list[str], limit: float, folder: Path) -> Found:
    """Run a stage in a process group of its own; what it found, also where it was killed."""
    result = folder / f"{name}.json"
    result.unlink(missing_ok=True)
    path = [str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    start, status = time.monotonic(), None
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing that a stage began outlives it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: Found = json.loads(result.read_text()) if result.exists() else {"status": "failed"}
    if status is None and (not result.exists() or (process.returncode and found["status"] in ("passed", "partial"))):
        found.update(status="failed", exit_status=process.returncode)
    result.unlink(missing_ok=True)
    seconds = round(time.monotonic() - start, 1)
    return {**found, "status": status or found["status"], "seconds": seconds, "limit_s": round(limit, 1), "log": f"{name}.log"}


def command_of(name: str, seconds: float, options: argparse.Namespace) -> list[str]:
    """The stage as a command: this script again."""
    command = [sys.executable, __file__, "--out", str(options.out), "--stage", name, "--seconds", str(seconds)]
    return command + ["--dry-run"] * options.dry_run


def run(options: argparse.Namespace) -> int:
    """All stages that were asked for, whatever becomes of those before them."""
    path = options.out / "gpu_check.json"
    result: Found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": options.commit,
        "dry_run": options.dry_run,
        "stages": {},
    }
    saved = 0.0
    for name in options.stages:
        own = {**STAGES, **LAB}[name][0]
        limit = options.limit.get(name, own + saved)
        print(f"{name}: ", end="", flush=True)
        found = run_stage(name, command_of(name, limit, options), limit, options.out)
        saved = max(0.0, saved + own - found["seconds"])
        result["stages"][name] = found
        save(Context(options.out, path, 0, options.dry_run), result)
        print(f"{found['status']} ({found['seconds']:.0f} of {limit:.0f} s)", flush=True)
    print(f"\n{report(result)}\nwritten: {path}")
    statuses = [STATUSES[found["status"]] for found in result["stages"].values()]
    return 1 if 1 in statuses else max(statuses)


def report(result: Found) -> str:
    """What a reader wants to know first."""
    lines = []
    for name, found in result["stages"].items():
        about = [str(found[part]) for part in ("problems", "missing", "reason", "refused", "not_collected") if found.get(part)]
        for run_name, one in {"": found, **found.get("runs", {})}.items():
            if isinstance(one.get("passed"), int):
                skipped = sum(one["skipped"].values())
                about += [f"{run_name} did not end in time".strip()] * (not one.get("ended", True))
                about.append(f"{run_name} {one['passed']} passed, {one['failed']} failed, {skipped} skipped".strip())
                about += [f"{count} not run for want of {module}" for module, count in one["lacking"].items()]
                about += [f"skipped: {reason} ({count})" for reason, count in one["skipped"].items()]
                about += [f"FAILED {failure['test']}: {failure['message'][:160]}" for failure in one["failures"][:5]]
        if found.get("launches"):
            about.append(
                f"{found['launches']['calls']} calls, {found['in_kl_ext']} reports of kl_ext, {found['errors']} in all"
            )
        if "most" in found:
            about.append(f"at most {found['most']:.3f} of the least bytes")
        if "of" in found:
            about.append(f"{len(found['rows'])} of {found['of']} rows")
        if "variants" in found:
            for row in found["rows"]:
                times = ", ".join(f"{variant} {time:.2f}" for variant, time in row["us"].items())
                about.append(f"{row['case']}, {row['dtype']}, {row['size']}, us: {times}")
        for goal in found.get("goals", []):
            worst = f"; worst {goal['missed'][0][0]:.3f}: {goal['missed'][0][1]}" if goal["missed"] else ""
            about.append(f"{goal['goal']}: met in {goal['met']} of {goal['of']}{worst}")
        lines += [f"{name}: {found['status']}", *(f"    {line}" for line in about)]
    return "\n".join(lines)


def limits(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"expected STAGE=SECONDS with a stage of {', '.join(STAGES)}, got {text!r}")
    return name, float(seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and the logs")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU, with stand-ins for the tools; no build")
    commit = said_by("git", "-C", str(ROOT), "rev-parse", "HEAD")
    parser.add_argument("--commit", default=commit, help="that of a copy without its history, for the record")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE", help="only these")
    parser.add_argument("--lab", dest="stages", action="store_const", const=list(LAB), help="only time variants of the sums")
    parser.add_argument("--limit", type=limits, nargs="+", default=[], metavar="STAGE=SECONDS", help="other time limits")
    parser.add_argument("--stage", choices=[*STAGES, *LAB], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    options.limit = dict(options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage is None:
        return run(options)
    context = Context(options.out, options.out / f"{options.stage}.json", options.seconds, options.dry_run)
    try:
        found = {**STAGES, **LAB}[options.stage][1](context)
    except Exception as problem:
        traceback.print_exc()
        found = {"status": "failed", "problems": [f"{type(problem).__name__}: {problem}"[:1000]]}
    save(context, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
