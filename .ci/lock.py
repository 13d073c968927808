"""Writes .ci/lock.txt, the versions and hashes of all that .ci/run installs but torch: `make lock`.

torch is left out: CI takes a CPU build and a CUDA build from whatever index the machine has, where one version may be another
file. What torch itself requires is locked with the rest, but for the packages of CUDA, which come with its CUDA build alone.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "lock.txt"


def requirements() -> list[str]:
    """Of the build, of every extra, and of torch, without the packages of CUDA that come with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = [project["build-system"]["requires"], *project["project"]["optional-dependencies"].values()]
    own = {requirement for group in listed for requirement in group if not requirement.startswith("kl_ext[")}
    of_torch = importlib.metadata.requires("torch") or []
    of_cuda = ("nvidia", "cuda", "triton")
    theirs = {requirement for requirement in of_torch if "extra ==" not in requirement and not requirement.startswith(of_cuda)}
    pre_releases = {"sphinx-basic-ng>=1.0.0b2"}  # furo takes it, and there is no other
    return sorted(own | theirs | pre_releases)


def main() -> None:
    """For the Python of CI's container."""
    uv = shutil.which("uv", path=sysconfig.get_path("scripts"))
    assert uv, "the extra `test` has it"
    options = ("--generate-hashes", "--upgrade", "--prerelease=explicit", "--python-version=3.11", "--no-annotate", "--quiet")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write("torch; python_version < '3'")  # for no Python, whoever requires it
        overrides.flush()
        command = [uv, "pip", "compile", *options, "--custom-compile-command=make lock", f"--override={overrides.name}"]
        command += ["--output-file", LOCK, "-"]
        subprocess.run(command, input="\n".join(requirements()), text=True, check=True)


if __name__ == "__main__":
    main()
