"""PointTPA: parity with the recorded numbers of the official code, its equations, the groups that clouds are cut in."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AnatomyError,
    PeftConfig,
    PointPeftError,
    PointPeftModel,
    PointTPAConfig,
    VPTConfig,
    geometry,
    get_peft_model,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.anatomy.description import Anatomy, Block, Stage, Tap
from point_peft.tuners.point_tpa import ParameterPart
from point_peft.tuners.point_tpa.adapter import DynamicProjection, ParameterAdapter
from point_peft.tuners.point_tpa.groups import Cut, Groups
from tests import golden
from tests.adapting import full_point_mae, move, moved
from tests.test_geometry import along_curve
from tests.test_packed import C, Dense
from tests.test_packed import anatomy as stated_anatomy
from tests.zoo import BACKBONES, clouds, pointcept

# ---- parity ----------------------------------------------------------------------------------------------------------

CASES = ("dynamic", "static", "dynamic_up", "length")
# Official names of a projection's tensors -> ours.
TENSORS = {
    "attn.fc1.weight": "hidden.weight",
    "attn.fc2.weight": "mixing.weight",
    "attn.fc2.bias": "mixing.bias",
    "dpp.weight": "weight",
    "dpp.bias": "bias",
}


def our_name(official: str) -> str:
    for theirs, ours in TENSORS.items():
        official = official.replace(theirs, ours)
    return official


def fill(adapter: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    """Give the adapter the official weights of that prefix; theirs have a trailing dimension, of a convolution."""
    own = adapter.state_dict()
    ours = {our_name(name.removeprefix(prefix)): w for name, w in weights.items() if name.startswith(prefix)}
    assert ours.keys() == own.keys()
    adapter.load_state_dict({name: weight.reshape(own[name].shape) for name, weight in ours.items()})


def recorded(case: str) -> tuple[ParameterAdapter, Groups | None, dict[str, Any], dict[str, Tensor]]:
    """The adapter of a recorded case, the groups, the description and what was recorded."""
    description, expected = golden.load("pointtpa")
    how: dict[str, Any] = description["config"]["cases"][case]
    adapter = ParameterAdapter(
        description["config"]["channels"], how["mid"], how.get("K") if how["dy_down"] else None, dynamic_up=how["dy_up"]
    )
    fill(adapter, golden.weights(description), f"{case}.")
    if not how["dy_down"]:
        return adapter, None, description, expected
    order = expected["input.serialized_order"][how["order_idx"]]
    cut = Cut("length" if how["mode"] == "length" else "number", how["param"])
    return adapter, cut.packed(order, torch.tensor(description["config"]["sizes"])), description, expected


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_adapter_alone_reproduces_every_recorded_tensor(case: str) -> None:
    adapter, cut, description, expected = recorded(case)
    found: dict[str, Tensor] = {"adapter_out": adapter(expected["input.feat"], cut)}
    u = adapter.norm(expected["input.feat"])
    narrow = nn.functional.relu(adapter.down.project(u, cut))
    # All but the result is recorded in the order of the curve; one that is not dynamic has an order, too.
    along = expected["input.serialized_order"][description["config"]["cases"][case]["order_idx"]]
    found |= {"down_out": adapter.down.project(u, cut)[along], "up_out": adapter.up.project(narrow, cut)[along]}
    for name, layer, x in (("down", adapter.down, u), ("up", adapter.up, narrow)):
        if isinstance(layer, DynamicProjection):
            assert cut is not None
            found[f"{name}_coefficients"] = layer.coefficients(x, cut)
    wanted = {n.removeprefix(f"{case}."): t for n, t in expected.items() if n.startswith(f"{case}.")}
    wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("variant_")}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith("coefficients") and len(tensor) != len(found[name]):
            # The smallest cloud has a group without tokens, which is theirs alone.
            assert len(tensor) == len(found[name]) + 1
            tensor = tensor[:-1]
        golden.assert_close(found[name], tensor)


@torch.no_grad()
def test_a_changed_weight_moves_the_output_as_it_moves_the_official_one() -> None:
    description, _ = golden.load("pointtpa")
    for name, change in description["weakest_effect_on_output_when_weight_becomes_1.1w+0.05"]:
        case, _, rest = name.partition(".")
        adapter, cut, _, expected = recorded(case)
        before = adapter(expected["input.feat"], cut)
        adapter.get_parameter(our_name(rest)).mul_(1.1).add_(0.05)
        first = description["config"]["sizes"][0]
        found = float((adapter(expected["input.feat"], cut) - before)[:first].abs().max())
        assert found == pytest.approx(change, rel=0.05, abs=1e-6), name


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class SerialAttention(nn.Module):
    """Adds nothing, and has a curve."""

    def __init__(self, width: int, order_index: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.order_index = order_index

    def forward(self, tokens: Tensor) -> Tensor:
        nothing: Tensor = 0.0 * self.proj(self.qkv(tokens)[:, : tokens.shape[1]])
        return nothing


class SerialBlock(nn.Module):
    """A block that changes the mapping that it gets, without the convolution ahead of the attention."""

    def __init__(self, width: int, order_index: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SerialAttention(width, order_index)
        self.mlp = Mlp(width)

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        x = state["feat"] + self.attn(self.norm1(state["feat"]))
        state["feat"] = x + self.mlp(self.norm2(x))
        return state


class Serial(nn.Module):
    """Blocks on packed tokens with their serial orders, in one mapping."""

    def __init__(self, width: int, order_indices: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SerialBlock(width, index) for index in order_indices)
        self.head = nn.Linear(width, 3)

    def forward(self, state: dict[str, Tensor]) -> Tensor:
        state = dict(state)
        for block in self.blocks:
            state = block(state)
        return state["feat"]


def serial_anatomy(width: int, blocks: int) -> Anatomy:
    def block(path: str) -> Block:
        return Block(
            path=path,
            attention=f"{path}.attn",
            qkv=(f"{path}.attn.qkv",),
            projection=f"{path}.attn.proj",
            norms=(f"{path}.norm1", f"{path}.norm2"),
            mlp=f"{path}.mlp",
            linears=(f"{path}.mlp.fc1", f"{path}.mlp.fc2"),
            mlp_norm=f"{path}.norm2",
        )

    stage = Stage(
        blocks=tuple(block(f"blocks.{number}") for number in range(blocks)),
        width=width,
        layout="packed",
        tokens=(0, "feat"),
        outputs=(("feat",),),
        coordinates=Tap(module="blocks.0", side="input", steps=(0, "coord")),
        samples=Tap(module="blocks.0", side="input", steps=(0, "batch")),
        prefix_tokens=0,
    )
    return Anatomy(source="the test", stages=(stage,), heads=("head",))


@torch.no_grad()
def test_an_adapted_block_reproduces_the_recorded_output() -> None:
    """From what the recorded attention gave: what is before that is the backbone's alone."""
    description, expected = golden.load("pointtpa")
    how, c, sizes = (description["config"][name] for name in ("block", "channels", "sizes"))
    weights = golden.weights(description)
    base = Serial(c, [how["order_idx"]])
    block: Any = base.blocks[0]
    block.norm2.load_state_dict({name: weights[f"block.norm2.0.{name}"] for name in ("weight", "bias")})
    block.mlp.load_state_dict({name: weights[f"block.mlp.0.{name}"] for name in block.mlp.state_dict()})
    config = PointTPAConfig(width=how["mid"], banks=how["K"], groups=how["param"], modules_to_save=[])
    model = get_peft_model(base, replace(config, anatomy=serial_anatomy(c, 1))).eval()
    (part,) = parts_of(model)
    fill(part.adapter, weights, "block.adaptive_module.")
    state = {
        "feat": expected["block.after_attention"],
        "coord": torch.cat([p[:n] for p, n in zip(golden.points(description), sizes, strict=True)]),
        "batch": expected["input.batch"],
        "serialized_order": expected["input.serialized_order"],
        "serialized_inverse": expected["input.serialized_inverse"],
    }
    golden.assert_close(model(state), expected["block.block_out"])
    assert golden.distance(expected["block.adapter_out"], torch.zeros_like(state["feat"])) > 0.5
    with model.disable_adapter():
        golden.assert_close(model(state), expected["block.block_out"] - expected["block.adapter_out"])


