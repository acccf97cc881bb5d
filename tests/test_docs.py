"""The README and the pages under docs/: short enough, links that lead somewhere, code that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from point_peft import LoraConfig, get_peft_model
from point_peft.backbones import default_backbone

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNING = ["README.md", "docs/training.md", "docs/tasks.md"]
"""Pages whose code is complete, block after block."""


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} leads to {target}"


@pytest.mark.parametrize("page", RUNNING)
@pytest.mark.filterwarnings("ignore:the memory bank is empty:UserWarning")
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks((ROOT / page).read_text("utf-8"), page)


def run_blocks(text: str, page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_code_on_many_adapters_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section on comparing has runs to compare, which `tests/test_compare_command.py` makes."""
    page = "docs/many_adapters.md"
    text, _ = (ROOT / page).read_text("utf-8").split("## Comparing two adapters")
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(default_backbone(cls_dim=10), LoraConfig())
    model.eval()(torch.rand(2, 256, 3))
    model.save_pretrained("adapters/kitchen/grasp")
    run_blocks(text, page)
