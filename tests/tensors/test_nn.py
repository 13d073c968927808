"""The modules are the functions, with the options given beforehand, and can be whatever modules of torch can be."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_ext import nn, reference
from operators import CLOSE, OPERATORS, Operator, named


def name_of_module(operator: Operator) -> str:
    """The class is named as the function is: GaussianKLDivLoss for gaussian_kl_div."""
    words = [word.upper() if word == "kl" else word.capitalize() for word in operator.name.removesuffix("_loss").split("_")]
    return "".join([*words, "Loss"])


FUNCTIONS = {getattr(nn, name_of_module(x)): x.function for x in OPERATORS if name_of_module(x) in nn.__all__}
assert len(FUNCTIONS) == len(nn.__all__)
CLAMPS: list[dict[str, Any]] = [{}, {"clamp_min": -0.5}, {"clamp_min": None, "clamp_max": 0.5}]
REDUCTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "batchmean"},
    {"reduction": "sum", "dim": -1, "keepdim": True},
    {"reduction": "mean", "dim": (0, 1), "dtype": torch.float32},
]
# Each module with options, and the tensors of a call, by their number.
CASES = [
    (kind, operator.taken(how), count)
    for kind, operator in ((kind, named(function.__name__)) for kind, function in FUNCTIONS.items())
    for how in ([how | {"clamp_max": 1.0} for how in REDUCTIONS] if operator.reduces else CLAMPS)
    for count in [*operator.counts, *([operator.count + 1] if operator.reduces else [])]
]
each_case = pytest.mark.parametrize(
    ("kind", "how", "count"), CASES, ids=[f"{kind.__name__}({how}) of {count}" for kind, how, count in CASES]
)


def inputs_of(count: int) -> list[Tensor]:
    """Tensors that serve as means, log-variances and deviations alike; the fifth is a weight."""
    tensors = [torch.rand(3, 4, dtype=torch.float64) + 0.1 for _ in range(count)]
    return [*(x.requires_grad_() for x in tensors[:4]), *(x > 0.5 for x in tensors[4:])]


def expected_of(kind: type, how: dict[str, Any], inputs: list[Tensor]) -> Tensor:
    """Rounded once, from float64; the sums of the reference would be in the dtype of the result."""
    formula = getattr(reference, FUNCTIONS[kind].__name__)
    how = {**how, **({"weight": inputs[4]} if len(inputs) == 5 else {})}
    dtype = how.pop("dtype", torch.float64)
    return formula(*inputs[:4], **how).to(dtype)


def close(how: dict[str, Any]) -> dict[str, float]:
    return {"rtol": 2.0**-23, "atol": 0.0} if how.get("dtype") == torch.float32 else CLOSE


@each_case
def test_values_and_gradients_are_those_of_the_formula(kind: type, how: dict[str, Any], count: int) -> None:
    inputs = inputs_of(count)
    value, expected = kind(**how)(*inputs), expected_of(kind, how, inputs)
    torch.testing.assert_close(value, expected, **close(how))
    gradients = [torch.autograd.grad(x.sum(), inputs[:4]) for x in (value, expected)]
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, **close(how))


@pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind.__name__)
def test_names_and_defaults_are_those_of_the_function(kind: type) -> None:
    function = inspect.signature(FUNCTIONS[kind]).parameters
    options, call = inspect.signature(kind).parameters, dict(inspect.signature(kind.forward).parameters)
    del call["self"]
    assert options.keys() | call.keys() == function.keys()
    assert {name: x.default for name, x in (options | call).items()} == {name: x.default for name, x in function.items()}
    assert all(x.kind is x.KEYWORD_ONLY for x in options.values())
    assert list(call) == [name for name in function if name not in options]


@pytest.mark.parametrize("kind", [kind for kind, function in FUNCTIONS.items() if named(function.__name__).numbers])
def test_q_may_be_numbers(kind: type) -> None:
    inputs = inputs_of(2)
    torch.testing.assert_close(kind()(*inputs, 0.5, 0.25), expected_of(kind, {}, [*inputs, 0.5, 0.25]), **CLOSE)


def test_the_options_are_shown() -> None:
    assert repr(nn.KLDivSingleLoss(clamp_max=None)) == "KLDivSingleLoss(clamp_min=-30.0, clamp_max=inf)"
    shown = "GaussianKLDivLoss(clamp_min=-30.0, clamp_max=20.0, reduction='sum', dim=[1, 2], keepdim=False, dtype=None)"
    assert repr(nn.GaussianKLDivLoss(reduction="sum", dim=(1, 2))) == shown
    assert repr(nn.NormalKLDivLoss()) == "NormalKLDivLoss(reduction='none', dim=None, keepdim=False, dtype=None)"


def test_options_are_refused_when_they_are_given() -> None:
    with pytest.raises(ValueError, match=r"^KLDivSingleLoss: expected clamp_min <= clamp_max, got 1 and -1"):
        nn.KLDivSingleLoss(clamp_min=1, clamp_max=-1)
    with pytest.raises(TypeError, match=r"^KLDivPairLoss: expected clamp_max to be a number or None, got str"):
        nn.KLDivPairLoss(clamp_max="1")
    for kind in (nn.GaussianKLDivLoss, nn.NormalKLDivLoss):
        with pytest.raises(ValueError, match=rf'^{kind.__name__}: expected reduction to be "none", .* got "max"'):
            kind(reduction="max")
        with pytest.raises(ValueError, match=rf'^{kind.__name__}: expected no dim with reduction "none", got \[1\]'):
            kind(dim=1)
        with pytest.raises(TypeError, match=rf"^{kind.__name__}: expected keepdim to be a bool, got int"):
            kind(keepdim=1)
        with pytest.raises(TypeError, match=rf"^{kind.__name__}: expected dtype to be float16, .* got int64"):
            kind(dtype=torch.int64)


@each_case
def test_pickled_and_copied_modules_do_the_same(kind: type, how: dict[str, Any], count: int) -> None:
    module, inputs = kind(**how), inputs_of(count)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert repr(other) == repr(module)
        assert torch.equal(other(*inputs), module(*inputs))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*inputs), module(*inputs))


@pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind.__name__)
def test_there_is_nothing_to_learn_or_to_store(kind: type) -> None:
    module = kind()
    assert not list(module.parameters())
    assert not list(module.buffers())
    assert not module.state_dict()
    module.load_state_dict({})


@pytest.mark.parametrize(("kind", "how", "count"), [case for case in CASES if case[2] != 2 or case[0] is nn.KLDivSingleLoss])
def test_modules_are_compiled_whole(kind: type, how: dict[str, Any], count: int) -> None:
    torch._dynamo.reset()
    module, inputs = kind(**how), inputs_of(count)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "count"), [(kind, 2 if kind is nn.KLDivSingleLoss else 4) for kind in FUNCTIONS])
def test_modules_are_exported(kind: type, count: int) -> None:
    module, inputs = kind(), inputs_of(count)
    program = torch.export.export(module, tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=0, atol=0)


def scripted(module: torch.nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


while_torch_scripts = pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit.script needs Python 3.13 or earlier")


@while_torch_scripts
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_case
def test_scripted_modules_do_the_same(kind: type, how: dict[str, Any], count: int) -> None:
    module, inputs = kind(**how), inputs_of(count)
    script = scripted(module)
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    for other in (script, torch.jit.load(file)):
        torch.testing.assert_close(other(*inputs), module(*inputs), rtol=0, atol=0)
        gradients = [torch.autograd.grad(f(*inputs).sum(), inputs[0])[0] for f in (other, module)]
        assert torch.equal(*gradients)


@while_torch_scripts
@pytest.mark.parametrize("kind", [nn.GaussianKLDivLoss, nn.NormalKLDivLoss])
def test_scripted_modules_refuse_numbers(kind: type) -> None:
    with pytest.raises(torch.jit.Error, match=rf"{kind.__name__}: expected \w+ to be a Tensor where it is scripted"):
        scripted(kind())(*inputs_of(2), 0.0, 1.0)
