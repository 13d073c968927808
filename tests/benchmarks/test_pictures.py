"""The pictures of the pages show what was measured, and are read on light and on dark pages."""

import json
import sys
from pathlib import Path

import mpmath
import numpy
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("matplotlib")

from PIL import Image  # noqa: E402

import plots  # noqa: E402
from measure.workloads import COMPILED, EAGER, KL_EXT, WORKLOADS  # noqa: E402
from pages import pictures, style  # noqa: E402

DOCS = ROOT / "docs"
RESULT = json.loads((BENCHMARKS / "results" / "cpu.json").read_text())
FILES = [f"pictures/{name}-{theme.name}.png" for name in plots.PICTURES for theme in style.THEMES]
FILES += [f"bench-{name}.png" for name in plots.PLOTS]


@pytest.mark.parametrize("file", FILES)
def test_a_file_was_drawn_from_the_committed_result(file):
    name = file.removeprefix("pictures/").removeprefix("bench-").removesuffix(".png").split("-")[0]
    _, suites = (plots.PICTURES | plots.PLOTS)[name]
    assert style.source_of(DOCS / file) == plots.source(RESULT, suites), "run python benchmarks/plots.py"


@pytest.mark.parametrize("name", [*plots.PICTURES, "demo"])
def test_a_picture_is_small_and_has_a_transparent_twin_for_dark_pages(name):
    light, dark = (DOCS / "pictures" / f"{name}-{theme}.png" for theme in ("light", "dark"))
    images = [Image.open(path).convert("RGBA") for path in (light, dark)]
    assert images[0].size == images[1].size
    assert all(image.width >= 800 and image.getpixel((0, 0))[3] == 0 for image in images)
    assert max(path.stat().st_size for path in (light, dark)) <= 60_000
    inks = [numpy.array(image).reshape(-1, 4) for image in images]  # the middle brightness of what is opaque
    brightness = [numpy.median(ink[ink[:, 3] > 200, :3]) for ink in inks]
    assert brightness[0] < brightness[1]


def test_the_pages_show_every_plot():
    page = (ROOT / "docs" / "speed.md").read_text()
    for name in plots.PLOTS:
        assert f"(bench-{name}.png)" in page


def exact(mu: float, log_var: float) -> mpmath.mpf:
    mu, log_var = mpmath.mpf(mu), mpmath.mpf(log_var)
    return (mu**2 + mpmath.exp(log_var) - 1 - log_var) / 2


def test_near_the_prior_the_true_value_is_mpmaths_and_plain_torch_loses_it():
    points = pictures.near_the_prior()
    with mpmath.workdps(60):
        truth = [exact(*map(float, pair)) for pair in zip(points["mu"], points["log_var"], strict=True)]
        for value, of_kl_ext, true in zip(points["true"], points[KL_EXT], truth, strict=True):
            assert abs(value / true - 1) < 1e-6
            assert abs(of_kl_ext / true - 1) <= 2.5 * 2.0**-23  # in units in the last place, each at most 2^-23 of the value
        for distance, true in zip(points["distance"], truth, strict=True):
            assert abs(true / (distance**2 / 2) - 1) < 0.1, "the distance is what the axis says"
    near = points["distance"] < 1e-5
    assert (points[EAGER][near] <= 0).mean() > 0.5
    assert (points[EAGER] < 0).any()
    assert all(numpy.array_equal(points[key], again) for key, again in pictures.near_the_prior().items())


def test_the_bars_are_the_medians_of_every_use_case():
    assert set(pictures.USE_CASES) == set(WORKLOADS) - {"batchmean"}
    figure = pictures.speed(RESULT, style.THEMES[0])
    (axes,) = figure.axes
    rows = {
        row["case"]: row["us"]
        for row in RESULT["rows"]
        if row["suite"] == "ratios" and row["pass"] == "forward + backward" and (row["elements"], row["threads"]) == (65536, 1)
    }
    cases = [case for case in pictures.USE_CASES if case in rows]
    for bars, peer in zip(axes.containers, (KL_EXT, COMPILED, EAGER), strict=True):
        assert bars.get_label() == peer
        assert [bar.get_width() for bar in bars] == [rows[case][peer][1] for case in cases]
    texts = [text.get_text() for text in axes.texts]
    for case in cases:
        shape = list(WORKLOADS[case].leaves(65536)[0].shape)
        assert f"{pictures.USE_CASES[case]}, {shape}" in texts
    assert "65,536 terms, 1 thread" in figure.get_suptitle()
