"""The order of every sum, of values and of gradients: bit for bit that of ordered_sum.py, whatever the layout."""

import itertools

import numpy
import pytest
import torch

from layouts import chunk, inside, shifted, transposed
from operators import DTYPES, GAUSSIAN, Operator, each_documented_loss, each_reducing_operator
from oracle import same_bits
from ordered_sum import additions, ordered_sum, reduced_sum, sum_to_shape
from reduction_cases import ordered_gradients, ordered_value, random_case

SIZES = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 70_001]
LARGE = 1024 * 1024 + 3  # three levels of chunks


def assert_ordered(operator, inputs, reduction="sum", dim=None):
    value = operator(*inputs, reduction=reduction, dim=dim)
    about = f"{reduction} of {dim}, {[(tuple(x.shape), x.stride(), x.dtype) for x in inputs]}"
    assert same_bits(value, ordered_value(inputs, reduction, dim, operator=operator)), about
    return value


def test_the_slow_sum_is_the_definition_of_the_order(rng):
    """Against single additions of Python floats in float32, lane by lane."""

    def literal(terms):
        if len(terms) > 1024:
            return literal([literal(terms[i : i + 1024]) for i in range(0, len(terms), 1024)])
        lanes = [numpy.float32(0)] * 64
        for i, term in enumerate(terms):
            lanes[i % 64] = lanes[i % 64] + term
        for half in (32, 16, 8, 4, 2, 1):
            for lane in range(half):
                lanes[lane] = lanes[lane] + lanes[lane + half]
        return lanes[0]

    for n in (0, 1, 2, 63, 64, 65, 1000, 1024, 1025, 2047, 5000):
        terms = rng.normal(size=n).astype(numpy.float32)
        assert numpy.float32(literal(list(terms))).tobytes() == ordered_sum(terms).tobytes()
    assert not numpy.signbit(ordered_sum(numpy.array([-0.0], dtype=numpy.float32)))
    assert (additions(1024), additions(1024**2), additions(10**8)) == (21, 42, 49)


@each_reducing_operator
def test_another_order_would_show(operator, rng):
    """The control of every test here: summed backwards, by torch or in halves, some of 200 sums have other bits."""
    terms = operator(*operator.wide_range(rng, (200, 3000), (200, 3000)))
    in_halves = ordered_sum(terms[:, :1500].numpy()) + ordered_sum(terms[:, 1500:].numpy())
    others = [terms.sum(1), terms.flip(1).cumsum(1)[:, -1], torch.from_numpy(in_halves), reduced_sum(terms.flip(1), [1])]
    assert not any(same_bits(other, reduced_sum(terms, [1])) for other in others)


@each_reducing_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [2, 4])
def test_full_sums_of_every_size(operator, dtype, inputs, rng):
    for n in SIZES:
        for reduction in ("sum", "mean"):
            assert_ordered(operator, operator.wide_range(rng, *[(n,)] * inputs, dtype=dtype), reduction)


@each_reducing_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_sums_of_three_levels(operator, dtype, rng):
    inputs = operator.wide_range(rng, (LARGE,), (LARGE,), dtype=dtype)
    for reduction in ("sum", "mean"):
        assert_ordered(operator, inputs, reduction)
    assert_ordered(operator, [x[: LARGE - 3].view(64, 16, 1024) for x in inputs], "batchmean")


@each_reducing_operator
@pytest.mark.parametrize("n", [n for n in SIZES if n < 3000])
def test_rows_and_columns_of_every_length(operator, n, rng):
    for rows in (1, 5, 67):
        assert_ordered(operator, operator.wide_range(rng, (rows, n), (rows, n)), "sum", -1)
        assert_ordered(operator, operator.wide_range(rng, (n, rows), (n, rows)), "sum", 0)
        assert_ordered(operator, operator.wide_range(rng, (3, n, rows), (n, rows), (rows,), ()), "mean", 1)


