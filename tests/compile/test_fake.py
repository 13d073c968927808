"""The fake kernels: the shapes, dtypes, devices and strides of the real ones, for whatever torch.compile may show them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from meta import meta_of
from operator_cases import subsets
from operators import (
    DTYPES,
    ELEMENTWISE,
    PAIR,
    SINGLE,
    Operator,
    each_documented_loss,
    each_elementwise_operator,
    each_operator,
)


def non_dense(shape: Sequence[int]) -> Tensor:
    return torch.randn([2 * n for n in shape])[tuple(slice(1, None, 2) for _ in shape)]


def channels_last(shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape)).contiguous(memory_format=torch.channels_last)


# Inputs in the order of the arguments; a loss of two takes the first two.
SAMPLES: dict[str, Callable[[], list[Tensor]]] = {
    "contiguous": lambda: [torch.randn(2, 3) for _ in range(4)],
    "broadcast": lambda: [torch.randn(2, 1, 3), torch.randn(4, 1), torch.randn(3), torch.randn(())],
    "prior": lambda: [torch.randn(4, 3), torch.randn(4, 3), torch.randn(3), torch.randn(3)],
    "the first is the smallest": lambda: [torch.randn(3), torch.randn(2, 3), torch.randn(()), torch.randn(5, 1, 1)],
    "promotion": lambda: [torch.randn(2, 3, dtype=d) for d in DTYPES],
    "promotion to float32": lambda: [torch.randn(2, 3).to(d) for d in (torch.float16, torch.bfloat16) * 2],
    "zero-dim of a wider type": lambda: [
        torch.randn(3).half(),
        torch.randn((), dtype=torch.float64),
        torch.randn(3).half(),
        torch.randn(()),
    ],
    "permuted": lambda: [torch.randn(2, 3, 4).permute(2, 0, 1) for _ in range(4)],
    "permuted in two ways": lambda: [torch.randn(2, 3, 4).permute(2, 0, 1), torch.randn(4, 2, 3)] * 2,
    "transposed and broadcast": lambda: [torch.randn(3, 2).t(), torch.randn(2, 1), torch.randn(3, 2).t(), torch.randn(1, 3)],
    "channels last": lambda: [channels_last((2, 3, 4, 5)) for _ in range(4)],
    "channels last and contiguous": lambda: [torch.randn(2, 3, 4, 5), channels_last((2, 3, 4, 5))] * 2,
    "channels last of one channel": lambda: [channels_last((2, 1, 4, 5)), channels_last((2, 3, 4, 5))] * 2,
    "zero-size": lambda: [torch.randn(0, 3), torch.randn(1, 3), torch.randn(3), torch.randn(0, 1)],
    "zero-dim": lambda: [torch.randn(()) for _ in range(4)],
    "non-dense": lambda: [non_dense((2, 3)) for _ in range(4)],
    "non-dense and permuted": lambda: [non_dense((2, 3)).t(), torch.randn(3, 2), non_dense((3, 2)), torch.randn(2, 3).t()],
    "chunks": lambda: list(torch.randn(2, 12).chunk(4, 1)),
    "expanded": lambda: [
        torch.randn(3).expand(2, 3),
        torch.randn(2, 1).expand(2, 3),
        torch.randn(1, 1).expand(2, 3),
        torch.randn(2, 3),
    ],
    "sizes of one": lambda: [
        torch.randn(1, 3, 1),
        torch.randn(1, 1, 1),
        torch.randn(3, 1),
        torch.randn(1, 3, 1).transpose(0, 2).mT,
    ],
}

each_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())


def sample_inputs(operator: Operator, sample: Callable[[], list[Tensor]], device: torch.device) -> tuple[Tensor, ...]:
    # Not .to(device, dtype): the layouts must stay as they are.
    return tuple(x.to(device, memory_format=torch.preserve_format) for x in sample()[: operator.count])


@each_elementwise_operator
@each_sample
def test_the_forward_operators_pass_opcheck(
    operator: Operator, sample: Callable[[], list[Tensor]], device: torch.device
) -> None:
    inputs = [x.requires_grad_() for x in sample_inputs(operator, sample, device)]
    assert set(opcheck(operator.operator, inputs).values()) == {"SUCCESS"}


@each_documented_loss
@pytest.mark.parametrize(
    "keywords", [{"clamp_min": -1.0}, {"clamp_max": 0.5, "dtype": torch.float64}, {"dtype": torch.float16}], ids=str
)
def test_the_forward_operators_pass_opcheck_with_keywords(
    operator: Operator, keywords: dict[str, object], device: torch.device
) -> None:
    inputs = [x.requires_grad_() for x in sample_inputs(operator, SAMPLES["promotion to float32"], device)]
    assert set(opcheck(operator.operator, inputs, keywords).values()) == {"SUCCESS"}


def backward_arguments(operator: Operator, inputs: Sequence[Tensor], mask: Sequence[bool]) -> tuple[object, ...]:
    grad_output = torch.randn_like(operator.operator(*(x.detach() for x in inputs)))
    return tuple(operator.backward_arguments(grad_output, inputs, mask=mask))


@each_elementwise_operator
@each_sample
def test_the_backward_operators_pass_opcheck(
    operator: Operator, sample: Callable[[], list[Tensor]], device: torch.device
) -> None:
    arguments = backward_arguments(operator, sample_inputs(operator, sample, device), [True] * operator.count)
    assert set(opcheck(operator.backward_operator, arguments).values()) == {"SUCCESS"}


@each_elementwise_operator
@pytest.mark.parametrize("name", ["contiguous", "broadcast", "promotion", "permuted in two ways", "zero-size"])
def test_the_backward_operators_pass_opcheck_where_they_are_differentiated(
    operator: Operator, name: str, device: torch.device
) -> None:
    inputs = [x.requires_grad_() for x in sample_inputs(operator, SAMPLES[name], device)]
    assert set(opcheck(operator.backward_operator, backward_arguments(operator, inputs, [True] * operator.count)).values()) == {
        "SUCCESS"
    }


@pytest.mark.parametrize(
    ("operator", "wanted"),
    [(SINGLE, w) for w in subsets(SINGLE.arguments)] + [(PAIR, w) for w in subsets(PAIR.arguments)[::3]],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_the_backward_operators_pass_opcheck_with_masks(
    operator: Operator, wanted: Sequence[str], device: torch.device
) -> None:
    inputs = sample_inputs(operator, SAMPLES["broadcast"], device)
    arguments = backward_arguments(operator, inputs, [a in wanted for a in operator.arguments])
    # Without autograd registration's test: it would differentiate the gradients that are None.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(opcheck(operator.backward_operator, arguments, test_utils=checks).values()) == {"SUCCESS"}


def random_layout(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that broadcasts to the shape: of fewer or shorter dimensions, in any order in memory, with gaps, or expanded."""
    dropped = random.randint(0, len(shape)) if random.random() < 0.3 else 0
    shape = [n if random.random() < 0.6 else 1 for n in shape[dropped:]]
    order = random.sample(range(len(shape)), len(shape))
    steps = [random.choice([1, 1, 2]) for _ in shape]
    memory = torch.randn([shape[d] * steps[d] for d in order]).to(dtype)
    tensor = memory[tuple(slice(None, None, steps[d]) for d in order)].permute([order.index(d) for d in range(len(shape))])
    if len(shape) == 4 and random.random() < 0.2:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if 1 in shape and random.random() < 0.5:
        tensor = tensor.expand([n if n != 1 or random.random() < 0.5 else 1 for n in shape])
    return tensor


