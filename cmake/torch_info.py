"""Which torch to build against: the only place that looks for it, and the only home of the versions and platforms supported.

Run as a script it prints what CMakeLists.txt needs as JSON, or says on stderr what is wrong and exits with status 1.
It reads files and never imports torch, which would take seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

MINIMUM = "2.11"
MACHINES = ("x86_64", "aarch64")


class TorchInfo(TypedDict):
    version: str  # 2.14.1+cu130
    minor: str  # 2.14: a binary serves one minor version
    cuda: str | None  # 13.0, or None for a CPU build
    include: list[str]
    lib: str


def _find_here() -> TorchInfo | None:
    """The torch that this process would import."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).resolve().parent
    facts = runpy.run_path(str(root / "version.py"))
    version = str(facts["__version__"])
    return {
        "version": version,
        "minor": ".".join(version.split(".")[:2]),
        "cuda": facts.get("cuda"),
        "include": [str(root / "include"), str(root / "include/torch/csrc/api/include")],
        "lib": str(root / "lib"),
    }


def _find_outside_isolation() -> TorchInfo | None:
    """The user's torch: pip isolates a build by environment variables alone, which `-E` ignores."""
    child = subprocess.run(
        [sys.executable, "-E", __file__, "--here"], cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    found: TorchInfo | None = json.loads(child.stdout) if child.returncode == 0 else None
    return found


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def is_pip() -> bool:
    """Whether pip runs this build: it marks the environment of each."""
    return "PIP_BUILD_TRACKER" in os.environ


def installer() -> str:
    """The user's own, as a command: an environment that uv made has no pip. uv names itself to what it starts."""
    return "uv pip install" if "UV" in os.environ and not is_pip() else f"{sys.executable} -m pip install"


def find() -> TorchInfo | None:
    """The torch to build against, None where there is none. Exits where kl_ext cannot be built."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        sys.exit(f"kl_ext supports Linux on {' and '.join(MACHINES)}; this is {sys.platform} on {platform.machine()}.")
    torch = _find_here() or _find_outside_isolation()
    if torch is not None and _release(torch["version"]) < _release(MINIMUM):
        sys.exit(
            f"kl_ext needs torch >= {MINIMUM} and found torch {torch['version']} in {Path(torch['lib']).parent}.\n"
            f"Upgrade it first: {installer()} --upgrade 'torch>={MINIMUM}'"
        )
    return torch


def require() -> TorchInfo:
    torch = find()
    if torch is None:
        sys.exit(
            f"kl_ext is built against torch, and {sys.executable} has none.\nInstall it first: {installer()} 'torch>={MINIMUM}'"
        )
    wanted = os.environ.get("KL_EXT_TORCH_VERSION")
    if wanted and _release(wanted) != _release(torch["version"]):
        sys.exit(
            f"kl_ext: KL_EXT_TORCH_VERSION asks for torch {wanted}, and {sys.executable} has torch {torch['version']}.\n"
            "Unset it to build against that one."
        )
    return torch


if __name__ == "__main__":
    print(json.dumps(_find_here() if "--here" in sys.argv else require()))
