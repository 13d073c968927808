"""A long run neither grows nor slows down: the memory of the process and the time of a call, beside torch's own."""

from __future__ import annotations

import pytest

from long_runs import growth_and_slowdown

MIB = 2**20


@pytest.mark.parametrize(
    ("calls", "count"),
    [
        ("small_calls", 10**5 // 2),  # which are two
        pytest.param("small_calls", 10**6 // 2, marks=pytest.mark.slow),
        pytest.param("compiled_steps", 10**4, marks=pytest.mark.slow),
    ],
)
def test_a_long_run_neither_grows_nor_slows_down(calls: str, count: int) -> None:
    growth, slowdown = growth_and_slowdown(calls, count)
    assert growth < MIB
    assert slowdown < 1.5


def test_planted_growth_and_slowdown_are_found() -> None:
    """64 bytes for a call, in a list that is searched."""
    growth, slowdown = growth_and_slowdown("planted", 20_000)
    assert growth > MIB
    assert slowdown > 1.5
