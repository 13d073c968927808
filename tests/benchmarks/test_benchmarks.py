"""The benchmarks measure what they say, judge it by the goals, and the pages show what was measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("tqdm")

import bench  # noqa: E402
import plots  # noqa: E402
import table  # noqa: E402
from measure import goals, suites, timing  # noqa: E402
from measure.suites import BOTH, CHUNK, FORWARD, KI, MI, NATIVE, NO_DIVERGENCE, NOTHING_KEPT, UNMASKED  # noqa: E402
from measure.workloads import COMPILED, EAGER, KL_EXT, PEERS, WORKLOADS  # noqa: E402
from pages import gpu_tables, tables  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quick run, with torch.compile standing aside: its JSON file, and what it printed."""
    path = tmp_path_factory.mktemp("bench") / "new" / "result.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, BENCHMARKS / "bench.py", "--quick", "--seconds", "0.001", "--out", path]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert completed.returncode == 0, completed.stderr
    return json.loads(path.read_text()), completed.stdout


def chosen(result, suite):
    return [row for row in result["rows"] if row["suite"] == suite]


def test_every_suite_is_measured_and_its_numbers_are_in_order(run):
    result, _ = run
    names = {name.replace("-", " ") for name in (*bench.SUITES, *bench.ONCE)}
    assert {row["suite"] for row in result["rows"]} == names | {"exponent"}
    for row in result["rows"]:
        assert row["elements"] > 0
        for low, middle, high in row.get("us", {}).values():
            assert 0 < low <= middle <= high
        for low, middle, high in row.get("ratio", {}).values():
            assert low <= middle <= high


def test_every_workload_size_and_pass_has_all_peers(run):
    rows = chosen(run[0], "ratios")
    assert [(row["case"], row["pass"], row["elements"]) for row in rows] == [
        (name, direction, size) for size in (4 * KI, MI) for name in WORKLOADS for direction in (FORWARD, BOTH)
    ]
    for row in rows:
        beside = {"single, mean": NATIVE, "masked sum": UNMASKED}
        beside |= {case: CHUNK for case in goals.CHUNKED if row["pass"] == BOTH}
        more = {beside[row["case"]]} if row["case"] in beside else set()
        assert set(row["us"]) == {*PEERS, *more}
        assert set(row["ratio"]) == {*PEERS, *more} - {KL_EXT}


def test_what_bounds_the_goals_is_measured_beside_them(run):
    for row in chosen(run[0], "floor"):
        assert (NOTHING_KEPT in row["us"]) == (row["case"] != "sum")
    for row in chosen(run[0], "compiled step"):
        assert set(row["us"]) == {KL_EXT, EAGER, NO_DIVERGENCE}


def test_a_row_may_do_without_kept_memory_and_leaves_the_setting_as_it_was(run):
    assert suites.set_kept(512) == 512
    suites.keep_nothing()
    assert suites.set_kept(7) == 0
    suites.keep_memory()
    assert suites.set_kept(512) == 512


def test_a_result_says_where_it_comes_from(run):
    machine = run[0]["machine"]
    for fact in ("date", "device", "cpu", "cores", "huge_pages", "cpu_capability", "python", "torch", "kl_ext"):
        assert machine[fact], fact
    assert "commit" in machine
    assert run[0]["options"]["threads"] == [1]
    assert run[0]["options"]["quick"]


def test_every_goal_finds_its_rows(run):
    assert [goal["name"] for goal in run[0]["goals"]] == [goal.name for goal in goals.GOALS]


def test_kl_ext_keeps_its_error_bounds_and_never_falls_below_the_least_value(run):
    rows = chosen(run[0], "accuracy")
    assert len(rows) == 18
    for row in rows:
        found = row["peers"][KL_EXT]
        assert set(row["peers"]) == set(PEERS)
        assert found["negative"] == 0
        assert found["worst_ulp"] <= (2.5 if row["case"] == "single" else 4.5)
        assert found["gradient_ulp"] <= 3
        if row["case"] != "pair":
            assert found["lost"] == 0
            assert abs(found["mean_ratio"] - 1) < 1e-3


def test_what_is_printed_is_what_the_pages_show(run):
    result, printed = run
    for kind in tables.PRINTED.values():
        text = kind(result)
        assert text
        assert text in printed
    for name, kind in tables.KINDS.items():
        assert kind(result), name


