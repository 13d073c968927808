"""The divergences compiled, exported and traced: the bits of eager, the operators left whole, fake results like real ones."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import fresh_inductor_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad
from torch.export import Dim, export
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from kl_ext import gaussian_kl_div
from operators import DTYPES, GAUSSIAN, REDUCING, Operator, each_reducing_operator
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
PACKED = [case for case in PACKED if case[0] == GAUSSIAN or case[1] in ("none", "sum of 0 and 2", "batchmean")]


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


# opcheck, and fake tensors

Make = Callable[[Operator], list[Tensor]]
SAMPLES: dict[str, tuple[Make, dict[str, Any]]] = {
    "standard, none": (lambda d: d.inputs((2, 3), (2, 3)), {}),
    "broadcast, none": (lambda d: d.inputs((2, 1, 3), (4, 1), (3,), ()), {"clamp_max": 0.5}),
    "permuted, none": (lambda d: [x.permute(2, 0, 1) for x in d.inputs((2, 3, 4), (2, 3, 4))], {"dtype": torch.float32}),
    "promotion, sum": (
        lambda d: [x.to(dtype) for x, dtype in zip(d.inputs(*[(2, 3)] * 4), DTYPES, strict=True)],
        {"reduction": "sum"},
    ),
    "prior, sum of 0": (lambda d: d.inputs((4, 3), (4, 3), (3,), (3,)), {"reduction": "sum", "dim": [0]}),
    "chunks, mean of -1": (lambda d: list(d.inputs((2, 12), (2, 12))[1].chunk(4, 1)), {"reduction": "mean", "dim": [-1]}),
    "channels last, mean": (
        lambda d: [x.contiguous(memory_format=torch.channels_last) for x in d.inputs((2, 3, 4, 5), (2, 3, 4, 5))],
        {"reduction": "mean", "dim": [0, 2, -1], "dtype": torch.float16},
    ),
    "the middle, batchmean": (lambda d: d.inputs((2, 3, 4), (2, 3, 4), (2, 1, 4), (1, 3, 1)), {"reduction": "batchmean"}),
    "q is the largest, sum": (lambda d: d.inputs((4,), (), (2, 3, 4), (3, 1)), {"reduction": "sum", "dim": [1]}),
    "zero-size, sum": (lambda d: d.inputs((0, 3), (1, 3), (3,), (0, 1)), {"reduction": "sum", "dim": [0]}),
    "zero-size, mean kept": (lambda d: d.inputs((0, 3), (3,)), {"reduction": "mean", "dim": [1]}),
    "zero-dim, mean": (lambda d: d.inputs((), ()), {"reduction": "mean"}),
    "half, batchmean": (
        lambda d: d.inputs((5, 3), (3,), dtype=torch.float16),
        {"reduction": "batchmean", "dtype": torch.float64},
    ),
}
each_sample = pytest.mark.parametrize("sample, how", SAMPLES.values(), ids=SAMPLES.keys())


@each_reducing_operator
@each_sample
def test_the_forward_operator_passes_opcheck(
    operator: Operator, sample: Make, how: dict[str, Any], device: torch.device
) -> None:
    inputs = [x.to(device).requires_grad_() for x in sample(operator)]
    assert set(opcheck(operator.operator, inputs, operator.taken(how)).values()) == {"SUCCESS"}


@each_reducing_operator
@each_sample
def test_the_backward_operator_passes_opcheck(
    operator: Operator, sample: Make, how: dict[str, Any], device: torch.device
) -> None:
    inputs = [x.to(device) for x in sample(operator)]
    grad_output = torch.randn_like(operator.operator(*inputs, **operator.taken(how)))
    q = inputs[2:] or [None, None]
    mask = [True] * len(inputs) + [False] * (4 - len(inputs))
    bounds = [*operator.bounds[:1], *(how.get("clamp_max", bound) for bound in operator.bounds[1:])]
    reduction = how.get("reduction", "none")
    arguments = (grad_output, *inputs[:2], *q, *bounds, reduction, how.get("dim"), mask)
    # Without autograd registration's test where a gradient is None: it would differentiate that.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(opcheck(operator.backward_operator, arguments, test_utils=checks).values()) == {"SUCCESS"}
    if len(inputs) == 4 and reduction in ("none", "batchmean"):
        leaves = [x.requires_grad_() for x in inputs]
        assert set(opcheck(operator.backward_operator, (grad_output, *leaves, *arguments[5:])).values()) == {"SUCCESS"}


def meta_of(x: Tensor | None) -> tuple[object, ...] | None:
    """Shape, dtype, device, and the strides of what has more than one element."""
    if x is None:
        return None
    shape = tuple(map(int, x.shape))
    strides = [int(s) if n > 1 and 0 not in shape else None for n, s in zip(shape, x.stride(), strict=True)]
    return shape, x.dtype, x.device, strides


@each_reducing_operator
@pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbols"])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_the_real_ones(
    operator: Operator, symbolic: bool, device: torch.device
) -> None:
    for _ in range(30 if symbolic else 150):
        shape = [random.choice([0, 1, 2, 3, 4]) for _ in range(random.randint(0, 4))]
        inputs = []
        for _ in range(random.choice([2, 4])):
            own = [n if random.random() < 0.7 else 1 for n in shape[random.choice([0, 0, 0, 1]) :]]
            order = random.sample(range(len(own)), len(own))
            inputs.append(operator.inputs(own, dtype=random.choice(DTYPES), device=device)[0].permute(order).contiguous())
            inputs[-1] = inputs[-1].permute([order.index(i) for i in range(len(own))])
        rank = max(x.dim() for x in inputs)
        how: dict[str, Any] = {"reduction": random.choice(["none", "sum", "mean", "batchmean" if rank else "sum"])}
        if how["reduction"] in ("sum", "mean"):
            how["dim"] = random.choice([None, random.sample(range(-rank, 0), random.randint(0, rank))])
            how["keepdim"] = random.choice([False, True])
        how["dtype"] = random.choice([None, *DTYPES])
        value = operator(*inputs, **how)
        grad_output = torch.randn_like(value)
        dtype = how.pop("dtype")
        mask = [random.random() < 0.75 for _ in inputs]
        gradients = operator.backward(grad_output, *inputs, mask=mask, **how)
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False) if symbolic else FakeTensorMode()
        with mode:
            fakes = [mode.from_tensor(x) for x in (grad_output, *inputs)]
            results = [operator(*fakes[1:], **how, dtype=dtype), *operator.backward(*fakes, mask=mask, **how)]
        for fake, real in zip(results, [value, *gradients], strict=True):
            assert meta_of(fake) == meta_of(real), f"{how} of {[meta_of(x) for x in inputs]}"


@each_reducing_operator
@each_reduction
def test_fake_cuda_tensors_give_cuda_results_without_a_gpu(operator: Operator, how: dict[str, Any]) -> None:
    with FakeTensorMode():
        inputs = [
            torch.randn(shape, device="cuda" if shape else "cpu", dtype=torch.float16) for shape in SHAPES["prior of scalars"]
        ]
        value = operator(*inputs, **how)
        assert (value.device, value.dtype) == (torch.device("cuda:0"), torch.float16)
        assert operator(*inputs[:2], *operator.numbers, **how).device == value.device
        for x, g in zip(inputs, operator.backward(value, *inputs, **how), strict=True):
            assert meta_of(g) == meta_of(x)


@each_reducing_operator
@each_reduction
def test_fake_gradients_ask_nothing_of_stand_ins(operator: Operator, how: dict[str, Any]) -> None:
    """Compiled autograd captures with CPU tensors of no size for gradients and for saved tensors that were packed."""
    with FakeTensorMode():
        stand_in = torch.randn(0, 123456789)
        inputs = [torch.randn(shape, device="cuda") for shape in SHAPES["prior [D]"]]
        for i in range(-1, len(inputs)):
            saved = [stand_in if i == j else x for j, x in enumerate(inputs)]
            gradients = operator.backward(stand_in, *saved, **how)
            assert [meta_of(gradient) for gradient in gradients] == [meta_of(x) for x in saved]


@each_reducing_operator
def test_numbers_for_q_are_filled_on_the_device_of_the_tensors(
    operator: Operator,
) -> None:
    """CUDA graphs hold no tensor of the CPU, and nothing is copied from it."""
    for dtype in DTYPES:
        with FakeTensorMode():
            mu, log_var = (torch.randn(2, 3, device="cuda", dtype=dtype) for _ in range(2))
            graph = make_fx(lambda *x: operator(*x, 0.5, Fraction(1, 4), reduction="sum"))(mu, log_var)
        made = [node for node in graph.graph.nodes if node.op == "call_function" and node.target != operator.operator]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert [node.target for node in made] == [torch.ops.aten.full.default] * 2
        assert [node.args[1] for node in made] == [0.5, 0.25]
        assert [(node.meta["val"].device.type, node.meta["val"].dtype) for node in made] == [("cuda", wide)] * 2
