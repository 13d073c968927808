"""The command for GPU machines: every stage of its dry run, and what becomes of a stage that hangs, fails or does not fit."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STAGES = ["environment", "build", "bits", "tests", "bandwidth", "memcheck", "racecheck", "synccheck", "initcheck", "ncu"]

pytest.importorskip("tqdm")


@pytest.fixture
def load(monkeypatch):
    """A module of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The JSON file of a dry run, and what it printed."""
    out = tmp_path_factory.mktemp("gpu_check") / "new"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--dry-run", "--out", str(out)]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    logs = {path.name: path.read_text() for path in out.glob("*.log")}
    assert completed.returncode == 0, completed.stdout + completed.stderr + "\n".join(logs.values())
    return json.loads((out / "gpu_check.json").read_text()), completed.stdout, logs


def test_every_stage_of_a_dry_run_passes_in_its_time(dry_run):
    result, printed, logs = dry_run
    assert result["dry_run"] is True
    assert list(result["stages"]) == STAGES
    for name, found in result["stages"].items():
        assert found["status"] == "passed", name
        assert 0 < found["seconds"] <= found["limit_s"]
        assert found["log"] in logs
        assert f"{name}: passed" in printed


def test_the_lab_builds_variants_that_give_the_same_bits(tmp_path):
    """Some of them, under the emulation of CUDA."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--lab", "--dry-run", "--out", str(tmp_path)]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert completed.returncode == 0, completed.stdout + (tmp_path / "lab.log").read_text()
    stages = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    assert list(stages) == ["lab"] and stages["lab"]["problems"] == []
    rows = stages["lab"]["rows"]
    variants = ["as it is", "no sharing", "2 elementwise vectors"]
    assert len(rows) == 20 and all(list(row["us"]) == variants and not row["wrong"] for row in rows)
    assert "gradients, [D] prior, bfloat16, small, us: as it is " in completed.stdout


def test_the_lab_finds_other_bits(load, monkeypatch):
    lab = load("gpu.lab")
    case = lab.CASES[0]
    call = lab.Call(case, torch.float32, 2, "cpu")
    monkeypatch.setattr(call, "prepared", lambda value: lambda: call.results[0].fill_(value))
    assert lab.measured(call, {"one": 1.0, "same": 1.0, "other": 2.0})["wrong"] == ["other"]


def test_a_dry_run_shows_what_would_be_done(dry_run):
    stages, logs = dry_run[0]["stages"], dry_run[2]
    assert "KL_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0" in stages["build"]["command"]
    assert "setup.py build_ext --inplace" in stages["build"]["command"]
    assert stages["bits"]["passed"] > 5 and stages["bits"]["failed"] == 0
    assert stages["tests"]["runs"]["small"]["passed"] > 5 and stages["tests"]["not_collected"] == {}
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert stages[tool]["launches"] == stages[tool]["launches"] | {"calls": 20, "wrong": []}
        assert stages[tool]["errors"] == 1 and stages[tool]["in_kl_ext"] == 0
        assert f"--tool {tool} " in logs[f"{tool}.log"]
        assert ("--kernel-name kns=kl_ext" in logs[f"{tool}.log"]) == (tool != "initcheck")
    assert "--clock-control none" in logs["ncu.log"]
    assert [row["kernels"] for row in stages["ncu"]["rows"]] == [1, 2]


def test_the_bandwidth_has_its_contenders_and_goals(dry_run):
    found = dry_run[0]["stages"]["bandwidth"]
    assert len(found["rows"]) == found["of"] == 4
    for row in found["rows"]:
        assert row["share_of_copy"] > 0 and row["gb_per_s"] > 0 and row["bytes"] > 0
        for name in ("kl_ext", "memcpy", "copy kernel", "plain torch"):
            assert row[name]["us"] > 0
        faster = row["copy"]["by"]
        assert row["copy"] == {**row[faster], "by": faster}
        assert row["copy"]["us"] == min(row["memcpy"]["us"], row["copy kernel"]["us"])
    assert {"torch.compile", "max-autotune"} <= found["rows"][0].keys()
    assert [goal["least"] for goal in found["goals"]] == [0.95, 0.9, 1.0, 1.0]


