"""Sphinx's settings for the site (`make docs`).

Sphinx rather than MkDocs: the docstrings are in reStructuredText with `.. math::`, as torch's are, and every broken reference
stops the build. The pages are Markdown, as README.md is. Formulas become MathML while the site is built, so that pages need no
script and no network.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import kl_ext

project = "kl_ext"
author = "The kl_ext developers"
copyright = author
release = version = kl_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
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
    """Registers the renderer of formulas."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))


def inline_formula(writer: Any, node: nodes.math) -> None:
    """$...$ within a sentence."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_formula(writer: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own, which scroll where the page is narrow."""
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode
