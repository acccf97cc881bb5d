"""Adapters that point_peft and PEFT read from each other: the same outputs, or an error that says why not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AdapterFileError,
    BitFitConfig,
    LoraConfig,
    PeftConfig,
    PointPeftError,
    PointPeftModel,
    get_peft_model,
    inject_adapter,
)
from point_peft.backbones import PointTransformer
from point_peft.files.format import CONFIG_FILE, TENSOR_FILE, sha256
from tests.peft_package import peft

SIZES: dict[str, Any] = {
    "trans_dim": 48, "depth": 2, "num_heads": 4, "num_group": 16, "group_size": 8, "encoder_dims": 48, "cls_dim": 5,
}  # fmt: skip


class Net(nn.Module):
    """Linear layers, convolutions and a head with normalisation; the name of one layer ends that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, stride=2, padding=1)
        self.point = nn.Conv1d(8, 12, 1, bias=False)
        self.fc = nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"fc": nn.Linear(12, 12), "out": nn.Linear(12, 12)})
        self.head = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.relu(self.conv(x.transpose(1, 2)))).amax(-1)
        x = x + self.inner["out"](torch.relu(self.inner["fc"](torch.tanh(self.fc(x)))))
        found: Tensor = self.head(x)
        return found


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return PointTransformer(**SIZES).eval()


def clouds() -> Tensor:
    return torch.randn(3, 128, 3, generator=torch.Generator().manual_seed(5))


def randomise(tensors: Any, seed: int = 3) -> None:
    """Move what is trained, and statistics, so that nothing is as it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
            else:
                tensor.add_(7)


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(clouds())
    return found


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def ours(base: Callable[[], nn.Module], config: LoraConfig | PeftConfig) -> PointPeftModel:
    model = get_peft_model(base(), config)
    randomise([*model.adapters.parameters(), *model.adapters.buffers()])
    return model.eval()


def theirs(base: Callable[[], nn.Module], **fields: Any) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), peft.LoraConfig(**fields))
    mine = [p for p in model.parameters() if p.requires_grad]
    randomise([*mine, *(b for name, b in model.named_buffers() if "modules_to_save" in name)])
    model.eval()
    return model


def read_by_peft(base: Callable[[], nn.Module], folder: Path) -> Any:
    """PEFT's model, read in another state of the random numbers and with all warnings as errors."""
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(base(), str(folder)).eval()


