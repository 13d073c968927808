"""torch.func.vmap of the operators: the operators themselves on tensors with the batch dimension in front. Being composed of
operators, the rules nest and differentiate. (The older vmap behind is_grads_batched is csrc/vmap_legacy.cpp.)"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

InDims = tuple[Any, ...]


def _batch_first(tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> list[Tensor]:
    """Batch dimensions in front, and ones behind them, so that the other dimensions broadcast from the right."""
    rank = max(tensor.dim() - (dim is not None) for tensor, dim in zip(tensors, in_dims, strict=True))
    batched = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
            tensor = tensor.reshape(tensor.shape[:1] + (1,) * (rank + 1 - tensor.dim()) + tensor.shape[1:])
        batched.append(tensor)
    return batched


def _forward(operator: Callable[..., Tensor], inputs: int) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: InDims, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        return operator(*_batch_first(args[:inputs], in_dims[:inputs]), **kwargs), 0

    return rule


def _backward(operator: Callable[..., tuple[Tensor | None, ...]], inputs: int) -> Callable[..., Any]:
    def rule(info: Any, in_dims: InDims, *args: Any) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
        tensors, dims, rest = args[: inputs + 1], in_dims[: inputs + 1], args[inputs + 1 :]
        # A gradient per example: what the batch shares is expanded, which costs no memory, so that its gradients stay apart.
        own = [
            tensor if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            for tensor, dim in zip(tensors, dims, strict=True)
        ]
        own_dims = [0 if dim is None else dim for dim in dims]
        gradients = operator(*_batch_first(own, own_dims), *rest)
        shapes = [tensor.movedim(dim, 0).shape for tensor, dim in zip(own[1:], own_dims[1:], strict=True)]
        restored = tuple(
            None if gradient is None else gradient.reshape(shape) for gradient, shape in zip(gradients, shapes, strict=True)
        )
        return restored, tuple(None if gradient is None else 0 for gradient in restored)

    return rule


_ops = torch.ops.kl_ext
torch.library.register_vmap("kl_ext::kl_div_single_loss", _forward(_ops.kl_div_single_loss, 2))
torch.library.register_vmap("kl_ext::kl_div_single_loss_backward", _backward(_ops.kl_div_single_loss_backward, 2))
torch.library.register_vmap("kl_ext::kl_div_pair_loss", _forward(_ops.kl_div_pair_loss, 4))
torch.library.register_vmap("kl_ext::kl_div_pair_loss_backward", _backward(_ops.kl_div_pair_loss_backward, 4))
