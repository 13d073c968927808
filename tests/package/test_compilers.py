"""`make test-compilers` reports each compiler, and fails where one gives another hash or kernels that are not in vectors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import compiled_kernels
import compilers
import hashed
import reports


@pytest.mark.parametrize(
    "got, scalar, status",
    [(hashed.HASH, [], 0), ("another", [], 1), (hashed.HASH, ["a kernel"], 1)],
    ids=["all is well", "another hash", "not in vectors"],
)
def test_the_report_has_a_row_for_each_compiler(
    got: str, scalar: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reliability.md").write_text("| same bits | here | [not run](reports/compilers.md) | never |\n")
    monkeypatch.setattr(reports, "TABLE", tmp_path / "reliability.md")
    monkeypatch.setattr(compilers, "REPORT", tmp_path / "compilers.md")
    monkeypatch.setattr(compilers.shutil, "which", lambda name: name if name in ("g++-12", "clang++-16") else None)
    monkeypatch.setattr(compiled_kernels, "runs_here", lambda capability: capability != "AVX512")
    monkeypatch.setattr(compiled_kernels, "hash_of", lambda *case: got)
    monkeypatch.setattr(compiled_kernels, "kernels_of", lambda *case: tmp_path)
    monkeypatch.setattr(compiled_kernels, "disassembled", lambda path: {})
    monkeypatch.setattr(compiled_kernels, "not_vectorised", lambda code, capability: scalar)
    assert compilers.main() == status
    report = (tmp_path / "compilers.md").read_text()
    equal = "equal" if got == hashed.HASH else "**another**"
    for compiler in ("g++-12", "clang++-16"):
        assert f"| {compiler} | -O3 | DEFAULT | {equal} |" in report
        assert f"| {compiler} | -O2 | AVX2 | {equal} | {len(scalar)} of " in report
    assert "| g++-14 |  |  | not installed |" in report
    found = f"{8 * (got == hashed.HASH)} of 8 give the hash"
    assert f"Found: {found}." in report and f"[{found}](reports/compilers.md)" in (tmp_path / "reliability.md").read_text()
