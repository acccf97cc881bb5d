"""docs/sharing.md, followed on a Hub on the loopback; and what its table says goes wrong there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from point_peft import LoraConfig, PointPeftError, PointPeftModel, cli, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.hub import asking
from tests.following import follow
from tests.hub_server import HubServer

pytest_plugins = ["tests.hub_fixture"]

TEXT = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text("utf-8")


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_the_page(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asking, "time", SimpleNamespace(sleep=lambda seconds: None))
    model = get_peft_model(default_backbone(cls_dim=10), LoraConfig(r=4))
    model.eval()(torch.rand(2, 256, 3))
    model.save_pretrained("runs/first")
    hub.put("alice/backbone", {"README.md": b"---\nlicense: mit\n---\n"})
    names: dict[str, Any] = {}
    follow(TEXT, names)

    assert hub.repo("alice/digits").private and hub.repo("alice/first").private
    assert Path("adapter/adapter_model.safetensors").exists()
    assert {"even/adapter_config.json", "adapter_config.json"} <= set(hub.files("alice/tasks"))
    assert "2026/even/adapter_config.json" in hub.files("alice/runs")
    assert names["digits"].adapters.keys() == {"default", "again", "even"}
    clouds = torch.rand(2, 256, 3)
    expected = names["model"].eval()(clouds, adapter_names=["default", "default"])
    for loaded in ("digits", "first", "offline"):
        assert torch.equal(names[loaded].eval()(clouds, adapter_names=["default", "default"]), expected)
    assert b"0.887" in hub.files("alice/digits", "v1")["README.md"]
    assert b"0.891" in hub.files("alice/digits")["README.md"]


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_the_table_says_what_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "time", SimpleNamespace(sleep=lambda seconds: None))
    repo = "alice/digits"
    torch.manual_seed(0)
    model = get_peft_model(default_backbone(cls_dim=10), LoraConfig(r=4, modules_to_save=[]))
    model.eval()(torch.rand(2, 256, 3))

    def pull(**where: Any) -> None:
        PointPeftModel.from_pretrained(default_backbone(cls_dim=10), **{"source": repo, **where})

    def gated() -> None:
        model.push_to_hub("alice/gated")
        hub.repo("alice/gated").gated = "manual"
        pull(source="alice/gated", token="hf_bob")

    def in_a_subfolder() -> None:
        model.push_to_hub("alice/runs", subfolder="run")
        pull(source="alice/runs")

    def others() -> None:
        model.push_to_hub(repo)
        model.push_to_hub(repo, token="hf_bob")

    mistakes = [
        pull,
        gated,
        others,
        lambda: pull(revision="v2"),
        in_a_subfolder,
        lambda: model.push_to_hub(repo, private=True),
        lambda: pull(source="alice/never", local_files_only=True),
        lambda: pull(),  # the head was drawn at random, with another seed
    ]
    said = re.findall(r"^\| `(.+?)` \| ", TEXT.split("## What can go wrong")[1], flags=re.MULTILINE)
    for words, mistake in zip(said, mistakes, strict=True):
        with pytest.raises(PointPeftError, match=".*".join(map(re.escape, words.split(" … ")))):
            mistake()
    assert cli.main(["pull", "alice/never", "folder"]) == 2
