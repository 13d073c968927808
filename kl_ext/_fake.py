"""What the operators return without computing it (shapes, dtypes, devices, strides): for compilation, export, fake tensors."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides
from torch._subclasses.fake_tensor import FakeTensor

from ._checks import (
    check_clamp,
    check_expand,
    check_grad_output,
    check_gradients,
    check_reduction,
    check_result_dtype,
    check_tensors,
    check_together,
    common_device,
    common_shape,
    kept_sizes,
    reduced_dims,
)


def result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """As torch promotes: 0-dim tensors count only where there are no others, since all are of one category."""
    dtypes = [tensor.dtype for tensor in tensors if tensor.dim() > 0] or [tensor.dtype for tensor in tensors]
    return functools.reduce(torch.promote_types, dtypes)


def arithmetic_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """In which the operators compute: float64 if a tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _is_one(size: int) -> bool:
    """Whether a size is 1. One that is known only at run time counts as another: torch's own operators assume so too."""
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


def _check_forward(
    function: str, inputs: Mapping[str, Tensor], clamp_min: float, clamp_max: float, dtype: torch.dtype | None
) -> tuple[torch.Size, torch.device]:
    """The shape of the terms and the device."""
    check_tensors(function, inputs)
    check_clamp(function, clamp_min, clamp_max)
    check_result_dtype(function, dtype)
    device = common_device(function, inputs)
    return common_shape(function, inputs), device


def _gradients(inputs: Sequence[Tensor | None], output_mask: Sequence[bool]) -> tuple[Tensor | None, ...]:
    wanted = zip(inputs, output_mask, strict=True)
    return tuple(torch.empty_like(x) if is_wanted and x is not None else None for x, is_wanted in wanted)


def _check_backward(
    function: str, grad_output: Tensor, inputs: Mapping[str, Tensor], clamp_min: float, clamp_max: float
) -> None:
    tensors = {"grad_output": grad_output, **inputs}
    check_tensors(function, tensors)
    check_clamp(function, clamp_min, clamp_max)
    # No shape is looked at, and no device of a fake tensor: compiled autograd captures backward passes with stand-ins for
    # gradients and for what saved-tensor hooks unpack, of a shape of their own and on the CPU. What it captured is traced again
    # with tensors that are as they will be, and the operators themselves refuse what does not go together.
    if not isinstance(grad_output, FakeTensor):  # then some tensor is on the meta device
        common_device(function, tensors)
        check_expand(function, grad_output, inputs)


def _check_backward_of_divergence(
    function: str,
    grad_output: Tensor,
    inputs: Mapping[str, Tensor],
    clamp_min: float,
    clamp_max: float,
    reduction: str,
    dim: Sequence[int] | None,
    keepdim: bool,
) -> None:
    check_tensors(function, inputs)
    check_clamp(function, clamp_min, clamp_max)
    check_reduction(function, reduction, dim)
    check_tensors(function, {"grad_output": grad_output})
    if not isinstance(grad_output, FakeTensor):  # as above
        shape, _ = _check_forward(function, inputs, clamp_min, clamp_max, None)
        reduced = reduced_dims(function, reduction, dim, len(shape))
        check_grad_output(function, grad_output, inputs, kept_sizes(shape, reduced, keepdim))


def _pair(mu_p: Tensor, log_var_p: Tensor, mu_q: Tensor | None, log_var_q: Tensor | None) -> dict[str, Tensor]:
    inputs = {"mu_p": mu_p, "log_var_p": log_var_p, "mu_q": mu_q, "log_var_q": log_var_q}
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


