"""`python -m kl_ext`: what was built, what is running, and a self-check; what it can where the library does not load."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

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
        _print_line("self-check", f"{device}: {f'failed: {problem}' if problem else 'ok'}")
        passed &= problem is None
    return passed


def _print_line(title: str, text: str) -> None:
    print(f"{title:<12}{text}")


def _print_build(built: ModuleType | None) -> None:
    if built is None:
        _print_line("kl_ext", f"no compiled part in {_library.PACKAGE}")
        return
    nvcc = f" and nvcc {built.cuda_compiler_version}" if built.cuda_compiler_version else ""
    _print_line("kl_ext", f"{built.version} in {_library.PACKAGE}")
    _print_line("built", f"against {_library.described(built.torch_version, built.torch_cuda_version)}")
    _print_line("", f"with {built.compiler}{nvcc}, {built.build_type} ({built.cxx_flags.strip()})")
    _print_line("", f"for the CPU capabilities {' '.join(built.cpu_capabilities)}")
    _print_line("", f"for the CUDA architectures {' '.join(built.cuda_architectures) or 'none: without CUDA kernels'}")
    _print_line("C++", f"CMAKE_PREFIX_PATH={_library.PACKAGE}")


def _print_running(built: ModuleType | None) -> list[str]:
    """Returns the devices to check."""
    _print_line("Python", f"{platform.python_version()} ({sys.executable})")
    try:
        import torch
    except Exception as error:
        _print_line("torch", f"cannot be imported: {error}")
        return []
    _print_line("torch", f"{_library.described(torch.__version__, torch.version.cuda)} in {torch.__path__[0]}")
    capability = torch.backends.cpu.get_cpu_capability()
    used = [name for name in built.cpu_capabilities if capability.startswith(name)] if built else []
    _print_line("CPU", f"{capability}; kl_ext uses {(used or ['DEFAULT'])[0]}, {torch.get_num_threads()} threads")
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.version.cuda else []
    for gpu in gpus:
        properties = torch.cuda.get_device_properties(gpu)
        _print_line(str(gpu), f"{properties.name}, compute capability {properties.major}.{properties.minor}")
    if not gpus:
        _print_line("GPU", "none")
    return ["cpu", *map(str, gpus)] if built and built.cuda_architectures else ["cpu"]


def main(problem: ImportError | None = None) -> int:
    """Prints the report, with the problem where there is one; returns the exit status."""
    try:
        built = _library.build_facts()
    except ImportError:
        built = None
    _print_build(built)
    devices = _print_running(built)
    if problem is not None:
        print(f"\nThe library cannot be loaded.\n{problem}")
        return 1
    return 0 if _self_check(devices) else 1


if __name__ == "__main__":
    sys.exit(main())