# ---- the equations ---------------------------------------------------------------------------------------------------


def parts_of(model: PointPeftModel) -> list[ParameterPart]:
    return [part for _, part in get_adapter(model, "default").all_parts() if isinstance(part, ParameterPart)]


def weights_of(part: ParameterPart) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in part.adapter.named_parameters()}


def dynamic(u: Tensor, w: dict[str, Tensor], name: str, s: int) -> Tensor:
    """The projection of one group (n, c) by the mean that is a sum over s, one token after another."""
    z = sum(u) / s
    scores = w[f"{name}.mixing.weight"] @ (w[f"{name}.hidden.weight"] @ z).clamp(min=0) + w[f"{name}.mixing.bias"]
    a = (scores / 4).softmax(dim=0)
    weight = sum(a[k] * w[f"{name}.weight"][k] for k in range(len(a)))
    bias = sum(a[k] * w[f"{name}.bias"][k] for k in range(len(a)))
    return torch.stack([weight @ token + bias for token in u])


def change(x: Tensor, w: dict[str, Tensor], s: int | None) -> Tensor:
    """The adapter's output for tokens (n, c) of one group; without s the down-projection is not dynamic."""
    u = nn.functional.layer_norm(x, x.shape[1:], w["norm.weight"], w["norm.bias"])
    down = u @ w["down.weight"].T + w["down.bias"] if s is None else dynamic(u, w, "down", s)
    narrow = down.clamp(min=0)
    if "up.mixing.weight" in w:
        assert s is not None
        return dynamic(narrow, w, "up", s)
    return narrow @ w["up.weight"].T + w["up.bias"]


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"groups": 3}, [6, 6, 4]),
        ({"groups": 5}, [4, 4, 4, 4]),
        ({"groups": 40}, [1] * 16),
        ({"groups": 7, "grouping": "length"}, [7, 7, 2]),
        ({"groups": 3, "dynamic_up": True}, [6, 6, 4]),
    ],
)
@torch.no_grad()
def test_equation_on_dense_tokens(fields: dict[str, Any], sizes: list[int]) -> None:
    """Of each block, with a class token, which is a group of its own."""
    model = moved(PointTPAConfig(width=5, banks=3, modules_to_save=[], **fields))
    (points,), base = clouds(2, 0), model.get_base_model()
    blocks: list[Any] = list(base.get_submodule("blocks.blocks").children())
    given: list[Tensor] = []
    found: list[Tensor] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        block.register_forward_hook(lambda module, args, output: found.append(output))
    model(points)
    centres = base.get_submodule("group_divider")(points)[1]
    for number, (block, part) in enumerate(zip(blocks, parts_of(model), strict=True)):
        with model.disable_adapter():
            x = given[number] + block.attn(block.norm1(given[number]))
            plain = x + block.mlp(block.norm2(x))
        for i in range(2):
            expected = plain[i].clone()
            if number < len(blocks) - 1:
                expected += change(x[i], weights_of(part), None)
            else:
                expected[:1] += change(x[i, :1], weights_of(part), 1)
                order, start = torch.tensor(along_curve(centres[i])) + 1, 0
                for size in sizes:
                    rows = order[start : start + size]
                    expected[rows] += change(x[i, rows], weights_of(part), sizes[0])
                    start += size
            assert torch.allclose(found[number][i], expected, atol=1e-5)


