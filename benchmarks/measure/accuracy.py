"""How far each peer is from the true value near the prior, where the plain formula cancels.

The truth is computed in numpy's long double from the very numbers that the peers get. There a term of 1e-12
still has five digits more than float32 can show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from . import timing
from .suites import Case, Plan
from .timing import Row
from .workloads import COMPILED, PEERS

DISTANCES = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]  # from the prior: small ones are posterior collapse
# The function, how many tensors it takes, and its least value.
LOSSES = {
    "single": ("kl_div_single_loss", 2, 0.0),
    "divergence": ("gaussian_kl_div", 4, 0.0),
    "pair": ("kl_div_pair_loss", 4, 0.5),
}


def accuracy(plan: Plan) -> Iterator[Case]:
    """Values and the gradient of log_var (log_var_p), for each loss and distance."""
    for loss in LOSSES:
        yield Case(f"accuracy, {loss}", lambda loss=loss: [_measure(loss, distance, plan) for distance in DISTANCES])


def _measure(loss: str, distance: float, plan: Plan) -> Row:
    function, count, least = LOSSES[loss]
    elements = plan.accuracy_elements
    offsets = [timing.leaf([elements], "cpu").detach() * distance for _ in range(2)]
    prior = [timing.leaf([elements], "cpu").detach() for _ in range(count - 2)]
    numbers = [sum(pair) for pair in zip(offsets, prior, strict=True)] + prior if prior else offsets
    true_terms, true_gradient = _exact([tensor.numpy().astype(numpy.longdouble) for tensor in numbers])
    scale = 2 if loss == "pair" else 1
    true_values, true_gradient = scale * true_terms + least, scale * true_gradient
    row: Row = {"suite": "accuracy", "case": loss, "distance": distance, "elements": elements, "peers": {}}
    for name, peer in PEERS.items():
        run = getattr(peer, function)
        run = torch.compile(run, dynamic=False) if name == COMPILED else run
        leaves = [tensor.to(plan.effort.device).requires_grad_() for tensor in numbers]
        values = run(*leaves)
        (gradient,) = torch.autograd.grad(values.sum(), leaves[1])
        row["peers"][name] = _judge(_double(values), _double(gradient), true_values, true_gradient, least)
    return row


def _exact(numbers: list[Any]) -> tuple[Any, Any]:
    """The divergence, and its gradient with respect to log_var_p, in long double."""
    mu, log_var = numbers[:2]
    squared = mu**2
    if len(numbers) == 4:
        squared = (mu - numbers[2]) ** 2 * numpy.exp(-numbers[3])
        log_var = log_var - numbers[3]
    growth = numpy.expm1(log_var)
    return (squared + growth - log_var) / 2, growth / 2


def _judge(values: Any, gradient: Any, true_values: Any, true_gradient: Any, least: float) -> dict[str, float]:
    found = {
        "worst_ulp": numpy.max(_ulps(values, true_values)),
        "negative": numpy.mean(values < least),
        "lost": numpy.mean((values == least) & (true_values > least)),
        "mean_ratio": numpy.mean(values - least) / numpy.mean(true_values - least),
        "gradient_ulp": numpy.max(_ulps(gradient, true_gradient)),
    }
    return {key: float(f"{value:.4g}") for key, value in found.items()}


def _ulps(values: Any, true_values: Any) -> Any:
    """Errors in float32 units in the last place of the true value."""
    return numpy.abs(values - true_values) / numpy.spacing(numpy.abs(true_values).astype(numpy.float32)).astype(
        numpy.longdouble
    )


def _double(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy().astype(numpy.longdouble)
