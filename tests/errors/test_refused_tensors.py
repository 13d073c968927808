"""Tensors that are refused, for every operator: the error names the function, the argument, what was expected and what came."""

import numpy
import pytest
import torch

from operators import ELEMENTWISE, Operator, each_operator, each_reducing_operator
from refusals import BACKWARD, DISPATCHED, PUBLIC, calls_of, each, raises

pytestmark = pytest.mark.usefixtures("autograd_mode")

FORWARD = calls_of(ways=(PUBLIC, DISPATCHED), reductions=("none", "sum", "batchmean"))
# Of those that reduce, grad_output is smaller than the inputs.
ELEMENTWISE_BACKWARD = calls_of(ELEMENTWISE, (BACKWARD,))
each_call = each(calls_of())


def tensors(arguments, device, shape=(2, 3)):
    return [torch.randn(shape, device=device) for _ in arguments]


def each_position(arguments, device, bad):
    """Calls' arguments with `bad` in the place of each in turn."""
    for position, argument in enumerate(arguments):
        given = tensors(arguments, device)
        given[position] = bad
        yield argument, given


INTEGERS = ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "bool"]
OTHERS = ["complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]
DTYPES = [getattr(torch, name) for name in INTEGERS + OTHERS]


@each_call
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_dtypes_without_kernels(name, arguments, call, dtype, device):
    bad = torch.zeros(2, 3, device=device).to(dtype)
    for argument, given in each_position(arguments, device, bad):
        with raises(
            TypeError, f"{name}: expected {argument} to be a float16, bfloat16, float32 or float64 tensor, got {str(dtype)[6:]}"
        ):
            call(*given)


@each_call
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8, torch.qint32], ids=str)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors(name, arguments, call, dtype):
    bad = torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, dtype)
    for argument, given in each_position(arguments, "cpu", bad):
        with raises(
            TypeError, f"{name}: expected {argument} to be a float16, bfloat16, float32 or float64 tensor, got {str(dtype)[6:]}"
        ):
            call(*given)


LAYOUTS = {
    "torch.sparse_coo": lambda x: x.to_sparse(),
    "torch.sparse_csr": lambda x: x.to_sparse_csr(),
    "torch.sparse_csc": lambda x: x.to_sparse_csc(),
    "torch.sparse_bsr": lambda x: x.to_sparse_bsr((1, 1)),
    "torch.sparse_bsc": lambda x: x.to_sparse_bsc((1, 1)),
}


@each_call
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors(name, arguments, call, layout, device):
    bad = LAYOUTS[layout](torch.ones(2, 3, device=device))
    for argument, given in each_position(arguments, device, bad):
        with raises(TypeError, f"{name}: expected {argument} to be a strided tensor, got {layout}"):
            call(*given)


@each_call
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_is_named_before_the_device_of_those_before_it(name, arguments, call, layout):
    bad = LAYOUTS[layout](torch.ones(2, 3))
    for argument, given in list(each_position(arguments, "meta", bad))[1:]:
        with raises(TypeError, f"{name}: expected {argument} to be a strided tensor, got {layout}"):
            call(*given)


@each_call
def test_mkldnn_tensors(name, arguments, call):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    bad = torch.ones(2, 3).to_mkldnn()
    for argument, given in each_position(arguments, "cpu", bad):
        with raises(TypeError, f"{name}: expected {argument} to be a strided tensor, got torch._mkldnn"):
            call(*given)


@each(FORWARD)
@pytest.mark.parametrize("shape", [(4,), (3, 3), (2, 2), (2, 2, 2), (0, 3)], ids=str)
def test_shapes_that_do_not_broadcast(name, arguments, call, shape, device):
    for argument, given in list(each_position(arguments, device, torch.randn(shape, device=device)))[1:]:
        expected = f"{name}: expected {argument} to broadcast with the shape [2, 3] of the arguments before it, got shape "
        with raises(RuntimeError, expected + str(list(shape))):
            call(*given)


@each(FORWARD)
def test_the_shape_of_the_arguments_before_is_the_broadcast_one(name, arguments, call, device):
    given = [torch.randn(4, 1, device=device), *tensors(arguments[1:], device, (1, 3))]
    given[-1] = torch.randn(5, 3, device=device)
    before = "[4, 1]" if len(arguments) == 2 else "[4, 3]"
    expected = f"expected {arguments[-1]} to broadcast with the shape {before} of the arguments before it, got shape [5, 3]"
    with raises(RuntimeError, f"{name}: {expected}"):
        call(*given)


@each(ELEMENTWISE_BACKWARD)
@pytest.mark.parametrize("shape", [(4,), (2, 2), (3, 2, 3), (1, 2, 3), (0,)], ids=str)
def test_inputs_that_do_not_expand_to_grad_output(name, arguments, call, shape, device):
    """More dimensions than grad_output has are too many, even of size 1."""
    for argument, given in list(each_position(arguments, device, torch.randn(shape, device=device)))[1:]:
        with raises(
            RuntimeError, f"{name}: expected {argument} to expand to the shape [2, 3] of grad_output, got shape {list(shape)}"
        ):
            call(*given)