@torch.no_grad()
def test_packed_clouds_are_cut_one_by_one() -> None:
    """Where there is no serial order, along our own curve; they may be mingled, or told by their ends."""
    torch.manual_seed(0)
    sizes, (x, points), mingled = [40, 5, 1, 23], (torch.randn(69, C), torch.rand(69, 3)), torch.randperm(69)
    samples = torch.repeat_interleave(torch.tensor(sizes))
    config = PointTPAConfig(width=5, banks=3, groups=6, modules_to_save=[], anatomy=serial_anatomy(C, 1))
    model = get_peft_model(Serial(C, [0]), config).eval()
    move(model)
    with model.disable_adapter():
        expected = model({"feat": x})
    weights, start = weights_of(parts_of(model)[0]), 0
    for n in sizes:
        s, order = -(-n // 6), torch.tensor(along_curve(points[start : start + n])) + start
        for rows in order.split(s):
            expected[rows] += change(x[rows], weights, s)
        start += n
    for rows, of in (
        (torch.arange(69), samples),
        (torch.arange(69), samples.bincount().cumsum(0)),
        (mingled, samples[mingled]),
    ):
        found = model({"feat": x[rows], "coord": points[rows], "batch": of})
        assert torch.allclose(found, expected[rows], atol=1e-5)


@torch.no_grad()
def test_a_cloud_without_tokens_does_no_harm() -> None:
    order = torch.randperm(20)
    full = Cut("number", 3).packed(order, torch.tensor([20]))
    for counts, sizes in (([0, 20], [7] * 3), ([20, 0], [7] * 3), ([8, 0, 12], [3, 3, 3, 4, 4, 4])):
        found = Cut("number", 3).packed(order, torch.tensor(counts))
        assert found.size.tolist() == sizes
        if len(sizes) == 3:
            assert torch.equal(found.of, full.of)
    assert len(Cut("length", 4).packed(order[:0], torch.tensor([0, 0])).size) == 0


@torch.no_grad()
def test_permuting_tokens_and_centres_together_permutes_the_result() -> None:
    torch.manual_seed(0)
    points, order = torch.rand(2, 24, 3), torch.randperm(24)
    model = get_peft_model(Dense(), PointTPAConfig(groups=5, anatomy=stated_anatomy(False))).eval()
    move(model)
    assert torch.allclose(model(points[:, order]), model(points)[:, order], atol=1e-5)


@torch.no_grad()
def test_prompts_of_other_methods_are_in_the_group_of_the_prefix() -> None:
    """Where they lie in the sequence while this method acts: VPT around it, and within it, where they are gone."""
    (points,), mine = clouds(2, 0), PointTPAConfig(width=5, groups=4, modules_to_save=[])
    theirs = VPTConfig(num_prompts=3, modules_to_save=[])
    for tuners, ahead in (([theirs, mine], 1 + 3), ([mine, theirs], 1)):
        model = moved(PeftConfig(tuners=tuners))
        seen: list[Groups] = []
        adapter = parts_of(model)[-1].adapter
        adapter.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[1]))
        together = model(points)
        (cut,) = seen
        assert cut.size.tolist() == 2 * ([4] * 4 + [ahead])
        assert torch.equal(cut.of.view(2, -1)[:, :ahead], torch.tensor([[4], [9]]).expand(2, ahead))
        alone = torch.cat([model(points[i : i + 1]) for i in range(2)])
        assert torch.allclose(together, alone, atol=1e-5)


