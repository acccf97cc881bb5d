"""The page of capabilities refuses what is refused, and what is not on it is tested all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from point_peft import METHODS
from tests.methods import ToyConfig
from tests.zoo import BACKBONES, TinyBackbone
from tools import capabilities


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_what_the_page_calls_unsupported_is_refused(backbone: TinyBackbone) -> None:
    """Pairs that it calls supported, and the changes for them, are run by the matrix of `tests/test_conformance.py`."""
    page = capabilities.known()
    for method in sorted(METHODS):
        assert (method, backbone.name) in page, "write the page anew: python -m tools.capabilities"
        for changes in capabilities.configurations(method):
            if capabilities.spell(changes) == page[method, backbone.name]:
                break
            why = capabilities.refusal(METHODS[method](**changes), backbone)
            assert why, f"{method} works with {capabilities.spell(changes)}: python -m tools.capabilities"


def test_a_method_or_backbone_that_the_page_lacks_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capabilities.labels("a new one") == sorted(METHODS)
    monkeypatch.setitem(METHODS, "TOY", ToyConfig)
    assert "TOY" in capabilities.labels("point_mae")
    assert capabilities.probe("TOY", BACKBONES["point_mae"]) == ("yes", "")
    text = capabilities.page({"point_mae": dict.fromkeys(METHODS, ("yes", ""))})
    assert f"| backbone | {' | '.join(sorted(METHODS))} |" in text and "TOY" in METHODS


def test_a_refusal_is_on_the_page_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {"LORA": ("yes", ""), "POINT_PEFT": ("no", "'blocks.0' (3, 17, 24) has no place"), "OTHER": ("a=1", "")}
    other = {**answers, "POINT_PEFT": ("no", "'layers.7' (2, 9, 16) has no place")}
    text = capabilities.page({"one": answers, "two": other})
    assert "| one | yes | `a=1` | no (1) |" in text and "| two | yes | `a=1` | no (1) |" in text
    assert "1. … … has no place" in text and "2." not in text
    page = tmp_path / "capabilities.md"
    page.write_text(text, encoding="utf-8")
    monkeypatch.setattr(capabilities, "PAGE", page)
    assert capabilities.known()["POINT_PEFT", "two"] is None
    assert capabilities.known()["OTHER", "one"] == "a=1"
    assert not any("POINT_PEFT" in label for label in capabilities.labels("one"))


def test_labels_stand_for_configurations() -> None:
    assert capabilities.labelled("LORA") == ("LORA", {})
    assert capabilities.labelled("POINT_PEFT[adapter_scale=0.0]") == ("POINT_PEFT", {"adapter_scale": 0.0})
