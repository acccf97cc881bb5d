"""Pre-training: the generator of categories, a tiny pre-training, what it exports and what is embedded."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from point_peft.backbones import PointTransformer, default_backbone, load_checkpoint
from point_peft.backbones.checkpoint import EMBEDDED
from point_peft.quickstart.data import unit_sphere
from tools import pretrain, shapes
from tools.shapes import Program

TINY: dict[str, Any] = {
    "trans_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_group": 16,
    "group_size": 8,
    "encoder_dims": 24,
}


# --- categories ---


def test_an_instance_is_told_by_its_numbers():
    first = shapes.sample(Program(3, 1), 128)
    assert np.array_equal(first, shapes.sample(Program(3, 1), 128))
    for other in (Program(3, 2), Program(4, 1), Program(3, 1, seed=5)):
        assert not np.array_equal(first, shapes.sample(other, 128))


def test_clouds_fill_the_unit_sphere():
    clouds = np.stack([shapes.sample(Program(category), 200) for category in range(20)])
    assert clouds.dtype == np.float32 and clouds.shape == (20, 200, 3)
    assert np.allclose(np.linalg.norm(clouds, axis=2).max(axis=1), 1, atol=1e-5)
    assert np.allclose(clouds.mean(axis=1), 0, atol=1e-5)


def test_a_program_changes_what_is_measured_and_keeps_what_is_chosen():
    same = [Program(7, instance, jitter=0.05) for instance in range(200)]
    lengths = np.array([program.uniform(2.0, 4.0) for program in same])
    assert 0.05 < lengths.std() < 0.15 and lengths.min() >= 2.0 and lengths.max() <= 4.0
    assert len({(program.integers(9), bool(program.chance(0.5)), program.choice(5)) for program in same}) == 1
    assert np.std([program.normal() for program in same]) == pytest.approx(0.1, rel=0.2)


def test_instances_of_a_category_are_more_alike_than_of_two():
    """By a crude description of a cloud, its occupancy of a coarse grid."""

    def grid(category: int, instance: int) -> Any:
        cell = ((shapes.sample(Program(category, instance)) + 1) * 2.999).astype(int)
        counts = np.bincount(cell @ [36, 6, 1], minlength=216).astype(float)
        return counts / np.linalg.norm(counts)

    described = np.stack([[grid(category, instance) for instance in range(2)] for category in range(40)])
    alike = described[:, 0] @ described[:, 1].T
    assert (alike.argmax(axis=1) == np.arange(40)).mean() > 0.6


@pytest.mark.parametrize("family", shapes.FAMILIES, ids=lambda family: family.__name__)
def test_every_family_gives_clouds(family):
    for category in range(5):
        points = unit_sphere(family(Program(category), 256))
        assert points.ndim == 2 and points.shape[1] == 3 and len(points) > 32
        assert np.isfinite(points).all()
        assert np.linalg.svd(points)[1][1] > 0.01  # neither a point nor a line


def test_loft_is_sampled_uniformly_by_area():
    """On a cylinder, 4 high and of radius 1, the side holds as many points as its share of the area."""
    circle = shapes.superellipse(1.0, 64)
    rings = np.stack([np.concatenate([circle, np.full((64, 1), z)], axis=1) for z in (-2.0, 1.5, 2.0)])
    points = shapes.sample_loft(Program(0), shapes.with_caps(rings), 20_000)
    side = np.abs(points[:, 2]) < 2 - 1e-9
    assert abs(side.mean() - 8 / 10) < 0.01
    assert abs((points[side, 2] > 1.5).mean() - 1 / 8) < 0.01


def test_rotations_are_rotations():
    turns = shapes.random_rotations(Program(0), 50)
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3))
    assert np.allclose(np.linalg.det(turns), 1)
    vectors = torch.tensor([[0.0, 0.0, math.pi / 2], [0.3, -0.2, 0.1]])
    turned = pretrain.turns(vectors)
    assert torch.allclose(turned @ turned.mT, torch.eye(3).expand(2, 3, 3), atol=1e-6)
    assert torch.allclose(turned[0] @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


# --- pre-training ---


def tiny() -> pretrain.Pretraining:
    torch.manual_seed(0)
    return pretrain.Pretraining(PointTransformer(**TINY), 6, depth=1)


def test_chamfer_of_equal_sets_is_zero():
    points = torch.rand(4, 8, 3)
    assert pretrain.chamfer(points, points[:, torch.randperm(8)]) == 0
    assert pretrain.chamfer(points, points + torch.tensor([3.0, 0, 0])) > 1


def test_contrast_is_least_where_partners_are_nearest():
    partners = torch.nn.functional.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    found = pretrain.contrast(torch.cat([partners, partners]) @ torch.cat([partners, partners]).T / 0.05)
    lost = pretrain.contrast(torch.cat([partners, partners.flip(0)]) @ torch.cat([partners, partners.flip(0)]).T / 0.05)
    assert found < 0.01 < 1 < lost


def test_tokens_are_those_of_the_encoder_while_training():
    torch.manual_seed(0)
    model, groups = PointTransformer(**TINY).train(), torch.randn(2, 5, 8, 3)
    assert torch.allclose(pretrain.embed(model.encoder, groups), model.encoder(groups), atol=1e-5)


def test_stronger_augmentation_changes_more():
    clouds = torch.from_numpy(np.stack([shapes.sample(Program(c), 1536) for c in range(6)]))
    weak, strong = (pretrain.augment(clouds, torch.Generator().manual_seed(0), strength) for strength in (0.0, 1.0))
    assert weak.shape == strong.shape == (6, pretrain.POINTS, 3)
    nearest = [torch.cdist(some, clouds).amin(dim=2).mean() for some in (weak, strong)]
    assert 2 * nearest[0] < nearest[1]


def test_batches_hold_two_instances_of_each_category():
    clouds = (torch.arange(18) % 6)[:, None, None] + torch.rand(18, 40, 3)
    made = list(pretrain.batches(clouds, 6, 8, 0, 5))
    assert len(made) == 5 and all(points.shape == (8, pretrain.POINTS, 3) for points, _ in made)
    for _, category in made:
        assert torch.equal(category[:4], category[4:]) and len(category[:4].unique()) == 4


def test_pretraining_learns_and_repeats(monkeypatch):
    monkeypatch.setattr(pretrain, "FEW_GROUPS", (16,))
    monkeypatch.setattr(pretrain, "MANY_GROUPS", (16,))
    monkeypatch.setattr(pretrain, "POINTS", 64)
    clouds = torch.from_numpy(np.stack([shapes.sample(Program(i % 6, i // 6), 96) for i in range(24)]))
    courses = []
    for _ in range(2):
        courses.append(pretrain.pretrain(tiny(), clouds, told=True, steps=20, batch_size=8, lr=2e-3, seed=0))
    assert courses[0] == courses[1] and len(courses[0]) == 20
    assert np.mean(courses[0][-6:], axis=0)[0] < 0.95 * np.mean(courses[0][:2], axis=0)[0]


@pytest.mark.parametrize("masked", [False, True])
def test_every_trained_tensor_gets_a_gradient(masked):
    model = tiny()
    alike, logits, distance = model(
        torch.from_numpy(np.stack([shapes.sample(Program(c), 96) for c in range(4)])), masked=masked
    )
    (pretrain.contrast(alike) + logits.square().mean() + distance).backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None and "cls_head" not in name}
    decoder = {
        name for name, _ in model.named_parameters() if name.startswith(("decoder", "mask_token", "increase_dim"))
    }
    assert unused == (set() if masked else decoder)


def test_export_reads_back(tmp_path):
    path = tmp_path / "backbone.safetensors"
    backbone = PointTransformer(**TINY)
    pretrain.export(backbone, path, {"seed": 0})
    fresh = PointTransformer(**TINY)
    report = load_checkpoint(fresh, path)
    assert not report.unexpected
    assert {name.split(".")[0] for name in report.missing} == {"cls_head_finetune"}
    assert all(tensor.dtype == torch.float16 for tensor in load_file(path).values() if tensor.is_floating_point())
    name = "encoder.first_conv.0.weight"
    assert torch.allclose(fresh.state_dict()[name], backbone.state_dict()[name], atol=1e-3)


def test_embedded_backbone():
    weights, config = EMBEDDED.with_suffix(".safetensors"), EMBEDDED.with_suffix(".json")
    assert weights.stat().st_size <= 4_000_000
    assert json.loads(config.read_text()) == pretrain.CONFIG
    with safe_open(weights, "pt") as file:
        assert {"seed", "steps", "categories"} <= set(file.metadata())
    model = default_backbone(cls_dim=7).eval()
    clouds = torch.from_numpy(np.stack([shapes.sample(Program(c), 256) for c in range(2)]))
    assert model(clouds).shape == (2, 7)
    assert 1e6 < sum(p.numel() for name, p in model.named_parameters() if "head" not in name) < 2e6