# ---- the order of a backbone's own -----------------------------------------------------------------------------------


def orders_used(model: PointPeftModel, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The orders that clouds are cut along in a forward."""
    used, packed = [], Cut.packed

    def spy(self: Cut, order: Tensor, counts: Tensor) -> Groups:
        used.append(order)
        return packed(self, order, counts)

    with monkeypatch.context() as patched:
        patched.setattr(Cut, "packed", spy)
        run()
    return used


@torch.no_grad()
def test_the_order_is_that_of_the_curve_of_the_block_s_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read anew in every forward, at every block: pooling makes new ones, and models shuffle them."""
    code, axes = pointcept._z_code, itertools.cycle(itertools.permutations(range(3)))
    monkeypatch.setattr(pointcept, "_z_code", lambda cell: code(cell[:, next(axes)]))
    backbone = BACKBONES["pointcept_ptv3"]
    model = moved(PointTPAConfig(dynamic_blocks=[0, 1, 2, 3, 4], groups=3, modules_to_save=[]), "pointcept_ptv3")
    (data,), wanted = backbone.inputs(2, 0), []
    blocks = [module for module in model.get_base_model().modules() if isinstance(module, pointcept.Block)]

    def keep(module: Any, args: Any) -> None:
        wanted.append(args[0].serialized_order[module.attn.order_index].clone())

    for block in blocks:
        block.register_forward_pre_hook(keep)
    first = orders_used(model, lambda: model(data), monkeypatch)
    second = orders_used(model, lambda: model(data), monkeypatch)
    assert len(wanted) == 10 and all(map(torch.equal, first + second, wanted))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])


