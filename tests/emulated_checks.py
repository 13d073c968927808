"""Runs emulated kernels on tensors and holds what they write against the CPU operators, bit by bit."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

import kl_ext  # noqa: F401
import layouts
from emulated_kernels import DTYPES, NARROW, Emulated, Result, assert_same_bits
from ordered_sum import reduced_sum

KERNELS = (
    "kl_div_single_loss",
    "kl_div_single_loss_backward",
    "kl_div_pair_loss",
    "kl_div_pair_loss_backward",
    "gaussian_kl_div",
    "gaussian_kl_div_backward",
)  # in the order of tests/cuda_emulation/driver.cpp
SUMS = (
    "kl_div_single_loss_sum",
    "gaussian_kl_div_sum",
    "kl_div_single_loss_backward_sum",
    "kl_div_pair_loss_backward_sum",
    "gaussian_kl_div_backward_sum",
)  # in the order of tests/cuda_emulation/driver.cpp


def dimensions(operands: Sequence[Tensor | None]) -> tuple[list[int], list[list[int]]]:
    """The sizes, fastest first, and each operand's strides in bytes, merged where they can be, as TensorIterator does it."""
    defined = [x for x in operands if x is not None]
    shape = torch.broadcast_shapes(*(x.shape for x in defined))
    strides = [[s * x.element_size() for s in x.expand(shape).stride()] for x in defined]
    order = sorted((dim for dim in range(len(shape)) if shape[dim] > 1), key=lambda dim: (strides[0][dim], -dim))
    sizes: list[int] = []
    merged: list[list[int]] = []  # by dimension
    for dim in order:
        column = [s[dim] for s in strides]
        if sizes and column == [s * sizes[-1] for s in merged[-1]]:
            sizes[-1] *= shape[dim]
        else:
            sizes.append(shape[dim])
            merged.append(column)
    if not sizes:
        sizes, merged = [1], [[x.element_size() for x in defined]]
    return sizes, [list(column) for column in zip(*merged, strict=True)]


def launch(
    emulated: Emulated,
    kernel: str,
    operands: Sequence[Tensor | None],
    clamp: tuple[float, float],
    last_blocks: int = 2**32 - 1,
) -> list[int]:
    """Runs a kernel, or the last blocks of each of its launches, and returns the launches' grids."""
    sizes, strides = dimensions(operands)
    ndim, count = len(sizes), len(operands)
    remaining = iter(strides)
    flat = [stride for x in operands for stride in (next(remaining) if x is not None else [0] * ndim)]
    grids = (ctypes.c_uint32 * 64)()
    launches = emulated.call(
        "run",
        KERNELS.index(kernel),
        ndim,
        (ctypes.c_int64 * ndim)(*sizes),
        count,
        (ctypes.c_void_p * count)(*(None if x is None else x.data_ptr() for x in operands)),
        (ctypes.c_int * count)(*(2 if x is None else DTYPES.index(x.dtype) for x in operands)),
        (ctypes.c_int64 * (ndim * count))(*flat),
        ctypes.c_double(clamp[0]),
        ctypes.c_double(clamp[1]),
        ctypes.c_uint32(last_blocks),
        grids,
        len(grids),
    )
    return list(grids[:launches])


def check_forward(
    emulated: Emulated, loss: str, inputs: Sequence[Tensor], dtype: torch.dtype, clamp: tuple[float, float], offset: int = 0
) -> list[int]:
    expected = getattr(torch.ops.kl_ext, loss)(*inputs, clamp_min=clamp[0], clamp_max=clamp[1], dtype=dtype)
    result = Result(expected, offset)
    grids = launch(emulated, loss, [result.tensor, *inputs], clamp)
    result.check(expected, f"{loss} of {layouts.describe(*inputs)}")
    return grids


def check_backward(
    emulated: Emulated,
    loss: str,
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    clamp: tuple[float, float],
    mask: Sequence[bool] | None = None,
    offset: int = 0,
) -> list[int]:
    """Inputs that grad_output's shape broadcasts are given expanded: it is their full gradient that a kernel writes."""
    inputs = [x.expand(grad_output.shape) for x in inputs]
    mask = [True] * len(inputs) if mask is None else mask
    kernel = f"{loss}_backward"
    reduction = ("none", None) if loss == "gaussian_kl_div" else ()
    expected = getattr(torch.ops.kl_ext, kernel)(grad_output, *inputs, *clamp, *reduction, list(mask))
    results = [None if x is None else Result(x, offset) for x in expected]
    grids = launch(emulated, kernel, [*(r and r.tensor for r in results), grad_output, *inputs], clamp)
    for i, result in enumerate(results):
        if result is not None:
            result.check(expected[i], f"gradient {i} of {kernel} of {layouts.describe(grad_output, *inputs)}")
    return grids


