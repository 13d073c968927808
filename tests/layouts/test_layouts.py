"""Every layout gives the bits of the contiguous computation and the strides that torch gives; broadcasting sums gradients."""

import itertools
import mmap

import pytest
import torch

import oracle
from layouts import LAYOUTS, chunk, describe, expanded, inside, iterator_strides, overlapping, shifted, transposed
from operators import ELEMENTWISE, PAIR, SINGLE, each_elementwise_operator
from oracle import same_bits

EVERY = pytest.mark.parametrize(
    "shape, name, make",
    LAYOUTS,
    ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)) if isinstance(x, tuple) else "",
)


def backward(operator, grad_output, inputs, mask=None):
    return operator.backward_operator(grad_output, *inputs, *operator.bounds, mask or [True] * operator.count)


def assert_like_contiguous(operator, inputs, grad_output):
    """The bits that contiguous copies give; the strides of torch for the result, and for gradients those of their inputs."""
    copies = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
    value, want = operator(*inputs), operator(*copies)
    assert same_bits(value, want), describe(*inputs)
    assert value.stride() == iterator_strides(*inputs), describe(*inputs)
    assert value.isfinite().all()
    expected = backward(operator, grad_output.contiguous(), copies)
    for x, got, gradient in zip(inputs, backward(operator, grad_output, inputs), expected, strict=True):
        assert got.shape == x.shape and got.stride() == torch.empty_like(x).stride(), describe(x, got)
        assert same_bits(got, gradient), describe(*inputs)


@each_elementwise_operator
@EVERY
def test_each_layout_for_all_arguments(operator, shape, name, make, device):
    inputs = [make(torch.randn(shape, device=device)) for _ in range(operator.count)]
    assert_like_contiguous(operator, inputs, make(torch.randn(shape, device=device)))


@each_elementwise_operator
@EVERY
def test_each_layout_for_one_argument(operator, shape, name, make, device):
    for position in range(operator.count):
        inputs = [torch.randn(shape, device=device) for _ in range(operator.count)]
        inputs[position] = make(inputs[position])
        assert_like_contiguous(operator, inputs, torch.randn(shape, device=device))


@each_elementwise_operator
@EVERY
def test_each_layout_for_grad_output_alone(operator, shape, name, make, device):
    assert_like_contiguous(
        operator, [torch.randn(shape, device=device) for _ in range(operator.count)], make(torch.randn(shape, device=device))
    )


@each_elementwise_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_random_mixes_of_layouts(operator, dtype, device, rng):
    by_shape = {shape: [make for other, _, make in LAYOUTS if other == shape] for shape, _, _ in LAYOUTS}
    for shape, makes in by_shape.items():
        for _ in range(20):
            picked = [makes[i] for i in rng.integers(len(makes), size=operator.count + 1)]
            *inputs, grad_output = [make(torch.randn(shape, device=device).to(dtype)) for make in picked]
            assert_like_contiguous(operator, inputs, grad_output)


@each_elementwise_operator
@pytest.mark.parametrize("rank", range(13))
def test_every_rank_up_to_twelve(operator, rank, device, rng):
    for _ in range(5):
        shape = [int(n) for n in rng.permutation([3, 2, 1, 4, 2, 1, 2, 3, 1, 2, 1, 2][:rank])]
        dense = [torch.randn(shape, device=device) for _ in range(operator.count + 1)]
        orders = [rng.permutation(rank).tolist() for _ in dense]
        permuted = [
            x.permute(order).contiguous().permute(sorted(range(rank), key=order.__getitem__))
            for x, order in zip(dense, orders, strict=True)
        ]
        *inputs, grad_output = [inside(x, int(rng.integers(rank))) if rank and rng.integers(2) else x for x in permuted]
        assert_like_contiguous(operator, inputs, grad_output)


@each_elementwise_operator
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 1000, 4097])
def test_chunks_of_any_width(operator, columns, device):
    """The encoder's output, cut in half along its last dimension: rows with a stride of twice their length."""
    for rows in (1, 3, 70):
        h = torch.randn(rows, operator.count * columns, device=device)
        inputs = list(h.chunk(operator.count, -1))
        assert_like_contiguous(operator, inputs, torch.randn(rows, columns, device=device))
        assert_like_contiguous(operator, inputs, torch.ones((), device=device).expand(rows, columns))


