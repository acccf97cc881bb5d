"""Heads of an adapter's own: described in its file, built again from there, or asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    LinearProbeConfig,
    LoraConfig,
    PointPEFTConfig,
    PointPeftModel,
    TunerConfig,
    VPTConfig,
    get_peft_model,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.heads import HeadSource, PooledHead, PooledModule, make_head, mlp_head
from point_peft.backbones import PointTransformer
from point_peft.errors import AdapterError, AdapterFileError, AnatomyError, MatchError
from point_peft.files.head_description import build_head, describe_head
from point_peft.parts.backbone import Backbone
from tests.zoo import BACKBONES

HEAD = "cls_head_finetune"
CONFIG = PointPEFTConfig(memory_bank=False)
PLAIN = Backbone(model=nn.Identity(), modules={}, anatomy=None)


def backbone(**options: Any) -> PointTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"trans_dim": 48, "depth": 2, "num_heads": 4, "num_group": 16, "group_size": 8}
    return PointTransformer(**{**sizes, "encoder_dims": 48, "cls_dim": 5, **options}).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.randn(2, 128, 3, generator=torch.Generator().manual_seed(5)))
    return found


class Custom(nn.Module):
    """A head that a file cannot describe."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(x).sin()
        return found


class Other(Custom):
    """The same tensors, another forward."""


class Twice(nn.Module):
    """A backbone whose head has two names, and whose layers nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 96), nn.Linear(96, 5)
        self.second = nn.ModuleDict({"again": self.head})

    def forward(self, points: Tensor) -> Tensor:
        feature = self.layer(points).amax(1)
        found: Tensor = self.head(feature) + 2 * self.second["again"](feature)
        return found


def moved(model: PointPeftModel) -> PointPeftModel:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LoraConfig(), LinearProbeConfig()], ids=["LORA", "LINEAR_PROBE"])
def test_merged_for_good_a_head_takes_the_place_of_the_base_s(config: TunerConfig, dtype: torch.dtype) -> None:
    """Whatever its shape, in the base's type, trained and in train mode as that was; there is no head but this."""
    base = backbone().to(dtype)
    base.norm.requires_grad_(False)
    base.cls_head_finetune.requires_grad_(False)
    model = moved(get_peft_model(base, config, heads={HEAD: Custom}))
    points = torch.randn(2, 128, 3, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        expected = model(points)
        merged = model.merge_and_unload()
        assert merged is base and torch.allclose(merged(points), expected, atol=1e-5 if dtype is torch.float32 else 0.1)
    assert isinstance(base.get_submodule(HEAD), Custom) and {p.dtype for p in base.parameters()} == {dtype}
    assert {name.split(".")[0] for name, p in base.named_parameters() if not p.requires_grad} == {"norm", HEAD}
    assert not any(module.training for module in base.modules())


def test_a_head_of_two_names_is_replaced_under_both() -> None:
    config = LoraConfig(target_modules=["layer"], modules_to_save=["head"])
    model = moved(get_peft_model(Twice(), config, heads={"head": lambda: nn.Linear(96, 4)}))
    expected = logits(model)
    merged = model.train().merge_and_unload()
    assert isinstance(merged, Twice) and merged.second["again"] is merged.head and merged.head.out_features == 4
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert merged.head.training and all(p.requires_grad for p in merged.parameters())


def test_a_head_that_pools_by_itself_cannot_take_a_place() -> None:
    model = moved(get_peft_model(backbone(), LoraConfig(), heads={HEAD: "cls+max"}))
    expected = logits(model)
    with pytest.raises(AdapterError, match="cannot be merged: its PooledTokens at 'norm'"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(8, 16, 3, padding="same", padding_mode="circular", bias=False),
        nn.BatchNorm1d(16, momentum=None, affine=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Sequential(nn.Conv1d(16, 4, 1, stride=2, groups=2), nn.GroupNorm(2, 4), nn.GELU("tanh")),
        nn.Flatten(),
        nn.LogSoftmax(dim=1),
    )


def twelve() -> nn.Module:
    return nn.Sequential(*[layer for i in range(6) for layer in (nn.Linear(8 + i, 9 + i), nn.ReLU())])


def named() -> nn.Module:
    head = nn.Sequential()
    head.add_module("z", nn.Linear(8, 6))
    head.add_module("a", nn.Tanh())
    head.add_module("m", nn.LayerNorm([6], elementwise_affine=False))
    return head


def repeated() -> nn.Module:
    activation = nn.SiLU()
    return nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 8), activation)


