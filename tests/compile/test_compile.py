"""torch.compile, whole graph and whole training step: the bits of eager, the operators left whole, no needless recompiles."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_inductor_cache
from torch.autograd import grad
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from compiled import assert_same, loss_of, operators_in, value_and_gradients
from kl_ext import gaussian_kl_div, normal_kl_div
from kl_ext._operators import names_of
from operator_cases import LAYOUTS, Layout
from operators import (
    DTYPES,
    ELEMENTWISE,
    PAIR,
    SINGLE,
    Operator,
    each_documented_loss,
    each_elementwise_operator,
    each_reducing_operator,
)
from oracle import same_bits
from reduction_cases import SHAPES, each_operator_and, each_operator_and_reduction
from weight_cases import some_weight, spoiled

aten = torch.ops.aten
each_dynamic = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@each_elementwise_operator
@pytest.mark.parametrize(
    ("layout", "dynamic"),
    [(layout, True) for layout in LAYOUTS.values()]
    + [(LAYOUTS[name], False) for name in ("contiguous", "broadcast", "chunk_last", "zero_dim")],
    ids=[f"{name}-dynamic" for name in LAYOUTS]
    + ["contiguous-static", "broadcast-static", "chunk_last-static", "zero_dim-static"],
)
def test_a_compiled_loss_and_its_gradients_have_the_bits_and_strides_of_eager(
    operator: Operator, layout: Layout, dynamic: bool, device: torch.device
) -> None:
    leaves, view = layout(operator, device, torch.float32)

    def step(*leaves: Tensor) -> Tensor:
        return operator.function(*view(*leaves))

    expected = step(*leaves)
    actual = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*leaves)
    grad_output = torch.randn_like(expected)
    assert_same(*(value_and_gradients(value, leaves, grad_output) for value in (actual, expected)))


@each_operator_and_reduction
def test_one_static_graph_and_one_dynamic_graph_for_every_size_have_the_bits_of_eager(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """With a weight too, and garbage in what it leaves out."""
    function = loss_of(operator, how)
    weights = [None, random.choice([((2, 3, 4), torch.bool), ((2, 1, 4), torch.float32)])] if operator.reduces else [None]
    for dynamic, of_weight in itertools.product([False, True], weights):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        names = "standard" if how.get("reduction") == "mean" and of_weight is None else "prior [D]"
        for scale in (1, 2, 3, 16) if dynamic else (1,):
            shapes = [tuple(n * scale for n in shape) for shape in SHAPES[names][: operator.count]]
            leaves: Sequence[Tensor] = operator.inputs(*shapes, device=device, dtype=torch.float32, requires_grad=True)
            weight = None
            if of_weight is not None:
                size, dtype = of_weight
                weight = some_weight([n if n == 1 else n * scale for n in size], dtype, device)
                leaves = [x.requires_grad_() for x in spoiled(leaves, weight)]
            expected = function(weight, *leaves)
            grad_output = torch.randn_like(expected)
            with torch.compiler.set_stance("default" if scale == 1 else "fail_on_recompile"):
                actual = value_and_gradients(compiled(weight, *leaves), leaves, grad_output)
            assert_same(actual, value_and_gradients(expected, leaves, grad_output))


@each_elementwise_operator
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1], DTYPES[:1] * 4, DTYPES[1:2] * 4], ids=lambda d: "-".join(map(str, d)))
def test_a_compiled_loss_of_mixed_dtypes_has_the_bits_of_eager(
    operator: Operator, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    inputs = [x.to(d).requires_grad_() for x, d in zip(operator.inputs([2, 3], [3], device=device), dtypes, strict=False)]
    bounds = operator.taken({"clamp_min": -1.0, "clamp_max": 1.0})
    expected = operator.function(*inputs, **bounds)
    compiled = torch.compile(operator.function, backend="aot_eager", fullgraph=True)
    actual = compiled(*inputs, **bounds)
    assert same_bits(actual, expected)
    for a, e in zip(grad(actual.sum(), inputs), grad(expected.sum(), inputs), strict=True):
        assert same_bits(a, e)


@each_operator_and("none", "batchmean")
def test_the_operators_stay_whole_in_the_compiled_graphs(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    """Forward and backward appear as kl_ext's operators, and only the wanted gradients are computed. The gradient reaches the
    operator as it is: nothing is expanded and nothing summed around it."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    shapes = SHAPES["prior [D]" if operator.reduces else "pair"][: operator.count]
    for wanted in (operator.arguments, operator.arguments[1:2]):
        graphs.clear()
        torch.compiler.reset()
        inputs = operator.inputs(*shapes, device=device)
        leaves = [x.requires_grad_() for a, x in zip(operator.arguments, inputs, strict=True) if a in wanted]
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        value = torch.compile(operator.with_(how), backend=backend, fullgraph=True)(*inputs)
        grad(value, leaves, torch.ones_like(value))
        forward, backward = graphs
        assert operators_in(forward.graph) == [operator.operator]
        assert operators_in(backward.graph) == [operator.backward_operator]
        (call,) = [node for node in backward.graph.nodes if node.target is operator.backward_operator]
        mask = call.args[names_of(operator.backward_operator).index("output_mask")]
        assert list(mask) == [a in wanted for a in operator.arguments]
        beside = {target for graph in graphs for target in operators_in(graph.graph, "aten")}
        assert not beside & {aten.sum.dim_IntList, aten.sum.default, aten.exp.default}
        # An input that no wanted gradient depends on is not saved: zeros are expanded in its place.
        assert aten.expand.default not in beside or wanted != operator.arguments


