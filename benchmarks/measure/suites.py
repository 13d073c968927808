"""What is measured: each suite as a list of cases, which are functions that return rows.

A row says what was timed (suite, case, pass, elements, threads) and holds what timing.time_in_turn found.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kl_ext
from instructions.forms import ELEMENTS, FAST, FORMS, form_tensors
from kl_ext import _library

from . import timing
from .timing import Effort, Row, Timed
from .workloads import DIFFUSERS, DISTRIBUTIONS, EAGER, KL_EXT, PEERS, WORKLOADS

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
CHUNK = "concatenation"  # beside the peers, for chunk views: what the backward of chunk would take
NATIVE = "torch.mul"  # beside the peers, for the elementwise loss: what any elementwise operator takes with its mean
UNMASKED = "without the mask"  # beside the peers, for masked sums
NOTHING_KEPT = "nothing kept"  # kl_ext where it keeps no memory for its next results
NO_DIVERGENCE = "no divergence"  # a step of training that lacks the loss which is measured
KI, MI = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a run measures, and how long it may take for a row."""

    effort: Effort
    threads: list[int] = field(default_factory=lambda: [1, 2])
    sizes: list[int] = field(default_factory=lambda: [4 * KI, 64 * KI, MI, 16 * MI])
    large: list[int] = field(default_factory=lambda: [MI, 16 * MI])  # where memory is what counts
    linear: list[int] = field(default_factory=lambda: [MI, 4 * MI, 16 * MI, 64 * MI, 256 * MI])
    batches: list[int] = field(default_factory=lambda: [128, 4096])  # of the VAE
    latents: list[int] = field(default_factory=lambda: [32, 512])
    accuracy_elements: int = 256 * KI


class Case(NamedTuple):
    """Some rows that share their tensors."""

    description: str
    measure: Callable[[], list[Row]]


def row(suite: str, case: str, direction: str, elements: int, measured: Row, **more: Any) -> Row:
    measured.pop("seconds", None)
    return {"suite": suite, "case": case, "pass": direction, "elements": elements, **more, **measured}


def ratios(plan: Plan) -> Iterator[Case]:
    """Every workload at every size, all peers side by side."""

    def measure(name: str, elements: int) -> list[Row]:
        workload = WORKLOADS[name]
        sets = timing.sets_of(lambda: workload.leaves(elements, plan.effort.device), elements)
        rows = []
        for direction, wrap in ((FORWARD, timing.forward_of), (BOTH, timing.gradients_of)):
            contenders = {peer: wrap(workload.run(peer)) for peer in PEERS}
            if workload.chunked and direction == BOTH:
                contenders[CHUNK] = concatenate
            if workload.is_masked:
                contenders[UNMASKED] = wrap(lambda leaves: workload.loss(kl_ext, [*leaves[:-1], None]))
            if name == "single, mean":
                contenders[NATIVE] = wrap(lambda leaves: torch.mul(*leaves).mean())
            measured = timing.time_in_turn(contenders, sets, plan.effort, KL_EXT, brief=(DISTRIBUTIONS, DIFFUSERS))
            rows.append(row("ratios", name, direction, elements, measured, threads=torch.get_num_threads()))
        return rows

    for elements, name in itertools.product(plan.sizes, WORKLOADS):
        yield Case(f"{name}, {elements}", lambda name=name, elements=elements: measure(name, elements))


def concatenate(leaves: list[Tensor]) -> Tensor:
    """What autograd does last for `chunk`, unless the gradients come joined: one tensor of two."""
    with torch.no_grad():
        return torch.cat(leaves[0].chunk(2, 1), 1)


