"""The picture that train_vae.py leaves: loss curves, reconstructions, samples of each class, KL of each latent dimension."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, not a window
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator
from torch import Tensor

INK, GREY, PALE = "#1f2933", "#616e7c", "#cbd2d9"
BLUE, ORANGE = "#2a6fbb", "#f2a65a"
SIDE = 8  # pixels
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}


def save_figure(
    path: Path,
    *,
    curves: dict[str, list[float]],
    tolerance: float,
    originals: Tensor,  # [classes, 64]
    reconstructions: Tensor,  # [classes, 64]
    samples: Tensor,  # [rows, classes, 64]
    kl_by_dimension: Tensor,  # [latent_dim]
    active_nats: float,
    subtitle: str,
) -> None:
    """Draw everything and write it to `path`."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12, 8), dpi=120)
        figure.text(0.072, 0.95, "A class-conditional VAE on 8 x 8 digits", fontsize=17, fontweight="bold")
        figure.text(0.072, 0.919, subtitle, color=GREY, fontsize=11)
        columns = figure.add_gridspec(1, 2, left=0.072, right=0.985, top=0.862, bottom=0.068, wspace=0.13)
        left = columns[0].subgridspec(2, 1, height_ratios=[1.5, 1], hspace=0.36)
        curves_and_difference = left[0].subgridspec(2, 1, height_ratios=[2.8, 1], hspace=0.12)
        _draw_curves(figure, curves_and_difference, curves, tolerance)
        _draw_kl(figure.add_subplot(left[1]), kl_by_dimension, active_nats)
        right = columns[1].subgridspec(2, 1, height_ratios=[2, len(samples)], hspace=0.13)
        _draw_digits(
            figure,
            right[0],
            torch.stack([originals, reconstructions]),
            "Held-out digits (above) and their reconstructions",
        )
        _draw_digits(figure, right[1], samples, "Samples from the prior of each class", names=True)
        figure.savefig(path)
        plt.close(figure)


def _draw_curves(figure: Figure, grid: SubplotSpec, curves: dict[str, list[float]], tolerance: float) -> None:
    """Both losses on one axis, and under it how far they are apart."""
    upper, lower = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    (name, losses), (other_name, others) = curves.items()
    epochs = range(1, len(losses) + 1)
    marker = "o" if len(losses) == 1 else None
    upper.plot(epochs, others, color=ORANGE, linewidth=6, solid_capstyle="round", label=other_name, marker=marker)
    upper.plot(epochs, losses, color=BLUE, linewidth=1.6, label=name, marker=marker)
    upper.set(title="Training loss, nats per image", yscale="log")
    upper.tick_params(labelbottom=False)
    ticks = [value for value in (50, 75, 100, 150, 200, 300, 400, 500, 600) if min(losses) <= value <= max(losses)]
    upper.set_yticks(ticks, [str(value) for value in ticks])
    upper.minorticks_off()
    upper.legend(loc="upper right")
    difference = [max(abs(a - b) / abs(b), 1e-10) for a, b in zip(losses, others, strict=True)]
    lower.scatter(epochs, difference, color=GREY, s=9, linewidths=0)
    lower.axhline(tolerance, color=PALE, linestyle="--", linewidth=1.2)
    lower.set(yscale="log", ylim=(1e-10, 3 * tolerance), xlabel="epoch")
    lower.set_yticks([1e-10, 1e-7, tolerance], [r"$\leq 10^{-10}$", "$10^{-7}$", "tolerance"])
    lower.minorticks_off()
    label = "relative difference of the two"
    lower.text(0.985, 0.8, label, color=GREY, fontsize=9.5, transform=lower.transAxes, ha="right", va="top")
    lower.set_xlim(upper.get_xlim())


def _draw_kl(axes: Axes, kl_by_dimension: Tensor, active_nats: float) -> None:
    """One bar for each latent dimension, largest first; those that carry nothing in another colour."""
    heights = kl_by_dimension.sort(descending=True).values.tolist()
    active = sum(height > active_nats for height in heights)
    axes.bar(range(1, len(heights) + 1), heights, color=[BLUE if h > active_nats else ORANGE for h in heights], width=0.78)
    axes.set(title=f"KL of each latent dimension, nats: {active} of {len(heights)} active", xlabel="latent dimension, sorted")
    axes.set_xlim(0.3, len(heights) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=9))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _draw_digits(figure: Figure, cell: SubplotSpec, images: Tensor, title: str, names: bool = False) -> None:
    """A sheet of [rows, classes, 64] images with a gap between them."""
    rows, classes, gap = images.shape[0], images.shape[1], 1.5
    axes = figure.add_subplot(cell)
    for row in range(rows):
        for column in range(classes):
            x, y = column * (SIDE + gap), row * (SIDE + gap)
            image = images[row, column].reshape(SIDE, SIDE).numpy()
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=16, extent=(x, x + SIDE, y + SIDE, y))
    width, height = classes * (SIDE + gap) - gap, rows * (SIDE + gap) - gap
    axes.set(xlim=(0, width), ylim=(height, 0), title=title, anchor="NE", yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    middles = [column * (SIDE + gap) + SIDE / 2 for column in range(classes)]
    axes.set_xticks(middles, range(classes) if names else [""] * classes)
    axes.tick_params(length=0)
