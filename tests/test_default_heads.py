"""Default heads: whatever lies between the last block and the output and is no pre-training checkpoint's to fill.

The layouts are those of the official segmentation code by their names; what is inside of their heads is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from point_peft import (
    Anatomy,
    LinearProbeConfig,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftModel,
    describe,
    get_peft_model,
    inject_adapter,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.anatomy.presets import known_anatomy
from point_peft.backbones import HierarchicalPointTransformerPartSeg, PointTransformer
from point_peft.backbones.part_segmentation import FeaturePropagation
from point_peft.tracing.understanding import trace
from tests.adapting import assert_same_values, every_method, fingerprint, move, tensors
from tests.methods import config
from tests.zoo import BACKBONES, CLASSES, LABELS, WIDTH, clouds, labelled_clouds
from tests.zoo.library import transformer
from tests.zoo.pointgpt import PointGPTPartSeg

LAYOUTS = {
    "Point-BERT part": "propagation_2 propagation_1 propagation_0 dgcnn_pro_1 dgcnn_pro_2 conv1 bn1 conv2",
    "ACT part": "label_conv_cls propagation_0_cls convs1_cls bns1_cls convs2_cls bns2_cls convs3_cls",
    "ACT scene": "propagation_0_cls convs1_cls bns1_cls convs2_cls bns2_cls convs3_cls",
    "PCP-MAE scene": "propagation_0_cls convs1_cls bns1_cls convs2_cls bns2_cls convs3_cls",
    "Point-MAE part": "label_conv propagation_0 convs1 bns1 convs2 bns2 convs3",
    "nobody's": "neck my_decoder out",
}


class Official(nn.Module):
    """The encoder of the Point-MAE family, and layers by the names of a published head, one after another."""

    whole: PointTransformer

    def __init__(self, heads: Sequence[str], **options: Any) -> None:
        super().__init__()
        whole = transformer(**options)
        self.__dict__["whole"] = whole  # not a child
        del whole.cls_head_finetune
        for name, module in whole.named_children():
            self.add_module(name, module)
        self.names = heads
        for name in heads:
            self.add_module(name, nn.LayerNorm(WIDTH) if "bn" in name else nn.Linear(WIDTH, WIDTH))
        for name, parameter in list(whole.named_parameters(recurse=False)):
            self.register_parameter(name, parameter)

    def forward(self, points: Tensor) -> Tensor:
        tokens: Tensor = self.whole.forward_features(points)
        for name in self.names:
            tokens = self.get_submodule(name)(tokens)
        return tokens


class WithSide(Official):
    """A branch beside the encoder feeds the head: it is called before any block, and after."""

    def __init__(self) -> None:
        super().__init__(["cls_head_finetune"])
        self.side = nn.Linear(3, WIDTH)
        self.side_projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, points: Tensor) -> Tensor:
        side = self.side(points).amax(1)
        tokens: Tensor = self.whole.forward_features(points).amax(1)
        logits: Tensor = self.get_submodule("cls_head_finetune")(tokens + self.side_projection(side))
        return logits


def hierarchical() -> HierarchicalPointTransformerPartSeg:
    model = HierarchicalPointTransformerPartSeg(
        num_groups=(16, 8, 4),
        group_sizes=(8, 4, 4),
        encoder_dims=(12, 24, 24),  # the upper two alike
        encoder_depths=(1, 1, 1),
        local_radius=(0.8, 1.2, 1.6),
        num_heads=4,
        num_labels=LABELS,
    )
    # Their published widths, up to 6,208 channels, take most of the time.
    model.propagations = nn.ModuleList(FeaturePropagation(dim, (16,)) for dim in (12, 24, 24))
    model.convs1, model.bns1 = nn.Conv1d(2 * 48 + 64, 16, 1), nn.BatchNorm1d(16)
    model.convs2, model.bns2 = nn.Conv1d(16, 16, 1), nn.BatchNorm1d(16)
    model.convs3, model.bns3 = nn.Conv1d(16, 16, 1), nn.BatchNorm1d(16)
    model.convs4 = nn.Conv1d(16, CLASSES, 1)
    return model


HIERARCHICAL = "label_conv propagations.0 propagations.1 propagations.2 convs1 bns1 convs2 bns2 convs3 bns3 convs4"


def ways_to_know(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Anatomy]:
    known = known_anatomy(model)
    assert known is not None
    return {"preset": known, "trace": trace(model, args, {}), "both": describe(model, *args)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_of_an_official_head_is_one(layout: str) -> None:
    names = LAYOUTS[layout].split()
    options: dict[str, Any] = {"Point-BERT part": {"encoder_dims": 16}, "PCP-MAE scene": {"pos_features": "sine"}}
    model = Official(names, **options.get(layout, {})).eval()
    for way, anatomy in ways_to_know(model, clouds(3, 1)).items():
        assert sorted(anatomy.heads) == sorted(names), way
        assert anatomy.final_norms == ("norm",), way


@every_method
def test_the_default_of_every_method_trains_them(method: str) -> None:
    names = LAYOUTS["Point-BERT part"].split()
    how = config(method)
    model = get_peft_model(Official(names), how).eval()
    assert sorted(get_adapter(model, "default").saved) == sorted(names)


def test_a_branch_beside_the_encoder_is_a_head() -> None:
    names = {"cls_head_finetune", "side", "side_projection"}
    for way, anatomy in ways_to_know(WithSide().eval(), clouds(3, 1)).items():
        assert set(anatomy.heads) == names, way
        assert not names.intersection(anatomy.stem), way
    model = get_peft_model(WithSide(), LinearProbeConfig(), example_inputs=clouds(3, 1))
    model(*clouds(2, 0)).square().sum().backward()
    trained = {name for name, p in model.adapters.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[2] for name in trained} == names


def test_the_norms_of_the_levels_belong_to_the_encoder() -> None:
    for way, anatomy in ways_to_know(hierarchical().eval(), labelled_clouds(3, 1)).items():
        assert sorted(anatomy.heads) == sorted(HIERARCHICAL.split()), way
        assert anatomy.final_norms == ("h_encoder.encoder_norms.2",), way


class Held(nn.Module):
    """A model that holds the backbone, a decoder that it runs and one that it does not, and a further branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"backbone": Official(["neck"])})
        self.branches = nn.ModuleList([nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, points: Tensor) -> Tensor:
        tokens: Tensor = self.inner["backbone"](points)
        pooled: Tensor = tokens.amax(1) + self.branches[1](self.branches[0](points).amax(1))
        return pooled


def test_what_a_wrapper_has_beside_is_a_head_and_what_it_does_not_call_is_left_out_where_that_is_seen() -> None:
    ways = ways_to_know(Held().eval(), clouds(3, 1))
    run = {"inner.backbone.neck", "branches.0", "branches.1"}
    assert set(ways["preset"].heads) == {*run, "spare"}
    assert set(ways["trace"].heads) == set(ways["both"].heads) == run


def test_adapters_in_a_model_are_no_heads() -> None:
    model = BACKBONES["point_mae"].build()
    before = describe(model)
    assert describe(inject_adapter(model, LinearProbeConfig())) == before
    assert describe(get_peft_model(BACKBONES["point_mae"].build(), LinearProbeConfig())) == before


class RenamedHead(PointGPTPartSeg):
    """By structure it is a classifying PointGPT, whose final norm is `blocks.ln_f`."""

    def __init__(self) -> None:
        super().__init__()
        self.carry = self._modules.pop("propagation_0")

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("carry" if name == "propagation_0" else name)


@pytest.mark.parametrize("make", [PointGPTPartSeg, RenamedHead])
def test_a_norm_that_nothing_reads_is_not_the_final_one(make: Callable[[], nn.Module]) -> None:
    args = labelled_clouds(3, 1)
    adapted = get_peft_model(make(), PointPEFTConfig(memory_bank=False), example_inputs=args).eval()
    assert adapted.anatomy is not None and adapted.anatomy.final_norms == ("norm",)
    adapted(*args).square().sum().backward()
    without = [name for name, p in adapted.adapters.named_parameters() if p.grad is None]
    assert without == []


# ---- what stays frozen though nothing has filled it ------------------------------------------------------------------


PART = LAYOUTS["Point-MAE part"].split()


@every_method
def test_a_head_that_is_left_out_is_named_in_one_warning_and_in_the_report(method: str) -> None:
    *left, last = PART
    some, all_of_them = (PeftConfig(tuners=(config(method),), modules_to_save=names) for names in ([last], PART))
    with pytest.warns(UserWarning, match="frozen, and no pre-training fills") as caught:
        model = get_peft_model(Official(PART), some)
    assert len(caught) == 1 and str(caught[0].message).startswith(
        f"frozen, and no pre-training fills: {', '.join(map(repr, left))}. If"
    )
    assert f"frozen, and no pre-training fills: {', '.join(left)}" in model.trainable_parameters_report()
    with pytest.warns(UserWarning, match="fills: .*'bns2'\\."):
        model.add_adapter("second", some)
    whole = get_peft_model(Official(PART), all_of_them)
    assert "no pre-training fills" not in whole.trainable_parameters_report()


def test_an_empty_list_says_that_no_head_is_to_be_trained() -> None:
    model = get_peft_model(Official(PART), LoraConfig(modules_to_save=[]))
    assert f"frozen, and no pre-training fills: {', '.join(PART)}" in model.trainable_parameters_report()


def test_of_a_head_that_is_trained_in_part_the_rest_is_named() -> None:
    base = BACKBONES["point_mae"].build
    with pytest.warns(UserWarning, match=r"fills: 'cls_head_finetune.0', .*'cls_head_finetune.5'\."):
        get_peft_model(base(), LoraConfig(modules_to_save=["cls_head_finetune.8"]))
    for whole in (["cls_head_finetune"], ["cls_head_finetune", "norm"], None):
        get_peft_model(base(), LoraConfig(modules_to_save=whole))


def test_a_warning_that_is_an_error_leaves_the_model_and_a_file_does_not_warn(tmp_path: Path) -> None:
    base = Official(PART)
    other, before = copy.deepcopy(base), fingerprint(base)
    with pytest.raises(UserWarning, match="frozen, and"):
        get_peft_model(base, LoraConfig(modules_to_save=["convs3"]))
    assert fingerprint(base) == before
    with pytest.warns(UserWarning, match="frozen, and"):
        model = get_peft_model(base, LoraConfig(modules_to_save=["convs3"]))
    move(model)
    model.save_pretrained(tmp_path)
    again = PointPeftModel.from_pretrained(other, tmp_path)
    assert_same_values(tensors(again), tensors(model))


@every_method
def test_a_prefix_token_that_stays_frozen_is_in_the_report(method: str) -> None:
    """Point-MAE's pre-training leaves out the class token and its position; if not kept, they are others each time."""
    model = get_peft_model(BACKBONES["point_mae"].build(), config(method))
    states = list(get_adapter(model, "default").shared_states())
    own = {name for state in states for name in state.tuned_tokens | state.kept_tokens}
    line = "frozen, and some pre-trainings leave out: cls_token, cls_pos"
    assert (line in model.trainable_parameters_report()) == (not own)
