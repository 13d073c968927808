"""The CUDA kernels without a GPU: their own sources, compiled as C++ and run thread by thread, give the CPU operators' bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kl_ext  # noqa: F401
import layouts
from emulated_checks import backward_of, check_backward, check_forward, kernel_of, launch, settings_of
from emulated_kernels import DTYPES, NARROW, THREADS, WIDE, assert_same_bits, values, without_q_too
from operators import OPERATORS, SINGLE, each_operator

# One clamp is enough for an operator that clamps nothing.
CLAMPED = [(operator, clamp) for operator in OPERATORS for clamp in (NARROW, WIDE)[: 2 if operator.bounds else 1]]
each_operator_and_clamp = pytest.mark.parametrize("operator, clamp", CLAMPED, ids=str)
SETTINGS = settings_of(SINGLE, NARROW)

# Dtypes of the inputs and of the result that have vector kernels, with the numbers in a vector.
VECTORS = (
    (torch.float32, torch.float32, 4),
    (torch.float64, torch.float64, 2),
    (torch.float16, torch.float16, 8),
    (torch.bfloat16, torch.bfloat16, 8),
    (torch.float16, torch.float32, 8),
    (torch.bfloat16, torch.float32, 8),
)


def vector_grid(numel: int, items: int) -> list[int]:
    return [-(-numel // (items * THREADS))]


def strided_grid(numel: int) -> list[int]:
    return vector_grid(numel, 2)


@each_operator_and_clamp
@pytest.mark.parametrize("input_dtype, dtype, items", VECTORS)
def test_contiguous_sizes_around_every_boundary(emulated, rng, operator, input_dtype, dtype, items, clamp):
    tile = items * THREADS
    for numel in (1, items - 1, items, items + 1, tile - 1, tile, tile + 1, 2 * tile + items + 1):
        grad_output = torch.randn(numel).to(dtype)
        for inputs in without_q_too(operator, values(rng, operator, [numel], input_dtype)):
            assert check_forward(emulated, operator, inputs, dtype, clamp) == vector_grid(numel, items)
            assert check_backward(emulated, operator, grad_output, inputs, clamp) == vector_grid(numel, items)


def within(x: Tensor, *margins: int) -> Tensor:
    """x as a corner of a tensor larger by these margins, or by the only one in every dimension."""
    margins = margins if len(margins) > 1 else margins * x.dim()
    larger = torch.full([size + margin for size, margin in zip(x.shape, margins, strict=True)], math.nan, dtype=x.dtype)
    return larger[tuple(slice(size) for size in x.shape)].copy_(x)


# What must take 16-byte vectors, each a function of a full tensor of shape [6, 16, 8, 8] and its place among the arguments.
VECTOR_LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "chunk of dim 0": lambda x, i: layouts.chunk(x, 0, i % 2),
    "chunk of dim 1": lambda x, i: layouts.chunk(x, 1, i % 2),
    "chunk of dim 2": lambda x, i: layouts.chunk(x, 2, i % 2),
    "chunk of the last dim": lambda x, i: layouts.chunk(x, 3, i % 2),
    "channels last": lambda x, i: x.contiguous(memory_format=torch.channels_last),
    "chunk, with priors over the last dim": lambda x, i: layouts.chunk(x, 3, i) if i < 2 else x[0, 0, 0],
    "within a larger tensor": lambda x, i: within(x, 16),
    "priors over channels": lambda x, i: x if i < 2 else x[0, :, :1, :1],
    "chunk of dim 1, with priors over channels": lambda x, i: layouts.chunk(x, 1, i) if i < 2 else x[0, :, :1, :1],
    "priors over the batch": lambda x, i: x if i < 2 else x[:, :1, :1, :1],
    "scalar priors": lambda x, i: x if i < 2 else x[0, 0, 0, 0],
    "a column": lambda x, i: x if i != 1 else x[..., :1],
}


@each_operator_and_clamp
@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
def test_common_layouts_take_vectors(emulated, rng, operator, layout, clamp):
    for input_dtype, dtype, items in VECTORS:
        full = values(rng, operator, [6, 16, 8, 8], input_dtype)
        grid = vector_grid(full[0].numel(), items)
        of_sum = torch.randn([]).to(dtype).expand(full[0].shape)
        grad_output = layouts.chunk(torch.randn(full[0].shape).to(dtype), 1, 1) if layout != "channels last" else of_sum
        for inputs in without_q_too(operator, [VECTOR_LAYOUTS[layout](x, i) for i, x in enumerate(full)]):
            assert check_forward(emulated, operator, inputs, dtype, clamp) == grid
            assert check_backward(emulated, operator, of_sum, inputs, clamp) == grid
            assert check_backward(emulated, operator, grad_output, inputs, clamp) == grid


# What cannot: functions of a tensor of shape [2, 3, 4, 2, 16], which make its rows start anywhere or have too many dimensions.
STRIDED_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": lambda x: layouts.shifted(x),
    "rows at an odd pitch": lambda x: within(x.flatten(0, 3), 0, 1),
    "rows at half a vector's pitch": lambda x: within(x.flatten(0, 3), 0, 8 // x.element_size()),
    "every second column": lambda x: layouts.inside(x, -1),
    "transposed": lambda x: layouts.transposed(x, 0, -1),
    "five dimensions": lambda x: within(x, 16),
}


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
@each_operator
def test_layouts_that_vectors_do_not_fit(emulated, rng, operator, layout):
    for input_dtype, dtype, _ in VECTORS:
        full = values(rng, operator, [2, 3, 4, 2, 16], input_dtype)
        chosen = rng.integers(len(full))
        inputs = [STRIDED_LAYOUTS[layout](x) if i == chosen else x for i, x in enumerate(full)]
        inputs = [x.view(inputs[chosen].shape) if i != chosen else x for i, x in enumerate(inputs)]
        assert check_forward(emulated, operator, inputs, dtype, NARROW) == strided_grid(full[0].numel())
        grad_output = torch.randn(inputs[0].shape).to(dtype)
        assert check_backward(emulated, operator, grad_output, inputs, NARROW) == strided_grid(full[0].numel())


def test_rows_that_no_vector_divides(emulated, rng):
    """Aligned rows, of the result too, with a short vector at the end of each."""
    inputs = [within(x, 0, 3) for x in values(rng, SINGLE, [5, 33], torch.float32)]
    out = torch.zeros(5, 36)[:, :33]
    assert launch(emulated, "forward StandardDivergence", [out, *inputs], SETTINGS) == strided_grid(5 * 33)
    assert_same_bits(out, torch.ops.kl_ext.kl_div_single_loss(*inputs), "rows")


@each_operator
def test_gradients_of_halves_are_written_into_the_whole_in_vectors(emulated, rng, operator):
    for input_dtype, dtype, items in VECTORS:
        full = values(rng, operator, [6, 16], input_dtype)
        pairs = list(zip(full[::2], full[1::2], strict=True))
        inputs = [half for pair in pairs for half in torch.cat(pair, 1).chunk(2, 1)]
        grad_output = torch.randn(6, 16).to(dtype)
        expected = backward_of(operator, grad_output, inputs, NARROW, [True] * len(inputs))
        wholes = [torch.full((6, 32), float("nan"), dtype=input_dtype) for _ in pairs]
        halves = [half for whole in wholes for half in whole.chunk(2, 1)]
        kernel, settings = kernel_of("backward", operator, inputs), settings_of(operator, NARROW)
        assert launch(emulated, kernel, [*halves, grad_output, *inputs], settings) == vector_grid(6 * 16, items)
        for i, half in enumerate(halves):
            assert_same_bits(half, expected[i], f"gradient {i}")


@each_operator
def test_gradients_not_wanted_are_not_written(emulated, rng, operator):
    for input_dtype, dtype, items in VECTORS:
        inputs = values(rng, operator, [999], input_dtype)
        grad_output = torch.randn(999).to(dtype)
        for bits in range(1, 2 ** len(inputs)):
            mask = [bool(bits >> i & 1) for i in range(len(inputs))]
            assert check_backward(emulated, operator, grad_output, inputs, NARROW, mask) == vector_grid(999, items)
            check_backward(emulated, operator, grad_output, inputs, NARROW, mask, offset=1)


@pytest.mark.parametrize("shape, name, layout", layouts.LAYOUTS, ids=[f"{len(s)}d {n}" for s, n, _ in layouts.LAYOUTS])
@each_operator
def test_any_layout_any_dtypes(emulated, rng, operator, shape, name, layout):
    for clamp in (NARROW, WIDE):
        for offset in (0, 1):
            count = operator.counts[0] if clamp == WIDE and not operator.bounds else operator.count
            dtypes = [DTYPES[i] for i in rng.integers(0, len(DTYPES) - (rng.random() < 0.5), count + 1)]
            full = [
                x.to(dtype) for x, dtype in zip(values(rng, operator, shape, torch.float32)[:count], dtypes[1:], strict=True)
            ]
            inputs = [layout(x) if rng.random() < 0.7 else x for x in full]
            check_forward(emulated, operator, inputs, dtypes[0], clamp, offset)
            mask = [True, *(rng.random(count - 1) < 0.7)]
            grad_output = torch.randn(shape).to(dtypes[0])
            grad_output = layout(grad_output) if rng.random() < 0.5 else grad_output
            check_backward(emulated, operator, grad_output, inputs, clamp, rng.permutation(mask).tolist(), offset)


def test_division_by_multiplication(emulated, rng):
    for divisor in {
        1,
        2,
        3,
        5,
        7,
        641,
        2**16 - 1,
        2**16 + 1,
        2**30 + 1,
        2**31 - 1,
        *(2 ** rng.uniform(0, 31, 200)).astype(int).tolist(),
    }:
        around = [k * divisor + off for k in (0, 1, 2, (2**31 - 1) // divisor) for off in (-1, 0, 1)]
        for dividend in [*around, 2**31 - 1, *rng.integers(2**31, size=50).tolist()]:
            if 0 <= dividend < 2**31:
                assert emulated.call("quotient", dividend, divisor) == dividend // divisor, (dividend, divisor)


def test_more_dimensions_than_a_launch_takes(emulated):
    """One tensor's dimensions in reverse order, so that none merge; of each launch only the last block is run."""
    dims, last = 26, 512
    shape, dtype = [2] * dims, torch.bfloat16
    out = torch.full(shape, -1.0, dtype=dtype)
    mu = torch.tensor(0.5, dtype=dtype).expand(shape)
    log_var = torch.rand(2**dims, dtype=dtype).view(shape).permute(*reversed(range(dims)))
    assert len(launch(emulated, "forward StandardDivergence", [out, mu, log_var], SETTINGS, last_blocks=1)) == 2
    for half in range(2):
        index = (half, *[1] * (dims - 1 - int(math.log2(last))))
        expected = torch.ops.kl_ext.kl_div_single_loss(mu[index].contiguous(), log_var[index].contiguous())
        assert_same_bits(out[index], expected, f"the last elements of half {half}")
    assert int((out != -1).sum()) == 2 * last


@pytest.mark.parametrize("misaligned", [0, 1])
def test_more_elements_than_32_bits_count(emulated, rng, tmp_path, misaligned):
    """Over sparse files; of each launch only the last blocks are run."""
    numel, last = 2**31 + 2**20 + 5, 300
    files = [torch.from_file(str(tmp_path / name), shared=True, size=numel + 1, dtype=torch.bfloat16) for name in "abc"]
    out, mu, log_var = (x[misaligned : misaligned + numel] for x in files)
    for x, value in zip((mu, log_var), values(rng, SINGLE, [last], torch.bfloat16), strict=True):
        x[-last:] = value
    grids = launch(emulated, "forward StandardDivergence", [out, mu, log_var], SETTINGS, last_blocks=2)
    assert grids == (vector_grid(numel, 8) if not misaligned else [2**21, 2**21, 2**11 + 1])
    assert_same_bits(out[-last:], torch.ops.kl_ext.kl_div_single_loss(mu[-last:], log_var[-last:]), "the last elements")
    assert not out[: 2**20].any()
