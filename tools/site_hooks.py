"""What the site has besides the files under docs/: called by mkdocs, which mkdocs.yml tells of this file."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from tools.site_api import PAGES
from tools.site_links import MOVED, ROOT, outside, place_of, rewritten, source_page

LATER = {
    "tour.md",
    "concepts.md",
    "guarantees.md",
    "own_backbone.md",
    "own_method.md",
    "several_gpus.md",
    "serving.md",
    "sharing.md",
    "from_peft.md",
    "from_a_fork.md",
    "which_method.md",
    "troubleshooting.md",
}
"""Pages of the navigation that are being written: until they are there, they are left out."""
HIDDEN = {"README.md": ["navigation", "toc"], "capabilities.md": ["toc"], "methods.md": ["toc"]}
"""What pages go without, for the width of what is on them."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: a page for each method, and the reference."""
    folder = Path(config.docs_dir)
    nav: list[Any] = config.nav or []
    sections = {title: entry for item in nav for title, entry in item.items()}
    methods = sorted(path.name for path in (folder / "methods").glob("*.md") if path.name != "README.md")
    sections["Methods"] += [f"methods/{name}" for name in methods]
    sections["Reference"].append({"API": [{page.title: page.place} for page in PAGES]})
    config.nav = _there(nav, folder)
    return config


def _there(entries: list[Any], folder: Path) -> list[Any]:
    """Navigation without the pages that come later."""
    kept: list[Any] = []
    for entry in entries:
        titled = entry if isinstance(entry, dict) else {"": entry}
        ((title, value),) = titled.items()
        if isinstance(value, list):
            value = _there(value, folder)
        elif value in LATER and not (folder / value).exists():
            continue
        kept.append({title: value} if title else value)
    return kept


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not files under docs/."""
    for name, place in MOVED.items():
        if place != name:
            files.append(File.generated(config, place, content=(ROOT / name).read_text("utf-8")))
    for page in PAGES:
        files.append(File.generated(config, page.place, content=page.markdown()))
    led_to: set[str] = set()
    for file in files.documentation_pages():
        led_to |= outside(file.src_uri, file.content_string)
    for path in sorted(led_to):
        if (ROOT / path).exists():
            text, hidden = source_page(path), InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place_of(path), content=text, inclusion=hidden))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to places on the site; the API reference and source files have none to correct."""
    place = page.file.src_uri
    page.meta["hide"] = HIDDEN.get(place, [])
    if posixpath.dirname(place).split("/")[0] in ("api", "source"):
        return markdown
    return rewritten(place, markdown)
