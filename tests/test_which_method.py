"""docs/which_method.md says nothing that the pages which it links to do not show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "which_method.md").read_text("utf-8")
NEEDS, ABLE, ANSWERS = re.split(r"^## .*$", PAGE, flags=re.MULTILINE)[1:]


def table(text: str) -> list[list[str]]:
    """The cells of the rows of a table, its head first."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not row[0].startswith("---")]


METHODS = table((DOCS / "methods.md").read_text("utf-8"))
CAPABILITIES = table((DOCS / "capabilities.md").read_text("utf-8"))
NOTES = dict(re.findall(r"^(\d)\. with (`.*`)$", ABLE, flags=re.MULTILINE))
COLUMNS = {
    "PTv3, Sonata": ("torch_pointcloud_ptv3", "torch_pointcloud_sonata"),
    "PTv1, PTv2": ("torch_pointcloud_ptv1", "torch_pointcloud_ptv2"),
}
"""Column of the page -> backbones of docs/capabilities.md."""


def capable(method: str, backbone: str) -> str:
    """The cell of docs/capabilities.md, without the number of a reason."""
    (row,) = [row for row in CAPABILITIES if row[0] == backbone]
    return re.sub(r" \(\d+\)$", "", row[CAPABILITIES[0].index(method)])


@pytest.mark.parametrize("row", table(ABLE)[1:], ids=lambda row: row[0])
def test_the_table_says_what_the_pages_say(row: list[str]) -> None:
    said = dict(zip(table(ABLE)[0], row, strict=True))
    method = said["method"].partition("methods/")[2].removesuffix(".md)").upper()
    rows = [dict(zip(METHODS[0], other, strict=True)) for other in METHODS if other[0].split(" ")[0] == method]
    (stated,) = [other for other in rows if other["trained, without head"] == said["trained"]][:1]
    assert stated["needs coordinates"] == said["coordinates"]
    if said["merges"].startswith("yes ("):
        assert {other["merges"] for other in rows} == {"yes", "no"}, "some of its forms merge"
    else:
        assert stated["merges"] == said["merges"]
    for column, backbones in COLUMNS.items():
        cell = re.sub(r"yes \((\d)\)", lambda found: NOTES[found[1]], said[column])
        assert {capable(method, backbone) for backbone in backbones} == {cell}, column


def test_every_method_is_in_the_table() -> None:
    beside = {"LINEAR_PROBE", "INPUT_ADAPTER", "ROUTING_BANK"}
    there = {row[0].partition("methods/")[2].removesuffix(".md)").upper() for row in table(ABLE)[1:]}
    assert there == set(CAPABILITIES[0][1:]) - beside
    able = {method for method in there if capable(method, "torch_pointcloud_point_mamba") == "yes"}
    assert able == {"LORA", "SSF", "BITFIT", "NORM_TUNING"}, "what the page says of backbones without attention"


@pytest.mark.parametrize("claim", [*NEEDS.splitlines(), *ANSWERS.split("\n\n")])
def test_every_figure_stands_on_a_page_that_is_linked_beside_it(claim: str) -> None:
    pages = set(re.findall(r"\]\(([\w/]+\.md)", claim))
    shown = " ".join((DOCS / page).read_text("utf-8") for page in pages)
    for figure in re.findall(r"\d+[.,]\d+|\d+e-\d|\d+x\d+", claim):
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d)", shown), f"{figure} is not on {sorted(pages)}"
