"""The graph a loss leaves behind: what it saves and for how long, what it computes, and what hooks, modes and threads see."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from operator_cases import each_elementwise_operator_and_wanted, intermediates, leaves_for, subsets
from operators import ELEMENTWISE, SINGLE, Operator, each_elementwise_operator
from oracle import same_bits

NODE_NAMES = {x.name: "".join(map(str.capitalize, x.name.split("_"))) + "Backward" for x in ELEMENTWISE}


@each_elementwise_operator
def test_the_result_may_be_changed_in_place(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    expected = grad((operator.formula(*leaves) * 3).sum(), leaves)
    for a, e in zip(grad(operator.function(*leaves).mul_(3).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, e)


@each_elementwise_operator
def test_gradients_share_no_memory_with_each_other_or_with_anything_else(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    grad_output = torch.ones(2, 3, dtype=torch.float64, device=device)
    gradients = grad(operator.function(*leaves), leaves, grad_output)
    addresses = {x.untyped_storage().data_ptr() for x in (*leaves, grad_output, *gradients)}
    assert len(addresses) == 2 * operator.count + 1
    copies = [g.clone() for g in gradients[1:]]
    gradients[0].zero_()
    assert all(torch.equal(g, c) for g, c in zip(gradients[1:], copies, strict=True))


@each_elementwise_operator
def test_the_gradient_of_an_expanded_sum_can_be_changed_in_place(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    operator.function(*leaves).sum().backward()
    for leaf in leaves:
        before = leaf.grad.clone()
        leaf.grad[0, 0] += 1
        before[0, 0] += 1
        assert torch.equal(leaf.grad, before)


@each_elementwise_operator
def test_the_same_tensor_given_for_every_argument_receives_the_sum_of_the_gradients(
    operator: Operator, device: torch.device
) -> None:
    x = SINGLE.inputs([2, 3], device=device, requires_grad=True)[0]
    torch.testing.assert_close(
        grad(operator.function(*[x] * operator.count).sum(), x), grad(operator.formula(*[x] * operator.count).sum(), x)
    )


class RecordedCalls(TorchDispatchMode):
    """The operators of kl_ext that reach the dispatcher, with their positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "kl_ext":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@each_elementwise_operator_and_wanted