@torch.library.register_fake("kl_ext::kl_div_single_loss")
def _(
    mu: Tensor,
    log_var: Tensor,
    *,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    inputs = {"mu": mu, "log_var": log_var}
    shape, device = _check_forward("kl_div_single_loss", inputs, clamp_min, clamp_max, dtype)
    return _elementwise((mu, log_var), shape, dtype, device)


@torch.library.register_fake("kl_ext::kl_div_pair_loss")
def _(
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor,
    log_var_q: Tensor,
    *,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    inputs = _pair(mu_p, log_var_p, mu_q, log_var_q)
    shape, device = _check_forward("kl_div_pair_loss", inputs, clamp_min, clamp_max, dtype)
    return _elementwise(list(inputs.values()), shape, dtype, device)


@torch.library.register_fake("kl_ext::kl_div_single_loss_backward")
def _(
    grad_output: Tensor, mu: Tensor, log_var: Tensor, clamp_min: float, clamp_max: float, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    inputs = {"mu": mu, "log_var": log_var}
    _check_backward("kl_div_single_loss_backward", grad_output, inputs, clamp_min, clamp_max)
    return _gradients((mu, log_var), output_mask)


@torch.library.register_fake("kl_ext::kl_div_pair_loss_backward")
def _(
    grad_output: Tensor,
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor,
    log_var_q: Tensor,
    clamp_min: float,
    clamp_max: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    inputs = _pair(mu_p, log_var_p, mu_q, log_var_q)
    _check_backward("kl_div_pair_loss_backward", grad_output, inputs, clamp_min, clamp_max)
    return _gradients((mu_p, log_var_p, mu_q, log_var_q), output_mask)


@torch.library.register_fake("kl_ext::gaussian_kl_div")
def _(
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor | None = None,
    log_var_q: Tensor | None = None,
    *,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
    reduction: str = "none",
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_together("gaussian_kl_div", mu_q, log_var_q)
    inputs = _pair(mu_p, log_var_p, mu_q, log_var_q)
    shape, device = _check_forward("gaussian_kl_div", inputs, clamp_min, clamp_max, dtype)
    reduced = reduced_dims("gaussian_kl_div", reduction, dim, len(shape))
    tensors = list(inputs.values())
    if reduction == "none":
        return _elementwise(tensors, shape, dtype, device)
    return torch.empty(kept_sizes(shape, reduced, keepdim), dtype=dtype or result_dtype(tensors), device=device)


@torch.library.register_fake("kl_ext::gaussian_kl_div_backward")
def _(
    grad_output: Tensor,
    mu_p: Tensor,
    log_var_p: Tensor,
    mu_q: Tensor | None,
    log_var_q: Tensor | None,
    clamp_min: float,
    clamp_max: float,
    reduction: str,
    dim: Sequence[int] | None,
    output_mask: Sequence[bool],
    keepdim: bool = False,
) -> tuple[Tensor | None, ...]:
    check_together("gaussian_kl_div_backward", mu_q, log_var_q)
    inputs = _pair(mu_p, log_var_p, mu_q, log_var_q)
    _check_backward_of_divergence(
        "gaussian_kl_div_backward", grad_output, inputs, clamp_min, clamp_max, reduction, dim, keepdim
    )
    return _gradients((mu_p, log_var_p, mu_q, log_var_q), output_mask)


def _register_given(name: str) -> None:
    """The operator that writes gradients where it is told: nothing is returned, but everything is checked."""
    arguments = getattr(torch.ops.kl_ext, name).out._schema.arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    of_input = {
        argument.name.removeprefix("grad_"): argument.name
        for argument in arguments
        if argument.name.startswith("grad_") and argument.kwarg_only
    }

    def fake(*values: Any, **gradients: Tensor | None) -> None:
        given = dict(zip(positional, values))  # without keepdim, where it is left out
        if "mu_q" in of_input:
            check_together(name, given["mu_q"], given["log_var_q"])
        grad_output, clamp = given.pop("grad_output"), (given.pop("clamp_min"), given.pop("clamp_max"))
        inputs = {key: given[key] for key in of_input if given[key] is not None}
        if "reduction" in given:
            _check_backward_of_divergence(
                name, grad_output, inputs, *clamp, given["reduction"], given["dim"], given.get("keepdim", False)
            )
            shape = common_shape(name, inputs)
        else:
            _check_backward(name, grad_output, inputs, *clamp)
            shape = grad_output.shape
        wanted = ((key, gradients.get(argument)) for key, argument in of_input.items())
        check_gradients(name, grad_output, inputs, {key: x for key, x in wanted if x is not None}, shape)

    torch.library.register_fake(f"kl_ext::{name}.out")(fake)


for _name in ("kl_div_single_loss_backward", "kl_div_pair_loss_backward", "gaussian_kl_div_backward"):
    _register_given(_name)
