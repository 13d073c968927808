"""Gradients with respect to log-variances pass at the bounds of the clamp and are 0 strictly outside: in every order of
derivatives, and in every version of torch, whose own clamp has changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from kl_ext import reference
from operators import OPERATORS, Operator

BOUNDS = [(-30.0, 20.0), (-0.5, 0.75)]
each_bounds = pytest.mark.parametrize("bounds", BOUNDS, ids=str)

# Each operator that clamps, and how many inputs it is given.
CLAMPED = [(operator, count) for operator in OPERATORS if operator.bounds for count in operator.counts]
each_clamped = pytest.mark.parametrize(("operator", "count"), CLAMPED, ids=str)


def points(low: float, high: float) -> list[float]:
    """At the bounds, and the numbers beside them."""
    return [math.nextafter(bound, toward) for bound in (low, high) for toward in (-math.inf, bound, math.inf)]


def inputs_at(bounds: tuple[float, float], count: int, device: torch.device) -> list[Tensor]:
    """The log-variances at all combinations of the points, and means."""
    grid = torch.cartesian_prod(*[torch.tensor(points(*bounds), dtype=torch.float64)] * (count // 2)).view(-1, count // 2)
    tensors = []
    for log_var in grid.unbind(1):
        tensors += [torch.rand(log_var.shape, dtype=torch.float64) * 4 - 2, log_var]
    return [x.to(device).requires_grad_() for x in tensors]


def derivative(
    inputs: Sequence[Tensor], by: Sequence[int], scale: float, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `scale` times the divergence, by the inputs of these numbers in turn, in closed form: of (lq - lp + e^(lp - lq) +
    D^2 e^-lq - 1) / 2 with D = mu_p - mu_q. And the sum of the sizes of its terms, and where the clamp lets it pass."""
    values = [x.detach() for x in inputs]
    values += [torch.zeros_like(values[0])] * (4 - len(values))
    mu_p, log_var_p, mu_q, log_var_q = values
    lp, lq = (torch.from_numpy(x.cpu().numpy().clip(*bounds)).to(x) for x in (log_var_p, log_var_q))
    a, b, c, d = (list(by).count(i) for i in range(4))
    difference = mu_p - mu_q
    square = [difference**2, 2 * difference, torch.full_like(difference, 2.0), torch.zeros_like(difference)][min(a + c, 3)]
    terms = [
        (-1) ** d * torch.exp(lp - lq) * (a + c == 0),
        (-1) ** (c + d) * torch.exp(-lq) * square * (b == 0),
        torch.full_like(lp, {(0, 0, 0, 1): 1.0, (0, 1, 0, 0): -1.0}.get((a, b, c, d), 0.0)),
    ]
    passes = torch.ones_like(lp, dtype=torch.bool)
    for times, log_var in ((b, log_var_p), (d, log_var_q)):
        if times:
            passes &= (log_var >= bounds[0]) & (log_var <= bounds[1])
    total, size = sum(terms), sum(term.abs() for term in terms)
    return 0.5 * scale * torch.where(passes, total, 0.0), 0.5 * scale * size, passes


def assert_right(actual: Tensor, expected: Tensor, size: Tensor, passes: Tensor, what: object) -> None:
    """Within the roundings of some twenty operations and those of an exponent that is up to 50."""
    errors = (actual - expected).abs() / size.clamp_min(torch.finfo(torch.float64).tiny)
    assert errors.max() <= 100 * torch.finfo(torch.float64).eps, f"{what}: {actual} for {expected}"
    assert (actual[~passes] == 0).all(), f"{what}: {actual} where {passes} passes"


def nested(terms: Tensor, inputs: Sequence[Tensor], by: Sequence[int]) -> Tensor:
    """The derivative of each term by its own elements of the inputs."""
    for i in by:
        if not terms.requires_grad:
            return torch.zeros_like(terms)
        [terms] = torch.autograd.grad(terms.sum(), inputs[i], create_graph=True, materialize_grads=True)
    return terms


@each_clamped
@each_bounds
@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_pass_at_the_bounds_and_are_zero_outside(
    order: int,
    bounds: tuple[float, float],
    operator: Operator,
    count: int,
    device: torch.device,
) -> None:
    inputs = inputs_at(bounds, count, device)
    terms = operator(*inputs, clamp_min=bounds[0], clamp_max=bounds[1])
    for by in itertools.product(range(count), repeat=order):
        assert_right(nested(terms, inputs, by), *derivative(inputs, by, operator.of_divergence[0], bounds), by)


@each_clamped
@each_bounds
@pytest.mark.parametrize("order", [1, 2, 3])
def test_so_do_those_whose_last_is_taken_forward(
    order: int,
    bounds: tuple[float, float],
    operator: Operator,
    count: int,
    device: torch.device,
) -> None:
    leaves = inputs_at(bounds, count, device)
    for last in range(count):
        with forward_ad.dual_level():
            inputs = list(leaves)
            inputs[last] = forward_ad.make_dual(leaves[last], torch.ones_like(leaves[last]))
            terms = operator(*inputs, clamp_min=bounds[0], clamp_max=bounds[1])
            for by in itertools.product(range(count), repeat=order - 1):
                tangent = forward_ad.unpack_dual(nested(terms, inputs, by)).tangent
                expected = derivative(leaves, [*by, last], operator.of_divergence[0], bounds)
                assert_right(torch.zeros_like(expected[0]) if tangent is None else tangent, *expected, (*by, last))


@each_bounds
def test_at_the_bounds_plain_torch_gives_what_its_clamp_gives(bounds: tuple[float, float], device: torch.device) -> None:
    """Gradients pass up to torch 2.13 and are 0 from torch 2.14 on; those of the operators pass in every version."""
    log_var = torch.tensor(bounds, dtype=torch.float64, device=device, requires_grad=True)
    mu, clamp = torch.zeros_like(log_var), dict(zip(("clamp_min", "clamp_max"), bounds, strict=True))
    [passes] = torch.autograd.grad(log_var.clamp(*bounds).sum(), log_var)
    is_newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
    assert passes.tolist() == ([0, 0] if is_newer else [1, 1])
    for operator in [operator for operator, count in CLAMPED if count == 2]:
        [own] = torch.autograd.grad(operator(mu, log_var, **clamp).sum(), log_var)
        [plain] = torch.autograd.grad(getattr(reference, operator.name)(mu, log_var, **clamp).sum(), log_var)
        expected = 0.5 * torch.expm1(log_var.detach())
        torch.testing.assert_close(own, expected, rtol=1e-15, atol=0)
        torch.testing.assert_close(plain, passes * expected, rtol=1e-15, atol=1e-15)
