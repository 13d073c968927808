"""What the pages for people say is true: their Python runs, their links lead somewhere, their tables are the results'."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kl_ext
import kl_ext.reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(ROOT / name for name in ("csrc/README.md", "csrc/cuda/README.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?:\]\(|src=\"|srcset=\")([^)#\s\"]+)")
WITH_TESTS_OF_THEIR_OWN = ("export.md", "recipes.md")
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name not in WITH_TESTS_OF_THEIR_OWN
    for number, block in enumerate(PYTHON.findall(page.read_text()))
]
# A thread of gloo that still holds a tensor when Python ends waits for the interpreter's lock and aborts the process
# (github.com/pytorch/pytorch/pull/179291): about one run in a hundred on a busy machine.
END = """
import os, sys
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_of_a_page_runs(block, tmp_path):
    """Each block by itself. Its first line may import a package that is not there, or say that it runs under torchrun."""
    first = block.partition("\n")[0]
    if first.startswith("# torchrun"):
        if not torch.distributed.is_available():
            pytest.skip("this torch has no torch.distributed")
        (tmp_path / "this_file.py").write_text(block + END)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *first.split()[2:]]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return
    imported = re.match(r"import (\w+)", first)
    assert imported, first
    pytest.importorskip(imported[1])
    exec(compile(block, "page", "exec"), {"__name__": "page"})


def test_the_readme_is_one_page_and_its_first_code_runs():
    text = (ROOT / "README.md").read_text()
    assert PYTHON.search(text)
    assert text.count("\n") <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), target


def test_the_tables_are_those_of_the_committed_results():
    completed = subprocess.run([sys.executable, ROOT / "benchmarks" / "table.py", "--check"], capture_output=True, text=True)
    assert completed.returncode == 0, f"{completed.stdout}{completed.stderr}run python benchmarks/table.py"


def test_the_build_variables_named_are_those_that_the_build_reads():
    sources = "".join(
        path.read_text() for folder in ("cmake", "build_backend") for path in (ROOT / folder).iterdir() if path.is_file()
    )
    sources += (ROOT / "setup.py").read_text() + (ROOT / "CMakeLists.txt").read_text()
    named = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs" / "start.md").read_text(), re.MULTILINE))
    named -= {"KL_EXT_KEEP_MEMORY", "KL_EXT_HUGE_PAGES"}  # read by the library
    torch_and_cmake = {"KL_EXT_TORCH_VERSION", "TORCH_CUDA_ARCH_LIST", "KL_EXT_CMAKE_ARGS"}
    assert named == {"KL_EXT_CUDA", "KL_EXT_LOCAL_VERSION", "MAX_JOBS", *torch_and_cmake}
    for variable in named:
        assert variable in sources


@pytest.mark.parametrize("losses", [kl_ext, kl_ext.reference], ids=["kl_ext", "reference"])
def test_the_pair_loss_is_twice_the_divergence_and_a_half(losses):
    mu_p, log_var_p, mu_q, log_var_q = torch.randn(4, 1000, dtype=torch.float64)
    p, q = (torch.distributions.Normal(mu, (0.5 * log_var).exp()) for mu, log_var in ((mu_p, log_var_p), (mu_q, log_var_q)))
    pair = losses.kl_div_pair_loss(mu_p, log_var_p, mu_q, log_var_q)
    torch.testing.assert_close(pair, 2 * torch.distributions.kl_divergence(p, q) + 0.5)


@pytest.mark.parametrize("name", kl_ext.reference.__all__)
def test_the_reference_has_the_same_signatures(name):
    assert inspect.signature(getattr(kl_ext.reference, name)) == inspect.signature(getattr(kl_ext, name))


@pytest.mark.parametrize(
    "how", [{}, {"reduction": "batchmean"}, {"reduction": "sum", "dim": [0, -1]}, {"reduction": "mean"}], ids=str
)
def test_the_reference_divergence_is_that_of_kl_ext(how):
    mu_p, log_var_p, mu_q, log_var_q = torch.randn(4, 3, 4, 5, dtype=torch.float64) * 2
    for arguments in [(), (mu_q, log_var_q), (mu_q[0, 0], log_var_q[:, :1]), (0.5, 1.5), (mu_q, -2), (1, log_var_q)]:
        options = {"clamp_min": -1.0, "clamp_max": 1.0, "dtype": torch.float32, **how}
        want, value = (module.gaussian_kl_div(mu_p, log_var_p, *arguments, **options) for module in (kl_ext.reference, kl_ext))
        torch.testing.assert_close(value, want)


def test_the_reference_divergence_refuses_half_a_prior_and_unknown_reductions():
    with pytest.raises(ValueError, match="mu_q and log_var_q together"):
        kl_ext.reference.gaussian_kl_div(torch.zeros(2), torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="to be none, sum, mean or batchmean, got 'max'"):
        kl_ext.reference.gaussian_kl_div(torch.zeros(2), torch.zeros(2), reduction="max")


REDUCTIONS = {
    '`"batchmean"`': lambda *p: kl_ext.gaussian_kl_div(*p, reduction="batchmean"),
    '`"sum"` over all but the first `dim`, then `.mean()`': lambda *p: kl_ext.gaussian_kl_div(
        *p, reduction="sum", dim=tuple(range(1, p[0].dim()))
    ).mean(),
    '`"sum"` with `dim=1`, then `.mean()`': lambda *p: kl_ext.gaussian_kl_div(*p, reduction="sum", dim=1).mean(),
    '`"sum"`': lambda *p: kl_ext.gaussian_kl_div(*p, reduction="sum"),
    '`"mean"`': lambda *p: kl_ext.gaussian_kl_div(*p, reduction="mean"),
    '`"none"`, then `.mean()`': lambda *p: kl_ext.gaussian_kl_div(*p).mean(),
}


@pytest.mark.parametrize("sizes", [{"B": 5, "D": 7}, {"B": 5, "C": 3, "H": 2, "W": 4}], ids=["[B, D]", "[B, C, H, W]"])
def test_the_weights_in_the_table_of_reductions_are_what_the_reductions_do(sizes):
    column = {2: 2, 4: 3}[len(sizes)]
    page = (ROOT / "docs" / "functions.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith('| `"')]
    lines = [cells for cells in lines if len(cells) == 4]
    assert [cells[0] for cells in lines] == list(REDUCTIONS)
    mu, log_var = torch.randn(2, *sizes.values(), dtype=torch.float64)
    nats_per_image = kl_ext.kl_div_single_loss(mu, log_var).flatten(1).sum(1).mean()
    for cells in lines:
        torch.testing.assert_close(REDUCTIONS[cells[0]](mu, log_var), eval(cells[column], {}, sizes) * nats_per_image)
