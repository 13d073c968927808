"""The divergences as their tests see them: against plain torch, with and without q, under every reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import kl_ext
from layouts import inside
from loss_cases import clamp
from ordered_sum import reduced_sum, sum_to_shape

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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


def gaussian_terms(*inputs: Tensor, clamp_min: float = -30.0, clamp_max: float = 20.0) -> Tensor:
    mu_p, log_var_p = inputs[0], clamp(inputs[1], clamp_min, clamp_max)
    if len(inputs) == 2:
        return 0.5 * (mu_p.square() + log_var_p.exp() - log_var_p - 1.0)
    mu_q, log_var_q = inputs[2], clamp(inputs[3], clamp_min, clamp_max)
    return 0.5 * (log_var_q - log_var_p + (log_var_p.exp() + (mu_p - mu_q).square()) / log_var_q.exp() - 1.0)


def normal_terms(*inputs: Tensor) -> Tensor:
    loc_p, scale_p = inputs[:2]
    if len(inputs) == 2:
        return 0.5 * (loc_p.square() + scale_p.square() - 1.0) - scale_p.log()
    loc_q, scale_q = inputs[2:]
    return scale_q.log() - scale_p.log() + 0.5 * ((scale_p.square() + (loc_p - loc_q).square()) / scale_q.square() - 1.0)


@dataclass(frozen=True)
class Divergence:
    """One of the functions, its operators, inputs that suit it, and its formula. A call is one of the function."""

    function: Callable[..., Tensor]
    names: tuple[str, ...]
    terms: Callable[..., Tensor]  # the divergence in plain torch
    numbers: tuple[float, float]  # for q
    bounds: tuple[float, ...]  # of the clamp, as the backward operator takes them
    has_deviations: bool

    def __call__(self, *inputs: Any, **how: Any) -> Tensor:
        return self.function(*inputs, **how)

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def operator(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.kl_ext, self.name).default

    @property
    def backward_operator(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.kl_ext, f"{self.name}_backward").default

    def suited(self, position: int, x: Tensor) -> Tensor:
        """x as an input at that position: positive where deviations are asked for."""
        return x.abs() + 0.5 if self.has_deviations and position % 2 else x

    def taken(self, how: dict[str, Any]) -> dict[str, Any]:
        """The keywords without a clamp where there is none."""
        return how if self.bounds else {key: x for key, x in how.items() if not key.startswith("clamp")}

    def inputs(
        self,
        *shapes: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        requires_grad: bool = False,
    ) -> list[Tensor]:
        """Uniform in (-2, 2), deviations in (0.5, 2.5): two or four leaves."""
        drawn = [torch.rand(tuple(shape), dtype=torch.float64) * 4 - 2 for shape in shapes]
        suited = [self.suited(i, x) for i, x in enumerate(drawn)]
        return [x.to(device=device, dtype=dtype).requires_grad_(requires_grad) for x in suited]

    def formula(
        self, *inputs: Tensor, reduction: str = "none", dim: Any = None, keepdim: bool = False, **clamps: float
    ) -> Tensor:
        """In plain torch, reduced by plain torch: an oracle in float64, for inputs that do not make it cancel."""
        terms = self.terms(*inputs, **clamps)
        if reduction == "none":
            return terms
        if reduction == "batchmean":
            return terms.sum(None, keepdim) / terms.shape[0]
        return getattr(terms, reduction)(dim, keepdim)

    def backward(self, grad_output: Tensor, *inputs: Tensor, mask: Sequence[bool] | None = None, **how: Any) -> list[Tensor]:
        """The gradients of the two or four inputs, straight from the operator."""
        q = inputs[2:] or (None, None)
        dim = how.get("dim")
        dim = [dim] if isinstance(dim, int) else dim
        bounds = [how.get(name, x) for name, x in zip(("clamp_min", "clamp_max"), self.bounds, strict=False)]
        mask = list(mask or [True] * len(inputs)) + [False] * (4 - len(inputs))
        reduction, keepdim = how.get("reduction", "none"), how.get("keepdim", False)
        gradients = self.backward_operator(grad_output, *inputs[:2], *q, *bounds, reduction, dim, mask, keepdim)
        return list(gradients)[: len(inputs)]

    def with_(self, how: dict[str, Any]) -> Callable[..., Tensor]:
        def function(*inputs: Tensor) -> Tensor:
            return self.function(*inputs, **how)

        return function

    def formula_with(self, how: dict[str, Any]) -> Callable[..., Tensor]:
        def function(*inputs: Tensor) -> Tensor:
            return self.formula(*inputs, **how)

        return function

    def wide_range(
        self, rng: numpy.random.Generator, *shapes: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Numbers whose terms are of several orders of magnitude, so that every change of order shows. Each may be a deviation,
        where those are asked for, so that any tensor may hold both."""
        scales = [rng.choice([0.01, 0.3, 1.0, 3.0], shape) for shape in shapes]
        drawn = [torch.as_tensor(rng.normal(size=x.shape) * x) for x in map(numpy.asarray, scales)]
        return [(x.abs() + 0.25 if self.has_deviations else x).to(dtype) for x in drawn]


