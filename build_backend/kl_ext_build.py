"""The PEP 517 build backend: setuptools', with torch added to the build requirements where the user has none.

pip isolates a build by environment variables, and cmake/torch_info.py sees the user's torch through that. uv and
`python -m build` isolate it in a virtual environment, which hides that torch: a package built against another would have the
installer replace it, and so such a build is refused. Environment: KL_EXT_TORCH_VERSION fixes which torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cmake"))
import build_requirements
import torch_info

build_requirements.check_setuptools()

from setuptools.build_meta import (  # noqa: E402
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

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
    if not torch and not wanted and not torch_info.is_pip():
        sys.exit(_refusal())
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


def _refusal() -> str:
    install = torch_info.installer()
    if install.startswith("uv"):
        command = f"{install} {build_requirements.listed()} && {install} --no-build-isolation ."
    else:  # pip's isolation hides nothing, and `python -m build` makes wheels
        command = "python -m pip wheel --no-deps ."
    return (
        "kl_ext: this build is isolated in an environment that does not see your torch, and the torch fetched for it would "
        "replace yours.\n"
        "To build against the torch you have, in kl_ext's source folder or with its path in place of the dot:\n\n"
        f"    {command}\n\n"
        "To build a wheel for another environment, set KL_EXT_TORCH_VERSION to the version of torch that it has."
    )
