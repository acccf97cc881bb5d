"""docs/from_peft.md: its code runs with both packages, and each name of its tables is where the page says."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import point_peft
from point_peft import AdapterError, MatchError, PeftConfig, PointPeftModel, initialise
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from tests.following import follow
from tests.peft_package import peft

import_module("peft.utils.hotswap")
PAGE = Path(__file__).parents[1] / "docs" / "from_peft.md"
TEXT = PAGE.read_text("utf-8")
CLOUDS = torch.rand(2, 64, 3)
LACKING = "–"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[*cells, ""] for cells in table[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def have(package: object, model: type[Any], name: str) -> bool:
    """Tell whether a package has the name, or its models where it begins with `model.`, or a function that argument."""
    if name.startswith("model."):
        return hasattr(model, name.removeprefix("model.").removeprefix("base_model."))
    try:
        functools.reduce(getattr, name.split("."), package)
    except AttributeError:
        functions = [model.forward, point_peft.get_peft_model, point_peft.LoraConfig]
        return package is point_peft and any(name in inspect.signature(function).parameters for function in functions)
    return True


class Both(peft.PeftModel, peft.LoraModel):
    """Of a model of PEFT, one looks names up in its tuner too; what only objects have is stated."""

    peft_config = modules_to_save = None


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(TEXT, {}, PAGE.name)
    assert (tmp_path / "back" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("heading", ["Functions and methods", "Other methods"])
def test_each_name_is_where_it_is_said_to_be(heading: str) -> None:
    model = get_model()
    for theirs, ours, *_ in rows(heading):
        assert names(theirs), theirs
        for name in names(theirs):
            assert have(peft, Both, name) or name == "adapter_names", f"PEFT has no {name}"
        assert ours == LACKING or names(ours), ours
        for name in names(ours):
            in_model = hasattr(model, name.removeprefix("model.")) if name.startswith("model.") else False
            assert in_model or have(point_peft, PointPeftModel, name), f"point_peft has no {name}"
        if ours == LACKING:
            assert not any(hasattr(point_peft, name) for name in names(theirs))


def test_each_field_of_lora_is_there_once_and_as_the_page_says() -> None:
    own = {field.name for field in dataclasses.fields(point_peft.LoraConfig)}
    said = [(name, here) for theirs, here, *_ in rows("Fields of LoraConfig") for name in names(theirs)]
    assert sorted(name for name, _ in said) == sorted(field.name for field in dataclasses.fields(peft.LoraConfig))
    same = {name for name, here in said if here == "same"}
    assert same == own.intersection(name for name, _ in said)
    of_adapters = {name for name, here in said if here == "`PeftConfig`"}
    assert of_adapters <= {field.name for field in dataclasses.fields(PeftConfig)}
    only_here = names(TEXT.split("Only here: ")[1].split("Where a file")[0])
    assert set(only_here) == own - same


# ---- what the tables say of PEFT ------------------------------------------------------------------------------------


def backbone() -> PointTransformer:
    torch.manual_seed(0)
    sizes = {"trans_dim": 24, "depth": 2, "num_heads": 2, "encoder_dims": 24, "num_group": 8, "group_size": 8}
    return PointTransformer(**sizes, cls_dim=3)  # type: ignore[arg-type]


def get_model() -> PointPeftModel:
    return point_peft.get_peft_model(backbone(), point_peft.LoraConfig(r=4))


def test_peft_takes_several_names_in_the_tuner_only_and_moves_requires_grad() -> None:
    config = {"r": 4, "target_modules": ["qkv"]}
    theirs = peft.get_peft_model(backbone(), peft.LoraConfig(**config))
    theirs.add_adapter("second", peft.LoraConfig(**config))
    with pytest.raises(TypeError, match="unhashable"):
        theirs.set_adapter(["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    theirs.set_adapter("second")
    trained = {name.split(".")[-2] for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained == {"second"}

    ours = get_model()
    ours.add_adapter("second", point_peft.LoraConfig(r=4))
    ours.freeze_adapter("second")
    ours.set_adapter(["default", "second"])
    ours.set_adapter("second")
    trained = {name.split(".")[1] for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {"default"}
    ours.set_adapter([])
    assert ours.active_adapters == ()


def test_what_matches_nothing_is_silent_there_and_an_error_here() -> None:
    entries = ["qkv", "there_is_none"]
    peft.get_peft_model(backbone(), peft.LoraConfig(target_modules=entries))
    with pytest.raises(MatchError, match="'there_is_none'"):
        point_peft.get_peft_model(backbone(), point_peft.LoraConfig(target_modules=entries))
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        peft.get_peft_model(backbone(), peft.LoraConfig())


def test_pissa_writes_into_the_base_there_and_leaves_it_here() -> None:
    before = dict(backbone().named_parameters())
    name = "blocks.blocks.0.attn.qkv"
    theirs = peft.get_peft_model(backbone(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights="pissa"))
    ours = point_peft.get_peft_model(backbone(), point_peft.LoraConfig(init_lora_weights="pissa"))
    assert not torch.equal(theirs.base_model.model.get_submodule(name).base_layer.weight, before[f"{name}.weight"])
    assert all(torch.equal(value, before[key]) for key, value in ours.base_model.named_parameters())


def test_a_head_takes_the_place_of_the_base_s_there_and_here(tmp_path: Path) -> None:
    fields = {"target_modules": ["qkv"], "modules_to_save": ["cls_head_finetune"]}
    theirs = peft.get_peft_model(backbone(), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = PointPeftModel.from_pretrained(backbone(), tmp_path).eval()
    merged, same = theirs.merge_and_unload(), ours.merge_and_unload()
    assert isinstance(same, PointTransformer) and not torch.allclose(same(CLOUDS), backbone().eval()(CLOUDS), atol=1e-3)
    assert torch.allclose(same(CLOUDS), merged(CLOUDS), atol=1e-5)
    assert list(same.state_dict()) == list(merged.state_dict()) == list(backbone().state_dict())
    with pytest.raises(AdapterError, match="its own 'cls_head_finetune' is not a change of the backbone's weights; me"):
        get_model().merge()


def test_the_other_calls_of_the_table(tmp_path: Path) -> None:
    ours = get_model().eval()
    adapter = get_adapter(ours, "default")
    assert ours.adapters["default"] is adapter and isinstance(adapter.config, PeftConfig)
    assert "blocks.blocks.0.attn.qkv.lora_A.weight" in adapter.tensors()
    assert ours(CLOUDS, adapter_names=["default", None]).shape == (2, 3)
    ours.save_pretrained(tmp_path)
    ours.swap_adapter_(tmp_path)
    initialise(ours, [torch.rand(8, 64, 3)], "eva")
    injected = point_peft.inject_adapter(backbone(), point_peft.LoraConfig())
    assert isinstance(injected, PointTransformer)