LAYERS = ["conv", "point", "fc", "inner.out"]
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (transformer, {"r": 4, "lora_alpha": 6, "target_modules": ["qkv", "fc1"], "modules_to_save": []}),
    "rslora": (net, {"r": 4, "use_rslora": True, "target_modules": ["fc"], "modules_to_save": []}),
    "one ends as another": (net, {"target_modules": "fc", "modules_to_save": []}),
    "conv": (net, {"r": 2, "target_modules": LAYERS, "modules_to_save": []}),
    "dora": (transformer, {"r": 3, "use_dora": True, "target_modules": ["qkv", "fc2"], "modules_to_save": []}),
    "dora conv": (net, {"r": 3, "use_dora": True, "target_modules": LAYERS, "modules_to_save": []}),
    "head": (net, {"r": 3, "target_modules": LAYERS, "modules_to_save": ["head"]}),
    "patterns": (
        net,
        {
            "target_modules": ["conv", "fc", "out"],
            "modules_to_save": ["head"],
            "rank_pattern": {"^fc": 3, "co.v": 2, "inner.fc": 5},
            "alpha_pattern": {"out": 2.5, "^fc": 9},
            "use_rslora": True,
        },
    ),
    "dropout": (net, {"lora_dropout": 0.4, "use_dora": True, "target_modules": ["fc"], "modules_to_save": []}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_write(case: str, tmp_path: Path) -> None:
    base, fields = CASES[case]
    model = ours(base, LoraConfig(**fields))
    model.save_pretrained(tmp_path, format="peft")
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["peft_type"] == "LORA"
    assert not torch.allclose(out(model), out(base()), atol=1e-3)
    close(out(read_by_peft(base, tmp_path)), out(model))


@pytest.mark.parametrize("case", CASES)
def test_we_read_what_peft_writes(case: str, tmp_path: Path) -> None:
    base, fields = CASES[case]
    model = theirs(base, **{**fields, "modules_to_save": fields["modules_to_save"] or None})
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(99)
    loaded = PointPeftModel.from_pretrained(base(), tmp_path)
    assert not torch.allclose(out(model), out(base()), atol=1e-3)
    close(out(loaded), out(model))
    again = tmp_path / "again"
    loaded.save_pretrained(again, format="peft")
    close(out(read_by_peft(base, again)), out(model))


@pytest.mark.parametrize("case", CASES)
def test_we_read_what_we_write_for_peft(case: str, tmp_path: Path) -> None:
    base, fields = CASES[case]
    model = ours(base, LoraConfig(**fields))
    model.save_pretrained(tmp_path / "one")
    loaded = PointPeftModel.from_pretrained(base(), tmp_path / "one")
    assert torch.equal(out(loaded), out(model))
    assert loaded.adapters["default"].config == model.adapters["default"].config
    loaded.save_pretrained(tmp_path / "two")
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_patterns_that_overlap_go_by_their_order(tmp_path: Path) -> None:
    """PEFT sorts the keys when it saves, and cannot read what it wrote; we write whole paths."""
    ranks = {"inner.fc": 5, "fc": 3}
    model = ours(net, LoraConfig(target_modules=["fc"], rank_pattern=ranks, modules_to_save=[]))
    model.save_pretrained(tmp_path / "ours", format="peft")
    close(out(read_by_peft(net, tmp_path / "ours")), out(model))
    assert list(json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())["rank_pattern"].values()) == [3, 5]
    theirs(net, target_modules=["fc"], rank_pattern=ranks).save_pretrained(str(tmp_path / "theirs"))
    for read in (read_by_peft, lambda base, folder: PointPeftModel.from_pretrained(base(), folder)):
        with pytest.raises((RuntimeError, AdapterFileError), match=r"inner\.fc\.lora_A"):
            read(net, tmp_path / "theirs")


def test_peft_passes_on_what_it_read_from_us(tmp_path: Path) -> None:
    model = ours(net, LoraConfig(target_modules=LAYERS, modules_to_save=["head"]))
    model.save_pretrained(tmp_path / "ours")
    read_by_peft(net, tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    close(out(PointPeftModel.from_pretrained(net(), tmp_path / "theirs")), out(model))


def test_a_head_keeps_its_statistics(tmp_path: Path) -> None:
    model = ours(net, LoraConfig(target_modules=["fc"], modules_to_save=["head"]))
    model.train()
    for _ in range(3):
        model(clouds())
    model.eval()
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSOR_FILE)
    assert int(tensors["base_model.model.head.1.num_batches_tracked"]) == 10
    close(out(read_by_peft(net, tmp_path)), out(model))
    assert torch.equal(out(PointPeftModel.from_pretrained(net(), tmp_path)), out(model))


# ---- what PEFT cannot say --------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, dilation=2)
        self.round = nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.LayerNorm(4)
        self.pre_norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)
        self.same = self.fc
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = (self.conv(x) + self.round(x)[..., 4:]).transpose(1, 2)
        x = self.norm(self.same(self.fc(self.pre_norm(x))))
        found: Tensor = self.attention(x, x, x)[0]
        return found


def odd() -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval()


