"""STAG: against recorded runs and a naive computation, its parameters, what it costs in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from point_peft import AdapterError, AnatomyError, PointPeftError, PointPeftModel, STAGConfig, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.geometry.dense import squared_distance
from point_peft.tuners.stag import SideNetwork
from tests import golden
from tests.adapting import adapt, distance, full_point_mae
from tests.test_golden_base import Recorder, compare, grouping
from tests.zoo import BACKBONES, clouds

HEAD = "cls_head_finetune"
SIDE = "blocks.addparam_"


def trainable(**fields) -> int:
    return get_peft_model(full_point_mae(), STAGConfig(modules_to_save=[], **fields)).get_nb_trainable_parameters()[0]


def test_parameters_on_point_mae():
    """259,200 and 851,520, as METHODS.md counts them; the identity at the start costs one gate a graph module."""
    assert trainable(init="published") == 259_200
    assert trainable() == 259_200 + 1
    assert trainable(size="sl", init="published") == 851_520
    assert trainable(size="sl") == 851_520 + 3
    pooled = get_peft_model(full_point_mae(), STAGConfig(init="published"), heads={HEAD: "raw_mean"})
    assert pooled.get_nb_trainable_parameters()[0] == 428_431


# ---- parity ----------------------------------------------------------------------------------------------------------

PAIRS = {"downproj": "down.{}", "graphconv1": "graph.{}.own", "graphconv2": "graph.{}.neighbour", "fc": "graph.{}.mix"}
PAIRS["upproj"] = "graph.{}.up"


def ours(official: str) -> str:
    """`blocks.addparam_upproj_dict.6.0.weight` -> `stag.graph.6.up.weight`"""
    kind, group, _, leaf = official.removeprefix(SIDE).split(".")
    return f"stag.{PAIRS[kind.removesuffix('_dict')].format(group)}.{leaf}"


def recorded() -> tuple[PointPeftModel, dict[str, Tensor], dict[str, Tensor]]:
    """The adapted model with the recorded weights, what was recorded, and what ours gives."""
    description, expected = golden.load("stag")
    config, weights = description["config"], golden.weights(description)
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "drop_path_rate", "cls_dim")
    base = PointTransformer(**{name: config[name] for name in names if name in config})
    plain = {name: tensor for name, tensor in weights.items() if not name.startswith((SIDE, HEAD))}
    base.load_state_dict({**base.state_dict(), **plain})
    recorder = Recorder()
    recorder.backbone(base)
    # Fixed in the official code for 12 blocks, whatever the depth.
    how = STAGConfig(size="sl" if config["stag_size"] else "std", first_graph_layer=6, init="published")
    model = get_peft_model(base, how, heads={HEAD: "raw_mean"}).eval()
    adapter = get_adapter(model, "default")
    tensors = adapter.tensors()
    side = {ours(name): tensor for name, tensor in weights.items() if name.startswith(SIDE)}
    head = {name: tensor for name, tensor in weights.items() if name.startswith(HEAD)}
    with torch.no_grad():
        for name, tensor in tensors.items():
            value = {**side, **head}[name]
            tensor.copy_(value.reshape(tensor.shape))
    for network in adapter.modules():
        for name, module in network.graph.items() if isinstance(network, SideNetwork) else ():
            recorder.output(module, f"side_addparam_upproj_dict.{name}", item=1)
    recorder.input(dict(adapter.own_modules())[HEAD], "head_in")
    points = golden.points(description)
    with torch.no_grad():
        found = {**grouping(points, config), "input.points": points, "logits": model(points)}
    for name, tensor in recorder.tensors.items():
        found[name] = tensor.mT if name.startswith("side_") else tensor
    return model, expected, found


def test_it_reproduces_every_recorded_tensor():
    _, expected, found = recorded()
    compare(found, expected)


# ---- the equation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["std", "sl"])
def test_the_equation_block_by_block(size):
    """Against a loop over tokens and neighbours, on a backbone of eight blocks with and without gates."""
    torch.manual_seed(0)
    base = PointTransformer(trans_dim=24, depth=8, num_heads=2, num_group=16, group_size=8, encoder_dims=24).eval()
    given: list[Tensor] = []
    returned: list[Tensor] = []
    for block in base.blocks.blocks:
        block.register_forward_hook(lambda m, i, out: returned.append(out.clone()))
    how = STAGConfig(size=size, width=12, neighbours=3, modules_to_save=[])
    model = get_peft_model(base, how).eval()
    for block in base.blocks.blocks:
        block.register_forward_pre_hook(lambda m, args: given.append(args[0].clone()))
    base.norm.register_forward_pre_hook(lambda m, args: given.append(args[0].clone()))
    found = get_adapter(model, "default").tensors()
    with torch.no_grad():
        for tensor in found.values():
            tensor.add_(0.3 * torch.randn_like(tensor))
        (points,) = clouds(2, 0)
        _, centres = base.group_divider(points)
        pos = torch.cat([base.get_parameter("cls_pos").expand(2, -1, -1), base.pos_embed(centres)], dim=1)
        model(points)

        def linear(name: str, x: Tensor) -> Tensor:
            return nn.functional.linear(x, found[f"stag.{name}.weight"], found[f"stag.{name}.bias"])

        near = squared_distance(centres, centres).argsort(dim=2)[:, :, :3]
        side = torch.zeros(2, 16, 12)
        for number in range(8):
            down = f"down.{number // 3 * 3 if size == 'sl' else 0}"
            side = side + linear(down, (given[number] - pos)[:, 1:])
            after = returned[number]
            if number >= 4:
                graph = f"graph.{number // 2 * 2 if size == 'sl' else 4}"
                mixed = torch.zeros_like(side)
                for b in range(2):
                    for i in range(16):
                        messages = [
                            linear(f"{graph}.own", side[b, i]) + linear(f"{graph}.neighbour", side[b, j])
                            for j in near[b, i]
                        ]
                        mixed[b, i] = torch.stack(messages).amax(dim=0)
                side = linear(f"{graph}.mix", mixed)
                moved = found[f"stag.{graph}.gate"] * linear(f"{graph}.up", side).relu()
                after = after + torch.cat([moved.mean(dim=1, keepdim=True), moved], dim=1)
            following = given[number + 1] - (pos if number < 7 else 0)
            assert torch.allclose(following, after, rtol=1e-4, atol=1e-4), number


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_the_first_half_of_the_blocks_runs_without_gradient():
    base = PointTransformer(trans_dim=24, depth=6, num_heads=2, num_group=16, group_size=8, encoder_dims=24)
    model = get_peft_model(base, STAGConfig())
    needs: list[bool] = []
    for block in base.blocks.blocks:
        block.register_forward_pre_hook(lambda m, args: needs.append(args[0].requires_grad))
    model(*clouds(2, 0)).sum().backward()
    assert needs == [False] * 4 + [True] * 2


def test_a_fresh_gate_gets_a_gradient():
    """Where an up-projection of zero ahead of the relu would leave all without."""
    model = get_peft_model(BACKBONES["point_mae"].build(), STAGConfig())
    model(*clouds(4, 0)).square().sum().backward()
    gates = [p for name, p in model.named_parameters() if name.endswith("gate")]
    assert len(gates) == 1 and all(gate.grad is not None and gate.grad.abs() > 0 for gate in gates)


def test_a_sample_does_not_depend_on_its_batch_mates():
    model, expected, found = recorded()
    with torch.no_grad():
        alone = torch.cat([model(cloud[None]) for cloud in found["input.points"]])
    golden.assert_close(alone, expected["logits"])


def test_a_file_builds_the_published_head_again(tmp_path):
    backbone = BACKBONES["point_mae"]
    model = adapt(backbone, STAGConfig(), heads={HEAD: "raw_mean"})
    model.save_pretrained(tmp_path)
    again = PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    (points,) = clouds(2, 0)
    with torch.no_grad():
        assert torch.equal(again(points), model(points))


def test_blocks_out_of_order_are_refused():
    model = adapt(BACKBONES["point_mae"], STAGConfig())
    model.base_model.get_submodule("pos_embed")(torch.randn(2, 16, 3))
    with pytest.raises(AdapterError, match="runs before the one whose side tokens it should be handed"):
        model.base_model.get_submodule("blocks.blocks.1")(torch.randn(2, 17, 24))


def test_each_stage_has_side_tokens_of_its_own():
    backbone = next(b for b in BACKBONES.values() if b.name.startswith("point_m2ae"))
    model = adapt(backbone, STAGConfig(first_graph_layer=0))
    prefixes = {name.split(".down")[0] for name in get_adapter(model, "default").tensors() if ".down." in name}
    assert prefixes == {"stag", "stag.stage_1", "stag.stage_2"}


def test_choosing_blocks():
    every = adapt(BACKBONES["point_mae"], STAGConfig(modules_to_save=[]))
    some = adapt(BACKBONES["point_mae"], STAGConfig(modules_to_save=[], layers_to_transform=[0, 2]))
    (points,) = clouds(2, 0)
    with torch.no_grad():
        assert distance(some(points), every(points)) > 1e-4
    with pytest.raises(AnatomyError, match=r"after the blocks from 1 on, .* is 0: set first_graph_layer"):
        adapt(BACKBONES["point_mae"], STAGConfig(layers_to_transform=[0]))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"width": 0}, "width"),
        ({"neighbours": 0}, "neighbours"),
        ({"first_graph_layer": -1}, "first_graph_layer"),
        ({"size": "xl"}, "size"),
        ({"init": "zero"}, "init"),
    ],
)
def test_wrong_fields_are_refused(fields, match):
    with pytest.raises(PointPeftError, match=match):
        STAGConfig(**fields)