@pytest.mark.parametrize(
    ("operator", "wanted"),
    [
        pytest.param(operator, wanted, id=f"{operator.name}-{'+'.join(wanted)}")
        for operator in ELEMENTWISE
        for wanted in (operator.arguments, operator.arguments[1:2])
    ],
)
def test_a_compiled_call_of_the_backward_operator_keeps_its_mask(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    mask = [a in wanted for a in operator.arguments]
    bounds = (-1.0, 1.0)[: len(operator.bounds)]

    def backward(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        return operator.backward_operator(*tensors, *bounds, mask)

    tensors = (torch.randn(2, 3, dtype=torch.float64, device=device), *operator.inputs([2, 3], [3], device=device))
    actual = torch.compile(backward, backend="aot_eager", fullgraph=True)(*tensors)
    for a, e in zip(actual, backward(*tensors), strict=True):
        assert a is e if e is None else same_bits(a, e)


@each_elementwise_operator
def test_a_second_size_recompiles_once_and_a_marked_one_not_at_all(operator: Operator, device: torch.device) -> None:
    for mark, expected_count in ((False, 2), (True, 1)):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(operator.function, backend=counter, fullgraph=True)
        for rows in (4, 5, 6, 7):
            inputs = operator.inputs([rows, 3], device=device, requires_grad=True)
            for x in inputs:
                if mark:
                    torch._dynamo.mark_dynamic(x, 0)
            compiled(*inputs).sum().backward()
        assert counter.frame_count == expected_count


@each_elementwise_operator
def test_calls_of_the_same_kind_do_not_recompile(operator: Operator, device: torch.device) -> None:
    compiled = torch.compile(operator.function, backend="aot_eager", fullgraph=True)
    inputs = operator.inputs([4, 3], device=device, requires_grad=True)
    compiled(*inputs).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            compiled(*operator.inputs([4, 3], device=device, requires_grad=True)).sum().backward()


@each_documented_loss
@each_dynamic
def test_clamp_bounds_computed_at_run_time_are_honoured(operator: Operator, dynamic: bool, device: torch.device) -> None:
    def widened(width: float, *inputs: Tensor) -> Tensor:
        return operator.function(*inputs, clamp_min=-width, clamp_max=2 * width)

    compiled = torch.compile(widened, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    inputs = operator.inputs([4, 3], device=device, requires_grad=True)
    for width in (0.125, 0.25, 1.0, 0.5):
        expected = widened(width, *inputs)
        actual = compiled(width, *inputs)
        assert same_bits(actual, expected)
        for a, e in zip(grad(actual.sum(), inputs), grad(expected.sum(), inputs), strict=True):
            assert same_bits(a, e)


@each_reducing_operator
@each_dynamic
def test_numbers_for_q_and_for_dim_compile(operator: Operator, dynamic: bool, device: torch.device) -> None:
    def loss(mu: Tensor, log_var: Tensor, mean: float, dim: int) -> Tensor:
        return operator(mu, log_var, mean, operator.numbers[1], reduction="sum", dim=dim) + operator(
            mu, log_var, dtype=DTYPES[3]
        ).sum(dim)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    inputs = operator.inputs((4, 4), (4, 4), device=device, dtype=torch.float32)
    for mean, dim in ((0.5, 0), (0.25, 0), (0.75, -1)):
        assert same_bits(compiled(*inputs, mean, dim), loss(*inputs, mean, dim))


@each_elementwise_operator
def test_transforms_inside_a_compiled_function_give_what_they_give_in_eager(operator: Operator, device: torch.device) -> None:
    def transformed(*inputs: Tensor) -> tuple[Any, ...]:
        everything = tuple(range(operator.count))
        gradient = torch.func.grad(lambda *a: operator.function(*a).sum(), argnums=everything)
        _, tangent = torch.func.jvp(operator.function, inputs, tuple(x.cos() for x in inputs))
        return gradient(*inputs), tangent, torch.func.vmap(gradient)(*inputs), torch.func.vmap(operator.function)(*inputs)

    inputs = operator.inputs([4, 3], device=device)
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    actual, expected = (tree_leaves(function(*inputs)) for function in (compiled, transformed))
    assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))


@each_elementwise_operator
def test_checkpointing_inside_a_compiled_function_gives_the_bits_of_eager(operator: Operator, device: torch.device) -> None:
    def step(*inputs: Tensor) -> Tensor:
        return checkpoint(operator.function, *inputs, use_reentrant=False)

    inputs = operator.inputs([4, 3], device=device, requires_grad=True)
    actual = torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs)
    expected = operator.function(*inputs)
    for a, e in zip(grad(actual.sum(), inputs), grad(expected.sum(), inputs), strict=True):
        assert same_bits(a, e)


