"""`python -m kl_ext`: what was built, what is running, and a self-check; what it can where the library does not load."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

from . import _library

Formula = Callable[..., tuple[float, ...]]


def _single(mu: float, log_var: float) -> tuple[float, ...]:
    """The loss and its gradients."""
    return 0.5 * (mu * mu + math.exp(log_var) - log_var - 1), mu, 0.5 * (math.exp(log_var) - 1)


def _pair(mu_p: float, log_var_p: float, mu_q: float, log_var_q: float) -> tuple[float, ...]:
    """The loss and its gradients."""
    difference, ratio = mu_p - mu_q, math.exp(log_var_p - log_var_q)
    shift = difference / math.exp(log_var_q)
    loss = log_var_q - log_var_p + ratio + difference * shift - 0.5
    return loss, 2 * shift, ratio - 1, -2 * shift, 1 - ratio - difference * shift


# Values that float32 holds exactly; more of them than a vector register has lanes.
_POINTS = [(0.25 * i - 2, 0.375 * (i % 9) - 1.5, 0.125 * (i % 5) - 0.25, 1.75 - 0.25 * (i % 13)) for i in range(37)]
_LOSSES: dict[str, tuple[int, Formula]] = {"kl_div_single_loss": (2, _single), "kl_div_pair_loss": (4, _pair)}


def _errors(device: str) -> Iterator[str]:
    """Each way in which the losses and gradients on the device differ from the closed forms."""
    import torch

    for name, (arity, formula) in _LOSSES.items():
        operator = getattr(torch.ops.kl_ext, name)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
            columns = list(zip(*(point[:arity] for point in _POINTS)))
            inputs = [torch.tensor(column, dtype=dtype, device=device, requires_grad=True) for column in columns]
            loss = operator(*inputs)
            gradients = torch.autograd.grad(loss.sum(), inputs)
            for got, want in zip((loss, *gradients), zip(*(formula(*point[:arity]) for point in _POINTS))):
                for i, (a, b) in enumerate(zip(got.tolist(), want)):
                    if not math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance):
                        yield f"{name} {dtype} at {_POINTS[i][:arity]}: got {a}, expected {b}"


def _self_check(devices: Sequence[str]) -> bool:
    passed = True
    for device in devices:
        try:
            problem = next(_errors(device), None)
        except Exception as error:  # whatever is wrong, say so and go on
            problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"self-check  {device}: {f'failed: {problem}' if problem else 'ok'}")
        passed &= problem is None
    return passed


def _print_build() -> None:
    try:
        built = _library.build_facts()
    except ImportError:
        print(f"library     none in {_library.PACKAGE}")
        return
    cuda = f" and nvcc {built.cuda_compiler_version}" if built.cuda_compiler_version else ""
    print(f"kl_ext      {built.version} in {_library.PACKAGE}")
    print(f"built       against {_library.described(built.torch_version, built.torch_cuda_version)}")
    print(f"            with {built.compiler}{cuda}, {built.build_type}")
    print(f"CPU         kernels for {' '.join(built.cpu_capabilities)}")
    print(f"CUDA        kernels for {' '.join(built.cuda_architectures) or 'none: built without'}")
    print(f"C++         CMAKE_PREFIX_PATH={_library.PACKAGE}")


def _print_torch() -> list[str]:
    """Returns the devices to check."""
    try:
        import torch
    except Exception as error:
        print(f"torch       cannot be imported: {error}")
        return []
    print(f"torch       {_library.described(torch.__version__, torch.version.cuda)}, {torch.get_num_threads()} CPU threads")
    print(f"running     on CPU capability {torch.backends.cpu.get_cpu_capability()}")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        print(f"{device:<12}{properties.name}, compute capability {properties.major}.{properties.minor}")
    if not devices:
        print("GPU         none")
    return ["cpu", *devices]


def main(problem: ImportError | None = None) -> int:
    """Prints the report; returns the exit status."""
    _print_build()
    print(f"Python      {platform.python_version()} ({sys.executable})")
    devices = _print_torch()
    if problem is not None:
        print(f"\nThe library cannot be loaded.\n{problem}")
        return 1
    if not _library.build_facts().cuda_architectures:
        devices = devices[:1]
    return 0 if _self_check(devices) else 1


if __name__ == "__main__":
    sys.exit(main())
