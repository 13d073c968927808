"""The CUDA kernels that sum, without a GPU: the CPU operators' bits, and those of the order of a sum written once more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import kl_ext  # noqa: F401
import layouts
from emulated_checks import arithmetic_of, check_gradients, check_sum, finish_sums, launch_sum
from emulated_kernels import DTYPES, NARROW, WIDE, Result, assert_same_bits, values, without_q_too
from operators import GAUSSIAN, OPERATORS, SINGLE, Operator, each_operator, each_reducing_operator
from ordered_sum import reduced_sum

LENGTHS = (1, 2, 3, 16, 63, 64, 65, 512, 1023, 1024, 1025, 4096 + 7)


def normal(shape: Sequence[int], dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(tuple(shape)).to(dtype) for _ in range(count)]


def usual(operator: Operator, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as inputs of the operator."""
    return [operator.suited(i, x) for i, x in enumerate(tensors)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_length(emulated, dtype):
    for length in LENGTHS:
        rows = 37 if length < 100 else 3
        check_sum(emulated, normal([rows, length], dtype, 2), [1])
        check_sum(emulated, normal([rows, length], dtype, 4), [1], "mean")
        check_sum(emulated, layouts_of_halves(normal([rows, 2 * length], dtype, 2), 1), [1])


def layouts_of_halves(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """As an encoder's output comes: the two halves of one tensor, of each."""
    return [half for x in tensors for half in x.chunk(2, dim)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_every_length(emulated, dtype):
    for length in LENGTHS:
        check_sum(emulated, normal([length, 8], dtype, 2), [0])
        check_sum(emulated, normal([length, 5], dtype, 4), [0], "mean")


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_every_width(emulated, dtype):
    for width in (1, 2, 4, 16, 31, 33, 64, 200):
        check_sum(emulated, normal([1025, width], dtype, 2), [0])
        check_sum(emulated, layouts_of_halves(normal([70, 2 * width], dtype, 2), 1), [0], "mean")


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_take_turns_in_lanes(emulated, dtype):
    """Beyond 64 chunks, in one launch of many threads; and what was left is summed up in another."""
    emulated.set_few_threads(0)
    items = 16 // dtype.itemsize
    if items >= 4:  # 65 chunks, in 64 lanes of 2 turns
        assert check_sum(emulated, normal([64 * 1024 + 8], dtype, 2), [0])[0] == 64 * 2 * (64 // items) // 256
    for terms in (64 * 1024, 64 * 1024 + 8, 129 * 1024 - 8, 520 * 1024):
        x = normal([terms], dtype, 2)
        assert len(check_sum(emulated, x, [0])) == 2
        assert len(check_sum(emulated, [x[0], layouts.shifted(x[1])], [0], "mean")) == 2
    check_sum(emulated, normal([3, 66 * 1024], dtype, 2), [1])
    check_sum(emulated, layouts_of_halves(normal([2, 2 * 66 * 1024], dtype, 2), 1), [1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_the_lanes_of_few_rows(emulated, dtype):
    """Up to 16 threads to a lane: as many as it has terms, as fit a block, and as make a launch one of few threads."""
    width = 64 * dtype.itemsize // 16  # threads of a chunk in vectors
    for few in (2**17, 8 * 64 * width):
        emulated.set_few_threads(few)
        for rows, length in ((1, 1024), (3, 192), (2, 960), (1, 4096), (1, 4096 + 8), (5, 1032), (2, 1000), (3, 72)):
            chunks, steps = rows * -(-length // 1024), -(-min(length, 1024) // 64)
            sharers = 1
            while sharers < steps and 2 * sharers * width <= 256 and 2 * sharers * width * chunks <= few:
                sharers *= 2
            assert sharers > 1
            blocks = -(-chunks * width * sharers // max(64, width * sharers))
            assert check_sum(emulated, normal([rows, length], dtype, 2), [1])[0] == blocks
            assert check_sum(emulated, normal([rows, length], dtype, 4), [1], "mean")[0] == blocks
        for length in (65, 1023, 1025, 2049):  # no whole vectors: two numbers to a thread
            check_sum(emulated, normal([3, length], dtype, 2), [1])
            check_sum(emulated, [*normal([3, length], dtype, 2), *normal([3, 1], dtype, 2)], [1])
            check_sum(emulated, [*normal([8, length], dtype, 2), *normal([length], dtype, 2)], [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_the_lanes_of_few_columns(emulated, dtype):
    """A block has all lanes of a single chunk; of many, up to 8 threads beside each other and lanes of 256 threads in all."""
    emulated.set_few_threads(2**17)
    items = 16 // dtype.itemsize
    for rows, across in ((1000, 1), (192, 2), (65, 4)):
        shape, sharers = [rows, across * items], 2 if rows == 65 else 4
        width = min(across, 256 // (64 * sharers))
        assert check_sum(emulated, normal(shape, dtype, 2), [0]) == [across // width]
    for rows, across in ((1025, 1), (1024 + 63, 2), (2048, 8), (1030, 16)):  # 16 threads to a lane
        shape, width = [rows, across * items], min(across, 8)
        parts = 64 // (256 // (width * 16))
        grids = check_sum(emulated, normal(shape, dtype, 2), [0], "mean")
        assert len(grids) == 2 and grids[0] == across // width * 2 * parts
        prior = [*normal(shape, dtype, 2), *normal(shape[1:], dtype, 2)]
        assert check_gradients(emulated, GAUSSIAN, torch.randn(shape).to(dtype), prior)[0] == grids[0]
    emulated.set_few_threads(2**13)  # 2 threads to a lane
    for shape in ([1030, 32], [1030, 29], [700, 9]):
        prior = [*normal(shape, dtype, 2), *normal(shape[1:], dtype, 2)]
        check_sum(emulated, prior, [0])
        for wanted in ([True] * 4, [False, True, True, False], [False, False, False, True]):
            check_gradients(emulated, GAUSSIAN, torch.randn(shape).to(dtype), prior, NARROW, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_prepare_the_q_of_all_rows(emulated, dtype):
    """In blocks of 256 threads, also where others are smaller; where the q of all columns fits 12 KiB."""
    emulated.set_prepares_q(True)
    most = 4096 // max(4, dtype.itemsize)
    items = 16 // dtype.itemsize
    for few in (2**17, 0):
        emulated.set_few_threads(few)
        for columns in (items, 16, 96, most):
            for rows in (70, 1030) if columns < 96 else (7, 33):
                inputs = [*normal([rows, columns], dtype, 2), *normal([columns], dtype, 2)]
                check_sum(emulated, inputs, [0, 1], "mean")
                halves = layouts_of_halves(normal([rows, 2 * columns], dtype, 1), 1)
                check_sum(emulated, [*halves, *inputs[2:]], [0, 1])
                grids = check_sum(emulated, inputs, [1])
                if columns == 16:
                    assert grids == [-(-rows * 16 // items // 256)]
        for columns in (most + items, 2 * most):  # do not fit
            check_sum(emulated, [*normal([9, columns], dtype, 2), *normal([columns], dtype, 2)], [0, 1])
        rows = [*normal([70, 32], dtype, 2), *normal([70, 32], dtype, 2)]  # each with a q of its own
        check_sum(emulated, rows, [0, 1])
        check_sum(emulated, [*rows[:3], rows[3][0]], [0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_chunks_of_columns_than_lanes(emulated, dtype):
    for rows, width in ((64 * 1024 + 1, 8), (130 * 1024, 3)):
        inputs = [*normal([rows, width], dtype, 2), *normal([width], dtype, 2)]
        check_sum(emulated, inputs[:2], [0])
        check_gradients(emulated, GAUSSIAN, torch.ones([], dtype=dtype).expand(rows, width), inputs)


def test_a_sum_of_more_than_a_million_terms(emulated):
    """Of two groups of chunks, the second of which is a single short chunk; the first length is no whole number of vectors."""
    for terms in (1024 * 1024 + 3, 1024 * 1024 + 4):
        x = torch.rand(terms)
        assert len(check_sum(emulated, [x, x], [0])) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("are_lanes", [False, True], ids=["chunks", "lanes"])
def test_what_is_left_is_summed_up_group_by_group(emulated, dtype, are_lanes):
    """One block has 1024 groups, 2^30 terms; beyond them there is a launch more."""
    group = 64 if are_lanes else 1024
    cases = [(2, 100, 1), (64, 3, 1), (65, 17, 1), (17 * group + 5, 17, 1), (1024 * group, 1, 1)]
    for count, columns, launches in [*cases, (1024 * group + 1, 2, 2)] if are_lanes else cases:
        partials = torch.randn(count, columns).to(dtype)
        sums = Result(partials[0])
        assert finish_sums(emulated, partials, are_lanes, sums.tensor, 7) == launches
        of_groups = torch.stack([reduced_sum(part, [0]) for part in partials.split(group)])
        expected = reduced_sum(of_groups, [0]) / torch.tensor(7, dtype=dtype)
        sums.check(expected, f"{columns} columns of {count}")


SHAPE = [4, 16, 6, 8]
LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda x, i: x,
    "channels last": lambda x, i: x.contiguous(memory_format=torch.channels_last),
    "halves of the channels": lambda x, i: layouts.chunk(x, 1, i % 2),
    "halves of the last dim": lambda x, i: layouts.chunk(x, 3, i % 2),
    "transposed": lambda x, i: layouts.transposed(x, 0, -1),
    "misaligned": lambda x, i: layouts.shifted(x),
    "every second column": lambda x, i: layouts.inside(x, -1) if i == 0 else x,
    "priors of the last dim": lambda x, i: x if i < 2 else x[0, 0, 0],
    "priors of the channels": lambda x, i: x if i < 2 else x[0, :, :1, :1],
    "scalar priors": lambda x, i: x if i < 2 else x[0, 0, 0, 0],
    "priors of the batch": lambda x, i: x if i < 2 else x[:, :1, :1, :1],
    "priors of the middle": lambda x, i: x if i < 2 else x[:, :, :1],
    "each its own": lambda x, i: [x[0], x[:, :1], x[..., :1], x[0, 0, :, :1]][i],
}
DIMS = ([0], [1], [2], [3], [0, 1], [0, 2], [1, 3], [2, 3], [0, 1, 2], [0, 2, 3], [1, 2, 3], [0, 1, 2, 3])


@pytest.mark.parametrize("layout", LAYOUTS)
@each_reducing_operator
def test_any_dims_of_any_layout(emulated, rng, operator, layout):
    for dims in DIMS:
        for dtype in DTYPES:
            clamp = WIDE if rng.random() < 0.3 else NARROW
            inputs = [LAYOUTS[layout](x, i) for i, x in enumerate(values(rng, operator, SHAPE, dtype))]
            if rng.random() < 0.3:
                other = rng.integers(4)
                inputs[other] = inputs[other].to(DTYPES[rng.integers(4)])
            inputs = inputs if rng.random() < 0.7 else inputs[:2]
            check_sum(emulated, inputs, dims, rng.choice(["sum", "mean"]), clamp, operator)


@pytest.mark.parametrize("layout", list(LAYOUTS)[-6:])
@each_operator
def test_gradients_of_what_is_broadcast(emulated, rng, operator, layout):
    for dtype in DTYPES:
        count = operator.count
        inputs = [LAYOUTS[layout](x, i + 4 - count) for i, x in enumerate(values(rng, operator, SHAPE, dtype))]
        grads = {
            "full": torch.randn(SHAPE).to(dtype),
            "of a sum": torch.randn([]).to(dtype).expand(SHAPE),
            "of a mean": torch.randn([]).to(arithmetic_of(*inputs)).expand(SHAPE),
            "of sums over the last dims": torch.randn(4, 16, 1, 1).to(dtype).expand(SHAPE),
            "of sums over the channels": torch.randn(4, 1, 6, 8).to(dtype).expand(SHAPE),
            "of another dtype": torch.randn(SHAPE).to(DTYPES[rng.integers(4)]),
        }
        if rng.random() < 0.3:
            other = rng.integers(count)
            inputs[other] = inputs[other].to(DTYPES[rng.integers(4)])
        for grad_output in grads.values():
            for given in without_q_too(operator, inputs):
                check_gradients(emulated, operator, grad_output, given, WIDE if rng.random() < 0.3 else NARROW)


@pytest.mark.parametrize("dtype", DTYPES)
@each_operator
def test_gradients_of_a_prior_of_every_width(emulated, operator, dtype):
    """[B, D] -> [D], in one pass with the gradients [B, D]."""
    for rows, width in ((1, 8), (7, 1), (33, 2), (1030, 16), (65, 31), (1025, 33), (2049, 64), (100, 200)):
        count = operator.count
        full = layouts_of_halves(normal([rows, 2 * width], dtype, 1), 1)[: count // 2]
        grad_output = torch.randn(rows, width).to(dtype)
        for inputs in without_q_too(operator, usual(operator, [*full, *normal([width], dtype, count // 2)])):
            check_gradients(emulated, operator, grad_output, inputs)


@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if operator.count == 4], ids=str)
def test_gradients_of_a_q_that_columns_share(emulated, operator):
    """Each sum rounded to its own dtype; and where p is broadcast too, or q an expanded tensor, every gradient is there."""
    p, q = (usual(operator, normal(shape, torch.float32, 2)) for shape in ([1030, 16], [16]))
    grad = torch.randn(1030, 16)
    check_gradients(emulated, operator, grad, [*p, *q])
    check_gradients(emulated, operator, grad, [*p, q[0].half(), q[1]])
    check_gradients(emulated, operator, grad, [*p, q[0], q[1].bfloat16()])
    check_gradients(emulated, operator, grad, [p[0], p[1][0], *q])
    check_gradients(emulated, operator, grad, [p[0][0], p[1], *q])
    check_gradients(emulated, operator, grad, [p[0], p[1][0], *(x.expand(1030, 16) for x in q)])
    for bits in range(1, 16):
        check_gradients(emulated, operator, grad, [*p, *q], NARROW, [bool(bits >> i & 1) for i in range(4)])


@each_operator
def test_gradients_not_wanted_are_not_written(emulated, rng, operator):
    for dtype in (torch.float32, torch.bfloat16):
        count = operator.count
        inputs = [x if i < count // 2 else x[0] for i, x in enumerate(values(rng, operator, [65, 16], dtype))]
        for bits in range(1, 2**count):
            mask = [bool(bits >> i & 1) for i in range(count)]
            check_gradients(emulated, operator, torch.randn(65, 16).to(dtype), inputs, NARROW, mask)


def test_more_rows_than_32_bits_count(emulated, rng, tmp_path):
    """Over sparse files, aligned for no vector; of each launch only the last blocks are run."""
    rows, last = 2**30 + 2**10, 512
    numel = 4 * rows
    files = [torch.from_file(str(tmp_path / name), shared=True, size=numel + 1, dtype=torch.bfloat16) for name in "ab"]
    inputs = [x[1:].view(rows, 4) for x in files]
    sums = torch.from_file(str(tmp_path / "sums"), shared=True, size=rows, dtype=torch.float32)
    for x in inputs:
        x[-last:] = torch.randn(last, 4).to(x.dtype)
    kernel = "forward_sum StandardDivergence"
    assert len(launch_sum(emulated, kernel, [rows, 4], [1], ["sum", *inputs], [sums], last_blocks=last // 128)) == 2
    expected = torch.ops.kl_ext.gaussian_kl_div(*(x[-last:] for x in inputs), reduction="sum", dim=[1], dtype=torch.float32)
    assert_same_bits(sums[-last:], expected, "the last rows")
    assert not sums[: 2**20].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_mean_is_divided_as_ieee_has_it(emulated, rng, dtype):
    numbers = torch.cat(values(rng, SINGLE, [300], dtype))
    for wide in [torch.float64] if dtype == torch.float64 else [torch.float32, torch.float64]:
        for divisor in (1, 3, 49, 10**6 + 3, 2**31 + 1):
            quotients = Result(numbers.to(wide))
            emulated.call(
                "divide",
                DTYPES.index(dtype),
                ctypes.c_void_p(numbers.data_ptr()),
                ctypes.c_int64(numbers.numel()),
                ctypes.c_int64(divisor),
                wide == torch.float64,
                ctypes.c_void_p(quotients.tensor.data_ptr()),
            )
            widened = numbers.to(wide).numpy()
            quotients.check(torch.from_numpy(widened / widened.dtype.type(divisor)), f"divided by {divisor}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once(emulated, dtype):
    """Just beside the middle of two neighbours, where float32 on the way would make it the middle."""
    lower = torch.rand(300).add(0.5).to(dtype)
    upper = (lower.view(torch.int16) + 1).view(dtype)
    middle = (lower.double() + upper.double()) / 2
    even = torch.where(lower.view(torch.int16) % 2 == 0, lower, upper)
    for sums, nearest in ((middle * (1 + 2**-40), upper), (middle * (1 - 2**-40), lower), (middle, even)):
        for sign in (1, -1):
            result = Result(nearest)
            finish_sums(emulated, sign * sums[None], False, result.tensor)
            result.check(sign * nearest, "beside the middle")
