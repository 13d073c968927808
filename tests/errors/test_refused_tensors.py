"""Every refusal names the function, the argument, what was expected and what came: forward and backward, in every mode."""

import contextlib
import inspect
import re

import pytest
import torch

import kl_ext
from operators import DOCUMENTED, ELEMENTWISE, OPERATORS, Operator

# Name of the function or operator, its tensor arguments, and a call with them.
FORWARD = {operator.name: (operator.arguments, operator.function) for operator in OPERATORS}
DISPATCHED = {operator.name: (operator.arguments, operator.operator) for operator in OPERATORS}


def call_backward(operator: Operator):
    def call(grad_output, *inputs, **clamp):
        return operator.backward_operator(*operator.backward_arguments(grad_output, inputs, how=clamp))

    return call


BACKWARD = {f"{operator}_backward": (["grad_output", *operator.arguments], call_backward(operator)) for operator in OPERATORS}
CALLS = [
    (name, *rest, f"{prefix}{name}")
    for prefix, group in (("", FORWARD), ("torch.ops.", DISPATCHED), ("torch.ops.", BACKWARD))
    for name, rest in group.items()
]


def each_call(*names):
    """Of these functions and backward operators."""
    calls = [call for call in CALLS if call[0] in names]
    return pytest.mark.parametrize("name, arguments, call", [call[:3] for call in calls], ids=[call[3] for call in calls])


def names_of(operators, *suffixes):
    return [f"{operator}{suffix}" for operator in operators for suffix in suffixes]


