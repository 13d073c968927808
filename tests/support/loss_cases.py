"""The two losses as the tests of differentiation see them: each public function beside its plain formula in torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kl_ext
from kl_ext import reference

HALF_TYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_TYPES, torch.float32, torch.float64)

# The formulas' own float64 error: a few ulp of their largest term, which is below exp(4) for inputs in (-2, 2).
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@dataclass(frozen=True)
class Loss:
    """A loss, its oracle, and what each of its gradients must know."""

    function: Callable[..., Tensor]
    formula: Callable[..., Tensor]  # plain torch; an oracle when given float64
    needs: dict[str, tuple[str, ...]]  # for each argument in order, the arguments that its gradient depends on

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(self.needs)

    @property
    def count(self) -> int:
        return len(self.needs)

    @property
    def operator(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.kl_ext, self.name).default

    @property
    def backward_operator(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.kl_ext, f"{self.name}_backward").default

    def inputs(
        self,
        *shapes: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        requires_grad: bool = False,
    ) -> tuple[Tensor, ...]:
        """Leaves uniform in (-2, 2), well inside the default clamp; the shapes are used in turn."""
        return tuple(
            (torch.rand(tuple(shapes[i % len(shapes)]), device=device, dtype=torch.float64) * 4 - 2)
            .to(dtype)
            .requires_grad_(requires_grad)
            for i in range(self.count)
        )

    def needed_for(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """The arguments, in order, on which the gradients of the wanted arguments depend."""
        return tuple(a for a in self.arguments if any(a in self.needs[w] for w in wanted))

    def __str__(self) -> str:
        return self.name


SINGLE = Loss(
    kl_ext.kl_div_single_loss,
    reference.kl_div_single_loss,
    {"mu": ("mu",), "log_var": ("log_var",)},
)
PAIR = Loss(
    kl_ext.kl_div_pair_loss,
    reference.kl_div_pair_loss,
    {
        "mu_p": ("mu_p", "mu_q", "log_var_q"),
        "log_var_p": ("log_var_p", "log_var_q"),
        "mu_q": ("mu_p", "mu_q", "log_var_q"),
        "log_var_q": ("mu_p", "log_var_p", "mu_q", "log_var_q"),
    },
)
LOSSES = (SINGLE, PAIR)

each_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset but the empty one."""
    count = len(names)
    return [tuple(n for i, n in enumerate(names) if bits >> i & 1) for bits in range(1, 1 << count)]


each_loss_and_wanted = pytest.mark.parametrize(
    ("loss", "wanted"),
    [(loss, wanted) for loss in LOSSES for wanted in subsets(loss.arguments)],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)


def clamped_inputs(loss: Loss, device: torch.device) -> tuple[Tensor, ...]:
    """Log-variances below, inside and above the clamp (-0.5, 0.5), all combinations of them for the pair."""
    below_inside_above = torch.tensor([-0.75, 0.125, 1.0], dtype=torch.float64, device=device)
    log_variances = iter([below_inside_above[:, None].clone(), below_inside_above.clone()])
    means = loss.inputs([3, 3], device=device)
    return tuple(
        (next(log_variances) if "log_var" in a else mean).requires_grad_()
        for a, mean in zip(loss.arguments, means, strict=True)
    )


def leaves_for(loss: Loss, wanted: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    inputs = loss.inputs([2, 3], device=device, dtype=dtype)
    return [x.requires_grad_(a in wanted) for a, x in zip(loss.arguments, inputs, strict=True)]


def intermediates(leaves: Sequence[Tensor]) -> list[Tensor]:
    """New tensors that only the caller and the graph of the loss hold: multiplying by a number saves nothing."""
    return [leaf * 1 for leaf in leaves]


# Layouts: (loss, device, dtype) -> leaves that require gradients, and the function from those to the loss's arguments.
View = Callable[..., Sequence[Tensor]]
Layout = Callable[[Loss, torch.device, torch.dtype], tuple[tuple[Tensor, ...], View]]


def _of_shapes(*shapes: Sequence[int], view: Callable[[Tensor], Tensor] = lambda leaf: leaf) -> Layout:
    def build(loss: Loss, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], View]:
        leaves = loss.inputs(*shapes, device=device, dtype=dtype, requires_grad=True)
        return leaves, lambda *leaves: [view(leaf) for leaf in leaves]

    return build


def _chunks(dim: int) -> Layout:
    def build(loss: Loss, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], View]:
        shape = [2, 3]
        shape[dim] *= loss.count
        encoded = SINGLE.inputs(shape, device=device, dtype=dtype, requires_grad=True)[:1]
        return encoded, lambda encoded: encoded.chunk(loss.count, dim)

    return build


def _permuted(loss: Loss, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], View]:
    leaves = loss.inputs([2, 3, 2], device=device, dtype=dtype, requires_grad=True)
    permutations = [(2, 1, 0), (0, 1, 2), (2, 1, 0), (0, 1, 2)]
    return leaves, lambda *leaves: [leaf.permute(p) for leaf, p in zip(leaves, permutations, strict=False)]


def _same_tensor(loss: Loss, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], View]:
    leaves = SINGLE.inputs([2, 3], device=device, dtype=dtype, requires_grad=True)[:1]
    return leaves, lambda leaf: [leaf] * loss.count


LAYOUTS: dict[str, Layout] = {
    "contiguous": _of_shapes([2, 3]),
    "broadcast": _of_shapes([2, 1], [3], [], [1, 2, 3]),
    "prior": _of_shapes([2, 3], [2, 3], [3], [3]),
    "zero_dim": _of_shapes([]),
    "zero_size": _of_shapes([0, 3], [1]),
    "chunk_last": _chunks(-1),
    "chunk_first": _chunks(0),
    "permuted": _permuted,
    "expanded": _of_shapes([3], view=lambda leaf: leaf.expand(2, 3)),
    "stepped": _of_shapes([4, 3], view=lambda leaf: leaf[1::2]),
    "channels_last": _of_shapes([2, 1, 2, 2], view=lambda leaf: leaf.permute(0, 3, 1, 2)),
    "same_tensor": _same_tensor,
}

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@contextmanager
def batching_fallbacks(shown: bool) -> Iterator[None]:
    """Whether torch warns where it runs an operator example by example. The warning goes to file descriptor 2."""
    before = torch._C._debug_only_are_vmap_fallback_warnings_enabled()
    torch._C._debug_only_display_vmap_fallback_warnings(shown)
    try:
        yield
    finally:
        torch._C._debug_only_display_vmap_fallback_warnings(before)


# Torch's own operators that have no rule in its older batching system: the plain formulas run into them, too, where they are
# permuted or differentiated twice.
_WITHOUT_OLD_RULES = {"aten::copy_", "aten::sum", "aten::where"}


@pytest.fixture
def no_fallback(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fails a test in which torch ran an operator example by example, outside of `batching_fallbacks(shown=False)`."""
    capfd.readouterr()
    with batching_fallbacks(shown=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = capfd.readouterr().err + "".join(f"{w.message}\n" for w in caught)
    fallbacks = set(re.findall(r"batching rule for (\w+::\w+)", told))
    assert not fallbacks - _WITHOUT_OLD_RULES, fallbacks


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp with the gradient that it has before torch 2.14, and the operators have: the bounds themselves pass."""
    beyond = torch.where(x < low, low, torch.where(x > high, high, x)).detach()
    return torch.where((x >= low) & (x <= high), x, beyond)
