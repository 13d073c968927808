"""What the operators accept, for fake and meta tensors: the checks of csrc/checks.h and csrc/reduction.h, in the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import _bindings

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = (torch.strided, torch.jagged)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensors(function: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks dtypes and layouts."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{function}: expected {name} to be a float16, bfloat16, float32 or float64 tensor, got {_named(tensor.dtype)}"
            )
        if tensor.layout not in LAYOUTS:
            raise TypeError(f"{function}: expected {name} to be a strided tensor, got {tensor.layout}")


def check_clamp(function: str, clamp_min: float, clamp_max: float) -> None:
    """Checks that the lower bound is not above the upper one."""
    if not clamp_min <= clamp_max:
        raise ValueError(f"{function}: expected clamp_min <= clamp_max, got {clamp_min:g} and {clamp_max:g}")


def check_result_dtype(function: str, dtype: torch.dtype | None) -> None:
    """Checks that the dtype is one that the operators compute, or None."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"{function}: expected dtype to be float16, bfloat16, float32 or float64, got {_named(dtype)}")


def check_together(function: str, optional: Mapping[str, object]) -> None:
    """Checks that all optional inputs are given, or none."""
    given = [name for name, value in optional.items() if value is not None]
    if given and len(given) < len(optional):
        first, *_, last = optional
        raise ValueError(f"{function}: expected {first} and {last} together or neither, got {given[0]} alone")


def check_weight(function: str, weight: Tensor) -> None:
    """Checks the dtype and layout."""
    if weight.dtype not in (torch.bool, *DTYPES):
        got = _named(weight.dtype)
        raise TypeError(f"{function}: expected weight to be a bool, float16, bfloat16, float32 or float64 tensor, got {got}")
    if weight.layout not in LAYOUTS:
        raise TypeError(f"{function}: expected weight to be a strided tensor, got {weight.layout}")


def check_weight_shape(function: str, weight: Tensor, shape: Sequence[int]) -> None:
    """Checks that the weight broadcasts with the terms and does not enlarge them."""
    if not _expands(weight.shape, shape):
        raise RuntimeError(
            f"{function}: expected weight to expand to the shape {list(shape)} of the terms, got shape {list(weight.shape)}"
        )


def _expands(own: Sequence[int], shape: Sequence[int]) -> bool:
    return len(own) <= len(shape) and all(size in (1, full) for size, full in zip(reversed(own), reversed(shape)))


def common_device(function: str, tensors: Mapping[str, Tensor]) -> torch.device:
    """The device of all tensors. A 0-dim CPU tensor goes with tensors of any device."""
    given = list(tensors.items())
    decisive = [(name, tensor) for name, tensor in given if tensor.dim() > 0 or tensor.device.type != "cpu"] or given[:1]
    first, device = decisive[0][0], decisive[0][1].device
    for name, tensor in decisive:
        if tensor.device != device:
            raise RuntimeError(f"{function}: expected {name} on {device} like {first}, got {tensor.device}")
    return device


def common_shape(function: str, tensors: Mapping[str, Tensor]) -> torch.Size:
    """The shape that all tensors broadcast to."""
    first, *others = tensors.items()
    shape = first[1].shape
    for name, tensor in others:
        try:
            shape = torch.Size(torch.broadcast_shapes(shape, tensor.shape))
        except RuntimeError as error:
            raise RuntimeError(
                f"{function}: expected {name} to broadcast with the shape {list(shape)} of the arguments before it, "
                f"got shape {list(tensor.shape)}"
            ) from error
    return shape


