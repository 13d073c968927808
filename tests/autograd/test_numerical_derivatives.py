"""Derivatives are numerically right: by gradcheck and gradgradcheck, in both modes and batched, whatever is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from batching import no_fallback  # noqa: F401 (a fixture)
from operator_cases import Layout, clamped_inputs, each_layout, each_operator_and_wanted
from operators import (
    OPERATORS,
    Operator,
    each_elementwise_operator,
    each_reducing_operator,
)
from reduction_cases import REDUCTIONS, SHAPES, each_reduction

# gradcheck and its like also check the batched modes, and those must not go example by example.
pytestmark = pytest.mark.usefixtures("no_fallback")

each_mode = pytest.mark.parametrize("fast_mode", [False, True], ids=["slow", "fast"])


@each_elementwise_operator
@each_layout
@each_mode
def test_first_derivatives_are_numerically_right_in_both_modes_and_batched(
    operator: Operator, layout: Layout, fast_mode: bool, device: torch.device
) -> None:
    leaves, view = layout(operator, device, torch.float64)
    assert gradcheck(
        lambda *leaves: operator.function(*view(*leaves)),
        leaves,
        fast_mode=fast_mode,
        check_undefined_grad=True,
        check_grad_dtypes=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )


@each_elementwise_operator
@each_layout
@pytest.mark.parametrize("non_contiguous", [False, True], ids=["contiguous", "non_contiguous_grad_output"])
def test_second_derivatives_are_numerically_right(
    operator: Operator, layout: Layout, non_contiguous: bool, device: torch.device
) -> None:
    leaves, view = layout(operator, device, torch.float64)
    assert gradgradcheck(
        lambda *leaves: operator.function(*view(*leaves)),
        leaves,
        gen_non_contig_grad_outputs=non_contiguous,
        fast_mode=not non_contiguous,
        check_undefined_grad=True,
        check_grad_dtypes=True,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


@each_operator_and_wanted
def test_gradients_of_any_subset_of_the_inputs_are_numerically_right(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    inputs = [
        x.requires_grad_(a in wanted)
        for a, x in zip(operator.arguments, operator.inputs([2, 1], [3], device=device, count=operator.count), strict=True)
    ]
    options = {"fast_mode": True, "check_undefined_grad": True, "check_batched_grad": True}
    assert gradcheck(operator.function, inputs, check_forward_ad=True, **options)
    assert gradgradcheck(operator.function, inputs, check_fwd_over_rev=True, **options)


# Those that a reduction makes of them.
GRADCHECKED = ["standard", "standard, outer", "pair", "prior [D]", "all broadcast", "q is the largest"]


@each_reducing_operator
@pytest.mark.parametrize("shapes", [SHAPES[name] for name in GRADCHECKED], ids=GRADCHECKED)
@each_reduction
def test_derivatives_of_a_reduction_are_numerically_right_in_every_mode(
    operator: Operator, shapes: Sequence[Sequence[int]], how: dict[str, Any], device: torch.device
) -> None:
    leaves = operator.inputs(*([min(n, 2) for n in shape] for shape in shapes), device=device, requires_grad=True)
    options = {"fast_mode": True, "check_undefined_grad": True, "check_grad_dtypes": True, "check_batched_grad": True}
    assert gradcheck(operator.with_(how), leaves, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(operator.with_(how), leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@each_reducing_operator
@pytest.mark.parametrize("how", [REDUCTIONS["sum of 0 and 2"], REDUCTIONS["batchmean"]], ids=str)
def test_derivatives_are_numerically_right_element_by_element(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    leaves = operator.inputs([2, 2, 2], [2, 1, 2], [2], [], device=device, requires_grad=True)
    assert gradcheck(operator.with_(how), leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(operator.with_(how), leaves, check_fwd_over_rev=True, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if operator.bounds], ids=str)
@each_mode
def test_derivatives_are_numerically_right_inside_and_outside_the_clamp(
    operator: Operator, fast_mode: bool, device: torch.device
) -> None:
    def clamped(*inputs: Tensor) -> Tensor:
        return operator.function(*inputs, clamp_min=-0.5, clamp_max=0.5)

    inputs = clamped_inputs(operator, device)
    options = {"fast_mode": fast_mode, "check_batched_grad": True}
    assert gradcheck(clamped, inputs, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(clamped, inputs, check_fwd_over_rev=True, **options)