MAKERS = [
    backbone,
    convolutions,
    twelve,
    named,
    repeated,
    lambda: nn.Linear(8, 3, bias=False),
    lambda: nn.Sequential(nn.Identity(), nn.Linear(8, 3), nn.Softmax(dim=-1)),
    lambda: nn.Sequential(nn.LayerNorm(8, bias=False), nn.Dropout(0.3), nn.Sigmoid()),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_head_of_standard_layers_is_built_again(make: Any) -> None:
    head = make()
    head = (head.cls_head_finetune if isinstance(head, PointTransformer) else head).eval()
    text = json.dumps(describe_head(head), sort_keys=True)
    built = build_head(json.loads(text), "head").eval()
    assert json.dumps(describe_head(built), sort_keys=True) == text
    assert str(built) == str(head)
    built.load_state_dict(head.state_dict())
    width = next((m for m in head.modules() if isinstance(m, (nn.Linear, nn.Conv1d))), None)
    shape = (2, 8, 6) if isinstance(width, nn.Conv1d) else (2, 96 if make is backbone else 8)
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(built(x), head(x))


def test_what_cannot_be_described_is_told_by_class_and_tensors() -> None:
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    hooked = nn.Linear(8, 3)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    for head in (Custom(), tied, hooked, nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)), nn.Bilinear(2, 2, 2)):
        description = json.loads(json.dumps(describe_head(head)))
        assert description["class"] == type(head).__qualname__ and "layer" not in description
        with pytest.raises(AdapterFileError, match=r"which a file cannot describe .*: pass heads=\{'h': module\}"):
            build_head(description, "h")
    assert describe_head(Custom(4)) != describe_head(Custom(5))
    with pytest.raises(AdapterFileError, match="the head 'h' is a 'Custom'"):
        build_head(describe_head(nn.Sequential(nn.ReLU(), Custom())), "h")


def linear(**arguments: Any) -> dict[str, Any]:
    return {"layer": "Linear", "arguments": {"in_features": 3, "out_features": 3, **arguments}}


def layer(name: str, **arguments: Any) -> dict[str, Any]:
    return {"layer": name, "arguments": arguments}


def nest(depth: int) -> Any:
    found: Any = linear()
    for _ in range(depth):
        found = {"layer": "Sequential", "layers": [["0", found]]}
    return found


