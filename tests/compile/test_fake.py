"""The fake kernels: the shapes, dtypes, devices and strides of the real ones, for whatever torch.compile may show them.

What they refuse, and in which words, is in tests/errors/test_errors_without_numbers.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from meta import meta_of
from operator_cases import subsets
from operators import DTYPES, OPERATORS, PAIR, SINGLE, Operator, each_operator, each_reducing_operator
from oracle import same_bits
from reduction_cases import SHAPES, each_operator_and_reduction
from weight_cases import WEIGHT_DTYPES

HALF, BFLOAT16, FLOAT, DOUBLE = DTYPES


def dense(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    """Positive, as deviations are."""
    return (torch.rand(shape) + 0.5).to(dtype)


def non_dense(*shape: int) -> Tensor:
    return dense(*(2 * n for n in shape))[tuple(slice(1, None, 2) for _ in shape)]


def channels_last(*shape: int) -> Tensor:
    return dense(*shape).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Sample:
    """Inputs in the order of the arguments: as many as the operator has, or these first ones. A weight of that size and dtype
    goes to an operator that takes one, after a call without."""

    tensors: Callable[[], Sequence[Tensor]]
    how: dict[str, Any] = field(default_factory=dict)
    weight: tuple[tuple[int, ...], torch.dtype] | None = None
    count: int | None = None

    def suits(self, operator: Operator) -> bool:
        return self.count is None or self.count in operator.counts

    def inputs(self, operator: Operator, device: torch.device) -> list[Tensor]:
        # Not .to(device, dtype): the layouts must stay as they are.
        return [x.to(device, memory_format=torch.preserve_format) for x in self.tensors()[: self.count or operator.count]]

    def weights(self, operator: Operator, device: torch.device) -> list[Tensor | None]:
        if self.weight is None or not operator.reduces:
            return [None]
        size, dtype = self.weight
        return [None, torch.ones(size, dtype=dtype, device=device)]


SAMPLES = {
    "contiguous": Sample(lambda: [dense(2, 3) for _ in range(4)]),
    "broadcast": Sample(lambda: [dense(2, 1, 3), dense(4, 1), dense(3), dense()], {"clamp_max": 0.75}, ((4, 1), HALF)),
    "prior": Sample(
        lambda: [dense(4, 3), dense(4, 3), dense(3), dense(3)], {"reduction": "sum", "dim": [0]}, ((4, 1), torch.bool)
    ),
    "the first is the smallest": Sample(
        lambda: [dense(3), dense(2, 3), dense(), dense(5, 1, 1)], {"reduction": "sum", "dim": [1]}
    ),
    "promotion": Sample(lambda: [dense(2, 3, dtype=d) for d in DTYPES], {"reduction": "sum"}),
    "promotion to float32": Sample(
        lambda: [dense(2, 3, dtype=d) for d in (HALF, BFLOAT16) * 2],
        {"clamp_min": 0.75, "dtype": DOUBLE, "reduction": "batchmean"},
    ),
    "zero-dim of a wider type": Sample(lambda: [dense(3, dtype=HALF), dense(dtype=DOUBLE), dense(3, dtype=HALF), dense()]),
    "permuted": Sample(lambda: [dense(2, 3, 4).permute(2, 0, 1) for _ in range(4)], {"dtype": FLOAT}, ((4, 1, 3), DOUBLE)),
    "permuted in two ways": Sample(lambda: [dense(2, 3, 4).permute(2, 0, 1), dense(4, 2, 3)] * 2),
    "transposed and broadcast": Sample(lambda: [dense(3, 2).t(), dense(2, 1), dense(3, 2).t(), dense(1, 3)]),
    "channels last": Sample(
        lambda: [channels_last(2, 3, 4, 5) for _ in range(4)], {"reduction": "mean", "dim": [0, 2, -1], "dtype": HALF}
    ),
    "channels last and contiguous": Sample(lambda: [dense(2, 3, 4, 5), channels_last(2, 3, 4, 5)] * 2),
    "channels last of one channel": Sample(lambda: [channels_last(2, 1, 4, 5), channels_last(2, 3, 4, 5)] * 2),
    "the middle": Sample(
        lambda: [dense(2, 3, 4), dense(2, 3, 4), dense(2, 1, 4), dense(1, 3, 1)],
        {"reduction": "batchmean"},
        ((3, 4), BFLOAT16),
    ),
    "zero-size": Sample(lambda: [dense(0, 3), dense(1, 3), dense(3), dense(0, 1)], {"reduction": "sum", "dim": [0]}),
    "zero-dim": Sample(lambda: [dense() for _ in range(4)], {"reduction": "mean"}, ((), DOUBLE)),
    "non-dense": Sample(lambda: [non_dense(2, 3) for _ in range(4)]),
    "non-dense and permuted": Sample(lambda: [non_dense(2, 3).t(), dense(3, 2), non_dense(3, 2), dense(2, 3).t()]),
    "chunks": Sample(lambda: dense(2, 12).chunk(4, 1), {"reduction": "mean", "dim": [-1]}),
    "expanded": Sample(lambda: [dense(3).expand(2, 3), dense(2, 1).expand(2, 3), dense(1, 1).expand(2, 3), dense(2, 3)]),
    "sizes of one": Sample(lambda: [dense(1, 3, 1), dense(1, 1, 1), dense(3, 1), dense(1, 3, 1).transpose(0, 2).mT]),
    "two": Sample(lambda: [dense(2, 3), dense(2, 3)], {}, ((2, 3), torch.bool), count=2),
    "two, half": Sample(
        lambda: [dense(5, 3, dtype=HALF), dense(3, dtype=HALF)], {"reduction": "batchmean", "dtype": DOUBLE}, count=2
    ),
    "two, half, kept": Sample(
        lambda: [dense(5, 3, dtype=HALF), dense(3, dtype=HALF)],
        {"reduction": "mean", "dim": [1], "keepdim": True},
        ((5, 1), FLOAT),
        count=2,
    ),
    "two, zero-size": Sample(lambda: [dense(0, 3), dense(3)], {"reduction": "mean", "dim": [1]}, ((3,), torch.bool), count=2),
}
DIFFERENTIATED = ("contiguous", "broadcast", "promotion", "permuted in two ways", "zero-size", "the middle")


def each_operator_and_sample(*names: str) -> pytest.MarkDecorator:
    calls = {
        f"{operator}-{name}": (operator, SAMPLES[name])
        for operator in OPERATORS
        for name in names
        if SAMPLES[name].suits(operator)
    }
    return pytest.mark.parametrize(("operator", "sample"), calls.values(), ids=calls.keys())


def forward_arguments(operator: Operator, inputs: Sequence[Tensor], weight: Tensor | None) -> list[Any]:
    return [*inputs, *[None] * (operator.count - len(inputs)), weight] if operator.reduces else list(inputs)


def backward_arguments(
    operator: Operator,
    inputs: Sequence[Tensor],
    weight: Tensor | None = None,
    how: dict[str, Any] | None = None,
    mask: Sequence[bool] | None = None,
) -> list[Any]:
    how = how or {}
    value = operator.operator(*forward_arguments(operator, [x.detach() for x in inputs], weight), **operator.taken(how))
    return operator.backward_arguments(torch.randn_like(value), inputs, weight, how, mask)


def assert_passes_opcheck(
    operator: torch._ops.OpOverload, arguments: Sequence[Any], how: dict[str, Any] | None = None, gives_none: bool = False
) -> None:
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not gives_none:  # which it would differentiate
        checks.append("test_autograd_registration")
    assert set(opcheck(operator, tuple(arguments), how, test_utils=checks).values()) == {"SUCCESS"}


@each_operator_and_sample(*SAMPLES)
def test_the_forward_operators_pass_opcheck(operator: Operator, sample: Sample, device: torch.device) -> None:
    for weight in sample.weights(operator, device):
        inputs = [x.requires_grad_() for x in sample.inputs(operator, device)]
        assert_passes_opcheck(operator.operator, forward_arguments(operator, inputs, weight), operator.taken(sample.how))


@each_operator_and_sample(*SAMPLES)
def test_the_backward_operators_pass_opcheck(operator: Operator, sample: Sample, device: torch.device) -> None:
    for weight in sample.weights(operator, device):
        inputs = sample.inputs(operator, device)
        arguments = backward_arguments(operator, inputs, weight, sample.how)
        assert_passes_opcheck(operator.backward_operator, arguments, gives_none=len(inputs) < operator.count)


@each_operator_and_sample(*DIFFERENTIATED)
def test_the_backward_operators_pass_opcheck_where_they_are_differentiated(
    operator: Operator, sample: Sample, device: torch.device
) -> None:
    inputs = [x.requires_grad_() for x in sample.inputs(operator, device)]
    assert_passes_opcheck(operator.backward_operator, backward_arguments(operator, inputs, None, sample.how))


@pytest.mark.parametrize(
    ("operator", "wanted"),
    [(SINGLE, w) for w in subsets(SINGLE.arguments)] + [(PAIR, w) for w in subsets(PAIR.arguments)[::3]],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_the_backward_operators_pass_opcheck_with_masks(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    inputs = SAMPLES["broadcast"].inputs(operator, device)
    arguments = backward_arguments(operator, inputs, mask=[a in wanted for a in operator.arguments])
    assert_passes_opcheck(operator.backward_operator, arguments, gives_none=True)


def random_layout(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that broadcasts to the shape: of fewer or shorter dimensions, in any order in memory, with gaps, or expanded."""
    dropped = random.randint(0, len(shape)) if random.random() < 0.3 else 0
    shape = [n if random.random() < 0.6 else 1 for n in shape[dropped:]]
    order = random.sample(range(len(shape)), len(shape))
    steps = [random.choice([1, 1, 2]) for _ in shape]
    memory = dense(*(shape[d] * steps[d] for d in order)).to(device, dtype)
    tensor = memory[tuple(slice(None, None, steps[d]) for d in order)].permute([order.index(d) for d in range(len(shape))])
    if len(shape) == 4 and random.random() < 0.2:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if 1 in shape and random.random() < 0.5:
        tensor = tensor.expand([n if n != 1 or random.random() < 0.5 else 1 for n in shape])
    return tensor


