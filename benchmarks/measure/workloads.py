"""The losses that are timed, and the peers that compute them.

A peer is a namespace with the functions of kl_ext. What a peer does not have is written with what it has, as its user would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import kl_ext
import kl_ext.reference

from . import timing

KL_EXT, EAGER, COMPILED, DISTRIBUTIONS, DIFFUSERS = (
    "kl_ext",
    "plain torch",
    "torch.compile",
    "torch.distributions",
    "diffusers' formula",
)
WIDTH = 64  # latent dimensions, where the batch has them
IMAGE = (8, 32, 32)  # latent channels, height and width
FRAMES = (64, 64)  # latent channels, frames
STANDARD_NORMAL = Normal(0.0, 1.0)


class Peer:
    """A divergence per element; the pair loss, standard deviations, weights and reductions in terms of it."""

    def gaussian_kl_div(
        self, *tensors: Tensor, weight: Tensor | None = None, reduction: str = "none", dim: Any = None
    ) -> Tensor:
        return self.reduced(self.terms(*tensors), weight, reduction, dim)

    def normal_kl_div(self, *tensors: Tensor, reduction: str = "none", dim: Any = None) -> Tensor:
        log_variances = [2 * x.log() if i % 2 else x for i, x in enumerate(tensors)]
        return self.reduced(self.terms(*log_variances), None, reduction, dim)

    def reduced(self, terms: Tensor, weight: Tensor | None, reduction: str, dim: Any) -> Tensor:
        terms = terms if weight is None else terms * weight
        if reduction == "batchmean":
            return terms.sum() / terms.shape[0]
        return terms if reduction == "none" else terms.sum(dim)

    def kl_div_single_loss(self, mu: Tensor, log_var: Tensor) -> Tensor:
        return self.terms(mu, log_var)

    def kl_div_pair_loss(self, *tensors: Tensor) -> Tensor:
        return 2 * self.terms(*tensors) + 0.5

    def terms(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError


class Distributions(Peer):
    """torch.distributions as it comes: it wants standard deviations, and checks its arguments."""

    def terms(self, mu: Tensor, log_var: Tensor, mu_q: Tensor | None = None, log_var_q: Tensor | None = None) -> Tensor:
        if mu_q is None or log_var_q is None:
            return kl_divergence(Normal(mu, (0.5 * log_var).exp()), STANDARD_NORMAL)
        return kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(mu_q, (0.5 * log_var_q).exp()))

    def normal_kl_div(self, *tensors: Tensor, reduction: str = "none", dim: Any = None) -> Tensor:
        q = Normal(*tensors[2:]) if tensors[2:] else STANDARD_NORMAL
        return self.reduced(kl_divergence(Normal(*tensors[:2]), q), None, reduction, dim)


class Diffusers(Peer):
    """The terms of the posterior of diffusers' autoencoders, which clamps log-variances to -30 ... 20."""

    def terms(self, mu: Tensor, log_var: Tensor, mu_q: Tensor | None = None, log_var_q: Tensor | None = None) -> Tensor:
        log_var = log_var.clamp(-30.0, 20.0)
        if mu_q is None or log_var_q is None:
            return 0.5 * (mu.pow(2) + log_var.exp() - 1.0 - log_var)
        log_var_q = log_var_q.clamp(-30.0, 20.0)
        var_q = log_var_q.exp()
        return 0.5 * ((mu - mu_q).pow(2) / var_q + log_var.exp() / var_q - 1.0 - log_var + log_var_q)


# torch.compile compiles the plain formula.
PEERS: dict[str, Any] = {
    KL_EXT: kl_ext,
    EAGER: kl_ext.reference,
    COMPILED: kl_ext.reference,
    DISTRIBUTIONS: Distributions(),
    DIFFUSERS: Diffusers(),
}


@dataclass(frozen=True)
class Workload:
    """A loss as a function of a peer and of leaf tensors, whose shapes follow from the number of terms."""

    name: str
    shapes: Callable[[int], list[tuple[int, ...]]]
    loss: Callable[[Any, list[Any]], Tensor]
    chunked: bool = False  # mu and log_var are the halves of the first leaf
    has_deviations: bool = False  # every second leaf is positive
    is_masked: bool = False  # a mask is behind the leaves

    def leaves(self, elements: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [timing.leaf(shape, device, dtype) for shape in self.shapes(elements)]
        if self.has_deviations:
            leaves = [(x.abs() + 0.5).detach().requires_grad_() if i % 2 else x for i, x in enumerate(leaves)]
        return [*leaves, mask_of(leaves[0])] if self.is_masked else leaves

    def run(self, peer: str) -> Callable[[list[Tensor]], Tensor]:
        """What is timed: compiled, reduction and all, for the very shape, where the peer is torch.compile."""

        def loss(leaves: list[Tensor]) -> Tensor:
            return self.loss(PEERS[peer], leaves)

        return torch.compile(loss, dynamic=False) if peer == COMPILED else loss


def mask_of(frames: Tensor) -> Tensor:
    """Sequences of several lengths, padded: [B, 1, T] for [B, C, T], half to all of it."""
    count, _, longest = frames.shape
    lengths = longest // 2 + torch.arange(count, device=frames.device) * 7 % (longest // 2 + 1)
    return (torch.arange(longest, device=frames.device) < lengths[:, None])[:, None]


def _sequences(elements: int) -> int:
    """One sequence at least, which has 4 Ki terms or more."""
    return max(1, elements // math.prod(FRAMES))


def _images(elements: int) -> int:
    """One image at least, which has 8 Ki terms."""
    channels, height, width = IMAGE
    return max(1, elements // (channels * height * width))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "single, mean",
            lambda n: [(n,), (n,)],
            lambda peer, leaves: peer.kl_div_single_loss(*leaves).mean(),
        ),
        Workload(
            "batchmean",
            lambda n: [(max(1, n // WIDTH), WIDTH)] * 2,
            lambda peer, leaves: peer.gaussian_kl_div(*leaves, reduction="batchmean"),
        ),
        Workload(
            "batchmean, chunk",
            lambda n: [(max(1, n // WIDTH), 2 * WIDTH)],
            lambda peer, leaves: peer.gaussian_kl_div(*leaves[0].chunk(2, 1), reduction="batchmean"),
            chunked=True,
        ),
        Workload(
            "learned prior",
            lambda n: [(max(1, n // WIDTH), WIDTH)] * 2 + [(WIDTH,)] * 2,
            lambda peer, leaves: peer.gaussian_kl_div(*leaves, reduction="batchmean"),
        ),
        Workload(
            "latents, chunk",
            lambda n: [(_images(n), 2 * IMAGE[0], *IMAGE[1:])],
            lambda peer, leaves: peer.gaussian_kl_div(*leaves[0].chunk(2, 1), reduction="sum", dim=(1, 2, 3)),
            chunked=True,
        ),
        Workload(
            "pair, mean",
            lambda n: [(n,)] * 4,
            lambda peer, leaves: peer.kl_div_pair_loss(*leaves).mean(),
        ),
        Workload(
            "masked sum",
            lambda n: [(_sequences(n), *FRAMES)] * 4,
            lambda peer, leaves: peer.gaussian_kl_div(*leaves[:4], weight=leaves[4], reduction="sum"),
            is_masked=True,
        ),
        Workload(
            "deviations",
            lambda n: [(max(1, n // WIDTH), WIDTH)] * 4,
            lambda peer, leaves: peer.normal_kl_div(*leaves, reduction="batchmean"),
            has_deviations=True,
        ),
    )
}
