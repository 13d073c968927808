"""torch.compile, whole graph and whole training step: the bits of eager, the operators left whole, no needless recompiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_inductor_cache
from torch.autograd import grad
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from operator_cases import LAYOUTS, Layout
from operators import DTYPES, ELEMENTWISE, PAIR, SINGLE, Operator, each_documented_loss, each_elementwise_operator
from oracle import same_bits

each_dynamic = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def operators_in(graph: GraphModule) -> list[torch._ops.OpOverload]:
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in targets if getattr(target, "namespace", None) == "kl_ext"]


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
    assert same_bits(actual, expected)
    assert actual.stride() == expected.stride()
    weights = torch.randn_like(expected)
    for a, e in zip(grad(actual, leaves, weights), grad(expected, leaves, weights), strict=True):
        assert same_bits(a, e)
        assert a.stride() == e.stride()


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


@each_elementwise_operator
def test_the_operators_stay_whole_in_the_compiled_graphs(operator: Operator, device: torch.device) -> None:
    """Forward and backward appear as kl_ext's operators, and only the wanted gradients are computed."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for wanted in (operator.arguments, operator.arguments[1:2]):
        graphs.clear()
        torch.compiler.reset()
        inputs = [
            x.requires_grad_(a in wanted)
            for a, x in zip(operator.arguments, operator.inputs([2, 3], device=device), strict=True)
        ]
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        torch.compile(operator.function, backend=backend, fullgraph=True)(*inputs).sum().backward()
        forward, backward = graphs
        assert operators_in(forward) == [operator.operator]
        assert operators_in(backward) == [operator.backward_operator]
        (call,) = [node for node in backward.graph.nodes if node.target is operator.backward_operator]
        assert list(call.args[-1]) == [a in wanted for a in operator.arguments]
        assert not any(node.target is torch.ops.aten.exp.default for graph in graphs for node in graph.graph.nodes)


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
def test_one_dynamic_graph_serves_every_size(operator: Operator, device: torch.device) -> None:
    compiled = torch.compile(operator.function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, columns, stance in [
        (4, 6, "default"),
        (5, 6, "fail_on_recompile"),
        (7, 3, "fail_on_recompile"),
        (128, 9, "fail_on_recompile"),
    ]:
        inputs = operator.inputs([rows, columns], [columns], device=device, dtype=torch.float32, requires_grad=True)
        with torch.compiler.set_stance(stance):
            actual = compiled(*inputs)
        expected = operator.function(*inputs)
        assert same_bits(actual, expected)
        for a, e in zip(grad(actual.sum(), inputs), grad(expected.sum(), inputs), strict=True):
            torch.testing.assert_close(a, e)  # the gradient of the broadcast input is a sum, whose order torch may choose


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


@each_elementwise_operator
def test_transforms_inside_a_compiled_function_give_what_they_give_in_eager(operator: Operator, device: torch.device) -> None:
    def transformed(*inputs: Tensor) -> tuple[Any, ...]:
        everything = tuple(range(operator.count))
        gradient = torch.func.grad(lambda *a: operator.function(*a).sum(), argnums=everything)
        _, tangent = torch.func.jvp(operator.function, inputs, tuple(x.cos() for x in inputs))
        return gradient(*inputs), tangent, torch.func.vmap(gradient)(*inputs), torch.func.vmap(operator.function)(*inputs)

    inputs = operator.inputs([4, 3], device=device)
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), transformed(*inputs), rtol=1e-14, atol=1e-14)


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


def encoder_step(device: torch.device) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """What a user compiles: an encoder whose output is split, a learned prior, both losses."""
    encoder = torch.nn.Linear(6, 2 * 4).to(device)
    prior = [torch.randn(4, device=device, requires_grad=True) for _ in range(2)]

    def step(x: Tensor) -> Tensor:
        mu, log_var = encoder(x).chunk(2, -1)
        per_sample = PAIR.function(mu, log_var, *prior) + 0.5 * SINGLE.function(mu, log_var)
        return per_sample.sum(-1).mean() + SINGLE.function(*prior).sum()

    return step, [*encoder.parameters(), *prior]


def test_a_training_step_compiled_by_inductor_serves_every_batch_size(device: torch.device) -> None:
    step, parameters = encoder_step(device)
    with fresh_inductor_cache():
        compiled = torch.compile(step, backend="inductor", fullgraph=True, dynamic=True)
        for rows, stance in [(8, "default"), (13, "fail_on_recompile"), (32, "fail_on_recompile")]:
            x = torch.randn(rows, 6, device=device)
            with torch.compiler.set_stance(stance):
                actual = compiled(x)
            expected = step(x)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(grad(actual, parameters), grad(expected, parameters))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_training_step_compiles_under_autocast(backend: str, device: torch.device) -> None:
    """The encoder runs in bfloat16; the losses are float32 and the gradients are the parameters' own."""
    step, parameters = encoder_step(device)

    def autocast_step(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return step(x)

    x = torch.randn(8, 6, device=device)
    with fresh_inductor_cache():
        actual, expected = torch.compile(autocast_step, backend=backend, fullgraph=True)(x), autocast_step(x)
        assert actual.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
        torch.testing.assert_close(grad(actual, parameters), grad(expected, parameters), rtol=0.02, atol=0.02)


def test_inductor_may_rely_on_the_strides_of_a_result_in_an_unusual_layout(device: torch.device) -> None:
    """Sizes of one and missing dimensions: code that reads the result by strides that it does not have reads other elements."""

    def step(*inputs: Tensor) -> Tensor:
        return SINGLE.function(*inputs).sin()

    inputs = torch.randn(8, device=device)[::2], torch.randn(4, 2, 3, 2, device=device)[..., :1].permute(2, 1, 3, 0)
    with fresh_inductor_cache():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(*inputs), step(*inputs))