def random_shape() -> list[int]:
    sizes = [1, 2, 3, 4] if random.random() < 0.9 else [0, 1, 2]
    return [random.choice(sizes) for _ in range(random.randint(0, 4))]


def random_reduction(rank: int) -> dict[str, Any]:
    reduction = random.choice(["none", "sum", "mean", "batchmean" if rank else "sum"])
    if reduction not in ("sum", "mean"):
        return {"reduction": reduction}
    dim = random.choice([None, random.sample(range(-rank, 0), random.randint(0, rank))])
    return {"reduction": reduction, "dim": dim, "keepdim": random.choice([False, True])}


@each_operator
@pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbols"])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_the_real_ones(
    operator: Operator, symbolic: bool, device: torch.device
) -> None:
    mode = FakeTensorMode()
    for _ in range(30 if symbolic else 600):
        shape = random_shape()
        inputs = [random_layout(shape, random.choice(DTYPES), device) for _ in range(random.choice(operator.counts))]
        terms = torch.broadcast_shapes(*(x.shape for x in inputs))
        weight = random_layout(terms, random.choice(WEIGHT_DTYPES), device) if random.random() < 0.5 else None
        weight = weight if operator.reduces else None
        how = random_reduction(len(terms)) if operator.reduces else {}
        dtype = random.choice([None, *DTYPES])
        result = operator.operator(*forward_arguments(operator, inputs, weight), **how, dtype=dtype)
        grad_output = random_layout(result.shape, random.choice(DTYPES), device).expand(result.shape)
        mask = [random.random() < 0.75 for _ in inputs]
        gradients = operator.backward(grad_output, *inputs, weight=weight, mask=mask, **how)
        if symbolic:
            mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
        with mode:
            fake_grad, fake_weight, *fakes = [
                None if x is None else mode.from_tensor(x) for x in (grad_output, weight, *inputs)
            ]
            fake_result = operator.operator(*forward_arguments(operator, fakes, fake_weight), **how, dtype=dtype)
            fake_gradients = operator.backward(fake_grad, *fakes, weight=fake_weight, mask=mask, **how)
        assert isinstance(fake_result, FakeTensor)
        for fake, real in zip([fake_result, *fake_gradients], [result, *gradients], strict=True):
            assert meta_of(fake) == meta_of(real), f"{how} of {[meta_of(x) for x in (*inputs, weight)]}"


