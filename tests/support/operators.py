"""The operators as their tests see them: one entry each, from which every list of operators in the tests is made.

An entry has what no schema says. The rest is read from the schemas, as kl_ext itself reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import kl_ext
import normal_cases
import oracle
from kl_ext import _operators, reference
from oracle import Array

HALF_TYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_TYPES, torch.float32, torch.float64)


def close(terms: int = 1) -> dict[str, float]:
    """The formulas' own float64 error, in a term or in the sum of so many.

    For inputs in (-2, 2) and deviations in (0.5, 2.5) no part of a formula or of a gradient is above (e^2 + 4^2) e^2, which is
    174. It comes of an exp, off by 2^-52, and three roundings of at most 2^-53 each: 2^-43 in all. A gradient is weighted with
    a normal number, and the magnitudes of n such numbers add up to 2 n + 6 at most, but for one time in 10^10.
    """
    error = (terms + 3) * 2.0**-42
    return {"rtol": error, "atol": error}


CLOSE = close()

# Derivatives of the second order and beyond, for which no bound is stated. In float64 both sides are sums of at most 2^7 parts
# of magnitudes below 2^8, each with its rounding of 2^-52: a wrong factor shows in the first digits.
DERIVATIVES_CLOSE = {"rtol": 2.0**-37, "atol": 2.0**-37}

_SCHEMAS = {schema.name: schema for schema in _operators.OPERATORS}


def _options_of(schema: _operators.Operator) -> set[str]:
    return {argument.name for argument in schema.forward._schema.arguments if argument.kwarg_only}


@dataclass(frozen=True)
class Operator:
    """A public function, its operators, its formula, and inputs that suit it. A call is one of the function."""

    function: Callable[..., Tensor]
    terms: Callable[..., Tensor]  # of all inputs, or of those that are not optional, in plain torch: an oracle in float64
    exact: Callable[..., Array]  # the same terms in longdouble
    bound: float  # of a term's error, in units in the last place: what the header of its formula states
    numbers: tuple[float, ...] = ()  # for the optional inputs
    has_deviations: bool = False  # every second input is one, and must be positive
    of_divergence: tuple[float, float] = (1.0, 0.0)  # a term is the divergence times the first number, plus the second
    # For each input, the inputs that its gradient needs: those of a mean are not needed for that of the spread of p.
    needed_places: tuple[tuple[int, ...], ...] = ((0, 2, 3), (1, 3), (0, 2, 3), (0, 1, 2, 3))

    def __call__(self, *inputs: Any, **how: Any) -> Tensor:
        return self.function(*inputs, **how)

    def __str__(self) -> str:
        return self.name

    # What the schema says

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def schema(self) -> _operators.Operator:
        return _SCHEMAS[self.name]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The inputs by name."""
        return self.schema.inputs

    @property
    def count(self) -> int:
        return len(self.arguments)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many inputs it may be given: all, or those that are not optional."""
        return tuple(sorted({self.count - len(self.schema.optional), self.count}))

    @property
    def reduces(self) -> bool:
        return self.schema.reduces

    @property
    def bounds(self) -> tuple[float, ...]:
        """The defaults of the clamp, as the backward operator takes them; none where there is no clamp."""
        defaults = _operators.defaults_of(self.operator)
        return tuple(defaults[name] for name in ("clamp_min", "clamp_max") if name in defaults)

    @property
    def operator(self) -> torch._ops.OpOverload:
        return self.schema.forward

    @property
    def backward_operator(self) -> torch._ops.OpOverload:
        return self.schema.backward

    @property
    def backward_out(self) -> torch._ops.OpOverload:
        return self.schema.backward_out

    def taken(self, how: dict[str, Any]) -> dict[str, Any]:
        """The keywords without the options that only other operators have."""
        foreign = set().union(*(_options_of(other) for other in _SCHEMAS.values())) - _options_of(self.schema)
        return {name: value for name, value in how.items() if name not in foreign}

    # What the gradients need

    def needs(self, count: int | None = None) -> dict[str, tuple[str, ...]]:
        """For each of so many inputs, those that its gradient depends on."""
        given = range(count or self.count)
        return {self.arguments[i]: tuple(self.arguments[n] for n in self.needed_places[i] if n in given) for i in given}

    def needed_for(self, wanted: Sequence[str], count: int | None = None) -> tuple[str, ...]:
        """The inputs, in order, on which the gradients of the wanted ones depend."""
        needs = self.needs(count)
        return tuple(a for a in needs if any(a in needs[w] for w in wanted))

    # Inputs

    @property
    def harmless(self) -> tuple[float, ...]:
        """Inputs at which everything is finite."""
        return tuple(float(self.has_deviations and i % 2) for i in range(self.count))

    def suited(self, place: int, x: Tensor) -> Tensor:
        """x as the input at that place: positive where that is a deviation."""
        return x.abs() + 0.5 if self.has_deviations and place % 2 else x

    def inputs(
        self,
        *shapes: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        requires_grad: bool = False,
        count: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Leaves uniform in (-2, 2), well inside the default clamp, and deviations in (0.5, 2.5), with the shapes in turn: so
        many, or else as many as there are shapes where the operator takes so many, or else all."""
        count = count or (len(shapes) if len(shapes) in self.counts else self.count)
        drawn = [torch.rand(tuple(shapes[i % len(shapes)]), dtype=torch.float64) * 4 - 2 for i in range(count)]
        suited = [self.suited(i, x) for i, x in enumerate(drawn)]
        return tuple(x.to(device=device, dtype=dtype).requires_grad_(requires_grad) for x in suited)

    def wide_range(
        self, rng: numpy.random.Generator, *shapes: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Numbers whose terms are of several orders of magnitude, so that every change of order shows. Each may be a deviation,
        where those are asked for, so that any tensor may hold both."""
        scales = [rng.choice([0.01, 0.3, 1.0, 3.0], shape) for shape in shapes]
        drawn = [torch.as_tensor(rng.normal(size=x.shape) * x) for x in map(numpy.asarray, scales)]
        return [(x.abs() + 0.25 if self.has_deviations else x).to(dtype) for x in drawn]

    # Calls

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

    def with_(self, how: dict[str, Any]) -> Callable[..., Tensor]:
        def function(*inputs: Tensor) -> Tensor:
            return self.function(*inputs, **how)

        return function

    def formula_with(self, how: dict[str, Any]) -> Callable[..., Tensor]:
        def function(*inputs: Tensor) -> Tensor:
            return self.formula(*inputs, **how)

        return function

    def backward_arguments(
        self,
        grad_output: Tensor,
        inputs: Sequence[Tensor],
        weight: Tensor | None = None,
        how: dict[str, Any] | None = None,
        mask: Sequence[bool] | None = None,
    ) -> list[Any]:
        """Of the backward operator, all by position."""
        how = how or {}
        absent = [None] * (self.count - len(inputs))
        bounds = [how.get(name, bound) for name, bound in zip(("clamp_min", "clamp_max"), self.bounds, strict=False)]
        every = list(mask or [True] * len(inputs))
        every += [False] * (self.count - len(every))
        tensors = [grad_output, *inputs, *absent, *bounds]
        if not self.reduces:
            return [*tensors, every]
        dim = how.get("dim")
        dim = [dim] if isinstance(dim, int) else dim
        return [*tensors, how.get("reduction", "none"), dim, every, how.get("keepdim", False), weight]

    def backward(
        self,
        grad_output: Tensor,
        *inputs: Tensor,
        weight: Tensor | None = None,
        mask: Sequence[bool] | None = None,
        **how: Any,
    ) -> list[Tensor]:
        """The gradients of the inputs that are given, straight from the operator."""
        arguments = self.backward_arguments(grad_output, inputs, weight, how, mask)
        return list(self.backward_operator(*arguments))[: len(inputs)]


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp with the gradient that it has before torch 2.14, and the operators have: the bounds themselves pass."""
    beyond = torch.where(x < low, low, torch.where(x > high, high, x)).detach()
    return torch.where((x >= low) & (x <= high), x, beyond)


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


SINGLE = Operator(
    kl_ext.kl_div_single_loss,
    reference.kl_div_single_loss,
    exact=lambda *inputs: oracle.single(*inputs).value,
    bound=oracle.SINGLE,
)
PAIR = Operator(
    kl_ext.kl_div_pair_loss,
    reference.kl_div_pair_loss,
    exact=lambda *inputs: oracle.pair(*inputs).value,
    bound=oracle.PAIR,
    of_divergence=(2.0, 0.5),
)
GAUSSIAN = Operator(
    kl_ext.gaussian_kl_div,
    gaussian_terms,
    exact=lambda *inputs: oracle.single(*inputs).value if len(inputs) == 2 else oracle.pair(*inputs).t / 2,
    bound=oracle.PAIR,
    numbers=(0.5, -1),
)
NORMAL = Operator(
    kl_ext.normal_kl_div,
    normal_terms,
    exact=lambda *inputs: normal_cases.normal(*inputs).value,
    bound=normal_cases.VALUE,
    numbers=(0.5, 2),
    has_deviations=True,
)
OPERATORS = (SINGLE, PAIR, GAUSSIAN, NORMAL)

ELEMENTWISE = tuple(operator for operator in OPERATORS if not operator.reduces)
REDUCING = tuple(operator for operator in OPERATORS if operator.reduces)
DOCUMENTED = tuple(operator for operator in ELEMENTWISE if operator.bounds)  # the losses of the documented API, which clamp
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)
each_elementwise_operator = pytest.mark.parametrize("operator", ELEMENTWISE, ids=str)
each_documented_loss = pytest.mark.parametrize("operator", DOCUMENTED, ids=str)
each_reducing_operator = pytest.mark.parametrize("operator", REDUCING, ids=str)


def named(name: str) -> Operator:
    return next(operator for operator in OPERATORS if operator.name == name)