def floor(plan: Plan) -> Iterator[Case]:
    """Large tensors against torch's own operators that move as many bytes."""
    backward = torch.ops.kl_ext.kl_div_single_loss_backward.default
    backward_of_sum = torch.ops.kl_ext.gaussian_kl_div_backward.default
    one = torch.ones((), device=plan.effort.device)
    # Of one element: tensors read and written, by both contenders, and operations of kl_ext, an fma counting two. With a
    # gradient for every term the backward reads three tensors and writes two, and so do a product of two tensors and one with a
    # number. With the gradient of a sum it reads two and writes two.
    cases: dict[str, tuple[str, int, int, str, Timed, Timed]] = {
        "elementwise": (
            FORWARD,
            3,
            34,
            "torch.add",
            lambda t: kl_ext.kl_div_single_loss(t[0], t[1]),
            lambda t: torch.add(t[0], t[1]),
        ),
        "sum": (
            FORWARD,
            2,
            35,
            "torch.dot",
            lambda t: kl_ext.gaussian_kl_div(t[0], t[1], reduction="sum"),
            lambda t: torch.dot(t[0], t[1]),
        ),
        "elementwise's gradients": (
            BACKWARD,
            5,
            31,
            "two torch.mul",
            lambda t: backward(t[2], t[0], t[1], -30.0, 20.0, [True, True]),
            lambda t: (torch.mul(t[2], t[0]), torch.mul(t[1], 0.5)),
        ),
        "sum's gradients": (
            BACKWARD,
            4,
            31,
            "two torch.mul",
            lambda t: backward_of_sum(one, t[0], t[1], None, None, -30.0, 20.0, "sum", None, [True, True, False, False]),
            lambda t: (torch.mul(t[0], 0.5), torch.mul(t[1], 0.5)),
        ),
    }

    def measure(name: str, elements: int) -> list[Row]:
        direction, moved, operations, other, ours, theirs = cases[name]
        sets = timing.sets_of(
            lambda: [timing.leaf([elements], plan.effort.device).detach() for _ in range(3)],
            elements,
        )
        contenders = {KL_EXT: timing.forward_of(ours), other: timing.forward_of(theirs)}
        prepare: dict[str, Callable[[], None]] = {}
        if name != "sum" and plan.effort.device == "cpu":
            contenders[NOTHING_KEPT] = contenders[KL_EXT]
            prepare = {KL_EXT: keep_memory, NOTHING_KEPT: keep_nothing}
        try:
            measured = timing.time_in_turn(contenders, sets, plan.effort, other, prepare)
        finally:
            keep_memory()
        work = {"bytes": 4 * moved * elements, "operations": operations * elements}
        return [row("floor", name, direction, elements, measured, threads=torch.get_num_threads(), **work)]

    for elements, name in itertools.product(plan.large, cases):
        yield Case(f"floor of {name}, {elements}", lambda name=name, elements=elements: measure(name, elements))


def set_kept(mib: int) -> int:
    """How much the library keeps, from the next large result on that is freed; returns what was set before."""
    function = ctypes.CDLL(str(_library.LIBRARY)).kl_ext_keep_memory
    function.argtypes, function.restype = [ctypes.c_uint64], ctypes.c_uint64
    return int(function(mib))


def keep_memory() -> None:
    """As it is where nobody has set it."""
    set_kept(512)


def keep_nothing() -> None:
    """Every large result gets fresh memory."""
    set_kept(0)


def peak(plan: Plan) -> Iterator[Case]:
    """The most operations a second that torch gets out of the machine: the roof of the roofline plot."""

    def measure() -> list[Row]:
        matrices = [timing.leaf([KI, KI], plan.effort.device).detach() for _ in range(2)]
        measured = timing.time_in_turn({"torch.mm": lambda t: torch.mm(*t)}, [matrices], plan.effort, "torch.mm")
        threads = torch.get_num_threads()
        return [row("peak", "torch.mm", FORWARD, KI * KI, measured, threads=threads, operations=2 * KI**3)]

    yield Case("matrix product", measure)


