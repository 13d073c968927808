"""The tables of a result of bench.py: each a function of the result that returns markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from .cells import elements, share, table, ulps

Result = dict[str, Any]
Row = dict[str, Any]
KL_EXT, EAGER, COMPILED = "kl_ext", "plain torch", "torch.compile"
CHUNK, NATIVE, UNMASKED = "concatenation", "torch.mul", "without the mask"
BOTH = "forward + backward"


def rows_of(result: Result, suite: str) -> list[Row]:
    return [row for row in result["rows"] if row["suite"] == suite]


def goals(result: Result) -> str:
    """A row for each goal; what was measured is the worst of its rows, or their geometric mean."""
    rows = []
    for goal in result["goals"]:
        met = "yes" if goal["met"] else f"**no**, in {goal['missed']} of {goal['rows']}" if goal["missed"] else "**no**"
        close = " (within the spread)" if goal["close"] else ""
        rows.append([goal["name"], f"{goal['sense']} {goal['bound']:g}", f"{goal['measured']:.2f}", met + close, goal["worst"]])
    return table(["goal", "bound", "measured", "met", "worst case"], rows)


def ratios(result: Result) -> str:
    """Forward + backward: plain torch / torch.compile, as multiples of kl_ext's time."""
    return _ratios(result, BOTH)


def forward_ratios(result: Result) -> str:
    """The same of the forward pass alone."""
    return _ratios(result, "forward")


def _ratios(result: Result, direction: str) -> str:
    cells = {
        (row["case"], row["threads"], row["elements"]): " / ".join(f"{row['ratio'][name][1]:.1f}" for name in (EAGER, COMPILED))
        for row in rows_of(result, "ratios")
        if row["pass"] == direction
    }
    sizes = list(dict.fromkeys(size for _, _, size in cells))
    heads = list(dict.fromkeys((case, threads) for case, threads, _ in sorted(cells, key=lambda key: key[1])))
    rows = [[case, str(threads), *(cells[case, threads, size] for size in sizes)] for case, threads in heads]
    return table(["workload", "threads", *map(elements, sizes)], rows)


def peers(result: Result) -> str:
    """A row for each workload and pass, a column for each peer: geometric means over sizes and threads."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows_of(result, "ratios"):
        for name, (_, middle, _) in row["ratio"].items():
            if name not in (CHUNK, NATIVE, UNMASKED):
                found.setdefault((row["case"], row["pass"]), {}).setdefault(name, []).append(middle)
    names = list(dict.fromkeys(name for by_peer in found.values() for name in by_peer))
    rows = [
        [*case, *(f"{statistics.geometric_mean(by_peer[name]):.1f}" if name in by_peer else "–" for name in names)]
        for case, by_peer in found.items()
    ]
    return table(["workload", "pass", *names], rows)


def compiled_by_size(result: Result) -> str:
    """Geometric means of torch.compile's ratios, and how near a fused sum is to what torch's matrix product does a second."""
    rates = {row["threads"]: row["operations"] / row["us"]["torch.mm"][1] for row in rows_of(result, "peak")}
    per_term = next(row["operations"] / row["elements"] for row in rows_of(result, "floor") if row["case"] == "sum")
    ratios: dict[tuple[int, int], dict[str, list[float]]] = {}
    reached: dict[tuple[int, int], float] = {}
    for row in rows_of(result, "ratios"):
        size = row["elements"], row["threads"]
        ratios.setdefault(size, {}).setdefault(row["pass"], []).append(row["ratio"][COMPILED][1])
        if (row["case"], row["pass"]) == ("batchmean", "forward"):
            reached[size] = per_term * row["elements"] / row["us"][KL_EXT][1] / rates[row["threads"]]
    rows = [
        [
            elements(size[0]),
            str(size[1]),
            *(f"{statistics.geometric_mean(by_pass[name]):.2f}" for name in ("forward", BOTH)),
            share(reached[size]),
        ]
        for size, by_pass in sorted(ratios.items())
    ]
    return table(["terms", "threads", "forward", BOTH, "operations a second of batchmean's forward / torch.mm's"], rows)


def chunk_share(result: Result) -> str:
    """The time that autograd's concatenation would take, as a share of kl_ext's forward and backward, which do without."""
    rows = [
        [row["case"], elements(row["elements"]), str(row["threads"]), f"{row['us'][CHUNK][1] / row['us'][KL_EXT][1]:.0%}"]
        for row in rows_of(result, "ratios")
        if CHUNK in row["us"]
    ]
    return table(["workload", "terms", "threads", "concatenation / kl_ext"], rows)


def masked(result: Result) -> str:
    """The time of a masked sum, as a multiple of the time without the mask."""
    rows = [
        [row["pass"], elements(row["elements"]), str(row["threads"]), f"{row['us'][KL_EXT][1] / row['us'][UNMASKED][1]:.2f}"]
        for row in rows_of(result, "ratios")
        if UNMASKED in row["us"]
    ]
    return table(["pass", "terms", "threads", "with a mask / without"], rows)


def native(result: Result) -> str:
    """What torch's own product and its mean take in the place of the elementwise loss, and what the peers take beside it."""
    rows = []
    for row in rows_of(result, "ratios"):
        if NATIVE in row["us"]:
            product = row["us"][NATIVE][1]
            quotients = [f"{row['us'][name][1] / product:.2f}" for name in (KL_EXT, EAGER, COMPILED)]
            rows.append([row["pass"], elements(row["elements"]), str(row["threads"]), f"{product:,.1f}", *quotients])
    return table(
        ["pass", "terms", "threads", "torch.mul, µs", *(f"{name} / torch.mul" for name in (KL_EXT, EAGER, COMPILED))], rows
    )


