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

HIDDEN = {"README.md": ["navigation", "toc"], "capabilities.md": ["toc"], "methods.md": ["toc"]}
"""What pages go without, for the width of what is on them."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: a page for each method, and the reference."""
    nav: list[Any] = config.nav or []
    sections = {title: entry for item in nav for title, entry in item.items()}
    methods = sorted(path.name for path in Path(config.docs_dir, "methods").glob("*.md") if path.name != "README.md")
    sections["Methods"] += [f"methods/{name}" for name in methods]
    sections["Reference"].append({"API": [{page.title: page.place} for page in PAGES]})
    return config


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
