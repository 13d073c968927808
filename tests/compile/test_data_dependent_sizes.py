"""Sizes that are known only at run time: the elements that a mask selects, lengths read from a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import export

from kl_ext import gaussian_kl_div, kl_div_pair_loss, kl_div_single_loss
from oracle import same_bits

Selection = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def by_mask(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    mask = x[:, 0] > 0
    return x[mask], y[mask]


def by_nonzero(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    index = (x[:, 0] > 0).nonzero().squeeze(1)
    return x[index], y[index]


def by_length(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    length = (x[:, 0] > 0).sum().item()
    torch._check(length >= 0)
    torch._check(length <= x.shape[0])
    return x[:length], y[:length]


def by_length_transposed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    one, other = by_length(x, y)
    return one.t(), other.t()


SELECTIONS: dict[str, Selection] = {f.__name__: f for f in (by_mask, by_nonzero, by_length, by_length_transposed)}
each_selection = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)

# The selected rows of x and y, and a row of each that all share.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "single": lambda x, y, mu, log_var: kl_div_single_loss(x, y),
    "single, a row is shared": lambda x, y, mu, log_var: kl_div_single_loss(mu, y),
    "pair": lambda x, y, mu, log_var: kl_div_pair_loss(x, y, y, x),
    "pair with a prior": lambda x, y, mu, log_var: kl_div_pair_loss(x, y, mu, log_var),
    "none": lambda x, y, mu, log_var: gaussian_kl_div(x, y),
    "none with a prior": lambda x, y, mu, log_var: gaussian_kl_div(x, y, mu, log_var),
    "sum": lambda x, y, mu, log_var: gaussian_kl_div(x, y, reduction="sum"),
    "sum of 0": lambda x, y, mu, log_var: gaussian_kl_div(x, y, mu, log_var, reduction="sum", dim=0, keepdim=True),
    "sum of 1": lambda x, y, mu, log_var: gaussian_kl_div(x, y, y, x, reduction="sum", dim=[1]),
    "mean": lambda x, y, mu, log_var: gaussian_kl_div(x, y, reduction="mean"),
    "batchmean": lambda x, y, mu, log_var: gaussian_kl_div(x, y, mu, log_var, reduction="batchmean"),
    "numbers for q": lambda x, y, mu, log_var: gaussian_kl_div(x, y, 0.5, -1),
}
each_call = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def drawn(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """At least two rows are selected, and one is not."""
    x, y = (torch.rand(rows, 3, device=device) - 0.5 for _ in range(2))
    x[:3, 0] = torch.tensor([0.25, -0.25, 0.5], device=device)
    return x, y


def shared(selection: Selection, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if selection is by_length_transposed:
        return x[0][:, None], y[0][:, None]
    return x[0], y[:1]


class Module(torch.nn.Module):
    def __init__(self, loss: Any, selection: Selection) -> None:
        super().__init__()
        self.loss, self.selection = loss, selection

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(*self.selection(x, y), *shared(self.selection, x, y))


@each_call
@each_selection
def test_an_exported_loss_serves_whatever_is_selected(loss: Any, selection: Selection, device: torch.device) -> None:
    module = Module(loss, selection)
    program = export(module, drawn(6, device)).module()
    for _ in range(2):
        x, y = drawn(6, device)
        actual, expected = program(x, y), module(x, y)
        assert same_bits(actual, expected) and actual.stride() == expected.stride()


@each_call
@each_selection
def test_one_compiled_graph_serves_whatever_is_selected(loss: Any, selection: Selection, device: torch.device) -> None:
    """Forward and backward."""
    module = Module(loss, selection)
    captured = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(captured):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        for rows in (6, 9):
            leaves = [x.requires_grad_() for x in drawn(rows, device)]
            actual, expected = compiled(*leaves), module(*leaves)
            assert same_bits(actual, expected) and actual.stride() == expected.stride()
            weights = torch.rand_like(expected)
            gradients = [torch.autograd.grad(value, leaves, weights, allow_unused=True) for value in (actual, expected)]
            for a, b in zip(*gradients, strict=True):
                # Where both come to one tensor by several ways, the order in which they are added is not fixed.
                assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-6, atol=1e-6))


@each_call
@pytest.mark.parametrize("requires_grad", [False, True])
def test_sizes_may_be_marked_as_unknown(loss: Any, requires_grad: bool, device: torch.device) -> None:
    x, y = drawn(5, device)
    row = x[0].clone(), y[:1].clone()
    for tensor in (x, y):
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    leaves = [tensor.requires_grad_(requires_grad) for tensor in (x, y)]
    actual = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves, *row)
    assert same_bits(actual, loss(*leaves, *row))
    if requires_grad:
        wanted = [
            leaf for leaf in leaves if torch.autograd.grad(loss(*leaves, *row).sum(), leaf, allow_unused=True)[0] is not None
        ]
        for a, b in zip(
            torch.autograd.grad(actual.sum(), wanted), torch.autograd.grad(loss(*leaves, *row).sum(), wanted), strict=True
        ):
            assert same_bits(a, b)
