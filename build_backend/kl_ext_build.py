"""The PEP 517 build backend: setuptools', with torch added to the build requirements where the user has none.

pip isolates a build by environment variables, and cmake/torch_info.py sees the user's torch through that; uv and
`python -m build` isolate it in a virtual environment, which hides it. Environment: KL_EXT_TORCH_VERSION fixes which torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cmake"))
import torch_info

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    wanted = os.environ.get("KL_EXT_TORCH_VERSION")
    torch = torch_info.find()
    if torch and wanted in (None, "", torch["version"], torch["version"].split("+")[0]):
        print(f"kl_ext: building against torch {torch['version']} in {torch['lib']}")
        return []
    requirement = f"torch=={wanted}" if wanted else f"torch>={torch_info.MINIMUM}"
    seen = f"torch {torch['version']} is installed" if torch else f"no torch is visible to {sys.executable}"
    print(
        f"kl_ext: {seen}: building against {requirement}, fetched for this build.\n"
        "KL_EXT_TORCH_VERSION fixes which; --no-build-isolation builds against the one you have."
    )
    return [requirement]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return []
