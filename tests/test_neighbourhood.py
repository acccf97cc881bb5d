"""The encoder of neighbourhoods of Point-PEFT: what it sees of a cloud, where there is none, and its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from point_peft import AdapterError, AnatomyError, LoraConfig, PointPEFTConfig, PointPeftModel, TunerConfig
from point_peft.anatomy.presets import known_anatomy
from tests.adapting import adapt, distance, loss_of, rescramble, run, tensors
from tests.zoo import BACKBONES, TinyBackbone
from tests.zoo.library import transformer
from tools import capabilities

POINT_MAE = BACKBONES["point_mae"]
NONE = PointPEFTConfig(neighbourhood_width=0, num_prompts=0)
ONE = dataclasses.replace(NONE, neighbourhood_width=8)
AUTO = dataclasses.replace(NONE, neighbourhood_width=None)


def of_encoder(model: PointPeftModel) -> dict[str, Tensor]:
    """Its tensors by their names."""
    return {name: tensor for name, tensor in tensors(model).items() if ".neighbourhood." in name}


def sees_clouds(backbone: TinyBackbone) -> bool:
    anatomy = backbone.traced or known_anatomy(backbone.build())
    return anatomy is not None and any(stage.points is not None for stage in anatomy.stages)


SEEING = [backbone for backbone in BACKBONES.values() if not backbone.needs and sees_clouds(backbone)]
one_of_each_kind = pytest.mark.parametrize(
    "backbone",
    {backbone.kind: backbone for backbone in SEEING if "POINT_PEFT" in capabilities.labels(backbone.name)}.values(),
    ids=lambda backbone: backbone.name,
)


@one_of_each_kind
def test_it_begins_without_effect_and_learns(backbone: TinyBackbone) -> None:
    fresh, without = adapt(backbone, ONE, fresh=True), adapt(backbone, NONE, fresh=True)
    own = of_encoder(fresh)
    assert len(own) == 10 and own.keys() == tensors(fresh).keys() - tensors(without).keys()
    assert torch.allclose(run(fresh, backbone), run(without, backbone), atol=1e-6)
    loss_of(backbone.select(fresh(*backbone.inputs(2, 5)))).backward()
    learning = {name for name, tensor in own.items() if tensor.grad is not None and tensor.grad.any()}
    assert learning == {name for name in own if ".proj." in name}
    with torch.no_grad():
        for tensor in own.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    assert distance(run(fresh, backbone), run(without, backbone)) > 1e-3
    loss_of(backbone.select(fresh(*backbone.inputs(2, 5)))).backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in own.values())


@one_of_each_kind
def test_the_default_without_a_bank_does_not_know_of_batch_mates(backbone: TinyBackbone) -> None:
    model, args = adapt(backbone, PointPEFTConfig()), backbone.inputs(3, 6)
    assert of_encoder(model)
    together = run(model, backbone, args)
    for number in range(3):
        alone = run(model, backbone, backbone.slice(args, number))
        assert distance(alone, together[number : number + 1]) < 1e-5


@pytest.mark.parametrize(
    ("count", "points", "dilation"), [(4, 4, 1), (12, 12, 1), (31, 16, 1), (40, 16, 2), (100, 16, 6), (200, 16, 8)]
)
def test_of_a_small_cloud_it_sees_what_there_is(count: int, points: int, dilation: int) -> None:
    """All points where there are fewer than 16, and the 16 nearest or every second of 32 where there are no 128."""
    backbone = dataclasses.replace(
        POINT_MAE, name="of small clouds", make=lambda: transformer(num_group=4, group_size=4)
    )
    args = (torch.rand(2, count, 3, generator=torch.Generator().manual_seed(count)),)
    same = dataclasses.replace(ONE, neighbourhood_points=points, neighbourhood_dilation=dilation)
    other = dataclasses.replace(ONE, neighbourhood_points=min(points, 4) - 1, neighbourhood_dilation=1)
    expected = run(adapt(backbone, same), backbone, args)
    output = run(adapt(backbone, ONE), backbone, args)
    assert torch.equal(output, expected)
    assert distance(run(adapt(backbone, other), backbone, args), output) > 1e-4


def test_points_that_coincide_are_no_division_by_zero() -> None:
    model = adapt(POINT_MAE, ONE)
    output = POINT_MAE.select(model(torch.ones(2, 40, 3)))
    loss_of(output).backward()
    assert torch.isfinite(output).all()
    assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in of_encoder(model).values())


def test_it_is_nowhere_without_a_width_or_where_clouds_are_not_seen() -> None:
    for backbone, config in (
        (POINT_MAE, NONE),
        (BACKBONES["point_features"], AUTO),
        (BACKBONES["official_ptv1"], dataclasses.replace(AUTO, adapter_scale=0.0)),  # its blocks have no MLP
    ):
        assert sees_clouds(backbone) == (backbone is POINT_MAE)
        assert not of_encoder(adapt(backbone, config, fresh=True))
    assert of_encoder(adapt(POINT_MAE, AUTO, fresh=True))
    with pytest.raises(AnatomyError, match="neighbourhood_width=8 needs the clouds .* and where they are seen"):
        adapt(BACKBONES["point_features"], ONE, fresh=True)
    (block,) = {name.partition(".point_peft.")[0] for name in of_encoder(adapt(POINT_MAE, ONE, fresh=True))}
    assert block == "blocks.blocks.1"  # the first that is adapted


@pytest.mark.parametrize("name", ["point_mae", "random_groups"])
def test_adapters_of_other_neighbourhoods_meet_in_one_batch(name: str) -> None:
    """Also where a module that knows the cloud does not run again, because what it gave is known."""
    backbone = BACKBONES[name]
    model, (points,) = adapt(backbone, ONE), backbone.inputs(4, 5)
    model.add_adapter("nearest", dataclasses.replace(ONE, neighbourhood_points=8, neighbourhood_dilation=1))
    model.add_adapter("lora", LoraConfig())
    for added in ("nearest", "lora"):
        rescramble(model, added)
    model.eval()
    names = ["nearest", "default", None, "lora"]
    with torch.no_grad():
        mixed = model(points, adapter_names=names)
        for row, own in enumerate(names):
            with model.disable_adapter() if own is None else model.use_adapter(own):
                assert torch.allclose(mixed[row], model(points)[row], atol=1e-5)


@torch.no_grad()
def test_blocks_alone_need_the_cloud() -> None:
    model, (points,) = adapt(POINT_MAE, ONE), POINT_MAE.inputs(2, 5)
    base: Any = model.base_model
    expected: list[tuple[Tensor, Tensor]] = []
    block = base.blocks.blocks[1]
    block.register_forward_hook(lambda module, args, output: expected.append((args[0], output)))
    model(points)
    ((tokens, output),) = expected

    def alone(cloud: Tensor | None = None) -> Tensor:
        """The block's output where its tokens lie, which it is told anew each time, and the cloud if there is one."""
        centres = points[:, :16] if cloud is None else base.group_divider(cloud)[1]
        base.pos_embed(centres)
        made: Tensor = block(tokens)
        return made

    for _ in range(2):  # the second time, the cloud that was seen before is not taken for this one's
        with pytest.raises(AdapterError, match="in this forward no cloud was seen: call the model, or set neighbour"):
            alone()
        assert alone(points).shape == output.shape


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_carry_it_to_another_seed(tmp_path: Path) -> None:
    model = adapt(POINT_MAE, ONE)
    model.save_pretrained(tmp_path)
    torch.manual_seed(999)
    again = PointPeftModel.from_pretrained(POINT_MAE.build(), tmp_path).eval()
    assert of_encoder(again) and torch.equal(run(again, POINT_MAE), run(model, POINT_MAE))


def test_a_file_that_does_not_state_it_has_none() -> None:
    stated = PointPEFTConfig().to_json()
    old = {name: value for name, value in stated.items() if not name.startswith("neighbourhood_")}
    assert TunerConfig.from_json(stated) == PointPEFTConfig()
    assert TunerConfig.from_json(old) == PointPEFTConfig(neighbourhood_width=0)
    assert PointPEFTConfig.published().neighbourhood_width == 0
