"""torch.func on the operators: what it gives of their formulas, and no batching fallback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import vmap

from batching import no_fallback, seen_fallbacks  # noqa: F401 (a fixture)
from operators import OPERATORS, Operator, each_operator
from reduction_cases import each_operator_and_reduction, shapes_for
from transform_cases import TRANSFORMS, assert_same_as_formula

pytestmark = pytest.mark.usefixtures("no_fallback")


@pytest.mark.parametrize("kind", ["functorch", "legacy"])
def test_a_batching_fallback_would_be_seen(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The control of every test here: an operator without a batching rule, in both batching systems."""
    with torch.library._scoped_library("kl_ext_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        twice = torch.ops.kl_ext_test.twice.default
        with seen_fallbacks(capfd) as seen:
            vmap(twice)(torch.ones(2, 3)) if kind == "functorch" else torch._vmap_internals._vmap(twice)(torch.ones(2, 3))
        assert seen == {"kl_ext_test::twice"}


@each_operator
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_transform_gives_what_it_gives_of_the_formula(
    operator: Operator, transform: Callable[..., Any], device: torch.device
) -> None:
    assert_same_as_formula(operator, transform, *operator.inputs([2, 3], device=device))


OF_REDUCTIONS = ("grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "jacrev of jacrev", "jvp of grad", "grad of jvp")


@each_operator_and_reduction
def test_a_transform_of_a_reduction_gives_what_it_gives_of_the_formula(
    operator: Operator, how: dict[str, Any], device: torch.device
) -> None:
    for shapes in shapes_for(operator, "standard", "prior [D]", "all broadcast"):
        inputs = operator.inputs(*([min(n, 2) for n in shape] for shape in shapes), device=device)
        for name in OF_REDUCTIONS:
            assert_same_as_formula(operator, TRANSFORMS[name], *inputs, about=(shapes, name), **how)


@each_operator
def test_transforms_broadcast(operator: Operator, device: torch.device) -> None:
    inputs = operator.inputs(*([2, 1], [3], [], [1, 1, 3])[: operator.count], device=device)
    for name in ("grad", "jvp", "jacrev", "jacfwd", "hessian", "jvp of grad", "grad of jvp"):
        assert_same_as_formula(operator, TRANSFORMS[name], *inputs, about=name)


@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if operator.bounds], ids=str)
def test_transforms_keep_the_gradient_zero_outside_the_clamp(operator: Operator, device: torch.device) -> None:
    outside_and_inside = torch.tensor([-1.0, 0.1, 0.9], dtype=torch.float64, device=device)
    inputs = [outside_and_inside.roll(i) for i in range(operator.count)]
    for name in ("grad", "jvp", "jacfwd", "hessian", "vmap of grad", "vmap of jvp", "grad of jvp", "jvp of jvp"):
        assert_same_as_formula(operator, TRANSFORMS[name], *inputs, about=name, clamp_min=-0.5, clamp_max=0.5)
