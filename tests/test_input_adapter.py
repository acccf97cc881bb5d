"""Clouds of other columns than the backbone's: matched by name, filled with zeros, and new ones trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AnatomyError,
    GAPromptConfig,
    InputAdapterConfig,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    TunerConfig,
    describe,
    get_peft_model,
    inject_adapter,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.tuners.input_adapter.columns import InputColumns
from tests.adapting import (
    ONE_BLOCK,
    adapt,
    assert_same_values,
    distance,
    fingerprint,
    frozen,
    loss_of,
    one_graph,
    rescramble,
    run,
)
from tests.methods import config
from tests.zoo import BACKBONES, Args, TinyBackbone

XYZ = ("x", "y", "z")
RGB = ("red", "green", "blue")
DENSE = BACKBONES["point_mae"]
PACKED = BACKBONES["pointcept_ptv3"]
PACKED_XYZ = InputAdapterConfig(channels=("z", "x", "y"), backbone_channels=(*XYZ, *RGB))
INTENSITY = InputAdapterConfig(channels=(*XYZ, "intensity"), backbone_channels=XYZ)
PACKED_NEW = InputAdapterConfig(channels=("intensity", "x", "y", "z"), backbone_channels=(*XYZ, *RGB))


def with_columns(backbone: TinyBackbone, args: Args, change: Any) -> Args:
    """Inputs with other columns: of the clouds, or of the entry `feat`."""
    if isinstance(args[0], dict):
        return ({**args[0], "feat": change(args[0]["feat"])}, *args[1:])
    return (change(args[0]), *args[1:])


def intense(points: Tensor, seed: int = 3) -> Tensor:
    """Clouds (..., 3 + c) with an intensity behind the first three columns, and nothing else."""
    e = torch.rand((*points.shape[:-1], 1), generator=torch.Generator().manual_seed(seed))
    return torch.cat([points[..., :3], e], dim=-1)


def zeroed(features: Tensor) -> Tensor:
    return torch.cat([features[..., :3], torch.zeros_like(features[..., 3:])], dim=-1)


def both(tuner: TunerConfig, backbone: TinyBackbone, *others: TunerConfig) -> PeftConfig:
    return PeftConfig(tuners=(tuner, *others), anatomy=backbone.traced)


def adapted(how: TunerConfig, backbone: TinyBackbone, *others: TunerConfig, fresh: bool = True) -> PointPeftModel:
    torch.manual_seed(0)
    model = get_peft_model(backbone.build(), both(how, backbone, *others)).eval()
    if not fresh:
        rescramble(model)
    return model


# ---- columns by name -------------------------------------------------------------------------------------------------


def test_lacking_columns_are_zero_and_others_in_the_order_of_the_backbone() -> None:
    args = PACKED.inputs(2, 5)
    expected = run(frozen(PACKED), PACKED, with_columns(PACKED, args, zeroed))
    model = adapted(PACKED_XYZ, PACKED)
    given = with_columns(PACKED, args, lambda feat: feat[:, [2, 0, 1]])
    before = {name: value.clone() for name, value in given[0].items()}
    assert torch.equal(run(model, PACKED, given), expected)
    assert_same_values(given[0], before, "what was given")
    with model.disable_adapter():
        assert torch.equal(run(model, PACKED, args), run(frozen(PACKED), PACKED, args))


def featured() -> TinyBackbone:
    return BACKBONES["point_features"]


@pytest.mark.parametrize("columns", [XYZ, ("z", "red", "x", "y"), (*XYZ, *RGB)])
def test_dense_clouds_are_filled_too(columns: Sequence[str]) -> None:
    backbone = featured()
    (points,) = backbone.inputs(2, 5)
    names = (*XYZ, *RGB)
    lacking = torch.tensor([float(name in columns) for name in names])
    expected = run(frozen(backbone), backbone, (points * lacking,))
    model = adapted(InputAdapterConfig(channels=columns, backbone_channels=names), backbone)
    assert torch.equal(run(model, backbone, (points[..., [names.index(name) for name in columns]],)), expected)


def test_a_model_that_keeps_its_class_and_its_other_methods_take_the_columns() -> None:
    (points,) = DENSE.inputs(2, 5)
    how = InputAdapterConfig(channels=("z", "y", "x"), backbone_channels=XYZ)
    expected = run(frozen(DENSE), DENSE, (points,))
    injected = inject_adapter(DENSE.build(), how).eval()
    assert torch.equal(run(injected, DENSE, (points.flip(-1),)), expected)
    model = adapted(how, DENSE)
    with torch.no_grad():
        tokens = model.forward_features(points.flip(-1))
        assert torch.equal(tokens, frozen(DENSE).forward_features(points))  # type: ignore[operator]


def test_what_the_caller_has_is_not_changed() -> None:
    columns = InputColumns(("z", "y", "x"), XYZ, None)
    feat = torch.rand(5, 3)
    nested = {"points": {"feat": feat}, "name": "a cloud"}
    (given,), _ = columns.fit((nested,), {})
    assert torch.equal(given["points"]["feat"], feat.flip(-1)) and nested["points"] == {"feat": feat}
    data = pytest.importorskip("torch_geometric.data").Data(x=feat, pos=feat)
    _, given = columns.fit((), {"data": data})
    assert torch.equal(given["data"].x, feat.flip(-1)) and data.x is feat and given["data"].pos is feat


# ---- new columns -----------------------------------------------------------------------------------------------------

NEW = [(INTENSITY, name) for name in ("point_mae", "compact", "pointgpt", "timm_vit", "part_seg")]
NEW += [(PACKED_NEW, "pointcept_ptv3")]
NEW += [(INTENSITY, name) for name in ("torch_pointcloud_ptv3", "official_ptv2", "pyg_point_transformer")]


def widened(how: InputAdapterConfig, backbone: TinyBackbone, args: Args, seed: int = 3) -> Args:
    """The inputs with an intensity: where the configuration has it, in the tensor that the columns are in."""
    if isinstance(args[0], dict):
        last = how is INTENSITY
        return with_columns(backbone, args, lambda f: intense(f, seed) if last else intense(f, seed).roll(1, dims=-1))
    if args[0] is None or backbone.name == "torch_pointcloud_ptv3":
        place = 1 if args[0] is None else 0
        return (*args[:place], intense(args[place], seed), *args[place + 1 :])
    return with_columns(backbone, args, lambda points: intense(points, seed))


@pytest.mark.parametrize(("how", "name"), NEW, ids=[name for _, name in NEW])
def test_a_new_column_begins_without_effect_and_learns(how: InputAdapterConfig, name: str) -> None:
    backbone = BACKBONES[name]
    args = backbone.inputs(2, 5)
    zero = with_columns(backbone, args, zeroed) if how is PACKED_NEW else args
    given = widened(how, backbone, args)
    model = adapted(how, backbone)
    expected = run(frozen(backbone), backbone, zero)
    assert distance(run(model, backbone, given), expected) < 1e-6
    weights = [p for key, p in get_adapter(model, "default").named_parameters() if key.endswith("columns.weight")]
    loss_of(backbone.select(model.train()(*given))).backward()
    assert len(weights) == 1 and weights[0].grad is not None and weights[0].grad.any()
    rescramble(model.eval())
    output = run(model, backbone, given)
    assert distance(run(model, backbone, widened(how, backbone, args, seed=4)), output) > 1e-4
    for i in range(2):
        assert distance(run(model, backbone, backbone.slice(given, i)), output[i : i + 1]) < 1e-5


def test_it_is_a_further_input_of_the_first_layer() -> None:
    """The same as a backbone whose first layer has one input more, which sees the column grouped with the points."""
    sizes: dict[str, Any] = {"trans_dim": 24, "depth": 1, "num_heads": 4, "num_group": 16, "group_size": 8}
    from_four, backbone = _of_columns(4, sizes), _of_columns(3, sizes)
    state = from_four.state_dict()
    first = "encoder.first_conv.0.weight"
    backbone.load_state_dict({**state, first: state[first][:, :3]})
    model = get_peft_model(backbone, INTENSITY).eval()
    (weight,) = [p for key, p in model.named_parameters() if key.endswith("columns.weight")]
    with torch.no_grad():
        weight.copy_(state[first][:, 3:, 0])
        clouds = intense(torch.rand(3, 100, 3, generator=torch.Generator().manual_seed(2)))
        torch.testing.assert_close(model(clouds), from_four(clouds))
        model.train(), from_four.train()
        for module in (*model.modules(), *from_four.modules()):
            if isinstance(module, nn.Dropout | nn.BatchNorm1d):
                module.eval()
        torch.testing.assert_close(model(clouds), from_four(clouds))


def _of_columns(count: int, sizes: dict[str, Any]) -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(in_channels=count, encoder_dims=24, drop_path_rate=0.0, cls_dim=5, **sizes).eval()


# ---- with other methods, files, several adapters ---------------------------------------------------------------------


OTHERS = [LoraConfig(), PointPEFTConfig(memory_bank=True), GAPromptConfig(), config("PPT", tuned_modules=["pos_embed"])]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.method)
def test_it_composes_and_files_carry_it(other: TunerConfig, tmp_path: Path) -> None:
    (points,) = DENSE.inputs(2, 5)
    model = adapted(INTENSITY, DENSE, other)
    if isinstance(other, PointPEFTConfig):
        clouds = [intense(DENSE.inputs(4, seed)[0]) for seed in (21, 22, 23, 24)]
        model.build_memory_bank(clouds)
        bare = adapt(DENSE, other, fresh=True)
        bank, expected = (get_adapter(m, "default").tensors()["point_peft.memory_bank.rows"] for m in (model, bare))
        assert torch.equal(bank, expected), "the bank is not that of the clouds without the new column"
    rescramble(model)
    given = intense(points)
    output = run(model, DENSE, (given,))
    assert distance(run(model, DENSE, (intense(points, 4),)), output) > 1e-4
    assert distance(run(model, DENSE, (given[1:],)), output[1:]) < 1e-5
    loss_of(model.train()(given)).backward()
    for name, parameter in get_adapter(model, "default").named_parameters():
        assert parameter.grad is not None, name
    for parameter in model.base_model.parameters():
        assert parameter.grad is None
    output = run(model.eval(), DENSE, (given,))  # with other statistics in the head
    model.save_pretrained(tmp_path)
    again = PointPeftModel.from_pretrained(DENSE.build(), tmp_path).eval()
    assert torch.equal(run(again, DENSE, (given,)), output)
    groups = {g["name"] for g in model.parameter_groups(1e-3)}
    assert {"heads", "adapters"} <= groups


def test_adapters_of_other_columns_share_a_backbone() -> None:
    (points,) = DENSE.inputs(4, 5)
    given = intense(points)
    model = adapted(INTENSITY, DENSE, PointPEFTConfig(memory_bank=True), fresh=False)
    model.build_memory_bank([intense(DENSE.inputs(16, 21)[0])])
    other = InputAdapterConfig(channels=("x", "z", "y", "time"), backbone_channels=XYZ)
    model.add_adapter("other", PeftConfig(tuners=(other, LoraConfig())))
    model.add_adapter("plain", LoraConfig())
    for name in ("other", "plain"):
        rescramble(model, name)
    alone = {}
    for name, clouds in (("default", given), ("other", given), ("plain", points)):
        with model.use_adapter(name):
            alone[name] = run(model, DENSE, (clouds,))
    tasks = model.forward_tasks(given, ["default", "other"])
    for task in ("default", "other"):
        assert distance(tasks[task].detach(), alone[task]) < 1e-5
    with torch.no_grad():
        mixed = model(given, adapter_names=["default", "other", "default", "other"])
    expected = torch.stack([alone[name][i] for i, name in enumerate(["default", "other", "default", "other"])])
    assert distance(mixed, expected) < 1e-5
    with model.use_adapter(["default", "other"]), pytest.raises(AdapterError, match="take clouds of other columns"):
        run(model, DENSE, (given,))
    with model.use_adapter(["default", "plain"]):
        assert run(model, DENSE, (given,)).shape == alone["plain"].shape


def test_checkpointing_threads_and_half_precision_change_nothing() -> None:
    backbone = BACKBONES["point_mae"]
    (points,) = backbone.inputs(2, 5)
    model, given = adapted(INTENSITY, backbone, LoraConfig(), fresh=False), intense(points)
    loss_of(model(given)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.base_model.set_grad_checkpointing(True)  # type: ignore[operator]
    loss_of(model(given)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in expected)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])
    output = run(model, backbone, (given,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distance(run(model, backbone, (given,)).float(), output) < 0.1
    wide = run(model.double(), backbone, (given.double(),))
    assert distance(wide.float(), output) < 1e-4
    half = get_peft_model(backbone.build().to(torch.bfloat16), both(INTENSITY, backbone)).eval()
    assert run(half, backbone, (given.to(torch.bfloat16),)).dtype == torch.bfloat16


def test_one_of_several_arguments_is_named_by_its_number() -> None:
    backbone = BACKBONES["uni3d"]
    xyz, colours = backbone.inputs(2, 5)
    how = InputAdapterConfig(channels=("blue", "red", "green"), backbone_channels=RGB, argument=1)
    expected = run(frozen(backbone), backbone, (xyz, colours))
    assert torch.equal(run(adapted(how, backbone), backbone, (xyz, colours[..., [2, 0, 1]])), expected)
    lacking = InputAdapterConfig(channels=("red", "alpha"), backbone_channels=RGB)
    model = adapted(lacking, backbone)
    alpha = torch.stack([colours[..., 0], torch.rand(2, 96)], dim=-1)
    zero = torch.cat([colours[..., :1], torch.zeros(2, 96, 2)], dim=-1)
    assert distance(run(model, backbone, (xyz, alpha)), run(frozen(backbone), backbone, (xyz, zero))) < 1e-6
    rescramble(model)
    moved = torch.stack([alpha[..., 0], 1 - alpha[..., 1]], dim=-1)
    assert distance(run(model, backbone, (xyz, moved)), run(model, backbone, (xyz, alpha))) > 1e-4


def test_it_compiles_to_one_graph() -> None:
    backbone = ONE_BLOCK
    (points,) = backbone.inputs(2, 5)
    model = adapted(INTENSITY, backbone, LoraConfig(), fresh=False)
    given = intense(points)
    output = run(model, backbone, (given,))
    with torch.no_grad():
        torch.testing.assert_close(one_graph(model)(given), output)


# ---- errors ----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"channels": XYZ}, "backbone_channels is None; allowed: names, if channels has some"),
    ({"backbone_channels": XYZ}, "backbone_channels is .*; allowed: names, if"),
    ({"channels": ("x", "x"), "backbone_channels": XYZ}, "channels is .*; allowed: one name or more, no two alike"),
    ({"channels": (), "backbone_channels": XYZ}, "channels is .*; allowed: one name or more"),
    ({"channels": ("a", "b"), "backbone_channels": XYZ}, "channels is .*; allowed: some of backbone_channels"),
    ({"channels": "xyz", "backbone_channels": XYZ}, "channels is 'xyz'"),
    ({"layers_to_transform": [0]}, "layers_to_transform is .*; allowed: None"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_columns_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PointPeftError, match=rf"InputAdapterConfig.{message}"):
        InputAdapterConfig(**fields)


def test_clouds_of_other_columns_are_refused() -> None:
    (points,) = DENSE.inputs(2, 5)
    model = adapted(INTENSITY, DENSE)
    with pytest.raises(AdapterError, match=r"4 columns, x, y, z, intensity.*0 are such .* given: \[0\] \(2, 96, 3\)"):
        model(points)
    assert run(model, DENSE, (intense(points),)).shape == (2, 5)
    with pytest.raises(AdapterError, match="direct call of a part of it: call the model"):
        model.base_model.get_submodule("group_divider")(points)
    packed = adapted(InputAdapterConfig(channels=XYZ, backbone_channels=(*XYZ, *RGB), argument="color"), PACKED)
    with pytest.raises(AdapterError, match="in one tensor called 'color'.*InputAdapterConfig.argument"):
        run(packed, PACKED)


def test_where_new_columns_cannot_go_is_said() -> None:
    base = DENSE.build()
    before = fingerprint(base)
    five = InputAdapterConfig(channels=(*XYZ, "intensity"), backbone_channels=("x", "y", "z", "a", "b"))
    with pytest.raises(AnatomyError, match="no layer ahead of the blocks takes 5 values of a point, or 8"):
        get_peft_model(base, five)
    named = InputAdapterConfig(channels=(*XYZ, "intensity"), backbone_channels=XYZ, target_modules=["norm"])
    with pytest.raises(AnatomyError, match="one linear layer or convolution.*it names 'norm'"):
        get_peft_model(base, named)
    assert fingerprint(base) == before
    backbone = BACKBONES["torch_pointcloud"]
    (x, pos, batch) = backbone.inputs(2, 5)
    with pytest.raises(AnatomyError, match="groups of points, and no module is known that makes them"):
        adapted(INTENSITY, backbone)(x, intense(pos), batch)


class GroupsByItself(nn.Module):
    """A model that makes groups in its own forward, and not in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.place = (nn.Sequential(nn.Linear(3, 24), nn.ReLU(), nn.Linear(24, 24)) for _ in range(2))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True) for _ in range(2))
        self.head = nn.Linear(24, 5)

    def forward(self, cloud: Tensor) -> Tensor:
        centres = cloud[:, ::8]
        nearest = torch.cdist(centres, cloud).topk(8, largest=False).indices
        around = cloud[torch.arange(len(cloud))[:, None, None], nearest] - centres[:, :, None]
        tokens = self.patch(around).amax(dim=2) + self.place(centres)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(tokens.amax(dim=1))
        return logits


def test_columns_are_refused_where_no_module_makes_the_groups() -> None:
    model, example = GroupsByItself().eval(), torch.rand(3, 64, 3)
    before = fingerprint(model)
    assert "points:      input[0] of the model; made into tokens by" in str(describe(model, example))
    with pytest.raises(AnatomyError, match="GroupsByItself groups the clouds in its own forward, and which points n"):
        get_peft_model(model, INTENSITY, example_inputs=(example,))
    assert fingerprint(model) == before
    lacking = InputAdapterConfig(channels=("x", "y"), backbone_channels=XYZ)
    flat = torch.cat([example[..., :2], torch.zeros(3, 64, 1)], dim=-1)
    expected = model(flat)
    assert torch.equal(get_peft_model(model, lacking, example_inputs=(example,))(example[..., :2]), expected)
