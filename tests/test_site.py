"""The site: built without a warning, every link of the built pages leads somewhere, and it is legible in a browser."""

from __future__ import annotations

import itertools
import json
import os
import posixpath
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe

import point_peft
from point_peft import backbones, geometry, training
from tests.browser import chromium, needs_chromium, served
from tools.site_api import PAGES, identifiers
from tools.site_docstrings import as_markdown
from tools.site_links import outside, rewritten

pytestmark = pytest.mark.pages

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "screenshots"
LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("object", "data")}
"""Elements that a browser asks for by itself."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    # The theme tells of its future at every start, which is no warning of ours.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stdout + built.stderr
    return folder


class Html(HTMLParser):
    """Places in a page that links may lead to, and what it leads to or loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str, str]] = []
        """(element, attribute, value)"""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src", "data") and value is not None:
                self.links.append((tag, name, value))


@cache
def parsed(path: Path) -> Html:
    return Html(path.read_text("utf-8"))


def wrong(site: Path, page: Path, element: tuple[str, str], value: str) -> bool:
    """True of a link that leads nowhere, or of something that another host is asked for."""
    url = urlsplit(value)
    if url.scheme or url.netloc:
        return element in LOADED and url.scheme != "data"
    start = "." if value.startswith("/") else str(page.parent.relative_to(site))
    target = site / posixpath.normpath(posixpath.join(start, unquote(url.path).lstrip("/")))
    target = page if not url.path else target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return True
    return bool(url.fragment) and unquote(url.fragment) not in parsed(target).anchors


def test_every_link_leads_somewhere_and_no_other_host_is_asked(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    broken = {
        f"{page.relative_to(site)}: {value}"
        for page in pages
        for tag, name, value in parsed(page).links
        if wrong(site, page, (tag, name), value)
    }
    assert not broken, "\n".join(sorted(broken))
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", sheet.read_text("utf-8")), sheet


def test_a_dead_link_and_a_foreign_script_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "a" / "index.html"
    page.parent.mkdir()
    page.write_text('<p id="here"><a name="there">')
    assert not wrong(tmp_path, page, ("a", "href"), "#here") and not wrong(tmp_path, page, ("a", "href"), "../a/#there")
    assert wrong(tmp_path, page, ("a", "href"), "../b/") and wrong(tmp_path, page, ("a", "href"), "#nowhere")
    assert not wrong(tmp_path, page, ("a", "href"), "https://arxiv.org/abs/1")
    assert wrong(tmp_path, page, ("script", "src"), "https://cdn.net/x.js")
    assert wrong(tmp_path, page, ("link", "href"), "//cdn.net/x.css")


def test_the_reference_has_every_public_name_once(site: Path) -> None:
    listed = identifiers()
    assert len(set(listed)) == len(listed)
    offered = {
        f"{module.__name__}.{name}"
        for module in (point_peft, training, backbones, geometry)
        for name in module.__all__
        if name != "__version__"
    }
    assert not offered - set(listed)
    for page in PAGES:
        anchors = parsed(site / page.place.removesuffix(".md") / "index.html").anchors
        assert set(page.identifiers()) <= anchors


def test_sources_are_shown_but_not_searched(site: Path) -> None:
    shown = parsed(site / "architecture" / "index.html").links
    assert ("a", "href", "../source/point_peft/model.py/") in shown
    source = re.sub(r"<[^>]+>", "", (site / "source/point_peft/model.py/index.html").read_text("utf-8"))
    assert "\ndef get_peft_model(" in source
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert "api/model/" in found and "contributing/" in found and not any(name.startswith("source/") for name in found)


def test_links_out_of_the_folder_are_led_to_places_on_the_site() -> None:
    text = (
        "[a](../CONTRIBUTING.md#style) [b](../point_peft/model.py) [c](files.md#folders) `[d](x.py)` [e](https://x.y)"
    )
    led = "[a](contributing.md#style) [b](source/point_peft/model.py.md) [c](files.md#folders) `[d](x.py)` [e](https://x.y)"
    assert rewritten("training.md", text) == led
    assert outside("training.md", text) == {"point_peft/model.py"}
    assert rewritten("methods/lora.md", "[a](../../README.md)") == "[a](../README.md)"
    assert (
        rewritten("contributing.md", "[a](docs/files.md)\n```\n[a](b.md)\n```\n")
        == "[a](files.md)\n```\n[a](b.md)\n```\n"
    )


def test_docstrings_become_markdown() -> None:
    text = "Adapts x_i * y_i by `LoraConfig`, see `lora`:\n\n    y = A x\n\n- one\n- two\n\n>>> f(1)\n2"
    assert as_markdown(text) == (
        "Adapts x\\_i \\* y\\_i by [`LoraConfig`][point_peft.LoraConfig], see `lora`:\n\n```text\ny = A x\n```\n\n"
        "- one\n- two\n\n```pycon\n>>> f(1)\n2\n```"
    )
    assert as_markdown("Of `LoraConfig`.", besides="LoraConfig") == "Of `LoraConfig`."


SHOWN = {"home": "", "method": "methods/point_peft/", "capabilities": "capabilities/", "api": "api/library/"}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
AUDITED = ("home", "method", "api")
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}


@needs_chromium
def test_it_is_legible_in_a_browser(site: Path) -> None:
    """On a desk and on a telephone: nothing is wider than the window or from another host, and axe finds nothing."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    seen: list[str] = []
    asked: set[str] = set()
    """Addresses, and errors of scripts."""
    with served(site) as address, chromium() as launched:
        for scheme, width in itertools.product(SCHEMES, (1280, 390)):
            context = launched.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            page.on("request", lambda request: asked.add(request.url))
            page.on("pageerror", lambda error: asked.add(str(error)))
            for name, place in SHOWN.items():
                page.goto(address + place)
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    seen.append(f"{name} is wider than {width}")
                page.screenshot(path=SCREENSHOTS / f"site_{name}_{scheme}_{width}.png")
                if width == 1280 and name in AUDITED:
                    found = Axe().run(page, options=RULES).response["violations"]
                    seen += [
                        f"{name}, {scheme}: {rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]
                    ]
            context.close()
        seen += [url for url in asked if not url.startswith(address)]
    assert not seen, "\n".join(seen)