@each_elementwise_operator
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_compiles_where_no_gradient_is_recorded(
    operator: Operator, mode: Callable[[], Any], device: torch.device
) -> None:
    inputs = operator.inputs([4, 3], device=device, requires_grad=True)
    with mode():
        actual = torch.compile(operator.function, backend="aot_eager", fullgraph=True)(*inputs)
    assert not actual.requires_grad
    assert same_bits(actual, operator.function(*inputs))


# What a user compiles: a step, the arguments for so many samples, and the parameters.
Step = tuple[Callable[..., Tensor], Callable[[int], list[Tensor]], list[Tensor]]


def with_a_learned_prior(device: torch.device) -> Step:
    """An encoder whose output is split, a learned prior, both losses."""
    encoder = torch.nn.Linear(6, 2 * 4).to(device)
    prior = [torch.randn(4, device=device, requires_grad=True) for _ in range(2)]

    def step(x: Tensor) -> Tensor:
        mu, log_var = encoder(x).chunk(2, -1)
        per_sample = PAIR.function(mu, log_var, *prior) + 0.5 * SINGLE.function(mu, log_var)
        return per_sample.sum(-1).mean() + SINGLE.function(*prior).sum()

    return step, lambda rows: [torch.randn(rows, 6, device=device)], [*encoder.parameters(), *prior]


def with_a_prior_of_each_class(device: torch.device) -> Step:
    encoder = torch.nn.Linear(6, 2 * 4).to(device)
    table = torch.randn(2, 3, 4, device=device, requires_grad=True)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        mu, log_var = encoder(x).chunk(2, -1)
        return gaussian_kl_div(mu, log_var, *table[:, labels], reduction="batchmean")

    return (
        step,
        lambda rows: [torch.randn(rows, 6, device=device), torch.randint(3, (rows,), device=device)],
        [*encoder.parameters(), table],
    )


def with_a_mask_of_lengths(device: torch.device) -> Step:
    encoder = torch.nn.Linear(6, 2 * 4).to(device)

    def step(x: Tensor, lengths: Tensor) -> Tensor:
        mu, log_var = encoder(x).chunk(2, -1)
        keep = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        of_log_var = gaussian_kl_div(mu, log_var, weight=keep, reduction="mean")
        return of_log_var + normal_kl_div(mu, log_var.exp(), weight=keep, reduction="mean")

    return (
        step,
        lambda rows: [torch.randn(rows, 7, 6, device=device), torch.arange(rows, device=device) % 8],
        [*encoder.parameters()],
    )


@pytest.mark.parametrize("make", [with_a_learned_prior, with_a_prior_of_each_class, with_a_mask_of_lengths])
def test_a_training_step_compiled_by_inductor_serves_every_batch_size(
    make: Callable[[torch.device], Step], device: torch.device
) -> None:
    step, arguments, parameters = make(device)
    with fresh_inductor_cache():
        compiled = torch.compile(step, backend="inductor", fullgraph=True, dynamic=True)
        for rows, stance in [(8, "default"), (13, "fail_on_recompile"), (32, "fail_on_recompile")]:
            given = arguments(rows)
            with torch.compiler.set_stance(stance):
                actual = compiled(*given)
            expected = step(*given)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(grad(actual, parameters), grad(expected, parameters))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_training_step_compiles_under_autocast(backend: str, device: torch.device) -> None:
    """The encoder runs in bfloat16; the losses are float32 and the gradients are the parameters' own.

    By default inductor leaves out roundings to bfloat16 between fused steps.
    """
    step, arguments, parameters = with_a_learned_prior(device)

    def autocast_step(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return step(x)

    (x,) = arguments(8)
    with fresh_inductor_cache(), torch._inductor.config.patch(emulate_precision_casts=True):
        actual, expected = torch.compile(autocast_step, backend=backend, fullgraph=True)(x), autocast_step(x)
        assert actual.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grad(actual, parameters), grad(expected, parameters))


def test_inductor_may_rely_on_the_strides_of_a_result_in_an_unusual_layout(device: torch.device) -> None:
    """Sizes of one and missing dimensions: code that reads the result by strides that it does not have reads other elements."""

    def step(*inputs: Tensor) -> Tensor:
        return SINGLE.function(*inputs).sin()

    inputs = torch.randn(8, device=device)[::2], torch.randn(4, 2, 3, 2, device=device)[..., :1].permute(2, 1, 3, 0)
    with fresh_inductor_cache():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(*inputs), step(*inputs))