def test_everything_is_drawn_from_a_result(run, tmp_path):
    plots.draw(run[0], tmp_path)
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    pictures = {f"pictures/{name}-{theme}.png" for name in plots.PICTURES for theme in ("light", "dark")}
    assert drawn == pictures | {f"bench-{name}.png" for name in plots.PLOTS}


class Machine:
    """Contenders whose calls take a known time on a clock of their own, slower in some rounds."""

    def __init__(self, **seconds):
        self.now, self.slowdown, self.log = 0.0, 1.0, []
        self.contenders = {name: self._contender(name, length) for name, length in seconds.items()}

    def _contender(self, name, length):
        def call(leaves):
            self.log.append((name, leaves[0]))
            self.now += self.slowdown * length

        return call

    def effort(self, **limits):
        return timing.Effort(clock=lambda: self.now, **{"seconds": 1.0, "fewest": 3, "most": 9, **limits})


def test_contenders_take_turns_and_each_round_starts_with_the_next():
    machine = Machine(a=0.1, b=0.2, c=0.3)
    row = timing.time_in_turn(machine.contenders, [["x"]], machine.effort(), "a")
    names = "".join(name for name, _ in machine.log)
    # Each twice to compile and to be estimated; then each follows itself.
    assert names == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert row["rounds"] == 3
    assert row["us"] == {"a": [1e5] * 3, "b": [2e5] * 3, "c": [3e5] * 3}
    assert row["ratio"] == {"b": [2.0] * 3, "c": [3.0] * 3}


def test_a_brief_contender_leaves_a_row_that_has_no_time():
    for seconds, rounds in [(0.1, 3), (2.8, 8)]:
        machine = Machine(a=0.1, b=0.15)
        effort = machine.effort(seconds=seconds + 1e-6, fewest=5)
        row = timing.time_in_turn(machine.contenders, [["x"], ["y"]], effort, "a", brief=["b"])
        assert row["rounds"] == max(5, rounds)
        assert sum(name == "b" for name, _ in machine.log) == 2 + rounds
        assert row["ratio"] == {"b": [1.5] * 3}
        assert [leaf for name, leaf in machine.log if name == "a"][2:10] == list("yxxyyxxy")  # a set a round, after the other


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 3), (1.4, 7), (100.0, 9)])
def test_a_row_has_as_many_rounds_as_fit_into_its_time(seconds, rounds):
    machine = Machine(a=0.05, b=0.05)
    assert timing.time_in_turn(machine.contenders, [["x"]], machine.effort(seconds=seconds + 1e-6), "a")["rounds"] == rounds


def test_what_slows_a_round_does_not_change_the_ratios():
    machine = Machine(a=0.1, b=0.25)
    rounds = iter([1.0, 7.0, 1.0, 3.0])

    def next_round():
        machine.slowdown = next(rounds, 1.0) if sum(name == "a" for name, _ in machine.log) >= 2 else 1.0

    # Rounds begin with a, then with b: let only whole rounds differ.
    calls = machine.contenders
    order = iter([True, False, False, False] * 20)
    contenders = {name: lambda leaves, call=call: (next(order) and next_round(), call(leaves)) for name, call in calls.items()}
    row = timing.time_in_turn(contenders, [["x"]], machine.effort(), "a")
    assert row["us"]["a"][2] > 1.5 * row["us"]["a"][0]
    assert row["ratio"]["b"] == [2.5] * 3


def test_short_calls_are_timed_in_blocks_and_large_inputs_alternate():
    machine = Machine(a=1e-3, b=1e-3)
    row = timing.time_in_turn(machine.contenders, [["x"], ["y"]], machine.effort(), "a")
    block = machine.log[-6:]
    assert block == [(block[0][0], leaf) for leaf in "xyxyxy"]  # six calls are the first whole turns of 5 ms
    assert row["us"]["a"] == [1e3] * 3
    assert len(timing.sets_of(lambda: [], MI - 1)) == 1
    assert len(timing.sets_of(lambda: [], MI)) == 2


