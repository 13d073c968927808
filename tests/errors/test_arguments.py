"""Arguments that are not tensors: what torch.sum and torch.clamp take is taken, and the rest is refused by name."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.masked import masked_tensor

import kl_ext
from kl_ext import gaussian_kl_div
from operators import CLOSE, GAUSSIAN, NORMAL, REDUCING, Operator, each_reducing_operator
from oracle import NARROWED, same_bits


def inputs(operator: Operator, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = operator.inputs([2, 3, 4], [2, 3, 4], device=device, dtype=torch.float32)
    return x, y


# What torch.sum takes.

DIMS: dict[str, tuple[Any, int | tuple[int, ...]]] = {
    "numpy": (np.int64(1), 1),
    "numpy, negative": (np.int8(-1), -1),
    "a 0-dim tensor": (torch.tensor(1), 1),
    "a list": ([1, 2], (1, 2)),
    "a list of numpy's": ([np.int64(0), np.int32(-1)], (0, -1)),
    "a tuple of tensors": ((torch.tensor(0), torch.tensor(2)), (0, 2)),
    "a torch.Size": (torch.Size([1]), (1,)),
    "an empty list": ([], (0, 1, 2)),
}


@each_reducing_operator
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(("given", "meant"), DIMS.values(), ids=DIMS)
def test_every_integer_names_a_dim(
    operator: Operator, given: Any, meant: Any, keepdim: bool, reduction: str, device: torch.device
) -> None:
    x, y = inputs(operator, device)
    x.sum(given)  # torch takes it
    result = operator(x, y, reduction=reduction, dim=given, keepdim=keepdim)
    expected = getattr(operator.formula(x.double(), y.double()), reduction)(meant, keepdim=keepdim)
    assert result.shape == expected.shape
    # What a term is off, and half a unit for each of the six additions that it takes part in and the division.
    error = (operator.bound + 3.5) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(result.double(), expected, rtol=error, atol=0)


@each_reducing_operator
@pytest.mark.parametrize("q", [False, True])
@pytest.mark.parametrize(
    ("reduction", "dim"),
    [("sum", None), ("sum", 1), ("mean", (0, 2)), ("mean", -1), ("batchmean", None), ("none", None), ("sum", (0, 1, 2))],
    ids=str,
)
def test_keepdim_leaves_dimensions_of_size_one(
    operator: Operator, reduction: str, dim: Any, q: bool, device: torch.device
) -> None:
    """In the value, the strides, the gradients and the derivatives of any kind."""
    leaves = operator.inputs(*[[2, 3, 4]] * 2, *[[4]] * (2 * q), device=device, requires_grad=True)

    def call(keepdim: bool) -> Callable[..., Tensor]:
        return lambda *x: operator(*x, reduction=reduction, dim=dim, keepdim=keepdim)

    kept, plain = call(True)(*leaves), call(False)(*leaves)
    reduced = range(3) if dim is None else {d % 3 for d in ((dim,) if isinstance(dim, int) else dim)}
    shape = [1 if d in reduced and reduction != "none" else n for d, n in enumerate((2, 3, 4))]
    assert list(kept.shape) == shape and kept.stride() == torch.empty(shape).stride()
    assert same_bits(kept.reshape(plain.shape), plain)
    weights = torch.randn_like(kept)
    gradients = torch.autograd.grad(kept, leaves, weights, retain_graph=True)
    for a, b in zip(gradients, torch.autograd.grad(plain, leaves, weights.reshape(plain.shape)), strict=True):
        assert same_bits(a, b)
    [batched] = torch.autograd.grad(kept, leaves[:1], torch.stack([weights, 2 * weights]), is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([gradients[0], 2 * gradients[0]]))
    small = [x.detach()[..., :2].requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(call(True), small, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call(True), small, check_fwd_over_rev=True)
    examples = torch.vmap(call(True), in_dims=(1, 1, *[None] * (2 * q)))(
        *(x.detach().movedim(0, 1)[None] for x in leaves[:2]), *leaves[2:]
    )
    loop = [call(True)(*(x.detach().movedim(0, 1)[None][:, i] for x in leaves[:2]), *leaves[2:]) for i in range(3)]
    torch.testing.assert_close(examples, torch.stack(loop))


@each_reducing_operator
def test_keepdim_of_terms_without_dimensions(operator: Operator, device: torch.device) -> None:
    x = torch.tensor(0.5, device=device)
    assert operator(x, x, reduction="sum", keepdim=True).shape == ()
    assert operator(x, x, reduction="mean", dim=0, keepdim=True).shape == x.sum(0, keepdim=True).shape


@each_reducing_operator
@pytest.mark.parametrize("kind", [torch.float64, float, torch.double])
def test_the_dtype_may_be_pythons_float(operator: Operator, kind: Any, device: torch.device) -> None:
    x, y = inputs(operator, device)
    result = operator(x, y, reduction="sum", dtype=kind)
    assert result.dtype == x.sum(dtype=kind).dtype == torch.float64
    assert same_bits(result, operator(x, y, reduction="sum", dtype=torch.float64))


# What torch.clamp takes.

CLAMPED: dict[str, Callable[..., Tensor]] = {
    "kl_div_single_loss": kl_ext.kl_div_single_loss,
    "kl_div_pair_loss": lambda mu, log_var, **clamp: kl_ext.kl_div_pair_loss(mu, log_var, log_var, mu, **clamp),
    "gaussian_kl_div": lambda mu, log_var, **clamp: gaussian_kl_div(mu, log_var, reduction="sum", **clamp),
    "gaussian_kl_div, q": lambda mu, log_var, **clamp: gaussian_kl_div(mu, log_var, log_var, mu, **clamp),
    "reference.kl_div_single_loss": kl_ext.reference.kl_div_single_loss,
    "reference.kl_div_pair_loss": lambda mu, log_var, **clamp: kl_ext.reference.kl_div_pair_loss(
        mu, log_var, log_var, mu, **clamp
    ),
    "reference.gaussian_kl_div": lambda mu, log_var, **clamp: kl_ext.reference.gaussian_kl_div(
        mu, log_var, log_var, mu, reduction="sum", **clamp
    ),
}
each_clamped = pytest.mark.parametrize("call", CLAMPED.values(), ids=CLAMPED)


@each_clamped
@pytest.mark.parametrize("bounds", [(None, 1.0), (-1.0, None), (None, None)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_none_is_no_bound(call: Any, bounds: tuple[Any, Any], dtype: torch.dtype, device: torch.device) -> None:
    mu = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.0], dtype=dtype, device=device, requires_grad=True)
    log_var = torch.tensor([-40.0, -1.5, 0.5, 1.5, 30.0], dtype=dtype, device=device, requires_grad=True)
    low, high = bounds
    open_ended = {"clamp_min": -math.inf if low is None else low, "clamp_max": math.inf if high is None else high}
    result, expected = call(mu, log_var, clamp_min=low, clamp_max=high), call(mu, log_var, **open_ended)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (mu, log_var)) for x in (result, expected)), strict=True):
        torch.testing.assert_close(a, b)  # autograd adds up those of the plain formulas in another order


@pytest.mark.parametrize("name", [name for name in CLAMPED if "reference" not in name])
@pytest.mark.parametrize(
    "bounds",
    [(-1, 1), (np.float64(-1), np.float32(1)), (Fraction(-1), True), (torch.tensor(-1.0), torch.tensor(1))],
    ids=["int", "numpy", "fraction and bool", "tensors"],
)
def test_every_number_bounds_the_clamp(name: str, bounds: tuple[Any, Any], device: torch.device) -> None:
    x, y = inputs(GAUSSIAN, device)
    call = CLAMPED[name]
    assert same_bits(call(x, y, clamp_min=bounds[0], clamp_max=bounds[1]), call(x, y, clamp_min=-1.0, clamp_max=1.0))


# What is of another type.

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "reduction=None": ({"reduction": None}, TypeError, "expected reduction to be a string, got NoneType"),
    "reduction=b'sum'": ({"reduction": b"sum"}, TypeError, "expected reduction to be a string, got bytes"),
    "reduction=1": ({"reduction": 1}, TypeError, "expected reduction to be a string, got int"),
    "reduction with NUL": (
        {"reduction": "sum\0"},
        ValueError,
        'expected reduction to be "none", "sum", "mean" or "batchmean", got "sum\\0"',
    ),
    "dim='0'": (
        {"reduction": "sum", "dim": "0"},
        TypeError,
        "expected dim to be an integer, or a tuple or list of them, got str",
    ),
    "dim=0.5": (
        {"reduction": "sum", "dim": 0.5},
        TypeError,
        "expected dim to be an integer, or a tuple or list of them, got float",
    ),
    "dim=True": (
        {"reduction": "sum", "dim": True},
        TypeError,
        "expected dim to be an integer, or a tuple or list of them, got bool",
    ),
    "dim=(0, 0.5)": (
        {"reduction": "sum", "dim": (0, 0.5)},
        TypeError,
        "expected dim to be an integer, or a tuple or list of them, got float",
    ),
    "dim=[True]": (
        {"reduction": "sum", "dim": [True]},
        TypeError,
        "expected dim to be an integer, or a tuple or list of them, got bool",
    ),
    "keepdim=1": ({"reduction": "sum", "keepdim": 1}, TypeError, "expected keepdim to be a bool, got int"),
    "clamp_min='1'": ({"clamp_min": "1"}, TypeError, "expected clamp_min to be a number or None, got str"),
    "clamp_max='1'": ({"clamp_max": "1"}, TypeError, "expected clamp_max to be a number or None, got str"),
    "clamp_max=[1.0]": ({"clamp_max": [1.0]}, TypeError, "expected clamp_max to be a number or None, got list"),
    "clamp_max=1j": ({"clamp_max": 1j}, TypeError, "expected clamp_max to be a number or None, got complex"),
    "dtype='float32'": ({"dtype": "float32"}, TypeError, "expected dtype to be a torch.dtype, got str"),
    "dtype=numpy": ({"dtype": np.float32}, TypeError, "expected dtype to be a torch.dtype, got type"),
    "dtype=int": ({"dtype": int}, TypeError, "expected dtype to be float16, bfloat16, float32 or float64, got int64"),
    "mu_q=[1.0]": ({"mu_q": [1.0], "log_var_q": 0.0}, TypeError, "expected mu_q to be a Tensor or a number, got list"),
    "log_var_q='1'": ({"mu_q": 0, "log_var_q": "1"}, TypeError, "expected log_var_q to be a Tensor or a number, got str"),
}


def wrong_of(operator: Operator) -> Iterator[Any]:
    """The table by the names of the divergence's own arguments."""
    own = dict(zip(GAUSSIAN.arguments, operator.arguments, strict=True))
    for case, (how, kind, message) in WRONG.items():
        if operator.taken(how) == how:
            for name in own:
                message = message.replace(f"expected {name} to be", f"expected {own[name]} to be")
            yield pytest.param(operator, {own.get(k, k): x for k, x in how.items()}, kind, message, id=f"{operator}, {case}")


