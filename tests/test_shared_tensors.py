"""Tensors that lie in the same memory under two names: nothing changes one of them behind the other's back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import METHODS, AdapterError, AdapterFileError, LoraConfig, PointPeftModel, get_peft_model
from tests.adapting import complete, every_method, fingerprint, move, run, tensors
from tests.methods import HEADS_ALONE, config
from tests.zoo import BACKBONES, TinyBackbone

PLAIN = BACKBONES["compact"]
FIRST, SECOND = "blocks.blocks.0", "blocks.blocks.1"


def shared(how: str) -> TinyBackbone:
    """The tensors of the second block are those of the first: the parameters themselves, or others in their memory."""

    def make() -> nn.Module:
        base = PLAIN.build()
        modules = dict(base.named_modules())
        for path in [path for path in modules if path.startswith(FIRST)]:
            other = modules[path.replace(FIRST, SECOND)]
            for name, parameter in modules[path]._parameters.items():
                if parameter is not None:
                    setattr(other, name, parameter if how == "parameter" else nn.Parameter(parameter.data))
        if how == "parameter":
            base.add_module("classifier", base.get_submodule("cls_head_finetune"))  # a second name of one module
        return base

    return dataclasses.replace(PLAIN, name=f"compact that shares, by {how}", make=make)


@pytest.mark.parametrize("how", ["parameter", "memory"])
@pytest.mark.parametrize("method", [method for method in sorted(METHODS) if method not in HEADS_ALONE])
def test_merging_names_both_and_leaves_the_base(method: str, how: str) -> None:
    backbone = shared(how)
    base = backbone.make().eval()
    model = get_peft_model(base, config(method, modules_to_save=[]))
    complete(model, backbone, "default", 0, fresh=False)
    before, output = fingerprint(base), run(model, backbone)
    said = rf"'{FIRST}\.(\S+)' is the same memory as '{SECOND}\.\1'"
    try:
        get_peft_model(PLAIN.build(), config(method, modules_to_save=[])).merge()
    except AdapterError as error:  # as it does on a base whose tensors are not shared
        said = re.escape(str(error))
    for merge in (model.merge, model.merge_and_unload):
        with pytest.raises(AdapterError, match=said):
            merge()
        assert fingerprint(base) == before and not model.merged_adapters
    assert torch.equal(run(model, backbone), output)


def test_the_case_that_was_reported() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.second(self.first(x).relu())
            return output

    for targets in (["second"], ["first", "second"]):
        model = get_peft_model(Two(), LoraConfig(r=2, target_modules=targets, modules_to_save=[]))
        move(model)
        x = torch.randn(5, 6)
        before = model(x)
        with pytest.raises(AdapterError, match=r"'(first|second)\.weight' is the same memory as '(first|second)\.w"):
            model.merge()
        assert torch.equal(model(x), before)


def test_views_of_one_tensor_that_do_not_overlap_are_merged() -> None:
    flat = torch.randn(2, 6, 6)
    base: Any = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    base[0].weight, base[2].weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=[]))
    move(model)
    x = torch.randn(5, 6)
    before = model(x)
    model.merge()
    assert torch.allclose(model(x), before, atol=1e-5)
    base[2].weight = nn.Parameter(flat[0].T)
    model.unmerge()
    model = get_peft_model(model.unload(), LoraConfig(target_modules=["0"], modules_to_save=[]))
    with pytest.raises(AdapterError, match=r"'0\.weight' is the same memory as '2\.weight'"):
        model.merge()


def test_weights_that_another_module_reads_and_a_second_owns_are_refused() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.beside = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)
            self.beside.weight = self.attention.out_proj.weight

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.attention(x, x, x)[0] + self.beside(x)
            return output

    base = Reading()
    before = fingerprint(base)
    said = r"'attention\.out_proj' is not called, 'attention' reads its weights, .* as 'beside\.weight'"
    with pytest.raises(AdapterError, match=said):
        get_peft_model(base, LoraConfig(target_modules=["attention.out_proj"], modules_to_save=[]))
    assert fingerprint(base) == before


@every_method
def test_files_fit_any_base_with_the_same_tensors(method: str, tmp_path: Path) -> None:
    """Shared or not, under one name or two; and only what an adapter takes from its base has to be the same."""
    backbone = shared("parameter")
    model = get_peft_model(backbone.make(), config(method)).eval()
    complete(model, backbone, "default", 0, fresh=False)
    model.save_pretrained(tmp_path)
    fresh: Any = backbone.make()
    with torch.no_grad():  # the adapter has its own
        for parameter in fresh.cls_head_finetune.parameters():
            parameter.add_(1.0)
    again = PointPeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(run(again, backbone), run(model, backbone))
    with torch.no_grad():
        fresh = backbone.make()
        fresh.get_parameter(f"{FIRST}.mlp.0.weight")[0, 0] += 1.0
    with pytest.raises(AdapterFileError, match="this adapter belongs to other weights of the backbone"):
        PointPeftModel.from_pretrained(fresh, tmp_path)


def test_a_head_that_a_function_gives_is_the_adapters_own() -> None:
    base = PLAIN.build()
    model = get_peft_model(
        base, LoraConfig(), heads={"cls_head_finetune": lambda: base.get_submodule("cls_head_finetune")}
    )
    model.add_adapter(
        "second", LoraConfig(), heads={"cls_head_finetune": lambda: base.get_submodule("cls_head_finetune")}
    )
    known = {id(p) for p in base.parameters()}
    for name in ("default", "second"):
        assert known.isdisjoint(map(id, tensors(model, name).values()))
        known |= set(map(id, tensors(model, name).values()))
    assert not any(p.requires_grad for p in base.parameters())
    head = nn.Linear(48, 5)
    model.add_adapter("third", LoraConfig(), heads={"cls_head_finetune": lambda: head})
    with pytest.raises(AdapterError, match="'fourth' has tensors of another adapter.* must make a new module"):
        model.add_adapter("fourth", LoraConfig(), heads={"cls_head_finetune": lambda: head})