def test_what_prepares_a_contender_is_not_timed():
    machine = Machine(a=0.1, b=0.1)
    prepared = []

    def prepare():
        prepared.append(len(machine.log))
        machine.now += 5.0

    row = timing.time_in_turn(machine.contenders, [["x"]], machine.effort(), "a", {"b": prepare})
    assert row["us"]["b"] == [1e5] * 3
    assert [machine.log[index][0] for index in prepared] == ["b"] * 5


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_peers_of_a_workload_compute_the_same(name):
    workload = WORKLOADS[name]
    leaves = workload.leaves(256, dtype=torch.float64)
    results = {peer: workload.run(peer)(leaves) for peer in PEERS if peer != COMPILED}
    gradients = {peer: timing.gradients_of(workload.run(peer))(leaves) for peer in results}
    for peer in results:
        torch.testing.assert_close(results[peer], results[EAGER])
        torch.testing.assert_close(gradients[peer], gradients[EAGER])
    assert all(gradient.any() for gradient in gradients[KL_EXT])
    assert not timing.forward_of(workload.run(KL_EXT))(leaves).requires_grad
    expected = {"latents, chunk": 8 * KI, "masked sum": 4 * KI}.get(name, 256)
    assert leaves[0].numel() // (2 if workload.chunked else 1) == expected


@pytest.mark.parametrize("name", ["elementwise's gradients", "sum's gradients"])
def test_the_floor_of_the_backward_moves_its_bytes(run, name):
    tensors = {"elementwise's gradients": 5, "sum's gradients": 4}[name]
    (row,) = (row for row in chosen(run[0], "floor") if row["case"] == name)
    assert row["bytes"] == 4 * tensors * row["elements"]


def ratio_row(case, direction, elements, threads=1, **ratios):
    numbers = {name: [value - 0.1, value, value + 0.1] for name, value in ratios.items()}
    ratio = {{"eager": EAGER, "compiled": COMPILED}[name]: value for name, value in numbers.items()}
    return {"suite": "ratios", "case": case, "pass": direction, "elements": elements, "threads": threads, "ratio": ratio}


def test_goals_are_judged_by_the_worst_of_their_rows():
    rows = [
        ratio_row("single, mean", BOTH, 4 * KI, eager=2.0, compiled=1.25),
        ratio_row("single, mean", BOTH, MI, eager=5.05, compiled=1.3),
        ratio_row("batchmean", BOTH, 64 * KI, 2, eager=4.5, compiled=8.0),
        ratio_row("batchmean", FORWARD, MI, eager=0.1, compiled=1.1),
        ratio_row("latents, chunk", BOTH, MI, eager=2.6, compiled=0.997),
    ]
    found = {goal["name"]: goal for goal in goals.judge(rows)}
    assert len(found) == 6
    assert found["plain torch, 4 Ki, forward + backward"]["met"]
    eager = found["plain torch, from 64 Ki on, forward + backward"]
    assert (eager["measured"], eager["met"], eager["missed"], eager["rows"], eager["close"]) == (4.5, False, 1, 2, False)
    assert eager["worst"] == "batchmean, forward + backward, 64 Ki, 2 threads"
    compiled = found["torch.compile, in every case"]
    assert (compiled["measured"], compiled["met"], compiled["rows"]) == (1.1, False, 4)
    mean = found["torch.compile, geometric mean of all cases"]
    assert mean["measured"] == pytest.approx((1.25 * 1.3 * 8.0 * 1.1 * 0.997) ** 0.2, rel=1e-3)
    assert not mean["met"]
    assert found["plain torch, chunk from 1 Mi on, forward + backward"]["met"]
    joined = found["torch.compile, chunk from 1 Mi on, forward + backward"]
    assert joined["met"]  # 1.00 as it is shown
    assert joined["close"]


def test_an_upper_bound_is_judged_by_the_largest_ratio():
    rows = [
        {"suite": "dtypes", "case": "sum", "pass": FORWARD, "elements": MI, "threads": 1, "ratio": {"float64": [2, value, 3]}}
        for value in (2.1, 2.25)
    ]
    (found,) = goals.judge(rows)
    assert (found["sense"], found["measured"], found["met"], found["missed"]) == ("≤", 2.25, False, 1)


def test_table_fills_what_stands_between_the_markers(tmp_path, monkeypatch, run):
    measured, _ = run
    (tmp_path / "a.json").write_text(json.dumps(measured))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    page = "before\n<!-- table: ratios a.json -->\nold\n<!-- end of table -->\nafter\n"
    filled = table.fill(page)
    assert filled == page.replace("old\n", tables.ratios(measured))
    assert table.fill(filled) == filled
    with pytest.raises(SystemExit, match="no table 'nonsense'"):
        table.fill(page.replace("ratios", "nonsense"))


