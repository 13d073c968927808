"""What a result was measured on: the machine, the versions and the commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import kl_ext


def describe_machine(device: str) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a measurement."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # processes that wanted a core in the last minute, before the benchmark began
        "huge_pages": _huge_pages(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kl_ext": kl_ext.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _huge_pages() -> str | None:
    """What the kernel does about transparent huge pages: always, madvise or never."""
    try:
        match = re.search(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    except OSError:
        return None
    return match[1] if match else None


def _commit() -> str | None:
    """The commit of the sources, marked where they differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--", ":/csrc", ":/kl_ext", ":/benchmarks/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
