"""The point transformers: shapes, names, options, training behaviour, hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.backbones import PointTransformer, PointTransformerPartSeg, layers
from point_peft.backbones.layers import DropPath, Encoder, Group, sine_features
from point_peft.errors import PointPeftError

pytestmark = pytest.mark.smoke


def small(**options: Any) -> PointTransformer:
    torch.manual_seed(0)
    sizes = {"trans_dim": 48, "depth": 2, "num_group": 8, "group_size": 4, "encoder_dims": 48, "cls_dim": 5}
    return PointTransformer(**{**sizes, **options})


def small_partseg(**options: Any) -> PointTransformerPartSeg:
    torch.manual_seed(0)
    sizes = {"trans_dim": 48, "depth": 3, "num_group": 8, "group_size": 4, "encoder_dims": 48, "cls_dim": 6}
    return PointTransformerPartSeg(**{**sizes, "taps": (0, 2), **options})


def clouds(b: int = 2, n: int = 64) -> Tensor:
    return torch.rand(b, n, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


def one_hot(b: int = 2) -> Tensor:
    return torch.eye(16)[:b, None]


def test_group_returns_centred_neighbours_and_their_centres() -> None:
    points = clouds()
    neighborhood, center = Group(8, 4)(points)
    assert neighborhood.shape == (2, 8, 4, 3) and center.shape == (2, 8, 3)
    assert not neighborhood[:, :, 0].any(), "the nearest neighbour of a centre is the centre"
    members = neighborhood + center[:, :, None]
    assert geometry.squared_distance(members.flatten(1, 2), points).amin(2).max() < 1e-12
    assert torch.equal(center[:, 0], points[:, 0])


def test_the_default_model_is_point_mae_s() -> None:
    model = PointTransformer()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 174
    assert shapes["cls_pos"] == (1, 1, 384)
    assert shapes["blocks.blocks.11.mlp.fc1.weight"] == (1536, 384)
    assert shapes["cls_head_finetune.0.weight"] == (256, 768)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(22.1e6, rel=0.005)


def test_forward_is_head_of_features() -> None:
    model, points = small().eval(), clouds()
    tokens = model.forward_features(points)
    assert tokens.shape == (2, 9, 48)
    logits = model(points)
    assert logits.shape == (2, 5)
    assert torch.equal(model.forward_head(tokens), logits)
    swapped = torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1)
    assert torch.equal(model.forward_head(swapped), logits), "the head takes the maximum over patches"


def test_the_order_of_the_points_does_not_matter_beyond_the_first() -> None:
    model, points = small().eval(), clouds()
    shuffled = torch.cat([points[:, :1], points[:, 1:].flip(1)], dim=1)
    assert torch.allclose(model(shuffled), model(points), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "count", "shapes"),
    [
        (
            {"encoder_dims": 32, "head_norm": False},  # Point-BERT
            54,
            {"reduce_dim.weight": (48, 32), "cls_head_finetune.0.weight": (256, 96), "cls_head_finetune.3.bias": (5,)},
        ),
        # PCP-MAE, in the shapes of its official checkpoints
        ({"pos_features": "sine"}, 64, {"pos_embed.0.weight": (48, 48), "pos_embed.2.weight": (48, 48)}),
        (
            {"prefix_tokens": ("cls", "img", "text")},  # ReCon
            68,
            {"img_token": (1, 1, 48), "text_pos": (1, 1, 48), "cls_head_finetune.0.weight": (256, 192)},
        ),
    ],
)
def test_options_make_the_relatives(options: dict[str, Any], count: int, shapes: dict[str, tuple[int, ...]]) -> None:
    model = small(**options).eval()
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: found[name] for name in shapes} == shapes
    assert ("reduce_dim.weight" in found) == ("encoder_dims" in options)
    assert len(found) == count
    assert model.forward_features(clouds()).shape == (2, 8 + len(model.prefix_tokens), 48)
    assert model(clouds()).shape == (2, 5)


def test_sine_features_are_sines_and_cosines_of_each_axis() -> None:
    center = clouds(1, 4)
    features = sine_features(center, 12).reshape(1, 4, 3, 2, 2)
    assert torch.allclose(features[..., 0, 0], center.sin())
    assert torch.allclose(features[..., 1, 0], center.cos())
    assert torch.allclose(features[..., 0, 1], (center / 100).sin())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "trans_dim 48 is not divisible by num_heads 5"),
        ({"pos_features": "polar"}, "'xyz' or 'sine', got 'polar'"),
        ({"pos_features": "sine", "trans_dim": 32, "num_heads": 4}, "divisible by 6, got 32"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PointPeftError, match=message):
        small(**options)


def test_clouds_of_the_wrong_shape_or_size_are_refused() -> None:
    with pytest.raises(PointPeftError, match=r"points must be \(b, n, 3\), got \(2, 3, 64\)"):
        small()(clouds().transpose(1, 2))
    with pytest.raises(PointPeftError, match=r"are \(2, 7, 3\).*at least 8 points.*8 groups of 4"):
        small()(clouds(n=7))


@pytest.mark.parametrize("mode", ["eval", "frozen in training"])
def test_the_encoder_does_some_groups_at_a_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = Encoder(24).train(mode != "eval").requires_grad_(False)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.training = False
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    neighborhood = torch.randn(3, 7, 8, 3)
    whole = encoder(neighborhood)
    monkeypatch.setattr(layers, "CHUNK_ELEMENTS", 5 * 8 * 512)
    sizes: list[int] = []
    chunks = encoder._chunks

    def noted(groups: Tensor) -> Sequence[Tensor]:
        sizes.extend(len(part) for part in chunks(groups))
        return chunks(groups)

    monkeypatch.setattr(encoder, "_chunks", noted)
    torch.testing.assert_close(encoder(neighborhood), whole)
    assert sizes == [5, 5, 5, 5, 1]


def test_groups_whose_statistics_are_taken_together_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "CHUNK_ELEMENTS", 1)
    calls: list[int] = []
    encoder = Encoder(24)
    encoder.first_conv.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[2]))
    cases: list[tuple[nn.Module, bool]] = [(encoder, True), (encoder.first_conv[1], True), (encoder, False)]
    for module, training in cases:
        encoder.eval()
        module.train(training)
        calls.clear()
        encoder(torch.randn(3, 7, 8, 3))
        assert calls == ([3 * 7 * 8] if training else [8] * 21)


def test_every_projection_is_called_as_a_module() -> None:
    model, called = small(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    model(clouds())
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    leaves.remove("encoder.second_conv.0")  # its two halves are applied apart
    blocks = {f"blocks.blocks.{i}{part}" for i in range(2) for part in ("", ".attn", ".mlp")}
    assert leaves | blocks | {"encoder", "group_divider", "pos_embed", "blocks", "cls_head_finetune"} <= called


def test_every_parameter_gets_a_gradient() -> None:
    model = small()
    model(clouds(4)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_positions_are_added_before_every_block() -> None:
    model, points = small().eval(), clouds()
    inputs, outputs, positions = [], [], []
    model.pos_embed.register_forward_hook(lambda module, args, output: positions.append(output))
    for block in model.blocks.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(points)
    added = inputs[1] - outputs[0]
    assert torch.allclose(added[:, 1:], positions[0], atol=1e-6)
    assert torch.allclose(added[:, :1], model.state_dict()["cls_pos"].expand(2, 1, 48), atol=1e-6)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, branch = DropPath(0.25), torch.ones(4000, 2, 3)
    dropped = layer(branch)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)
    assert layer.eval()(branch) is branch


def test_drop_path_grows_with_depth() -> None:
    model = small(depth=3, drop_path_rate=0.2)
    assert [module.rate for module in model.modules() if isinstance(module, DropPath)] == pytest.approx([0.0, 0.1, 0.2])
    assert small(depth=1, drop_path_rate=0.2)(clouds()).isfinite().all()


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
    expected = model(points)
    found = model.to(torch.bfloat16)(points.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.1)


def test_partseg_returns_log_probabilities_of_each_point() -> None:
    model = small_partseg().eval()
    out = model(clouds(), one_hot())
    assert out.shape == (2, 64, 6)
    assert torch.allclose(out.exp().sum(2), torch.ones(2, 64))
    assert torch.equal(model(clouds(), one_hot()[:, 0]), out), "the label may come without its middle axis"
    assert not torch.allclose(model(clouds(), one_hot().flip(0)), out), "the label is read"
    assert torch.allclose(model(clouds()[:1], one_hot()[:1]), out[:1], atol=1e-5)


def test_partseg_follows_the_order_of_the_points() -> None:
    model, points = small_partseg().eval(), clouds()
    flipped = torch.cat([points[:, :1], points[:, 1:].flip(1)], dim=1)
    out, expected = model(flipped, one_hot()), model(points, one_hot())
    assert torch.allclose(out[:, 1:].flip(1), expected[:, 1:], atol=1e-4)


def test_partseg_calls_its_norm_once_per_tap_and_trains_every_parameter() -> None:
    model, calls = small_partseg(encoder_dims=32), []
    model.norm.register_forward_hook(lambda module, args, output: calls.append(output))
    model(clouds(), one_hot()).square().sum().backward()
    assert len(calls) == 2
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not any(name.startswith("cls_") for name in model.state_dict())


@pytest.mark.parametrize("taps", [(), (2, 0), (0, 0), (0, 3), (-1, 2)])
def test_partseg_refuses_impossible_taps(taps: tuple[int, ...]) -> None:
    with pytest.raises(PointPeftError, match="taps must be ascending block numbers below depth 3"):
        small_partseg(taps=taps)


def test_partseg_refuses_a_label_of_the_wrong_shape() -> None:
    with pytest.raises(PointPeftError, match=r"label must be one-hot, \(2, 16\) or \(2, 1, 16\), got \(2,\)"):
        small_partseg()(clouds(), torch.tensor([0, 1]))
