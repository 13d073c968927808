"""The picture that train_vae.py leaves: loss curves, reconstructions, samples of each class, KL of each latent dimension."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, not a window
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator
from PIL import Image  # matplotlib brings it
from torch import Tensor

SIDE = 8  # pixels


@dataclass(frozen=True)
class Theme:
    """Colours, and the background that they are for: "none" is transparent."""

    background: str
    ink: str
    grey: str
    pale: str
    blue: str
    orange: str

    def settings(self) -> dict[str, Any]:
        """For matplotlib."""
        return {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "text.color": self.ink,
            "figure.facecolor": self.background,
            "axes.facecolor": "none",
            "axes.edgecolor": self.pale,
            "axes.labelcolor": self.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlepad": 7,
            "xtick.color": self.pale,
            "ytick.color": self.pale,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "legend.frameon": False,
        }


LIGHT = Theme("none", ink="#1f2933", grey="#616e7c", pale="#cbd2d9", blue="#2a6fbb", orange="#f2a65a")
DARK = Theme("none", ink="#e6edf3", grey="#9aa5b1", pale="#3d4752", blue="#58a6ff", orange="#f2a65a")
PAPER = replace(LIGHT, background="white")


def save_figure(
    path: Path,
    theme: Theme,
    *,
    curves: dict[str, list[float]],
    originals: Tensor,  # [classes, 64]
    reconstructions: Tensor,  # [classes, 64]
    samples: Tensor,  # [rows, classes, 64]
    kl_by_dimension: Tensor,  # [latent_dim]
    active_nats: float,
    subtitle: str,
) -> None:
    """Draw everything and write it to `path`, in 64 colours. Shown 400 pixels wide, 10 points are 9 pixels."""
    with plt.rc_context(theme.settings()):
        figure = plt.figure(figsize=(6.4, 5.3), dpi=180)
        figure.text(0.085, 0.945, "A class-conditional VAE on 8 × 8 digits", fontsize=13, fontweight="bold")
        figure.text(0.085, 0.902, subtitle, color=theme.grey)
        columns = figure.add_gridspec(1, 2, left=0.085, right=0.99, top=0.83, bottom=0.09, wspace=0.12, width_ratios=[1, 1.2])
        left = columns[0].subgridspec(2, 1, hspace=0.62)
        _draw_curves(figure.add_subplot(left[0]), theme, curves)
        _draw_kl(figure.add_subplot(left[1]), theme, kl_by_dimension, active_nats)
        right = columns[1].subgridspec(2, 1, height_ratios=[2, len(samples)], hspace=0.25)
        pairs = torch.stack([originals, reconstructions])
        _draw_digits(figure.add_subplot(right[0]), theme, pairs, "Digits and reconstructions")
        _draw_digits(figure.add_subplot(right[1]), theme, samples, "Samples of each class", names=True)
        drawn = io.BytesIO()
        figure.savefig(drawn)
        plt.close(figure)
    Image.open(drawn).convert("RGBA").quantize(64, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def _draw_curves(axes: Axes, theme: Theme, curves: dict[str, list[float]]) -> None:
    """Both losses on one axis, one within the other."""
    (name, losses), (other_name, others) = curves.items()
    epochs = range(1, len(losses) + 1)
    marker = "o" if len(losses) == 1 else None
    axes.plot(epochs, others, color=theme.orange, linewidth=6, solid_capstyle="round", label=other_name, marker=marker)
    axes.plot(epochs, losses, color=theme.blue, linewidth=1.6, label=name, marker=marker)
    axes.set(title="Training loss, nats", yscale="log", xlabel="epoch")
    ticks = [value for value in (50, 75, 100, 150, 200, 300, 500) if min(losses) <= value <= max(losses)]
    axes.set_yticks(ticks, [str(value) for value in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper right")


def _draw_kl(axes: Axes, theme: Theme, kl_by_dimension: Tensor, active_nats: float) -> None:
    """One bar for each latent dimension, largest first; those that carry nothing in another colour."""
    heights = kl_by_dimension.sort(descending=True).values.tolist()
    active = sum(height > active_nats for height in heights)
    colors = [theme.blue if height > active_nats else theme.orange for height in heights]
    axes.bar(range(1, len(heights) + 1), heights, color=colors, width=0.78)
    axes.set(title="KL by dimension, nats", xlabel=f"latent dimension, {active} of {len(heights)} active")
    axes.set_xlim(0.3, len(heights) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=9))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _draw_digits(axes: Axes, theme: Theme, images: Tensor, title: str, names: bool = False) -> None:
    """A sheet of [rows, classes, 64] images with a gap between them, their ink on the page."""
    rows, classes, gap = images.shape[0], images.shape[1], 1.5
    ink = LinearSegmentedColormap.from_list("ink", [(theme.ink, 0.0), (theme.ink, 1.0)])
    for row in range(rows):
        for column in range(classes):
            x, y = column * (SIDE + gap), row * (SIDE + gap)
            image = images[row, column].reshape(SIDE, SIDE).numpy()
            axes.imshow(image, cmap=ink, vmin=0, vmax=16, extent=(x, x + SIDE, y + SIDE, y))
    width, height = classes * (SIDE + gap) - gap, rows * (SIDE + gap) - gap
    axes.set(xlim=(0, width), ylim=(height, 0), title=title, anchor="NE", yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    middles = [column * (SIDE + gap) + SIDE / 2 for column in range(classes)]
    axes.set_xticks(middles, range(classes) if names else [""] * classes)
    axes.tick_params(length=0)
