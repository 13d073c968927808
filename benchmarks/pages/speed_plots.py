"""The plots of the pages on speed: ratios by size, the roofline, and the time of a term as tensors grow."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot, ticker

from . import cells
from .tables import BOTH, COMPILED, EAGER, KL_EXT, rows_of

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
        axes.annotate(f"{bandwidth:.0f} GB/s", (1.2, bandwidth * 0.8), fontsize=8)
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


def _sizes(axes: Axes, result: dict[str, Any], suite: str) -> None:
    """Ticks at the sizes that were measured."""
    sizes = list(dict.fromkeys(row["elements"] for row in rows_of(result, suite)))
    axes.set_xticks(sizes, [cells.elements(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
