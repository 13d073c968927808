"""Weights of every kind for the operators that take one, and the definition of weighted terms and sums in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from operators import DTYPES, Operator
from oracle import Array, to_longdouble
from ordered_sum import reduced_sum, sum_to_shape
from reduction_cases import reduced_dims, widened

WEIGHT_DTYPES = (torch.bool, *DTYPES)


# The shapes of the inputs for terms of shape [2, 3, 4].
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "standard": [(2, 3, 4)] * 2,
    "pair": [(2, 3, 4)] * 4,
    "prior [D]": [(2, 3, 4), (2, 3, 4), (4,), (4,)],
    "all broadcast": [(2, 1, 1), (3, 1), (4,), ()],
}
each_shapes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())

# Keywords that reduce them.
REDUCTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "sum": {"reduction": "sum"},
    "sum of 0 and 2": {"reduction": "sum", "dim": (0, 2)},
    "mean": {"reduction": "mean"},
    "mean of 1": {"reduction": "mean", "dim": [1]},
    "mean of -1 and 0, kept": {"reduction": "mean", "dim": (-1, 0), "keepdim": True},
    "batchmean": {"reduction": "batchmean"},
}
each_reduction = pytest.mark.parametrize("how", REDUCTIONS.values(), ids=REDUCTIONS.keys())

# Of terms of that shape.
WEIGHTS: dict[str, tuple[int, ...]] = {
    "full": (2, 3, 4),
    "[B, 1, T]": (2, 1, 4),
    "[B, 1, 1]": (2, 1, 1),
    "[C, 1]": (3, 1),
    "[D]": (4,),
    "[1]": (1,),
    "0-dim": (),
}
each_weight = pytest.mark.parametrize("size", WEIGHTS.values(), ids=WEIGHTS.keys())


def some_weight(size: Sequence[int], dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Tensor:
    """Positive, negative and 0, of either sign; never all of them 0. The negative ones are so small that no sum of weights, by
    which a mean is divided, comes near 0: there any formula loses its digits."""
    weight = torch.randn(tuple(size), dtype=torch.float64)
    weight = torch.where(weight < 0, weight / 256, weight + 0.25)
    zeros = torch.rand(tuple(size)) < 0.4
    if zeros.all():
        zeros.view(-1)[0] = False
    return torch.where(zeros, torch.copysign(torch.zeros_like(weight), weight), weight).to(device, dtype)


def mask(size: Sequence[int], device: Any = "cpu") -> Tensor:
    return some_weight(size, torch.bool, device)


def garbage(shape: Sequence[int], dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """What may stand where nothing was written: NaN, infinities, any bits at all."""
    shape = tuple(shape)
    size = dtype.itemsize
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    noise = torch.from_numpy(numpy.random.randint(0, 256, (*shape, size), dtype=numpy.uint8))
    bits = noise.view(integer).reshape(shape).view(dtype)
    special = torch.tensor([numpy.nan, numpy.inf, -numpy.inf, 0.0], dtype=dtype)[torch.randint(4, shape)]
    return torch.where(torch.rand(shape) < 0.7, special, bits).to(device)


def left_out(weight: Tensor, shape: Sequence[int], of: Tensor) -> Tensor:
    """Where an input is read for terms that are left out, and for no other."""
    is_out = (weight == 0).expand(tuple(shape))
    missing = len(shape) - of.dim()
    for dim in range(len(shape)):
        if dim < missing or of.shape[dim - missing] != shape[dim]:
            is_out = is_out.all(dim, keepdim=True)
    return is_out.reshape(of.shape)


def spoiled(inputs: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """The inputs with garbage wherever only terms read them that are left out."""
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    return [torch.where(left_out(weight, shape, x), garbage(x.shape, x.dtype, x.device), x.detach()) for x in inputs]


def tamed(operator: Operator, inputs: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """The inputs with harmless numbers there."""
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    pairs = zip(inputs, operator.harmless, strict=False)
    return [torch.where(left_out(weight, shape, x), torch.full_like(x, h), x.detach()) for x, h in pairs]


# The definition in plain torch


def reduced(terms: Tensor, weight: Tensor, reduction: str = "none", dim: Any = None, keepdim: bool = False) -> Tensor:
    """Of terms that are weighted."""
    if reduction == "none":
        return terms
    if reduction == "batchmean":
        return terms.sum(None, keepdim) / terms.shape[0]
    if reduction == "sum":
        return terms.sum(dim, keepdim)
    return terms.sum(dim, keepdim) / weight.to(terms.dtype).expand(terms.shape).sum(dim, keepdim)


def formula(operator: Operator, weight: Tensor, how: dict[str, Any]) -> Callable[..., Tensor]:
    """Weighted terms, and torch's sums of them: an oracle in float64 for inputs that may not be finite where left out."""

    def function(*inputs: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(*(x.shape for x in inputs))
        kept = (weight != 0).expand(shape)
        safe = [torch.where(kept, x, h) for x, h in zip(inputs, operator.harmless, strict=False)]
        return reduced(torch.where(kept, weight * operator.terms(*safe), 0.0), weight, **how)

    return function


def weighted(operator: Operator, weight: Tensor, how: dict[str, Any]) -> Callable[..., Tensor]:
    def function(*inputs: Tensor) -> Tensor:
        return operator.function(*inputs, weight=weight, **how)

    return function


def exact_terms(operator: Operator, inputs: Sequence[Tensor], weight: Tensor) -> Array:
    terms = operator.exact(*(to_longdouble(x) for x in inputs))
    return terms * numpy.broadcast_to(to_longdouble(weight), terms.shape)


# What the order of the sums makes of it


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Once: from float64 to a half type torch goes by way of float32, here the last bit of which keeps what was cut off."""
    if x.dtype != torch.float64 or dtype.itemsize > 2:
        return x.to(dtype)
    near = x.float()
    cut = torch.where(near.double().abs() > x.abs(), near.nextafter(torch.zeros_like(near)), near)
    is_inexact = (cut.double() != x) & ~x.isnan()
    return (cut.view(torch.int32) | is_inexact.int()).view(torch.float32).to(dtype)


def in_arithmetic(terms: Tensor, weight: Tensor) -> Tensor:
    """weight * term with one rounding, and +0 where the weight is 0."""
    weight = weight.to(terms.dtype).expand(terms.shape)
    return torch.where(weight == 0, torch.zeros_like(terms), weight * terms)


def sums_of(x: Tensor, how: dict[str, Any], keepdim: bool = False) -> Tensor:
    dims = reduced_dims(x.dim(), how["reduction"], how.get("dim"))
    total = reduced_sum(x, dims)
    for d in dims if keepdim else []:
        total = total.unsqueeze(d)
    return total


def ordered_value(operator: Operator, inputs: Sequence[Tensor], weight: Tensor, how: dict[str, Any]) -> Tensor:
    """Unweighted elementwise terms in the arithmetic type, times the weight, S, at most one division, one rounding."""
    dtype = (weight * operator.function(*inputs)).dtype
    terms = operator.function(*widened(inputs, weight))
    products = in_arithmetic(terms, weight)
    if how.get("reduction", "none") == "none":
        return rounded(products, dtype)
    total = sums_of(products, how, how.get("keepdim", False))
    if how["reduction"] == "mean":
        total = total / sums_of(weight.to(terms.dtype).expand(terms.shape), how, how.get("keepdim", False))
    elif how["reduction"] == "batchmean":
        total = total / torch.tensor(terms.shape[0], dtype=total.dtype)
    return rounded(total, dtype)


def ordered_gradients(
    operator: Operator, grad_output: Tensor, inputs: Sequence[Tensor], weight: Tensor, how: dict[str, Any]
) -> list[Tensor]:
    """Those of unweighted terms, from weight * grad_output in the arithmetic type; S over what was broadcast; one rounding."""
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    grad = widened([grad_output], *inputs, weight)[0]
    if how.get("reduction") == "mean":
        sums = sums_of(weight.to(grad.dtype).expand(shape), how, how.get("keepdim", False))
        grad = grad / sums
    elif how.get("reduction") == "batchmean":
        grad = grad / torch.tensor(shape[0], dtype=grad.dtype)
    for d in [] if how.get("keepdim") else reduced_dims(len(shape), how.get("reduction", "none"), how.get("dim")):
        grad = grad.unsqueeze(d)
    grad = weight.to(grad.dtype).expand(shape) * grad.expand(shape)
    terms = operator.backward(grad, *(x.expand(shape) for x in widened(inputs, grad)))
    kept = [torch.where((weight == 0).expand(shape), torch.zeros_like(t), t) for t in terms]
    return [rounded(sum_to_shape(t, x.shape), x.dtype) for t, x in zip(kept, inputs, strict=True)]
