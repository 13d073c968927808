"""How the operators stand in torch: their schemas, tags and dispatch keys, and what subclasses and modes see of them."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import kl_ext
from operators import ELEMENTWISE, OPERATORS, SINGLE, Operator, each_elementwise_operator
from oracle import same_bits

# What programs and saved graphs that use a release rely on.
KEYWORDS = "*, float clamp_min=-30.0, float clamp_max=20.0, ScalarType? dtype=None"
SCHEMAS = {
    "kl_div_single_loss": f"(Tensor mu, Tensor log_var, {KEYWORDS}) -> Tensor",
    "kl_div_pair_loss": f"(Tensor mu_p, Tensor log_var_p, Tensor mu_q, Tensor log_var_q, {KEYWORDS}) -> Tensor",
    "kl_div_single_loss_backward": "(Tensor grad_output, Tensor mu, Tensor log_var, float clamp_min, float clamp_max,"
    " bool[2] output_mask) -> (Tensor, Tensor)",
    "kl_div_pair_loss_backward": "(Tensor grad_output, Tensor mu_p, Tensor log_var_p, Tensor mu_q, Tensor log_var_q,"
    " float clamp_min, float clamp_max, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    "gaussian_kl_div": "(Tensor mu_p, Tensor log_var_p, Tensor? mu_q=None, Tensor? log_var_q=None, Tensor? weight=None, *,"
    ' float clamp_min=-30.0, float clamp_max=20.0, str reduction="none", int[]? dim=None, bool keepdim=False,'
    " ScalarType? dtype=None) -> Tensor",
    "gaussian_kl_div_backward": "(Tensor grad_output, Tensor mu_p, Tensor log_var_p, Tensor? mu_q, Tensor? log_var_q,"
    " float clamp_min, float clamp_max, str reduction, int[]? dim, bool[4] output_mask, bool keepdim=False,"
    " Tensor? weight=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "normal_kl_div": "(Tensor loc_p, Tensor scale_p, Tensor? loc_q=None, Tensor? scale_q=None, Tensor? weight=None, *,"
    ' str reduction="none", int[]? dim=None, bool keepdim=False, ScalarType? dtype=None) -> Tensor',
    "normal_kl_div_backward": "(Tensor grad_output, Tensor loc_p, Tensor scale_p, Tensor? loc_q, Tensor? scale_q,"
    " str reduction, int[]? dim, bool[4] output_mask, bool keepdim=False, Tensor? weight=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
}
# The gradients go where they are told.
OUT_SCHEMAS = {
    "kl_div_single_loss_backward": "(Tensor grad_output, Tensor mu, Tensor log_var, float clamp_min, float clamp_max, *,"
    " Tensor(a!)? grad_mu, Tensor(b!)? grad_log_var) -> ()",
    "kl_div_pair_loss_backward": "(Tensor grad_output, Tensor mu_p, Tensor log_var_p, Tensor mu_q, Tensor log_var_q,"
    " float clamp_min, float clamp_max, *, Tensor(a!)? grad_mu_p, Tensor(b!)? grad_log_var_p, Tensor(c!)? grad_mu_q,"
    " Tensor(d!)? grad_log_var_q) -> ()",
    "gaussian_kl_div_backward": "(Tensor grad_output, Tensor mu_p, Tensor log_var_p, Tensor? mu_q, Tensor? log_var_q,"
    " float clamp_min, float clamp_max, str reduction, int[]? dim, bool keepdim=False, Tensor? weight=None, *,"
    " Tensor(a!)? grad_mu_p,"
    " Tensor(b!)? grad_log_var_p,"
    " Tensor(c!)? grad_mu_q, Tensor(d!)? grad_log_var_q) -> ()",
    "normal_kl_div_backward": "(Tensor grad_output, Tensor loc_p, Tensor scale_p, Tensor? loc_q, Tensor? scale_q,"
    " str reduction, int[]? dim, bool keepdim=False, Tensor? weight=None, *,"
    " Tensor(a!)? grad_loc_p, Tensor(b!)? grad_scale_p, Tensor(c!)? grad_loc_q, Tensor(d!)? grad_scale_q) -> ()",
}

each_name = pytest.mark.parametrize("name", [f"{operator}{suffix}" for operator in OPERATORS for suffix in ("", "_backward")])


def registered_for(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kl_ext::{name}", key)


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_released_operator_has_its_schema(name: str) -> None:
    expected = torch._C.parse_schema(f"kl_ext::{name}{SCHEMAS[name]}")
    assert str(getattr(torch.ops.kl_ext, name).default._schema) == str(expected)


@pytest.mark.parametrize("name", OUT_SCHEMAS)
def test_each_released_operator_with_given_gradients_has_its_schema(name: str) -> None:
    expected = torch._C.parse_schema(f"kl_ext::{name}.out{OUT_SCHEMAS[name]}")
    assert str(getattr(torch.ops.kl_ext, name).out._schema) == str(expected)


@each_name
def test_each_operator_is_marked_for_the_compiler_and_the_elementwise_ones_as_pointwise(name: str) -> None:
    tags = getattr(torch.ops.kl_ext, name).default.tags
    assert torch.Tag.pt2_compliant_tag in tags
    assert (torch.Tag.pointwise in tags) == (name in map(str, ELEMENTWISE))


@each_name
@pytest.mark.parametrize("key", ["CPU", "Autograd", "FuncTorchBatched", "Meta"])
def test_each_operator_has_kernels_of_its_own_for(name: str, key: str) -> None:
    assert registered_for(name, key)


@each_name
def test_the_older_vmap_concerns_the_backward_operators_alone(name: str) -> None:
    assert registered_for(name, "Batched") == name.endswith("_backward")


# Devices of which torch knows, and that have neither CPU nor CUDA kernels.
OTHER_DEVICES = ["HPU", "MAIA", "MPS", "MTIA", "PrivateUse1", "XPU"]


@pytest.mark.parametrize("name", [*SCHEMAS, *(f"{name}.out" for name in OUT_SCHEMAS)])
@pytest.mark.parametrize("key", OTHER_DEVICES)
def test_other_devices_have_kernels(name: str, key: str) -> None:
    """What they compute is in tests/tensors/test_other_devices.py."""
    assert registered_for(name, key)


@each_name
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA", *(f"Autocast{device}" for device in OTHER_DEVICES)])
def test_autocast_concerns_the_forward_operators_alone(name: str, key: str) -> None:
    assert registered_for(name, key) == (not name.endswith("_backward"))


@each_name
def test_cuda_kernels_are_registered_where_they_were_built(name: str) -> None:
    if torch.version.cuda is None:
        assert not registered_for(name, "CUDA")
    elif not registered_for("kl_div_single_loss", "CUDA"):
        pytest.skip("kl_ext is built without CUDA kernels")
    else:
        assert registered_for(name, "CUDA")


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (kl_ext.kl_div_single_loss, ("mu", "log_var")),
        (kl_ext.kl_div_pair_loss, ("mu_p", "log_var_p", "mu_q", "log_var_q")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_public_functions_have_exactly_the_documented_signature(function: Any, tensors: tuple[str, ...]) -> None:
    parameters = inspect.signature(function).parameters
    empty, positional, keyword = (
        inspect.Parameter.empty,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    assert [(p.name, p.kind, p.default) for p in parameters.values()] == [
        *((name, positional, empty) for name in tensors),
        ("clamp_min", keyword, -30.0),
        ("clamp_max", keyword, 20.0),
    ]
    assert typing.get_type_hints(function) == {
        **dict.fromkeys(tensors, Tensor),
        **dict.fromkeys(("clamp_min", "clamp_max"), float),
        "return": Tensor,
    }


def test_the_package_offers_the_losses_and_nothing_more() -> None:
    assert sorted(kl_ext.__all__) == sorted(operator.name for operator in OPERATORS)


@each_elementwise_operator
def test_arguments_are_taken_by_their_documented_names(operator: Operator) -> None:
    inputs = dict(zip(operator.arguments, operator.inputs([2, 3]), strict=True))
    bounds = operator.taken({"clamp_min": -1.0, "clamp_max": 1.0})
    expected = operator.function(*inputs.values(), **bounds)
    for function in (operator.function, operator.operator, getattr(torch.ops.kl_ext, operator.name)):
        assert same_bits(function(**inputs, **bounds), expected)


@each_elementwise_operator
def test_nothing_more_is_taken(operator: Operator) -> None:
    inputs = operator.inputs([2, 3])
    for arguments, keywords in (
        ((*inputs, -30.0), {}),
        (inputs, {"reduction": "sum"}),
        (inputs, {"dtype": None}),
        (inputs[1:], {}),
    ):
        with pytest.raises(TypeError):
            operator.function(*arguments, **keywords)


def test_jagged_nested_tensors_go_through_the_single_loss(device: torch.device) -> None:
    """By the pointwise tag, for which torch takes operators of one and two tensors."""
    parts = [SINGLE.inputs([n, 4], device=device, dtype=torch.float32) for n in (2, 5, 3)]
    mu = torch.nested.nested_tensor([mu for mu, _ in parts], layout=torch.jagged, device=device)
    log_var = torch.nested.nested_tensor_from_jagged(torch.cat([log_var for _, log_var in parts]), offsets=mu.offsets())
    result = SINGLE.function(mu, log_var)
    assert result.layout == torch.jagged
    for actual, part in zip(result.unbind(), parts, strict=True):
        assert same_bits(actual, SINGLE.function(*part))


class Marked(Tensor):
    """A subclass that changes nothing."""


@each_elementwise_operator
def test_a_subclass_of_tensor_gives_its_own_kind(operator: Operator) -> None:
    inputs = operator.inputs([2, 3])
    for marked in range(operator.count):
        given = [x.as_subclass(Marked) if i == marked else x for i, x in enumerate(inputs)]
        result = operator.function(*given)
        assert type(result) is Marked
        assert same_bits(result.as_subclass(Tensor), operator.function(*inputs))


@each_elementwise_operator
def test_parameters_are_tensors_like_any(operator: Operator) -> None:
    inputs = [torch.nn.Parameter(x) for x in operator.inputs([2, 3])]
    result = operator.function(*inputs)
    assert type(result) is Tensor
    result.sum().backward()
    assert all(x.grad is not None for x in inputs)


@each_elementwise_operator
def test_torch_function_overrides_see_the_operator(operator: Operator) -> None:
    seen: list[Any] = []

    class Override(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return "instead"

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    inputs = operator.inputs([2, 3])
    assert operator.function(inputs[0].as_subclass(Override), *inputs[1:]) == "instead"
    with Mode():
        operator.function(*inputs)
    assert len(seen) == 2
    assert all(func in (operator.operator, operator.function) for func in seen)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@each_elementwise_operator
def test_torch_dispatch_modes_see_one_operator_forward_and_one_backward(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([2, 3], device=device, requires_grad=True)
    with Recorder() as forward:
        result = operator.function(*inputs)
    with Recorder() as backward:
        torch.autograd.grad(result, inputs, torch.ones_like(result))
    assert forward.seen == [operator.operator]
    assert [func for func in backward.seen if func.namespace == "kl_ext"] == [operator.backward_operator]
    assert operator.operator not in backward.seen


class Wrapper(Tensor):
    """A tensor that holds another and is not one itself, as quantized and distributed tensors are made."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def unwrap(x: object) -> object:
            return x.inner if isinstance(x, Wrapper) else x

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, out)


@each_elementwise_operator
def test_wrapper_subclasses_go_forward_and_backward(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs([2, 3], device=device)
    wrapped = [Wrapper(x).requires_grad_() for x in inputs]
    plain = [x.clone().requires_grad_() for x in inputs]
    result, expected = operator.function(*wrapped), operator.function(*plain)
    assert same_bits(result.inner, expected)
    gradients = torch.autograd.grad(result, wrapped, Wrapper(torch.ones(2, 3, dtype=torch.float64, device=device)))
    for a, e in zip(gradients, torch.autograd.grad(expected.sum(), plain), strict=True):
        assert same_bits(a.inner, e)


def test_every_operator_has_its_entry_in_the_tests() -> None:
    """Without one, no suite that runs over all operators would know of it: tests/support/operators.py."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kl_ext::")}
    names = [operator.name for operator in OPERATORS]
    expected = {f"kl_ext::{name}{suffix}" for name in names for suffix in ("", "_backward", "_backward.out")}
    assert registered == expected and len(set(names)) == len(names)