GAUSSIAN = Divergence(
    kl_ext.gaussian_kl_div,
    ("mu_p", "log_var_p", "mu_q", "log_var_q"),
    gaussian_terms,
    numbers=(0.5, -1),
    bounds=(-30.0, 20.0),
    has_deviations=False,
)
NORMAL = Divergence(
    kl_ext.normal_kl_div,
    ("loc_p", "scale_p", "loc_q", "scale_q"),
    normal_terms,
    numbers=(0.5, 2),
    bounds=(),
    has_deviations=True,
)
DIVERGENCES = (GAUSSIAN, NORMAL)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)

# Of the first one, for tests of nothing else.
OPERATOR, BACKWARD = GAUSSIAN.operator, GAUSSIAN.backward_operator
random_inputs, formula, backward_operator, wide_range = (
    GAUSSIAN.inputs,
    GAUSSIAN.formula,
    GAUSSIAN.backward,
    GAUSSIAN.wide_range,
)


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
    divergence: Divergence = GAUSSIAN,
) -> Tensor:
    """What the definition gives: elementwise terms in the arithmetic type, S, one division, one rounding."""
    terms = divergence(*widened(inputs))
    total = reduced_sum(terms, reduced_dims(terms.dim(), reduction, dim))
    total = total / torch.tensor(divisor(terms.shape, reduction, dim), dtype=total.dtype)
    for d in reduced_dims(terms.dim(), reduction, dim) if keepdim else []:
        total = total.unsqueeze(d)
    return total.to(divergence(*inputs).dtype)


def ordered_gradients(
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    reduction: str = "none",
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    divergence: Divergence = GAUSSIAN,
) -> list[Tensor]:
    """Elementwise gradients of expanded inputs in the arithmetic type, S over what was broadcast, one rounding."""
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    grad = widened([grad_output], *inputs)[0]
    grad = grad / torch.tensor(divisor(shape, reduction, dim), dtype=grad.dtype)
    for d in [] if keepdim else reduced_dims(len(shape), reduction, dim):
        grad = grad.unsqueeze(d)
    terms = divergence.backward(grad.expand(shape), *(x.expand(shape) for x in widened(inputs, grad)))
    return [sum_to_shape(t, x.shape).to(x.dtype) for t, x in zip(terms, inputs, strict=True)]


def random_case(rng: numpy.random.Generator, divergence: Divergence = GAUSSIAN) -> tuple[list[Tensor], list[int]]:
    """Inputs of any shape, broadcast, layout and dtype, and dimensions to reduce."""
    rank = int(rng.integers(1, 5))
    sizes = [1, 2, 3, 5, 17, 64, 65, 130, 1025] if rank < 3 else [1, 2, 3, 7, 16, 65]
    shape = [int(n) for n in rng.choice(sizes, rank)]
    shape = shape if math.prod(shape) < 200_000 else shape[:2]
    dtype = DTYPES[rng.choice(4, p=[0.15, 0.15, 0.5, 0.2])]
    inputs = []
    for _ in range(rng.choice([2, 4])):
        own = [n if rng.random() < 0.8 else 1 for n in shape][int(rng.integers(len(shape)) if rng.random() < 0.2 else 0) :]
        (x,) = divergence.wide_range(rng, own, dtype=dtype)
        order = rng.permutation(len(own)) if rng.random() < 0.4 else numpy.arange(len(own))
        x = x.permute(*order).contiguous().permute(*numpy.argsort(order))
        if rng.random() < 0.3:
            x = inside(x, int(rng.integers(len(own))))
        inputs.append(x)
    rank = torch.broadcast_shapes(*(x.shape for x in inputs))
    dims = sorted(int(d) for d in rng.choice(len(rank), rng.integers(1, len(rank) + 1), replace=False))
    return inputs, dims
