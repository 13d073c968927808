"""What every test shares: the device it runs on, and a fresh seed that a failure prints."""

import random
import zlib

import numpy
import pytest
import torch

from this_run import SEED, why_no_cuda


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (exhaustive, or many gigabytes)")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
        if item.get_closest_marker("cuda") and (reason := why_no_cuda()):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header():
    return f"seed: KL_EXT_TEST_SEED={SEED}"


def seed_of(item: pytest.Item) -> int:
    return zlib.crc32(f"{SEED} {item.nodeid.rpartition('/')[2]}".encode())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    seed = seed_of(item)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    report = (yield).get_result()
    if report.failed:
        report.sections.append(("seed", f"repeat these random inputs with KL_EXT_TEST_SEED={SEED}"))


@pytest.fixture
def rng(request) -> numpy.random.Generator:
    """A generator of this test's own random inputs."""
    return numpy.random.default_rng(seed_of(request.node))


@pytest.fixture(params=["cpu", "cuda"], scope="session")
def device(request) -> torch.device:
    if request.param == "cuda" and (reason := why_no_cuda()):
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture(params=["forward", "reverse", "random"])
def emulated(request):
    """The emulated CUDA kernels, with threads and blocks that take turns in this order; sums as for few threads, as for many,
    or as either, in blocks that prepare q or do not."""
    from emulated_kernels import library

    seed = seed_of(request.node)
    library().set_order(request.param, seed)
    library().set_few_threads({"forward": 2**17, "reverse": 0}.get(request.param, seed % 2 * 2**17))
    library().set_prepares_q(seed % 3 > 0)
    return library()