UNSAYABLE: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "methods": (
        transformer,
        PeftConfig(tuners=[LoraConfig(), BitFitConfig()]),
        {},
        "PEFT reads LORA alone, this adapter is LORA and BITFIT",
    ),
    "qkv": (transformer, LoraConfig(qkv=["q", "v"]), {}, r"LoraConfig\.qkv: PEFT adapts all rows of '.*qkv' or none"),
    "head": (
        transformer,
        LoraConfig(),
        {"heads": {"cls_head_finetune": nn.Linear(96, 3)}},
        "'cls_head_finetune' is built otherwise than the base's",
    ),
    "read": (odd, LoraConfig(target_modules=["attention"]), {}, "'attention' is not called, its weight is read"),
    "dilation": (odd, LoraConfig(target_modules=["conv"]), {}, "'conv' is an nn.Conv1d with dilation or a padding"),
    "padding": (odd, LoraConfig(target_modules=["round"]), {}, "'round' is an nn.Conv1d with dilation or a padding"),
    "twice": (odd, LoraConfig(target_modules=["fc"]), {}, "'fc' is a module under two names"),
    "saved": (
        odd,
        LoraConfig(target_modules=["attention.out_proj"], modules_to_save="norm"),
        {},
        "'attention.out_proj' is not called",
    ),
    "suffix": (
        odd,
        LoraConfig(target_modules="fc|conv", exclude_modules=["fc"], modules_to_save="norm"),
        {},
        "'conv' is an nn.Conv1d",
    ),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_peft_cannot_say_is_saved_in_our_format(case: str, tmp_path: Path) -> None:
    base, config, options, match = UNSAYABLE[case]
    model = get_peft_model(base(), config, **options)
    randomise(model.adapters.parameters())
    with pytest.raises(AdapterError, match=f"adapter 'default' cannot be saved in PEFT's format: .*{match}"):
        model.save_pretrained(tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
    model.save_pretrained(tmp_path / "auto")
    assert json.loads((tmp_path / "auto" / CONFIG_FILE).read_text())["peft_type"] == "POINT_PEFT"
    assert torch.equal(out(PointPeftModel.from_pretrained(base(), tmp_path / "auto")), out(model.eval()))


def test_a_saved_module_whose_name_ends_another_is_not_for_peft(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.pre_norm = nn.Linear(3, 3), nn.LayerNorm(3), nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(self.fc(self.pre_norm(x)))
            return found

    model = get_peft_model(Small(), LoraConfig(target_modules=["fc"], modules_to_save="norm"))
    with pytest.raises(AdapterError, match="modules_to_save: PEFT would take 'pre_norm' for 'norm'"):
        model.save_pretrained(tmp_path, format="peft")


def test_the_format_is_a_choice(tmp_path: Path) -> None:
    model = ours(net, LoraConfig(target_modules=["fc"], modules_to_save=[]))
    model.save_pretrained(tmp_path, format="point_peft")
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["peft_type"] == "POINT_PEFT"
    assert torch.equal(out(PointPeftModel.from_pretrained(net(), tmp_path)), out(model))
    with pytest.raises(PointPeftError, match="format is 'onnx'; allowed: 'auto', 'peft', 'point_peft'"):
        model.save_pretrained(tmp_path, format="onnx")  # type: ignore[arg-type]


# ---- what we do not read ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    theirs(net, target_modules=["fc", "conv"], modules_to_save=["head"]).save_pretrained(str(folder))
    return folder


def changed(written: Path, tmp_path: Path, **fields: Any) -> Path:
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in (CONFIG_FILE, TENSOR_FILE):
        (folder / file).write_bytes((written / file).read_bytes())
    config = {**json.loads((folder / CONFIG_FILE).read_text()), **fields}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


ACTIVE: dict[str, Any] = {
    "fan_in_fan_out": True,
    "bias": "all",
    "lora_bias": True,
    "layers_pattern": "blocks",
    "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1],
    "target_parameters": ["weight"],
    "velora_config": {"num_groups": 64},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 1},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"a": 1},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_what_is_not_implemented_is_refused_by_name(name: str, written: Path, tmp_path: Path) -> None:
    folder = changed(written, tmp_path, **{name: ACTIVE[name]})
    with pytest.raises(AdapterFileError, match=f"{name}=.* of PEFT's LoraConfig is not implemented here"):
        PointPeftModel.from_pretrained(net(), folder)


def test_every_field_of_pefts_configuration_is_known(written: Path) -> None:
    PointPeftModel.from_pretrained(net(), written)
    stated = set(json.loads((written / CONFIG_FILE).read_text()))
    assert stated >= set(ACTIVE) and "lora_ga_config" in stated


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changes_the_base_is_refused(init: str, written: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=f"init_lora_weights='{init}' .* changes the base's weights"):
        PointPeftModel.from_pretrained(net(), changed(written, tmp_path, init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_other_initialisations_are_read(init: Any, written: Path, tmp_path: Path) -> None:
    folder = changed(written, tmp_path, init_lora_weights=init)
    close(out(PointPeftModel.from_pretrained(net(), folder)), out(PointPeftModel.from_pretrained(net(), written)))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"surprise": 1}, "PEFT's LoraConfig has no field 'surprise'"),
        ({"r": 3}, r"'conv\.lora_A\.weight' is \(8, 3, 3\), this model needs \(3, 3, 3\)"),
        ({"r": "8"}, "LoraConfig.r is '8'; allowed: an integer"),
        ({"use_dora": True}, "lacks the tensor 'conv.lora_magnitude_vector' and 2 more"),
        ({"target_modules": ["fc"]}, "has a tensor 'conv.lora_A.weight' and 1 more that the adapter has not"),
        ({"target_modules": ["qkv"]}, r"target_modules=\['qkv'\] of PEFT's LoraConfig means none here; nearest:"),
        ({"target_modules": None}, "target_modules=None of PEFT's LoraConfig is neither a list nor a string"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_modules": ["fc", "conv", "head.1"], "modules_to_save": None}, "'head.1' is a BatchNorm1d"),
        ({"modules_to_save": None}, "has a tensor 'head.0.bias' and 8 more that the adapter has not"),
        ({"modules_to_save": "head"}, "modules_to_save='head' of PEFT's LoraConfig is not a list of names"),
        ({"rank_pattern": [1]}, r"rank_pattern of PEFT's LoraConfig is \[1\], not an object"),
        ({"rank_pattern": {"fc": "x"}}, "LoraConfig.rank_pattern is {'fc': 'x'}; allowed: a mapping of a string to an"),
        ({"alpha_pattern": {"(": 3}}, "is not a regular expression"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform=.* must be numbers"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; this version reads 'POINT_PEFT' and 'LORA'"),
    ],
)
def test_a_wrong_configuration_is_refused(fields: dict[str, Any], match: str, written: Path, tmp_path: Path) -> None:
    folder, base = changed(written, tmp_path, **fields), net()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(AdapterFileError, match=match) as caught:
        PointPeftModel.from_pretrained(base, folder)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_what_peft_passes_over_is_passed_over(written: Path, tmp_path: Path) -> None:
    fields = {
        "target_modules": ["fc", "conv", "q_proj"],
        "exclude_modules": ["lm_head"],
        "modules_to_save": ["head", "classifier"],
        "rank_pattern": {"q_proj": 4},
    }
    folder = changed(written, tmp_path, **fields)
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
        expected = out(peft.PeftModel.from_pretrained(net(), str(folder)).eval())
    close(out(PointPeftModel.from_pretrained(net(), folder)), expected)
    close(out(read_by_peft(net, written)), expected)


