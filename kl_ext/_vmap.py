"""torch.func.vmap of the operators: the operators themselves on tensors with the batch dimension in front. Being composed of
operators, the rules nest and differentiate. (The older vmap behind is_grads_batched is csrc/vmap_legacy.cpp.)"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import reduced_dims
from ._fake import arithmetic_dtype, result_dtype
from ._operators import OPERATORS, Call, Operator, divided, names_of

Gradients = tuple[Tensor | None, ...]
BatchDims = Mapping[str, int | None]  # of each tensor, None where it is not batched


def _example(tensor: Tensor, dim: int | None) -> Tensor:
    """The tensor as one example sees it, for its shape and dtype."""
    return tensor if dim is None else tensor.select(dim, 0)


def _batched(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """The tensor with the batch dimension in front. One that the batch shares is expanded, which costs no memory."""
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _aligned(tensor: Tensor, rank: int) -> Tensor:
    """The tensor with ones after the batch dimension, so that the other dimensions broadcast from the right."""
    return tensor.reshape(tensor.shape[:1] + (1,) * (rank + 1 - tensor.dim()) + tensor.shape[1:])


def _reduction_behind_the_batch(call: Call, reduced: Sequence[int]) -> dict[str, Any]:
    """The reduction with dimensions counted after the batch, which is never reduced. The caller divides for "batchmean"."""
    if call.reduction == "none":
        return {}
    if not reduced:  # one term per example: a dimension of size 1
        return {"reduction": call.reduction, "dim": [1]}
    reduction = "sum" if call.reduction == "batchmean" else call.reduction
    return {"reduction": reduction, "dim": [index + 1 for index in reduced], "keepdim": call.keepdim}


def _forward(operator: Operator) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        call = operator.read(operator.forward, args, kwargs)
        dims: BatchDims = dict(zip(names_of(operator.forward), in_dims))
        examples = {name: _example(tensor, dims.get(name)) for name, tensor in call.tensors.items()}
        shape = torch.broadcast_shapes(*(examples[name].shape for name in call.inputs))
        # Promotion looks at the dimensions of an example. Autocast, which comes after this, has an answer of its own.
        if call.dtype is None and not torch.is_autocast_enabled(next(iter(examples.values())).device.type):
            call.dtype = result_dtype(examples.values())
        tensors = dict(call.tensors)
        if all(dims.get(name) is None for name in call.inputs):  # a batched weight alone: it may not enlarge the terms
            first = next(iter(call.inputs))
            tensors[first], dims = _batched(tensors[first], None, info.batch_size), {**dims, first: 0}
        rank = len(shape) or (0 if call.reduction == "none" else 1)
        moved = {
            name: tensor if dims.get(name) is None else _aligned(tensor.movedim(dims[name], 0), rank)  # type: ignore[arg-type]
            for name, tensor in tensors.items()
        }
        weight = moved.pop("weight", None)
        reduced = reduced_dims(operator.name, call.reduction, call.dim, len(shape))
        how = _reduction_behind_the_batch(call, reduced)
        inputs = [moved[name] for name in call.inputs]
        if call.reduction != "batchmean":
            return operator.run(call, inputs, weight, **how), 0
        wide = torch.float64 if call.dtype == torch.float64 else arithmetic_dtype(call.tensors.values())
        sums = operator.run(call, inputs, weight, **how, dtype=wide)
        return divided(sums, shape[0]).to(call.dtype or wide), 0

    return rule


def _backward(operator: Operator) -> Callable[..., tuple[Gradients, tuple[int | None, ...]]]:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Gradients, tuple[int | None, ...]]:
        """Returns a gradient for each example, also of an input that the batch shares."""
        call = operator.read(operator.backward, args, kwargs)
        assert call.grad_output is not None
        dims: BatchDims = dict(zip(names_of(operator.backward), in_dims))
        shape = torch.broadcast_shapes(
            *(_example(tensor, dims.get(name)).shape for name, tensor in call.inputs.items()),
            *(() if operator.reduces else (_example(call.grad_output, dims.get("grad_output")).shape,)),
        )
        reduced = reduced_dims(f"{operator.name}_backward", call.reduction, call.dim, len(shape))
        grad = _batched(call.grad_output, dims.get("grad_output"), info.batch_size)
        if call.reduction == "batchmean":
            grad = divided(grad.to(arithmetic_dtype([grad, *call.tensors.values()])), shape[0])
        own = {name: _batched(tensor, dims.get(name), info.batch_size) for name, tensor in call.tensors.items()}
        rank = len(shape) or (0 if call.reduction == "none" else 1)
        aligned = {name: _aligned(tensor, rank) for name, tensor in own.items()}
        weight = aligned.pop("weight", None)
        how = _reduction_behind_the_batch(call, reduced)
        gradients = operator.run_backward(call, grad, list(aligned.values()), weight, **how)
        of_inputs = dict(zip(operator.inputs, gradients))
        restored = tuple(
            None if of_inputs[name] is None else of_inputs[name].reshape(own[name].shape)  # type: ignore[union-attr]
            for name in operator.inputs
        )
        return restored, tuple(None if gradient is None else 0 for gradient in restored)

    return rule


for _operator in OPERATORS:
    torch.library.register_vmap(_operator.forward.name(), _forward(_operator))
    torch.library.register_vmap(_operator.backward.name(), _backward(_operator))
