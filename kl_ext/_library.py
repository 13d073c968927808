"""Loads libkl_ext.so, the operators and kernels, or explains why it cannot be loaded."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libkl_ext.so"

_REBUILD = f"Rebuild it against the torch you have, in kl_ext's source folder: {sys.executable} -m pip install --no-deps ."


def _torch_build(version: str, cuda: str | None) -> tuple[str, str | None]:
    """What a binary depends on: torch's minor version, and a CPU build or CUDA's major version."""
    return ".".join(version.split(".")[:2]), cuda.split(".")[0] if cuda else None


def described(version: str, cuda: str | None) -> str:
    return f"torch {version} ({f'CUDA {cuda}' if cuda else 'CPU'})"


def build_facts() -> ModuleType:
    """The compiled module `_C`, which needs neither torch nor libkl_ext.so."""
    try:
        # In this folder alone: the import hook of another checkout would offer that one's.
        if PathFinder.find_spec("kl_ext._C", [str(PACKAGE)]) is None:
            raise ImportError("there is no _C module in it")
        return importlib.import_module("kl_ext._C")
    except ImportError as error:
        raise ImportError(f"kl_ext: {PACKAGE} has no compiled part for this Python ({error}).\n{_advice()}") from error


def _advice() -> str:
    """What to do where this folder has no compiled part."""
    others = [entry for entry in sys.path if Path(entry).resolve() != PACKAGE.parent]
    installed = PathFinder.find_spec("kl_ext", others)
    if installed is not None and installed.origin is not None:
        return f"Python took it for the package, which is installed in {Path(installed.origin).parent}: start Python elsewhere."
    return (
        f"Install the package from its source folder: {sys.executable} -m pip install .\n"
        "Where it is installed already, Python took this folder for it: start Python elsewhere."
    )


def check() -> None:
    """Raises ImportError where libkl_ext.so cannot serve the torch that is running."""
    built = build_facts()
    if not LIBRARY.exists():
        raise ImportError(f"kl_ext: {LIBRARY} is missing.\n{_REBUILD}")
    import torch

    running = (str(torch.__version__), torch.version.cuda)
    if _torch_build(*running) != _torch_build(built.torch_version, built.torch_cuda_version):
        raise ImportError(
            f"kl_ext: built against {described(built.torch_version, built.torch_cuda_version)}, and this is "
            f"{described(*running)}: the minor version and the CUDA major version must agree.\n{_REBUILD}"
        )


def _load() -> None:
    check()
    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"kl_ext: {LIBRARY} does not load: {error}\n{_REBUILD}") from error


def _is_report() -> bool:
    """Whether Python is importing the package in order to run `python -m kl_ext`."""
    arguments = sys.orig_argv[1:]
    return sys.argv[:1] == ["-m"] and ("-mkl_ext" in arguments or ("-m", "kl_ext") in zip(arguments, arguments[1:]))


def load() -> None:
    """Makes torch.ops.kl_ext available. `python -m kl_ext` reports what is wrong where that fails, and ends there."""
    if _is_report() and sys.argv[1:]:
        from .__main__ import parse

        parse(sys.argv[1:])  # needs no library
    try:
        _load()
    except ImportError as error:
        if not _is_report():
            raise
        from .__main__ import main

        sys.exit(main(problem=error))