@each_operator_and_sample(*SAMPLES)
def test_results_on_the_meta_device_have_the_shapes_dtypes_and_strides_of_the_real_ones(
    operator: Operator, sample: Sample
) -> None:
    here, how = torch.device("cpu"), operator.taken(sample.how)
    for weight in sample.weights(operator, here):
        inputs = sample.inputs(operator, here)
        metas = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in inputs]
        meta_weight = None if weight is None else weight.to("meta")
        result = operator.operator(*forward_arguments(operator, metas, meta_weight), **how)
        real = operator.operator(*forward_arguments(operator, inputs, weight), **how)
        assert result.is_meta
        gradients = operator.backward(torch.empty_like(result), *metas, weight=meta_weight, **how)
        real_gradients = operator.backward(torch.randn_like(real), *inputs, weight=weight, **how)
        for fake, e in zip([result, *gradients], [real, *real_gradients], strict=True):
            assert meta_of(fake)[:3] == meta_of(e)[:3]


# Without gradients: torch itself cannot record a graph of fake CUDA tensors where there is no GPU.


@each_operator_and_reduction
def test_fake_cuda_tensors_give_cuda_results_without_a_gpu(operator: Operator, how: dict[str, Any]) -> None:
    with FakeTensorMode():
        inputs = [torch.randn(2, 3, 4, device="cuda", dtype=d) for d in DTYPES[: operator.count]]
        result = operator(*inputs, **how)
        assert (result.device, result.dtype) == (torch.device("cuda:0"), torch.promote_types(FLOAT, inputs[-1].dtype))
        if operator.numbers:
            assert operator(*inputs[:2], *operator.numbers, **how).device == result.device
        for x, gradient in zip(inputs, operator.backward(result, *inputs, **how), strict=True):
            assert meta_of(gradient) == meta_of(x)


