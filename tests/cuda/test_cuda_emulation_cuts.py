"""No result depends on how the CUDA kernels' work is cut into launches, or on which GPU runs them."""

from __future__ import annotations

import re

import pytest
import torch

import layouts
from emulated_checks import check_backward, check_forward, check_gradients, check_sum
from emulated_kernels import DTYPES, NARROW, ROOT, values
from operators import each_operator, each_reducing_operator

INDICES = (1024, 4096)  # in place of 2^31: what a thread counts with 32 bits


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("dtype", DTYPES)
@each_operator
def test_elements_of_many_launches(emulated, rng, operator, dtype, indices):
    """Vectors and strides, cut along any dimension."""
    vectors, strided = [], []
    shape = [4, 24, 32, 5]
    full = values(rng, operator, shape, dtype)
    transposed = [layouts.transposed(x, 1, 2) if i == 0 else x for i, x in enumerate(full)]
    priors = [x if i < operator.count / 2 else x[0, :, :, :1] for i, x in enumerate(full)]
    for inputs in (full, priors, [layouts.shifted(x) for x in full], transposed):
        grids = vectors if inputs is full else strided
        with emulated.indices(indices):
            grids.append(check_forward(emulated, operator, inputs, dtype, NARROW))
            grids.append(check_backward(emulated, operator, torch.randn(shape).to(dtype), inputs, NARROW))
    assert all(len(grid) > 1 for grid in strided), strided
    assert indices > 1024 or all(len(grid) > 1 for grid in vectors), vectors


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("dtype", DTYPES)
@each_reducing_operator
def test_sums_of_many_launches(emulated, rng, operator, dtype, indices):
    """Rows that several launches share; terms counted with 64 bits."""
    for shape, dims in (([600, 40], [1]), ([40, 1500], [1]), ([40, 70], [0]), ([1500, 3], [0]), ([20, 30, 40], [0, 2])):
        inputs = values(rng, operator, shape, dtype)
        prior = [x if i < 2 else x[0] for i, x in enumerate(inputs)]
        for operands in (inputs[:2], inputs, prior, [layouts.shifted(x) for x in inputs], [inputs[0], inputs[1][..., :1]]):
            emulated.set_prepares_q(operands is prior)
            with emulated.indices(indices):
                grids = check_sum(emulated, operands, dims, rng.choice(["sum", "mean"]), operator=operator)
            if shape == [600, 40]:
                assert len(grids) > 1
    for shape in ([300, 33], [1030, 16]):
        inputs = [x if i < 2 else x[0] for i, x in enumerate(values(rng, operator, shape, dtype))]
        with emulated.indices(indices):
            check_gradients(emulated, operator, torch.randn(shape).to(dtype), inputs)


def test_nothing_is_asked_of_the_device():
    """Grids depend on shapes only, kernels on the block and the thread: the emulation knows no other names either."""
    asked = "cudaGetDevice|cudaDeviceGet|DeviceProp|multiProcessorCount|Occupancy|gridDim|blockDim|warpSize|nsmid|atomic"
    for source in (ROOT / "csrc/cuda").glob("*.[ch]*"):
        assert not re.search(asked, source.read_text()), source.name
