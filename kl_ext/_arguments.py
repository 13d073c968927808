"""Converts arguments that are not tensors, as torch's own functions do, with errors for those that torch would not take."""

from __future__ import annotations

import math
import operator
from typing import cast

import torch
from torch import Tensor

from ._checks import check_clamp, check_reduction, check_result_dtype
from ._types import Reduction

_TORCH_DTYPES = {float: torch.float64, int: torch.int64, bool: torch.bool, complex: torch.complex128}


def _refuse(function: str, name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"{function}: expected {name} to be {expected}, got {type(value).__name__}")


def check_are_tensors(function: str, **arguments: object) -> None:
    """Checks that each argument is a Tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise _refuse(function, name, "a Tensor", value)


def as_number(function: str, name: str, value: object, expected: str = "a number or None") -> float:
    """A number of any kind, including NumPy's and 0-dim tensors. Not text, though float() would take it."""
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]  # symbols stay symbols
    if not isinstance(value, (str, bytes, bytearray)):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError as error:
            raise ValueError(f"{function}: expected {name} to be a number that a float can hold, got {value}") from error
        except (TypeError, ValueError, RuntimeError):
            pass
    raise _refuse(function, name, expected, value)


def as_clamp(function: str, clamp_min: object, clamp_max: object) -> dict[str, float]:
    """The bounds of the clamp. None is no bound, as in torch.clamp."""
    low = -math.inf if clamp_min is None else as_number(function, "clamp_min", clamp_min)
    high = math.inf if clamp_max is None else as_number(function, "clamp_max", clamp_max)
    if isinstance(low, float) and isinstance(high, float):  # a symbol may have no value yet
        check_clamp(function, low, high)
    return {"clamp_min": low, "clamp_max": high}


def as_dims(function: str, dim: object) -> list[int] | None:
    """Dimensions as torch.sum takes them: an integer of any kind but bool, or a tuple or list of them."""
    if dim is None:
        return None
    dims = []
    for value in dim if isinstance(dim, (tuple, list)) else (dim,):
        if isinstance(value, int) and not isinstance(value, bool):
            dims.append(value)
            continue
        try:
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError
            dims.append(operator.index(value))
        except (TypeError, ValueError, RuntimeError):
            raise _refuse(function, "dim", "an integer, or a tuple or list of them", value) from None
    return dims


def as_flag(function: str, name: str, value: object) -> bool:
    """True or False and nothing else, as in torch."""
    if not isinstance(value, bool):
        raise _refuse(function, name, "a bool", value)
    return value


def as_dtype(function: str, dtype: object) -> torch.dtype | None:
    """A dtype, or a Python type that torch accepts as one."""
    for kind, meant in _TORCH_DTYPES.items():
        if dtype is kind:
            dtype = meant
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise _refuse(function, "dtype", "a torch.dtype", dtype)
    check_result_dtype(function, dtype)
    return dtype


def as_reduction(function: str, reduction: object, dims: list[int] | None) -> Reduction:
    """The name of a reduction that exists and goes with the dims."""
    if not isinstance(reduction, str):
        raise _refuse(function, "reduction", "a string", reduction)
    check_reduction(function, reduction, dims)
    return cast(Reduction, reduction)