@each(ELEMENTWISE_BACKWARD)
def test_grad_output_smaller_than_the_inputs(name, arguments, call, device):
    given = tensors(arguments, device)
    given[0] = torch.randn(3, device=device)
    with raises(RuntimeError, f"{name}: expected {arguments[1]} to expand to the shape [3] of grad_output, got shape [2, 3]"):
        call(*given)


@each(FORWARD + ELEMENTWISE_BACKWARD)
def test_devices_that_differ(name, arguments, call, device):
    """A meta tensor among others: the only other device that every machine has."""
    for argument, given in list(each_position(arguments, device, torch.randn(2, 3, device="meta")))[1:]:
        here = given[0].device
        with raises(RuntimeError, f"{name}: expected {argument} on {here} like {arguments[0]}, got meta"):
            call(*given)


@each(FORWARD + ELEMENTWISE_BACKWARD)
def test_cpu_tensors_beside_cuda_tensors(name, arguments, call, device):
    if device.type == "cpu":
        pytest.skip("needs two devices that hold numbers")
    here = torch.ones((), device=device).device
    for argument, given in list(each_position(arguments, device, torch.randn(2, 3)))[1:]:
        with raises(RuntimeError, f"{name}: expected {argument} on {here} like {arguments[0]}, got cpu"):
            call(*given)
    given = [torch.randn(3), *tensors(arguments[1:], device)]
    with raises(RuntimeError, f"{name}: expected {arguments[1]} on cpu like {arguments[0]}, got {here}"):
        call(*given)


WRONG_SHAPES = [
    ("none", None, (3,), "[2, 3]"),
    ("none", None, (), "[2, 3]"),
    ("sum", None, (2, 3), "[]"),
    ("sum", None, (1,), "[]"),
    ("sum", [0], (2,), "[3]"),
    ("mean", [-1], (2, 1), "[2]"),
    ("batchmean", None, (2,), "[]"),
]


@each_reducing_operator
@pytest.mark.parametrize("reduction, dim, shape, expected", WRONG_SHAPES, ids=str)
def test_a_grad_output_of_another_shape_than_the_result(
    operator: Operator, reduction: str, dim: list[int] | None, shape: tuple[int, ...], expected: str, device: torch.device
) -> None:
    """Not of fake tensors: compiled autograd captures backward passes with stand-ins of another shape."""
    x, grad_output = torch.randn(2, 3, device=device), torch.randn(shape, device=device)
    with raises(RuntimeError, f"{operator.name}_backward: expected grad_output of shape {expected}, got shape {list(shape)}"):
        operator.backward_operator(grad_output, x, x[:1], None, None, *operator.bounds, reduction, dim, [True] * 4)


@each_reducing_operator
def test_a_grad_output_elsewhere(operator: Operator, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    with raises(
        RuntimeError, f"{operator}_backward: expected grad_output on {x.device} like {operator.arguments[0]}, got meta"
    ):
        operator.backward(x.to("meta"), x, x)


# What is no tensor


@each_operator
@pytest.mark.parametrize(
    "bad", [1.0, 2, 1j, None, [1.0, 2.0], "x", object(), numpy.ones(3)], ids=lambda bad: type(bad).__name__
)
def test_what_is_no_tensor(operator: Operator, bad: object, device: torch.device) -> None:
    """In the place of each argument, beside tensors and beside what may stand for those of q."""
    x = torch.randn(2, 3, device=device)
    others = [[x] * operator.count]
    if operator.numbers:
        others += [[x, x], [x, x, *operator.numbers], [x, x, x, operator.numbers[1]]]
    for position, argument in enumerate(operator.arguments):
        may_be_a_number = argument in operator.schema.optional
        if may_be_a_number and (bad is None or isinstance(bad, (int, float))):
            continue
        for given in others:
            if position < len(given):
                expected = f"expected {argument} to be a Tensor{' or a number' * may_be_a_number}, got {type(bad).__name__}"
                with raises(TypeError, f"{operator}: {expected}"):
                    operator(*given[:position], bad, *given[position + 1 :])


@each(calls_of(ways=(DISPATCHED, BACKWARD)))
def test_operators_refuse_what_is_no_tensor(name, arguments, call, device):
    """With the dispatcher's own message."""
    for _, given in each_position(arguments, device, [1.0]):
        with pytest.raises((RuntimeError, TypeError)):
            call(*given)


@each(calls_of(ELEMENTWISE, (PUBLIC, BACKWARD)))
def test_what_remains_possible_after_a_refusal(name, arguments, call, device):
    """An error leaves nothing behind."""
    with pytest.raises(TypeError):
        call(*(x.long() for x in tensors(arguments, device)))
    result = call(*tensors(arguments, device))
    for x in result if isinstance(result, tuple) else [result]:
        assert x.shape == (2, 3) and x.isfinite().all()
