"""The goals, and whether a result meets them: the only place where a bound stands."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .suites import BOTH, FORWARD, KI, MI, UNMASKED
from .timing import Row
from .workloads import COMPILED, EAGER, KL_EXT, WORKLOADS

CHUNKED = [name for name, workload in WORKLOADS.items() if workload.chunked]
AT_LEAST, AT_MOST = "≥", "≤"


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio of one contender in some rows: in each of them, or in their geometric mean."""

    name: str
    sense: str
    bound: float
    suite: str
    contender: str
    rows: Callable[[Row], bool] = lambda row: True
    mean: bool = False

    def judge(self, rows: list[Row]) -> dict[str, Any] | None:
        """What was measured beside the bound; None where nothing was."""
        chosen = [row for row in rows if row["suite"] == self.suite and self.rows(row) and self.contender in row["ratio"]]
        if not chosen:
            return None
        sign = 1 if self.sense == AT_LEAST else -1
        medians = [row["ratio"][self.contender][1] for row in chosen]
        worst = min(chosen, key=lambda row: sign * row["ratio"][self.contender][1])
        low, middle, high = worst["ratio"][self.contender]
        measured = statistics.geometric_mean(medians) if self.mean else middle
        missed = [median for median in medians if not self._holds(median)]
        return {
            "name": self.name,
            "sense": self.sense,
            "bound": self.bound,
            "measured": float(f"{measured:.4g}"),
            "met": self._holds(measured),
            "rows": len(chosen),
            "missed": 0 if self.mean else len(missed),
            "worst": "" if self.mean else describe(worst),
            # Its quartiles lie on both sides of the bound: the same measurement may turn out the other way.
            "close": not self.mean and low < self.bound < high,
        }

    def _holds(self, value: float) -> bool:
        """Ratios are compared as they are shown, with two decimals."""
        value = round(value, 2)
        return value >= self.bound if self.sense == AT_LEAST else value <= self.bound


def describe(row: Row) -> str:
    """A row in words."""
    size = row["elements"]
    elements = f"{size // MI} Mi" if size >= MI else f"{size // KI} Ki" if size >= KI else str(size)
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    parts = [row["case"], row["pass"], "" if row["suite"] == "compiled step" else elements, row.get("shapes", ""), threads]
    return ", ".join(part for part in parts if part)


def _joined(row: Row) -> bool:
    """The rows with gradients of large halves, which autograd would concatenate."""
    return row["case"] in CHUNKED and row["pass"] == BOTH and row["elements"] >= MI


GOALS = [
    Goal(
        "plain torch, 4 Ki, forward + backward",
        AT_LEAST,
        2.0,
        "ratios",
        EAGER,
        lambda row: row["pass"] == BOTH and row["elements"] < 64 * KI,
    ),
    Goal(
        "plain torch, from 64 Ki on, forward + backward",
        AT_LEAST,
        5.0,
        "ratios",
        EAGER,
        lambda row: row["pass"] == BOTH and row["elements"] >= 64 * KI and not _joined(row),
    ),
    Goal("torch.compile, in every case", AT_LEAST, 1.2, "ratios", COMPILED, lambda row: not _joined(row)),
    Goal("torch.compile, geometric mean of all cases", AT_LEAST, 2.5, "ratios", COMPILED, mean=True),
    Goal("plain torch, chunk from 1 Mi on, forward + backward", AT_LEAST, 2.5, "ratios", EAGER, _joined),
    Goal("torch.compile, chunk from 1 Mi on, forward + backward", AT_LEAST, 1.0, "ratios", COMPILED, _joined),
    Goal(
        "a sum without its mask / with it, forward, from 64 Ki on",
        AT_LEAST,
        0.8,
        "ratios",
        UNMASKED,
        lambda row: row["pass"] == FORWARD and row["elements"] >= 64 * KI,
    ),
    Goal("memory: elementwise / torch.add", AT_MOST, 1.15, "floor", KL_EXT, lambda row: row["case"] == "elementwise"),
    Goal("memory: sum / torch.dot", AT_MOST, 1.3, "floor", KL_EXT, lambda row: row["case"] == "sum"),
    Goal("memory: gradients / two torch.mul", AT_MOST, 1.15, "floor", KL_EXT, lambda row: row["case"].endswith("gradients")),
    Goal("a call without gradients / torch.add", AT_MOST, 1.3, "overhead", KL_EXT, lambda row: row["pass"] == "no grad"),
    Goal("a call that records / torch.add", AT_MOST, 1.3, "overhead", KL_EXT, lambda row: row["pass"] == FORWARD),
    Goal("a call and its backward / torch.mul", AT_MOST, 1.3, "overhead", KL_EXT, lambda row: row["pass"] == BOTH),
    Goal("a call as people write it / a fast form", AT_MOST, 1.5, "forms", KL_EXT),
    Goal(
        "plain formula in a compiled step, static", AT_LEAST, 1.0, "compiled step", EAGER, lambda row: row["shapes"] == "static"
    ),
    Goal(
        "plain formula in a compiled step, dynamic",
        AT_LEAST,
        1.0,
        "compiled step",
        EAGER,
        lambda row: row["shapes"] == "dynamic",
    ),
    Goal("bfloat16 / float32", AT_MOST, 1.0, "dtypes", "bfloat16"),
    Goal("float64 / float32", AT_MOST, 2.2, "dtypes", "float64"),
    Goal("linear: the exponent of n", AT_MOST, 1.05, "exponent", KL_EXT),
    Goal("gain of more threads / torch.add's", AT_LEAST, 0.95, "threads", KL_EXT),
]


def judge(rows: list[Row]) -> list[dict[str, Any]]:
    """All goals that the rows say something about."""
    return [verdict for goal in GOALS if (verdict := goal.judge(rows)) is not None]
