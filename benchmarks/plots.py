"""Draw the plots of README.md and benchmarks/README.md from a result.

python benchmarks/plots.py                      (docs/bench-*.png from results/cpu.json; `make bench` runs this)
python benchmarks/plots.py result.json folder   (from another result, to another place)
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from pages import cells
from pages.tables import BOTH, COMPILED, EAGER, KL_EXT, rows_of

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("The plots need matplotlib: `make bench` installs it, or `pip install '.[bench]'`.")
matplotlib.use("agg")
from matplotlib import pyplot, ticker
from PIL import Image  # matplotlib brings it

ROOT = Path(__file__).resolve().parent.parent
Axes = Any


def ratios(result: dict[str, Any]) -> Any:
    """Ratio by size: a panel for each pass and number of threads, a line for each workload."""
    rows = rows_of(result, "ratios")
    threads = list(dict.fromkeys(row["threads"] for row in rows))
    figure, panels = pyplot.subplots(
        2, len(threads), figsize=(4.4 * len(threads), 6.4), sharex=True, sharey=True, squeeze=False
    )
    for line, direction in zip(panels, ("forward", BOTH), strict=True):
        for axes, count in zip(line, threads, strict=True):
            chosen = [row for row in rows if row["pass"] == direction and row["threads"] == count]
            for index, name in enumerate(dict.fromkeys(row["case"] for row in chosen)):
                points = [row for row in chosen if row["case"] == name]
                for peer, style in ((EAGER, "-"), (COMPILED, ":")):
                    label = name if peer == EAGER else None
                    xy = [row["elements"] for row in points], [row["ratio"][peer][1] for row in points]
                    axes.plot(*xy, style, color=f"C{index}", marker=".", label=label)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(xscale="log", yscale="log", title=f"{direction}, {count} thread{'s' if count > 1 else ''}")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            _sizes(axes, result, "ratios")
    panels[0][0].legend(fontsize=7, title=f"against {EAGER};\ndotted: {COMPILED}", title_fontsize=7)
    figure.supylabel("times as fast as the peer", fontsize=9)
    return figure


def roofline(result: dict[str, Any]) -> Any:
    """Operations a second by operations per byte, under the measured bandwidth and the measured matrix product."""
    floors, peaks = rows_of(result, "floor"), rows_of(result, "peak")
    threads = list(dict.fromkeys(row["threads"] for row in floors))
    figure, panels = pyplot.subplots(1, len(threads), figsize=(4.4 * len(threads), 3.8), sharey=True, squeeze=False)
    largest = max(row["elements"] for row in floors)
    for axes, count in zip(panels[0], threads, strict=True):
        chosen = [row for row in floors if row["threads"] == count and row["elements"] == largest]
        other = {id(row): next(name for name in row["us"] if name != KL_EXT) for row in chosen}
        bandwidth = max(row["bytes"] / row["us"][other[id(row)]][1] for row in chosen) / 1e3  # GB/s
        peak = max(row["operations"] / row["us"]["torch.mm"][1] for row in peaks if row["threads"] == count) / 1e3
        intensities = [0.5, peak / bandwidth, max(64.0, 2 * peak / bandwidth)]
        axes.plot(intensities, [min(peak, bandwidth * x) for x in intensities], color="black", linewidth=1)
        axes.annotate(f"{bandwidth:.0f} GB/s", (0.6, bandwidth * 0.9), fontsize=8)
        axes.annotate(f"torch.mm, {peak:.0f} Gop/s", (intensities[-1], peak * 1.1), ha="right", fontsize=8)
        for index, row in enumerate(chosen):
            reached = row["operations"] / row["us"][KL_EXT][1] / 1e3
            rate = row["bytes"] / row["us"][KL_EXT][1] / 1e3
            label = f"{row['case']}: {rate:.0f} GB/s"
            axes.plot(row["operations"] / row["bytes"], reached, "o", color=f"C{index}", label=label)
        title = f"{cells.elements(largest)} terms, {count} thread{'s' if count > 1 else ''}"
        axes.set(xscale="log", yscale="log", title=title, xlabel="operations per byte")
        axes.legend(fontsize=7, loc="lower right")
    panels[0][0].set_ylabel("10⁹ operations a second")
    return figure


def linear(result: dict[str, Any]) -> Any:
    """Nanoseconds per term as the tensors grow."""
    rows = rows_of(result, "linear")
    threads = list(dict.fromkeys(row["threads"] for row in rows))
    figure, panels = pyplot.subplots(1, len(threads), figsize=(4.4 * len(threads), 3.4), sharey=True, squeeze=False)
    floors = {"elementwise": "torch.add", "sum": "torch.dot", "sum and gradients": "two torch.mul"}
    for axes, count in zip(panels[0], threads, strict=True):
        for index, (name, floor) in enumerate(floors.items()):
            points = [row for row in rows if row["case"] == name and row["threads"] == count]
            for peer, style, label in ((KL_EXT, "-", name), ("torch", ":", floor)):
                times = [1e3 * row["us"][peer][1] / row["elements"] for row in points]
                axes.plot([row["elements"] for row in points], times, style, color=f"C{index}", marker=".", label=label)
        axes.set(xscale="log", title=f"{count} thread{'s' if count > 1 else ''}")
        _sizes(axes, result, "linear")
    panels[0][0].set(ylabel="nanoseconds per term", ylim=(0, None))
    panels[0][0].legend(fontsize=7)
    return figure


def accuracy(result: dict[str, Any]) -> Any:
    """Worst error and share of impossible values near the prior."""
    rows = rows_of(result, "accuracy")
    losses = [name for name in dict.fromkeys(row["case"] for row in rows) if name != "pair"]
    figure, panels = pyplot.subplots(2, len(losses), figsize=(4.4 * len(losses), 6), sharex=True, sharey="row", squeeze=False)
    for column, loss in enumerate(losses):
        chosen = [row for row in rows if row["case"] == loss]
        for index, peer in enumerate(chosen[0]["peers"]):
            # Peers that compute the same lie on top of each other: the later ones are thinner.
            style = {"color": f"C{index}", "marker": ".", "label": peer, "linewidth": 4 - 0.7 * index, "alpha": 0.8}
            distances = [row["distance"] for row in chosen]
            panels[0][column].plot(distances, [row["peers"][peer]["worst_ulp"] for row in chosen], **style)
            panels[1][column].plot(distances, [100 * row["peers"][peer]["negative"] for row in chosen], **style)
        panels[0][column].set(xscale="log", yscale="log", title=f"{loss}, float32")
        panels[1][column].set(xscale="log", xlabel="distance from the prior")
    panels[1][0].invert_xaxis()  # all share it
    panels[0][0].set_ylabel("worst error, ulp")
    panels[1][0].set_ylabel("values below 0, %")
    panels[0][0].legend(fontsize=7)
    return figure


def _sizes(axes: Axes, result: dict[str, Any], suite: str) -> None:
    """Ticks at the sizes that were measured."""
    sizes = list(dict.fromkeys(row["elements"] for row in rows_of(result, suite)))
    axes.set_xticks(sizes, [cells.elements(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


# Each with the suites that it needs.
PLOTS = {
    "ratios": (ratios, ["ratios"]),
    "roofline": (roofline, ["floor", "peak"]),
    "linear": (linear, ["linear"]),
    "accuracy": (accuracy, ["accuracy"]),
}


def draw(result: dict[str, Any], folder: Path) -> None:
    """A file for each plot that the result has rows for."""
    for name, (plot, suites) in PLOTS.items():
        if all(rows_of(result, suite) for suite in suites):
            figure = plot(result)
            figure.tight_layout()
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=90)
            pyplot.close(figure)
            Image.open(drawn).convert("RGB").quantize(64).save(
                folder / f"bench-{name}.png", optimize=True
            )  # a third of the size


def main() -> int:
    """Draw all plots."""
    arguments = sys.argv[1:]
    source = Path(arguments[0]) if arguments else ROOT / "benchmarks" / "results" / "cpu.json"
    folder = Path(arguments[1]) if len(arguments) > 1 else ROOT / "docs"
    draw(json.loads(source.read_text()), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
