"""What the operators return without computing it (shapes, dtypes, devices, strides): for compilation, export, fake tensors."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides
from torch._subclasses.fake_tensor import FakeTensor

from ._reduction import check_together, kept_sizes, reduced_dims


def result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """As torch promotes: 0-dim tensors count only where there are no others, since all are of one category."""
    dtypes = [tensor.dtype for tensor in tensors if tensor.dim() > 0] or [tensor.dtype for tensor in tensors]
    return functools.reduce(torch.promote_types, dtypes)


def arithmetic_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """In which the operators compute: float64 if a tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _common_shape(function: str, **tensors: Tensor | None) -> torch.Size:
    shape: torch.Size | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        try:
            common = tensor.shape if shape is None else torch.broadcast_shapes(shape, tensor.shape)
        except RuntimeError as error:
            raise RuntimeError(
                f"{function}: expected {name} to broadcast with the shape {list(shape or ())} of the arguments before it, "
                f"got shape {list(tensor.shape)}"
            ) from error
        shape = torch.Size(common)
    assert shape is not None
    return shape


def _common_device(function: str, **tensors: Tensor | None) -> torch.device:
    """A 0-dim CPU tensor goes with tensors of any device."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    decisive = [(name, tensor) for name, tensor in given if tensor.dim() > 0 or tensor.device.type != "cpu"] or given[:1]
    first, device = decisive[0][0], decisive[0][1].device
    for name, tensor in decisive:
        if tensor.device != device:
            raise RuntimeError(f"{function}: expected {name} on {device} like {first}, got {tensor.device}")
    return device


def _broadcast(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Expanded as TensorIterator sees it: stride 0 wherever a dimension is new or stretched, also where its size is 1."""
    new = len(shape) - tensor.dim()
    own = [0 if size == 1 and full != 1 else stride for size, full, stride in zip(tensor.shape, shape[new:], tensor.stride())]
    return tensor.as_strided(shape, [0] * new + own)


def _elementwise(tensors: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    strides = compute_elementwise_output_strides(*(_broadcast(tensor, shape) for tensor in tensors))
    return torch.empty_strided(shape, strides, dtype=dtype or result_dtype(tensors), device=device)


def _gradients(
    function: str, grad_output: Tensor, output_mask: Sequence[bool], **inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    # No shape is looked at, and no device of a fake tensor: compiled autograd captures backward passes with stand-ins for
    # gradients and for what saved-tensor hooks unpack, of a shape of their own and on the CPU. What it captured is traced again
    # with tensors that are as they will be, and the operators themselves refuse what does not go together.
    if not isinstance(grad_output, FakeTensor):  # then some tensor is on the meta device
        _common_device(function, grad_output=grad_output, **inputs)
    return tuple(
        torch.empty_like(x) if wanted and x is not None else None
        for x, wanted in zip(inputs.values(), output_mask, strict=True)
    )


@torch.library.register_fake("kl_ext::kl_div_single_loss")
def _(
    mu: Tensor,
    log_var: Tensor,
    *,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    device = _common_device("kl_div_single_loss", mu=mu, log_var=log_var)
    shape = _common_shape("kl_div_single_loss", mu=mu, log_var=log_var)
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
    inputs = {"mu_p": mu_p, "log_var_p": log_var_p, "mu_q": mu_q, "log_var_q": log_var_q}
    device = _common_device("kl_div_pair_loss", **inputs)
    shape = _common_shape("kl_div_pair_loss", **inputs)
    return _elementwise(list(inputs.values()), shape, dtype, device)


@torch.library.register_fake("kl_ext::kl_div_single_loss_backward")
def _(
    grad_output: Tensor, mu: Tensor, log_var: Tensor, clamp_min: float, clamp_max: float, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    return _gradients("kl_div_single_loss_backward", grad_output, output_mask, mu=mu, log_var=log_var)


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
    inputs = {"mu_p": mu_p, "log_var_p": log_var_p, "mu_q": mu_q, "log_var_q": log_var_q}
    return _gradients("kl_div_pair_loss_backward", grad_output, output_mask, **inputs)


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    tensors = [tensor for tensor in (mu_p, log_var_p, mu_q, log_var_q) if tensor is not None]
    check_together("gaussian_kl_div", mu_q, log_var_q)
    inputs = {"mu_p": mu_p, "log_var_p": log_var_p, "mu_q": mu_q, "log_var_q": log_var_q}
    device = _common_device("gaussian_kl_div", **inputs)
    shape = _common_shape("gaussian_kl_div", **inputs)
    reduced = reduced_dims("gaussian_kl_div", reduction, dim, len(shape))
    if reduction == "none":
        return _elementwise(tensors, shape, dtype, device)
    return torch.empty(kept_sizes(shape, reduced), dtype=dtype or result_dtype(tensors), device=device)


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
) -> tuple[Tensor | None, ...]:
    check_together("gaussian_kl_div_backward", mu_q, log_var_q)
    inputs = {"mu_p": mu_p, "log_var_p": log_var_p, "mu_q": mu_q, "log_var_q": log_var_q}
    return _gradients("gaussian_kl_div_backward", grad_output, output_mask, **inputs)


for _name in ("kl_div_single_loss_backward", "kl_div_pair_loss_backward", "gaussian_kl_div_backward"):
    # Gradients that are given are only written to.
    torch.library.register_fake(f"kl_ext::{_name}.out", lambda *args, **kwargs: None)