@each_elementwise_operator
@pytest.mark.parametrize("numel", [*range(20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1025, 40_001])
def test_every_length_of_tail(operator, numel, device):
    """No element depends on where it stands."""
    inputs = [torch.randn(numel, device=device) for _ in range(operator.count)]
    grad_output = torch.randn(numel, device=device)
    value, gradients = operator(*inputs), backward(operator, grad_output, inputs)
    flipped = [x.flip(0) for x in inputs]
    assert same_bits(operator(*flipped).flip(0), value)
    for got, want in zip(backward(operator, grad_output.flip(0), flipped), gradients, strict=True):
        assert same_bits(got.flip(0), want)
    assert_like_contiguous(operator, [shifted(x) for x in inputs], shifted(grad_output))


@each_elementwise_operator
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)], ids=str)
def test_zero_size(operator, shape, device):
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(operator.count)]
    value = operator(*inputs)
    assert value.shape == shape and value.stride() == torch.add(*inputs[:2]).stride()
    for gradient in torch.autograd.grad(value.sum(), inputs):
        assert gradient.shape == shape
    prior = [
        torch.randn(shape[-1:] if shape[-1] else (1,), device=device, requires_grad=True) for _ in range(operator.count - 1)
    ]
    mixed = [inputs[0], *prior]
    for x, gradient in zip(mixed, torch.autograd.grad(operator(*mixed).sum(), mixed), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


@each_elementwise_operator
def test_zero_dim(operator, device):
    inputs = [torch.randn((), device=device, requires_grad=True) for _ in range(operator.count)]
    value = operator(*inputs)
    assert value.shape == ()
    assert same_bits(value, operator(*(x.detach()[None] for x in inputs))[0])
    assert all(gradient.shape == () for gradient in torch.autograd.grad(value, inputs))


def test_the_stride_rule_is_torchs(device, rng):
    """`iterator_strides` against torch.add and torch.addcmul."""
    by_shape = {shape: [make for other, _, make in LAYOUTS if other == shape] for shape, _, _ in LAYOUTS}
    for shape, makes in by_shape.items():
        for _ in range(150):
            a, b, c = (makes[i](torch.randn(shape, device=device)) for i in rng.integers(len(makes), size=3))
            for x in (a, a[0], a.narrow(1, 0, 1)):
                assert torch.add(x, b).stride() == iterator_strides(x, b), describe(x, b)
                assert torch.addcmul(x, b, c).stride() == iterator_strides(x, b, c), describe(x, b, c)


def test_result_strides_are_those_of_torch_add(device, rng):
    by_shape = {shape: [make for other, _, make in LAYOUTS if other == shape] for shape, _, _ in LAYOUTS}
    for shape, makes in by_shape.items():
        for _ in range(100):
            a, b = (makes[i](torch.randn(shape, device=device)) for i in rng.integers(len(makes), size=2))
            for x, y in ((a, b), (a[0], b), (a, b.narrow(1, 0, 1)), (a, b.sum())):
                assert SINGLE(x, y).stride() == torch.add(x, y).stride(), describe(x, y)


BROADCASTS = [
    ((4, 5), (5,)),
    ((5,), (4, 5)),
    ((4, 5), ()),
    ((), (4, 5)),
    ((4, 1), (5,)),
    ((1, 5), (4, 1)),
    ((3, 4, 5), (4, 1)),
    ((1,), (3, 4, 5)),
    ((2, 1, 4, 1), (3, 1, 5)),
    ((6, 1, 1), (6, 7, 8)),
    ((1, 1, 8), (6, 7, 1)),
    ((2, 3, 4, 5), (3, 1, 1)),
    ((70, 300), (300,)),
    ((70, 1), (70, 300)),
]


def summed_to(x, shape):
    """x summed over the dimensions along which a tensor of that shape was broadcast, in float64."""
    return x.double().sum_to_size(shape)


def assert_broadcast(operator, shapes, device):
    """Values as for expanded inputs, and gradients as theirs, summed, to the rounding of a sum in float32."""
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    full = torch.broadcast_shapes(*shapes)
    copies = [x.detach().expand(full).contiguous() for x in inputs]
    value = operator(*inputs)
    assert value.shape == full and same_bits(value, operator(*copies))
    assert value.stride() == iterator_strides(*inputs)
    grad_output = torch.randn(full, device=device)
    for got, x, whole in zip(
        torch.autograd.grad(value, inputs, grad_output), inputs, backward(operator, grad_output, copies), strict=True
    ):
        assert got.shape == x.shape and got.dtype == x.dtype
        if x.shape == full:
            assert same_bits(got, whole)
        else:
            terms = whole.numel() // max(x.numel(), 1)
            allowed = terms * torch.finfo(torch.float32).eps * summed_to(whole.abs(), x.shape)
            assert ((got.double() - summed_to(whole, x.shape)).abs() <= allowed).all()


@pytest.mark.parametrize("first, second", BROADCASTS, ids=str)
def test_broadcasting(first, second, device):
    for operator, shapes in (
        (SINGLE, (first, second)),
        (PAIR, (first, first, second, second)),
        (PAIR, (second, first, (1,), second)),
    ):
        assert_broadcast(operator, shapes, device)


def test_broadcasting_of_random_shapes(device, rng):
    for _ in range(60):
        full = rng.integers(1, 6, size=rng.integers(1, 6))
        for operator in ELEMENTWISE:
            shapes = [
                tuple(int(n) if rng.integers(3) else 1 for n in full[rng.integers(full.size + 1) :])
                for _ in range(operator.count)
            ]
            assert_broadcast(operator, shapes, device)


@each_elementwise_operator
def test_gradients_of_broadcast_inputs_keep_their_inputs_strides(operator, device):
    """As torch.empty_like gives them."""
    full = torch.randn(3, 4, 6, 5, device=device)
    narrow = torch.randn(6, 4, 5, device=device).transpose(0, 1)[:, :, ::2].narrow(2, 0, 1)
    for position in range(operator.count):
        inputs = [full] * operator.count
        inputs[position] = narrow
        gradient = backward(operator, torch.randn_like(full), inputs)[position]
        assert gradient.shape == narrow.shape and gradient.stride() == torch.empty_like(narrow).stride()


@each_elementwise_operator
def test_each_gradient_alone_has_the_same_bits(operator, device):
    """Whatever output_mask leaves out, and however the inputs lie."""
    for make in (lambda x: x, lambda x: chunk(x, 1, 1), lambda x: transposed(x, 0, 1), lambda x: expanded(x, 0), overlapping):
        inputs = [make(torch.randn(19, 37, device=device)) for _ in range(operator.count)]
        grad_output = torch.randn(19, 37, device=device)
        every = backward(operator, grad_output, inputs)
        for mask in itertools.product([False, True], repeat=operator.count):
            for got, want, wanted in zip(backward(operator, grad_output, inputs, list(mask)), every, mask, strict=True):
                assert same_bits(got, want) if wanted else got is None


def reserved(numel, dtype, device):
    """Memory of which only the touched pages exist."""
    if device.type != "cpu":
        return torch.empty(numel, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@each_elementwise_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_beyond_31_bits(operator, dtype, device):
    """A few elements, more than 2^31 elements apart: in a dimension of their own, and in one with others inside."""
    for shape, strides, last in (
        ((3,), (2**30 + 1,), 2**31 + 3),
        ((2, 5), (2**31 + 7, 1), 2**31 + 12),
        ((5, 2), (1, 2**31 + 7), 2**31 + 12),
    ):
        inputs = [reserved(last, dtype, device).as_strided(shape, strides) for _ in range(operator.count)]
        for x in inputs:
            x.copy_(torch.randn(shape))
        grad_output = reserved(last, dtype, device).as_strided(shape, strides)
        grad_output.copy_(torch.randn(shape))
        assert_like_contiguous(operator, inputs, grad_output)


def available_gigabytes(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6


@pytest.mark.slow
@each_elementwise_operator
def test_more_elements_than_31_bits_count(operator, device):
    """Inputs that are one row each, and a bfloat16 result of more than 2^31 elements; likewise one gradient."""
    if available_gigabytes(device) < 7:
        pytest.skip("needs 7 GB of memory")
    rows, columns = 2**16 + 3, 2**15 + 1
    row = [torch.randn(columns, device=device).bfloat16() for _ in range(operator.count)]
    wide = [x.expand(rows, columns) for x in row]
    value = operator(*wide)
    assert value.numel() > 2**31 and value.stride() == (columns, 1)
    want = operator(*row)
    for index in (0, 1, 2**14, 2**16, rows - 2, rows - 1):
        assert same_bits(value[index], want)
    del value
    mask = [True] + [False] * (operator.count - 1)
    (gradient, *_) = backward(operator, torch.ones((), device=device).expand(rows, columns), wide, mask)
    want = backward(operator, torch.ones(columns, device=device), row, mask)[0]
    for index in (0, 2**16, rows - 1):
        assert same_bits(gradient[index], want)


def test_helpers_make_the_layouts_they_name(device):
    x = torch.randn(4, 6, device=device)
    assert torch.equal(chunk(x, 1, 1), x) and chunk(x, 1, 1).stride() == (12, 1)
    assert torch.equal(inside(x, -1, 3), x) and inside(x, -1, 3).stride()[1] == 3
    assert torch.equal(transposed(x, 0, 1), x) and transposed(x, 0, 1).stride() == (1, 4)
    assert torch.equal(shifted(x), x) and shifted(x).storage_offset() == 3
    assert expanded(x, 0).stride() == (0, 1) and expanded(x, 0).shape == x.shape
    assert overlapping(x).shape == x.shape and overlapping(x).stride() == (1, 1)
    assert oracle.same_bits(x, inside(x, 0))
