"""What the stages of gpu_check.py share: where they are, what they are told, and how they write what they find."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
Found = dict[str, Any]


@dataclass
class Context:
    """What a stage is told."""

    folder: Path  # for logs and whatever else
    result: Path  # where a stage may write what it has so far
    seconds: float  # it has so long
    dry_run: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"


def said_by(*command: str) -> str | None:
    """What a command prints, None where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def program(name: str) -> str | None:
    """Where a program is: beside Python, on the PATH, or in a CUDA toolkit."""
    homes = [os.environ.get(home) for home in ("CUDA_HOME", "CUDA_PATH")]
    toolkits = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"] if home]
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), *toolkits]
    return shutil.which(name, path=os.pathsep.join(folders))


def save(context: Context, found: Found) -> None:
    """At once, and never half."""
    new = context.result.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1))
    new.replace(context.result)
