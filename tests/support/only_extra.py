"""Runs a program as where nothing is installed but kl_ext with one of its extras: `python only_extra.py docs -m sphinx ...`.

Other modules that happen to be installed cannot be imported.
"""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(extra: str) -> set[str]:
    """The distributions that kl_ext with the extra requires, and those that these require."""
    found = set()
    left = [(canonicalize_name("kl_ext"), frozenset({extra}))]
    while left:
        name, extras = left.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": one}) for one in extras | {""}):
                left.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}


class WithoutOthers:
    """A finder of modules, but for those that nothing allowed brings."""

    def __init__(self, finder: Any, others: set[str]) -> None:
        self.finder = finder
        self.others = others

    def find_spec(self, name: str, *more: Any) -> Any:
        return None if name.partition(".")[0] in self.others else self.finder.find_spec(name, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def main() -> None:
    extra, *arguments = sys.argv[1:]
    allowed = required(extra) | {"pip", "setuptools"}  # a virtual environment may have these
    modules = importlib.metadata.packages_distributions()
    others = {module for module, brought_by in modules.items() if not allowed & set(map(canonicalize_name, brought_by))}
    for name in [name for name in sys.modules if name.partition(".")[0] in others]:
        del sys.modules[name]
    sys.meta_path[:] = [WithoutOthers(finder, others) for finder in sys.meta_path]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = arguments[0].rpartition("/")[0]
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
