"""The examples in the docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import torch

import kl_ext
from kl_ext import distributions, nn, reference

PUBLIC = [(module, name) for module in (kl_ext, distributions, nn, reference) for name in module.__all__]


def examples_of(public: Any, name: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(recurse=False)
    names = {"kl_ext": kl_ext, "torch": torch, public.__name__: public}
    return [found for found in finder.find(public, name, globs=names) if found.examples]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_the_example_in_the_docstring_runs(module: Any, name: str) -> None:
    (example,) = examples_of(getattr(module, name), name)
    report: list[str] = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_a_formula_stands_in_plain_text_too(module: Any, name: str) -> None:
    text = getattr(module, name).__doc__
    assert text.count(".. math::") == text.count("In plain text:")


@pytest.mark.parametrize("name", kl_ext.__all__)
def test_the_docstring_says_what_a_user_must_know(name: str) -> None:
    function = getattr(kl_ext, name)
    text = function.__doc__
    for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:", "nats", *inspect.signature(function).parameters):
        assert part in text, part


def test_the_pair_loss_says_that_it_is_not_the_divergence() -> None:
    assert "not the divergence" in " ".join((kl_ext.kl_div_pair_loss.__doc__ or "").split())
