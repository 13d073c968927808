"""What a fake tensor has in common with the real one."""

from __future__ import annotations

from torch import Tensor


def meta_of(tensor: Tensor | None) -> tuple[object, ...] | None:
    """Shape, dtype, device and the strides that matter: torch's own fake kernels differ in those of sizes 1 and 0."""
    if tensor is None:
        return None
    shape = tuple(map(int, tensor.shape))
    strides = [
        int(stride) if size > 1 and 0 not in shape else None for size, stride in zip(shape, tensor.stride(), strict=True)
    ]
    return shape, tensor.dtype, strides, tensor.device
