"""torch.distributions through kl_ext: the numbers they had, and what is better about them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor
from torch.distributions import Independent, LogNormal, Normal, kl, kl_divergence, register_kl
from torch.utils._python_dispatch import TorchDispatchMode

from kl_ext.distributions import register, unregister
from operators import CLOSE


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    unregister()


@pytest.fixture
def registered() -> None:
    register()


def formula(loc_p: Tensor, scale_p: Tensor, loc_q: Tensor, scale_q: Tensor) -> Tensor:
    return torch.log(scale_q / scale_p) + (scale_p**2 + (loc_p - loc_q) ** 2) / (2 * scale_q**2) - 0.5


def normal(
    *shape: int, kind: type[Normal] = Normal, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Normal:
    loc, scale = torch.randn(shape, dtype=dtype, device=device), torch.rand(shape, dtype=dtype, device=device) + 0.5
    return kind(loc.requires_grad_(), scale.requires_grad_())


def parameters_of(*distributions: Normal) -> list[Tensor]:
    return [x for distribution in distributions for x in (distribution.loc, distribution.scale)]


# torch.distributions


def test_importing_changes_nothing() -> None:
    code = (
        "import torch; from torch.distributions import kl; before = dict(kl._KL_REGISTRY), dict(kl._KL_MEMOIZE); "
        "import kl_ext.distributions; assert before == (kl._KL_REGISTRY, kl._KL_MEMOIZE)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("registered")
def test_the_divergence_is_accurate_where_p_comes_close_to_q() -> None:
    q = normal(100, dtype=torch.float32)
    p = Normal(q.loc + 1e-3 * torch.randn(100), q.scale * (1 + 1e-3 * torch.randn(100)))
    got = kl_divergence(p, q)
    with mpmath.workdps(60):
        for value, *numbers in zip(got.tolist(), *(x.tolist() for x in parameters_of(p, q)), strict=True):
            loc_p, scale_p, loc_q, scale_q = map(mpf, numbers)
            exact = mpmath.log(scale_q / scale_p) + (scale_p**2 + (loc_p - loc_q) ** 2) / (2 * scale_q**2) - mpf(1) / 2
            assert abs(value - exact) <= 4.5 * 2.0**-23 * exact  # 4.5 ulp at most
    unregister()
    assert (kl_divergence(p, q) - got).abs().max() > 1e-3 * got.max()  # torch's own is far from it


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((), (5,)), ((0, 2), (2,))], ids=str)
def test_values_and_gradients_are_those_of_the_formula(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device
) -> None:
    p, q = (normal(*shape, device=device) for shape in shapes)
    given = parameters_of(p, q)
    value, expected = kl_divergence(p, q), formula(*given)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, **CLOSE)
    weights = torch.rand_like(value)
    for gradient, wanted in zip(*(torch.autograd.grad(x, given, weights) for x in (value, expected)), strict=True):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


@pytest.mark.usefixtures("registered")
def test_expanded_independent_and_transformed_distributions() -> None:
    p, q = normal(3, 4), normal(4)
    given = parameters_of(p, q)
    expected = formula(*given)
    expanded = q.expand((3, 4))
    torch.testing.assert_close(kl_divergence(p, expanded), expected, **CLOSE)
    torch.testing.assert_close(kl_divergence(Independent(p, 1), Independent(expanded, 1)), expected.sum(1), **CLOSE)
    torch.testing.assert_close(kl_divergence(LogNormal(*given[:2]), LogNormal(*given[2:])), expected, **CLOSE)
    wanted = torch.autograd.grad(expected.sum(), given)
    for gradient, other in zip(torch.autograd.grad(kl_divergence(p, expanded).sum(), given), wanted, strict=True):
        torch.testing.assert_close(gradient, other, **CLOSE)


class _Mixin:
    """As the distributions of pyro have one."""


class _Inherited(Normal, _Mixin):
    pass


class _InheritedIndependent(Independent, _Mixin):
    pass


class _OwnDivergence(Normal):
    pass


@register_kl(_OwnDivergence, _OwnDivergence)
def _own_divergence(p: Normal, q: Normal) -> Tensor:
    return torch.full_like(p.loc, 7.0)


def goes_through_kl_ext(p: Normal | Independent, q: Normal | Independent) -> bool:
    """Whether their divergence is computed by the operator."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        kl_divergence(p, q)
    return "kl_ext::normal_kl_div" in called


@pytest.mark.usefixtures("registered")
def test_subclasses_of_normal_are_treated_as_torch_dispatches_them() -> None:
    p, q, prior = normal(3, kind=_Inherited), normal(3, kind=_Inherited), normal(3)
    for one, other in ((p, q), (p, prior), (prior, p)):
        torch.testing.assert_close(kl_divergence(one, other), formula(*parameters_of(one, other)), **CLOSE)
        assert goes_through_kl_ext(one, other)
    both = _InheritedIndependent(p, 1), _InheritedIndependent(q, 1)
    torch.testing.assert_close(kl_divergence(*both), formula(*parameters_of(p, q)).sum(), **CLOSE)
    own = normal(3, kind=_OwnDivergence)
    assert kl_divergence(own, own).tolist() == [7.0] * 3
    torch.testing.assert_close(kl_divergence(own, prior), formula(*parameters_of(own, prior)), **CLOSE)


