"""Sphinx's settings for the site (`make docs`).

Sphinx rather than MkDocs: the docstrings are in reStructuredText with `.. math::`, as torch's are, and every broken reference
stops the build. The pages are Markdown, as README.md is. Formulas become MathML while the site is built, so that pages need no
script and no network.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import kl_ext

project = "kl_ext"
author = "The kl_ext developers"
copyright = author
release = version = kl_ext.__version__

CUDA_README = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "README.md"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
napoleon_use_ivar = True  # what a class lists under Attributes are its properties, which have entries of their own
nitpicky = True
default_role = "code"
# Classes of torch and of Python stand in signatures; their own pages are on the network.
nitpick_ignore_regex = [("py:.*", r"(torch|collections|typing)\..*|Tensor|Bound|Reduction|optional|Sequence|Normal|Module")]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text says what an argument is

html_theme = "furo"
html_title = f"kl_ext {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    """Registers the renderer of formulas, and what makes the READMEs of the sources pages."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))
    app.connect("include-read", lead_links_to_pages)


def lead_links_to_pages(app: Sphinx, path: Path, page: str, content: list[str]) -> None:
    """The links of an included README, from its folder, as links from this one."""
    folder = (app.srcdir / path).resolve().parent

    def lead(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if target == CUDA_README:
            return f"](cuda.md{link[2] or ''})"
        return f"]({os.path.relpath(target, app.srcdir)}{link[2] or ''})"

    content[0] = re.sub(r"\]\(([^):#]+)(#[^)]*)?\)", lead, content[0])


def inline_formula(writer: Any, node: nodes.math) -> None:
    """$...$ within a sentence."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_formula(writer: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own, which scroll where the page is narrow."""
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode
