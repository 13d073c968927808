"""benchmarks/bench_losses.py measures what it says, and benchmarks/table.py shows what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CONTENDERS = ["kl_ext", "plain torch", "torch.compile"]
SIZES = [64, 1 << 12]

pytest.importorskip("tqdm")


def bench(*options: object) -> subprocess.CompletedProcess[str]:
    """Run the benchmark with torch.compile standing aside: what it compiles to is not what is tested here."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, str(BENCHMARKS / "bench_losses.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", params=["contiguous", "chunk"])
def result(request, tmp_path_factory):
    """The JSON file of a quick run, and what it printed."""
    path = tmp_path_factory.mktemp("bench") / "new" / "result.json"
    options = ["--quick", "--rounds", 2, "--threads", 1, "--layout", request.param, "--out", path]
    completed = bench(*options, "--sizes", *SIZES)
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


def test_a_result_says_where_it_comes_from(result):
    measured, _ = result
    machine = measured["machine"]
    assert machine["threads"] == 1
    for fact in ("date", "device", "cpu", "cores", "cpu_capability", "python", "torch", "kl_ext"):
        assert machine[fact], fact
    assert "commit" in machine


def test_the_printed_tables_are_those_of_the_pages(result, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import table

    measured, printed = result
    for kind in table.KINDS.values():
        assert kind(measured) in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "0"], "argument --sizes: expected a positive integer, got '0'"),
        (["--threads", "two"], "argument --threads: expected a positive integer, got 'two'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "cuda"], "--device cuda: this torch sees no CUDA device; use --device cpu"),
    ],
)
def test_bad_options_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_losses

    monkeypatch.setattr(sys, "argv", ["bench_losses.py", *options])
    monkeypatch.setattr(bench_losses.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench_losses.main()
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