def test_the_tables_show_what_was_measured_and_no_dry_run(load, dry_run):
    tables = load("pages.gpu_tables")
    for kind in tables.KINDS.values():
        with pytest.raises(SystemExit, match="measures nothing"):
            kind(dry_run[0])
    result = json.loads(json.dumps({**dry_run[0], "dry_run": False}))
    row = result["stages"]["bandwidth"]["rows"][0]
    row["share_of_copy"], row["torch.compile"]["ratio"], row["plain torch"]["ratio"] = 0.9876, 1.5, 4.0
    result["stages"]["environment"]["devices"] = [{"name": "a GPU"}]
    assert re.search(r"^\| kl_div_single_loss, forward +\| float32 \| +98\.8% \|$", tables.bandwidth(result), re.MULTILINE)
    assert " / 1.50 / " in tables.ratios(result).splitlines()[2] and " / – / –" in tables.ratios(result).splitlines()[3]
    assert re.search(r"^\| single, elementwise \| forward +\| +99% / 4.0 / 1.50 \| +– \|", tables.summary(result), re.MULTILINE)
    assert "never slower than max-autotune" in tables.goals(result)
    assert tables.machine(result).startswith("a GPU, torch ")
    assert re.search(r"kl_div_single_loss, forward +\| +1 / – \| +\d+\.\d% \| +– \|", tables.moved(result))
    for name, line in zip(STAGES, tables.stages(result).splitlines()[2:], strict=True):
        assert re.match(rf"\| {name} +\| passed +\|", line)
    assert all(kind(result) for kind in tables.KINDS.values())


def test_the_table_of_stages_says_what_failed_and_what_was_left_out(load):
    tables = load("pages.gpu_tables")
    run = {"passed": 7, "failed": 2, "skipped": {"needs two|more GPUs": 3}, "lacking": {"mpmath": 1}, "ended": False}
    run["failures"] = [{"test": "tests/test_a.py::test_b", "message": "why"}]
    launches = {"calls": 5, "complete": False, "wrong": ["a kernel"]}
    found = {
        "tests": {"status": "failed", "seconds": 1.2, "runs": {"small": run}},
        "racecheck": {"status": "failed", "seconds": 3, "launches": launches, "errors": 4, "in_kl_ext": 2},
        "ncu": {"status": "unavailable", "seconds": 0, "reason": "ncu is not on this machine"},
    }
    result = {"dry_run": False, "stages": found}
    text = tables.stages(result)
    assert (
        "small: 7 passed, 2 failed (tests/test_a.py, …), 3 skipped: needs two\\|more GPUs (3), 1 not run for want of mpmath"
        in text
    )
    assert "it did not end in time" in text
    assert "5 calls, not all that there are; 1 results unlike the CPU's; 4 errors, 2 in kl_ext" in text
    assert "| ncu is not on this machine" in text
    assert tables.moved(result) == "Nothing was counted: the stage ncu is unavailable.\n"


def test_the_time_limits_fit_in_ten_minutes(load):
    assert sum(limit for limit, _ in load("gpu.stages").STAGES.values()) <= 600


@pytest.fixture
def check(load, monkeypatch, tmp_path):
    """gpu_check.py with stages that are the given Python programs."""
    gpu_check = load("gpu_check")

    def run(*options: str, **programs: str) -> tuple[int, dict]:
        monkeypatch.setattr(gpu_check, "STAGES", dict.fromkeys(programs, (60, None)))
        commands = {name: [sys.executable, "-c", text.replace("OUT", str(tmp_path))] for name, text in programs.items()}
        monkeypatch.setattr(gpu_check, "command_of", lambda name, *_: commands[name])
        status = gpu_check.main(["--out", str(tmp_path), *options])
        return status, json.loads((tmp_path / "gpu_check.json").read_text())["stages"]

    return run


