"""The hierarchical point transformers: names, checkpoints, and the numbers of torch-pointcloud's Point-M2AE."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.backbones import HierarchicalPointTransformer, HierarchicalPointTransformerPartSeg, load_checkpoint
from point_peft.backbones.hierarchical import IndexedGroup, distant
from point_peft.backbones.layers import Attention, DropPath
from point_peft.errors import PointPeftError
from tests import golden
from tests.zoo import enliven, supply_pyg_operators

TOLERANCE = 1e-5
SIZES: dict[str, Any] = {
    "num_groups": (32, 16, 8), "group_sizes": (8, 4, 4), "encoder_dims": (12, 24, 48), "encoder_depths": (2, 1, 2),
    "num_heads": 2,
}  # fmt: skip


def small(seed: int = 0, **options: Any) -> HierarchicalPointTransformer:
    torch.manual_seed(seed)
    return HierarchicalPointTransformer(**{**SIZES, "cls_dim": 5, **options})


def small_partseg(seed: int = 0, **options: Any) -> HierarchicalPointTransformerPartSeg:
    torch.manual_seed(seed)
    return HierarchicalPointTransformerPartSeg(**{**SIZES, "cls_dim": 6, "num_labels": 4, **options})


def clouds(b: int = 2, n: int = 64, seed: int = 1) -> Tensor:
    return torch.rand(b, n, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def one_hot(b: int = 2) -> Tensor:
    return torch.eye(4)[:b, None]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- the numbers of torch-pointcloud ---------------------------------------------------------------------------------

# Ours -> theirs, applied in this order; what no rule meets has the same name in both.
RENAMED = [
    (r"first_conv\.", "local_mlp."),
    (r"second_conv\.", "global_mlp."),
    (r"cls_head_finetune\.", "head."),
    (r"(_mlp|label_conv|head)\.0\.", r"\1.lins.0."),
    (r"(_mlp|label_conv|head)\.1\.", r"\1.norms.0.module."),
    (r"_mlp\.3\.", "_mlp.lins.1."),
    (r"head\.4\.", "head.lins.1."),
    (r"head\.5\.", "head.norms.1.module."),
    (r"head\.8\.", "head.lins.2."),
    (r"(pos_embeds\.\d)\.0\.", r"\1.lins.0."),
    (r"(pos_embeds\.\d)\.2\.", r"\1.lins.1."),
    (r"mlp\.fc1\.", "mlp.lins.0."),
    (r"mlp\.fc2\.", "mlp.lins.1."),
    (r"mlp_convs\.", "mlp.lins."),
    (r"mlp_bns\.(\d)", r"mlp.norms.\1.module"),
    *((rf"^convs{i + 1}\.", f"head.lins.{i}.") for i in range(4)),
    *((rf"^bns{i + 1}\.", f"head.norms.{i}.module.") for i in range(3)),
]


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = {}
    for name, tensor in tensors.items():
        if name.endswith("mlp_convs.0.weight"):  # there the coordinates come after the carried features
            tensor = torch.cat([tensor[:, 3:], tensor[:, :3]], dim=1)
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        theirs[name] = tensor[..., 0] if tensor.ndim == 3 else tensor
    return theirs


def reference(ours: nn.Module, kind: str, classes: int, **options: Any) -> nn.Module:
    """torch-pointcloud's model with the weights of ours."""
    supply_pyg_operators()
    from torch_pointcloud.models import point_m2ae

    model: nn.Module = getattr(point_m2ae, kind)(0, classes, **options)
    model.load_state_dict(renamed(snapshot(ours)))
    return model.eval()


def packed(points: Tensor) -> tuple[None, Tensor, Tensor]:
    return None, points.flatten(0, 1), torch.arange(len(points)).repeat_interleave(points.shape[1])


def recorded(model: nn.Module) -> dict[str, Tensor]:
    """Inputs and outputs of the levels in the coming forward."""
    seen: dict[str, Tensor] = {}
    for part in ("token_embed", "encoder_pos_embeds", "encoder_blocks"):
        for i, module in enumerate(model.get_submodule(f"h_encoder.{part}").children()):
            module.register_forward_hook(lambda m, args, output, key=f"{part}.{i}": seen.__setitem__(key, output))
    return seen


def assert_same_levels(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) == 9
    for name, tensor in ours.items():
        golden.assert_close(tensor, theirs[name].reshape(tensor.shape), TOLERANCE)