EVERY = each_call(*names_of(OPERATORS, "", "_backward"))
EVERY_CLAMPING = each_call(*names_of([operator for operator in OPERATORS if operator.bounds], "", "_backward"))
EVERY_ELEMENTWISE = each_call(*names_of(ELEMENTWISE, "", "_backward"))
FORWARDS = each_call(*FORWARD)
# What a grad_output must fit where terms are reduced is in test_refused_reductions.py.
BACKWARDS = each_call(*names_of(ELEMENTWISE, "_backward"))
FORWARDS_AND_ELEMENTWISE_BACKWARDS = each_call(*FORWARD, *names_of(ELEMENTWISE, "_backward"))
MODES = {"default": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(params=MODES, autouse=True)
def mode(request):
    with MODES[request.param]():
        yield


def raises(kind, message):
    """That type exactly, and that message, whole: nothing but torch's own backtrace may follow."""
    return pytest.raises(kind, match=rf"^{re.escape(message)}(\n|$)")


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


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_dtypes_without_kernels(name, arguments, call, dtype, device):
    bad = torch.zeros(2, 3, device=device).to(dtype)
    for argument, given in each_position(arguments, device, bad):
        with raises(
            TypeError, f"{name}: expected {argument} to be a float16, bfloat16, float32 or float64 tensor, got {str(dtype)[6:]}"
        ):
            call(*given)


@EVERY
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


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors(name, arguments, call, layout, device):
    bad = LAYOUTS[layout](torch.ones(2, 3, device=device))
    for argument, given in each_position(arguments, device, bad):
        with raises(TypeError, f"{name}: expected {argument} to be a strided tensor, got {layout}"):
            call(*given)


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_is_named_before_the_device_of_those_before_it(name, arguments, call, layout):
    bad = LAYOUTS[layout](torch.ones(2, 3))
    for argument, given in list(each_position(arguments, "meta", bad))[1:]:
        with raises(TypeError, f"{name}: expected {argument} to be a strided tensor, got {layout}"):
            call(*given)


@EVERY
def test_mkldnn_tensors(name, arguments, call, mode):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    bad = torch.ones(2, 3).to_mkldnn()
    for argument, given in each_position(arguments, "cpu", bad):
        with raises(TypeError, f"{name}: expected {argument} to be a strided tensor, got torch._mkldnn"):
            call(*given)


INF, NAN = float("inf"), float("nan")
CLAMPS = [
    ((1.0, 0.0), "1 and 0"),
    ((NAN, 20.0), "nan and 20"),
    ((-30.0, NAN), "-30 and nan"),
    ((INF, -INF), "inf and -inf"),
    ((0.5, 0.25), "0.5 and 0.25"),
]


@EVERY_CLAMPING
@pytest.mark.parametrize("bounds, shown", CLAMPS)
def test_clamps(name, arguments, call, bounds, shown, device):
    with raises(ValueError, f"{name}: expected clamp_min <= clamp_max, got {shown}"):
        call(*tensors(arguments, device), clamp_min=bounds[0], clamp_max=bounds[1])


@EVERY_CLAMPING
def test_clamps_are_checked_for_empty_tensors_too(name, arguments, call, device):
    with raises(ValueError, f"{name}: expected clamp_min <= clamp_max, got 2 and 1"):
        call(*tensors(arguments, device, (0,)), clamp_min=2, clamp_max=1)


@FORWARDS
@pytest.mark.parametrize("shape", [(4,), (3, 3), (2, 2), (2, 2, 2), (0, 3)], ids=str)
def test_shapes_that_do_not_broadcast(name, arguments, call, shape, device):
    for argument, given in list(each_position(arguments, device, torch.randn(shape, device=device)))[1:]:
        expected = f"{name}: expected {argument} to broadcast with the shape [2, 3] of the arguments before it, got shape "
        with raises(RuntimeError, expected + str(list(shape))):
            call(*given)


@FORWARDS
def test_the_shape_of_the_arguments_before_is_the_broadcast_one(name, arguments, call, device):
    given = [torch.randn(4, 1, device=device), *tensors(arguments[1:], device, (1, 3))]
    given[-1] = torch.randn(5, 3, device=device)
    before = "[4, 1]" if len(arguments) == 2 else "[4, 3]"
    expected = f"expected {arguments[-1]} to broadcast with the shape {before} of the arguments before it, got shape [5, 3]"
    with raises(RuntimeError, f"{name}: {expected}"):
        call(*given)


@BACKWARDS
@pytest.mark.parametrize("shape", [(4,), (2, 2), (3, 2, 3), (1, 2, 3), (0,)], ids=str)
def test_inputs_that_do_not_expand_to_grad_output(name, arguments, call, shape, device):
    """More dimensions than grad_output has are too many, even of size 1."""
    for argument, given in list(each_position(arguments, device, torch.randn(shape, device=device)))[1:]:
        with raises(
            RuntimeError, f"{name}: expected {argument} to expand to the shape [2, 3] of grad_output, got shape {list(shape)}"
        ):
            call(*given)


@BACKWARDS
def test_grad_output_smaller_than_the_inputs(name, arguments, call, device):
    given = tensors(arguments, device)
    given[0] = torch.randn(3, device=device)
    with raises(RuntimeError, f"{name}: expected {arguments[1]} to expand to the shape [3] of grad_output, got shape [2, 3]"):
        call(*given)


@BACKWARDS
@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_masks_of_the_wrong_length(name, arguments, call, length, device):
    with pytest.raises((RuntimeError, TypeError)):
        getattr(torch.ops.kl_ext, name)(*tensors(arguments, device), -30.0, 20.0, [True] * length)


@FORWARDS_AND_ELEMENTWISE_BACKWARDS
def test_devices_that_differ(name, arguments, call, device):
    """A meta tensor among others: the only other device that every machine has."""
    for argument, given in list(each_position(arguments, device, torch.randn(2, 3, device="meta")))[1:]:
        here = given[0].device
        with raises(RuntimeError, f"{name}: expected {argument} on {here} like {arguments[0]}, got meta"):
            call(*given)


@FORWARDS_AND_ELEMENTWISE_BACKWARDS
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


@pytest.mark.parametrize("name", DISPATCHED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_result_dtypes_without_kernels(name, dtype, device):
    arguments, call = DISPATCHED[name]
    with raises(TypeError, f"{name}: expected dtype to be float16, bfloat16, float32 or float64, got {str(dtype)[6:]}"):
        call(*tensors(arguments, device), dtype=dtype)


@pytest.mark.parametrize("name", names_of(ELEMENTWISE, ""))
@pytest.mark.parametrize(
    "bad, kind", [(1.0, "float"), (2, "int"), (None, "NoneType"), ([1.0, 2.0], "list"), ("x", "str")], ids=repr
)
def test_what_is_no_tensor(name, bad, kind, device):
    arguments, call = FORWARD[name]
    for argument, given in each_position(arguments, device, bad):
        with raises(TypeError, f"{name}: expected {argument} to be a Tensor, got {kind}"):
            call(*given)


def test_a_numpy_array_is_no_tensor():
    x = torch.ones(3)
    with raises(TypeError, "kl_div_single_loss: expected log_var to be a Tensor, got ndarray"):
        kl_ext.kl_div_single_loss(x, x.numpy())


@pytest.mark.parametrize("name", [*DISPATCHED, *BACKWARD])
def test_operators_refuse_what_is_no_tensor(name, device):
    """With the dispatcher's own message."""
    arguments, call = (DISPATCHED | BACKWARD)[name]
    for _, given in each_position(arguments, device, [1.0]):
        with pytest.raises((RuntimeError, TypeError)):
            call(*given)


@pytest.mark.parametrize("name", names_of(DOCUMENTED, ""))
def test_the_documented_signature_and_nothing_more(name, device):
    arguments, call = FORWARD[name]
    parameters = inspect.signature(call).parameters
    assert list(parameters) == [*arguments, "clamp_min", "clamp_max"]
    assert [p.kind for p in parameters.values()] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(arguments) + [
        inspect.Parameter.KEYWORD_ONLY
    ] * 2
    assert (parameters["clamp_min"].default, parameters["clamp_max"].default) == (-30.0, 20.0)
    given = tensors(arguments, device)
    assert torch.equal(call(**dict(zip(arguments, given, strict=True))), call(*given, clamp_min=-30, clamp_max=20))
    for wrong in ({"reduction": "sum"}, {"dtype": torch.float32}, {"out": given[0]}):
        with pytest.raises(TypeError):
            call(*given, **wrong)
    with pytest.raises(TypeError):
        call(*given, -30.0, 20.0)
    with pytest.raises(TypeError):
        call(*given[:-1])


@EVERY_ELEMENTWISE
def test_what_remains_possible_after_a_refusal(name, arguments, call, device):
    """An error leaves nothing behind."""
    with pytest.raises(TypeError):
        call(*(x.long() for x in tensors(arguments, device)))
    result = call(*tensors(arguments, device))
    for x in result if isinstance(result, tuple) else [result]:
        assert x.shape == (2, 3) and x.isfinite().all()