@torch.no_grad()
def test_the_order_may_be_an_argument_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    if "torch_pointcloud_ptv3" not in BACKBONES:
        pytest.skip("torch-pointcloud is not installed")
    backbone = BACKBONES["torch_pointcloud_ptv3"]
    model = moved(PointTPAConfig(dynamic_blocks=[0, 1, 2, 3], groups=3, modules_to_save=[]), "torch_pointcloud_ptv3")
    wanted: list[Tensor] = []
    for number in range(2):
        for block in model.get_base_model().get_submodule(f"encoder.blocks.{number}.blocks").children():
            block.register_forward_pre_hook(
                lambda module, args, kwargs: wanted.append(kwargs["serialized_order"]), with_kwargs=True
            )
    used = orders_used(model, lambda: model(*backbone.inputs(2, 0)), monkeypatch)
    assert len(wanted) == 4 and all(map(torch.equal, used, wanted))
    assert not torch.equal(used[0], used[1])


def test_an_attention_that_does_not_say_its_curve_is_an_error() -> None:
    base = Serial(C, [0])
    config = PointTPAConfig(modules_to_save=[], anatomy=serial_anatomy(C, 1))
    model = get_peft_model(base, config).eval()
    order = torch.stack([torch.randperm(6) for _ in range(2)])
    state = {"feat": torch.rand(6, C), "coord": torch.rand(6, 3), "batch": torch.zeros(6).long()}
    model({**state, "serialized_order": order})
    del base.get_submodule("blocks.0.attn").order_index
    with pytest.raises(
        AnatomyError, match=r"'blocks.0' gets .* 2 curves at its input\[0\].serialized_order, .* order_i"
    ):
        model({**state, "serialized_order": order})
    model(state)  # along our own curve


@torch.no_grad()
def test_the_size_of_batch_mates_does_not_matter() -> None:
    """Published, clouds are cut by the length of the longest of the batch."""
    model = moved(PointTPAConfig(groups=5, modules_to_save=[]), "pointcept_ptv3")
    (data,) = BACKBONES["pointcept_ptv3"].inputs(3, 0)
    sizes = torch.tensor([96, 41, 3])
    kept = torch.cat([torch.arange(n) + 96 * i for i, n in enumerate(sizes.tolist())])
    data = {**{name: data[name][kept] for name in ("coord", "grid_coord", "feat", "batch")}, "offset": sizes.cumsum(0)}
    together = model(data).split(sizes.tolist())
    for i, n in enumerate(sizes):
        own = {name: value[data["batch"] == i] for name, value in data.items() if name != "offset"}
        alone = model({**own, "batch": torch.zeros(int(n)).long(), "offset": n[None]})
        assert torch.allclose(together[i], alone, atol=1e-5)