FLAT = {
    "contiguous": lambda x: x,
    "offset": shifted,
    "first chunk of the last dim": lambda x: chunk(x, -1, 0),
    "second chunk of dim 1": lambda x: chunk(x, 1, 1),
    "transposed": lambda x: transposed(x, 0, -1),
    "every third column": lambda x: inside(x, -1, 3),
    "every second row": lambda x: inside(x, 0),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "half of the channels last": lambda x: (
        torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1] if x.dim() == 4 else x
    ),
}


@each_reducing_operator
@pytest.mark.parametrize("shape", [(37, 70), (3, 5, 9, 13), (2, 40, 8, 8)], ids=str)
def test_layouts_that_hold_the_same_numbers_give_the_same_bits(operator, shape, rng):
    plain = operator.wide_range(rng, *[shape] * 4)
    for dims in [d for n in range(1, len(shape) + 1) for d in itertools.combinations(range(len(shape)), n)]:
        want = assert_ordered(operator, plain, "sum", dims)
        for name, make in FLAT.items():
            assert same_bits(operator(*map(make, plain), reduction="sum", dim=dims), want), (name, dims)
        mixed = [make(x) for x, make in zip(plain, list(FLAT.values())[2:6], strict=True)]
        assert same_bits(operator(*mixed, reduction="sum", dim=dims), want), dims


@each_reducing_operator
def test_priors_give_the_bits_of_expanded_priors(operator, rng):
    mu, log_var = operator.wide_range(rng, (33, 6, 70), (33, 6, 70))
    table = operator.wide_range(rng, (5, 70), (5, 70))
    labels = torch.from_numpy(rng.integers(5, size=33))
    priors = {
        "[D]": operator.wide_range(rng, (70,), (70,)),
        "[1, D]": operator.wide_range(rng, (1, 70), (1, 70)),
        "scalar": operator.wide_range(rng, (), ()),
        "the middle": operator.wide_range(rng, (33, 1, 70), (33, 1, 70)),
        "table of labels": [x[labels][:, None] for x in table],
    }
    for name, prior in priors.items():
        for dim in (None, 0, 1, 2, (0, 2), (1, 2)):
            want = assert_ordered(operator, [mu, log_var, *(x.expand(mu.shape).contiguous() for x in prior)], "sum", dim)
            assert same_bits(operator(mu, log_var, *prior, reduction="sum", dim=dim), want), (name, dim)
            by_strides = [x.expand(mu.shape) for x in prior]
            assert same_bits(operator(mu, log_var, *by_strides, reduction="sum", dim=dim), want), (name, dim)


@each_reducing_operator
def test_sums_and_gradients_of_random_shapes_layouts_and_broadcasts(operator, rng):
    for _ in range(150):
        inputs, dims = random_case(rng, operator)
        reduction = str(rng.choice(["sum", "mean", "none"]))
        how = {} if reduction == "none" else {"reduction": reduction, "dim": dims}
        value = assert_ordered(operator, inputs, **how) if how else operator(*inputs)
        (grad_output,) = GAUSSIAN.wide_range(rng, tuple(value.shape), dtype=value.dtype)
        wants = ordered_gradients(grad_output, inputs, **how, operator=operator)
        for x, got, want in zip(inputs, operator.backward(grad_output, *inputs, **how), wants, strict=True):
            assert same_bits(got, want), (
                f"{how}: {[(tuple(x.shape), x.stride()) for x in inputs]}, gradient of {tuple(x.shape)}"
            )


PRIORS = {"[D]": (65,), "[1, D]": (1, 65), "scalar": (), "one": (1,), "the middle": (30, 1, 65), "rows": (30, 1, 1)}


