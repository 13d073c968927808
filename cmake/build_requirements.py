"""What a build takes besides a compiler and torch, and what is said where the user's environment lacks it.

It must run without setuptools.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

from torch_info import installer


def listed() -> str:
    """The requirements as arguments of an installer."""
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    found = re.search(r"^requires = \[(.*)\]", pyproject.read_text(), re.MULTILINE)
    assert found is not None
    return found[1].replace(",", "").replace('"', "'")


def check_setuptools() -> None:
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        found = "0"
    if int(found.split(".")[0]) < 77:
        _refuse("setuptools>=77")


def check_tools() -> None:
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing:
        _refuse(*missing)


def _refuse(*missing: str) -> None:
    """Without build isolation the requirements are the user's to install, and no installer looks."""
    sys.exit(
        "kl_ext: without build isolation, the build requirements come from your environment, which lacks "
        f"{', '.join(missing)}.\n"
        f"Install them first: {installer()} {listed()}"
    )