def test_layers_to_transform_as_peft_counts_them(tmp_path: Path) -> None:
    model = theirs(transformer, target_modules=["qkv", "fc1"], layers_to_transform=[1])
    model.save_pretrained(str(tmp_path))
    loaded = PointPeftModel.from_pretrained(transformer(), tmp_path)
    assert {row.name for row in loaded.get_layer_status()} == {"blocks.blocks.1.attn.qkv", "blocks.blocks.1.mlp.fc1"}
    close(out(loaded), out(model))


def test_another_base_cannot_be_told_but_other_shapes_can(written: Path) -> None:
    torch.manual_seed(7)
    PointPeftModel.from_pretrained(Net(), written)  # PEFT's files do not say which base they belong to
    wide = Net()
    wide.conv = nn.Conv1d(3, 8, 5, stride=2, padding=2)
    with pytest.raises(AdapterFileError, match=r"'conv.lora_A.weight' is \(8, 3, 3\), this model needs \(8, 3, 5\)"):
        PointPeftModel.from_pretrained(wide, written)
    torch.manual_seed(7)
    other = Net()
    ours(net, LoraConfig(target_modules=["fc"], modules_to_save=[])).save_pretrained(written / "ours")
    with pytest.raises(AdapterFileError, match="other weights of the backbone"):
        PointPeftModel.from_pretrained(other, written / "ours")


