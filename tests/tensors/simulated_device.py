"""A device for which kl_ext has no kernels, and a process that has it: torch takes such a device for good, and only before its
first backward pass."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import multiprocessing
import shutil
import subprocess
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_suffix(".cpp")
NAME = "simulated"

_library: ctypes.CDLL


def build() -> Path:
    """The library, compiled once for each torch and source."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made_of = [SOURCE.read_bytes(), Path(__file__).read_bytes(), f"{torch.__version__} {torch.__file__}".encode()]
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()
    folder = SOURCE.parents[2] / "build" / f"simulated-device-{digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libsimulated_device.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            includes = [f"-isystem{path}" for path in include_paths()]
            options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter"]
            partial = library.with_suffix(".partial")
            linked = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
            subprocess.run([compiler, *options, *includes, str(SOURCE), *linked, "-o", str(partial)], check=True)
            partial.rename(library)
    return library


def _load(library: Path) -> None:
    global _library
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    torch._register_device_module(NAME, module)
    torch.ops.load_library(str(library))
    _library = ctypes.CDLL(str(library))
    _library.set_has_float64.argtypes = [ctypes.c_bool]
    torch.set_num_threads(1)


def _run(function: Callable[..., Any], seed: int, has_float64: bool, args: Any) -> Any:
    torch.manual_seed(seed)
    _library.set_has_float64(has_float64)
    return function(*args)


class DeviceProcess:
    """Runs functions of modules, one after the other, where the device is."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _load, (build(),))

    def run(self, function: Callable[..., Any], *args: Any, has_float64: bool = True) -> Any:
        seed = int(torch.randint(2**31, ()))
        return self._pool.submit(_run, function, seed, has_float64, args).result()

    def stop(self) -> None:
        self._pool.shutdown()
