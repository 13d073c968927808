"""Inputs of the operators: all subsets of them, on both sides of the clamp, and in every layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from operators import ELEMENTWISE, OPERATORS, SINGLE, Operator


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset but the empty one."""
    count = len(names)
    return [tuple(n for i, n in enumerate(names) if bits >> i & 1) for bits in range(1, 1 << count)]


def _and_wanted(operators: Sequence[Operator]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("operator", "wanted"),
        [(operator, wanted) for operator in operators for wanted in subsets(operator.arguments)],
        ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
    )


each_operator_and_wanted = _and_wanted(OPERATORS)
each_elementwise_operator_and_wanted = _and_wanted(ELEMENTWISE)


def clamped_inputs(operator: Operator, device: torch.device) -> tuple[Tensor, ...]:
    """Log-variances below, inside and above the clamp (-0.5, 0.5), all combinations of them for the pair."""
    below_inside_above = torch.tensor([-0.75, 0.125, 1.0], dtype=torch.float64, device=device)
    log_variances = iter([below_inside_above[:, None].clone(), below_inside_above.clone()])
    means = operator.inputs([3, 3], device=device)
    return tuple(
        (next(log_variances) if "log_var" in a else mean).requires_grad_()
        for a, mean in zip(operator.arguments, means, strict=True)
    )


def leaves_for(
    operator: Operator, wanted: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    inputs = operator.inputs([2, 3], device=device, dtype=dtype)
    return [x.requires_grad_(a in wanted) for a, x in zip(operator.arguments, inputs, strict=True)]


def intermediates(leaves: Sequence[Tensor]) -> list[Tensor]:
    """New tensors that only the caller and the graph of the loss hold: multiplying by a number saves nothing."""
    return [leaf * 1 for leaf in leaves]


# Layouts: (operator, device, dtype) -> leaves that require gradients, and the function from those to the operator's arguments.
View = Callable[..., Sequence[Tensor]]
Layout = Callable[[Operator, torch.device, torch.dtype], tuple[tuple[Tensor, ...], View]]


def _of_shapes(*shapes: Sequence[int], view: Callable[[Tensor], Tensor] = lambda leaf: leaf) -> Layout:
    def build(operator: Operator, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], View]:
        leaves = operator.inputs(*shapes, device=device, dtype=dtype, requires_grad=True)
        return leaves, lambda *leaves: [view(leaf) for leaf in leaves]

    return build


def _chunks(dim: int) -> Layout:
    def build(operator: Operator, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], View]:
        shape = [2, 3]
        shape[dim] *= operator.count
        encoded = SINGLE.inputs(shape, device=device, dtype=dtype, requires_grad=True)[:1]
        return encoded, lambda encoded: encoded.chunk(operator.count, dim)

    return build


def _permuted(operator: Operator, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], View]:
    leaves = operator.inputs([2, 3, 2], device=device, dtype=dtype, requires_grad=True)
    permutations = [(2, 1, 0), (0, 1, 2), (2, 1, 0), (0, 1, 2)]
    return leaves, lambda *leaves: [leaf.permute(p) for leaf, p in zip(leaves, permutations, strict=False)]


def _same_tensor(operator: Operator, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], View]:
    leaves = SINGLE.inputs([2, 3], device=device, dtype=dtype, requires_grad=True)[:1]
    return leaves, lambda leaf: [leaf] * operator.count


LAYOUTS: dict[str, Layout] = {
    "contiguous": _of_shapes([2, 3]),
    "broadcast": _of_shapes([2, 1], [3], [], [1, 2, 3]),
    "prior": _of_shapes([2, 3], [2, 3], [3], [3]),
    "zero_dim": _of_shapes([]),
    "zero_size": _of_shapes([0, 3], [1]),
    "chunk_last": _chunks(-1),
    "chunk_first": _chunks(0),
    "permuted": _permuted,
    "expanded": _of_shapes([3], view=lambda leaf: leaf.expand(2, 3)),
    "stepped": _of_shapes([4, 3], view=lambda leaf: leaf[1::2]),
    "channels_last": _of_shapes([2, 1, 2, 2], view=lambda leaf: leaf.permute(0, 3, 1, 2)),
    "same_tensor": _same_tensor,
}

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