@pytest.mark.parametrize(
    ("description", "match"),
    [
        (None, "the description of the head 'h' is not one: None"),
        ([], r"is not one: \[\]"),
        ({}, r"is not one: \{\}"),
        ({"layer": 3}, "is not one"),
        ("x" * 10**6, "is not one: 'x{70,80}"),
        ({"layer": "Bilinear", "arguments": {}}, "asks for a layer 'Bilinear'; known layers: Linear, "),
        ({"layer": "__import__", "arguments": {}}, "asks for a layer '__import__'"),
        ({"layer": "Linear"}, "asks for a layer 'Linear'"),
        ({**linear(), "more": 1}, "asks for a layer"),
        ({"layer": "Sequential", "layers": {"0": linear()}}, "asks for a layer 'Sequential'"),
        ({"layer": "Sequential", "layers": [linear()]}, "which is not|not a name and a layer"),
        ({"layer": "Sequential", "layers": [["a.b", linear()]]}, "a layer of the invalid name 'a.b'"),
        ({"layer": "Sequential", "layers": [["", linear()]]}, "a layer of the invalid name ''"),
        ({"layer": "Sequential", "layers": [["forward", linear()]]}, "a layer of the invalid name 'forward'"),
        ({"layer": "Sequential", "layers": [["a", linear()], ["a", linear()]]}, "a layer of the invalid name 'a'"),
        ({"layer": "Sequential", "layers": [[3, linear()]]}, "a layer of the invalid name 3"),
        ({"layer": "Sequential", "layers": [[str(i), linear()] for i in range(300)]}, "has more than 256 layers"),
        (nest(300), "has more than 256 layers"),
        (linear(in_features=0), "Linear cannot have in_features=0"),
        (linear(in_features=-3), "Linear cannot have in_features=-3"),
        (linear(in_features=10**9), "Linear cannot have in_features=1000000000"),
        (linear(in_features=True), "Linear cannot have in_features=True"),
        (linear(in_features=3.0), "Linear cannot have in_features=3.0"),
        (linear(bias="yes"), "Linear cannot have bias='yes'"),
        (linear(device="cuda"), "Linear has no argument 'device'"),
        (linear(dtype="float16"), "Linear has no argument 'dtype'"),
        (linear(kernel_size=3), "Linear has no argument 'kernel_size'"),
        (layer("Linear"), "Linear cannot be made"),
        (layer("Dropout", p=2.0), "Dropout cannot be made"),
        (layer("Dropout", p=float("nan")), "Dropout cannot have p=nan"),
        (layer("LeakyReLU", negative_slope="x"), "LeakyReLU cannot have negative_slope='x'"),
        (layer("GELU", approximate="x"), "GELU cannot have approximate='x'"),
        (layer("GroupNorm", num_groups=0, num_channels=4), "GroupNorm cannot have num_groups=0"),
        (layer("GroupNorm", num_groups=3, num_channels=4), "GroupNorm cannot be made"),
        (layer("LayerNorm", normalized_shape=[4] * 9), "LayerNorm cannot have normalized_shape"),
        (layer("LayerNorm", normalized_shape=[]), "LayerNorm cannot have normalized_shape"),
        (layer("BatchNorm1d", num_features=4, momentum="x"), "BatchNorm1d cannot have momentum='x'"),
        (layer("Softmax", dim=[0]), r"Softmax cannot have dim=\[0\]"),
        (layer("Identity", args=[1]), "Identity has no argument 'args'"),
        (layer("Conv1d", in_channels=2, out_channels=2, kernel_size=[1, 1, -1]), "Conv1d cannot have kernel_size"),
        (layer("Conv1d", in_channels=2, out_channels=2, kernel_size=1, padding={}), r"Conv1d cannot have padding=\{\}"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_refused(description: Any, match: str) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        build_head(description, "h")
    assert len(str(caught.value)) < 400


def test_a_module_is_copied_and_a_function_called() -> None:
    head = nn.Linear(2, 2)
    copied = make_head(head, "h", PLAIN)
    assert copied is not head and torch.equal(copied.get_parameter("weight"), head.weight)
    assert make_head(lambda: head, "h", PLAIN) is head
    for wrong, match in (
        (lambda: 3, r"heads\['h'\] must give an nn.Module, it gave a int"),
        (lambda: nn.Linear, r"heads\['h'\] must give an nn.Module, it gave a type"),
        (3, r"heads\['h'\] must be an nn.Module, a function that makes one, or the name of a pooled head, not 3"),
        (None, r"heads\['h'\] must be an nn.Module, a function that makes one, or the name of a pooled head, not None"),
    ):
        with pytest.raises(AdapterError, match=match):
            make_head(wrong, "h", PLAIN)  # type: ignore[arg-type]


def broken() -> nn.Module:
    raise RuntimeError("no head today")


@pytest.mark.parametrize(
    ("heads", "error", "match"),
    [
        ({HEAD: broken}, RuntimeError, "no head today"),
        ({HEAD: lambda: 3}, AdapterError, "must give an nn.Module"),
        ({HEAD: 3}, AdapterError, "must be an nn.Module"),
        ({"cls_haed": nn.Linear(96, 2)}, MatchError, "no module matches 'cls_haed'"),
    ],
)
def test_a_head_that_fails_leaves_the_model(heads: Any, error: Any, match: str, tmp_path: Path) -> None:
    base = backbone()
    flags = [(p.requires_grad, p.clone()) for p in base.parameters()]
    with pytest.raises(error, match=match):
        get_peft_model(base, CONFIG, heads=heads)
    get_peft_model(backbone(), CONFIG).save_pretrained(tmp_path)
    with pytest.raises(error, match=match):
        PointPeftModel.from_pretrained(base, tmp_path, heads=heads)
    now = [(p.requires_grad, p) for p in base.parameters()]
    assert all(old[0] == new[0] and torch.equal(old[1], new[1]) for old, new in zip(flags, now, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize("head", [nn.Linear(96, 7), nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 7))])
@pytest.mark.parametrize("name", [HEAD, None])
def test_another_head_travels_with_its_adapter(tmp_path: Path, head: nn.Module, name: str | None) -> None:
    base = backbone()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, CONFIG, heads={HEAD: head})
    expected = logits(model)
    assert expected.shape == (2, 7)
    model.save_pretrained(tmp_path)
    given = {name: head} if name else None
    again = PointPeftModel.from_pretrained(backbone(), tmp_path, heads=given)
    assert torch.equal(logits(again), expected)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert all(p.requires_grad for p in head.parameters())
    with again.disable_adapter():
        assert logits(again).shape == (2, 5)


def test_one_module_for_two_adapters_gives_each_its_own() -> None:
    head = nn.Linear(96, 7)
    model = get_peft_model(backbone(), CONFIG, heads={HEAD: head})
    model.add_adapter("b", CONFIG, heads={HEAD: head})
    seen: set[int] = set()
    for name in ("default", "b"):
        seen.update(id(p) for p in model.adapters[name].parameters())
    count = sum(len(list(model.adapters[name].parameters())) for name in ("default", "b"))
    assert len(seen) == count and not seen & {id(p) for p in head.parameters()}


def test_a_head_of_a_custom_class_is_asked_for(tmp_path: Path) -> None:
    model = get_peft_model(backbone(), CONFIG, heads={HEAD: Custom})
    model.save_pretrained(tmp_path)
    match = r"is a 'Custom', which a file cannot describe .*: pass heads=\{'cls_head_finetune': module\}"
    with pytest.raises(AdapterFileError, match=match):
        PointPeftModel.from_pretrained(backbone(), tmp_path)
    for heads in ({HEAD: Custom}, {HEAD: Custom(4)}):
        assert torch.equal(logits(PointPeftModel.from_pretrained(backbone(), tmp_path, heads=heads)), logits(model))
    with pytest.raises(AdapterFileError, match=r"'cls_head_finetune\.fc\.bias' is \(4\), this model needs \(9\)"):
        PointPeftModel.from_pretrained(backbone(), tmp_path, heads={HEAD: Custom(9)})
    # A base whose own head is of that class and shape needs no help, one of another class does.
    for head, fits in ((Custom(), True), (Other(), False), (Custom(6), False)):
        base = backbone()
        base.set_submodule(HEAD, head)
        if fits:
            assert torch.equal(logits(PointPeftModel.from_pretrained(base, tmp_path)), logits(model))
        else:
            with pytest.raises(AdapterFileError, match="is a 'Custom'"):
                PointPeftModel.from_pretrained(base, tmp_path)


def test_heads_for_a_module_that_the_adapter_has_not(tmp_path: Path) -> None:
    get_peft_model(backbone(), CONFIG).save_pretrained(tmp_path)
    with pytest.raises(MatchError, match=r"no module matches 'norm' \(heads\); nearest: none"):
        PointPeftModel.from_pretrained(backbone(), tmp_path, heads={"norm": nn.LayerNorm(48)})


# ---- pooled heads ----------------------------------------------------------------------------------------------------


def pooled_model(pool: HeadSource, config: TunerConfig | None = None, **options: Any) -> PointPeftModel:
    how = config or VPTConfig(mode="shallow", num_prompts=3, modules_to_save=[])
    return get_peft_model(backbone(**options), how, heads={HEAD: pool}).eval()


def own_head(model: PointPeftModel) -> PooledHead:
    (head,) = [part.module for _, part in get_adapter(model, "default").all_parts() if isinstance(part, PooledModule)]
    return head


def what_is_pooled(model: PointPeftModel, points: Tensor) -> tuple[Tensor, Tensor]:
    """The input of the head, and the tokens of the base after the final norm."""
    seen: list[Tensor] = []
    head = own_head(model)
    handles = [
        head.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        model.base_model.get_submodule("norm").register_forward_hook(lambda module, args, output: seen.append(output)),
    ]
    with torch.no_grad():
        model(points)
    for handle in handles:
        handle.remove()
    tokens, pooled = seen
    return pooled, tokens


def test_what_the_names_of_a_pooled_head_mean() -> None:
    points = torch.randn(3, 128, 3)
    pooled, tokens = what_is_pooled(pooled_model("cls+max+mean+prompt+all_max+all_mean"), points)
    cls, largest, mean, prompt, all_max, all_mean = pooled.chunk(6, dim=1)
    assert torch.equal(cls, tokens[:, 0]) and torch.equal(largest, tokens[:, 1:].amax(dim=1))
    assert torch.allclose(mean, tokens[:, 1:].mean(dim=1), atol=1e-6)
    assert (all_max >= largest).all() and not torch.equal(all_max, largest)
    assert torch.allclose(all_mean * 20, tokens.sum(dim=1) + 3 * prompt, atol=1e-4)


def test_a_named_head_takes_its_sizes_from_the_backbone() -> None:
    model = pooled_model("cls+prompt+max", cls_dim=7)
    first, *_, last = own_head(model)
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    assert (first.in_features, last.out_features) == (3 * 48, 7)
    assert logits(model).shape == (2, 7)


def test_a_pooled_head_without_prompts_is_the_backbones_own() -> None:
    """The pooling of Point-MAE itself, by name: the same numbers, with the weights of the backbone's head."""
    model = pooled_model(mlp_head(48, 5, "cls+max"), LinearProbeConfig(modules_to_save=[]))
    with model.disable_adapter():
        expected = logits(model)
    own_head(model).load_state_dict(model.base_model.get_submodule(HEAD).state_dict())
    assert torch.equal(logits(model), expected)


def test_a_pooled_head_survives_its_file(tmp_path: Path) -> None:
    model = pooled_model(mlp_head(48, 4, "cls+prompt+max", hidden=32, activation=nn.GELU))
    with torch.no_grad():
        for tensor in get_adapter(model, "default").tensors().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())["heads"][HEAD]
    assert described["layer"] == "PooledHead" and described["pool"] == "cls+prompt+max"
    torch.manual_seed(99)
    again = PointPeftModel.from_pretrained(backbone(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pool": "cls+thumb"}, r"the head 'h': a head pools 'cls\+thumb'; allowed: different ones of cls, max"),
        ({"pool": 3}, r"the description of the head 'h' is not one"),
        ({"extra": 1}, r"the description of the head 'h' is not one"),
    ],
)
def test_a_wrong_description_of_a_pooled_head_is_refused(change: dict[str, Any], match: str) -> None:
    description = {**describe_head(mlp_head(4, 2, "max")), **change}
    with pytest.raises(AdapterFileError, match=match):
        build_head(description, "h")


def test_pooled_heads_that_cannot_be() -> None:
    with pytest.raises(
        AdapterError, match=r"a head pools 'cls\+cls'; allowed: different ones of cls, max, mean, prompt"
    ):
        pooled_model("cls+cls")
    with pytest.raises(AdapterError, match=r"heads\['norm'\]='cls' .* number of classes .* last linear layer"):
        get_peft_model(backbone(), VPTConfig(modules_to_save=[]), heads={"norm": "cls"})
    with pytest.raises(AdapterError, match=r"a head pools prompts, and none of the adapter's methods leaves any"):
        logits(pooled_model("cls+prompt", LinearProbeConfig(modules_to_save=[])))
    with pytest.raises(AdapterError, match=r"pools 'feature', and 0 of the adapter's methods offer one"):
        logits(pooled_model("cls+feature"))
    packed = BACKBONES["pointcept_ptv3"]
    with pytest.raises(AnatomyError, match=r"pools the tokens of .* itself, and cannot: its tokens are packed"):
        get_peft_model(packed.build(), LinearProbeConfig(), heads={packed.heads[0]: "max"})
