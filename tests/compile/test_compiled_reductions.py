"""Reductions compiled and exported: the bits of eager, the operators left whole, and no capture used for another reduction."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import fresh_inductor_cache
from torch.autograd import grad
from torch.export import Dim, export
from torch.fx import GraphModule

from kl_ext import gaussian_kl_div
from operators import DTYPES, REDUCING, Operator, each_reducing_operator
from oracle import same_bits
from reduction_cases import REDUCTIONS, SHAPES, each_reduction


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    compiled_autograd.reset()
    yield
    torch.compiler.reset()
    compiled_autograd.reset()


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert same_bits(a, e) and a.stride() == e.stride()


def step(function: Callable[..., Tensor], leaves: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    value = function(*leaves)
    return (value.detach(), *grad(value, leaves, weights))


@each_reducing_operator
@each_reduction
def test_compiled_value_and_gradients_have_the_bits_of_eager(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """In one static graph, and in one dynamic graph for every size."""
    function = operator.with_(how)
    shapes = SHAPES["prior [D]"] if how.get("reduction") != "mean" else SHAPES["standard"]
    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for scale in (1, 2, 3) if dynamic else (1,):
            stance = "default" if scale == 1 else "fail_on_recompile"
            leaves = operator.inputs(
                *([n * scale for n in shape] for shape in shapes), device=device, dtype=torch.float32, requires_grad=True
            )
            weights = torch.randn_like(function(*leaves))
            with torch.compiler.set_stance(stance):
                actual = step(compiled, leaves, weights)
            assert_same(actual, step(function, leaves, weights))


@each_reducing_operator
def test_the_operators_stay_whole_in_the_compiled_graphs(operator: Operator, device: torch.device) -> None:
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    leaves = operator.inputs(*SHAPES["prior [D]"], device=device, requires_grad=True)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(operator.with_({"reduction": "batchmean"}), backend=backend, fullgraph=True)
    compiled(*leaves).backward()
    own = [[n.target for n in g.graph.nodes if getattr(n.target, "namespace", None) == "kl_ext"] for g in graphs]
    assert own == [[operator.operator], [operator.backward_operator]]
    # The reduced gradient reaches the operator as it is: nothing is expanded and nothing summed around it.
    beside = {n.target for g in graphs for n in g.graph.nodes if getattr(n.target, "namespace", None) == "aten"}
    assert not beside & {torch.ops.aten.expand.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.sum.default}


@each_reducing_operator
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_numbers_for_q_and_for_dim_compile(operator: Operator, dynamic: bool, device: torch.device) -> None:
    def loss(mu: Tensor, log_var: Tensor, mean: float, dim: int) -> Tensor:
        return operator(mu, log_var, mean, operator.numbers[1], reduction="sum", dim=dim) + operator(
            mu, log_var, dtype=DTYPES[3]
        ).sum(dim)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    inputs = operator.inputs((4, 4), (4, 4), device=device, dtype=torch.float32)
    for mean, dim in ((0.5, 0), (0.25, 0), (0.75, -1)):
        assert same_bits(compiled(*inputs, mean, dim), loss(*inputs, mean, dim))


def test_a_training_step_compiles_by_inductor(device: torch.device) -> None:
    """An encoder whose output is split, against a prior of its class."""
    encoder = torch.nn.Linear(6, 8).to(device)
    table = torch.randn(2, 3, 4, device=device, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0], device=device)

    def loss(x: Tensor) -> Tensor:
        mu, log_var = encoder(x).chunk(2, -1)
        return gaussian_kl_div(mu, log_var, *table[:, labels], reduction="batchmean")

    x = torch.randn(5, 6, device=device)
    parameters = [*encoder.parameters(), table]
    with fresh_inductor_cache():
        actual = torch.compile(loss, backend="inductor", fullgraph=True)(x)
        expected = loss(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grad(actual, parameters), grad(expected, parameters))


@each_reducing_operator
@pytest.mark.parametrize("how", [REDUCTIONS["none"], REDUCTIONS["sum of 0 and 2"], REDUCTIONS["batchmean"]], ids=str)
def test_an_exported_reduction_serves_other_sizes_and_survives_saving(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    class Loss(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return operator(*inputs, **how)

    rows = Dim("rows", min=2, max=64)
    shapes = tuple({0: rows} if len(shape) == 3 else None for shape in SHAPES["prior [D]"])
    inputs = tuple(operator.inputs(*SHAPES["prior [D]"], device=device, dtype=torch.float32))
    program = export(Loss(), inputs, dynamic_shapes=(shapes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for served in (program, torch.export.load(file).run_decompositions()):
        assert [n.target for n in served.graph.nodes if getattr(n.target, "namespace", None) == "kl_ext"] == [operator.operator]
        others = operator.inputs((7, 3, 4), (7, 3, 4), (4,), (4,), device=device, dtype=torch.float32)
        assert same_bits(served.module()(*others), operator(*others, **how))


@each_reducing_operator
@each_reduction
def test_a_compiled_backward_of_an_eager_forward_has_the_bits_of_eager(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    graphs: list[GraphModule] = []

    def compile_backward(graph: GraphModule) -> Callable[..., Any]:
        graphs.append(graph)
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    function = operator.with_(how)
    names = ["standard", "prior of the middle"] if how in (REDUCTIONS["none"], REDUCTIONS["batchmean"]) else ["prior [D]"]
    for name in names:
        leaves = operator.inputs(*SHAPES[name], device=device, dtype=torch.float32, requires_grad=True)
        weights = torch.randn_like(function(*leaves))
        expected = step(function, leaves, weights)
        with compiled_autograd._enable(compile_backward, dynamic=True):
            assert_same(step(function, leaves, weights), expected)
    assert graphs and all(operator.backward_operator in [n.target for n in g.graph.nodes] for g in graphs)


# A capture takes its time: of the second, a reduction of each kind.
PACKED = [(operator, name) for operator in REDUCING for name in REDUCTIONS]
PACKED = [case for case in PACKED if case[0] == REDUCING[0] or case[1] in ("none", "sum of 0 and 2", "batchmean")]


@pytest.mark.parametrize("operator, how", [(d, REDUCTIONS[name]) for d, name in PACKED], ids=str)
def test_packed_tensors_work_in_a_compiled_backward(operator: Operator, how: dict[str, Any], device: torch.device) -> None:
    """Whichever gradients are wanted: an input that none depends on is not saved, and made up on the device of the others."""
    for name in ("standard", "prior [D]"):
        inputs = operator.inputs(*SHAPES[name], device=device)
        for wanted in (range(len(inputs)), [0], [1]):
            leaves = [inputs[i].detach().requires_grad_() for i in wanted]
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x * 2, lambda x: x / 2):
                given = dict(enumerate(inputs)) | dict(zip(wanted, leaves, strict=True))
                value = operator(*given.values(), **how).sum()
            expected = grad(value, leaves, retain_graph=True)
            graphs: list[GraphModule] = []

            def compile_backward(graph: GraphModule, graphs: list[GraphModule] = graphs) -> Callable[..., Any]:
                graphs.append(graph)
                return torch.compile(graph, backend="aot_eager", fullgraph=True)

            with compiled_autograd._enable(compile_backward, dynamic=True):
                assert_same(grad(value, leaves), expected)
            assert not [n for graph in graphs for n in graph.graph.nodes if n.target == torch.ops.aten.zeros.default]
            compiled_autograd.reset()


@each_reducing_operator
def test_a_captured_backward_is_never_used_for_another_reduction(operator: Operator, device: torch.device) -> None:
    leaves = operator.inputs((3, 3, 3), (3, 3, 3), device=device, requires_grad=True)
    hows = [*REDUCTIONS.values(), operator.taken({"reduction": "sum", "clamp_max": 0.5}), {"reduction": "mean", "dim": 1}]
    expected = [grad(operator(*leaves, **how).sum(), leaves) for how in hows]
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager"), dynamic=True):
        for _ in range(2):
            for how, e in zip(hows, expected, strict=True):
                assert_same(grad(operator(*leaves, **how).sum(), leaves), e)
