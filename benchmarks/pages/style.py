"""How pictures look on a light and on a dark page, and how they become small files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from PIL import Image, PngImagePlugin  # matplotlib brings it

SOURCE = "Source"  # the text in a file that says what it was drawn from


@dataclass(frozen=True)
class Theme:
    """Colours that are read on a page of this kind."""

    name: str
    ink: str
    grey: str
    pale: str
    kl_ext: str
    plain: str
    compiled: str

    def settings(self) -> dict[str, Any]:
        """For matplotlib. Pictures are 5.6 inches wide and shown 400 pixels wide: 10 points are 10 pixels there."""
        return {
            "font.size": 11,
            "text.color": self.ink,
            "axes.edgecolor": self.pale,
            "axes.facecolor": "none",
            "axes.labelcolor": self.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": "none",
            "grid.color": self.pale,
            "legend.frameon": False,
            "xtick.color": self.grey,
            "ytick.color": self.grey,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
        }


THEMES = [
    Theme("light", "#1f2933", "#616e7c", "#cbd2d9", kl_ext="#2a6fbb", plain="#e0812b", compiled="#9aa5b1"),
    Theme("dark", "#e6edf3", "#9aa5b1", "#3d4752", kl_ext="#58a6ff", plain="#f2a65a", compiled="#7b8794"),
]


def save(figure: Any, path: Path, source: str, dpi: int) -> None:
    """The figure as a PNG file of 64 colours, a third of the size; what is transparent stays so."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    pyplot.close(figure)
    about = PngImagePlugin.PngInfo()
    about.add_text(SOURCE, source)
    image = Image.open(drawn).convert("RGBA").quantize(64, Image.Quantize.FASTOCTREE)
    image.save(path, optimize=True, pnginfo=about)


def source_of(path: Path) -> str | None:
    """What a file was drawn from."""
    with Image.open(path) as image:
        return image.info.get(SOURCE)
