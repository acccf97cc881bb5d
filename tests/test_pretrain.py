"""Pre-training: the generator of solids, a tiny pre-training, what it exports and what is embedded."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from examples.data import unit_sphere
from point_peft.backbones import PointTransformer, default_backbone, load_checkpoint
from point_peft.backbones.checkpoint import EMBEDDED
from tools import pretrain, shapes

TINY: dict[str, Any] = {
    "trans_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_group": 16,
    "group_size": 8,
    "encoder_dims": 24,
}


# --- solids ---


def test_solids_are_reproducible_and_independent_of_their_number():
    first = shapes.sample_shapes(6, n=128, seed=3)
    assert np.array_equal(first, shapes.sample_shapes(6, n=128, seed=3))
    assert np.array_equal(first[:4], shapes.sample_shapes(4, n=128, seed=3))
    assert not np.array_equal(first, shapes.sample_shapes(6, n=128, seed=4))
    assert len({cloud.tobytes() for cloud in first}) == 6


@pytest.mark.parametrize("family", shapes.FAMILIES, ids=lambda family: family.__name__)
def test_every_family_gives_solids(family):
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = unit_sphere(family(rng, 256))
        assert points.ndim == 2 and points.shape[1] == 3 and len(points) > 32
        assert np.isfinite(points).all()
        assert np.linalg.svd(points)[1][1] > 0.01  # neither a point nor a line


def test_clouds_fill_the_unit_sphere():
    clouds = shapes.sample_shapes(20, n=200)
    assert clouds.dtype == np.float32 and clouds.shape == (20, 200, 3)
    assert np.allclose(np.linalg.norm(clouds, axis=2).max(axis=1), 1, atol=1e-5)
    assert np.allclose(clouds.mean(axis=1), 0, atol=1e-5)


def test_loft_is_sampled_uniformly_by_area():
    """On a cylinder, 4 high and of radius 1, the side holds as many points as its share of the area."""
    rng = np.random.default_rng(0)
    circle = shapes.superellipse(1.0, 64)
    rings = np.stack([np.concatenate([circle, np.full((64, 1), z)], axis=1) for z in (-2.0, 1.5, 2.0)])
    points = shapes.sample_loft(rng, shapes.with_caps(rings), 20_000)
    side = np.abs(points[:, 2]) < 2 - 1e-9
    assert abs(side.mean() - 8 / 10) < 0.01
    assert abs((points[side, 2] > 1.5).mean() - 1 / 8) < 0.01


def test_rotations_are_rotations():
    turns = shapes.random_rotations(np.random.default_rng(0), 50)
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3))
    assert np.allclose(np.linalg.det(turns), 1)


# --- pre-training ---


def tiny_autoencoder() -> pretrain.MaskedAutoencoder:
    torch.manual_seed(0)
    return pretrain.MaskedAutoencoder(PointTransformer(**TINY), depth=1, num_heads=2)


def test_chamfer_of_equal_sets_is_zero():
    points = torch.rand(4, 8, 3)
    assert pretrain.chamfer(points, points[:, torch.randperm(8)]) == 0
    assert pretrain.chamfer(points, points + torch.tensor([3.0, 0, 0])) > 1


def test_pretraining_learns_and_repeats(monkeypatch):
    monkeypatch.setattr(pretrain, "GROUP_COUNTS", (16,))
    solids = torch.from_numpy(shapes.sample_shapes(24, n=96))
    losses = []
    for _ in range(2):
        model = tiny_autoencoder()
        losses.append(pretrain.pretrain(model, solids, steps=20, minutes=math.inf, batch_size=8, lr=2e-3, seed=0))
    assert losses[0] == losses[1] and len(losses[0]) == 20
    assert np.mean(losses[0][-3:]) < 0.7 * losses[0][0]


def test_every_trained_tensor_of_the_autoencoder_gets_a_gradient():
    model = tiny_autoencoder()
    model(torch.from_numpy(shapes.sample_shapes(4, n=96))).backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.split(".")[1] for name in unused} == {"cls_token", "cls_pos", "cls_head_finetune"}


def test_export_reads_back(tmp_path):
    path = tmp_path / "backbone.safetensors"
    backbone = PointTransformer(**TINY)
    pretrain.export(backbone, path, {"seed": 0})
    fresh = PointTransformer(**TINY)
    report = load_checkpoint(fresh, path)
    assert not report.unexpected
    assert {name.split(".")[0] for name in report.missing} == {"cls_token", "cls_pos", "cls_head_finetune"}
    assert all(tensor.dtype == torch.float16 for tensor in load_file(path).values() if tensor.is_floating_point())
    name = "encoder.first_conv.0.weight"
    assert torch.allclose(fresh.state_dict()[name], backbone.state_dict()[name], atol=1e-3)


def test_embedded_backbone():
    weights, config = EMBEDDED.with_suffix(".safetensors"), EMBEDDED.with_suffix(".json")
    assert weights.stat().st_size <= 4_000_000
    assert json.loads(config.read_text()) == pretrain.CONFIG
    with safe_open(weights, "pt") as file:
        assert {"seed", "steps", "shapes"} <= set(file.metadata())
    model = default_backbone(cls_dim=7).eval()
    clouds = torch.from_numpy(shapes.sample_shapes(2, n=256))
    assert model(clouds).shape == (2, 7)
    assert 1e6 < sum(p.numel() for name, p in model.named_parameters() if "head" not in name) < 2e6
