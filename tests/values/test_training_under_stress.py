"""A VAE that is driven to collapse and to explosion, in three precisions: what kl_ext and plain torch make of its posteriors.

Every step's posteriors go to both. The oracle has the true divergence of exactly these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import kl_ext
import oracle
from kl_ext import reference

STEPS = 100
PRECISIONS = ["float32", "bfloat16 autocast", "float16 with GradScaler"]


class Step(NamedTuple):
    mu: Tensor
    log_var: Tensor
    loss: float  # of the training, which is with kl_ext
    weights_are_finite: bool


class Vae(torch.nn.Module):
    """A linear encoder and decoder."""

    def __init__(self, log_var: float) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(16, 8), torch.nn.Linear(4, 16)
        with torch.no_grad():
            self.encoder.bias[4:] = log_var

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, log_var = self.encoder(x).chunk(2, -1)
        z = mu + torch.randn_like(mu) * (0.5 * log_var.float().clamp(max=4)).exp()
        return mu, log_var, self.decoder(z)


def train(precision: str, *, beta: float, scale: float, log_var: float, learning_rate: float) -> Iterator[Step]:
    torch.manual_seed(0)
    model = Vae(log_var)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    scaler = torch.amp.GradScaler("cpu", enabled="GradScaler" in precision)
    dtype = torch.float16 if "float16 with" in precision else torch.bfloat16
    data = torch.randn(64, 16) * scale
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=precision != "float32"):
            mu, log_var_, decoded = model(data)
            kl = kl_ext.gaussian_kl_div(mu, log_var_, reduction="batchmean")
            loss = beta * kl + functional.mse_loss(decoded.float(), data)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        finite = all(p.isfinite().all().item() for p in model.parameters())
        yield Step(mu.detach(), log_var_.detach(), loss.item(), finite)


def true_terms(step: Step) -> numpy.ndarray:
    return oracle.single(oracle.to_longdouble(step.mu), oracle.to_longdouble(step.log_var)).value


def plain_terms(step: Step, precision: str) -> Tensor:
    with torch.autocast(
        "cpu", torch.float16 if "float16 with" in precision else torch.bfloat16, enabled=precision != "float32"
    ):
        return reference.gaussian_kl_div(step.mu, step.log_var)


COLLAPSE = {"beta": 100.0, "scale": 1.0, "log_var": 0.0, "learning_rate": 0.01}
EXPLOSION = {"beta": 0.0, "scale": 1000.0, "log_var": 18.0, "learning_rate": 1.0}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("course", [COLLAPSE, EXPLOSION], ids=["collapse", "explosion"])
def test_every_term_is_right_and_no_weight_breaks(course: dict[str, float], precision: str) -> None:
    """In a collapse divergences go to 0, in an explosion to 1e8 and more."""
    sizes = []
    for step in train(precision, **course):
        terms = kl_ext.gaussian_kl_div(step.mu.float(), step.log_var.float())
        exact = true_terms(step)
        oracle.assert_within(terms, exact, oracle.ulp_error(terms, exact), oracle.SINGLE, [step.mu, step.log_var])
        assert (terms >= 0).all()
        assert math.isfinite(step.loss) or course is EXPLOSION
        assert step.weights_are_finite
        sizes.append(float(numpy.median(exact)))
    assert sizes[-1] < 1e-4 if course is COLLAPSE else max(sizes) > 1e4


def test_plain_torch_loses_a_collapse() -> None:
    """Its terms become negative, or are off by more than they are."""
    worst, negative = 0.0, 0
    for step in train("float32", **COLLAPSE):
        plain, exact = plain_terms(step, "float32"), true_terms(step)
        negative += int((plain < 0).sum())
        worst = max(worst, float((oracle.distance(plain, exact) / exact).max()))
    assert worst > 1
    assert negative > 0


def test_plain_torch_loses_an_explosion_in_half_precision() -> None:
    """A mean of 256 has a square that float16 does not hold."""
    broken = sum(int(plain_terms(step, PRECISIONS[2]).isinf().sum()) for step in train(PRECISIONS[2], **EXPLOSION))
    ours = 0
    for step in train(PRECISIONS[2], **EXPLOSION):
        with torch.autocast("cpu", torch.float16):
            ours += int(kl_ext.gaussian_kl_div(step.mu, step.log_var).isinf().sum())
    assert broken > ours == 0