def test_a_folder_of_peft_is_a_further_adapter(written: Path, tmp_path: Path) -> None:
    model = ours(net, LoraConfig(target_modules=["fc"], modules_to_save=["head"]))
    expected = out(model)
    model.load_adapter(written, "theirs", is_trainable=True)
    assert model.active_adapters == ("default",) and torch.equal(out(model), expected)
    assert all(parameter.requires_grad for parameter in model.adapters["theirs"].parameters())
    with model.use_adapter("theirs"):
        close(out(model), out(read_by_peft(net, written)))
    model.save_pretrained(tmp_path, "theirs", format="peft")
    close(out(read_by_peft(net, tmp_path)), out(read_by_peft(net, written)))


def test_a_model_that_keeps_its_class_exchanges_too(written: Path, tmp_path: Path) -> None:
    model = inject_adapter(net(), LoraConfig(target_modules=["fc"], modules_to_save=["head"]))
    held: Any = model.point_peft
    randomise(held.adapters.parameters())
    held.save_pretrained(tmp_path, format="peft")
    close(out(read_by_peft(net, tmp_path)), out(model))
    held.load_adapter(written, "theirs")
    held.set_adapter("theirs")
    close(out(model), out(read_by_peft(net, written)))


def test_a_dilated_convolution_of_peft_is_refused(written: Path) -> None:
    base = Net()
    base.conv.dilation = (2,)
    with pytest.raises(AdapterFileError, match="is not what PEFT makes for this model: 'conv' is an nn.Conv1d with"):
        PointPeftModel.from_pretrained(base, written)


@pytest.mark.parametrize("widens", [True, False])
def test_an_adapter_in_another_type_takes_that_of_the_base_if_asked_to(written: Path, widens: bool) -> None:
    model = PointPeftModel.from_pretrained(net().bfloat16(), written, autocast_adapter_dtype=widens)
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32 if widens else torch.bfloat16}
    assert torch.isfinite(model(clouds().bfloat16())).all()


# ---- our files in PEFT's format --------------------------------------------------------------------------------------


def edited(folder: Path, **fields: Any) -> None:
    config = {**json.loads((folder / CONFIG_FILE).read_text()), **fields}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_a_configuration_edited_by_hand_counts(tmp_path: Path) -> None:
    model = ours(net, LoraConfig(r=4, target_modules=["fc"], modules_to_save=["head"]))
    model.save_pretrained(tmp_path)
    edited(tmp_path, lora_alpha=2, base_model_name_or_path="me/mine")
    loaded = PointPeftModel.from_pretrained(net(), tmp_path)
    config = loaded.adapters["default"].config
    assert isinstance(config, PeftConfig) and config.base_model_name_or_path == "me/mine"
    close(out(loaded), out(read_by_peft(net, tmp_path)))
    assert not torch.allclose(out(loaded), out(model), atol=1e-4)
    edited(tmp_path, modules_to_save=None)
    with pytest.raises(AdapterFileError, match=r"made for other modules: this model lacks 1 of its 3 \('head'\)$"):
        PointPeftModel.from_pretrained(net(), tmp_path)


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    ours(net, LoraConfig(target_modules=["fc"], modules_to_save=[])).save_pretrained(tmp_path)
    digest = sha256((tmp_path / CONFIG_FILE).read_bytes())
    tensors = safetensors.torch.load_file(tmp_path / TENSOR_FILE)
    for record, match in (
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"peft_type": "LORA"}', "lacks heads or adapted_modules"),
        ('{"peft_type": "POINT_PEFT", "format_version": 2}', "a newer point_peft is needed"),
    ):
        metadata = {"config_sha256": digest, "point_peft": record}
        (tmp_path / TENSOR_FILE).write_bytes(safetensors.torch.save(tensors, metadata=metadata))
        with pytest.raises(AdapterFileError, match=match):
            PointPeftModel.from_pretrained(net(), tmp_path)
