"""What the operators return without computing it (shapes, dtypes, devices, strides): for compilation, export and fake tensors."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides


def _result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """As torch promotes: 0-dim tensors count only where there are no others, since all are of one category."""
    dtypes = [tensor.dtype for tensor in tensors if tensor.dim() > 0] or [tensor.dtype for tensor in tensors]
    return functools.reduce(torch.promote_types, dtypes)


def _device(tensors: Sequence[Tensor]) -> torch.device:
    """A 0-dim CPU tensor goes with tensors of any device."""
    for tensor in tensors:
        if tensor.dim() > 0 or tensor.device.type != "cpu":
            return tensor.device
    return tensors[0].device


def _elementwise(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    strides = compute_elementwise_output_strides(*(tensor.expand(shape) for tensor in tensors))
    return torch.empty_strided(shape, strides, dtype=dtype or _result_dtype(tensors), device=_device(tensors))


def _gradients(inputs: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(torch.empty_like(x) if wanted else None for x, wanted in zip(inputs, output_mask, strict=True))


@torch.library.register_fake("kl_ext::kl_div_single_loss")
def _(
    mu: Tensor,
    log_var: Tensor,
    *,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _elementwise((mu, log_var), dtype)


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
    return _elementwise((mu_p, log_var_p, mu_q, log_var_q), dtype)


@torch.library.register_fake("kl_ext::kl_div_single_loss_backward")
def _(
    grad_output: Tensor, mu: Tensor, log_var: Tensor, clamp_min: float, clamp_max: float, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
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
    return _gradients((mu_p, log_var_p, mu_q, log_var_q), output_mask)
