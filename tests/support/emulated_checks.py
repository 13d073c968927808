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

import layouts
from emulated_kernels import NARROW, STORAGES, Emulated, Result, assert_same_bits, formula_of
from operators import GAUSSIAN, Operator
from ordered_sum import reduced_sum


def kernel_of(function: str, operator: Operator, inputs: Sequence[Tensor], weight: Tensor | None = None) -> str:
    """As the emulation's driver lists it."""
    formula = formula_of(operator, len(inputs))
    return f"{function} {formula if weight is None else f'Weighted<math::{formula}>'}"


def settings_of(operator: Operator, clamp: tuple[float, float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * 4)(*clamp, *operator.of_divergence)


def keywords_of(operator: Operator, clamp: tuple[float, float], weight: Tensor | None) -> dict[str, Any]:
    bounds = operator.taken({"clamp_min": clamp[0], "clamp_max": clamp[1]})
    return {**bounds, **({} if weight is None else {"weight": weight})}


def backward_of(
    operator: Operator,
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    clamp: tuple[float, float],
    mask: Sequence[bool],
    weight: Tensor | None = None,
) -> Sequence[Tensor]:
    """The operator's gradients of terms that are not reduced."""
    bounds = {"clamp_min": clamp[0], "clamp_max": clamp[1]}
    return operator.backward(grad_output, *inputs, weight=weight, mask=mask, **bounds)


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
    settings: ctypes.Array[ctypes.c_double],
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
        kernel.encode(),
        ndim,
        (ctypes.c_int64 * ndim)(*sizes),
        count,
        (ctypes.c_void_p * count)(*(None if x is None else x.data_ptr() for x in operands)),
        (ctypes.c_int * count)(*(2 if x is None else STORAGES.index(x.dtype) for x in operands)),
        (ctypes.c_int64 * (ndim * count))(*flat),
        settings,
        ctypes.c_uint32(last_blocks),
        grids,
        len(grids),
    )
    return list(grids[:launches])


def check_forward(
    emulated: Emulated,
    operator: Operator,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    clamp: tuple[float, float],
    offset: int = 0,
    weight: Tensor | None = None,
) -> list[int]:
    expected = operator.operator(*inputs, **keywords_of(operator, clamp, weight), dtype=dtype)
    result = Result(expected, offset)
    operands = [result.tensor, *inputs, *([] if weight is None else [weight])]
    grids = launch(emulated, kernel_of("forward", operator, inputs, weight), operands, settings_of(operator, clamp))
    result.check(expected, f"{operator} of {layouts.describe(*inputs)}")
    return grids


def check_backward(
    emulated: Emulated,
    operator: Operator,
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    clamp: tuple[float, float],
    mask: Sequence[bool] | None = None,
    offset: int = 0,
    weight: Tensor | None = None,
) -> list[int]:
    """Inputs that grad_output's shape broadcasts are given expanded: it is their full gradient that a kernel writes."""
    inputs = [x.expand(grad_output.shape) for x in inputs]
    expected = backward_of(operator, grad_output, inputs, clamp, mask or [True] * len(inputs), weight)
    results = [None if x is None else Result(x, offset) for x in expected]
    operands = [*(r and r.tensor for r in results), grad_output, *inputs, *([] if weight is None else [weight])]
    grids = launch(emulated, kernel_of("backward", operator, inputs, weight), operands, settings_of(operator, clamp))
    for i, result in enumerate(results):
        if result is not None:
            result.check(expected[i], f"gradient {i} of {operator} of {layouts.describe(grad_output, *inputs)}")
    return grids


def launch_sum(
    emulated: Emulated,
    kernel: str,
    shape: Sequence[int],
    dims: Sequence[int],
    operands: Sequence[Tensor | str | None],
    sums: Sequence[Tensor],
    divisor: int = 1,
    settings: ctypes.Array[ctypes.c_double] | None = None,
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
        kernel.encode(),
        ndim,
        (ctypes.c_int64 * ndim)(*reversed(shape)),
        (ctypes.c_bool * ndim)(*(dim in dims for dim in reversed(range(ndim)))),
        count,
        (ctypes.c_void_p * count)(*(None if x is None else x.data_ptr() for x in tensors)),
        (ctypes.c_int * count)(*(STORAGES.index(arithmetic if x is None else x.dtype) for x in tensors)),
        (ctypes.c_int64 * (ndim * count))(*strides),
        (ctypes.c_bool * 4)(*(isinstance(x, str) for x in operands[:4])),
        ctypes.c_int64(divisor),
        settings or settings_of(GAUSSIAN, NARROW),
        (ctypes.c_void_p * len(sums))(*(x.data_ptr() for x in sums)),
        (ctypes.c_int * len(sums))(*(STORAGES.index(x.dtype) for x in sums)),
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
    operator: Operator = GAUSSIAN,
    weight: Tensor | None = None,
) -> list[int]:
    """A divergence, reduced over some dims; with a weight, by "sum"."""
    what = f"{reduction} over {dims} of {layouts.describe(*inputs)}"
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    weights = [] if weight is None else [weight]
    call = operator.operator
    how: dict[str, Any] = {**keywords_of(operator, clamp, weight), "dtype": arithmetic_of(*inputs, *weights)}
    expected = call(*inputs, reduction=reduction, dim=list(dims), **how)
    divisor = math.prod(shape[dim] for dim in dims) if reduction == "mean" else 1
    with numpy.errstate(over="ignore", invalid="ignore"):
        by_definition = reduced_sum(call(*inputs, **how), dims)
    assert_same_bits(expected, by_definition / torch.tensor(divisor, dtype=expected.dtype), f"{what}, on the CPU")
    kernel = kernel_of("forward_sum", operator, inputs, weight)
    grids = []
    dtypes = {expected.dtype, functools.reduce(torch.promote_types, (x.dtype for x in inputs))}
    for dtype in dtypes | ({torch.bfloat16} if expected.dtype == torch.float64 else set()):
        how["dtype"] = dtype
        if arithmetic_of(*inputs, *weights) == torch.float64 or dtype != torch.float64:
            rounded = call(*inputs, reduction=reduction, dim=list(dims), **how)
            result = Result(rounded)
            operands = ["sum", *inputs, *weights]
            settings = settings_of(operator, clamp)
            grids = launch_sum(emulated, kernel, shape, dims, operands, [result.tensor], divisor, settings)
            result.check(rounded, f"{what} in {dtype}")
    return grids


def check_gradients(
    emulated: Emulated,
    operator: Operator,
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    clamp: tuple[float, float] = NARROW,
    mask: Sequence[bool] | None = None,
    weight: Tensor | None = None,
) -> list[int]:
    """Gradients of which some are sums, in as many passes as csrc/backend.h makes."""
    what = f"gradients of {operator} of {layouts.describe(grad_output, *inputs)}"
    shape = grad_output.shape
    wanted = list(mask or [True] * len(inputs))
    expected = backward_of(operator, grad_output, inputs, clamp, wanted, weight)
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
            kernel_of("backward_sum", operator, inputs, weight),
            shape,
            dims,
            [*operands, grad_output, *inputs, *([] if weight is None else [weight])],
            [result.tensor for result in sums.values()],
            1,
            settings_of(operator, clamp),
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
        STORAGES.index(sums.dtype),
        (ctypes.c_uint32 * 8)(),
        8,
    )
