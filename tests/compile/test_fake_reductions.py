"""The fake kernels of the operators that reduce: opcheck, and results like those of the real ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from meta import meta_of
from operators import DTYPES, Operator, each_reducing_operator
from reduction_cases import SHAPES, each_reduction

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
def test_a_reduction_passes_opcheck(operator: Operator, sample: Make, how: dict[str, Any], device: torch.device) -> None:
    inputs = [x.to(device).requires_grad_() for x in sample(operator)]
    assert set(opcheck(operator.operator, inputs, operator.taken(how)).values()) == {"SUCCESS"}


@each_reducing_operator
@each_sample
def test_the_backward_of_a_reduction_passes_opcheck(
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


@each_reducing_operator
@pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbols"])
def test_fake_reductions_have_the_shapes_dtypes_and_strides_of_the_real_ones(
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
def test_reductions_of_fake_cuda_tensors_give_cuda_results_without_a_gpu(operator: Operator, how: dict[str, Any]) -> None:
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
def test_fake_gradients_of_reductions_ask_nothing_of_stand_ins(operator: Operator, how: dict[str, Any]) -> None:
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
