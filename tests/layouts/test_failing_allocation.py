"""Where memory runs out a call raises, loses nothing, and leaves the next call as it was: every allocation fails in turn."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

import failing_allocations as cases
from failing_allocations import FailingProcess
from operators import Operator, each_operator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replaces functions of the GNU C library")


@pytest.fixture(scope="module")
def process() -> Iterator[FailingProcess]:
    failing = FailingProcess()
    yield failing
    failing.stop()


# The others make the same calls in parallel, or with all later allocations failing too: they run with --slow.
QUICK = {(cases.ONE, "small"), (cases.ONE, "huge"), (cases.INJECTED, "small"), (cases.ALL, "huge")}


@each_operator
@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        pytest.param(mode, shape, marks=[] if (mode, shape) in QUICK else pytest.mark.slow)
        for mode in cases.MODES
        for shape in cases.SHAPES
    ],
)
def test_every_allocation_may_fail(operator: Operator, mode: str, shape: str, process: FailingProcess) -> None:
    """A backward pass runs in the same thread; sums and rows of the larger shapes run in four."""
    counts = process.run(cases.check_all, operator.name, shape, mode)
    values = {title: count for title, count in counts.items() if "out" not in title}
    assert min(values.values()) > 0, "no allocation was seen"