@each_reducing_operator
@pytest.mark.parametrize(
    "prior, dtype",
    [
        (prior, dtype)
        for prior in PRIORS.values()
        for dtype in DTYPES
        if dtype == torch.float32 or prior in ((65,), (30, 1, 65))
    ],
    ids=str,
)
def test_gradients_of_broadcast_priors_are_ordered_sums(operator, prior, dtype, rng):
    """Reduced and not; for chunks; with a grad_output that is dense, reduced or expanded from one number."""
    encoded, *q = operator.wide_range(rng, (30, 37, 130), prior, prior, dtype=dtype)
    inputs = [*encoded.chunk(2, -1), *q]
    for how in ({}, {"reduction": "sum"}, {"reduction": "sum", "dim": (1, 2)}, {"reduction": "mean", "dim": 1}):
        (grad_output,) = GAUSSIAN.wide_range(rng, tuple(operator(*inputs, **how).shape), dtype=dtype)
        for grad in (grad_output, torch.full((), 0.7, dtype=dtype).expand(grad_output.shape)):
            for got, want in zip(
                operator.backward(grad, *inputs, **how),
                ordered_gradients(grad, inputs, **how, operator=operator),
                strict=True,
            ):
                assert same_bits(got, want), how


SHARED = [(1, 16), (2, 17), (30, 5000), (63, 16), (65, 1024), (1000, 70), (1025, 33), (1100, 600), (2100, 64)]


@each_reducing_operator
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_prior_that_all_rows_share_gets_ordered_sums(operator, dtype, threads, rng):
    """From one gradient for all terms: fewer rows than lanes, parts of chunks for each thread, chunks, columns in parts."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for rows, columns in SHARED:
            encoded, *q = operator.wide_range(rng, (rows, 2 * columns), (columns,), (1, columns), dtype=dtype)
            grad = torch.full((), 0.7, dtype=dtype)
            for p in (encoded.chunk(2, 1), [x.contiguous() for x in encoded.chunk(2, 1)]):
                for reduction in ("sum", "batchmean"):
                    inputs = [*p, *q]
                    assert_ordered(operator, inputs, reduction)
                    wanted = ordered_gradients(grad, inputs, reduction, operator=operator)
                    for got, want in zip(operator.backward(grad, *inputs, reduction=reduction), wanted, strict=True):
                        assert same_bits(got, want), (rows, columns, reduction)
    finally:
        torch.set_num_threads(before)


@each_reducing_operator
def test_gradients_of_a_table_of_priors_reach_the_table_by_torch(operator, rng):
    """[K, D][labels] is an input as large as the terms: its own gradient is elementwise, and indexing adds it up."""
    mu, log_var, *table = operator.wide_range(rng, (33, 70), (33, 70), (5, 70), (5, 70), dtype=torch.float64)
    labels = torch.from_numpy(rng.integers(5, size=33))
    leaves = [x.requires_grad_() for x in table]
    value = operator(mu, log_var, *(x[labels] for x in leaves), reduction="batchmean")
    share = torch.tensor(1 / 33, dtype=torch.float64).expand(33, 70)
    rows = operator.backward(share, mu, log_var, *(x[labels].detach() for x in table))
    for got, row in zip(torch.autograd.grad(value, leaves), rows[2:], strict=True):
        assert same_bits(got, torch.zeros_like(got).index_add(0, labels, row))


@each_documented_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_gradients_of_the_documented_losses_are_ordered_sums(operator: Operator, dtype, rng):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shapes in (
        [(70, 65), (65,)],
        [(65,), (65,)],
        [(33, 6, 70), (33, 6, 70), (70,), (70,)],
        [(1100, 3)] * 3 + [()],
        [(2, 1, 65), (1500, 1)],
    ):
        shapes = (shapes * 2)[: operator.count] if len(shapes) < operator.count else shapes[-operator.count :]
        inputs = GAUSSIAN.wide_range(rng, *shapes, dtype=dtype)
        for shape in (torch.broadcast_shapes(*shapes), torch.broadcast_shapes(*shapes, (5, 1, 1, 1))):
            (grad_output,) = GAUSSIAN.wide_range(rng, shape, dtype=dtype)
            for grad in (grad_output, torch.full((), 0.7, dtype=dtype).expand(shape)):
                arguments = -30.0, 20.0, [True] * operator.count
                terms = operator.backward_operator(grad.to(wide), *(x.to(wide).expand(shape) for x in inputs), *arguments)
                for x, got, t in zip(inputs, operator.backward_operator(grad, *inputs, *arguments), terms, strict=True):
                    assert same_bits(got, sum_to_shape(t, x.shape).to(dtype)), (shapes, shape, tuple(x.shape))