def test_every_table_of_the_pages_has_rows():
    for page in table.PAGES:
        for match in table.MARKER.finditer(page.read_text()):
            assert match[4], f"{page.name}: {match[2]}"


def test_every_table_of_the_gpu_result_is_shown_as_it_is():
    result = json.loads((table.RESULTS / "gpu.json").read_text())
    assert result["dry_run"] is False
    assert re.fullmatch("[0-9a-f]{40}", result["commit"])
    shown = [match for page in table.PAGES for match in table.MARKER.finditer(page.read_text()) if match[3] == "gpu.json"]
    assert {match[2] for match in shown} == set(gpu_tables.KINDS)
    for match in shown:
        assert match[4] == gpu_tables.KINDS[match[2]](result), match[2]


def test_a_gpu_result_is_committed_without_the_folders_of_its_machine(tmp_path, monkeypatch):
    committed = json.loads((table.RESULTS / "gpu.json").read_text())
    assert not gpu_tables.FOLDERS.search(json.dumps(committed)), "python benchmarks/table.py --take DIR/gpu_check.json"
    found = {"platform": "a name", "programs": {"c++": "/usr/bin/c++"}, "seconds": 0.123456789, "problems": []}
    build = {"command": "TORCH_CUDA_ARCH_LIST=9.0 /home/a/.venv/bin/python setup.py", "report": ["see https://a.b/c/d"]}
    result = {**committed, "stages": {"environment": found, "build": build, "ncu": {"rows": [{"a": 1, "b": [2]}, {}]}}}
    (tmp_path / "gpu_check.json").write_text(json.dumps(result))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["table.py", "--take", str(tmp_path / "gpu_check.json")])
    assert table.main() == 0
    taken = json.loads((tmp_path / "gpu.json").read_text())
    assert taken["stages"] == {
        "environment": {"programs": {"c++": "c++"}, "seconds": 0.123457, "problems": []},
        "build": {"command": "TORCH_CUDA_ARCH_LIST=9.0 python setup.py", "report": ["see https://a.b/c/d"]},
        "ncu": {"rows": [{"a": 1, "b": [2]}, {}]},
    }
    (tmp_path / "gpu_check.json").write_text(json.dumps({**result, "dry_run": True}))
    with pytest.raises(SystemExit, match="measures nothing"):
        table.main()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "0"], "argument --sizes: expected a positive integer, got '0'"),
        (["--threads", "two"], "argument --threads: expected a positive integer, got 'two'"),
        (["--only", "rations"], "argument --only: invalid choice: 'rations'"),
        (["--device", "cuda"], "--device cuda: this torch sees no CUDA device; use --device cpu"),
    ],
)
def test_bad_options_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_full_run_has_every_size_and_anything_less_writes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    options = bench.parse_options()
    plan = bench.plan_of(options)
    assert options.out == BENCHMARKS / "results" / "cpu.json"
    assert (plan.threads, plan.sizes) == ([1, 2], [4 * KI, 64 * KI, MI, 16 * MI])
    assert (plan.linear[0], plan.linear[-1]) == (MI, 256 * MI)
    assert (plan.batches, plan.latents) == ([128, 4096], [32, 512])
    for less in (["--quick"], ["--only", "overhead"], ["--sizes", "4096"], ["--threads", "2"]):
        monkeypatch.setattr(sys, "argv", ["bench.py", *less])
        assert bench.parse_options().out is None, less
        monkeypatch.setattr(sys, "argv", ["bench.py", *less, "--out", "some.json"])
        assert bench.parse_options().out == Path("some.json"), less


def test_the_threads_of_a_row_are_those_it_says(monkeypatch):
    before, seen = torch.get_num_threads(), []

    def suite(plan):
        yield suites.Case("a case", lambda: seen.append(torch.get_num_threads()) or [])

    monkeypatch.setattr(bench, "SUITES", {"one": suite})
    monkeypatch.setattr(bench, "ONCE", {})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", "--only", "one", "--threads", "1", "2"])
    options = bench.parse_options()
    assert bench.measure(options, bench.plan_of(options)) == []
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


def test_makefile_runs_the_plots_and_tables_after_the_measurement():
    recipe = re.search(r"^bench:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert re.findall(r"benchmarks/(\w+)\.py", recipe) == ["bench", "plots", "table"]
