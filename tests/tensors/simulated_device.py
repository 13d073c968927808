"""A device for which kl_ext has no kernels, and a process that has it: torch takes such a device for good, and only before its
first backward pass."""

from __future__ import annotations

import ctypes
import multiprocessing
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shared_library import build

SOURCE = Path(__file__).with_suffix(".cpp")
NAME = "simulated"

_library: ctypes.CDLL


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
        self._pool = ProcessPoolExecutor(1, context, _load, (build(SOURCE, "torch_cpu", "c10"),))

    def run(self, function: Callable[..., Any], *args: Any, has_float64: bool = True) -> Any:
        seed = int(torch.randint(2**31, ()))
        return self._pool.submit(_run, function, seed, has_float64, args).result()

    def stop(self) -> None:
        self._pool.shutdown()
