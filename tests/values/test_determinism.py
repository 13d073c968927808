"""The same bits from every instruction set, any number of threads, every repetition, and from CPU and GPU."""

import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy
import pytest
import torch

import digests
from digests import CLAMPS, DIGESTS, cases_of_terms, compute, differing, digest, inputs_of
from operators import ELEMENTWISE
from this_run import SEED

each_capability = pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
each_part = pytest.mark.parametrize("part", DIGESTS)


@pytest.fixture(scope="module")
def seed():
    return zlib.crc32(f"{SEED} determinism".encode())


@functools.cache
def here_of(part, seed):
    return DIGESTS[part](seed)


def supported(capability):
    """What the processor can run, by the name that ATEN_CPU_CAPABILITY takes."""
    with open("/proc/cpuinfo") as lines:
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    needed = {
        "default": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"},
    }
    return needed[capability] <= flags


def run_under(capability, *command):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout


@functools.cache
def digests_under(capability, seed):
    return json.loads(run_under(capability, str(Path(digests.__file__)), str(seed)))


@each_capability
@each_part
def test_every_instruction_set_gives_the_same_bits(part, capability, seed):
    if not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    answer = digests_under(capability, seed)
    if platform.machine() == "x86_64":
        assert answer["capability"].lower() == capability, "torch did not follow ATEN_CPU_CAPABILITY"
    assert not differing(answer[part], here_of(part, seed))


@each_capability
def test_the_capability_reported_is_the_one_asked_for(capability):
    if platform.machine() != "x86_64" or not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    report = run_under(capability, "-m", "kl_ext")
    assert re.search(rf"kl_ext uses {capability.upper()}\b", report), report


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@each_part
def test_any_number_of_threads_gives_the_same_bits(part, threads, seed):
    expected, before = here_of(part, seed), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert not differing(DIGESTS[part](seed), expected)
    finally:
        torch.set_num_threads(before)


@each_part
def test_a_repetition_gives_the_same_bits(part, seed):
    assert not differing(DIGESTS[part](seed), here_of(part, seed))


def test_the_gpu_gives_the_bits_of_the_cpu(device, seed):
    if device.type == "cpu":
        pytest.skip("compares another device with the CPU")
    wrong, here = [], here_of("terms", seed)
    for name, operator, inputs, grad_output, clamps in cases_of_terms(seed):
        moved = [x.to(device) for x in inputs], grad_output.to(device)
        if digest(compute(operator, *moved, clamps)) != here[name]:
            wrong.append(name)
    assert not wrong


def test_the_digest_tells_one_bit_and_no_nan_from_another():
    x = torch.tensor([1.0, math.nan])
    assert digest([x]) == digest([torch.tensor([0x3F800000, 0x7FC00001], dtype=torch.int32).view(torch.float32)])
    assert digest([x]) != digest([torch.tensor([1.0 + 2**-23, math.nan])])
    assert digest([torch.tensor(0.0)]) != digest([torch.tensor(-0.0)])


def test_the_cases_hold_every_kind_of_result(seed):
    """NaN, infinities, zeros and subnormal numbers, so that their bits are compared too."""
    tiny = torch.finfo(torch.float32).tiny
    for operator in ELEMENTWISE:
        inputs = inputs_of(operator, 30_011, torch.float32, numpy.random.default_rng(seed))
        value, *gradients = compute(operator, inputs, torch.ones(30_011), CLAMPS[3])
        assert value.isnan().any() and value.isinf().any() and value.isfinite().any()
        every = torch.cat(gradients).abs()
        assert ((every > 0) & (every < tiny)).any() and (every == 0).any()