# ---- the method ------------------------------------------------------------------------------------------------------

SONATA = {48: 3, 96: 3, 192: 3, 384: 12, 512: 3}
"""Width -> blocks of that width in Sonata."""


def sonata() -> nn.Module:
    """An encoder of its sizes, of shapes without values."""
    stages = OrderedDict[str, nn.Module]()
    with torch.device("meta"):
        model = pointcept.PointTransformerV3()
        for number, (width, depth) in enumerate(SONATA.items()):
            blocks = {f"block{i}": pointcept.Block(width, width // 16, i % 4) for i in range(depth)}
            stages[f"enc{number}"] = pointcept.PointSequential(blocks)
        model.enc, model.dec = pointcept.PointSequential(stages), pointcept.PointSequential({})
        model.seg_head = nn.Linear(sum(SONATA), 20)
    return model


def test_parameters_on_sonata() -> None:
    model = get_peft_model(sonata(), replace(PointTPAConfig.published(), modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 1_152_904
    model = get_peft_model(sonata(), PointTPAConfig.published())
    assert model.get_nb_trainable_parameters()[0] == 1_152_904 + 24_660
    dynamic = [number for number, part in enumerate(parts_of(model)) if part.cut is not None]
    assert dynamic == [2, 5, 8, 20, 23]
    assert [(part.cut.value, len(part.adapter.down.weight)) for part in parts_of(model) if part.cut is not None] == [
        (200, 4), (100, 4), (50, 2), (20, 2), (10, 2),
    ]  # fmt: skip


def test_parameters_on_point_mae() -> None:
    """The last of twelve blocks alone is dynamic: two banks, and 97 hidden channels."""
    model = get_peft_model(full_point_mae(), PointTPAConfig(modules_to_save=[]))
    static = 2 * 384 + 2 * 384 * 64 + 64 + 384
    bank, mixing = 384 * 64 + 64, 384 * 97 + 97 * 2 + 2
    assert model.get_nb_trainable_parameters()[0] == 12 * static + bank + mixing


@pytest.mark.parametrize("dynamic_up", [False, True])
def test_a_fresh_adapter_is_the_backbone_and_its_up_projection_learns_first(dynamic_up: bool) -> None:
    torch.manual_seed(0)
    backbone, config = BACKBONES["point_mae"], PointTPAConfig(width=8, dynamic_up=dynamic_up, modules_to_save=[])
    model = get_peft_model(backbone.build(), config).eval()
    args = backbone.inputs(2, 0)
    output = model(*args)
    with model.disable_adapter():
        assert torch.equal(output, model(*args))
    output.square().sum().backward()
    for part in parts_of(model):
        for name, parameter in part.adapter.named_parameters():
            up = name in ("up.weight", "up.bias")
            assert bool(parameter.grad is not None and parameter.grad.any()) == up, name


@torch.no_grad()
def test_the_start_is_as_published_but_for_the_up_projection() -> None:
    torch.manual_seed(0)
    wide = ParameterAdapter(384, 64, 4, dynamic_up=True)
    assert isinstance(wide.down, DynamicProjection) and isinstance(wide.up, DynamicProjection)
    assert wide.down.hidden.weight.shape == (97, 384) and wide.up.hidden.weight.shape == (17, 64)
    assert float(wide.down.hidden.weight.std()) == pytest.approx((2 / 97) ** 0.5, rel=0.05)
    assert float(wide.down.mixing.weight.std()) == pytest.approx((2 / 4) ** 0.5, rel=0.2)
    bound = (6 / 384) ** 0.5
    assert bound * 0.99 < float(wide.down.weight.abs().max()) <= bound
    assert float(ParameterAdapter(384, 64, None, dynamic_up=False).down.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_chosen_blocks() -> None:
    model = moved(PointTPAConfig(dynamic_blocks=[0, 2], banks=4, modules_to_save=[]))
    assert [part.cut is not None for part in parts_of(model)] == [True, False, True]
    # The last of those that are adapted.
    model = moved(PointTPAConfig(layers_to_transform=[0, 1], modules_to_save=[]))
    assert [part.cut is not None for part in parts_of(model)] == [False, True]
    model = moved(PointTPAConfig(groups=[4, 5, 6], banks=[2, 3, 4], modules_to_save=[]), "point_m2ae")
    assert [part.cut.value for part in parts_of(model) if part.cut is not None] == [4, 5, 6]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"dynamic_blocks": [3]}, r"dynamic_blocks: block 3 is not among those that POINT_TPA adapts: 0, 1, 2"),
        ({"dynamic_blocks": [0], "layers_to_transform": [2]}, r"block 0 is not among those that POINT_TPA adapts: 2"),
        ({"groups": [8, 4]}, r"groups has 2 numbers, and 1 stages of the backbone have blocks that POINT_TPA adapts"),
        (
            {"banks": [4, 4, 2, 2, 2]},
            r"banks has 5 numbers, and 1 stages .*: state one number for each of them, or one",
        ),
    ],
)
def test_what_the_backbone_does_not_have_is_an_error(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(AnatomyError, match=why):
        get_peft_model(BACKBONES["point_mae"].build(), PointTPAConfig(**fields))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("padded_patches", r"POINT_TPA needs to know where the tokens of 'blocks.0' lie in space"),
        ("official_ptv1", r"POINT_TPA reads the tokens of 'enc1.1' between its attention and its MLP"),
    ],
)
def test_refused(name: str, why: str) -> None:
    with pytest.raises(AnatomyError, match=why):
        moved(PointTPAConfig(), name)


