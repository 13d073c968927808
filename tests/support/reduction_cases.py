"""Reductions and shapes for the operators that reduce, and what the order of their sums makes of their terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from layouts import inside
from operators import DTYPES, GAUSSIAN, OPERATORS, Operator
from ordered_sum import reduced_sum, sum_to_shape

# Keywords that reduce terms of three dimensions.
REDUCTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "sum": {"reduction": "sum"},
    "sum of 0": {"reduction": "sum", "dim": 0},
    "sum of -1": {"reduction": "sum", "dim": -1},
    "sum of 0 and 2": {"reduction": "sum", "dim": (0, 2)},
    "mean": {"reduction": "mean"},
    "mean of 1": {"reduction": "mean", "dim": [1]},
    "mean of -1 and 0": {"reduction": "mean", "dim": (-1, 0)},
    "mean of 0 and 1, kept": {"reduction": "mean", "dim": (0, 1), "keepdim": True},
    "batchmean": {"reduction": "batchmean"},
}
each_reduction = pytest.mark.parametrize("how", REDUCTIONS.values(), ids=REDUCTIONS.keys())


def each_operator_and(*names: str) -> pytest.MarkDecorator:
    """Every operator, and with those that reduce each of these reductions."""
    calls = {
        f"{operator}{f'-{name}' if operator.reduces else ''}": (operator, REDUCTIONS[name])
        for operator in OPERATORS
        for name in names
        if operator.reduces or not REDUCTIONS[name]
    }
    return pytest.mark.parametrize(("operator", "how"), calls.values(), ids=calls.keys())


each_operator_and_reduction = each_operator_and(*REDUCTIONS)

# The shapes of the inputs for terms of shape [2, 3, 4], the largest not always first.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "standard": [(2, 3, 4)] * 2,
    "standard, log_var shared": [(2, 3, 4), (4,)],
    "standard, outer": [(2, 1, 4), (3, 1)],
    "pair": [(2, 3, 4)] * 4,
    "prior [D]": [(2, 3, 4), (2, 3, 4), (4,), (4,)],
    "prior [1, D]": [(2, 3, 4), (2, 3, 4), (1, 4), (1, 4)],
    "prior of scalars": [(2, 3, 4), (2, 3, 4), (), ()],
    "prior of the middle": [(2, 3, 4), (2, 3, 4), (2, 1, 4), (2, 1, 4)],
    "all broadcast": [(2, 1, 1), (3, 1), (4,), ()],
    "q is the largest": [(4,), (), (2, 3, 4), (3, 1)],
}
each_shapes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())


def shapes_for(operator: Operator, *names: str) -> list[list[tuple[int, ...]]]:
    """Those of so many inputs as the operator takes; all, where none are named."""
    return [SHAPES[name] for name in names or SHAPES if len(SHAPES[name]) in operator.counts]


def reduced_dims(
    rank: int, reduction: str = "none", dim: int | Sequence[int] | None = None, keepdim: bool = False
) -> list[int]:
    if reduction == "none":
        return []
    if dim is None:
        return list(range(rank))
    return sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))


def divisor(
    shape: Sequence[int], reduction: str = "none", dim: int | Sequence[int] | None = None, keepdim: bool = False
) -> int:
    if reduction == "batchmean":
        return shape[0]
    return math.prod(shape[d] for d in reduced_dims(len(shape), reduction, dim)) if reduction == "mean" else 1


# What the order of the sums makes of the terms


def widened(inputs: Sequence[Tensor], *others: Tensor) -> list[Tensor]:
    """In the arithmetic type."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in (*inputs, *others)) else torch.float32
    return [x.to(wide) for x in inputs]


def ordered_value(
    inputs: Sequence[Tensor],
    reduction: str,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    operator: Operator = GAUSSIAN,
) -> Tensor:
    """What the definition gives: elementwise terms in the arithmetic type, S, one division, one rounding."""
    terms = operator(*widened(inputs))
    total = reduced_sum(terms, reduced_dims(terms.dim(), reduction, dim))
    total = total / torch.tensor(divisor(terms.shape, reduction, dim), dtype=total.dtype)
    for d in reduced_dims(terms.dim(), reduction, dim) if keepdim else []:
        total = total.unsqueeze(d)
    return total.to(operator(*inputs).dtype)


def ordered_gradients(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    reduction: str = "none",
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    operator: Operator = GAUSSIAN,
) -> list[Tensor]:
    """Elementwise gradients of expanded inputs in the arithmetic type, S over what was broadcast, one rounding."""
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    grad = widened([grad_output], *inputs)[0]
    grad = grad / torch.tensor(divisor(shape, reduction, dim), dtype=grad.dtype)
    for d in [] if keepdim else reduced_dims(len(shape), reduction, dim):
        grad = grad.unsqueeze(d)
    terms = operator.backward(grad.expand(shape), *(x.expand(shape) for x in widened(inputs, grad)))
    return [sum_to_shape(t, x.shape).to(x.dtype) for t, x in zip(terms, inputs, strict=True)]


def random_case(rng: numpy.random.Generator, operator: Operator = GAUSSIAN) -> tuple[list[Tensor], list[int]]:
    """Inputs of any shape, broadcast, layout and dtype, and dimensions to reduce."""
    rank = int(rng.integers(1, 5))
    sizes = [1, 2, 3, 5, 17, 64, 65, 130, 1025] if rank < 3 else [1, 2, 3, 7, 16, 65]
    shape = [int(n) for n in rng.choice(sizes, rank)]
    shape = shape if math.prod(shape) < 200_000 else shape[:2]
    dtype = DTYPES[rng.choice(4, p=[0.15, 0.15, 0.5, 0.2])]
    inputs = []
    for _ in range(rng.choice([2, 4])):
        own = [n if rng.random() < 0.8 else 1 for n in shape][int(rng.integers(len(shape)) if rng.random() < 0.2 else 0) :]
        (x,) = operator.wide_range(rng, own, dtype=dtype)
        order = rng.permutation(len(own)) if rng.random() < 0.4 else numpy.arange(len(own))
        x = x.permute(*order).contiguous().permute(*numpy.argsort(order))
        if rng.random() < 0.3:
            x = inside(x, int(rng.integers(len(own))))
        inputs.append(x)
    rank = torch.broadcast_shapes(*(x.shape for x in inputs))
    dims = sorted(int(d) for d in rng.choice(len(rank), rng.integers(1, len(rank) + 1), replace=False))
    return inputs, dims
