"""The CUDA kernels of weighted terms, without a GPU: the CPU operators' bits, for weights of every dtype and shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import pytest
import torch
from torch import Tensor

import layouts
import normal_cases
from emulated_checks import arithmetic_of, check_backward, check_forward, check_gradients, check_sum, launch_sum
from emulated_kernels import DTYPES, NARROW, STORAGES, THREADS, WIDE, Result
from emulated_kernels import values as gaussian_values
from operators import Operator, each_reducing_operator
from ordered_sum import reduced_sum
from weight_cases import garbage, mask, some_weight

SHAPE = [4, 6, 5, 8]

# Of terms of that shape.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "full": lambda w: w,
    "[B, 1, 1, 1]": lambda w: w[:, :1, :1, :1],
    "[B, 1, H, W]": lambda w: w[:, :1],
    "[B, 1, 1, W]": lambda w: w[:, :1, :1],
    "[C, 1, 1]": lambda w: w[0, :, :1, :1],
    "[W]": lambda w: w[0, 0, 0],
    "0-dim": lambda w: w[0, 0, 0, 0],
    "expanded": lambda w: w[:, :1, :1, :1].expand(w.shape),
    "transposed": lambda w: layouts.transposed(w, 0, -1),
    "every second column": lambda w: torch.stack([w, w], -1).flatten(-2)[..., ::2],
    "at an odd address": lambda w: torch.cat([w.new_ones(3), w.flatten()])[3:].view(w.shape),
}


def values(rng: numpy.random.Generator, operator: Operator, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """From all over the format; garbage in some places, for the weight to leave out or not."""
    if operator.has_deviations:
        numel = int(numpy.prod(shape))
        columns = normal_cases.pair(rng, max(numel, 16), numpy.float64 if dtype == torch.float64 else numpy.float32)
        inputs = [torch.from_numpy(x[:numel].copy()).view(tuple(shape)).to(dtype) for x in columns]
    else:
        inputs = gaussian_values(rng, operator, shape, dtype)
    return [torch.where(torch.rand(tuple(shape)) < 0.05, garbage(shape, dtype), x) for x in inputs]


@pytest.mark.parametrize("of_weight", STORAGES, ids=str)
@each_reducing_operator
def test_terms_and_gradients_for_weights_of_every_shape_and_dtype(emulated, rng, operator, of_weight):
    for dtype in DTYPES:
        for count in (2, 4):
            for make in rng.choice(list(WEIGHTS.values()), 4, replace=False):
                inputs = values(rng, operator, SHAPE, dtype)[:count]
                weight = make(some_weight(SHAPE, of_weight))
                clamp = WIDE if rng.random() < 0.3 else NARROW
                result = DTYPES[rng.integers(4 if dtype == torch.float64 or of_weight == torch.float64 else 3)]
                check_forward(emulated, operator, inputs, result, clamp, offset=int(rng.integers(2)), weight=weight)
                grad_output = torch.randn(SHAPE).to(result)
                check_backward(emulated, operator, grad_output, inputs, clamp, weight=weight)


@each_reducing_operator
def test_sizes_around_every_boundary(emulated, rng, operator):
    """Two terms to a thread."""
    tile = 2 * THREADS
    for numel in (1, 2, 3, tile - 1, tile, tile + 1, 2 * tile + 3):
        inputs, weight = values(rng, operator, [numel], torch.float32), some_weight([numel], torch.bool)
        for count in (2, 4):
            grids = check_forward(emulated, operator, inputs[:count], torch.float32, NARROW, weight=weight)
            assert grids == [-(-numel // tile)]
            check_backward(emulated, operator, torch.randn(numel), inputs[:count], NARROW, weight=weight)


@pytest.mark.parametrize("of_weight", STORAGES, ids=str)
@each_reducing_operator
def test_sums_over_any_dims(emulated, rng, operator, of_weight):
    for dims in ([0], [3], [0, 2], [1, 2, 3], [0, 1, 2, 3]):
        for dtype in DTYPES:
            for make in rng.choice(list(WEIGHTS.values()), 1):
                inputs = values(rng, operator, SHAPE, dtype)
                inputs = inputs[:2] if rng.random() < 0.4 else [*inputs[:2], *(x[0, 0, 0] for x in inputs[2:])]
                clamp = WIDE if rng.random() < 0.3 else NARROW
                check_sum(emulated, inputs, dims, "sum", clamp, operator, make(some_weight(SHAPE, of_weight)))


@each_reducing_operator
def test_long_rows_and_columns(emulated, rng, operator):
    for length in (1, 63, 65, 1024, 1025, 4096 + 7):
        for shape, dim, size in (([3, length], 1, [3, length]), ([3, length], 1, [3, 1]), ([length, 5], 0, [length, 1])):
            inputs = values(rng, operator, shape, torch.float32)
            for weight in (some_weight(size, torch.bool), some_weight(size, torch.float32)):
                check_sum(emulated, inputs, [dim], "sum", NARROW, operator, weight)
    terms = [64 * 1024 + 8]  # more chunks than lanes
    check_sum(emulated, values(rng, operator, terms, torch.float32)[:2], [0], "sum", NARROW, operator, mask(terms))


@pytest.mark.parametrize("dtype", STORAGES, ids=str)
def test_the_sum_of_weights_is_that_of_the_order(emulated, rng, dtype):
    """Each counted as often as there are terms that it is for."""
    for shape in (SHAPE, [1025, 3], [3, 4096 + 7]):
        full = some_weight(shape, dtype)
        sizes = [full, full[:1], full[..., :1], full[(0,) * (len(shape) - 1)], full[(0,) * len(shape)]]
        for weight in [*sizes, full.contiguous().expand(shape), layouts.transposed(full, 0, -1)]:
            wide = arithmetic_of(*([weight] if weight.dtype == torch.float64 else []))
            for dims in ([0], [len(shape) - 1], list(range(len(shape)))):
                expected = reduced_sum(weight.to(wide).expand(shape), dims)
                result = Result(expected)
                launch_sum(emulated, "forward_sum Weight", shape, dims, ["sum", weight], [result.tensor])
                result.check(expected, f"{dims} of {weight.shape} in {shape}")


@pytest.mark.parametrize("of_weight", STORAGES, ids=str)
@each_reducing_operator
def test_gradients_of_what_is_broadcast(emulated, rng, operator, of_weight):
    """Of a prior of [W], of channels, of one number; from gradients of terms and of sums over the last dims."""
    for dtype in DTYPES:
        for prior in (lambda x: x[0, 0, 0], lambda x: x[0, :, :1, :1], lambda x: x[0, 0, 0, 0]):
            inputs = values(rng, operator, SHAPE, dtype)
            inputs = [*inputs[:2], *map(prior, inputs[2:])]
            for grad_output in (torch.randn(SHAPE), torch.randn(4, 1, 1, 1).expand(SHAPE))[int(rng.integers(2)) :]:
                make = rng.choice(list(WEIGHTS.values()))
                weight, clamp = make(some_weight(SHAPE, of_weight)), WIDE if rng.random() < 0.3 else NARROW
                wanted = [True, *(rng.random(3) < 0.7).tolist()][:: int(rng.choice([-1, 1]))]
                check_gradients(emulated, operator, grad_output.to(dtype), inputs, clamp, wanted, weight)


@each_reducing_operator
def test_gradients_of_a_prior_of_every_width(emulated, rng, operator):
    for rows, width in ((1, 8), (7, 1), (33, 2), (1030, 16), (65, 31), (100, 200)):
        inputs = [x if i < 2 else x[0] for i, x in enumerate(values(rng, operator, [rows, width], torch.float32))]
        for size in ([rows, width], [rows, 1], [width]):
            check_gradients(emulated, operator, torch.randn(rows, width), inputs, weight=some_weight(size, torch.bool))


@pytest.mark.parametrize("indices", [1024, 4096])
@each_reducing_operator
def test_launches_cut_anywhere_give_the_same_bits(emulated, rng, operator, indices):
    """So many terms, in place of 2^31, are all that a launch counts."""
    shape = [4, 12, 32, 5]
    for dtype in (torch.float32, torch.bfloat16):
        for size in (shape, [4, 1, 32, 5], []):
            inputs, weight = values(rng, operator, shape, dtype), some_weight(size, STORAGES[rng.integers(5)])
            shared = [*inputs[:2], *(x[0, :, :, :1] for x in inputs[2:])]
            with emulated.indices(indices):
                assert len(check_forward(emulated, operator, inputs, torch.float32, NARROW, weight=weight)) > 1
                assert len(check_backward(emulated, operator, torch.randn(shape), inputs, NARROW, weight=weight)) > 1
                check_sum(emulated, inputs[:2], [1, 2, 3], "sum", NARROW, operator, weight)
                check_sum(emulated, shared, [0, 2], "sum", NARROW, operator, weight)
                check_gradients(emulated, operator, torch.randn(shape), shared, weight=weight)


@each_reducing_operator
def test_what_is_left_out_is_plus_0_whatever_the_kernel_reads(emulated, operator):
    for count in (2, 4):
        inputs = [garbage([5, 70], torch.float32) for _ in range(count)]
        nothing = torch.zeros(5, 1, dtype=torch.bool)
        check_forward(emulated, operator, inputs, torch.float32, NARROW, weight=nothing)
        check_backward(emulated, operator, garbage([5, 70], torch.float32), inputs, NARROW, weight=nothing)
        check_sum(emulated, inputs, [1], "sum", NARROW, operator, nothing)
        assert not torch.signbit(operator(*inputs, weight=nothing)).any()