def test_lists_and_numbers_travel_as_json() -> None:
    for config in (PointTPAConfig.published(), PointTPAConfig(groups=4, dynamic_blocks=[1])):
        assert PointTPAConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_fields_are_validated() -> None:
    with pytest.raises(
        PointPeftError, match=r"PointTPAConfig.banks is 1; allowed: 2 or more, or a list of such numbers"
    ):
        PointTPAConfig(banks=1)
    with pytest.raises(PointPeftError, match=r"PointTPAConfig.banks is .*; allowed: 2 or more"):
        PointTPAConfig(banks=[4, 1])
    with pytest.raises(PointPeftError, match=r"PointTPAConfig.groups is .*; allowed: 1 or more"):
        PointTPAConfig(groups=[])
    with pytest.raises(PointPeftError, match=r"PointTPAConfig.width is 0; allowed: 1 or more"):
        PointTPAConfig(width=0)
    wrong: Any = {"grouping": "size"}
    with pytest.raises(PointPeftError, match=r"grouping is 'size'; allowed: 'number' or 'length'"):
        PointTPAConfig(**wrong)


@torch.no_grad()
def test_means_and_shares_are_in_single_precision_under_autocast() -> None:
    torch.manual_seed(0)
    adapter, u = ParameterAdapter(24, 8, 3, dynamic_up=False), torch.randn(4000, 24)
    assert isinstance(adapter.down, DynamicProjection)
    cut = Cut("number", 1).packed(torch.arange(4000), torch.tensor([4000]))
    expected = adapter.down.coefficients(u + 1, cut)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter.down.coefficients((u + 1).bfloat16(), cut)
        assert cut.mean((u + 1).float()).dtype == found.dtype == torch.float32
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-6) and torch.allclose(found, expected, atol=2e-2)


@torch.no_grad()
def test_the_curve_is_made_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, make = moved(PointTPAConfig(dynamic_blocks=[0, 1, 2])), [], geometry.morton_order

    def count(points: Tensor) -> Tensor:
        made.append(make(points))
        return made[-1]

    monkeypatch.setattr(geometry, "morton_order", count)
    model(*clouds(2, 0))
    assert len(made) == 1
