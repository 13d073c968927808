"""Digests of what the operators compute: of terms, of sums, and of weighted terms and sums.

Run as a script, this file prints them: `python digests.py SEED`, under the environment variable ATEN_CPU_CAPABILITY by which
torch chooses its own kernels.
"""

import functools
import hashlib
import itertools
import json
import math
import sys

import numpy
import torch

import points
from layouts import chunk, expanded, inside, shifted, transposed
from operators import DTYPES, ELEMENTWISE, GAUSSIAN, REDUCING, Operator
from reduction_cases import random_case


def digest(tensors):
    """One NaN for any."""
    result = hashlib.sha256()
    for x in tensors:
        x = x.detach().cpu().contiguous()
        x = torch.where(x.isnan(), torch.full_like(x, math.nan), x)
        result.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


# Of terms

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
    bounds = operator.taken({"clamp_min": clamps[0], "clamp_max": clamps[1]})
    return (operator.operator(*inputs, **bounds, dtype=dtype), *operator.backward(grad_output, *inputs, **bounds))


@functools.cache
def cases_of_terms(seed):
    """Name, operator, inputs, grad_output and clamps of everything that is compared."""
    return list(generate_terms(seed))


def generate_terms(seed):
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


def digests_of_terms(seed):
    return {name: digest(compute(operator, *rest)) for name, operator, *rest in cases_of_terms(seed)}


# Of sums


@functools.cache
def cases_of_sums(seed):
    """The operator, inputs, reduction and grad_output of every sum that is compared."""
    rng = numpy.random.default_rng(seed)
    return {f"{d}, {name}": (d, *case) for d in REDUCING for name, case in sums_of(d, rng).items()}


def sums_of(operator: Operator, rng):
    """Random ones, and ones large enough for 7 threads."""
    result = {}
    for i in range(60):
        inputs, dims = random_case(rng, operator)
        how = [{}, {"reduction": "sum", "dim": dims}, {"reduction": "mean", "dim": dims}][i % 3]
        result[f"random {i}"] = inputs, how
    encoded, *prior = operator.wide_range(rng, (2000, 400), (200,), (200,))
    large = [*encoded.chunk(2, -1), *prior]
    image = operator.wide_range(rng, (3, 40, 50, 50), (3, 1, 50, 50))
    for dim in (None, 0, 1):
        result[f"large rows, sum of {dim}"] = large, {"reduction": "sum", "dim": dim}
    for dim in ((0, 2, 3), 1, None):
        result[f"image, mean of {dim}"] = image, {"reduction": "mean", "dim": dim}
    result["non-finite"] = [torch.where(x > 2, math.inf, torch.where(x < -2, math.nan, x)) for x in large], {"reduction": "sum"}
    result["1M"] = operator.wide_range(rng, (1024 * 1024 + 3,), ()), {"reduction": "batchmean"}
    for name, (inputs, how) in result.items():
        (grad_output,) = GAUSSIAN.wide_range(rng, tuple(operator(*inputs, **how).shape))
        result[name] = inputs, how, grad_output
    return result


def digests_of_sums(seed):
    return {
        name: digest([operator(*inputs, **how), *operator.backward(grad_output, *inputs, **how)])
        for name, (operator, inputs, how, grad_output) in cases_of_sums(seed).items()
    }


# Of weighted terms and their sums


def suited(operator: Operator, inputs):
    """Inputs uniform in (-2, 2) as the operator takes them."""
    return [operator.suited(i, x) for i, x in enumerate(inputs)]


def digests_of_weighted(seed):
    rng = numpy.random.default_rng(seed)  # torch's own numbers differ between instruction sets
    result = {}
    for operator in REDUCING:
        for shapes in ([(700, 200)] * 2, [(700, 200)] * 2 + [(200,)] * 2, [(3, 20, 40, 40)] * 2 + [(3, 1, 40, 40)] * 2):
            inputs = suited(operator, [torch.from_numpy(rng.uniform(-2, 2, shape)).float() for shape in shapes])
            for size in (shapes[0], (shapes[0][0], *[1] * (len(shapes[0]) - 1)), shapes[0][-1:]):
                numbers = torch.from_numpy(rng.uniform(-1, 1, size) * (rng.random(size) < 0.7)).float()
                for weight in (numbers, numbers != 0):
                    for how in ({}, {"reduction": "sum"}, {"reduction": "mean", "dim": 1}, {"reduction": "mean", "dim": 0}):
                        value = operator.function(*inputs, weight=weight, **how)
                        grad_output = torch.from_numpy(rng.uniform(-1, 1, tuple(value.shape))).float()
                        gradients = operator.backward(grad_output, *inputs, weight=weight, **how)
                        result[f"{operator} {shapes} {size} {weight.dtype} {how}"] = digest([value, *gradients])
    return result


DIGESTS = {"terms": digests_of_terms, "sums": digests_of_sums, "weighted": digests_of_weighted}


if __name__ == "__main__":
    capability, seed = torch.backends.cpu.get_cpu_capability(), int(sys.argv[1])
    print(json.dumps({"capability": capability, **{name: of(seed) for name, of in DIGESTS.items()}}))