PASSES = "import pathlib; pathlib.Path('OUT/{}.json').write_text('{{\"status\": \"{}\"}}')"


def test_a_stage_that_fails_or_hangs_stops_no_other(check, tmp_path, capsys):
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '61']); time.sleep(60)"
    pid = "import os; open('OUT/pid', 'w').write(str(os.getpid())); " + PASSES.format("b", "passed") + "; " + hangs
    status, stages = check(
        *("--limit", "b=3"),
        a="import sys; print('why'); sys.exit(3)",
        b=pid,
        c=PASSES.format("c", "passed"),
        d="pass",
        e=PASSES.format("e", "passed") + "; raise SystemExit(2)",
    )
    assert status == 1
    assert {name: found["status"] for name, found in stages.items()} == {
        "a": "failed",
        "b": "timed out",
        "c": "passed",
        "d": "failed",
        "e": "failed",
    }
    assert stages["a"]["exit_status"] == 3 and (tmp_path / "a.log").read_text() == "why\n"
    assert 3 <= stages["b"]["seconds"] < 20
    assert "b: timed out" in capsys.readouterr().out
    group = int((tmp_path / "pid").read_text())
    for _ in range(50):  # the killed are gone as soon as somebody has waited for them
        alive = [path for path in Path("/proc").glob("[0-9]*/stat") if runs_in(path, group)]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive, "what the stage had started outlived it"


def runs_in(stat: Path, group: int) -> bool:
    try:
        state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(of_group) == group and state != "Z"


@pytest.mark.parametrize("status, expected", [("passed", 0), ("partial", 3), ("unavailable", 3), ("failed", 1)])
def test_the_exit_status_says_whether_everything_ran_and_passed(check, status, expected):
    assert check(a=PASSES.format("a", "passed"), b=PASSES.format("b", status))[0] == expected


