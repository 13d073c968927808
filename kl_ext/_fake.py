"""What the operators return without computing it (shapes, dtypes, devices, strides): for compilation, export, fake tensors."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides
from torch._subclasses.fake_tensor import FakeTensor

from ._checks import (
    check_expand,
    check_grad_output,
    check_gradients,
    check_reduction,
    check_weight_shape,
    common_device,
    common_shape,
    kept_sizes,
    reduced_dims,
)
from ._operators import OPERATORS, Call, Operator


def result_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype by torch's promotion: 0-dim tensors count only if there are no others, bool never beside floats."""
    floating = [tensor for tensor in tensors if tensor.dtype != torch.bool]
    dtypes = [tensor.dtype for tensor in floating if tensor.dim() > 0] or [tensor.dtype for tensor in floating]
    return functools.reduce(torch.promote_types, dtypes)


def arithmetic_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the arithmetic: float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _is_one(size: int) -> bool:
    """Whether a size is 1. A size known only at run time is assumed not to be, as in torch's own operators."""
    if isinstance(size, int):
        return size == 1
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loads sympy

    return guard_or_false(size == 1)


def _broadcast(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Expanded as TensorIterator sees it: stride 0 wherever a dimension is new or stretched, also where its size is 1."""
    new = len(shape) - tensor.dim()
    own = [
        0 if _is_one(size) and not _is_one(full) else stride
        for size, full, stride in zip(tensor.shape, shape[new:], tensor.stride())
    ]
    return tensor.as_strided(shape, [0] * new + own)


def _elementwise(tensors: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    strides = compute_elementwise_output_strides(*(_broadcast(tensor, shape) for tensor in tensors))
    return torch.empty_strided(shape, strides, dtype=dtype or result_dtype(tensors), device=device)


def forward(operator: Operator) -> Callable[..., Tensor]:
    def fake(*args: Any, **kwargs: Any) -> Tensor:
        call = operator.read(operator.forward, args, kwargs)
        device = common_device(operator.name, call.tensors)
        shape = common_shape(operator.name, call.inputs)
        if call.weight is not None:
            check_weight_shape(operator.name, call.weight, shape)
        reduced = reduced_dims(operator.name, call.reduction, call.dim, len(shape))
        tensors = list(call.tensors.values())
        if call.reduction == "none":
            return _elementwise(tensors, shape, call.dtype, device)
        sizes = kept_sizes(shape, reduced, call.keepdim)
        return torch.empty(sizes, dtype=call.dtype or result_dtype(tensors), device=device)

    return fake


def _check_backward(operator: Operator, call: Call) -> None:
    """No shape is looked at, and no device of a fake tensor: compiled autograd captures backward passes with stand-ins for
    gradients and for what saved-tensor hooks unpack, of a shape of their own and on the CPU. What it captured is traced again
    with tensors that are as they will be, and the operators themselves refuse what does not go together.
    """
    name = f"{operator.name}_backward"
    assert call.grad_output is not None
    if operator.reduces:
        check_reduction(name, call.reduction, call.dim)
    if isinstance(call.grad_output, FakeTensor):
        return
    # Then some tensor is on the meta device.
    if not operator.reduces:
        common_device(name, {"grad_output": call.grad_output, **call.inputs})
        check_expand(name, call.grad_output, call.inputs)
        return
    common_device(name, call.tensors)
    shape = common_shape(name, call.inputs)
    if call.weight is not None:
        check_weight_shape(name, call.weight, shape)
    reduced = reduced_dims(name, call.reduction, call.dim, len(shape))
    check_grad_output(name, call.grad_output, call.inputs, kept_sizes(shape, reduced, call.keepdim))


def backward(operator: Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    def fake(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        call = operator.read(operator.backward, args, kwargs)
        _check_backward(operator, call)
        wanted = zip(operator.inputs, call.output_mask, strict=True)
        return tuple(
            torch.empty_like(call.inputs[name]) if is_wanted and name in call.inputs else None for name, is_wanted in wanted
        )

    return fake


def backward_out(operator: Operator) -> Callable[..., None]:
    """Checks everything and returns nothing."""

    def fake(*args: Any, **kwargs: Any) -> None:
        call = operator.read(operator.backward_out, args, kwargs)
        _check_backward(operator, call)
        assert call.grad_output is not None
        name = f"{operator.name}_backward"
        shape = common_shape(name, call.inputs) if operator.reduces else call.grad_output.shape
        gradients = {key: gradient for key, gradient in call.gradients.items() if key in call.inputs}
        check_gradients(name, call.inputs, {"grad_output": call.grad_output, **call.tensors}, gradients, shape)

    return fake


for _operator in OPERATORS:
    torch.library.register_fake(_operator.forward.name())(forward(_operator))
    torch.library.register_fake(_operator.backward.name())(backward(_operator))
    torch.library.register_fake(_operator.backward_out.name())(backward_out(_operator))