class _Unknown(Tensor):
    """A tensor whose class computes what it knows, which kl_ext is not."""

    wrapped: Tensor

    @staticmethod
    def refuse() -> Any:
        return NotImplemented

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Unknown:
        self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        self.wrapped = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kl_ext":
            return cls.refuse()
        result = func(*(x.wrapped if isinstance(x, _Unknown) else x for x in args), **(kwargs or {}))
        return [cls(x) for x in result] if isinstance(result, list) else cls(result)


class _WithoutStrategy(_Unknown):
    """It refuses as a DTensor does what it has no sharding strategy for."""

    @staticmethod
    def refuse() -> Any:
        raise NotImplementedError("no sharding strategy registered")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "make",
    [lambda x: x.to(torch.int64), lambda x: x.to(torch.complex64), _Unknown, _WithoutStrategy],
    ids=["int64", "complex64", "a class that does not know the operator", "a class that refuses it"],
)
def test_normals_of_other_tensors_are_treated_as_before(make: Callable[[Tensor], Tensor]) -> None:
    p, q = (Normal(make(torch.ones(3)), make(torch.full((3,), scale)), validate_args=False) for scale in (2.0, 4.0))
    got = kl_divergence(p, q)
    unregister()
    before = kl_divergence(p, q)
    assert type(got) is type(before)
    got, before = (getattr(x, "wrapped", x) for x in (got, before))
    assert got.dtype == before.dtype
    assert torch.equal(got, before)


def test_undone_it_leaves_what_was_there() -> None:
    p, q = normal(3), normal(3, kind=_Inherited)
    pairs = [(p, p), (p, q), (q, q), (Independent(p, 1), Independent(p, 1))]
    before = [kl_divergence(*pair) for pair in pairs]
    registry, memoized = list(kl._KL_REGISTRY.items()), dict(kl._KL_MEMOIZE)
    register()
    register()  # twice is once
    assert all(goes_through_kl_ext(*pair) for pair in pairs)
    unregister()
    assert list(kl._KL_REGISTRY.items()) == registry
    assert memoized == kl._KL_MEMOIZE
    assert all(torch.equal(kl_divergence(*pair), value) for pair, value in zip(pairs, before, strict=True))
    assert not any(goes_through_kl_ext(*pair) for pair in pairs)
    unregister()  # and so is this
    assert list(kl._KL_REGISTRY.items()) == registry


def test_what_was_looked_up_in_between_is_undone_too() -> None:
    class Fresh(Normal):
        pass

    p = normal(3, kind=Fresh)
    register()
    assert goes_through_kl_ext(p, p)
    unregister()
    assert not goes_through_kl_ext(p, p)


def test_what_others_register_afterwards_stays_theirs() -> None:
    before = kl._KL_REGISTRY[Normal, Normal]
    try:
        register()
        through = kl._KL_REGISTRY[Normal, Normal]
        register_kl(Normal, Normal)(lambda p, q: through(p, q) + 1)
        unregister()
        p, q = normal(3), normal(3)
        torch.testing.assert_close(kl_divergence(p, q), formula(*parameters_of(p, q)) + 1, **CLOSE)
        register()  # over theirs, which serves as what was before
        unregister()
        torch.testing.assert_close(kl_divergence(p, q), formula(*parameters_of(p, q)) + 1, **CLOSE)
    finally:
        register_kl(Normal, Normal)(before)


def test_it_is_compiled_whole_and_what_was_compiled_before_notices() -> None:
    p, q = normal(3, 4), normal(4)
    kl_divergence(Independent(p, 1), Independent(q.expand((3, 4)), 1))  # torch.compile cannot trace the first look-up

    def expanded(q: Normal) -> Normal:
        return q if torch.__version__.startswith(("2.11.", "2.12.")) else q.expand((3, 4))  # they cannot trace it

    def divergence(loc_p: Tensor, scale_p: Tensor, loc_q: Tensor, scale_q: Tensor) -> Tensor:
        return kl_divergence(Independent(Normal(loc_p, scale_p), 1), Independent(expanded(Normal(loc_q, scale_q)), 1))

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(str(graph.code))
        return graph.forward

    compiled = torch.compile(divergence, backend=backend, fullgraph=True)
    given = parameters_of(p, q)
    torch.testing.assert_close(compiled(*given), formula(*given).sum(1), **CLOSE)
    register()
    torch.testing.assert_close(compiled(*given), formula(*given).sum(1), **CLOSE)
    assert ["normal_kl_div" in graph for graph in graphs] == [False, True]