def random_shape() -> list[int]:
    sizes = [1, 2, 3, 4] if random.random() < 0.9 else [0, 1, 2]
    return [random.choice(sizes) for _ in range(random.randint(0, 4))]


@each_elementwise_operator
@pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbols"])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_the_real_ones(
    operator: Operator, symbolic: bool, device: torch.device
) -> None:
    mode = FakeTensorMode()
    for _ in range(25 if symbolic else 600):
        shape = random_shape()
        inputs = [random_layout(shape, random.choice(DTYPES)).to(device) for _ in range(operator.count)]
        mask = [random.random() < 0.75 for _ in inputs]
        result = operator.operator(*inputs)
        grad_output = random_layout(result.shape, random.choice(DTYPES)).to(device).expand(result.shape)
        gradients = operator.backward_operator(*operator.backward_arguments(grad_output, inputs, mask=mask))
        if symbolic:
            mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
        with mode:
            fakes = [mode.from_tensor(x) for x in (grad_output, *inputs)]
            fake_result = operator.operator(*fakes[1:])
            fake_gradients = operator.backward_operator(*operator.backward_arguments(fakes[0], fakes[1:], mask=mask))
        assert isinstance(fake_result, FakeTensor)
        layouts = [meta_of(x) for x in inputs]
        assert meta_of(fake_result) == meta_of(result), f"the result for {layouts}"
        for fake, real in zip(fake_gradients, gradients, strict=True):
            assert meta_of(fake) == meta_of(real), f"a gradient for {layouts}"


