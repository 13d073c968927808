"""The pictures of README.md: the KL that is computed near the prior, and the time of a loss, each as people use it."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
from matplotlib import pyplot

import kl_ext
import kl_ext.reference
from measure.workloads import WORKLOADS

from .style import Theme
from .tables import BOTH, COMPILED, EAGER, KL_EXT, rows_of

WIDTH = 5.6  # inches
TERMS, THREADS = 1 << 16, 1  # of the rows that are shown
USE_CASES = {  # of "batchmean", what VAEs have: the halves of the encoder's output
    "batchmean, chunk": "VAE, output of the encoder",
    "learned prior": "VAE with a learned prior",
    "latents, chunk": "image autoencoder, output of the encoder",
    "masked sum": "padded sequences with a mask",
    "deviations": "two Normals, standard deviations",
    "single, mean": "elementwise loss, then its mean",
    "pair, mean": "elementwise pair loss, then its mean",
}


def near_the_prior(count: int = 360) -> dict[str, Any]:
    """Distributions at shrinking distances from N(0, 1), in all directions: the true KL, and what is computed in float32.

    At the distance d, mu^2 + log_var^2 / 2 = d^2, and the KL is close to d^2 / 2.
    """
    distance = numpy.logspace(-1, -6, count)
    angle = numpy.arange(count) * math.pi * (3 - math.sqrt(5))  # the golden angle: no direction comes again
    mu = torch.from_numpy(distance * numpy.cos(angle)).float()
    log_var = torch.from_numpy(distance * numpy.sin(angle) * math.sqrt(2)).float()
    x = log_var.double().numpy()
    return {
        "distance": distance,
        "mu": mu.numpy(),
        "log_var": log_var.numpy(),
        "true": (mu.double().numpy() ** 2 + numpy.expm1(x) - x) / 2,
        EAGER: kl_ext.reference.gaussian_kl_div(mu, log_var).numpy(),
        KL_EXT: kl_ext.gaussian_kl_div(mu, log_var).numpy(),
    }


def accuracy(_: dict[str, Any], theme: Theme) -> Any:
    """The KL that is computed against the distance from the prior; what has no logarithm lies in a band of its own."""
    points = near_the_prior()
    distance, plain = points["distance"], points[EAGER]
    how = {"figsize": (WIDTH, 4.4), "layout": "constrained", "sharex": True, "height_ratios": [5.5, 1]}
    figure, (axes, band) = pyplot.subplots(2, 1, **how)
    figure.get_layout_engine().set(hspace=0.01, h_pad=0.03)
    style = {"marker": "o", "linestyle": "none", "markersize": 5, "markeredgewidth": 0}
    axes.plot(distance, points["true"], color=theme.ink, linewidth=1, label="true value")
    axes.plot(distance[plain > 0], plain[plain > 0], **style, color=theme.plain, label=EAGER)
    axes.plot(distance[::9], points[KL_EXT][::9], **style, color=theme.kl_ext, label=KL_EXT)
    axes.set(xscale="log", yscale="log", ylabel="KL computed, nats", title="KL of one latent variable, float32")
    axes.tick_params(which="both", bottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.legend(loc="lower left")
    for place, rows in ((0, plain == 0), (-1, plain < 0)):
        band.plot(distance[rows], numpy.full(rows.sum(), place), **style, color=theme.plain)
    band.set(ylim=(-1.6, 0.6), xlabel="distance from the prior N(0, 1)")
    band.set_yticks([0, -1], ["zero", "negative"])
    band.tick_params(which="both", left=False)
    band.spines["left"].set_visible(False)
    band.patch.set(facecolor=theme.plain, alpha=0.12)
    band.invert_xaxis()
    return figure


def speed(result: dict[str, Any], theme: Theme) -> Any:
    """Bars of the time of each use case, forward and backward, for kl_ext, torch.compile and plain torch."""
    rows = [row for row in rows_of(result, "ratios") if row["pass"] == BOTH and row["threads"] == THREADS]
    terms = TERMS if any(row["elements"] == TERMS for row in rows) else max(row["elements"] for row in rows)
    times = {row["case"]: row["us"] for row in rows if row["elements"] == terms}
    cases = [case for case in USE_CASES if case in times]
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.2 + 0.72 * len(cases)), layout="constrained")
    bars = ((KL_EXT, theme.kl_ext), (COMPILED, theme.compiled), (EAGER, theme.plain))
    group = len(bars) + 1.6  # the name above its bars, and a gap
    for index, (peer, color) in enumerate(bars):
        lengths = [times[case][peer][1] for case in cases]
        places = [group * line + index for line in range(len(cases))]
        axes.barh(places, lengths, 0.9, color=color, label=peer)
        for place, length, case in zip(places, lengths, cases, strict=True):
            text = f"{length:.0f} µs" if peer == KL_EXT else f"{length / times[case][KL_EXT][1]:.1f} ×"
            axes.annotate(text, (length, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    for line, case in enumerate(cases):
        axes.text(0, group * line - 0.6, f"{USE_CASES[case]}, {_shape(case, terms)}", va="bottom", fontsize=10)
    axes.set(ylim=(group * len(cases) - 1.5, -1.6), yticks=[], xlabel="microseconds, forward + backward")
    axes.spines["left"].set_visible(False)
    figure.suptitle(f"Loss and gradients of {terms:,} terms, {THREADS} thread")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(bars))
    return figure


def _shape(case: str, terms: int) -> str:
    """Of the first tensor."""
    return f"[{', '.join(map(str, WORKLOADS[case].shapes(terms)[0]))}]"