@each_operator_and_reduction
def test_fake_zero_dim_cpu_tensors_go_beside_cuda_tensors(operator: Operator, how: dict[str, Any]) -> None:
    for cuda in subsets(operator.arguments):
        with FakeTensorMode():
            inputs = [
                torch.randn(3, 4, 5, device="cuda") if a in cuda else torch.randn((), dtype=DOUBLE) for a in operator.arguments
            ]
            result = operator(*inputs, **how)
            assert (result.device, result.dtype) == (torch.device("cuda:0"), FLOAT)
            for x, gradient in zip(inputs, operator.backward(result, *inputs, **how), strict=True):
                assert meta_of(gradient) == meta_of(x)


@each_operator_and_reduction
def test_fake_gradients_ask_nothing_of_stand_ins(operator: Operator, how: dict[str, Any]) -> None:
    """Compiled autograd captures with CPU tensors of no size for gradients and for saved tensors that were packed."""
    with FakeTensorMode():
        stand_in = torch.randn(0, 123456789)
        shapes = SHAPES["prior [D]"] if operator.reduces else SHAPES["pair"]
        for packed in [(), *subsets(operator.arguments)[:-1]]:
            inputs = [
                stand_in if a in packed else torch.randn(n, device="cuda")
                for a, n in zip(operator.arguments, shapes, strict=False)
            ]
            gradients = operator.backward(stand_in, *inputs, **how)
            assert [meta_of(gradient) for gradient in gradients] == [meta_of(x) for x in inputs]


@each_reducing_operator
def test_numbers_for_q_are_filled_on_the_device_of_the_tensors(operator: Operator) -> None:
    """CUDA graphs hold no tensor of the CPU, and nothing is copied from it."""
    for dtype in DTYPES:
        with FakeTensorMode():
            p = [torch.randn(2, 3, device="cuda", dtype=dtype) for _ in range(2)]
            graph = make_fx(lambda *x: operator(*x, 0.5, Fraction(1, 4), reduction="sum"))(*p)
        made = [node for node in graph.graph.nodes if node.op == "call_function" and node.target != operator.operator]
        wide = DOUBLE if dtype == DOUBLE else FLOAT
        assert [node.target for node in made] == [torch.ops.aten.full.default] * 2
        assert [node.args[1] for node in made] == [0.5, 0.25]
        assert [(node.meta["val"].device.type, node.meta["val"].dtype) for node in made] == [("cuda", wide)] * 2


@each_operator
def test_symbolic_tracing_keeps_the_operators_and_serves_other_sizes(operator: Operator, device: torch.device) -> None:
    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(operator(*leaves).sum(), leaves)

    for mode in ("fake", "symbolic"):
        graph = make_fx(step, tracing_mode=mode)(*operator.inputs([2, 3], [3], device=device, count=operator.count))
        targets = [node.target for node in graph.graph.nodes]
        assert operator.operator in targets
        assert operator.backward_operator in targets
        shapes = [[5, 4], [4]] if mode == "symbolic" else [[2, 3], [3]]
        inputs = operator.inputs(*shapes, device=device, count=operator.count)
        assert all(same_bits(a, e) for a, e in zip(graph(*inputs), step(*inputs), strict=True))


def test_the_samples_hold_what_they_are_named_for() -> None:
    assert {len(sample.tensors()) for sample in SAMPLES.values()} == {2, 4}
    assert all(not x.is_contiguous() for x in SAMPLES["permuted"].tensors())
    assert all(x.stride(-1) == 2 for x in SAMPLES["non-dense"].tensors())
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in SAMPLES["channels last"].tensors())
    assert max(operator.count for operator in OPERATORS) == 4
