"""Means of batches are divided by tensors of their device: by anything else, torch on a GPU multiplies with a reciprocal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._vmap_internals import _vmap as legacy_vmap
from torch.autograd import grad
from torch.func import jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from batching import no_fallback  # noqa: F401 (a fixture)
from operators import Operator, each_reducing_operator
from reduction_cases import SHAPES, each_reduction
from transform_cases import with_tangents

pytestmark = pytest.mark.usefixtures("no_fallback")


class Divisors(TorchDispatchMode):
    """Whatever anything is divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket == torch.ops.aten.div:
            self.seen.append(args[1])
        return function(*args, **kwargs or {})


@each_reducing_operator
@each_reduction
@pytest.mark.parametrize("mapped", [vmap, legacy_vmap], ids=["torch.func", "is_grads_batched"])
def test_batches_are_divided_by_tensors_of_their_device(
    operator: Operator, how: dict[str, Any], mapped: Callable[..., Any]
) -> None:
    """By a number, or a tensor of the CPU, torch on a GPU multiplies with the reciprocal: other bits than a quotient's."""
    with FakeTensorMode(), Divisors() as divisors:
        inputs = [torch.randn((5, *shape), device="cuda") for shape in SHAPES["prior [D]"]]
        grad_output = torch.randn_like(vmap(operator.with_(how))(*inputs))
        mapped(lambda *a: tuple(operator.backward(*a, **how)))(grad_output, *inputs)
    # What is left to the rules: the size of an example's first dimension, which the operators do not see.
    assert len(divisors.seen) == (2 if how.get("reduction") == "batchmean" else 0)
    for divisor in divisors.seen:
        assert isinstance(divisor, Tensor) and (divisor.device.type, divisor.shape) == ("cuda", ())


@each_reducing_operator
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_derivatives_are_divided_by_tensors_too(operator: Operator, reduction: str, device: torch.device) -> None:
    leaves = operator.inputs((3, 2), (3, 2), device=device, requires_grad=True)
    f = operator.with_({"reduction": reduction})
    with Divisors() as divisors:
        gradients = grad(f(*leaves), leaves, create_graph=True)
        assert not divisors.seen
        grad(sum(x.sum() for x in gradients), leaves)
        jvp(f, tuple(x.detach() for x in leaves), with_tangents([x.detach() for x in leaves]))
    assert len(divisors.seen) == 2
    for divisor in divisors.seen:
        assert isinstance(divisor, Tensor) and (divisor.device.type, divisor.shape) == (device.type, ())
