"""The plain backbones reproduce the recorded numbers of the official models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.backbones import PointTransformer, PointTransformerPartSeg
from tests import golden

pytestmark = pytest.mark.smoke

TOLERANCE = 1e-5


class Recorder:
    """Keeps what modules are given and return in one forward, under the names of the golden files."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.calls: dict[str, list[Tensor]] = {}

    def output(self, module: nn.Module, name: str, item: int | None = None) -> None:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            tensor = output if item is None else output[item]
            self.tensors[name] = tensor
            calls = self.calls.setdefault(name, [])
            self.tensors[f"{name}.call{len(calls)}"] = tensor
            calls.append(tensor)

        module.register_forward_hook(keep)

    def input(self, module: nn.Module, name: str) -> None:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.tensors[name] = args[0]

        module.register_forward_pre_hook(keep)

    def backbone(self, model: PointTransformer | PointTransformerPartSeg) -> None:
        self.output(model.group_divider, "centres", item=1)
        self.output(model.encoder, "patch_tokens")
        self.output(model.pos_embed, "pos")
        for i, block in enumerate(model.blocks.blocks):
            self.input(block, f"block_in.{i}")
            self.output(block, f"block_out.{i}")
        self.output(model.norm, "final_norm")


def grouping(points: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    index = geometry.farthest_point_sample(points, config["num_group"])
    near = geometry.knn(geometry.gather(points, index), points, config["group_size"])
    return {"fps_idx": index, "knn_idx": near.sort(dim=2).values}


def compare(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = expected.keys() - ours.keys()
    assert not missing, f"recorded but not compared: {sorted(missing)}"
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            found = golden.distance(ours[name], tensor)
            assert found <= TOLERANCE, f"{name} differs by {found:.3g} of its largest value"
        else:
            assert torch.equal(ours[name], tensor.to(ours[name].dtype)), f"{name} differs"


def point_mae() -> tuple[PointTransformer, dict[str, Any], dict[str, Tensor]]:
    description, expected = golden.load("point_mae_base")
    config = description["config"]
    names = (
        "trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "drop_path_rate", "cls_dim",
    )  # fmt: skip
    model = PointTransformer(**{name: config[name] for name in names if name in config})
    golden.fill(model, description)
    return model.eval(), description, expected


def partseg() -> tuple[PointTransformerPartSeg, dict[str, Any], dict[str, Tensor]]:
    description, expected = golden.load("point_mae_partseg")
    config = description["config"]
    model = PointTransformerPartSeg(
        trans_dim=config["dim"],
        encoder_dims=config["dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        num_group=config["num_group"],
        group_size=config["group_size"],
        cls_dim=config["classes"],
        num_labels=description["weights"]["label_conv.0.weight"][1],
    )
    golden.fill(model, description)
    return model.eval(), description, expected


def test_point_mae_reproduces_every_recorded_tensor() -> None:
    model, description, expected = point_mae()
    points = golden.points(description)
    recorder = Recorder()
    recorder.backbone(model)
    recorder.input(model.cls_head_finetune, "head_in")
    with torch.no_grad():
        logits = model(points)
    ours = {**recorder.tensors, **grouping(points, description["config"]), "logits": logits, "input.points": points}
    compare(ours, expected)


def test_partseg_reproduces_every_recorded_tensor() -> None:
    model, description, expected = partseg()
    points, label = golden.points(description), expected["input.label"]
    recorder = Recorder()
    recorder.backbone(model)
    recorder.output(model.label_conv, "label_feature")
    recorder.input(model.convs1, "head_in")
    with torch.no_grad():
        log_probs = model(points, label)
    ours = {
        **recorder.tensors,
        **grouping(points, description["config"]),
        "log_probs": log_probs,
        "input.points": points,
        "input.label": label,
    }
    if "head_in_first_points" in expected:
        ours["head_in_first_points"] = recorder.tensors["head_in"][..., : expected["head_in_first_points"].shape[2]]
    compare(ours, expected)


def test_a_changed_weight_moves_the_output_as_it_moves_the_official_one() -> None:
    model, description, expected = point_mae()
    points = golden.points(description)
    tensors = model.state_dict()  # a running mean may be among them
    # Recorded for the first cloud; another set may not hold these numbers.
    for name, change in description.get("weakest_effect_on_output_when_weight_becomes_1.1w+0.05", []):
        weight = tensors[name]
        before = weight.clone()
        with torch.no_grad():
            weight.mul_(1.1).add_(0.05)
            found = float((model(points[:1]) - expected["logits"][:1]).abs().max())
            weight.copy_(before)
        assert found == pytest.approx(change, rel=0.05, abs=5e-6), name


def test_point_mae_does_not_mix_the_samples_of_a_batch() -> None:
    model, description, expected = point_mae()
    with torch.no_grad():
        alone = torch.cat([model(cloud[None]) for cloud in golden.points(description)])
    golden.assert_close(alone, expected["logits"], TOLERANCE)