@each_operator
def test_results_on_the_meta_device_have_the_shapes_dtypes_and_strides_of_the_real_ones(operator: Operator) -> None:
    for sample in SAMPLES.values():
        inputs = sample()[: operator.count]
        metas = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in inputs]
        arguments = backward_arguments(operator, inputs, [True] * operator.count)
        result, real = operator.operator(*metas), operator.operator(*inputs)
        assert result.is_meta
        assert meta_of(result)[:3] == meta_of(real)[:3]
        grad_output = torch.empty_like(result)
        for fake, real in zip(
            operator.backward(grad_output, *metas),
            operator.backward_operator(*arguments),
            strict=True,
        ):
            assert meta_of(fake)[:3] == meta_of(real)[:3]


# Without gradients: torch itself cannot record a graph of fake CUDA tensors where there is no GPU.


@each_operator
def test_fake_cuda_tensors_give_cuda_results_without_a_gpu(operator: Operator) -> None:
    with FakeTensorMode():
        inputs = [torch.randn(2, 3, device="cuda", dtype=d) for d in DTYPES[: operator.count]]
        result = operator.function(*inputs)
        assert (result.device, result.shape) == (torch.device("cuda:0"), (2, 3))
        for x, gradient in zip(inputs, operator.backward(result, *inputs), strict=True):
            assert meta_of(gradient) == meta_of(x)


@each_operator
def test_fake_zero_dim_cpu_tensors_go_beside_cuda_tensors(operator: Operator) -> None:
    for cuda in subsets(operator.arguments):
        with FakeTensorMode():
            inputs = [
                torch.randn(3, device="cuda") if a in cuda else torch.randn((), dtype=torch.float64) for a in operator.arguments
            ]
            result = operator.function(*inputs)
            assert meta_of(result) == ((3,), torch.float32, [1], torch.device("cuda:0"))
            for x, gradient in zip(inputs, operator.backward(result, *inputs), strict=True):
                assert meta_of(gradient) == meta_of(x)


@each_operator
def test_fake_gradients_ask_nothing_of_stand_ins(operator: Operator) -> None:
    """Compiled autograd captures with CPU tensors of no size for gradients and for saved tensors that were packed."""
    with FakeTensorMode():
        stand_in = torch.randn(0, 123456789)
        for packed in (subset for subset in [(), *subsets(operator.arguments)] if subset != tuple(operator.arguments)):
            inputs = [stand_in if a in packed else torch.randn(2, 3, device="cuda") for a in operator.arguments]
            gradients = operator.backward(stand_in, *inputs)
            assert [meta_of(gradient) for gradient in gradients] == [meta_of(x) for x in inputs]


@each_elementwise_operator
@pytest.mark.parametrize(
    "spoil",
    [
        lambda inputs: [inputs[0].long(), *inputs[1:]],
        lambda inputs: [*inputs[:-1], inputs[-1].bool()],
        lambda inputs: [*inputs[:-1], inputs[-1].to(torch.complex64)],
        lambda inputs: [*inputs[:-1], torch.zeros(4)],
    ],
    ids=["int64", "bool", "complex64", "shape"],
)
def test_fake_tensors_are_refused_with_the_message_of_real_ones(
    operator: Operator, spoil: Callable[[Sequence[Tensor]], list[Tensor]]
) -> None:
    def refusal(inputs: Sequence[Tensor], **bounds: float) -> tuple[type, str]:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
            operator.operator(*inputs, **bounds)
        return raised.type, str(raised.value).splitlines()[0]

    inputs = operator.inputs([2, 3])
    spoiled = spoil(inputs)
    swapped = {"clamp_min": 1.0, "clamp_max": 0.0}
    expected = refusal(spoiled), refusal(inputs, **swapped)
    with FakeTensorMode() as mode:
        assert (
            refusal([mode.from_tensor(x) for x in spoiled]),
            refusal([mode.from_tensor(x) for x in inputs], **swapped),
        ) == expected


@each_elementwise_operator
def test_symbolic_tracing_keeps_the_operators_and_serves_other_sizes(operator: Operator, device: torch.device) -> None:
    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(operator.function(*leaves).sum(), leaves)

    for mode in ("fake", "symbolic"):
        graph = make_fx(step, tracing_mode=mode)(*operator.inputs([2, 3], [3], device=device))
        targets = [node.target for node in graph.graph.nodes]
        assert operator.operator in targets
        assert operator.backward_operator in targets
        inputs = operator.inputs([5, 4] if mode == "symbolic" else [2, 3], [4] if mode == "symbolic" else [3], device=device)
        for a, e in zip(graph(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-14, atol=1e-14)


def test_the_samples_hold_what_they_are_named_for() -> None:
    assert {len(sample()) for sample in SAMPLES.values()} == {4}
    assert all(not x.is_contiguous() for x in SAMPLES["permuted"]())
    assert all(x.stride(-1) == 2 for x in SAMPLES["non-dense"]())
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in SAMPLES["channels last"]())
    assert max(operator.count for operator in ELEMENTWISE) == 4
