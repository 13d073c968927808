"""The documentation site: it builds without a warning, its links lead somewhere, and a browser shows all of every page."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "index",
    "start",
    "errors",
    "functions",
    "recipes",
    "programs",
    "export",
    "numbers",
    "reliability",
    "speed",
    "inside",
    "cuda",
    "api",
    "changelog",
]
WIDTHS = (400, 1400)

for module in ("furo", "latex2mathml", "myst_parser"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    only_docs = [sys.executable, ROOT / "tests" / "support" / "only_extra.py", "docs"]  # as `make docs` finds it
    command = [*only_docs, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", ROOT / "docs", folder]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


class Page(HTMLParser):
    """The links, identifiers and scripts of a page, and its formulas."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := given.get(name)))
        if tag == "a" and (target := given.get("href")):
            self.links.append(target)
        if tag in ("script", "img") and (target := given.get("src")):
            self.resources.append(target)
        if tag == "link" and given.get("rel") == "stylesheet" and (target := given.get("href")):
            self.resources.append(target)


def test_the_pages_are_there_and_their_links_lead_somewhere(site: Path) -> None:
    pages = {path.name: Page(path) for path in site.glob("*.html")}
    assert {f"{name}.html" for name in PAGES} <= set(pages)
    for name, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if re.match(r"\w+:", target):
                continue
            target = unquote(target) or name
            assert (site / target).exists(), f"{name}: {link}"
            if anchor and target.endswith(".html"):
                assert anchor in pages[target].anchors, f"{name}: {link}"


def test_nothing_comes_from_the_network(site: Path) -> None:
    for path in site.glob("*.html"):
        for resource in Page(path).resources:
            assert not re.match(r"(\w+:)?//", resource), f"{path.name}: {resource}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


# What a reader of one theme sees of a page: boxes of pictures and formulas, and whether the page itself scrolls sideways.
SEEN = """() => {
  const shown = element => element.getClientRects().length > 0;
  const images = [...document.querySelectorAll('article img')].filter(shown);
  const formulas = [...document.querySelectorAll('article math')].filter(shown);
  return {
    images: images.length,
    unloaded: images.filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.src),
    wide: images.filter(image => image.getBoundingClientRect().right > window.innerWidth + 1).map(image => image.src),
    formulas: formulas.length,
    empty: formulas.filter(formula => formula.getBoundingClientRect().height < 5).map(formula => formula.outerHTML),
    scrolls: document.documentElement.scrollWidth > window.innerWidth,
  };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_the_formulas_and_pictures_of_every_page(site: Path, browser: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    found = {}
    for name in PAGES:
        page.goto((site / f"{name}.html").as_uri())
        page.wait_for_load_state("load")
        found[name] = seen = page.evaluate(SEEN)
        assert not errors, name
        assert not seen["unloaded"] and not seen["wide"] and not seen["empty"], (name, seen)
        assert not seen["scrolls"], f"{name} scrolls sideways at {width} pixels"
    page.close()
    sources = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("functions", "numbers")}
    for name, text in sources.items():
        assert found[name]["formulas"] >= text.count("```math") > 0
    assert found["api"]["formulas"] >= 8
    assert found["numbers"]["images"] == 1, "one picture for each scheme"
    assert found["speed"]["images"] >= 4
