"""Draw the pictures of README.md and the plots of the other pages from a result.

python benchmarks/plots.py                      (docs/ from results/cpu.json; `make bench` runs this)
python benchmarks/plots.py result.json folder   (from another result, to another place)
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("The plots need matplotlib: `make bench` installs it, or `pip install '.[bench]'`.")
matplotlib.use("agg")
from pages import pictures, speed_plots, style
from pages.tables import rows_of

HERE = Path(__file__).resolve().parent
# Each with the suites that it needs. A picture is drawn for light and for dark pages.
PICTURES = {"accuracy": (pictures.accuracy, []), "speed": (pictures.speed, ["ratios"])}
PLOTS = {
    "ratios": (speed_plots.ratios, ["ratios"]),
    "roofline": (speed_plots.roofline, ["floor", "peak"]),
    "linear": (speed_plots.linear, ["linear"]),
}


def source(result: dict[str, Any], suites: list[str]) -> str:
    """A digest of the rows that a file is drawn from."""
    rows = [rows_of(result, suite) for suite in suites]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def draw(result: dict[str, Any], folder: Path) -> None:
    """A file for each plot, and two for each picture, that the result has rows for."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, (picture, suites) in PICTURES.items():
        if all(rows_of(result, suite) for suite in suites):
            for theme in style.THEMES:
                with matplotlib.rc_context(theme.settings()):
                    figure = picture(result, theme)
                    path = folder / "pictures" / f"{name}-{theme.name}.png"
                    style.save(figure, path, source(result, suites), dpi=160)
    for name, (plot, suites) in PLOTS.items():
        if all(rows_of(result, suite) for suite in suites):
            figure = plot(result)
            figure.tight_layout()
            style.save(figure, folder / f"bench-{name}.png", source(result, suites), dpi=90)


def main() -> int:
    """Draw all of them."""
    arguments = sys.argv[1:]
    result = Path(arguments[0]) if arguments else HERE / "results" / "cpu.json"
    folder = Path(arguments[1]) if len(arguments) > 1 else HERE.parent / "docs"
    draw(json.loads(result.read_text()), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
