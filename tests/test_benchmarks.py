"""The benchmarks measure what they say, and benchmarks/table.py shows what was measured."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CONTENDERS = ["kl_ext", "plain torch", "torch.compile"]
SIZES = [64, 1 << 12]
SOME_REDUCTIONS = ["none", "batchmean", "sum over 0"]

pytest.importorskip("tqdm")


def bench(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    """Run a benchmark with torch.compile standing aside: what it compiles to is not what is tested here."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", params=["contiguous", "chunk"])
def result(request, tmp_path_factory):
    """The JSON file of a quick run, and what it printed."""
    path = tmp_path_factory.mktemp("bench") / "new" / "result.json"
    options = ["--quick", "--rounds", 2, "--threads", 1, "--layout", request.param, "--out", path]
    completed = bench("losses", *options, "--sizes", *SIZES)
    assert completed.returncode == 0, completed.stderr
    return json.loads(path.read_text()), completed.stdout


def test_every_loss_direction_and_size_is_measured(result):
    measured, _ = result
    assert [(row["loss"], row["pass"], row["elements"]) for row in measured["speed"]] == [
        (loss, direction, size)
        for loss in ("kl_div_single_loss", "kl_div_pair_loss")
        for direction in ("forward", "forward + backward")
        for size in SIZES
    ]
    for row in measured["speed"]:
        for name in CONTENDERS:
            low, high = row[name]["quartiles_us"]
            assert 0 < low <= row[name]["median_us"] <= high
            assert row[name]["ratio"] > 0
        assert row["kl_ext"]["ratio"] == 1
        chunk = measured["options"]["layout"] == "chunk" and row["pass"] == "forward + backward"
        assert ("gradients concatenated" in row) == chunk


def test_no_value_of_kl_ext_is_below_the_least(result):
    measured, _ = result
    assert len(measured["accuracy"]) == 8
    for row in measured["accuracy"]:
        assert row["kl_ext"]["below"] == 0
        assert row["kl_ext"]["gradient_error"] < 2**-22  # 2 units in the last place; the bound is 3 and this is the median
        if row["loss"] == "kl_div_single_loss":
            assert row["kl_ext"]["lost"] == 0


@pytest.fixture(scope="module")
def reduction(tmp_path_factory):
    """The same of the other benchmark; one of its sizes makes only one row of 64."""
    path = tmp_path_factory.mktemp("reduction") / "result.json"
    cases = ["--widths", 2, 64, "--sizes", 64, 128, "--reductions", *SOME_REDUCTIONS, "--compiled", "some"]
    completed = bench("reduction", "--quick", "--rounds", 2, "--threads", 1, *cases, "--out", path)
    assert completed.returncode == 0, completed.stderr
    return json.loads(path.read_text()), completed.stdout


def test_every_case_of_the_reductions_is_measured(reduction):
    measured, _ = reduction
    keys = ("reduction", "width", "layout", "prior", "elements")
    assert [tuple(row[key] for key in keys) for row in measured["speed"]] == [
        (name, width, layout, prior, size)
        for name in SOME_REDUCTIONS
        for width in (2, 64)
        for layout in ("contiguous", "chunk")
        for prior in ("standard", "learned")
        for size in (64, 128)
        if size >= 2 * width
    ]
    for row in measured["speed"]:
        assert ("torch.compile" in row) == (row["width"] == 64)
        assert ("gradients concatenated" in row) == (row["layout"] == "chunk")
        for name in CONTENDERS:
            assert name not in row or (row[name]["median_us"] > 0 and row[name]["ratio"] > 0)
        assert row["kl_ext"]["ratio"] == 1


def test_the_tables_of_reductions_are_printed(reduction, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import table

    measured, printed = reduction
    for kind in table.REDUCTION_KINDS.values():
        assert kind(measured) in printed
    for row in measured["speed"]:
        row["plain torch"]["ratio"] = 2.0
    measured["speed"][3]["plain torch"]["ratio"] = 0.5
    assert "| batchmean  | learned  |   2.0 | 2.0 / " in table.reduction_ratios(measured)
    assert "slower than plain torch in 1 of 36 rows (least ratio 0.50: none, D = 2, contiguous, learned, 128) and than" in (
        table.reduction_losses(measured)
    )


@pytest.mark.parametrize("prior", ["standard", "learned"])
@pytest.mark.parametrize("layout", ["contiguous", "chunk"])
def test_the_contenders_of_a_reduction_compute_the_same_gradients(layout, prior, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_reduction

    leaves = bench_reduction.fresh(4, layout, prior, 32, argparse.Namespace(device="cpu", dtype="float64"))
    assert sum(leaf.numel() for leaf in leaves) == 64 + (8 if prior == "learned" else 0)
    for how in bench_reduction.REDUCTIONS.values():
        gradients = [bench_reduction.contender(name, how, layout)(leaves) for name in ("kl_ext", "plain torch")]
        assert all(gradient.any() for gradient in gradients[0])
        torch.testing.assert_close(*gradients)


def test_a_result_says_where_it_comes_from(result, reduction):
    for measured, _ in (result, reduction):
        machine = measured["machine"]
        assert machine["threads"] == 1
        for fact in ("date", "device", "cpu", "cores", "cpu_capability", "python", "torch", "kl_ext"):
            assert machine[fact], fact
        assert "commit" in machine


def test_the_printed_tables_are_those_of_the_pages(result, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import table

    measured, printed = result
    for kind in table.LOSS_KINDS.values():
        assert kind(measured) in printed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("losses", ["--sizes", "0"], "argument --sizes: expected a positive integer, got '0'"),
        ("losses", ["--threads", "two"], "argument --threads: expected a positive integer, got 'two'"),
        ("losses", ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ("losses", ["--device", "cuda"], "--device cuda: this torch sees no CUDA device; use --device cpu"),
        ("reduction", ["--device", "cuda"], "--device cuda: this torch sees no CUDA device; use --device cpu"),
        ("reduction", ["--reductions", "max"], "argument --reductions: invalid choice: 'max'"),
        ("reduction", ["--sizes", "8", "--widths", "8"], "--sizes: none of them makes two or more rows of one of the --widths"),
    ],
)
def test_bad_options_are_refused(name, options, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module(f"bench_{name}")

    monkeypatch.setattr(sys, "argv", [f"bench_{name}.py", *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_table_fills_what_stands_between_the_markers(tmp_path, monkeypatch, result):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import table

    measured, _ = result
    (tmp_path / "a.json").write_text(json.dumps(measured))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    page = "before\n<!-- table: ratios a.json -->\nold\n<!-- end of table -->\nafter\n"
    filled = table.fill(page)
    assert filled == page.replace("old\n", table.ratios(measured))
    assert table.fill(filled) == filled
    with pytest.raises(SystemExit, match="no table 'nonsense'"):
        table.fill(page.replace("ratios", "nonsense"))
