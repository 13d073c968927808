"""Weighted terms compiled, exported, traced and under autocast: the bits of eager, and fake results like real ones."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._inductor.utils import fresh_inductor_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad
from torch.export import Dim, export
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from kl_ext import gaussian_kl_div, normal_kl_div
from meta import meta_of
from operators import DTYPES, GAUSSIAN, NORMAL, Operator, each_reducing_operator
from oracle import same_bits
from weight_cases import REDUCTIONS, SHAPES, WEIGHT_DTYPES, each_reduction, mask, some_weight, spoiled


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


def step(function: Callable[..., Tensor], leaves: Sequence[Tensor], weight: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    value = function(weight, *leaves)
    return (value.detach(), *grad(value, leaves, grad_output))


def of(operator: Operator, how: dict[str, Any]) -> Callable[..., Tensor]:
    def function(weight: Tensor, *inputs: Tensor) -> Tensor:
        return operator.function(*inputs, weight=weight, **how)

    return function


@each_reducing_operator
@each_reduction
def test_compiled_value_and_gradients_have_the_bits_of_eager(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """In one static graph, and in one dynamic graph for every size; with garbage in what is left out."""
    function = of(operator, how)
    sizes = {(2, 3, 4): torch.bool, (2, 1, 4): torch.float32}
    size, dtype = random.choice(list(sizes.items()))
    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for scale in (1, 2, 3) if dynamic else (1,):
            shapes = [tuple(n * scale for n in shape) for shape in SHAPES["prior [D]"]]
            inputs = operator.inputs(*shapes, dtype=torch.float32, device=device)
            weight = some_weight([n if n == 1 else n * scale for n in size], dtype, device)
            leaves = [x.requires_grad_() for x in spoiled(inputs, weight)]
            grad_output = torch.randn_like(function(weight, *leaves))
            with torch.compiler.set_stance("default" if scale == 1 else "fail_on_recompile"):
                actual = step(compiled, leaves, weight, grad_output)
            assert_same(actual, step(function, leaves, weight, grad_output))


def test_a_training_step_with_a_mask_of_lengths_compiles_by_inductor(device: torch.device) -> None:
    encoder = torch.nn.Linear(6, 8).to(device)

    def loss(x: Tensor, lengths: Tensor) -> Tensor:
        mu, log_var = encoder(x).chunk(2, -1)
        keep = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        of_log_var = gaussian_kl_div(mu, log_var, weight=keep, reduction="mean")
        return of_log_var + normal_kl_div(mu, log_var.exp(), weight=keep, reduction="mean")

    x, lengths = torch.randn(5, 7, 6, device=device), torch.tensor([7, 3, 1, 2, 0], device=device)
    parameters = list(encoder.parameters())
    with fresh_inductor_cache():
        actual, expected = torch.compile(loss, backend="inductor", fullgraph=True)(x, lengths), loss(x, lengths)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grad(actual, parameters), grad(expected, parameters))


@each_reducing_operator
@pytest.mark.parametrize("how", [REDUCTIONS["none"], REDUCTIONS["mean"], REDUCTIONS["sum of 0 and 2"]], ids=str)
def test_an_exported_weighted_reduction_serves_other_sizes_and_survives_saving(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    class Loss(torch.nn.Module):
        def forward(self, weight: Tensor, *inputs: Tensor) -> Tensor:
            return operator.function(*inputs, weight=weight, **how)

    def arguments(rows: int) -> tuple[Tensor, ...]:
        inputs = operator.inputs((rows, 3, 4), (rows, 3, 4), (4,), (4,), dtype=torch.float32, device=device)
        return mask((rows, 1, 4), device), *inputs

    rows = Dim("rows", min=2, max=64)
    program = export(Loss(), arguments(2), dynamic_shapes=({0: rows}, ({0: rows}, {0: rows}, None, None)))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for served in (program, torch.export.load(file).run_decompositions()):
        own = [n.target for n in served.graph.nodes if getattr(n.target, "namespace", None) == "kl_ext"]
        assert own == [operator.operator]
        weight, *inputs = arguments(7)
        assert same_bits(served.module()(weight, *inputs), operator.function(*inputs, weight=weight, **how))


@each_reducing_operator
@each_reduction
def test_a_compiled_backward_of_an_eager_forward_has_the_bits_of_eager(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    """Whichever gradients are wanted, of one capture each; and a hook that packs what is saved."""
    graphs: list[GraphModule] = []

    def compile_backward(graph: GraphModule) -> Callable[..., Any]:
        graphs.append(graph)
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    inputs = operator.inputs(*SHAPES["prior [D]"], dtype=torch.float32, device=device)
    for size, dtype, wanted in (((2, 3, 4), torch.float32, range(4)), ((2, 1, 4), torch.bool, (0, 3))):
        weight = some_weight(size, dtype, device)
        given = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        leaves = [x for x in given if x.requires_grad]
        value = operator.function(*given, weight=weight, **how)
        grad_output = torch.randn_like(value)
        expected = grad(value, leaves, grad_output, retain_graph=True)
        with compiled_autograd._enable(compile_backward, dynamic=True):
            assert_same(grad(value, leaves, grad_output), expected)
    assert len(graphs) == 2 and all(operator.backward_operator in [n.target for n in g.graph.nodes] for g in graphs)


def test_a_captured_backward_is_never_used_for_another_weight(device: torch.device) -> None:
    """With and without one, of other dtypes and shapes; other numbers in it are no other weight."""
    leaves = GAUSSIAN.inputs((3, 4), (3, 4), dtype=torch.float32, device=device, requires_grad=True)
    kinds = [
        None,
        ((3, 4), torch.bool),
        ((3, 4), torch.float32),
        ((3, 1), torch.bool),
        ((4,), torch.float16),
        ((), torch.float32),
    ]
    weights = [None if kind is None else some_weight(*kind, device=device) for kind in kinds for _ in range(2)]
    steps = [(w, how) for w in weights for how in ({"reduction": "sum"}, {"reduction": "mean"})]

    def gradients(weight: Tensor | None, how: dict[str, Any]) -> tuple[Tensor, ...]:
        return grad(GAUSSIAN.function(*leaves, weight=weight, **how), leaves)

    expected = [gradients(*s) for s in steps]
    graphs: list[GraphModule] = []
    with compiled_autograd._enable(lambda graph: graphs.append(graph) or torch.compile(graph, backend="eager"), dynamic=True):
        for _ in range(2):
            for s, e in zip(steps, expected, strict=True):
                assert_same(gradients(*s), e)
    assert len(graphs) <= len(steps) // 2


# Autocast


@each_reducing_operator
@pytest.mark.parametrize("of_weight", WEIGHT_DTYPES, ids=str)
def test_autocast_gives_float32_and_float64_stays(operator: Operator, of_weight: torch.dtype, device: torch.device) -> None:
    for dtype in DTYPES:
        leaves = operator.inputs(*SHAPES["prior [D]"], dtype=dtype, device=device, requires_grad=True)
        weight = some_weight((2, 3, 1), of_weight, device)
        wide = torch.float64 if torch.float64 in (dtype, of_weight) else torch.float32
        for how in REDUCTIONS.values():
            expected = operator.function(*leaves, weight=weight, **how, dtype=wide)
            grad_output = torch.randn_like(expected)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                value = operator.function(*leaves, weight=weight, **how)
            assert same_bits(value.detach(), expected.detach())
            pairs = (grad(x, leaves, grad_output) for x in (value, expected))
            for a, e in zip(*pairs, strict=True):
                assert a.dtype == dtype and same_bits(a, e)


# opcheck, and fake tensors

Sample = Callable[[Operator], list[Tensor]]
SAMPLES: dict[str, tuple[Sample, tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "none": (lambda d: d.inputs((2, 3), (2, 3)), (2, 3), torch.bool, {}),
    "broadcast, none": (lambda d: d.inputs((2, 1, 3), (4, 1), (3,), ()), (4, 1), torch.float16, {}),
    "permuted, none": (lambda d: [x.permute(2, 0, 1) for x in d.inputs(*[(2, 3, 4)] * 2)], (4, 1, 3), torch.float64, {}),
    "prior, sum of 0": (lambda d: d.inputs((4, 3), (4, 3), (3,), (3,)), (4, 1), torch.bool, {"reduction": "sum", "dim": [0]}),
    "half, mean": (
        lambda d: d.inputs((5, 3), (3,), dtype=torch.float16),
        (5, 1),
        torch.float32,
        {"reduction": "mean", "dim": [1], "keepdim": True},
    ),
    "the middle, batchmean": (
        lambda d: d.inputs((2, 3, 4), (2, 3, 4), (2, 1, 4), (1, 3, 1)),
        (3, 4),
        torch.bfloat16,
        {"reduction": "batchmean"},
    ),
    "zero-size, mean": (lambda d: d.inputs((0, 3), (3,)), (3,), torch.bool, {"reduction": "mean", "dim": [1]}),
    "zero-dim, mean": (lambda d: d.inputs((), ()), (), torch.float64, {"reduction": "mean"}),
}
each_sample = pytest.mark.parametrize("sample, size, dtype, how", SAMPLES.values(), ids=SAMPLES.keys())


@each_reducing_operator
@each_sample
def test_both_operators_pass_opcheck(
    operator: Operator, sample: Sample, size: Any, dtype: torch.dtype, how: dict[str, Any], device: torch.device
) -> None:
    inputs = [x.to(device).requires_grad_() for x in sample(operator)]
    weight = torch.ones(size, dtype=dtype, device=device)
    arguments = (*inputs, *[None] * (4 - len(inputs)), weight)
    assert set(opcheck(operator.operator, arguments, how).values()) == {"SUCCESS"}
    plain = [x.detach() for x in inputs]
    grad_output = torch.randn_like(operator.function(*plain, weight=weight, **how))
    backward = operator.backward_arguments(grad_output, plain, weight, how, [True] * len(inputs))
    # Without autograd registration's test where a gradient is None: it would differentiate that.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(opcheck(operator.backward_operator, backward, test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbols"])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_the_real_ones(symbolic: bool, device: torch.device) -> None:
    for _ in range(20 if symbolic else 100):
        operator = random.choice([GAUSSIAN, NORMAL])
        shape = [random.choice([0, 1, 2, 3, 4]) for _ in range(random.randint(0, 4))]
        tensors = []
        for i in range(random.choice([2, 4]) + 1):
            own = [n if random.random() < 0.7 else 1 for n in shape[random.choice([0, 0, 0, 1]) :]]
            order = random.sample(range(len(own)), len(own))
            x = torch.rand(own, device=device).to(random.choice(DTYPES if i else WEIGHT_DTYPES))
            tensors.append(x.permute(order).contiguous().permute([order.index(j) for j in range(len(own))]))
        weight, *inputs = tensors
        terms = torch.broadcast_shapes(*(x.shape for x in inputs))
        if torch.broadcast_shapes(terms, weight.shape) != terms:
            weight = weight.flatten()[:1].view([]) if weight.numel() else torch.ones((), device=device)
        how: dict[str, Any] = {"reduction": random.choice(["none", "sum", "mean", "batchmean" if terms else "sum"])}
        if how["reduction"] in ("sum", "mean"):
            how["dim"] = random.choice([None, random.sample(range(-len(terms), 0), random.randint(0, len(terms)))])
            how["keepdim"] = random.choice([False, True])
        dtype = random.choice([None, *DTYPES])
        value = operator.function(*inputs, weight=weight, **how, dtype=dtype)
        grad_output = torch.randn_like(value)
        wanted = [random.random() < 0.75 for _ in inputs]
        gradients = operator.backward(grad_output, *inputs, weight=weight, mask=wanted, **how)
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False) if symbolic else FakeTensorMode()
        with mode:
            fake_weight, fake_grad, *fakes = [mode.from_tensor(x) for x in (weight, grad_output, *inputs)]
            results = [
                operator.function(*fakes, weight=fake_weight, **how, dtype=dtype),
                *operator.backward(fake_grad, *fakes, weight=fake_weight, mask=wanted, **how),
            ]
        for fake, real in zip(results, [value, *gradients], strict=True):
            assert meta_of(fake) == meta_of(real), f"{how} of {[meta_of(x) for x in tensors]}"
