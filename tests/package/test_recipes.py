"""Each recipe of docs/recipes.md runs, and has the value and the gradients of its formula in plain torch, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kl_ext
from operators import CLOSE

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SETUP, *_ = BLOCK.findall(PAGE)
# From the heading of each recipe to its code.
RECIPES = {text.partition("\n")[0]: code for text in PAGE.split("\n### ")[1:] for code in BLOCK.findall(text)}


def kl(mu_p: Tensor, log_var_p: Tensor, mu_q: Tensor | float = 0.0, log_var_q: Tensor | float = 0.0) -> Tensor:
    log_var_q = torch.as_tensor(log_var_q, dtype=torch.float64)
    return 0.5 * (log_var_q - log_var_p + (log_var_p.exp() + (mu_p - mu_q) ** 2) / log_var_q.exp() - 1)


def of_deviations(loc: Tensor, scale: Tensor, loc_q: Tensor | float = 0.0, scale_q: Tensor | float = 1.0) -> Tensor:
    return kl(loc, 2 * scale.log(), loc_q, 2 * torch.as_tensor(scale_q, dtype=torch.float64).log())


def over_batch(terms: Tensor) -> Tensor:
    return terms.sum() / len(terms)


def of_sequences(n: Any, *q: Tensor) -> Tensor:
    """The terms that are not padding, one after the other: [time steps, D]."""
    return kl(n.mu_seq[n.mask], n.log_var_seq[n.mask], *q)


def sum_of_each_sequence(n: Any) -> Tensor:
    pairs = zip(n.mu_seq, n.log_var_seq, n.lengths.tolist(), strict=True)
    return torch.stack([kl(mu[:length], log_var[:length]).sum() for mu, log_var, length in pairs])


# Of each recipe, from the page's names to the result in float64.
FORMULAS: dict[str, Callable[[Any], Tensor]] = {
    "Log-variances": lambda n: over_batch(kl(n.mu, n.log_var)),
    "Log-deviations": lambda n: over_batch(kl(n.mu, 2 * n.log_std)),
    "Deviations from softplus": lambda n: over_batch(of_deviations(n.mu, F.softplus(n.raw) + 1e-4)),
    "Deviations from exp": lambda n: over_batch(of_deviations(n.mu, n.log_std.exp())),
    "Deviations from sigmoid": lambda n: over_batch(of_deviations(n.mu, 2 / (1 + (-n.raw / 2).exp()) + 0.1)),
    "Normal(loc, scale) against a learned prior": lambda n: of_deviations(
        n.mu, F.softplus(n.raw), n.mu_q, F.softplus(n.log_var_q)
    ).sum(1),
    "torch.distributions.kl_divergence": lambda n: of_deviations(n.mu, F.softplus(n.raw)).sum(1),
    "The posterior of diffusers": lambda n: over_batch(kl(n.mu, n.log_var)),
    "A module": lambda n: over_batch(kl(n.mu, n.log_var, n.mu_q, n.log_var_q)),
    "The loss of VITS": lambda n: of_sequences(n, n.mu_q, n.log_var_q).sum() / n.lengths.sum(),
    "Padded sequences: the mean over all that is not padding": lambda n: of_sequences(n).mean(),
    "Padded sequences: nats of each sequence": sum_of_each_sequence,
    "Per-sample weights": lambda n: (n.importance * kl(n.mu, n.log_var).sum(1)).mean(),
    "Free nats per sample": lambda n: torch.relu(kl(n.mu, n.log_var).sum(1) - n.free_nats).mean() + n.free_nats,
    "Free nats per dimension": lambda n: torch.relu(kl(n.mu, n.log_var).mean(0) - n.free_nats).sum() + n.free_nats * n.D,
    "Free nats of the whole": lambda n: torch.relu(over_batch(kl(n.mu, n.log_var)) - n.free_nats) + n.free_nats,
    "KL balancing": lambda n: (
        0.8 * over_batch(kl(n.mu.detach(), n.log_var.detach(), n.mu_q, n.log_var_q))
        + 0.2 * over_batch(kl(n.mu, n.log_var, n.mu_q.detach(), n.log_var_q.detach()))
    ),
    "The weight β": lambda n: n.reconstruction + n.beta * over_batch(kl(n.mu, n.log_var)),
    "Capacity": lambda n: n.reconstruction + n.gamma * (over_batch(kl(n.mu, n.log_var)) - n.capacity).abs(),
}
PADDED = ["The loss of VITS", *(recipe for recipe in FORMULAS if recipe.startswith("Padded sequences"))]


class Names(dict[str, Any]):
    """The names of the page; its tensors in float64, so that the comparison needs no tolerance but that of float64."""

    def __init__(self) -> None:
        exec(compile(SETUP, "docs/recipes.md", "exec"), self)
        for name, x in self.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                self[name] = x.detach().double().requires_grad_(x.requires_grad)

    def __getattr__(self, name: str) -> Any:
        return self[name]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.values() if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]

    def run(self, recipe: str) -> Tensor:
        exec(compile(RECIPES[recipe], f"docs/recipes.md: {recipe}", "exec"), self)
        result = self["loss"] if "loss" in self else self["kl"]
        assert isinstance(result, Tensor)
        return result


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    kl_ext.distributions.unregister()


def test_every_block_is_a_recipe_with_a_formula() -> None:
    assert list(RECIPES) == list(FORMULAS)
    assert PAGE.count("```python") == 1 + len(RECIPES)


@pytest.mark.parametrize("recipe", FORMULAS)
def test_the_recipe_has_the_value_and_the_gradients_of_the_formula(recipe: str) -> None:
    names = Names()
    leaves = names.leaves
    expected = FORMULAS[recipe](names)
    value = names.run(recipe)
    torch.testing.assert_close(value, expected, **CLOSE)
    assert value.requires_grad
    gradients = (torch.autograd.grad(x.sum(), leaves, allow_unused=True) for x in (value, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


@pytest.mark.parametrize("recipe", PADDED)
def test_padding_may_hold_anything(recipe: str) -> None:
    names = Names()
    expected = FORMULAS[recipe](names).detach()
    with torch.no_grad():
        names.mu_seq[~names.mask] = float("nan")
        names.log_var_seq[~names.mask] = float("inf")
    value = names.run(recipe)
    torch.testing.assert_close(value, expected, **CLOSE)
    for gradient in torch.autograd.grad(value.sum(), (names.mu_seq, names.log_var_seq)):
        assert torch.equal(gradient[~names.mask], torch.zeros_like(gradient[~names.mask]))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_doubling_a_log_deviation_is_exact(dtype: torch.dtype) -> None:
    log_std = torch.randn(1000).mul(10).to(dtype)
    assert torch.equal((2 * log_std).double(), 2 * log_std.double())