def check_expand(function: str, grad_output: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Checks that each input expands to the shape of grad_output."""
    shape = grad_output.shape
    for name, tensor in inputs.items():
        if not _expands(tensor.shape, shape):
            raise RuntimeError(
                f"{function}: expected {name} to expand to the shape {list(shape)} of grad_output, "
                f"got shape {list(tensor.shape)}"
            )


def check_grad_output(function: str, grad_output: Tensor, inputs: Mapping[str, Tensor], shape: Sequence[int]) -> None:
    """Checks the gradient of a reduced result: its shape, and that it is on the inputs' device."""
    check_tensors(function, {"grad_output": grad_output})
    name, tensor = next(iter(inputs.items()))
    common_device(function, {name: tensor, "grad_output": grad_output})
    if list(grad_output.shape) != list(shape):
        raise RuntimeError(f"{function}: expected grad_output of shape {list(shape)}, got shape {list(grad_output.shape)}")


def check_reduction(function: str, reduction: str, dim: Sequence[int] | None) -> None:
    """Checks that the reduction exists, and takes a dim if one is given."""
    if reduction not in ("none", "sum", "mean", "batchmean"):
        shown = reduction.replace("\0", "\\0")
        raise ValueError(f'{function}: expected reduction to be "none", "sum", "mean" or "batchmean", got "{shown}"')
    if dim is not None and reduction in ("none", "batchmean"):
        raise ValueError(f'{function}: expected no dim with reduction "{reduction}", got {list(dim)}')


def reduced_dims(function: str, reduction: str, dim: Sequence[int] | None, rank: int) -> list[int]:
    """The dimensions that are reduced, in ascending order."""
    check_reduction(function, reduction, dim)
    if reduction == "batchmean" and rank == 0:
        raise ValueError(f'{function}: expected at least one dimension for reduction "batchmean", got 0-dim tensors')
    if reduction == "none":
        return []
    if not dim:
        return list(range(rank))
    limit = max(rank, 1)
    for index in dim:
        if not -limit <= index < limit:
            raise IndexError(f"{function}: expected dim from {-limit} to {limit - 1}, got {index}")
    wrapped = sorted(index % limit for index in dim)
    if len(set(wrapped)) < len(wrapped):
        raise RuntimeError(f"{function}: expected each dim once, got {list(dim)}")
    return wrapped if rank else []


def kept_sizes(shape: torch.Size, reduced: Sequence[int], keepdim: bool) -> list[int]:
    """The sizes that a reduction leaves."""
    kept = ((1 if index in reduced else size) for index, size in enumerate(shape) if keepdim or index not in reduced)
    return list(kept)


def _overlap(a: Tensor, b: Tensor) -> int:
    """0: no memory is shared; 1: it is the same, number by number; 2: some. With symbolic sizes, none is assumed."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return 0
    placements = [(tuple(x.shape), x.stride(), x.storage_offset(), x.itemsize) for x in (a, b)]
    if not all(isinstance(number, int) for sizes, strides, offset, _ in placements for number in (*sizes, *strides, offset)):
        return 0
    return _bindings.overlap(*placements[0], *placements[1])


def check_gradients(
    function: str,
    inputs: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    shape: Sequence[int],
) -> None:
    """Checks the tensors that are to receive gradients, for terms of this shape."""
    for name, gradient in gradients.items():
        like = inputs[name]
        if gradient.dtype != like.dtype:
            raise TypeError(
                f"{function}: expected grad_{name} to be {_named(like.dtype)} like {name}, got {_named(gradient.dtype)}"
            )
        if gradient.device != like.device:
            raise RuntimeError(f"{function}: expected grad_{name} on {like.device} like {name}, got {gradient.device}")
        if gradient.shape != like.shape:
            raise RuntimeError(
                f"{function}: expected grad_{name} of shape {list(like.shape)} like {name}, got shape {list(gradient.shape)}"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(gradient.shape, gradient.stride())):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
                "Please clone() the tensor before performing the operation."
            )
        for argument, tensor in read.items():
            overlap = _overlap(gradient, tensor)
            if overlap == 2:
                raise RuntimeError(
                    f"{function}: expected grad_{name} to be {argument} itself or to share no memory with it, "
                    "got a partial overlap"
                )
            if overlap and gradient.shape != torch.Size(shape):
                raise RuntimeError(
                    f"{function}: expected grad_{name}, which is a sum, to share no memory with {argument}, got the same memory"
                )
        for other in gradients:
            if other == name:
                break
            if _overlap(gradient, gradients[other]):
                raise RuntimeError(
                    f"{function}: expected grad_{name} to share no memory with grad_{other}, got tensors that overlap"
                )
