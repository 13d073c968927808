"""The operators on devices that have no kernels of ours, such as MPS and XPU: the formulas of kl_ext/reference.py behind the
checks that every device has, and autocast. Autograd and batching, which are above a kernel, are as everywhere."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _fake, reference
from ._checks import common_device
from ._operators import OPERATORS, Call, Operator

# Dispatch keys of devices whose tensors have strides and memory.
DEVICES = ("HPU", "MAIA", "MPS", "MTIA", "PrivateUse1", "XPU")


@functools.cache
def _warn(device_type: str) -> None:
    """Once in a process."""
    warnings.warn(
        f"kl_ext has no kernels for {device_type} and uses plain torch formulas there: near the prior they lose digits of "
        "values and gradients, and they do not give the bits of kl_ext's kernels",
        stacklevel=2,
    )


def _arithmetic(call: Call, *others: Tensor) -> torch.dtype:
    """float32, or float64 where torch's promotion gives it. A 0-dim tensor of that dtype from the CPU may come to a device that
    does not have it."""
    promoted = _fake.result_dtype([*others, *call.tensors.values()])
    return functools.reduce(torch.promote_types, [torch.float32, promoted, call.dtype or promoted])


def _converted(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return x.to(torch.bool if x.dtype == torch.bool else dtype).to(device)


def _clamp(x: Tensor, clamp_min: float, clamp_max: float) -> Tensor:
    """The gradient passes at the bounds; that of torch.clamp does not in every version of torch."""
    clamped = x.detach().clamp(clamp_min, clamp_max)
    return torch.where(clamped == x, x, clamped)


def _formula(operator: Operator, call: Call, inputs: dict[str, Tensor], weight: Tensor | None) -> Tensor:
    how: dict[str, Any] = dict.fromkeys(call.clamp)  # None: no bound
    if call.clamp:
        inputs = {name: _clamp(x, **call.clamp) if name.startswith("log_var") else x for name, x in inputs.items()}
    if operator.reduces:
        how |= {"weight": weight, "reduction": call.reduction, "dim": call.dim or None, "keepdim": call.keepdim}
    result: Tensor = getattr(reference, operator.name)(**inputs, **how)
    return result


def _forward(operator: Operator) -> Callable[..., Tensor]:
    allocate = _fake.forward(operator)

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        result = allocate(*args, **kwargs)
        _warn(result.device.type)
        call = operator.read(operator.forward, args, kwargs)
        dtype = _arithmetic(call)
        inputs = {name: _converted(x, dtype, result.device) for name, x in call.inputs.items()}
        weight = None if call.weight is None else _converted(call.weight, dtype, result.device)
        return result.copy_(_formula(operator, call, inputs, weight))

    return kernel


def _write_gradients(operator: Operator, call: Call, gradients: dict[str, Tensor]) -> None:
    assert call.grad_output is not None
    device = common_device(operator.name, {"grad_output": call.grad_output, **call.tensors})
    _warn(device.type)
    if not gradients:
        return
    dtype = _arithmetic(call, call.grad_output)
    grad_output = _converted(call.grad_output, dtype, device)
    # Autograd is off in a kernel; leaving inference mode turns it on. It takes no tensors of that mode, therefore the copies.
    with torch.inference_mode(False), forward_ad._set_fwd_grad_enabled(False):
        inputs = {name: _converted(x.detach(), dtype, device).clone() for name, x in call.inputs.items()}
        weight = None if call.weight is None else _converted(call.weight.detach(), dtype, device).clone()
        leaves = [inputs[name].requires_grad_() for name in gradients]
        result = _formula(operator, call, inputs, weight)
        computed = torch.autograd.grad(result.expand_as(grad_output), leaves, grad_output)
    for gradient, values in zip(gradients.values(), computed):
        gradient.copy_(values)


def _backward(operator: Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    allocate = _fake.backward(operator)

    def kernel(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        gradients = allocate(*args, **kwargs)
        call = operator.read(operator.backward, args, kwargs)
        _write_gradients(operator, call, {name: x for name, x in zip(operator.inputs, gradients) if x is not None})
        return gradients

    return kernel


def _backward_out(operator: Operator) -> Callable[..., None]:
    check = _fake.backward_out(operator)

    def kernel(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        call = operator.read(operator.backward_out, args, kwargs)
        _write_gradients(operator, call, {name: x for name, x in call.gradients.items() if name in call.inputs})

    return kernel


def _autocast(operator: Operator, key: str) -> Callable[..., Tensor]:
    """The result is float32, or float64 where an input is; the inputs stay as they are. As csrc/autocast.cpp has it."""
    keys = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(key))

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        call = operator.read(operator.forward, args, kwargs)
        is_double = any(x.dtype == torch.float64 for x in call.tensors.values())
        with torch._C._ExcludeDispatchKeyGuard(keys):
            result: Tensor = operator.forward(
                *args, **{**kwargs, "dtype": call.dtype or (torch.float64 if is_double else torch.float32)}
            )
        return result

    return kernel


_library = torch.library.Library("kl_ext", "FRAGMENT")  # what it registers lasts as long as it does
for _device in DEVICES:
    for _operator in OPERATORS:
        _library.impl(_operator.forward, _forward(_operator), _device)
        _library.impl(_operator.backward, _backward(_operator), _device)
        _library.impl(_operator.backward_out, _backward_out(_operator), _device)
        _library.impl(_operator.forward, _autocast(_operator, f"Autocast{_device}"), f"Autocast{_device}")
