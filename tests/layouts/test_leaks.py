"""No call leaves anything behind, however it ends: what kl_ext holds is counted, and the objects of Python."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import leaks
from compiled_kernels import needs
from failing_allocations import SHAPES, FailingProcess
from operators import Operator, each_operator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replaces functions of the GNU C library")


@pytest.fixture(scope="module")
def process() -> Iterator[FailingProcess]:
    counting = FailingProcess()
    yield counting
    counting.stop()


# What a single call with a shape leaves is counted by test_failing_allocation.py.
@each_operator
@pytest.mark.parametrize("shape", [None, *SHAPES])
def test_calls_leave_nothing_behind(operator: Operator, shape: str | None, process: FailingProcess) -> None:
    assert process.run(leaks.check_all, operator.name, shape) > 1


@pytest.mark.parametrize("what", leaks.PLANTED)
def test_a_planted_leak_is_found(what: str, process: FailingProcess) -> None:
    with pytest.raises(AssertionError, match=f"growth of .*{what}"):
        process.run(leaks.check_planted, what)


def leaks_of_kl_ext(folder: Path, *libraries: Path) -> list[str]:
    """What LeakSanitizer reports of calls of every kind, where a library of kl_ext is among the callers of the allocation."""
    needs("g++")
    sanitizer = subprocess.check_output(["g++", "-print-file-name=liblsan.so"], text=True).strip()
    if not Path(sanitizer).is_file():
        pytest.skip("this g++ has no LeakSanitizer")
    options = {"fast_unwind_on_malloc": 0, "malloc_context_size": 16, "exitcode": 0, "log_path": folder / "report"}
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer,
        "LSAN_OPTIONS": ":".join(f"{name}={value}" for name, value in options.items()),
        "PYTHONMALLOC": "malloc",  # the sanitizer does not look into the memory that Python manages
    }
    program = [sys.executable, str(Path(__file__).with_name("leak_sanitizer.py")), *map(str, libraries)]
    ran = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
    assert int(ran.stdout) > 100
    text = "".join(path.read_text() for path in folder.glob("report*"))
    blocks = re.findall(r"^(?:Direct|Indirect) leak of .*?\n\n", text, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if re.search(r"/(libkl_ext|_bindings|_C)\.[^/]*$", block, re.MULTILINE)]


@pytest.mark.slow
def test_leak_sanitizer_finds_nothing(tmp_path: Path) -> None:
    assert leaks_of_kl_ext(tmp_path) == []


@pytest.mark.slow
def test_leak_sanitizer_finds_a_planted_leak(tmp_path: Path) -> None:
    needs("g++")
    library = tmp_path / "libkl_ext.so"
    source = 'extern "C" void leak() { static volatile long* kept; kept = new long[7]; kept = nullptr; }'
    subprocess.run(["g++", "-x", "c++", "-", "-shared", "-fPIC", "-o", library], input=source, text=True, check=True)
    found = leaks_of_kl_ext(tmp_path, library)
    assert all(" in leak " in block for block in found)
    assert sum(int(re.search(r"in (\d+) object", block)[1]) for block in found) >= 9