each_wrong = pytest.mark.parametrize(
    ("operator", "how", "kind", "message"), [case for operator in REDUCING for case in wrong_of(operator)]
)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_wrong
def test_other_types_are_refused_by_name(
    operator: Operator, how: dict[str, Any], kind: type[Exception], message: str, device: torch.device
) -> None:
    x, y = inputs(operator, device)
    with pytest.raises(kind, match=f"^{re.escape(f'{operator.name}: {message}')}$") as raised:
        operator(x, y, **how)
    assert raised.type is kind


@each_wrong
def test_other_types_are_refused_by_name_in_compiled_code(
    operator: Operator,
    how: dict[str, Any],
    kind: type[Exception],
    message: str,
    device: torch.device,
    nothing_compiled: None,
) -> None:
    """With fullgraph=True torch raises an error of its own, which quotes ours."""
    x, y = inputs(operator, device)
    with pytest.raises(kind, match=f"^{re.escape(f'{operator.name}: {message}')}$") as raised:
        torch.compile(lambda a, b: operator(a, b, **how), backend="eager")(x, y)
    assert raised.type is kind
    with pytest.raises(Exception, match=re.escape(message.replace("\\", "\\\\")) + "|" + re.escape(message)):
        torch.compile(lambda a, b: operator(a, b, **how), backend="eager", fullgraph=True)(x, y)


