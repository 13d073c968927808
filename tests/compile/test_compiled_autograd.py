"""Compiled autograd: the backward of a graph that was recorded in eager mode, captured whole and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._inductor.utils import fresh_inductor_cache
from torch.autograd import grad
from torch.fx import GraphModule

from compiled import assert_same, backward_compiled, loss_of, operators_in
from operator_cases import Layout, each_elementwise_operator_and_wanted, each_layout
from operators import (
    DTYPES,
    GAUSSIAN,
    PAIR,
    REDUCING,
    SINGLE,
    Operator,
    each_documented_loss,
    each_elementwise_operator,
    each_reducing_operator,
)
from reduction_cases import REDUCTIONS, SHAPES, each_reduction
from weight_cases import some_weight


def gradients_in_both_ways(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], backend: str = "aot_eager"
) -> tuple[list[Tensor], list[Tensor], list[GraphModule]]:
    """The gradients of the weighted sum: by a compiled backward, by an eager one, and what was captured."""
    weights = torch.randn_like(function(*leaves))
    eager = grad(function(*leaves), leaves, weights)
    result = function(*leaves)
    with backward_compiled(backend) as graphs:
        compiled = grad(result, leaves, weights)
    return list(compiled), list(eager), graphs


@each_elementwise_operator
@each_layout
def test_a_compiled_backward_of_an_eager_forward_gives_the_bits_of_eager(
    operator: Operator, layout: Layout, device: torch.device
) -> None:
    leaves, view = layout(operator, device, torch.float32)
    compiled, eager, graphs = gradients_in_both_ways(lambda *leaves: operator.function(*view(*leaves)), leaves)
    assert_same(compiled, eager)
    assert len(graphs) == 1


@each_reducing_operator
@each_reduction
def test_a_compiled_backward_of_an_eager_reduction_gives_the_bits_of_eager(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """Of so many inputs, with a weight too, and whichever gradients are wanted: of one capture each."""
    others: list[Any] = [("standard", None, range(2)), ("prior of the middle", None, range(4))]
    for name, of_weight, wanted in [
        *(others if how.get("reduction", "none") in ("none", "batchmean") else [("prior [D]", None, range(4))]),
        ("prior [D]", ((2, 3, 4), torch.float32), range(4)),
        ("prior [D]", ((2, 1, 4), torch.bool), (0, 3)),
    ]:
        inputs = operator.inputs(*SHAPES[name], dtype=torch.float32, device=device)
        weight = of_weight and some_weight(*of_weight, device=device)
        leaves = [inputs[i].requires_grad_() for i in wanted]
        function = functools.partial(loss_of(operator, how), weight, *inputs)
        compiled, eager, graphs = gradients_in_both_ways(lambda *_, function=function: function(), leaves)
        assert_same(compiled, eager)
        assert len(graphs) == 1 and operators_in(graphs[0].graph) == [operator.backward_operator]


@each_elementwise_operator_and_wanted
def test_a_compiled_backward_computes_only_the_wanted_gradients(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    inputs = operator.inputs([2, 3], device=device)
    leaves = [x.requires_grad_() for a, x in zip(operator.arguments, inputs, strict=True) if a in wanted]
    compiled, eager, _ = gradients_in_both_ways(lambda *_: operator.function(*inputs), leaves)
    assert_same(compiled, eager)


@each_elementwise_operator
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1], DTYPES[:1] * 4], ids=lambda d: "-".join(map(str, d)))
def test_a_compiled_backward_gives_each_gradient_in_its_inputs_dtype(
    operator: Operator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    leaves = [x.to(d).requires_grad_() for x, d in zip(operator.inputs([2, 3], [3], device=device), dtypes, strict=False)]
    compiled, eager, _ = gradients_in_both_ways(operator.function, leaves)
    assert_same(compiled, eager)


@each_elementwise_operator
def test_the_captured_graph_calls_the_backward_operator(operator: Operator, device: torch.device) -> None:
    leaves = operator.inputs([2, 3], device=device, requires_grad=True)
    _, _, (graph,) = gradients_in_both_ways(operator.function, leaves, backend="eager")
    assert operator.backward_operator in [node.target for node in graph.graph.nodes]


@each_documented_loss
def test_a_capture_is_used_again_for_the_same_graph_and_never_for_another(operator: Operator, device: torch.device) -> None:
    """Clamp bounds, wanted inputs and dtypes are part of what a capture depends on; the numbers in the tensors are not."""

    def step(dtype: torch.dtype, wanted: Sequence[str], **bounds: float) -> Callable[[], list[Tensor]]:
        inputs = operator.inputs([4, 3], device=device, dtype=dtype)
        leaves = [x.requires_grad_() for a, x in zip(operator.arguments, inputs, strict=True) if a in wanted]
        return lambda: list(grad(operator.function(*inputs, **bounds).sum(), leaves))

    everything, one = operator.arguments, operator.arguments[1:2]
    steps = [
        step(dtype, wanted, **bounds)
        for dtype in (torch.float64, torch.bfloat16)
        for wanted in (everything, one)
        for bounds in ({}, {"clamp_min": -0.5}, {"clamp_max": 0.5}, {"clamp_min": -0.25, "clamp_max": 0.25})
        for _ in range(2)
    ]
    assert_captures_are_told_apart(steps)


@each_reducing_operator
def test_a_capture_is_never_used_for_another_reduction(operator: Operator, device: torch.device) -> None:
    leaves = operator.inputs((3, 3, 3), (3, 3, 3), device=device, requires_grad=True)
    hows = [*REDUCTIONS.values(), operator.taken({"reduction": "sum", "clamp_max": 0.5}), {"reduction": "mean", "dim": 1}]
    assert_captures_are_told_apart(
        [lambda how=how: list(grad(operator(*leaves, **how).sum(), leaves)) for how in hows for _ in range(2)]
    )


def test_a_capture_is_never_used_for_another_weight(device: torch.device) -> None:
    """With and without one, of other dtypes and shapes; other numbers in it are no other weight."""
    leaves = GAUSSIAN.inputs((3, 4), (3, 4), dtype=torch.float32, device=device, requires_grad=True)
    kinds = [((3, 4), torch.bool), ((3, 4), torch.float32), ((3, 1), torch.bool), ((4,), torch.float16), ((), torch.float32)]
    weights = [None, None, *(some_weight(*kind, device=device) for kind in kinds for _ in range(2))]
    assert_captures_are_told_apart(
        [
            lambda weight=weight, how=how: list(grad(loss_of(GAUSSIAN, how)(weight, *leaves), leaves))
            for weight in weights
            for how in ({"reduction": "sum"}, {"reduction": "mean"})
        ]
    )


def assert_captures_are_told_apart(steps: Sequence[Callable[[], list[Tensor]]]) -> None:
    """Steps of which there are two of each kind."""
    expected = [run() for run in steps]
    with backward_compiled("eager") as graphs:
        for _ in range(2):
            for run, e in zip(steps, expected, strict=True):
                assert_same(run(), e)
    assert len(graphs) <= len(steps) // 2


@each_elementwise_operator
def test_a_capture_serves_other_sizes(operator: Operator, device: torch.device) -> None:
    with backward_compiled() as graphs:
        for rows in (4, 5, 6, 7, 8):
            leaves = operator.inputs([rows, 3], device=device, requires_grad=True)
            operator.function(*leaves).sum().backward()
            for leaf, e in zip(leaves, gradients_of_formula(operator, leaves), strict=True):
                torch.testing.assert_close(leaf.grad, e)
    assert len(graphs) <= 2  # of one size, and of any


def gradients_of_formula(operator: Operator, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with compiled_autograd._disable():
        return grad(operator.formula(*leaves).sum(), leaves)


def test_one_graph_may_hold_both_losses_several_times(device: torch.device) -> None:
    """The nodes are told apart: by class, by bounds, and by place."""

    def step(*leaves: Tensor) -> Tensor:
        mu_p, log_var_p, mu_q, log_var_q = leaves
        pair = PAIR.function(mu_p, log_var_p, mu_q, log_var_q) + PAIR.function(mu_q, log_var_q, mu_p, log_var_p, clamp_max=1.0)
        return pair + SINGLE.function(mu_p, log_var_p, clamp_min=-1.0) * SINGLE.function(mu_q, log_var_q)

    leaves = PAIR.inputs([4, 3], device=device, requires_grad=True)
    compiled, eager, graphs = gradients_in_both_ways(step, leaves)
    assert_same(compiled, eager)
    assert len(graphs) == 1


@each_elementwise_operator
def test_hooks_and_packed_tensors_work_in_a_compiled_backward(operator: Operator, device: torch.device) -> None:
    def step(*leaves: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x * 2, lambda x: x / 2):
            result = operator.function(*leaves)
        result.register_hook(lambda g: g * 3)
        return result

    leaves = operator.inputs([4, 3], device=device, requires_grad=True)
    compiled, eager, _ = gradients_in_both_ways(step, leaves)
    assert_same(compiled, eager)


# A capture takes its time: of the second, a reduction of each kind.
PACKED = [(operator, name) for operator in REDUCING for name in REDUCTIONS]
PACKED = [case for case in PACKED if case[0] == REDUCING[0] or case[1] in ("none", "sum of 0 and 2", "batchmean")]


@pytest.mark.parametrize("operator, how", [(d, REDUCTIONS[name]) for d, name in PACKED], ids=str)
def test_packed_tensors_of_a_reduction_work_in_a_compiled_backward(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """Whichever gradients are wanted: an input that none depends on is not saved, and made up on the device of the others."""
    for name in ("standard", "prior [D]"):
        inputs = operator.inputs(*SHAPES[name], device=device)
        for wanted in (range(len(inputs)), [0], [1]):
            leaves = [inputs[i].detach().requires_grad_() for i in wanted]
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x * 2, lambda x: x / 2):
                given = dict(enumerate(inputs)) | dict(zip(wanted, leaves, strict=True))
                value = operator(*given.values(), **how).sum()
            expected = grad(value, leaves, retain_graph=True)
            with backward_compiled() as graphs:
                assert_same(grad(value, leaves), expected)
            assert not [graph for graph in graphs if torch.ops.aten.zeros.default in operators_in(graph.graph, "aten")]
            compiled_autograd.reset()


@each_elementwise_operator
def test_a_changed_input_is_caught_in_a_compiled_backward(operator: Operator, device: torch.device) -> None:
    leaves = operator.inputs([4, 3], device=device, requires_grad=True)
    result = operator.function(*leaves).sum()
    with torch.no_grad():
        leaves[1].add_(1)
    with backward_compiled(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@each_elementwise_operator
def test_gradients_accumulate_over_compiled_backward_calls(operator: Operator, device: torch.device) -> None:
    leaves = operator.inputs([4, 3], device=device, requires_grad=True)
    expected = grad(operator.function(*leaves).sum(), leaves)
    with backward_compiled():
        for _ in range(3):
            operator.function(*leaves).sum().backward()
    for leaf, e in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * e)


def test_forward_and_backward_of_a_training_step_compile_by_inductor(device: torch.device) -> None:
    leaves = PAIR.inputs([4, 3], device=device, dtype=torch.float32, requires_grad=True)
    with fresh_inductor_cache():
        try:
            gradients_in_both_ways(lambda *a: PAIR.formula(*a) * 2, leaves, backend="inductor")
        except torch._dynamo.exc.Unsupported as error:  # torch 2.11 on CUDA
            pytest.skip(f"torch itself does not compile the backward of plain formulas here: {str(error).splitlines()[0]}")
        compiled, eager, graphs = gradients_in_both_ways(lambda *a: PAIR.function(*a) * 2, leaves, backend="inductor")
    assert_same(compiled, eager)
    assert len(graphs) == 1
