"""What a loss keeps for its backward: no tensor more than the wanted gradients need, unchanged, and no longer than needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks

from loss_cases import PAIR, SINGLE, Loss, each_loss, each_loss_and_wanted, intermediates, leaves_for
from oracle import same_bits


@contextmanager
def recorded_saves() -> Iterator[list[Tensor]]:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield saved


@each_loss_and_wanted
def test_only_what_the_wanted_gradients_need_is_saved(loss: Loss, wanted: Sequence[str], device: torch.device) -> None:
    inputs = leaves_for(loss, wanted, device)
    with recorded_saves() as saved:
        loss.function(*inputs)
    by_address = {x.data_ptr(): a for a, x in zip(loss.arguments, inputs, strict=True)}
    assert sorted(by_address.get(x.data_ptr(), "a new tensor") for x in saved) == sorted(loss.needed_for(wanted))


def test_what_is_saved_is_as_few_tensors_as_the_formulas_allow(device: torch.device) -> None:
    """The promise above in numbers, so that the table of needs cannot be wrong unnoticed."""

    def count(loss: Loss, *wanted: str) -> int:
        with recorded_saves() as saved:
            loss.function(*leaves_for(loss, wanted, device))
        return len(saved)

    assert count(SINGLE, "mu") == count(SINGLE, "log_var") == 1
    assert count(SINGLE, "mu", "log_var") == 2
    assert count(PAIR, "mu_p") == count(PAIR, "mu_q") == count(PAIR, "mu_p", "mu_q") == 3
    assert count(PAIR, "log_var_p") == 2
    assert count(PAIR, "log_var_q") == count(PAIR, *PAIR.arguments) == 4


@each_loss
def test_nothing_is_saved_where_no_gradient_is_wanted(loss: Loss, device: torch.device) -> None:
    with recorded_saves() as saved:
        assert loss.function(*loss.inputs([2, 3], device=device)).grad_fn is None
        with torch.no_grad():
            assert not loss.function(*leaves_for(loss, loss.arguments, device)).requires_grad
        loss.function(*(x.detach() for x in leaves_for(loss, loss.arguments, device)))
    assert not saved


@each_loss_and_wanted
def test_changing_an_input_in_place_is_caught_where_a_gradient_needs_it_and_allowed_elsewhere(
    loss: Loss, wanted: Sequence[str], device: torch.device
) -> None:
    needed = loss.needed_for(wanted)
    for position, changed in enumerate(loss.arguments):
        inputs = leaves_for(loss, wanted, device)
        leaves = [x for x in inputs if x.requires_grad]
        expected = grad(loss.formula(*inputs).sum(), leaves)
        result = loss.function(*inputs).sum()
        with torch.no_grad():
            inputs[position].add_(1)
        if changed in needed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.backward()
        else:
            result.backward()
            for leaf, e in zip(leaves, expected, strict=True):
                torch.testing.assert_close(leaf.grad, e)


@each_loss
def test_changing_the_base_of_a_chunk_in_place_is_caught(loss: Loss, device: torch.device) -> None:
    encoded = torch.randn(2, 3 * loss.count, device=device, requires_grad=True) * 1
    result = loss.function(*encoded.chunk(loss.count, 1)).sum()
    with torch.no_grad():
        encoded.add_(1)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        result.backward()


@each_loss
def test_mutation_is_allowed_where_the_user_allows_mutation_on_saved_tensors(loss: Loss, device: torch.device) -> None:
    leaves = leaves_for(loss, loss.arguments, device)
    expected = grad(loss.function(*leaves).sum(), leaves)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        inputs = intermediates(leaves)
        result = loss.function(*inputs).sum()
        for x in inputs:
            x.mul_(2)
        for a, e in zip(grad(result, leaves), expected, strict=True):
            assert same_bits(a, e)


@each_loss
def test_saved_tensors_can_be_packed_to_the_cpu_and_back(loss: Loss, device: torch.device) -> None:
    leaves = leaves_for(loss, loss.arguments, device)
    expected = grad(loss.function(*leaves).sum(), leaves)
    with torch.autograd.graph.save_on_cpu():
        result = loss.function(*leaves).sum()
    assert all(same_bits(a, e) for a, e in zip(grad(result, leaves), expected, strict=True))

    unpacked: list[Tensor] = []
    with saved_tensors_hooks(lambda x: x.detach().cpu().clone(), lambda x: unpacked.append(x) or x.to(device)):
        result = loss.function(*leaves).sum()
    assert all(same_bits(a, e) for a, e in zip(grad(result, leaves), expected, strict=True))
    assert len(unpacked) == loss.count


@each_loss
@pytest.mark.parametrize("released_by", ["backward", "the end of the graph"])
def test_saved_tensors_live_until(loss: Loss, released_by: str, device: torch.device) -> None:
    inputs = intermediates(leaves_for(loss, loss.arguments, device))
    references = [weakref.ref(x) for x in inputs]
    gc.disable()  # so that a reference cycle would show
    try:
        result = loss.function(*inputs)
        del inputs
        assert all(reference() is not None for reference in references)
        if released_by == "backward":
            result.sum().backward()
        else:
            del result
        assert all(reference() is None for reference in references)
    finally:
        gc.enable()


@each_loss
def test_a_graph_of_gradients_is_released_like_any_other(loss: Loss, device: torch.device) -> None:
    inputs = intermediates(leaves_for(loss, loss.arguments, device))
    references = [weakref.ref(x) for x in inputs]
    gc.disable()  # so that a reference cycle would show
    try:
        gradients = grad(loss.function(*inputs).sum(), inputs, create_graph=True)
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