@pytest.mark.parametrize("function", [kl_ext.kl_div_single_loss, kl_ext.kl_div_pair_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bound", ["clamp_min", "clamp_max"])
def test_the_documented_losses_refuse_other_bounds_by_name(function: Any, bound: str, device: torch.device) -> None:
    x, y = inputs(GAUSSIAN, device)
    given = (x, y) if function is kl_ext.kl_div_single_loss else (x, y, y, x)
    for value, kind in (("1", "str"), ([1.0], "list"), (1j, "complex"), (torch.ones(2), "Tensor")):
        with pytest.raises(TypeError, match=f"^{function.__name__}: expected {bound} to be a number or None, got {kind}$"):
            function(*given, **{bound: value})
    with pytest.raises(ValueError, match=f"^{function.__name__}: expected {bound} to be a number that a float can hold"):
        function(*given, **{bound: 10**400})


def test_a_class_that_does_not_know_the_operators_is_refused_by_name() -> None:
    """torch answers with a list of classes, and does not say which argument it is."""
    x, y = inputs(GAUSSIAN, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masked = masked_tensor(x, x > 0)
        for name, call in {
            "kl_div_single_loss: expected mu": lambda: kl_ext.kl_div_single_loss(masked, masked),
            "kl_div_single_loss: expected log_var": lambda: kl_ext.kl_div_single_loss(x, masked),
            "kl_div_pair_loss: expected mu_q": lambda: kl_ext.kl_div_pair_loss(x, y, masked, y),
            "gaussian_kl_div: expected log_var_p": lambda: gaussian_kl_div(x, masked, reduction="sum"),
            "gaussian_kl_div: expected log_var_q": lambda: gaussian_kl_div(x, y, x, masked),
            "normal_kl_div: expected scale_p": lambda: kl_ext.normal_kl_div(x, masked, reduction="sum"),
            "normal_kl_div: expected loc_q": lambda: kl_ext.normal_kl_div(x, y, masked, y),
        }.items():
            with pytest.raises(TypeError, match=f"^{name} to be of a class that knows the operator, got MaskedTensor$"):
                call()


# Numbers for q.

NUMBERS = {
    "int": (0, 1),
    "float": (0.25, 0.5),
    "bool": (True, True),
    "numpy": (np.float32(0.25), np.int64(1)),
    "mixed": (0.25, None),
}
# What both have in common is tested with the first, all of it.
PROMOTED = [
    *((GAUSSIAN, rank, asked) for rank in (0, 2) for asked in (None, torch.float64, torch.bfloat16)),
    (NORMAL, 2, None),
]


@pytest.mark.parametrize(("operator", "rank", "asked"), PROMOTED, ids=str)
@pytest.mark.parametrize("kinds", NUMBERS)
@pytest.mark.parametrize(
    "dtypes", [("float32",) * 2, ("float16", "float64"), ("bfloat16", "float32"), ("float16",) * 2], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_number_for_q_has_no_weight_in_the_promotion(
    operator: Operator, kinds: str, dtypes: tuple[str, str], rank: int, autocast: bool, asked: Any, device: torch.device
) -> None:
    """As plain torch promotes a tensor and a number; the same straight to the dispatcher and through compiled code."""
    shape = [2, 3][:rank]
    x, y = (v.to(getattr(torch, d)) for v, d in zip(operator.inputs(shape, shape, device=device), dtypes, strict=True))
    mu_q, log_var_q = NUMBERS[kinds]
    log_var_q = y if log_var_q is None else log_var_q
    numbers = [0.0 if isinstance(v, Tensor) else float(v) for v in (mu_q, log_var_q)]
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        result = operator(x, y, mu_q, log_var_q, dtype=asked)
        compiled = torch.compile(operator, backend="eager")(x, y, mu_q, log_var_q, dtype=asked) if rank else result
    plain = ((x - numbers[0]) * (y - numbers[1])).dtype
    wide = torch.promote_types(plain, torch.float32) if autocast else plain
    assert result.dtype == (asked or wide)
    assert same_bits(result, compiled)
    q = [
        v.double() if isinstance(v, Tensor) else torch.tensor(float(v), dtype=torch.float64, device=device)
        for v in (mu_q, log_var_q)
    ]
    expected = operator.formula(x.double(), y.double(), *q)
    bound = NARROWED if result.dtype.itemsize == 2 else operator.bound
    torch.testing.assert_close(result.double(), expected, rtol=bound * torch.finfo(result.dtype).eps, atol=CLOSE["atol"])


# The package itself.


def test_the_plain_formulas_come_with_the_package_and_its_tools_do_not_show() -> None:
    for name in kl_ext.__all__:
        assert callable(getattr(kl_ext.reference, name))
    shown = {name for name in dir(kl_ext) if not name.startswith("_")}
    imported_where_needed = {"onnx", "sharding"}
    assert shown - imported_where_needed == {*kl_ext.__all__, "distributions", "functional", "nn", "reference"}