def assert_clear_of_radii(model: HierarchicalPointTransformer, points: Tensor) -> None:
    """No two centres are so nearly a radius apart that the reference's rounding might decide otherwise."""
    for divider, radius in zip(model.group_dividers, model.h_encoder.radii, strict=True):
        points = divider(points)[1]
        gap = (geometry.squared_distance(points, points).sqrt() - radius).abs().amin()
        assert gap > 1e-6, "choose another seed"


@pytest.mark.parametrize("pooling", ["sum", "concat"])
def test_classification_has_the_numbers_of_the_reference(pooling: str) -> None:
    model = small(pooling=pooling)
    enliven(model.eval())
    other = reference(model, "PointM2AEClassification", 5, **SIZES, concat_pooling=pooling == "concat")
    points, ours, theirs = clouds(3, 96), recorded(model), recorded(other)
    assert_clear_of_radii(model, points)
    with torch.no_grad():
        golden.assert_close(model(points), other(*packed(points)), TOLERANCE)
    assert_same_levels(ours, theirs)


def test_the_default_model_has_the_numbers_of_the_default_reference() -> None:
    torch.manual_seed(0)
    model = HierarchicalPointTransformer()
    enliven(model.eval())
    other = reference(model, "PointM2AEClassification", 40)
    points, ours, theirs = clouds(1, 1024), recorded(model), recorded(other)
    assert_clear_of_radii(model, points)
    with torch.no_grad():
        golden.assert_close(model(points), other(*packed(points)), TOLERANCE)
    assert_same_levels(ours, theirs)


def test_part_segmentation_has_the_numbers_of_the_reference() -> None:
    model = small_partseg()
    enliven(model.eval())
    other = reference(model, "PointM2AEPartSegmentation", 6, **SIZES, num_categories=4)
    points, ours, theirs = clouds(), recorded(model), recorded(other)
    with torch.no_grad():
        expected = other(*packed(points), one_hot()[:, 0]).unflatten(0, (2, 64)).log_softmax(2)
        golden.assert_close(model(points, one_hot()), expected, TOLERANCE)
    assert_same_levels(ours, theirs)


# ---- names and checkpoints -------------------------------------------------------------------------------------------


def named(stem: str, *ends: str) -> set[str]:
    return {f"{stem}.{end}" for end in ends}


def norm_names(stem: str, batch: bool = False) -> set[str]:
    statistics = ("running_mean", "running_var", "num_batches_tracked") if batch else ()
    return named(stem, "weight", "bias", *statistics)


