"""Launches for tools that watch them: small ones on every path (compute-sanitizer), or one of each case (ncu).

    cd benchmarks
    python -m gpu.launches --seconds 20          (small; results are compared with the CPU's, bit for bit)
    python -m gpu.launches --bytes 536870912     (one of each case that moves so many bytes)

Prints one line of JSON. The arguments of small launches are copied from the CPU, never computed on the GPU: a tool that watches
kl_ext's kernels alone must not take them for uninitialised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import kl_ext

from . import cases

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "offset": lambda x: torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape),
    "chunk": lambda x: torch.cat([x, x], -1).chunk(2, -1)[1],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(7, 3, 20), (130, 1, 65), (1, 3, 1029), (1100, 1, 3)]
REDUCTIONS: list[tuple[str, list[int] | None]] = [
    ("none", None),
    ("sum", None),
    ("batchmean", None),
    ("sum", [0]),
    ("mean", [2]),
    ("sum", [0, 2]),
]
CLAMPS = [(-30.0, 20.0), (-100.0, 120.0)]
Launch = tuple[str, Callable[..., Any], list[Tensor]]


def small() -> Iterator[Launch]:
    """A name, a function and its arguments, on the CPU."""
    ops = torch.ops.kl_ext
    for shape, (layout, make), dtype in itertools.product(SHAPES, LAYOUTS.items(), DTYPES):
        *inputs, grad = (make(torch.randn(shape).to(dtype)) for _ in range(5))
        about = f"{layout} {dtype} {shape}"
        for bounds in CLAMPS if layout == "contiguous" else CLAMPS[:1]:
            for name, count in (("kl_div_single_loss", 2), ("kl_div_pair_loss", 4)):
                forward, backward = getattr(ops, name).default, getattr(ops, f"{name}_backward").default
                clamps = dict(zip(("clamp_min", "clamp_max"), bounds, strict=True))
                yield f"{name} {about}", lambda *x, f=forward, c=clamps: f(*x, **c), inputs[:count]
                mask = [True] * count
                yield f"{name}_backward {about}", lambda *x, f=backward, b=bounds, m=mask: f(*x, *b, m), [grad, *inputs[:count]]
        priors = [x.narrow(0, 0, 1).narrow(1, 0, 1) for x in inputs[2:]]
        for (reduction, dim), q in itertools.product(REDUCTIONS, ([], inputs[2:], priors)):
            how = {"reduction": reduction, "dim": dim}
            arguments = [*inputs[:2], *q]
            name = f"gaussian_kl_div {reduction} {dim}, {len(arguments)} arguments, {about}"
            yield name, lambda *x, h=how: kl_ext.gaussian_kl_div(*x, **h), arguments
            value = kl_ext.gaussian_kl_div(*arguments, **how)
            mask, missing = [True] * len(arguments) + [False] * (4 - len(arguments)), [None] * (4 - len(arguments))

            def backward(
                *x: Tensor, reduction: str = reduction, dim: Any = dim, mask: Any = mask, missing: Any = missing
            ) -> Any:
                results = ops.gaussian_kl_div_backward(*x, *missing, -30.0, 20.0, reduction, dim, mask)
                return results[: len(x) - 1]

            yield f"backward of {name}", backward, [torch.rand(value.shape).to(value.dtype), *arguments]


def moved(x: Tensor, device: str) -> Tensor:
    """x on the device with the strides and the storage offset that it has, by a copy of its storage."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.cpu().contiguous(), b.contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a.view(kind) == b.view(kind)) | (a.isnan() & b.isnan())).all())


def tuple_of(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def run_small(device: str, seconds: float, calls: int | None) -> dict[str, Any]:
    """As many of the small launches as there is time for."""
    start, done, wrong = time.monotonic(), 0, []
    complete = True
    launches = list(small())
    random.Random(0).shuffle(launches)  # what there is no time for is spread over all paths
    for name, function, arguments in launches:
        if time.monotonic() - start > seconds or done == calls:
            complete = False
            break
        results = tuple_of(function(*(moved(x, device) for x in arguments)))
        wants = tuple_of(function(*arguments))
        wrong += [name for a, b in zip(results, wants, strict=True) if not same_bits(a, b)][:1]
        done += 1
    return {"calls": done, "complete": complete, "seconds": time.monotonic() - start, "wrong": wrong}


def run_cases(device: str, total: int, limit: int | None) -> list[dict[str, Any]]:
    """Each case once."""
    listed = []
    for dtype, case in list(itertools.product(cases.DTYPES, cases.cases()))[:limit]:
        kind = cases.DTYPES[dtype]
        batch = case.batch(total, kind.itemsize)
        tensors = case.fresh(batch, kind, device)
        case.own()(*tensors)
        listed.append({"case": case.name, "dtype": dtype, "least_bytes": case.bytes(batch, kind.itemsize)})
        del tensors
    if device == "cuda":
        torch.cuda.synchronize()
    return listed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--bytes", type=int, help="one of each case, moving so many bytes")
    parser.add_argument("--seconds", type=float, default=20.0, help="after which small launches end (%(default)s)")
    parser.add_argument("--calls", type=int, help="at most so many")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.bytes:
        print(json.dumps({"cases": run_cases(options.device, options.bytes, options.calls)}))
        return 0
    result = run_small(options.device, options.seconds, options.calls)
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