def test_only_the_gradients_asked_for_are_computed(operator: Operator, wanted: Sequence[str], device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    result = operator.function(*leaves).sum()
    with RecordedCalls() as recorded:
        grad(result, [x for a, x in zip(operator.arguments, leaves, strict=True) if a in wanted])
    ((called, arguments),) = recorded.calls
    assert called is operator.backward_operator
    assert list(arguments[-1]) == [a in wanted for a in operator.arguments]


@each_elementwise_operator_and_wanted
def test_gradients_not_in_the_output_mask_come_back_as_none(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    inputs = operator.inputs([2, 3], device=device)
    grad_output = torch.randn_like(inputs[0])
    mask = [a in wanted for a in operator.arguments]
    gradients = operator.backward_operator(grad_output, *inputs, *operator.bounds, mask)
    every = operator.backward_operator(grad_output, *inputs, *operator.bounds, [True] * operator.count)
    for is_wanted, gradient, e in zip(mask, gradients, every, strict=True):
        assert same_bits(gradient, e) if is_wanted else gradient is None


@each_elementwise_operator
def test_an_undefined_incoming_gradient_gives_undefined_gradients(operator: Operator, device: torch.device) -> None:
    class Block(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
            return None

    leaves = leaves_for(operator, operator.arguments, device)
    Block.apply(operator.function(*leaves)).sum().backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves)


@each_elementwise_operator
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(operator: Operator, use_reentrant: bool, device: torch.device) -> None:
    calls = 0

    def counted(*inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return operator.function(*intermediates(inputs))

    leaves = leaves_for(operator, operator.arguments, device)
    weights = torch.randn(2, 3, dtype=torch.float64, device=device)
    (counted(*leaves) * weights).sum().backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    (checkpoint(counted, *leaves, use_reentrant=use_reentrant) * weights).sum().backward()
    assert calls == 3
    assert all(same_bits(leaf.grad, e) for leaf, e in zip(leaves, expected, strict=True))


@each_elementwise_operator
def test_anomaly_mode_names_the_node_that_made_a_nan_and_the_line_that_made_the_node(
    operator: Operator, device: torch.device
) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    name = NODE_NAMES[operator.name]
    with torch.autograd.detect_anomaly(check_nan=True):
        result = operator.function(*leaves)  # the line to be named
        with (
            pytest.warns(UserWarning, match=rf"Error detected in {name}(.|\n)*the line to be named"),
            pytest.raises(RuntimeError, match=f"Function '{name}' returned nan values in its 0th output"),
        ):
            result.backward(torch.full_like(result, float("nan")))


@each_elementwise_operator
def test_a_second_backward_needs_retain_graph(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    result = operator.function(*leaves).sum()
    first = grad(result, leaves, retain_graph=True)
    second = grad(result, leaves)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    result = operator.function(*leaves)  # without the sum: this node itself must object
    grad(result, leaves, torch.ones_like(result))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        grad(result, leaves, torch.ones_like(result))


@each_elementwise_operator
def test_the_node_has_a_stable_name_and_an_edge_for_each_input(operator: Operator, device: torch.device) -> None:
    for wanted in subsets(operator.arguments):
        leaves = leaves_for(operator, wanted, device)
        node = operator.function(*leaves).grad_fn
        assert node.name() == NODE_NAMES[operator.name]
        assert [next_node is not None for next_node, _ in node.next_functions] == [leaf.requires_grad for leaf in leaves]
        assert [next_node.variable for next_node, _ in node.next_functions if next_node] == [
            x for x in leaves if x.requires_grad
        ]


@each_elementwise_operator
def test_hooks_on_tensors_and_on_the_node_see_and_change_the_gradients(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    expected = grad(operator.function(*leaves).sum(), leaves)
    seen: list[str] = []
    result = operator.function(*leaves)
    result.register_hook(lambda g: seen.append("result") or g * 2)
    result.grad_fn.register_prehook(lambda gs: seen.append("before") or tuple(g * 2 for g in gs))
    result.grad_fn.register_hook(lambda outputs, inputs: seen.append("after") or tuple(g * 2 for g in outputs))
    leaves[0].register_hook(lambda g: seen.append("leaf") or g * 2)
    leaves[0].register_post_accumulate_grad_hook(lambda leaf: seen.append("accumulated"))
    result.sum().backward()
    assert seen == ["result", "before", "after", "leaf", "accumulated"]
    torch.testing.assert_close(leaves[0].grad, expected[0] * 16)
    torch.testing.assert_close(leaves[1].grad, expected[1] * 8)


@each_elementwise_operator
def test_gradients_accumulate_over_backward_calls(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    expected = grad(operator.function(*leaves).sum(), leaves)
    for _ in range(3):
        operator.function(*leaves).sum().backward()
    for leaf, e in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * e)


@each_elementwise_operator
def test_inference_mode_computes_the_same_bits_and_leaves_no_graph(operator: Operator, device: torch.device) -> None:
    leaves = leaves_for(operator, operator.arguments, device)
    expected = operator.function(*leaves)
    with torch.inference_mode():
        result = operator.function(*leaves)
        assert result.is_inference()
        assert not result.requires_grad
    assert same_bits(result, expected)


@each_elementwise_operator
def test_backward_runs_in_many_threads_at_once(operator: Operator, device: torch.device) -> None:
    """On graphs that share their leaves, and on one graph that all threads share."""
    leaves = leaves_for(operator, operator.arguments, device)
    shared = operator.function(*leaves)
    weights = torch.randn(2, 3, dtype=torch.float64, device=device)
    expected = grad(shared, leaves, weights, retain_graph=True)
    threads, repeats = 4, 25
    start, failures = threading.Barrier(threads), []

    def work() -> None:
        try:
            start.wait()
            for _ in range(repeats):
                actual = grad(shared, leaves, weights, retain_graph=True)
                assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))
                operator.function(*leaves).backward(weights)
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    for leaf, e in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, threads * repeats * e)


@each_elementwise_operator
def test_a_loss_inside_a_custom_function_and_a_module_hook_trains(operator: Operator, device: torch.device) -> None:
    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return operator.function(*inputs)

    leaves = leaves_for(operator, operator.arguments, device)
    module, seen = Module(), []
    module.register_full_backward_hook(lambda module, grad_inputs, grad_outputs: seen.append(grad_inputs))
    module(*leaves).sum().backward()
    assert all(same_bits(g, leaf.grad) for g, leaf in zip(seen[0], leaves, strict=True))
