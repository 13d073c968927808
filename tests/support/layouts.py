"""Views of every layout that torch has, and the strides that torch gives to what is computed from them."""

from typing import Any

import torch


def inside(x: torch.Tensor, dim: int, step: int = 2, offset: int = 1) -> torch.Tensor:
    """x as every step-th slice of a larger tensor."""
    shape = list(x.shape)
    shape[dim] = shape[dim] * step + offset
    larger = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = larger.narrow(dim, offset, x.shape[dim] * step)[(slice(None),) * (dim % x.dim()) + (slice(None, None, step),)]
    return view.copy_(x)


def chunk(x: torch.Tensor, dim: int, part: int) -> torch.Tensor:
    """x as a part of a tensor twice as large: what `h.chunk(2, dim)` returns."""
    halves = [torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))]
    halves[part] = x
    return torch.cat(halves, dim).chunk(2, dim)[part]


def expanded(x: torch.Tensor, *dims: int) -> torch.Tensor:
    """The first slice of x along dims, expanded again: not the values of x, but its shape."""
    first = x
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return first.clone().expand(x.shape)


def transposed(x: torch.Tensor, first: int, second: int) -> torch.Tensor:
    return x.transpose(first, second).contiguous().transpose(first, second)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """x at an offset into its storage that no vector width divides."""
    return torch.cat([x.new_full((3,), float("nan")), x.flatten()])[3:].view(x.shape)


def overlapping(x: torch.Tensor) -> torch.Tensor:
    """Rows that share memory: a sliding window over as much of x as that takes."""
    rows, columns = x.shape[0], x[0].numel()
    window = x.flatten()[: rows + columns - 1].clone().as_strided((rows, columns), (1, 1))
    return window.unflatten(1, x.shape[1:])


# Layouts for tensors of at least two dimensions.
ANY_RANK = {
    "contiguous": lambda x: x,
    "offset": shifted,
    "first chunk of dim 0": lambda x: chunk(x, 0, 0),
    "second chunk of dim 0": lambda x: chunk(x, 0, 1),
    "first chunk of dim 1": lambda x: chunk(x, 1, 0),
    "second chunk of dim 1": lambda x: chunk(x, 1, 1),
    "first chunk of the last dim": lambda x: chunk(x, -1, 0),
    "second chunk of the last dim": lambda x: chunk(x, -1, 1),
    "every second row": lambda x: inside(x, 0),
    "every third column": lambda x: inside(x, -1, 3),
    "strided both ways": lambda x: inside(inside(x, 0), -1),
    "transposed": lambda x: transposed(x, 0, -1),
    "transposed chunk": lambda x: chunk(x.transpose(0, -1), 0, 1).transpose(0, -1),
    "expanded rows": lambda x: expanded(x, 0),
    "expanded columns": lambda x: expanded(x, -1),
    "expanded everywhere": lambda x: expanded(x, *range(x.dim())),
    "overlapping": overlapping,
}
RANK_4 = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "chunk of channels last": lambda x: chunk(x, 1, 1).contiguous(memory_format=torch.channels_last),
    "half of the channels last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1],
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
}
RANK_5 = {
    "channels last 3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "half of the channels last 3d": lambda x: (
        torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last_3d).chunk(2, 1)[0]
    ),
    "expanded in the middle": lambda x: expanded(x, 1, 3),
}
LAYOUTS = [
    *(((17, 33), name, make) for name, make in ANY_RANK.items()),
    *(((4, 6, 5, 7), name, make) for name, make in (ANY_RANK | RANK_4).items()),
    *(((2, 4, 3, 5, 6), name, make) for name, make in (ANY_RANK | RANK_5).items()),
]


def iterator_strides(*operands: torch.Tensor) -> tuple[int, ...]:
    """The strides of a pointwise result, by the rule of at::TensorIterator; test_layouts.py holds it to torch's own."""
    shape = torch.broadcast_shapes(*(x.shape for x in operands))
    contiguous = torch.empty(shape, device="meta")
    if all(x.shape == shape for x in operands):
        if all(x.is_contiguous() for x in operands):
            return contiguous.stride()
        if len(shape) == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in operands):
            return contiguous.contiguous(memory_format=torch.channels_last).stride()
        if all(torch.ops.aten.is_non_overlapping_and_dense(x) and x.stride() == operands[0].stride() for x in operands):
            return operands[0].stride()
    strides = [x.expand(shape).stride() for x in operands]
    strides = [
        [0 if x.dim() < len(shape) - i or x.shape[i - len(shape)] != shape[i] else stride[i] for i in range(len(shape))]
        for x, stride in zip(operands, strides, strict=True)
    ]

    def order(first: int, second: int) -> int:
        for stride in strides:
            a, b = stride[first], stride[second]
            if a == 0 or b == 0:
                continue
            if a != b:
                return -1 if a < b else 1
            if shape[first] > shape[second]:
                return 1
        return 0

    permutation = list(reversed(range(len(shape))))
    for i in range(1, len(shape)):
        moving = i
        for other in reversed(range(i)):
            comparison = order(permutation[other], permutation[moving])
            if comparison > 0:
                permutation[other], permutation[moving] = permutation[moving], permutation[other]
                moving = other
            elif comparison < 0:
                break
    result, size = [0] * len(shape), 1
    for dim in permutation:
        result[dim] = size
        size *= max(shape[dim], 1) if permutation != sorted(permutation, reverse=True) else shape[dim]
    return contiguous.stride() if permutation == sorted(permutation, reverse=True) else tuple(result)


def describe(*tensors: Any) -> str:
    return ", ".join(f"{tuple(x.shape)} with strides {x.stride()}" for x in tensors)
