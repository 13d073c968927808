"""tests/threads/tsan.py finds a race in kl_ext, and only there: planted in a library of the same name."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest

import tsan
from compiled_kernels import needs

LIBRARY = """
#include <atomic>
namespace { KIND number; }
extern "C" void add() { for (int i = 0; i < 1000000; ++i) number = number + 1; }
"""
# Long calls, in which no thread takes Python's lock: what it orders is no race.
THREADS = """
import ctypes, sys, threading
add = ctypes.CDLL(sys.argv[1]).add
threads = [threading.Thread(target=lambda: [add() for _ in range(5)]) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.parametrize("kind, name, races, ours", [
    ("volatile long", "libkl_ext.so", True, True),
    ("volatile long", "libanother.so", True, False),
    ("std::atomic<long>", "libkl_ext.so", False, False),
])  # fmt: skip
def test_a_planted_race_is_found_where_it_is(kind: str, name: str, races: bool, ours: bool, tmp_path: Path) -> None:
    needs("g++")
    library, program = tmp_path / name, tmp_path / "threads.py"
    source = LIBRARY.replace("KIND", kind)
    command = ["g++", "-x", "c++", "-", "-O1", "-g1", "-shared", "-fPIC", "-fsanitize=thread", "-o", library]
    if subprocess.run(command, input=source, text=True, stderr=subprocess.PIPE).returncode:
        pytest.skip("this g++ has no ThreadSanitizer")
    program.write_text(textwrap.dedent(THREADS))
    status, reports = tsan.reports_of(str(program), str(library))
    assert status == 0
    assert (name in map(tsan.innermost, reports)) == races
    assert any(map(tsan.is_ours, reports)) == ours
