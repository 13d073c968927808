"""The emulated CUDA kernels give the CPU's bits on the set of the one hash (tests/support/hashed.py): it is theirs too."""

from __future__ import annotations

import pytest

import hashed
from emulated_checks import check_backward, check_forward, check_gradients, check_sum
from emulated_kernels import Emulated, library
from hashed import FLAT, LONG_COLUMNS, LONG_ROWS, PRIOR, Call

CALLS = list(hashed.calls())


def check(emulated: Emulated, call: Call) -> None:
    """What hashed.results computes. A weighted mean is a quotient of two sums, and a sum of weights has its own test."""
    special, of = call.inputs(FLAT, with_special=True), call.operator
    check_forward(emulated, of, special, call.dtype, call.clamp, weight=call.weight(FLAT))
    check_backward(emulated, of, call.grad_output(FLAT), special, call.clamp, weight=call.weight(FLAT))
    if of.reduces:
        means = ("mean",) if call.weight_kind == "unweighted" else ()
        for shape, dims in ((FLAT, [0]), (LONG_COLUMNS, [0]), (LONG_ROWS, [1])):
            for reduction in ("sum", *means):
                check_sum(emulated, call.inputs(shape), dims, reduction, call.clamp, of, call.weight(shape))
    if call.count == 4:
        prior = call.inputs(PRIOR)
        check_forward(emulated, of, prior, call.dtype, call.clamp, weight=call.weight(PRIOR))
        check_gradients(emulated, of, call.grad_output(PRIOR), prior, call.clamp, weight=call.weight(PRIOR))


def test_some_of_the_set_gives_the_bits_of_the_cpu() -> None:
    """The whole set is slow."""
    library().set_order("forward")
    for call in CALLS:
        if str(call) in ("gaussian_kl_div 4 bfloat16 narrow weighted", "kl_div_single_loss 2 float32 wide unweighted"):
            check(library(), call)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_whole_set_gives_the_bits_of_the_cpu(emulated: Emulated, call: Call) -> None:
    check(emulated, call)
