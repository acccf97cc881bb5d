"""Docstrings as Markdown for the API reference: they are plain text, in which names stand between backticks."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

from point_peft.hub.card import markdown
from tools.site_api import identifiers

NAMES = {name.rpartition(".")[2]: name for name in identifiers()}


class PlainText(griffe.Extension):
    """Rewrites the docstring of every object that griffe has read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe once for each object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, besides=obj.name)


def as_markdown(text: str, *, besides: str = "") -> str:
    """A docstring as Markdown: examples and indented blocks become code, names of the API lead to their place.

    A name does not lead to itself: not the one of `besides`.
    """
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(_block(block, besides) for block in blocks)


def _block(block: str, besides: str) -> str:
    if block.startswith(">>>"):
        return f"```pycon\n{block}\n```"
    if block.startswith("    "):
        return f"```text\n{textwrap.dedent(block)}\n```"
    if block.startswith("|"):
        return block
    text = re.sub(r"(?<!\n)\n(?=- )", "\n\n", markdown(block)) if not block.startswith("- ") else markdown(block)
    return re.sub(r"`(\w+)`", lambda match: _linked(match[1], besides), text)


def _linked(name: str, besides: str) -> str:
    return f"[`{name}`][{NAMES[name]}]" if name in NAMES and name != besides else f"`{name}`"
