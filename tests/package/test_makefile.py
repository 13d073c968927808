"""`make help` and the targets agree."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_help_lists_every_target_in_columns():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    said = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = list(re.finditer(r"^  make (\S+) +(\S.*)$", said, re.MULTILINE))
    assert [line[1] for line in listed] == targets
    assert len({line.start(2) - line.start() for line in listed}) == 1
    assert re.findall(r"^\w.*$", said, re.MULTILINE) == ["For users", "For developers"]