def accuracy(result: Result) -> str:
    """A row for each divergence and distance from the prior: worst error in ulp, and the share of values below zero."""
    return _accuracy(result, lambda peer: f"{ulps(peer['worst_ulp'])}, {share(peer['negative'])}", pair=False)


def gradient_accuracy(result: Result) -> str:
    """The pair loss too: the worst error of the gradient of log_var, in ulp."""
    return _accuracy(result, lambda peer: ulps(peer["gradient_ulp"]))


def lost(result: Result) -> str:
    """The pair loss too: the share of values that are their least one and should not be, and the mean over the true mean."""
    return _accuracy(result, lambda peer: f"{share(peer['lost'])}, {peer['mean_ratio']:.3f}")


def _accuracy(result: Result, cell: Callable[[dict[str, float]], str], pair: bool = True) -> str:
    found = [row for row in rows_of(result, "accuracy") if pair or row["case"] != "pair"]
    names = list(found[0]["peers"]) if found else []
    rows = [[row["case"], f"{row['distance']:g}", *(cell(row["peers"][name]) for name in names)] for row in found]
    return table(["loss", "distance", *names], rows)


def suite_table(suite: str) -> Callable[[Result], str]:
    """A row for each measurement of a suite: medians in microseconds, and the ratios with their quartiles."""

    def made(result: Result) -> str:
        found = rows_of(result, suite)
        times = list(dict.fromkeys(name for row in found for name in row["us"]))
        compared = list(dict.fromkeys(name for row in found for name in row["ratio"] if suite != "ratios"))
        more = [key for key in ("peer", "shapes") if any(key in row for row in found)]
        rows = []
        for row in found:
            facts = [row["case"], row["pass"], *(row[key] for key in more), elements(row["elements"]), str(row["threads"])]
            medians = [f"{row['us'][name][1]:,.1f}" if name in row["us"] else "" for name in times]
            quotients = [
                "{1:.2f} ({0:.2f} … {2:.2f})".format(*row["ratio"][name]) if name in row["ratio"] else "" for name in compared
            ]
            rows.append([*facts, *medians, *quotients])
        heads = [
            "case",
            "pass",
            *more,
            "terms",
            "threads",
            *(f"{name}, µs" for name in times),
            *(f"ratio of {name}" for name in compared),
        ]
        return table(heads, rows)

    return made


def machine(result: Result) -> str:
    """One line on where the result comes from."""
    facts = result["machine"]
    where = facts["device"] if facts["device"] != facts["cpu"] else f"{facts['cpu']}, {facts['cores']} cores"
    commit = (facts["commit"] or "no commit")[:10] + ("-dirty" if (facts["commit"] or "").endswith("-dirty") else "")
    return (
        f"{where}, {facts['cpu_capability']}, huge pages {facts['huge_pages']}, load before {facts['load']:.1f}; "
        f"Python {facts['python']}, torch {facts['torch']}, kl_ext {commit}, {facts['date']}; {result['seconds']} s.\n"
    )


def values() -> str:
    """What the losses are at a few pairs of distributions, beside the textbook divergence of torch.distributions."""
    import torch
    from torch.distributions import Normal, kl_divergence

    import kl_ext

    rows = []
    for mu_p, var_p, mu_q, var_q in ((0, 1, 0, 1), (1, 1, 0, 1), (0, 4, 0, 1), (3, 2, 3, 2), (1, 2, 3, 2)):
        p = torch.tensor([mu_p, var_p], dtype=torch.float64)
        q = torch.tensor([mu_q, var_q], dtype=torch.float64)
        pair = kl_ext.kl_div_pair_loss(p[0], p[1].log(), q[0], q[1].log())
        single = kl_ext.kl_div_single_loss(p[0], p[1].log())
        textbook = kl_divergence(Normal(p[0], p[1].sqrt()), Normal(q[0], q[1].sqrt()))
        standard = (mu_q, var_q) == (0, 1)
        numbers = [f"{textbook:.4f}", f"{pair:.4f}", f"{single:.4f}" if standard else ""]
        rows.append([f"N({mu_p}, {var_p})", f"N({mu_q}, {var_q})", *numbers])
    return table(["p", "q", "KL(p, q)", "pair loss", "single loss of p"], rows)


SUITES = ["ratios", "floor", "overhead", "forms", "compiled step", "dtypes", "threads", "linear", "exponent", "subnormals"]
KINDS: dict[str, Callable[[Result], str]] = {
    "machine": machine,
    "goals": goals,
    "ratios": ratios,
    "forward_ratios": forward_ratios,
    "peers": peers,
    "compiled_by_size": compiled_by_size,
    "chunk_share": chunk_share,
    "masked": masked,
    "native": native,
    "accuracy": accuracy,
    "gradient_accuracy": gradient_accuracy,
    "lost": lost,
    **{("times" if suite == "ratios" else suite.replace(" ", "_")): suite_table(suite) for suite in SUITES},
}
# What bench.py shows.
PRINTED = {
    "Time of plain torch / torch.compile in times of kl_ext (above 1: kl_ext is faster), forward:": forward_ratios,
    "The same, forward + backward:": ratios,
    "Time of each peer in times of kl_ext, geometric means:": peers,
    "What the backward of chunk would add to it:": chunk_share,
    "The elementwise loss beside torch's own product:": native,
    "Worst error in ulp and share of negative values:": accuracy,
    **{f"{suite.capitalize()}:": suite_table(suite) for suite in SUITES[1:]},
    "Goals:": goals,
}
