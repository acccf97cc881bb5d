"""point_peft's methods through PEFT's own functions."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import nn

import point_peft
from point_peft import AdapterError, AdapterFileError, BitFitConfig, LoraConfig, PointPEFTConfig, PointPeftModel
from point_peft.adapting.adapter import get_adapter
from tests.adapting import assert_same_values, banks, build_bank, fingerprint, plain, rescramble, run, unusual, values
from tests.methods import config
from tests.zoo import BACKBONES
from tests.zoo.operators import supply_torchvision_schemas
from tools import capabilities

supply_torchvision_schemas()
peft: Any = importlib.import_module("peft")
early_get_peft_model = peft.get_peft_model
integration: Any = importlib.import_module("point_peft.integrations.peft")

TINY = BACKBONES["point_mae"]
every_method = pytest.mark.parametrize("method", capabilities.labels("point_mae"))


def inside(model: Any) -> PointPeftModel:
    found = model.base_model.model
    assert isinstance(found, PointPeftModel)
    return found


def complete(model: PointPeftModel, name: str = "default", seed: int = 77) -> None:
    """Fill the bank, if there is one, and put all tensors at random values."""
    if banks(get_adapter(model, name)):
        build_bank(model, TINY, name)
    rescramble(model, name, seed)


def adapt(method: str = "LORA", seed: int = 77, **changes: Any) -> Any:
    """A PEFT model in eval mode with an adapter of random values."""
    torch.manual_seed(0)
    model = peft.get_peft_model(TINY.build(), config(method, **changes))
    complete(inside(model), seed=seed)
    return model.eval()


# ---- every method ----------------------------------------------------------------------------------------------------


@every_method
def test_the_output_is_that_of_point_peft(method: str) -> None:
    model = adapt(method)
    torch.manual_seed(0)
    own = point_peft.get_peft_model(TINY.build(), config(method))
    complete(own)
    output = run(model, TINY)
    assert isinstance(model, peft.PeftModel)
    assert torch.equal(output, run(own.eval(), TINY))
    assert not torch.equal(output, plain(TINY))
    assert model.get_nb_trainable_parameters() == own.get_nb_trainable_parameters()
    assert model.get_model_status() == own.get_model_status()
    assert model.get_layer_status() == own.get_layer_status()


@every_method
def test_disabled_it_is_the_backbone_bit_for_bit(method: str) -> None:
    model = adapt(method)
    adapted = run(model, TINY)
    with model.disable_adapter():
        assert torch.equal(run(model, TINY), plain(TINY))
    assert torch.equal(run(model, TINY), adapted)


@every_method
def test_files_are_read_by_both_packages(method: str, tmp_path: Path) -> None:
    model = adapt(method)
    model.save_pretrained(str(tmp_path))
    expected = run(model, TINY)
    torch.manual_seed(9)
    loaded = peft.PeftModel.from_pretrained(TINY.build(), str(tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(run(loaded, TINY), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(run(PointPeftModel.from_pretrained(TINY.build(), tmp_path).eval(), TINY), expected)


@every_method
def test_training_moves_the_adapter_alone(method: str) -> None:
    model = adapt(method).train()
    base = {name: tensor.clone() for name, tensor in TINY.build().state_dict().items()}
    before = {name: tensor.detach().clone() for name, tensor in get_adapter(inside(model), "default").tensors().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.autograd.backward(TINY.select(model(*TINY.inputs(4, 1))).square().mean())
    optimizer.step()
    after = get_adapter(inside(model), "default").tensors()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert_same_values(model.unload().state_dict(), base)


@every_method
def test_merging_is_what_point_peft_does(method: str) -> None:
    model, own = adapt(method), inside(adapt(method))
    expected = run(model, TINY)
    try:
        by_itself = own.merge_and_unload()
    except AdapterError as error:
        with pytest.raises(AdapterError) as refused:
            model.merge_and_unload()
        assert str(refused.value) == str(error)
        assert torch.equal(run(model, TINY), expected)
    else:
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is type(TINY.build())
        assert_same_values(merged.state_dict(), by_itself.state_dict())


@every_method
def test_unload_gives_the_backbone_as_it_was(method: str) -> None:
    backbone = unusual(TINY.build())
    before = fingerprint(backbone)
    model = peft.get_peft_model(backbone, config(method))
    assert model.get_base_model() is backbone
    assert model.unload() is backbone
    assert fingerprint(backbone) == before


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_adapters_of_different_methods_live_side_by_side() -> None:
    model = adapt("LORA")
    first = run(model, TINY)
    alone = model.get_nb_trainable_parameters()
    model.add_adapter("second", BitFitConfig())
    assert model.get_nb_trainable_parameters()[0] == alone[0]
    complete(inside(model), "second")
    assert torch.equal(run(model, TINY), first)
    model.set_adapter("second")
    assert model.active_adapters == ["second"] and model.active_adapter == "second"
    assert torch.equal(run(model, TINY), run(adapt("BITFIT"), TINY))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in get_adapter(inside(model), "second").parameters()}
    model.set_adapter("default", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad("default")
    assert model.get_nb_trainable_parameters()[0] == alone[0]
    assert torch.equal(run(model, TINY), first)
    with pytest.raises(ValueError, match="'second' already exists"):
        model.add_adapter("second", BitFitConfig())


def test_a_deleted_adapter_makes_place_for_the_first_of_the_others() -> None:
    model = adapt("LORA")
    model.add_adapter("second", BitFitConfig())
    complete(inside(model), "second")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"] and model.active_adapter == "second"
    assert torch.equal(run(model, TINY), run(adapt("BITFIT"), TINY))


def test_adapters_are_saved_where_peft_has_them(tmp_path: Path) -> None:
    model = adapt("LORA")
    model.add_adapter("second", BitFitConfig())
    complete(inside(model), "second")
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["peft_type"] == "POINT_PEFT"
    loaded = peft.PeftModel.from_pretrained(TINY.build(), str(tmp_path), is_trainable=True)
    assert loaded.get_nb_trainable_parameters()[0] > 0
    loaded.load_adapter(str(tmp_path), "second", subfolder="second")
    loaded.set_adapter("second")
    assert torch.equal(run(loaded.eval(), TINY), run(adapt("BITFIT"), TINY))


def test_an_adapter_is_loaded_in_the_place_of_another_or_not_at_all(tmp_path: Path) -> None:
    adapt("LORA", seed=1).save_pretrained(str(tmp_path / "fits"))
    point_peft_model = point_peft.get_peft_model(BACKBONES["recon"].build(), LoraConfig())
    point_peft_model.save_pretrained(tmp_path / "other", format="point_peft")
    model = adapt("BITFIT", seed=2)
    before = run(model, TINY)
    with pytest.raises(AdapterFileError):
        model.load_adapter(str(tmp_path / "other"), "default", is_trainable=True)
    assert torch.equal(run(model, TINY), before)
    model.load_adapter(str(tmp_path / "fits"), "default", is_trainable=True)
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model, TINY), run(adapt("LORA", seed=1), TINY))
    assert model.peft_config["default"].stated.tuners == (LoraConfig(),)


def test_a_backbone_that_an_adapter_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    adapt("LORA").save_pretrained(str(tmp_path))
    backbone = unusual(TINY.build())
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    before = fingerprint(backbone)
    with pytest.raises(AdapterFileError, match="other weights of the backbone"):
        peft.PeftModel.from_pretrained(backbone, str(tmp_path))
    assert fingerprint(backbone) == before


def test_a_head_of_another_shape_travels(tmp_path: Path) -> None:
    path, make = TINY.other_head
    own = point_peft.get_peft_model(TINY.build(), config("LORA"), heads={path: make})
    complete(own)
    own.save_pretrained(tmp_path, format="point_peft")
    loaded = peft.PeftModel.from_pretrained(TINY.build(), str(tmp_path))
    assert torch.equal(run(loaded, TINY), run(own.eval(), TINY))


# ---- configurations --------------------------------------------------------------------------------------------------


@every_method
def test_a_configuration_comes_back_as_it_was(method: str) -> None:
    stated = point_peft.PeftConfig(tuners=(config(method),), base_model_name_or_path="a/b")
    wrapped = integration.wrap(stated)
    assert wrapped.stated == stated
    model = peft.get_peft_model(TINY.build(), stated, revision="v1")
    assert get_adapter(inside(model), "default").config == stated.with_base("a/b", "v1")


def test_a_saved_configuration_begins_a_fresh_adapter(tmp_path: Path) -> None:
    adapt("LORA", r=3).save_pretrained(str(tmp_path))
    read = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert read.stated.tuners == (config("LORA", r=3),)
    for function in (peft.get_peft_model, early_get_peft_model):
        assert torch.equal(run(function(TINY.build(), read).eval(), TINY), plain(TINY))


def test_a_function_imported_before_takes_wrapped_configurations() -> None:
    assert early_get_peft_model is not peft.get_peft_model
    chosen = LoraConfig()
    torch.manual_seed(0)
    model = early_get_peft_model(TINY.build(), integration.wrap(chosen))
    complete(inside(model))
    assert torch.equal(run(model.eval(), TINY), run(adapt("LORA"), TINY))


def test_peft_s_own_configurations_go_to_peft() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], r=2))
    assert type(model.base_model) is peft.LoraModel
    assert model.get_nb_trainable_parameters()[0] == 16


# ---- what else is reached --------------------------------------------------------------------------------------------


def test_a_memory_bank_is_built_through_the_peft_model() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(TINY.build(), PointPEFTConfig(memory_bank=True))
    model.build_memory_bank([TINY.inputs(4, seed) for seed in (21, 22, 23, 24)], to_inputs=lambda args: args)
    rescramble(inside(model))
    assert torch.equal(run(model.eval(), TINY), run(adapt("POINT_PEFT"), TINY))


@every_method
def test_the_state_dict_of_an_adapter_is_that_of_its_file(method: str) -> None:
    model, other = adapt(method, seed=1), adapt(method, seed=2)
    for each in (model, other):
        each.add_adapter("second", BitFitConfig())
    state = peft.get_peft_model_state_dict(model)
    own = get_adapter(inside(model), "default").tensors()
    assert_same_values(state, {f"base_model.model.{name}": tensor for name, tensor in own.items()})
    loaded = peft.set_peft_model_state_dict(other, state)
    assert not loaded.unexpected_keys
    assert torch.equal(run(other, TINY), run(model, TINY))


def test_adapters_of_lora_are_combined() -> None:
    model = adapt("LORA", modules_to_save=[])
    model.add_weighted_adapter(["default"], [1.0], "sum", "cat")
    expected = run(model, TINY)
    model.set_adapter("sum")
    assert torch.allclose(run(model, TINY), expected, atol=1e-5)


def test_the_trainable_parameters_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapt("LORA")
    model.print_trainable_parameters()
    trainable, total = inside(model).get_nb_trainable_parameters()
    assert f"trainable params: {trainable:,d} || all params: {total:,d}" in capsys.readouterr().out


def test_merging_can_be_taken_back() -> None:
    model = adapt("LORA", modules_to_save=[])
    before = run(model, TINY)
    model.merge_adapter()
    assert torch.allclose(run(model, TINY), before, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(run(model, TINY), before)
    with pytest.raises(AdapterError, match="one adapter can be merged at a time"):
        model.merge_and_unload(adapter_names=["default", "second"])


def test_copies_are_independent_and_equal() -> None:
    model = adapt("LORA")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, TINY), run(model, TINY))
        assert_same_values(values(other), values(model))
        rescramble(inside(other), seed=5)
        assert not torch.equal(run(other, TINY), run(model, TINY))


def test_an_adapter_comes_from_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt("LORA")
    repository = tmp_path / "models--someone--clouds"
    model.save_pretrained(str(repository / "snapshots" / ("0" * 40)))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, "utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = peft.PeftModel.from_pretrained(TINY.build(), "someone/clouds", cache_dir=tmp_path)
    assert torch.equal(run(loaded, TINY), run(model, TINY))


# ---- refusals --------------------------------------------------------------------------------------------------------


def linear() -> Any:
    return peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))


def test_peft_s_adapters_and_ours_are_not_mixed() -> None:
    model = adapt("LORA")
    names = list(model.peft_config)
    with pytest.raises(AdapterError, match="LoraConfig is a configuration of PEFT"):
        model.add_adapter("second", peft.LoraConfig(target_modules=["qkv"]))
    assert list(model.peft_config) == names
    with pytest.raises(AdapterError, match="PEFT's methods cannot be put on top of point_peft's"):
        peft.get_peft_model(model.get_base_model(), peft.LoraConfig(target_modules=["qkv"]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        linear().add_adapter("second", LoraConfig())
    for adapted in (linear(), linear().get_base_model()):
        with pytest.raises(AdapterError, match="PEFT has adapted this"):
            peft.get_peft_model(adapted, LoraConfig())
    with pytest.raises(AdapterError, match="mixed is True"):
        peft.get_peft_model(TINY.build(), LoraConfig(), mixed=True)
    with pytest.raises(ValueError, match="Please use `get_peft_model` instead"):
        peft.inject_adapter_in_model(integration.wrap(LoraConfig()), TINY.build())


def test_a_mixed_model_of_peft_refuses_ours() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]), mixed=True)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        model.add_adapter("second", LoraConfig())


def test_files_other_than_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="safetensors only"):
        adapt("LORA").save_pretrained(str(tmp_path), safe_serialization=False)
    adapt("LORA").save_pretrained(str(tmp_path), is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_peft_is_optional_and_the_hub_s_client_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys\nsys.modules['peft'] = None\nimport point_peft\n"
        "assert not {'huggingface_hub.hf_api', 'huggingface_hub.file_download'} & sys.modules.keys()\n"
        "try:\n    import point_peft.integrations.peft\n"
        "except ImportError as error:\n    assert 'pip install point-peft[peft]' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
