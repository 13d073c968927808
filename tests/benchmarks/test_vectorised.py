"""Every CPU kernel of the formulas runs in vectors: read from its code, and from the instructions it takes."""

import sys

import pytest

import compiled_kernels
from kl_ext import _library

sys.path.insert(0, str(compiled_kernels.ROOT / "benchmarks"))
from instructions import count


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_the_formulas_are_computed_in_whole_vectors(capability):
    if capability not in _library.build_facts().cpu_capabilities:
        pytest.skip(f"built without {capability}")
    assert not compiled_kernels.not_vectorised(compiled_kernels.disassembled(_library.LIBRARY), capability)


def test_a_count_above_its_ceiling_or_without_one_is_reported():
    ceilings = {"single Float": 5.0, "call single": 0.5}
    assert count.compare({"single Float": 4.9, "call single": 0.5}, ceilings) == []
    assert count.compare({"single Float": 5.1, "call single": 0.5}, ceilings) == ["single Float: 5.1 is above 5.0"]
    assert count.compare({"single Float": 5.0}, ceilings) == ["call single: not counted"]
    assert count.compare({"new": 1.0, "single Float": 5.0, "call single": 0.1}, ceilings) == ["new: has no ceiling"]


def test_counts_are_read_from_the_dumps_of_callgrind():
    dump = "version: 1\ndesc: Trigger: Client Request: call add grad\n\nevents: Ir\nsummary: 2143520\n\nfn=(1) f\n0 2600\n"
    assert count.read(dump) == ("call add grad", 2143520)
    assert count.read(dump.replace("Client Request: call add grad", "Program termination")) is None
    counts = {"call add": 1000, "call add grad": 2000, "call single": 500, "call single grad": 3000, "single Float": 4096 * 5}
    assert count.relative(counts) == {"call single": 0.5, "call single grad": 1.5, "single Float": 5.0}