def test_time_left_over_goes_to_the_next_stage(check):
    _, stages = check(a=PASSES.format("a", "passed"), b=PASSES.format("b", "passed"))
    assert stages["b"]["limit_s"] == pytest.approx(120 - stages["a"]["seconds"], abs=0.2)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--limit", "nonsense=3"], "expected STAGE=SECONDS with a stage of environment"),
        (["--limit", "ncu=soon"], "invalid limits value"),
        (["--stages", "nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_bad_options_are_refused(load, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        load("gpu_check").main(["--out", str(tmp_path), *options])
    assert message in capsys.readouterr().err


RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void kl_ext::cuda::<unnamed>::sum_partials<float>(const T1 *, long)+0x1a0
=========     and Read access at void kl_ext::cuda::<unnamed>::sum_partials<float>(const T1 *, long)+0x1f0 [16 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_a_report_of_kl_exts_kernels_is_told_from_others(load):
    tools = load("gpu.tools")
    ours = tools.parse_sanitizer(RACE)
    assert (ours["errors"], ours["in_kl_ext"]) == (1, 1) and "sum_partials" in ours["first"]
    theirs = tools.parse_sanitizer(RACE.replace("kl_ext::cuda::<unnamed>", "at::native"))
    assert (theirs["errors"], theirs["in_kl_ext"]) == (1, 0)
    on_host = tools.parse_sanitizer("========= Program hit an error\n=========     Host Frame: kl_ext::cuda::run(int) [0x1]\n")
    assert (on_host["errors"], on_host["in_kl_ext"], on_host["of_calls"]) == (None, 0, 1)
    assert tools.parse_sanitizer("========= Error: Device not supported")["refused"]


@pytest.mark.parametrize(
    "help_text, option",
    [("  --kernel-name arg", "--kernel-name"), ("  --kernel-regex arg", "--kernel-regex"), ("  --filter arg", "--filter")],
)
def test_the_filter_is_spelt_as_the_tool_has_it(load, help_text, option):
    sanitizer_command = load("gpu.tools").sanitizer_command
    assert f"{option} kns=kl_ext python" in " ".join(sanitizer_command("x", "memcheck", help_text, ["python"]))
    assert "kns" not in " ".join(sanitizer_command("x", "initcheck", help_text, ["python"]))


@pytest.mark.parametrize("anonymous", ["<unnamed>", "(anonymous namespace)", "_GLOBAL__N__a1b7e21e_9_finish_cu_fb52"])
def test_a_kernel_is_known_by_its_name(load, anonymous):
    kernel = load("gpu.tools").KERNEL
    assert kernel.search(f"void kl_ext::cuda::{anonymous}::sum_partials<float>(const T1 *, long)")[1] == "sum_partials"
    assert (
        kernel.search("void kl_ext::cuda::sum_rows<kl_ext::cuda::Forward<kl_ext::math::StandardDivergence>>(T7)")[1]
        == "sum_rows"
    )
    assert not kernel.search("void at::native::vectorized_elementwise_kernel<4>(int)")


@pytest.mark.parametrize(
    "printed, name",
    [
        ("void backward<math::Divergence, 0, float, math::BFloat16, float, Vectors<8, 0>>(T6::Plan<2*kInputs+1>)", "backward"),
        ("void sum_rows<Forward<math::Divergence>, 0, float>(T6::Plan<kOperands>, SumShape<T3>)", "sum_rows"),
        ("void unnamed>::divide_each<float>(T1 *, long, T1)", "divide_each"),
        ("unnamed>::sum_partials(const float *, long)", "sum_partials"),
        ("void kl_ext::cuda::<unnamed>::sum_partials<float>(const T1 *, long)", "sum_partials"),
        ("void kl_ext::cuda::(anonymous namespace)::sum_partials<float>(const T1 *, long)", "sum_partials"),
    ],
)
def test_a_kernel_is_known_by_what_ncu_prints(load, printed, name):
    tools = load("gpu.tools")
    line = tools._NCU_LINE.format("7", printed.removeprefix("void "), "gpu__time_duration.sum", "ns", "1,500")
    assert tools.PRINTED_BY_NCU.match(printed)[1] == name
    assert tools.parse_ncu(tools._NCU_COLUMNS + line) == [{"kernel": name, "nanoseconds": 1500}]


def test_kernels_that_are_not_the_cases_are_not_taken_for_them(load):
    tools = load("gpu.tools")
    kernels = tools.parse_ncu(tools.RECORDED_NCU)
    assert [kernel["kernel"] for kernel in kernels] == ["forward", "sum_rows", "sum_partials"]
    assert kernels[0] == {"kernel": "forward", "read": 6.71e6, "written": 3.3e6, "nanoseconds": 5120}
    assert kernels[1]["read"] == 6e6
    assert tools.match(kernels, [{"least_bytes": 1e7}]) is None
    rows = tools.match([{"kernel": "divide_each", "read": 9e9}, *kernels], [{"least_bytes": 1e7}] * 2)
    assert [round(row["of_least"], 4) for row in rows] == [1.001, 1.0001]
    assert tools.refusal("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")


def test_files_that_cannot_be_collected_are_named_with_the_reason(load, tmp_path):
    (tmp_path / "test_a.py").write_text("import a_module_that_there_is_not\n")
    (tmp_path / "test_b.py").write_text("def test_b(): pass\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "--continue-on-collection-errors",
        "-c",
        "/dev/null",
        ".",
    ]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    problem = "ModuleNotFoundError: No module named 'a_module_that_there_is_not'"
    assert load("gpu.tests").collection_errors(output) == {"test_a.py": problem}


@pytest.fixture
def run_tests(load, monkeypatch, tmp_path):
    """Runs a file of tests as a stage does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    gpu_tests = load("gpu.tests")
    context = load("gpu.context").Context(tmp_path, tmp_path / "result", 60, dry_run=False)

    def run(text: str, seconds: float) -> dict:
        (tmp_path / "test_x.py").write_text(text)
        return gpu_tests.run_tests(context, "x", seconds, str(tmp_path / "test_x.py"))

    return run


@pytest.mark.parametrize("reason, status", [("no CUDA device", "failed"), ("needs two GPUs", "passed")])
def test_a_test_skipped_for_want_of_a_gpu_is_a_failure(run_tests, reason, status):
    skip = f"@pytest.mark.skip(reason={reason!r})\ndef test_skips(): pass\n"
    found = run_tests(f"import pytest\n{skip}def test_passes(): pass\n", 60)
    assert (found["passed"], found["skipped"], found["status"]) == (1, {reason: 1}, status)


def test_a_file_skipped_for_want_of_a_module_is_said(run_tests):
    found = run_tests("import pytest\npytest.importorskip('a_module_that_there_is_not')\ndef test_passes(): pass\n", 60)
    assert (found["passed"], found["status"]) == (0, "failed")
    assert ["could not import 'a_module_that_there_is_not'" in reason for reason in found["skipped"]] == [True]


def test_a_test_that_fails_for_want_of_a_module_is_not_run(run_tests):
    """As torch.library.opcheck does without expecttest, in the middle of a test."""
    lacks = "def test_lacks(): raise ModuleNotFoundError(\"No module named 'expecttest'\")\n"
    found = run_tests(f"{lacks}def test_passes(): pass\n", 60)
    assert (found["lacking"], found["failed"], found["passed"], found["status"]) == ({"expecttest": 1}, 0, 1, "partial")
    found = run_tests(f"{lacks}def test_fails(): import a_module_that_there_is_not\ndef test_passes(): pass\n", 60)
    assert (found["lacking"], found["failed"], found["status"]) == ({"expecttest": 1}, 1, "failed")


def test_outcomes_count_though_the_last_test_hangs(run_tests):
    found = run_tests(
        "import time\ndef test_passes(): pass\ndef test_fails(): assert 1 == 2\ndef test_hangs(): time.sleep(60)\n", 8
    )
    assert (found["ended"], found["status"], found["passed"], found["failed"]) == (False, "failed", 1, 1)
    assert "1 == 2" in found["failures"][0]["message"]


def test_the_goals_name_what_missed_them(load):
    row = {"case": "a", "dtype": "float32", "size": "1 GiB", "is_reduction": False, "share_of_copy": 0.94}
    rows = [row, {**row, "dtype": "bfloat16"}, {**row, "size": "L2", "torch.compile": {"ratio": 0.99}}]
    found = load("gpu.stages").goals(rows)
    assert [(goal["met"], goal["of"]) for goal in found] == [(0, 1), (1, 1), (0, 1), (0, 0)]
    assert found[0]["missed"] == [(0.94, "a, float32, 1 GiB")]


@pytest.mark.parametrize("case", range(28))
def test_the_contenders_compute_the_same(load, case):
    import torch

    gpu_cases = load("gpu.cases")
    chosen = gpu_cases.cases()[case]
    tensors = [x.double() for x in chosen.fresh(3, torch.float32, "cpu")]
    results = [chosen.own()(*tensors), chosen.plain()(*tensors), chosen.eager(tensors)()]
    results = [[x for x in (one if isinstance(one, (tuple, list)) else [one]) if x is not None] for one in results]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    of_terms = 3 * gpu_cases.WIDTH
    read = sum(x.numel() for x in tensors) - (chosen.direction == "forward")
    written = sum(x.numel() for x in results[0])
    assert chosen.bytes(3, 8) == 8 * (read + written), (of_terms, read, written)
