"""What a loss keeps for its backward: no tensor more than the wanted gradients need, unchanged, and no longer than needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks

from operator_cases import intermediates, leaves_for, subsets
from operators import OPERATORS, PAIR, SINGLE, Operator, close, each_operator
from oracle import same_bits


@contextmanager
def recorded_saves() -> Iterator[list[Tensor]]:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield saved


# Every operator with as many inputs as it may have, each subset of them, and ways to reduce.
SAVING = [
    (operator, count, wanted, how)
    for operator in OPERATORS
    for count in operator.counts
    for wanted in subsets(operator.arguments[:count])
    for how in ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": 1})
    if operator.reduces or not how
]


def name_of(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


def given(operator: Operator, count: int, wanted: Sequence[str], device: torch.device, q: Sequence[int]) -> list[Tensor]:
    """p of shape [2, 3], and what is last of another one that broadcasts."""
    shapes = [(2, 3), q] if count == 2 else [(2, 3), (2, 3), q, q]
    inputs = zip(operator.arguments, operator.inputs(*shapes, device=device), strict=False)
    return [x.requires_grad_(name in wanted) for name, x in inputs]


@pytest.mark.parametrize(("operator", "count", "wanted", "how"), SAVING, ids=name_of)
@pytest.mark.parametrize("shape", [(2, 3), (3,)], ids=["same shapes", "prior"])
def test_only_what_the_wanted_gradients_need_is_saved(
    operator: Operator,
    count: int,
    wanted: Sequence[str],
    shape: Sequence[int],
    how: dict[str, Any],
    device: torch.device,
) -> None:
    inputs = given(operator, count, wanted, device, shape)
    with recorded_saves() as saved:
        operator(*inputs, **how)
    by_address = {x.data_ptr(): a for a, x in zip(operator.arguments, inputs, strict=False)}
    needed = operator.needed_for(wanted, count)
    assert sorted(by_address.get(x.data_ptr(), "a new tensor") for x in saved) == sorted(needed)


def test_what_is_saved_is_as_few_tensors_as_the_formulas_allow(device: torch.device) -> None:
    """The promise above in numbers, so that the table of needs cannot be wrong unnoticed."""

    def count(operator: Operator, *wanted: str) -> int:
        with recorded_saves() as saved:
            operator.function(*leaves_for(operator, wanted, device))
        return len(saved)

    assert count(SINGLE, "mu") == count(SINGLE, "log_var") == 1
    assert count(SINGLE, "mu", "log_var") == 2
    assert count(PAIR, "mu_p") == count(PAIR, "mu_q") == count(PAIR, "mu_p", "mu_q") == 3
    assert count(PAIR, "log_var_p") == 2
    assert count(PAIR, "log_var_q") == count(PAIR, *PAIR.arguments) == 4


@each_operator
def test_nothing_is_saved_where_no_gradient_is_wanted(operator: Operator, device: torch.device) -> None:
    with recorded_saves() as saved:
        assert operator.function(*operator.inputs([2, 3], device=device)).grad_fn is None
        with torch.no_grad():
            assert not operator.function(*leaves_for(operator, operator.arguments, device)).requires_grad
        operator.function(*(x.detach() for x in leaves_for(operator, operator.arguments, device)))
    assert not saved


@pytest.mark.parametrize(("operator", "count", "wanted", "how"), [case for case in SAVING if "dim" not in case[3]], ids=name_of)
def test_changing_an_input_in_place_is_caught_where_a_gradient_needs_it_and_allowed_elsewhere(
    operator: Operator, count: int, wanted: Sequence[str], how: dict[str, Any], device: torch.device
) -> None:
    needed = operator.needed_for(wanted, count)
    for position, changed in enumerate(operator.arguments[:count]):
        inputs = given(operator, count, wanted, device, (3,) if count == 4 else (2, 3))
        leaves = [x for x in inputs if x.requires_grad]
        expected = grad(operator.formula(*inputs, **how).sum(), leaves)
        result = operator(*inputs, **how).sum()
        with torch.no_grad():
            inputs[position].add_(1)
        if changed in needed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.backward()
        else:
            torch.testing.assert_close(grad(result, leaves), tuple(expected), **close(6))


@each_operator
def test_changing_the_base_of_a_chunk_in_place_is_caught(operator: Operator, device: torch.device) -> None:
    encoded = torch.randn(2, 3 * operator.count, device=device, requires_grad=True) * 1
    result = operator.function(*encoded.chunk(operator.count, 1)).sum()
    with torch.no_grad():
        encoded.add_(1)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        result.backward()


@each_operator
def test_mutation_is_allowed_where_the_user_allows_mutation_on_saved_tensors(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    expected = grad(operator.function(*leaves).sum(), leaves)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        inputs = intermediates(leaves)
        result = operator.function(*inputs).sum()
        for x in inputs:
            x.mul_(2)
        for a, e in zip(grad(result, leaves), expected, strict=True):
            assert same_bits(a, e)


@each_operator
def test_saved_tensors_can_be_packed_to_the_cpu_and_back(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    expected = grad(operator.function(*leaves).sum(), leaves)
    with torch.autograd.graph.save_on_cpu():
        result = operator.function(*leaves).sum()
    assert all(same_bits(a, e) for a, e in zip(grad(result, leaves), expected, strict=True))

    unpacked: list[Tensor] = []
    with saved_tensors_hooks(lambda x: x.detach().cpu().clone(), lambda x: unpacked.append(x) or x.to(device)):
        result = operator.function(*leaves).sum()
    assert all(same_bits(a, e) for a, e in zip(grad(result, leaves), expected, strict=True))
    assert len(unpacked) == operator.count


@each_operator
@pytest.mark.parametrize("released_by", ["backward", "the end of the graph"])
def test_saved_tensors_live_until(operator: Operator, released_by: str, device: torch.device) -> None:
    inputs = intermediates(leaves_for(operator, operator.arguments, device))
    references = [weakref.ref(x) for x in inputs]
    gc.disable()  # so that a reference cycle would show
    try:
        result = operator.function(*inputs)
        del inputs
        assert all(reference() is not None for reference in references)
        if released_by == "backward":
            result.sum().backward()
        else:
            del result
        assert all(reference() is None for reference in references)
    finally:
        gc.enable()


@each_operator
def test_a_graph_of_gradients_is_released_like_any_other(operator: Operator, device: torch.device) -> None:
    inputs = intermediates(leaves_for(operator, operator.arguments, device))
    references = [weakref.ref(x) for x in inputs]
    gc.disable()  # so that a reference cycle would show
    try:
        gradients = grad(operator.function(*inputs).sum(), inputs, create_graph=True)
        second = sum(g.sum() for g in gradients)
        grad(second, inputs, retain_graph=True)
        grad(second, inputs)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            grad(second, inputs)
        del inputs, gradients, second
        assert all(reference() is None for reference in references)
    finally:
        gc.enable()


def test_an_inference_tensor_is_refused_only_where_it_would_be_saved(device: torch.device) -> None:
    with torch.inference_mode():
        frozen = torch.randn(2, 3, device=device)
    leaf = torch.randn(2, 3, device=device, requires_grad=True)
    SINGLE.function(leaf, frozen).sum().backward()  # the gradient of mu does not need log_var
    assert leaf.grad is not None
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        PAIR.function(leaf, frozen, frozen, frozen)
