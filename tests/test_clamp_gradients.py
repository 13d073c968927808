"""The gradient of a log-variance passes at the bounds of the clamp and is zero strictly outside, in every order and whatever
torch.clamp's own gradient is: from torch 2.14 on, that is zero at the bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from kl_ext import gaussian_kl_div, kl_div_pair_loss, kl_div_single_loss

LOW, HIGH = -1.5, 0.75
INSIDE = [LOW, math.nextafter(LOW, 0), 0.0, 0.5, math.nextafter(HIGH, 0), HIGH]
OUTSIDE = [math.nextafter(LOW, -2), LOW - 1, math.nextafter(HIGH, 2), HIGH + 1]
VARIANCE = 0.3  # of the other distribution, where there is one

# A function of one log-variance, and its derivatives of orders 1, 2, ... in closed form, where it is not clamped.
Function = Callable[[Tensor], Tensor]
Derivative = Callable[[int, Tensor], Tensor]


def constant(x: Tensor, value: float = VARIANCE) -> Tensor:
    return torch.full_like(x, math.log(value))


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


CLAMP = {"clamp_min": LOW, "clamp_max": HIGH}
CASES: dict[str, tuple[Function, Derivative]] = {
    # e^x / 2 - x / 2
    "single": (
        lambda x: kl_div_single_loss(zero(x), x, **CLAMP),
        lambda order, x: 0.5 * (x.exp() - int(order == 1)),
    ),
    "standard": (
        lambda x: gaussian_kl_div(zero(x), x, **CLAMP, reduction="sum"),
        lambda order, x: 0.5 * (x.exp() - int(order == 1)),
    ),
    # (e^x / v - x) / 2, and twice that
    "p": (
        lambda x: gaussian_kl_div(zero(x), x, zero(x), constant(x), **CLAMP),
        lambda order, x: 0.5 * (x.exp() / VARIANCE - int(order == 1)),
    ),
    "pair, p": (
        lambda x: kl_div_pair_loss(zero(x), x, zero(x), constant(x), **CLAMP),
        lambda order, x: x.exp() / VARIANCE - int(order == 1),
    ),
    # (x + (v + 1) e^-x) / 2, and twice that
    "q": (
        lambda x: gaussian_kl_div(zero(x) + 1, constant(x), zero(x), x, **CLAMP),
        lambda order, x: 0.5 * (int(order == 1) + (-1) ** order * (VARIANCE + 1) * (-x).exp()),
    ),
    "pair, q": (
        lambda x: kl_div_pair_loss(zero(x) + 1, constant(x), zero(x), x, **CLAMP),
        lambda order, x: int(order == 1) + (-1) ** order * (VARIANCE + 1) * (-x).exp(),
    ),
}
each_case = pytest.mark.parametrize(("function", "derivative"), CASES.values(), ids=CASES)


def points(device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-variances, and 1 where the gradient passes, 0 elsewhere."""
    x = torch.tensor(INSIDE + OUTSIDE, dtype=torch.float64, device=device, requires_grad=True)
    return x, torch.tensor([1.0] * len(INSIDE) + [0.0] * len(OUTSIDE), dtype=torch.float64, device=device)


@each_case
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_of_every_order_pass_at_the_bounds(
    function: Function, derivative: Derivative, order: int, device: torch.device
) -> None:
    x, passing = points(device)
    value = function(x)
    for _ in range(order):
        [value] = torch.autograd.grad(value.sum(), x, create_graph=True)
    expected = torch.where(passing == 1, derivative(order, x), 0.0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@each_case
def test_forward_mode_passes_at_the_bounds(function: Function, derivative: Derivative, device: torch.device) -> None:
    """In first derivatives, and over reverse mode in second and third ones."""
    x, passing = points(device)
    for order in (1, 2, 3):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            value = function(dual)
            for _ in range(order - 1):
                [value] = torch.autograd.grad(value.sum(), dual, create_graph=True)
            tangent = forward_ad.unpack_dual(value).tangent
        expected = torch.where(passing == 1, derivative(order, x), 0.0)
        if tangent.dim() == 0:  # of a sum
            tangent, expected = tangent, expected.sum()
        torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


def test_torchs_own_clamp_has_changed(device: torch.device) -> None:
    """What the rule is there for: the same training would depend on the version of torch."""
    bounds = torch.tensor([LOW, HIGH], dtype=torch.float64, device=device, requires_grad=True)
    [of_clamp] = torch.autograd.grad(bounds.clamp(LOW, HIGH).sum(), bounds)
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    assert of_clamp.tolist() == ([1.0, 1.0] if version < (2, 14) else [0.0, 0.0])
    [ours] = torch.autograd.grad(kl_div_single_loss(zero(bounds), bounds, **CLAMP).sum(), bounds)
    torch.testing.assert_close(ours, 0.5 * (bounds.exp() - 1))
