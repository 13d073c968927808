"""torch.func.vmap of the operators: the operators themselves on tensors with the batch dimension in front. Being composed of
operators, the rules nest and differentiate. (The older vmap behind is_grads_batched is csrc/vmap_legacy.cpp.)"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_together, reduced_dims
from ._fake import arithmetic_dtype, result_dtype

InDims = Sequence[int | None]
Gradients = tuple[Tensor | None, ...]


def _present(tensors: Sequence[Tensor | None], in_dims: InDims) -> tuple[list[Tensor], list[int | None]]:
    pairs = [(tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=True) if tensor is not None]
    return [tensor for tensor, _ in pairs], [dim for _, dim in pairs]


def _examples(tensors: Sequence[Tensor], in_dims: InDims) -> list[Tensor]:
    """The tensors as one example sees them, for its shapes and dtypes."""
    return [tensor if dim is None else tensor.select(dim, 0) for tensor, dim in zip(tensors, in_dims, strict=True)]


def _dtype_of_result(examples: Sequence[Tensor], dtype: torch.dtype | None) -> torch.dtype | None:
    """Promotion looks at the dimensions of an example. Autocast, which comes after this, has an answer of its own."""
    return dtype if dtype or torch.is_autocast_enabled(examples[0].device.type) else result_dtype(examples)


def _batch_first(tensors: Sequence[Tensor], in_dims: InDims) -> list[Tensor]:
    """Batch dimensions in front, and ones behind them, so that the other dimensions broadcast from the right."""
    rank = max(tensor.dim() - (dim is not None) for tensor, dim in zip(tensors, in_dims, strict=True))
    batched = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
            tensor = tensor.reshape(tensor.shape[:1] + (1,) * (rank + 1 - tensor.dim()) + tensor.shape[1:])
        batched.append(tensor)
    return batched


def _divide(x: Tensor, count: int) -> Tensor:
    """Rounded once, as the operators divide: by a number, torch multiplies with its reciprocal on a GPU."""
    return x / x.new_full((), count)


def _forward(operator: Callable[..., Tensor], inputs: int) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: InDims, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> tuple[Tensor, int]:
        dtype = _dtype_of_result(_examples(args[:inputs], in_dims[:inputs]), dtype)
        return operator(*_batch_first(args[:inputs], in_dims[:inputs]), dtype=dtype, **kwargs), 0

    return rule


def _backward_by_example(
    backward: Callable[..., Gradients], batch_size: int, in_dims: InDims, grad_output: Tensor, *inputs: Tensor
) -> tuple[Gradients, tuple[int | None, ...]]:
    """A gradient for each example, of an input that the batch shares too: expanded, which costs no memory."""
    own = [
        (tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0))
        for tensor, dim in zip((grad_output, *inputs), in_dims, strict=True)
    ]
    gradients = backward(*_batch_first(own, [0] * len(own)))
    restored = [
        None if gradient is None else gradient.reshape(tensor.shape)
        for gradient, tensor in zip(gradients, own[1:], strict=False)
    ]
    restored += [None] * (len(gradients) - len(restored))
    return tuple(restored), tuple(None if gradient is None else 0 for gradient in restored)


def _backward(operator: Callable[..., Gradients], inputs: int) -> Callable[..., Any]:
    def rule(info: Any, in_dims: InDims, *args: Any) -> Any:
        tensors, rest = args[: inputs + 1], args[inputs + 1 :]
        return _backward_by_example(lambda *x: operator(*x, *rest), info.batch_size, in_dims[: inputs + 1], *tensors)

    return rule


_ops = torch.ops.kl_ext
torch.library.register_vmap("kl_ext::kl_div_single_loss", _forward(_ops.kl_div_single_loss, 2))
torch.library.register_vmap("kl_ext::kl_div_single_loss_backward", _backward(_ops.kl_div_single_loss_backward, 2))
torch.library.register_vmap("kl_ext::kl_div_pair_loss", _forward(_ops.kl_div_pair_loss, 4))
torch.library.register_vmap("kl_ext::kl_div_pair_loss_backward", _backward(_ops.kl_div_pair_loss_backward, 4))


@torch.library.register_vmap("kl_ext::gaussian_kl_div")
def _(
    info: Any,
    in_dims: InDims,
    *args: Any,
    clamp_min: float = -30.0,
    clamp_max: float = 20.0,
    reduction: str = "none",
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, int]:
    """The batch is never reduced: dimensions count from behind it."""
    check_together("gaussian_kl_div", *(*args[2:4], None, None)[:2])
    tensors, dims = _present(args[:4], in_dims[:4])
    examples = _examples(tensors, dims)
    shape = torch.broadcast_shapes(*(example.shape for example in examples))
    dtype = _dtype_of_result(examples, dtype)
    clamp = {"clamp_min": clamp_min, "clamp_max": clamp_max}
    batched = _batch_first(tensors, dims)
    reduced = reduced_dims("gaussian_kl_div", reduction, dim, len(shape))
    if not reduced:
        return _ops.gaussian_kl_div(*batched, **clamp, dtype=dtype), 0
    how: dict[str, Any] = {"dim": [index + 1 for index in reduced], "keepdim": keepdim}
    if reduction == "batchmean":
        wide = torch.float64 if dtype == torch.float64 else arithmetic_dtype(tensors)
        sums = _ops.gaussian_kl_div(*batched, **clamp, reduction="sum", **how, dtype=wide)
        return _divide(sums, shape[0]).to(dtype or wide), 0
    return _ops.gaussian_kl_div(*batched, **clamp, reduction=reduction, **how, dtype=dtype), 0


@torch.library.register_vmap("kl_ext::gaussian_kl_div_backward")
def _(
    info: Any,
    in_dims: InDims,
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
) -> Any:
    """By way of the gradient of the terms, which is a view of the reduced one."""
    check_together("gaussian_kl_div_backward", mu_q, log_var_q)
    tensors, dims = _present((mu_p, log_var_p, mu_q, log_var_q), in_dims[1:5])
    shape = torch.broadcast_shapes(*(example.shape for example in _examples(tensors, dims)))
    grad, grad_dim = grad_output, in_dims[0]
    reduced = reduced_dims("gaussian_kl_div_backward", reduction, dim, len(shape))
    if reduced:
        if grad_dim is not None:
            grad = grad.movedim(grad_dim, 0)
        if reduction != "sum":
            count = shape[0] if reduction == "batchmean" else math.prod(shape[index] for index in reduced)
            grad = _divide(grad.to(arithmetic_dtype([grad, *tensors])), count)
        for index in () if keepdim else reduced:
            grad = grad.unsqueeze(index + (grad_dim is not None))
        grad = grad.expand(*(grad.shape[:1] if grad_dim is not None else ()), *shape)
        grad_dim = None if grad_dim is None else 0

    def backward(*x: Tensor) -> Any:
        q = (x[3], x[4]) if len(x) == 5 else (None, None)
        return _ops.gaussian_kl_div_backward(*x[:3], *q, clamp_min, clamp_max, "none", None, output_mask)

    return _backward_by_example(backward, info.batch_size, [grad_dim, *dims], grad, *tensors)
