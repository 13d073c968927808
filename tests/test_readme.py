"""What the pages for people say is true: their Python runs, their links lead somewhere, their tables are the results'."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kl_ext
import kl_ext.reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "csrc/README.md", "benchmarks/README.md")]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def test_the_readme_has_an_example_and_it_runs():
    blocks = PYTHON.findall((ROOT / "README.md").read_text())
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


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
    named = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"KL_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "KL_EXT_CMAKE_ARGS", "KL_EXT_TORCH_VERSION"} == named
    for variable in named:
        assert variable in sources


@pytest.mark.parametrize("losses", [kl_ext, kl_ext.reference], ids=["kl_ext", "reference"])
def test_the_pair_loss_is_twice_the_divergence_and_a_half(losses):
    mu_p, log_var_p, mu_q, log_var_q = torch.randn(4, 1000, dtype=torch.float64)
    p, q = (torch.distributions.Normal(mu, (0.5 * log_var).exp()) for mu, log_var in ((mu_p, log_var_p), (mu_q, log_var_q)))
    pair = losses.kl_div_pair_loss(mu_p, log_var_p, mu_q, log_var_q)
    torch.testing.assert_close(pair, 2 * torch.distributions.kl_divergence(p, q) + 0.5)
