"""One pass: for inputs of 256 MiB no call allocates anything of their size but the gradients that are asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_ext import gaussian_kl_div
from operators import GAUSSIAN
from test_memory import allocated, nbytes

MIB = 2**20
SPARE = 16 * MIB  # for threads, lanes and the page tables; an input has 16 times as much


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(call: Callable[[], Any]) -> tuple[int, int, Any]:
    """The bytes that torch allocates in a call, how far the memory of the process rises at its highest, and the result.

    Memory that earlier results left would serve again, and the memory of the process would not rise.
    """
    gc.collect()
    zeros = torch.zeros(513 * MIB // 4)
    gaussian_kl_div(zeros, zeros)  # more than is kept: as it goes, all else goes
    del zeros
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = resident("VmRSS")
    size, result = allocated(call, torch.device("cpu"))
    return size, resident("VmHWM") - before, result


def assert_allocates_its_results_only(call: Callable[[], Any], spare: int = MIB) -> None:
    size, peak, result = measured(call)
    expected = nbytes(result if isinstance(result, (list, tuple)) else [result])
    assert size <= expected + spare, f"{size / MIB:.1f} MiB allocated for results of {expected / MIB:.1f}"
    assert peak <= expected + max(spare, SPARE), f"memory rose by {peak / MIB:.1f} MiB for results of {expected / MIB:.1f}"


@pytest.fixture(scope="module", autouse=True)
def nothing_is_called_for_the_first_time() -> None:
    parts = [x.requires_grad_() for x in torch.rand(2000, 64).chunk(2, -1)]
    for how in ({}, {"reduction": "mean"}, {"reduction": "sum", "dim": 0}):
        measured(lambda how=how: gaussian_kl_div(*parts, **how).sum().backward())


@pytest.fixture(scope="module")
def encoded() -> Tensor:
    """[B, 2D], of which each half is 256 MiB."""
    return torch.full((32768, 2 * 2048), 0.25)


@pytest.fixture(scope="module")
def image() -> Tensor:
    """[B, 2C, H, W], likewise."""
    return torch.full((16, 2 * 64, 256, 256), 0.25)


ROWS: list[dict[str, Any]] = [
    {"reduction": "sum"},
    {"reduction": "batchmean"},
    {"reduction": "sum", "dim": -1},
    {"reduction": "mean", "dim": 0},
]
PIXELS: list[dict[str, Any]] = [{"reduction": "mean"}, {"reduction": "sum", "dim": (0, 2, 3)}, {"reduction": "mean", "dim": 1}]


def test_the_measure_finds_one_planted_intermediate(encoded: Tensor) -> None:
    mu, log_var = encoded.chunk(2, -1)
    with pytest.raises(AssertionError, match="MiB allocated"):
        assert_allocates_its_results_only(lambda: gaussian_kl_div(mu, log_var).sum())
    _, peak, _ = measured(lambda: gaussian_kl_div(mu, log_var).sum())
    assert peak > 200 * MIB


@pytest.mark.parametrize("how", ROWS, ids=str)
def test_the_forward_of_256_MiB_allocates_the_result_alone(how: dict[str, Any], encoded: Tensor) -> None:
    mu, log_var = encoded.chunk(2, -1)
    prior = torch.full((2048,), 0.125)
    for q in ((), (prior, prior), (0.5, 0.5)):
        assert_allocates_its_results_only(lambda q=q: gaussian_kl_div(mu, log_var, *q, **how))


@pytest.mark.parametrize("how", PIXELS, ids=str)
def test_the_forward_of_256_MiB_of_images_allocates_the_result_alone(how: dict[str, Any], image: Tensor) -> None:
    """A result of [B, H, W] is 4 MiB."""
    mu, log_var = image.chunk(2, 1)
    assert_allocates_its_results_only(lambda: gaussian_kl_div(mu, log_var, **how))


@pytest.mark.parametrize("how", ROWS, ids=str)
def test_the_backward_of_256_MiB_allocates_the_gradients_alone(how: dict[str, Any], encoded: Tensor) -> None:
    """With scalar, [B] and [D] gradients; of p and of a prior, and of the prior alone, whose gradient is 8 KiB."""
    mu, log_var = encoded.chunk(2, -1)
    prior = [torch.full((2048,), 0.125) for _ in range(2)]
    grad_output = torch.ones_like(gaussian_kl_div(mu[:1], log_var, **how))
    q = prior if how in ROWS[:3] else []
    assert_allocates_its_results_only(lambda: GAUSSIAN.backward(grad_output, mu, log_var, *q, **how))
    of_prior = [False, False, True, True]
    assert_allocates_its_results_only(lambda: GAUSSIAN.backward(grad_output, mu, log_var, *prior, mask=of_prior, **how))


def test_the_backward_of_256_MiB_of_images_allocates_the_gradients_alone(image: Tensor) -> None:
    """With a gradient for the middle dimension, and a prior broadcast over it."""
    mu, log_var = image.chunk(2, 1)
    prior = [torch.full((16, 1, 256, 256), 0.125) for _ in range(2)]
    how = {"reduction": "sum", "dim": 1}
    grad_output = torch.ones(16, 256, 256)
    # The two gradients of priors are float32 sums first: 4 MiB each, and they are the results.
    assert_allocates_its_results_only(lambda: GAUSSIAN.backward(grad_output, mu, log_var, *prior, **how), spare=9 * MIB)
    assert_allocates_its_results_only(lambda: GAUSSIAN.backward(torch.ones(16), mu, log_var, reduction="mean", dim=(1, 2, 3)))


def test_a_training_step_of_256_MiB_allocates_the_gradients_alone(encoded: Tensor) -> None:
    """Through autograd, from the loss to the gradients of both halves and of a learned prior."""
    parts = [x.detach().requires_grad_() for x in encoded.chunk(2, -1)]
    prior = [torch.full((2048,), 0.125, requires_grad=True) for _ in range(2)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gaussian_kl_div(*parts, *prior, reduction="batchmean"), [*parts, *prior])

    assert_allocates_its_results_only(step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_short_rows_allocate_nothing_of_the_inputs_size_either(reduction: str, dtype: torch.dtype) -> None:
    """Sums of two terms are half as many as the terms: a copy of them in float32 is as large as an input of bfloat16."""
    mu, log_var = torch.full((8 * MIB, 4), 0.25, dtype=dtype).chunk(2, -1)
    how = {"reduction": reduction, "dim": -1}
    less_than_an_input = mu.numel() * mu.element_size() - MIB
    assert_allocates_its_results_only(lambda: gaussian_kl_div(mu, log_var, **how), spare=less_than_an_input)
    grad_output = torch.ones(8 * MIB, dtype=dtype)
    assert_allocates_its_results_only(lambda: GAUSSIAN.backward(grad_output, mu, log_var, **how), spare=less_than_an_input)
