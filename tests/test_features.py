"""Clouds (b, n, 6) of points with colours or normals: every method fits, or says that it does not before it changes
anything."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn

from point_peft import AnatomyError, GAPromptConfig, PointPeftError, geometry, get_peft_model
from point_peft.backbones import PointTransformer
from point_peft.backbones.layers import Encoder
from tests.adapting import adapt, every_method, fingerprint, loss_of, run
from tests.methods import config
from tests.zoo import BACKBONES, TinyBackbone
from tests.zoo.library import transformer
from tests.zoo.parts import GROUP_SIZE, GROUPS, PatchNet
from tests.zoo.variants import Classifier
from tools import capabilities


class GroupOfOne(nn.Module):
    """Groups (b, g, k, 6) of clouds (b, n, 6) that are one tensor, and the centres (b, g, 3)."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        xyz = points[:, :, :3].contiguous()
        centres = geometry.gather(xyz, geometry.farthest_point_sample(xyz, GROUPS))
        groups = geometry.gather(points, geometry.knn(centres, xyz, GROUP_SIZE))
        return groups - nn.functional.pad(centres, (0, 3))[:, :, None], centres


class OfficialOfOne(PointTransformer):
    """Point-MAE whose grouping is given all six values of a point."""

    def forward_features(self, points: Tensor) -> Tensor:
        neighborhood, center = self.group_divider(points)
        tokens = self._prepend("token", self.reduce_dim(self.encoder(neighborhood)))
        tokens = self.blocks(tokens, self._prepend("pos", self.pos_embed(center)), (self.depth - 1,))[0]
        normed: Tensor = self.norm(tokens)
        return normed


class TokenizerOfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sampler = GroupOfOne()
        self.net = PatchNet(6)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        patches, centres = self.sampler(points)
        return self.net(patches), centres


def _of_two_tensors() -> nn.Module:
    model = transformer(in_channels=6)
    model.encoder = Encoder(24, inputs=6, widths=(16, 32, 32))
    return model


def _official() -> nn.Module:
    model = OfficialOfOne(trans_dim=24, depth=2, num_heads=4, encoder_dims=24, cls_dim=5)
    model.encoder = Encoder(24, inputs=6, widths=(16, 32, 32))
    model.add_module("group_divider", GroupOfOne())
    return model


def _traced() -> nn.Module:
    model = Classifier()
    model.tokenizer = TokenizerOfOne()
    return model


FEATURED = BACKBONES["point_features"]
MODELS = {
    backbone.name: backbone
    for backbone in (
        dataclasses.replace(FEATURED, name="of two tensors", make=_of_two_tensors, heads=("cls_head_finetune",)),
        dataclasses.replace(FEATURED, name="official", make=_official, heads=("cls_head_finetune",)),
        dataclasses.replace(FEATURED, name="traced", make=_traced),
    )
}
each_model = pytest.mark.parametrize("backbone", MODELS.values(), ids=MODELS)


@each_model
@every_method
def test_it_fits_or_is_refused_before_anything_is_changed(backbone: TinyBackbone, method: str) -> None:
    base = backbone.build()
    before = fingerprint(base)
    for changes in capabilities.configurations(method):
        how = config(method, **changes)
        try:
            get_peft_model(base, dataclasses.replace(how, anatomy=backbone.traced))
        except PointPeftError as error:
            assert fingerprint(base) == before
            assert re.search(r"set \w+=|use a method", str(error)), error
            continue
        model = adapt(backbone, how)
        loss_of(backbone.select(model(*backbone.inputs(3, 1)))).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.adapters.parameters())
        break


def test_gaprompt_is_refused_in_planning_where_the_grouping_is_given_all_in_one_tensor() -> None:
    official = MODELS["official"]
    with pytest.raises(AnatomyError, match=r"'group_divider' is given hold 6 values of a point.*set shift=False and"):
        get_peft_model(official.build(), GAPromptConfig())
    with pytest.raises(AnatomyError, match=r"no module is known that is given the cloud"):
        get_peft_model(MODELS["traced"].build(), GAPromptConfig(), example_inputs=official.inputs(2, 0))
    # Where colours come beside the points, these are what is moved.
    assert torch.isfinite(run(adapt(MODELS["of two tensors"], "GA_PROMPT"), official, official.inputs(2, 0))).all()


def test_a_cloud_that_only_the_forward_shows_is_refused_with_what_to_do() -> None:
    class TakesThree(GroupOfOne):
        def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
            groups, centres = super().forward(points)
            return groups[..., :3], centres

    base = _official()
    base.encoder = Encoder(24, widths=(16, 32, 32))
    base.add_module("group_divider", TakesThree())
    model = get_peft_model(base, GAPromptConfig())
    with pytest.raises(AnatomyError, match=r"it is \(2, 96, 6\): set shift=False and point_prompts=0"):
        model(*FEATURED.inputs(2, 0))
