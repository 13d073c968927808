"""The order of a sum, written once more and slowly: what it means that a sum is a function of its terms and of nothing else.

    S(n = 0) = +0
    S(n <= 1024): 64 lanes of +0; term i is added to lane i mod 64, i ascending; then for h = 32, 16, 8, 4, 2, 1 lane l + h is
                  added to lane l < h; the sum is lane 0
    S(n > 1024):  S of the sums of the consecutive chunks of 1024 terms, of which the last may be shorter

Every addition is one IEEE addition of numpy arrays in the dtype of the terms; nothing here calls a sum of numpy or torch.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch

LANES, CHUNK = 64, 1024


def ordered_sum(terms: Any) -> Any:
    """S along the last dimension: [..., n] -> [...]."""
    n = terms.shape[-1]
    if n > CHUNK:
        whole = n // CHUNK * CHUNK
        sums = [ordered_sum(terms[..., :whole].reshape(*terms.shape[:-1], -1, CHUNK))]
        if whole < n:
            sums.append(ordered_sum(terms[..., whole:])[..., None])
        return ordered_sum(numpy.concatenate(sums, -1))
    lanes = numpy.zeros((*terms.shape[:-1], LANES), terms.dtype)
    for first in range(0, n, LANES):
        part = terms[..., first : first + LANES]
        lanes[..., : part.shape[-1]] += part
    half = LANES
    while half > 1:
        half //= 2
        lanes[..., :half] += lanes[..., half : 2 * half]
    return lanes[..., 0]


def additions(n: int) -> int:
    """h of the error bound: the additions that a term of n takes part in, at most."""
    if n <= CHUNK:
        return math.ceil(n / LANES) - 1 + 6 if n > 1 else 0
    return additions(CHUNK) + additions(math.ceil(n / CHUNK))


def reduced_sum(terms: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """S over the given dimensions of the terms, in ascending order of the dimensions, row by row of their coordinates."""
    kept = [dim for dim in range(terms.dim()) if dim not in dims]
    array = terms.detach().cpu().contiguous().numpy().transpose(*kept, *sorted(dims))
    rows = [terms.shape[dim] for dim in kept]
    return torch.from_numpy(numpy.array(ordered_sum(array.reshape(*rows, math.prod(terms.shape[dim] for dim in dims)))))


def sum_to_shape(terms: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """S over the dimensions along which a tensor of the shape is broadcast to the terms."""
    missing = terms.dim() - len(shape)
    sizes = [1] * missing + list(shape)
    dims = [dim for dim, size in enumerate(terms.shape) if dim < missing or sizes[dim] != size]
    return (reduced_sum(terms, dims) if dims else terms).reshape(tuple(shape))
