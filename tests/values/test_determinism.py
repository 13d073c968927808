"""The same bits from every instruction set and any number of threads, and from CPU and GPU.

Run as a script, this file computes the digests that the tests compare: `python test_determinism.py SEED`, under the environment
variable ATEN_CPU_CAPABILITY that torch chooses its own kernels by.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import zlib

import numpy
import pytest
import torch

import points
from conftest import SEED
from layouts import chunk, expanded, inside, shifted, transposed
from operators import DTYPES, ELEMENTWISE

KINDS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
CLAMPS = [(-30.0, 20.0), (-43.0, 43.0), (-100.0, 120.0), (-math.inf, math.inf), (0.25, 0.25)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "offset": shifted,
    "chunk": lambda x: chunk(x, -1, 1),
    "transposed": lambda x: transposed(x, 0, -1),
    "strided": lambda x: inside(x, -1, 3),
    "expanded": lambda x: expanded(x, 0),
}
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -5e-324, 1e-40, 3e38, -3e38, 1e300, 88.8, -104.0, 709.9]


def inputs_of(operator, numel, dtype, rng):
    """Points of every kind, and special values among them."""
    make = points.wide_single if operator.count == 2 else points.wide_pair
    ordinary = points.single if operator.count == 2 else points.pair
    kind = numpy.float64 if dtype == torch.float64 else numpy.float32
    columns = []
    for wide, narrow in zip(make(rng, numel, kind), ordinary(rng, numel, kind), strict=True):
        with numpy.errstate(over="ignore"):
            special = rng.choice(numpy.array(SPECIAL, dtype=kind), numel)
        which = rng.choice(3, numel, p=[0.4, 0.5, 0.1])
        columns.append(torch.from_numpy(numpy.choose(which, [wide, narrow, special]).astype(kind)).to(dtype))
    return columns


def compute(operator, inputs, grad_output, clamps, dtype=None):
    """The value and every gradient."""
    value = operator.operator(*inputs, clamp_min=clamps[0], clamp_max=clamps[1], dtype=dtype)
    return (value, *operator.backward_operator(grad_output, *inputs, *clamps, [True] * operator.count))


@functools.cache
def cases(seed):
    """Name, operator, inputs, grad_output and clamps of everything that is compared."""
    return list(generate_cases(seed))


def generate_cases(seed):
    rng = numpy.random.default_rng(seed)
    for operator, (name, dtype) in itertools.product(ELEMENTWISE, KINDS.items()):
        for clamps in CLAMPS:
            inputs = inputs_of(operator, 10_007, dtype, rng)
            yield f"{operator} {name} {clamps}", operator, inputs, torch.from_numpy(rng.normal(size=10_007)).to(dtype), clamps
        for layout, make in LAYOUTS.items():
            inputs = [make(x.view(61, 131)) for x in inputs_of(operator, 61 * 131, dtype, rng)]
            grad_output = make(torch.from_numpy(rng.normal(size=(61, 131))).to(dtype))
            yield f"{operator} {name} {layout}", operator, inputs, grad_output, CLAMPS[0]
            yield f"{operator} {name} {layout} of a sum", operator, inputs, grad_output[:1, :1].expand(61, 131), CLAMPS[0]
        for numel in (*range(1, 36), 63, 64, 65, 127, 129, 1023, 1025):
            inputs = inputs_of(operator, numel, dtype, rng)
            yield (
                f"{operator} {name} {numel}",
                operator,
                inputs,
                torch.from_numpy(rng.normal(size=numel)).to(dtype),
                CLAMPS[numel % len(CLAMPS)],
            )
    for mix in itertools.product(KINDS, repeat=2):
        kinds = [KINDS[name] for name in mix]
        for operator in ELEMENTWISE:
            inputs = [x.to(kinds[i % 2]) for i, x in enumerate(inputs_of(operator, 1003, torch.float64, rng))]
            yield f"{operator} {mix}", operator, inputs, torch.from_numpy(rng.normal(size=1003)).to(kinds[0]), CLAMPS[0]
    for operator in ELEMENTWISE:
        # Enough for seven threads.
        inputs = [x.repeat(40)[:400_003] for x in inputs_of(operator, 10_007, torch.float32, rng)]
        yield f"{operator} large", operator, inputs, torch.from_numpy(rng.normal(size=400_003)).float(), CLAMPS[0]
        halves = [chunk(x[:400_000].view(1000, 400), 1, 1) for x in inputs]
        yield f"{operator} large chunks", operator, halves, torch.ones(()).expand(1000, 400), CLAMPS[3]


def digest(tensors):
    """One NaN for any."""
    result = hashlib.sha256()
    for x in tensors:
        x = x.detach().cpu().contiguous()
        x = torch.where(x.isnan(), torch.full_like(x, math.nan), x)
        result.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def digests(seed):
    return {name: digest(compute(operator, *rest)) for name, operator, *rest in cases(seed)}


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


@pytest.fixture(scope="module")
def seed():
    return zlib.crc32(f"{SEED} determinism".encode())


@pytest.fixture(scope="module")
def here(seed):
    return digests(seed)


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


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(capability, seed, here):
    if not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    answer = json.loads(run_under(capability, __file__, str(seed)))
    if platform.machine() == "x86_64":
        assert answer["capability"].lower() == capability, "torch did not follow ATEN_CPU_CAPABILITY"
    assert not differing(answer["digests"], here)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_capability_reported_is_the_one_asked_for(capability):
    if platform.machine() != "x86_64" or not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    report = run_under(capability, "-m", "kl_ext")
    assert re.search(rf"kl_ext uses {capability.upper()}\b", report), report


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(threads, seed, here):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert not differing(digests(seed), here)
    finally:
        torch.set_num_threads(before)


def test_a_repetition_gives_the_same_bits(seed, here):
    assert not differing(digests(seed), here)


def test_the_gpu_gives_the_bits_of_the_cpu(device, seed, here):
    if device.type == "cpu":
        pytest.skip("compares another device with the CPU")
    wrong = []
    for name, operator, inputs, grad_output, clamps in cases(seed):
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


if __name__ == "__main__":
    print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "digests": digests(int(sys.argv[1]))}))