def encoder_names(output_norms: bool) -> set[str]:
    names = set()
    for i in range(3):
        for conv in (f"h_encoder.token_embed.{i}.{part}_conv" for part in ("first", "second")):
            names |= named(conv, "0.weight", "0.bias", "3.weight", "3.bias") | norm_names(f"{conv}.1", batch=True)
        names |= named(f"h_encoder.encoder_pos_embeds.{i}", "0.weight", "0.bias", "2.weight", "2.bias")
        names |= norm_names(f"h_encoder.encoder_norms.{i}") if output_norms else set()
        for block in (f"h_encoder.encoder_blocks.{i}.blocks.{n}" for n in range(5)):
            names |= norm_names(f"{block}.norm1") | norm_names(f"{block}.norm2")
            names |= named(f"{block}.attn", "qkv.weight", "proj.weight", "proj.bias")
            names |= named(f"{block}.mlp", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return names


def head_names() -> set[str]:
    linears = named("cls_head_finetune", *(f"{i}.{kind}" for i in (0, 4, 8) for kind in ("weight", "bias")))
    return linears | norm_names("cls_head_finetune.1", batch=True) | norm_names("cls_head_finetune.5", batch=True)


def pretrained(source: HierarchicalPointTransformerPartSeg, prefix: str = "") -> dict[str, Tensor]:
    """The names in the checkpoint of a Point-M2AE pre-training run."""
    encoder = {name: tensor for name, tensor in snapshot(source).items() if name.startswith("h_encoder.")}
    others = {
        "mask_token", "h_decoder.0.blocks.0.norm1.weight", "decoder_pos_embeds.0.0.weight", "decoder_norm.weight",
        "token_prop.0.fuse.net.0.weight", "rec_head.weight",
    }  # fmt: skip
    return {prefix + name: tensor for name, tensor in {**encoder, **dict.fromkeys(others, torch.zeros(1))}.items()}


def test_the_default_models_are_point_m2ae() -> None:
    model, partseg = HierarchicalPointTransformer(), HierarchicalPointTransformerPartSeg()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes.keys() == encoder_names(output_norms=False) | norm_names("norm") | head_names()
    assert len(shapes) == 249 and len(encoder_names(output_norms=False)) == 231
    assert sum(parameter.numel() for parameter in model.parameters()) == 12_830_056
    assert shapes["h_encoder.token_embed.0.second_conv.0.weight"] == (512, 512, 1)
    assert shapes["h_encoder.token_embed.1.first_conv.0.weight"] == (96, 96, 1)
    assert shapes["h_encoder.token_embed.2.second_conv.3.weight"] == (384, 384, 1)
    assert shapes["h_encoder.encoder_pos_embeds.1.0.weight"] == (192, 3)
    assert shapes["cls_head_finetune.0.weight"] == (256, 384)

    saved = {name: tuple(tensor.shape) for name, tensor in partseg.state_dict().items()}
    encoder = {name for name in saved if name.startswith("h_encoder.")}
    assert encoder == encoder_names(output_norms=True) and len(encoder) == 237
    assert {name.split(".")[0] for name in saved.keys() - encoder} == {
        "label_conv", "propagations", "convs1", "bns1", "convs2", "bns2", "convs3", "bns3", "convs4",
    }  # fmt: skip
    assert saved["propagations.0.mlp_convs.0.weight"] == (1536, 99, 1)
    assert saved["convs1.weight"] == (1024, 6208, 1)


def test_scanobjectnn_s_head_is_as_large_as_the_official_one() -> None:
    model = HierarchicalPointTransformer(group_sizes=(32, 16, 16), pooling="concat", cls_dim=15)
    assert sum(parameter.numel() for parameter in model.cls_head_finetune.parameters()) == 267_535


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_pre_training_checkpoint_fills_the_encoder(tmp_path: Path, prefix: str) -> None:
    depths: dict[str, Any] = {"encoder_depths": (5, 5, 5)}
    content = pretrained(small_partseg(1, **depths), prefix)
    torch.save({"base_model": content, "epoch": 300}, tmp_path / "a.pth")
    model = small(2, **depths)
    before = snapshot(model)
    report = load_checkpoint(model, tmp_path / "a.pth")
    after = model.state_dict()
    assert set(report.loaded) == encoder_names(output_norms=False)
    assert all(torch.equal(after[name], content[prefix + name]) for name in report.loaded)
    assert set(report.missing) == norm_names("norm") | head_names()
    assert all(torch.equal(after[name], before[name]) for name in report.missing)
    assert {name.removeprefix(prefix).split(".")[0] for name in report.unexpected} == {
        "h_encoder", "mask_token", "h_decoder", "decoder_pos_embeds", "decoder_norm", "token_prop", "rec_head",
    }  # fmt: skip
    unexpected = {name.removeprefix(prefix) for name in report.unexpected if "h_encoder." in name}
    assert unexpected == encoder_names(output_norms=True) - encoder_names(output_norms=False)
    assert str(report).startswith("loaded 231 of 249 tensors")


def test_the_part_segmentation_model_takes_the_output_norms_too(tmp_path: Path) -> None:
    depths: dict[str, Any] = {"encoder_depths": (5, 5, 5)}
    torch.save({"base_model": pretrained(small_partseg(1, **depths))}, tmp_path / "a.pth")
    report = load_checkpoint(small_partseg(2, **depths), tmp_path / "a.pth")
    assert set(report.loaded) == encoder_names(output_norms=True)
    assert len(report.unexpected) == 6


def test_what_i2p_mae_would_save_beside_the_encoder_is_unexpected(tmp_path: Path) -> None:
    content = {**pretrained(small_partseg(1), "module."), "module.of_images.weight": torch.zeros(1)}
    torch.save({"base_model": content}, tmp_path / "a.pth")
    model = small(2, local_radius=(0.24, 0.48, 0.96))
    report = load_checkpoint(model, tmp_path / "a.pth")
    assert "module.of_images.weight" in report.unexpected
    assert set(report.missing) == norm_names("norm") | head_names()


def test_a_fine_tuned_model_comes_back_except_for_other_classes(tmp_path: Path) -> None:
    torch.save({"base_model": snapshot(small(1, cls_dim=7))}, tmp_path / "a.pth")
    assert load_checkpoint(small(2, cls_dim=7), tmp_path / "a.pth").missing == ()
    assert load_checkpoint(small(2), tmp_path / "a.pth").missing == (
        "cls_head_finetune.8.bias", "cls_head_finetune.8.weight",
    )  # fmt: skip
    torch.save({"base_model": snapshot(small_partseg(1, cls_dim=7))}, tmp_path / "b.pth")
    assert load_checkpoint(small_partseg(2), tmp_path / "b.pth").missing == ("convs4.bias", "convs4.weight")


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_groups_tell_whose_they_are() -> None:
    points = clouds()
    neighborhood, center, index = IndexedGroup(8, 4)(points)
    assert neighborhood.shape == (2, 8, 4, 3) and center.shape == (2, 8, 3) and index.shape == (2, 8, 4)
    assert torch.equal(geometry.gather(points, index), neighborhood + center[:, :, None])


def test_every_level_groups_the_centres_of_the_one_below() -> None:
    model, centers = small().eval(), []
    for divider in model.group_dividers:
        divider.register_forward_hook(lambda module, args, output: centers.append((args[0], output[1])))
    model(clouds())
    assert [tuple(center.shape) for _, center in centers] == [(2, 32, 3), (2, 16, 3), (2, 8, 3)]
    assert all(centers[i + 1][0] is centers[i][1] for i in range(2))


def test_a_token_is_made_of_tokens_below_by_their_index() -> None:
    model = small(encoder_depths=(1, 1, 1)).eval()
    seen: dict[str, Tensor] = {}
    model.group_dividers[1].register_forward_hook(lambda m, args, output: seen.__setitem__("index", output[2]))
    model.h_encoder.encoder_blocks[0].register_forward_hook(lambda m, args, output: seen.__setitem__("below", output))
    model.h_encoder.token_embed[1].register_forward_pre_hook(lambda m, args: seen.__setitem__("members", args[0]))
    model(clouds())
    b, g, k = seen["index"].shape
    for sample in range(b):
        assert torch.equal(seen["members"][sample], seen["below"][sample, seen["index"][sample]])
    assert seen["members"].shape == (b, g, k, 12)


def block_calls(model: nn.Module, *inputs: Tensor) -> list[list[tuple[Tensor, ...]]]:
    """(tokens, mask, output) of every block of every level."""
    calls: list[list[tuple[Tensor, ...]]] = []
    for level in model.get_submodule("h_encoder.encoder_blocks").children():
        calls.append([])
        for block in level.get_submodule("blocks").children():
            block.register_forward_hook(lambda module, args, output, own=calls[-1]: own.append((*args, output)))
    model(*inputs)
    return calls


def test_positions_are_added_before_every_block_and_the_mask_is_one_per_level() -> None:
    model, positions = small().eval(), []
    for embed in model.h_encoder.encoder_pos_embeds:
        embed.register_forward_hook(lambda module, args, output: positions.append(output))
    calls = block_calls(model, clouds())
    assert [len(level) for level in calls] == [2, 1, 2]
    for pos, level, (b, g) in zip(positions, calls, [(2, 32), (2, 16), (2, 8)], strict=True):
        assert len({id(mask) for _, mask, _ in level}) == 1
        assert level[0][1].dtype == torch.bool and level[0][1].shape == (b, g, g)
        for (_, _, before), (tokens, _, _) in pairwise(level):
            assert torch.allclose(tokens, before + pos, atol=1e-6)


def test_masks_hide_what_lies_a_radius_or_more_apart() -> None:
    center = torch.tensor([[[0.0, 0, 0], [0.5, 0, 0], [0.0, 0.25, 0]]])
    mask = distant(center, 0.5)
    assert mask is not None
    assert mask.tolist() == [[[False, True, False], [True, False, True], [False, True, False]]]
    assert distant(center, 0) is None
    assert all(mask is None for level in block_calls(small(local_radius=(0, 0, 0)), clouds()) for _, mask, _ in level)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_attention_does_not_see_what_the_mask_ignores(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention, tokens = Attention(12, 2), torch.randn(2, 5, 12)
    mask = torch.zeros(2, 5, 5, dtype=dtype)
    assert torch.allclose(attention(tokens, mask), attention(tokens), atol=1e-6)
    mask[0, :, 3:] = 1
    out = attention(tokens, mask)
    assert torch.allclose(out[0, :3], attention(tokens[:1, :3])[0], atol=1e-6)
    assert torch.allclose(out[1], attention(tokens)[1], atol=1e-6)


def test_forward_is_head_of_features() -> None:
    for pooling, moves in (("sum", False), ("concat", True)):
        model, points = small(pooling=pooling).eval(), clouds()
        tokens = model.forward_features(points)
        assert tokens.shape == (2, 8, 48)
        assert torch.equal(model.forward_head(tokens), model(points))
        flipped = model.forward_head(tokens.flip(1))
        assert torch.allclose(flipped, model(points), atol=1e-6) != moves, "only concat tells the first token apart"


def test_the_samples_of_a_batch_do_not_mix() -> None:
    points, labels = clouds(3), one_hot(3)
    model, partseg = small(), small_partseg()
    for net in (model, partseg):
        enliven(net.eval())
    together, segmented = model(points), partseg(points, labels)
    for i in range(3):
        alone = slice(i, i + 1)
        assert torch.allclose(model(points[alone]), together[alone], atol=TOLERANCE)
        assert torch.allclose(partseg(points[alone], labels[alone]), segmented[alone], atol=TOLERANCE)


def test_the_order_of_the_points_does_not_matter_beyond_the_first() -> None:
    model, points = small().eval(), clouds()
    shuffled = torch.cat([points[:, :1], points[:, 1:].flip(1)], dim=1)
    assert torch.allclose(model(shuffled), model(points), atol=TOLERANCE)


def test_every_parameter_gets_a_gradient() -> None:
    for model, inputs in ((small(), (clouds(4),)), (small_partseg(), (clouds(4), one_hot(4)))):
        model(*inputs).square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []


def test_drop_path_grows_over_all_levels() -> None:
    model = small(encoder_depths=(2, 1, 1), drop_path_rate=0.3)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_a_fresh_model_learns() -> None:
    model, points, target = small(), clouds(4), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(points), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_half_precision_model_runs() -> None:
    model, points = small().eval(), clouds()
    rounded = points.to(torch.bfloat16)
    expected = model(rounded.float())
    found = model.to(torch.bfloat16)(rounded)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.1)


def test_partseg_returns_log_probabilities_of_each_point() -> None:
    model = small_partseg().eval()
    out = model(clouds(), one_hot())
    assert out.shape == (2, 64, 6)
    assert torch.allclose(out.exp().sum(2), torch.ones(2, 64))
    assert torch.equal(model(clouds(), one_hot()[:, 0]), out), "the label may come without its middle axis"
    assert not torch.allclose(model(clouds(), one_hot().flip(0)), out), "the label is read"


@pytest.mark.parametrize("make", [small, small_partseg])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": (32, 16)}, r"every level needs one value of each option, got num_groups \(32, 16\), group_s"),
        ({"num_groups": (), "group_sizes": ()}, r"every level needs one value .* num_groups \(\)"),
        ({"encoder_depths": (2, 0, 1)}, r"encoder_depths must be 1 or more, got \(2, 0, 1\)"),
        ({"local_radius": (0.1, -0.1, 0.3)}, r"local_radius must be 0 or more, got \(0.1, -0.1, 0.3\)"),
        ({"num_groups": (32, 33, 8)}, "level 1 cannot make 33 groups of 4 from the 32 of the one below"),
        ({"group_sizes": (8, 4, 17)}, "level 2 cannot make 8 groups of 17 from the 16 of the one below"),
        ({"num_heads": 5}, r"encoder_dims \(12, 24, 48\): 12 is not divisible by num_heads 5"),
    ],
)
def test_impossible_options_are_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PointPeftError, match=message):
        make(**options)


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(PointPeftError, match="pooling must be 'sum' or 'concat', got 'mean'"):
        small(pooling="mean")


def test_clouds_and_labels_of_the_wrong_shape_or_size_are_refused() -> None:
    with pytest.raises(PointPeftError, match=r"points must be \(b, n, 3\), got \(2, 3, 64\)"):
        small()(clouds().transpose(1, 2))
    with pytest.raises(PointPeftError, match=r"are \(2, 31, 3\).*at least 32 points"):
        small()(clouds(n=31))
    with pytest.raises(PointPeftError, match=r"label must be one-hot, \(2, 4\) or \(2, 1, 4\), got \(2,\)"):
        small_partseg()(clouds(), torch.tensor([0, 1]))
