"""More suites: how the cost changes with the dtype, the number of terms, the threads and the size of the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import timing
from .suites import BOTH, FORWARD, Case, Plan, row
from .timing import DTYPES, Row, Timed
from .workloads import EAGER, KL_EXT, PEERS

TINY = 1e-20  # its square is subnormal in float32


def _calls(peer: str = KL_EXT) -> dict[str, tuple[str, Timed]]:
    """Pass and function of what is scaled."""
    functions = PEERS[peer]

    def total(leaves: list[Tensor]) -> Tensor:
        return functions.gaussian_kl_div(*leaves, reduction="sum")

    return {
        "elementwise": (FORWARD, timing.forward_of(lambda t: functions.kl_div_single_loss(*t))),
        "sum": (FORWARD, timing.forward_of(total)),
        "sum and gradients": (BOTH, timing.gradients_of(total)),
    }


def _only(index: int, count: int, function: Timed) -> Timed:
    """A contender that has its own tensors among those of all contenders."""
    return lambda leaves: function(leaves[index * count : (index + 1) * count])


def dtypes(plan: Plan) -> Iterator[Case]:
    """The same numbers of terms in each dtype, in turn."""

    def measure(name: str, elements: int) -> list[Row]:
        direction, function = _calls()[name]
        sets = timing.sets_of(
            lambda: [timing.leaf([elements], plan.effort.device, dtype) for dtype in DTYPES.values() for _ in range(2)],
            elements,
        )
        contenders = {dtype: _only(index, 2, function) for index, dtype in enumerate(DTYPES)}
        measured = timing.time_in_turn(contenders, sets, plan.effort, "float32")
        return [row("dtypes", name, direction, elements, measured, threads=torch.get_num_threads())]

    for elements, name in itertools.product(plan.large, _calls()):
        yield Case(f"dtypes, {name}, {elements}", lambda name=name, elements=elements: measure(name, elements))


def subnormals(plan: Plan) -> Iterator[Case]:
    """Terms that are subnormal numbers against terms that are not."""

    def measure(peer: str, name: str, elements: int) -> list[Row]:
        direction, function = _calls(peer)[name]
        normal = [timing.leaf([elements], plan.effort.device) for _ in range(2)]
        tiny = [(leaf.detach() * TINY).requires_grad_() for leaf in normal]
        contenders = {"normal": _only(0, 2, function), "subnormal": _only(1, 2, function)}
        measured = timing.time_in_turn(contenders, [normal + tiny], plan.effort, "normal")
        return [row("subnormals", name, direction, elements, measured, threads=torch.get_num_threads(), peer=peer)]

    for peer, name in itertools.product((KL_EXT, EAGER), _calls()):
        elements = plan.large[0]
        yield Case(f"subnormals, {name}", lambda peer=peer, name=name, n=elements: measure(peer, name, n))


def linear(plan: Plan) -> Iterator[Case]:
    """The time of a sum and of its parts as the tensors grow; the exponent n^x that fits best, in a row of its own."""
    found: dict[str, list[Row]] = {name: [] for name in _calls()}
    effort = dataclasses.replace(plan.effort, fewest=3)  # the largest take seconds

    def measure(elements: int) -> list[Row]:
        leaves = [timing.leaf([elements], plan.effort.device) for _ in range(2)]
        floors: dict[str, Timed] = {
            "elementwise": lambda t: torch.add(t[0].detach(), t[1].detach()),
            "sum": lambda t: torch.dot(t[0].detach(), t[1].detach()),
            "sum and gradients": lambda t: (torch.mul(t[0].detach(), 0.5), torch.mul(t[1].detach(), 0.5)),
        }
        rows = []
        for name, (direction, function) in _calls().items():
            contenders = {KL_EXT: function, "torch": floors[name]}
            measured = timing.time_in_turn(contenders, [leaves], effort, "torch")
            rows.append(row("linear", name, direction, elements, measured, threads=torch.get_num_threads()))
            found[name].append(rows[-1])
        if elements == plan.linear[-1] and len(plan.linear) > 1:
            rows += [_exponent(name, rows_of) for name, rows_of in found.items()]
        return rows

    for elements in plan.linear:
        yield Case(f"linear, {elements}", lambda elements=elements: measure(elements))


def _exponent(name: str, rows: list[Row]) -> Row:
    """The slope of a line through the logarithms of sizes and medians, as a row."""
    first = rows[0]
    ratio = {}
    for contender in first["us"]:
        points = [(math.log(row["elements"]), math.log(row["us"][contender][1])) for row in rows]
        mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
        ratio[contender] = [round(slope, 4)] * 3
    keys = ("case", "pass", "threads", "rounds")
    return {
        "suite": "exponent",
        "elements": rows[-1]["elements"],
        **{key: first[key] for key in keys},
        "us": {},
        "ratio": ratio,
    }


def threads(plan: Plan) -> Iterator[Case]:
    """One thread and more in turn, two or the most of the plan: how many times as fast, against torch.add's own gain."""
    before, most = torch.get_num_threads(), max(2, *plan.threads)

    def measure(name: str, elements: int) -> list[Row]:
        direction, function = _calls()[name]
        functions: dict[str, Timed] = {KL_EXT: function, "torch.add": timing.forward_of(lambda t: torch.add(t[0], t[1]))}
        contenders = {f"{of}, {count}": call for of, call in functions.items() for count in (1, most)}
        prepare = {
            f"{of}, {count}": lambda count=count: torch.set_num_threads(count) for of in functions for count in (1, most)
        }
        sets = timing.sets_of(lambda: [timing.leaf([elements], plan.effort.device) for _ in range(2)], elements)
        try:
            measured = timing.time_in_turn(contenders, sets, plan.effort, "torch.add, 1", prepare)
        finally:
            torch.set_num_threads(before)
        gains = {of: [times[f"{of}, 1"] / times[f"{of}, {most}"] for times in measured["seconds"]] for of in functions}
        relative = [ours / theirs for ours, theirs in zip(gains[KL_EXT], gains["torch.add"], strict=True)]
        measured["ratio"] = {
            KL_EXT: timing.quartiles(relative),
            "kl_ext's gain": timing.quartiles(gains[KL_EXT]),
            "torch.add's gain": timing.quartiles(gains["torch.add"]),
        }
        return [row("threads", name, direction, elements, measured, threads=most)]

    for elements, name in itertools.product(plan.large, _calls()):
        yield Case(f"threads, {name}, {elements}", lambda name=name, elements=elements: measure(name, elements))