def overhead(plan: Plan) -> Iterator[Case]:
    """Four elements: what a call costs before it computes anything."""
    calls: dict[str, tuple[int, Timed]] = {
        "kl_div_single_loss": (2, lambda t: kl_ext.kl_div_single_loss(t[0], t[1])),
        "gaussian_kl_div": (2, lambda t: kl_ext.gaussian_kl_div(t[0], t[1])),
        "gaussian_kl_div, sum": (2, lambda t: kl_ext.gaussian_kl_div(t[0], t[1], reduction="sum")),
        "kl_div_pair_loss": (4, lambda t: kl_ext.kl_div_pair_loss(t[0], t[1], t[2], t[3])),
    }

    def add(tensors: list[Tensor]) -> Tensor:
        return torch.add(tensors[0], tensors[1])

    def gradients(function: Timed, count: int) -> Timed:
        weights: list[Tensor] = []

        def forward_and_backward(leaves: list[Tensor]) -> Any:
            result = function(leaves)
            if not weights:
                weights.append(torch.ones_like(result))
            return torch.autograd.grad(result, leaves[:count], weights[0])

        return forward_and_backward

    def measure(name: str) -> list[Row]:
        count, function = calls[name]
        leaves = [timing.leaf([4], plan.effort.device) for _ in range(count)]
        plain = [leaf.detach() for leaf in leaves]
        passes: dict[str, tuple[list[Tensor], str, Timed, Timed]] = {
            "no grad": (plain, "torch.add", function, add),
            FORWARD: (leaves, "torch.add", function, add),
            BOTH: (leaves, "torch.mul", gradients(function, count), gradients(lambda t: torch.mul(t[0], t[1]), 2)),
        }
        rows = []
        for direction, (tensors, other, ours, theirs) in passes.items():
            measured = timing.time_in_turn({KL_EXT: ours, other: theirs}, [tensors], plan.effort, other)
            rows.append(row("overhead", name, direction, 4, measured, threads=torch.get_num_threads()))
        return rows

    for name in calls:
        yield Case(f"overhead of {name}", lambda name=name: measure(name))


def forms(plan: Plan) -> Iterator[Case]:
    """Calls as people write them, against a form that is fast."""

    def measure(name: str) -> list[Row]:
        form = FORMS[name]
        contenders = {KL_EXT: timing.forward_of(form.written), FAST: timing.forward_of(form.fast)}
        prepare: dict[str, Callable[[], None]] = {}
        if form.default_device:
            prepare = {
                KL_EXT: lambda: torch.set_default_device(plan.effort.device),
                FAST: lambda: torch.set_default_device(None),
            }
        try:
            measured = timing.time_in_turn(contenders, [form_tensors(plan.effort.device)], plan.effort, FAST, prepare)
        finally:
            torch.set_default_device(None)
        return [row("forms", name, FORWARD, ELEMENTS, measured, threads=torch.get_num_threads())]

    for name in FORMS:
        yield Case(f"form: {name}", lambda name=name: measure(name))


def compiled_step(plan: Plan) -> Iterator[Case]:
    """A training step of a small VAE, compiled whole: with kl_ext inside, with the plain formula, and without a divergence."""
    pixels, hidden = 784, 256

    def step(peer: str, dynamic: bool, parameters: list[Tensor]) -> Timed:
        function = PEERS[peer].gaussian_kl_div if peer in PEERS else lambda mu, log_var, reduction: 0.0

        def loss(images: Tensor, encode: Tensor, to_latent: Tensor, from_latent: Tensor, decode: Tensor) -> Tensor:
            mu, log_var = (torch.relu(images @ encode) @ to_latent).chunk(2, 1)
            latent = mu + torch.randn_like(mu) * (0.5 * log_var).exp()
            output = torch.relu(latent @ from_latent) @ decode
            return (output - images).square().sum() / images.shape[0] + function(mu, log_var, reduction="batchmean")

        compiled = torch.compile(loss, dynamic=dynamic)
        return lambda images: torch.autograd.grad(compiled(images[0], *parameters), parameters)

    def measure(latent: int, dynamic: bool) -> list[Row]:
        shapes = [(pixels, hidden), (hidden, 2 * latent), (latent, hidden), (hidden, pixels)]
        parameters = [(timing.leaf(shape, plan.effort.device) / math.sqrt(shape[0])).detach() for shape in shapes]
        parameters = [parameter.requires_grad_() for parameter in parameters]
        contenders = {peer: step(peer, dynamic, parameters) for peer in (KL_EXT, EAGER, NO_DIVERGENCE)}
        rows = []
        for batch in plan.batches:
            images = torch.rand(batch, pixels, device=plan.effort.device)
            measured = timing.time_in_turn(contenders, [[images]], plan.effort, KL_EXT)
            case = f"batch {batch}, latent {latent}"
            rows.append(
                row(
                    "compiled step",
                    case,
                    BOTH,
                    batch * latent,
                    measured,
                    threads=torch.get_num_threads(),
                    shapes="dynamic" if dynamic else "static",
                )
            )
        return rows

    for latent, dynamic in itertools.product(plan.latents, (False, True)):
        kind = "dynamic" if dynamic else "static"
        yield Case(f"compiled step, latent {latent}, {kind}", lambda latent=latent, dynamic=dynamic: measure(latent, dynamic))