def launch_sum(
    emulated: Emulated,
    kernel: str,
    shape: Sequence[int],
    dims: Sequence[int],
    operands: Sequence[Tensor | str | None],
    sums: Sequence[Tensor],
    divisor: int = 1,
    clamp: tuple[float, float] = NARROW,
    last_blocks: int = 2**32 - 1,
) -> list[int]:
    """Sums over the dims those operands that are given as "sum"; None is a gradient not wanted. Returns the launches' grids."""
    ndim, count = len(shape), len(operands)
    tensors = [x if isinstance(x, Tensor) else None for x in operands]
    arithmetic = arithmetic_of(*sums, *(x for x in tensors if x is not None))
    strides = [
        stride * x.element_size() if x is not None else 0
        for x in tensors
        for stride in reversed(torch.empty(shape, device="meta").stride() if x is None else x.expand(shape).stride())
    ]
    grids = (ctypes.c_uint32 * 8)()
    launches = emulated.call(
        "run_sum",
        SUMS.index(kernel),
        ndim,
        (ctypes.c_int64 * ndim)(*reversed(shape)),
        (ctypes.c_bool * ndim)(*(dim in dims for dim in reversed(range(ndim)))),
        count,
        (ctypes.c_void_p * count)(*(None if x is None else x.data_ptr() for x in tensors)),
        (ctypes.c_int * count)(*(DTYPES.index(arithmetic if x is None else x.dtype) for x in tensors)),
        (ctypes.c_int64 * (ndim * count))(*strides),
        (ctypes.c_bool * 4)(*(isinstance(x, str) for x in operands[:4])),
        ctypes.c_int64(divisor),
        ctypes.c_double(clamp[0]),
        ctypes.c_double(clamp[1]),
        (ctypes.c_void_p * len(sums))(*(x.data_ptr() for x in sums)),
        (ctypes.c_int * len(sums))(*(DTYPES.index(x.dtype) for x in sums)),
        ctypes.c_uint32(last_blocks),
        grids,
        len(grids),
    )
    return list(grids[:launches])


def arithmetic_of(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def check_sum(
    emulated: Emulated,
    inputs: Sequence[Tensor],
    dims: Sequence[int],
    reduction: str = "sum",
    clamp: tuple[float, float] = NARROW,
) -> list[int]:
    """The divergence, reduced over some dims."""
    what = f"{reduction} over {dims} of {layouts.describe(*inputs)}"
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    how: dict[str, Any] = {"clamp_min": clamp[0], "clamp_max": clamp[1], "dtype": arithmetic_of(*inputs)}
    expected = torch.ops.kl_ext.gaussian_kl_div(*inputs, reduction=reduction, dim=list(dims), **how)
    divisor = math.prod(shape[dim] for dim in dims) if reduction == "mean" else 1
    with numpy.errstate(over="ignore", invalid="ignore"):
        by_definition = reduced_sum(torch.ops.kl_ext.gaussian_kl_div(*inputs, **how), dims)
    assert_same_bits(expected, by_definition / torch.tensor(divisor, dtype=expected.dtype), f"{what}, on the CPU")
    kernel = "kl_div_single_loss_sum" if len(inputs) == 2 else "gaussian_kl_div_sum"
    grids = []
    dtypes = {expected.dtype, functools.reduce(torch.promote_types, (x.dtype for x in inputs))}
    for dtype in dtypes | ({torch.bfloat16} if expected.dtype == torch.float64 else set()):
        how["dtype"] = dtype
        rounded = torch.ops.kl_ext.gaussian_kl_div(*inputs, reduction=reduction, dim=list(dims), **how)
        result = Result(rounded)
        grids = launch_sum(emulated, kernel, shape, dims, ["sum", *inputs], [result.tensor], divisor, clamp)
        result.check(rounded, f"{what} in {dtype}")
    return grids


def check_gradients(
    emulated: Emulated,
    loss: str,
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    clamp: tuple[float, float] = NARROW,
    mask: Sequence[bool] | None = None,
) -> list[int]:
    """Gradients of which some are sums, in as many passes as csrc/cuda/losses.cpp makes."""
    what = f"gradients of {loss} of {layouts.describe(grad_output, *inputs)}"
    shape = grad_output.shape
    wanted = list(mask or [True] * len(inputs))
    reduction = ("none", None) if loss == "gaussian_kl_div" else ()
    operator = getattr(torch.ops.kl_ext, f"{loss}_backward")
    expected = operator(grad_output, *inputs, *clamp, *reduction, wanted)
    aligned = [x.view([1] * (len(shape) - x.dim()) + list(x.shape)) for x in inputs]
    broadcast = [[dim for dim, size in enumerate(x.shape) if size != shape[dim]] for x in aligned]
    grids = []
    while dims := next((broadcast[i] for i in range(len(inputs)) if wanted[i] and broadcast[i]), None):
        operands: list[Tensor | str | None] = [None] * len(inputs)
        results: dict[int, Result] = {}
        for i in range(len(inputs)):
            if wanted[i] and not broadcast[i]:
                results[i] = Result(expected[i])
                operands[i] = results[i].tensor
            elif wanted[i] and broadcast[i] == dims:
                operands[i] = "sum"
            wanted[i] = wanted[i] and operands[i] is None
        summed = [i for i, x in enumerate(operands) if isinstance(x, str)]
        sums = {i: Result(expected[i].contiguous()) for i in summed}
        grids += launch_sum(
            emulated,
            f"{loss}_backward_sum",
            shape,
            dims,
            [*operands, grad_output, *inputs],
            [result.tensor for result in sums.values()],
            1,
            clamp,
        )
        for i, result in [*results.items(), *sums.items()]:
            result.check(expected[i], f"{what}: {i}")
    return grids


def finish_sums(emulated: Emulated, partials: Tensor, are_lanes: bool, sums: Tensor, divisor: int = 1) -> int:
    """Sums up what is left of every column, and returns the number of launches."""
    count, columns = partials.shape
    return emulated.call(
        "finish_sums",
        partials.dtype == torch.float64,
        ctypes.c_void_p(partials.data_ptr()),
        ctypes.c_int64(count),
        are_lanes,
        ctypes.c_int64(columns),
        ctypes.c_int64(divisor),
        ctypes.c_void_p(sums.data_ptr()),
        DTYPES.index(sums.dtype),
        (ctypes.c_uint32 * 8)(),
        8,
    )
