"""The examples: the generator of solids, the lifted digits, a tiny pre-training, the quickstart from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from examples import data, quickstart, serve
from point_peft import LoraConfig, get_peft_model
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
        points = shapes.unit_sphere(family(rng, 256))
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


# --- data ---


@pytest.fixture(scope="module")
def digits() -> data.Clouds:
    return data.load_digits_clouds(n=64)


def test_digits_splits_are_disjoint_and_even(digits):
    parts = [digits.train, digits.val, digits.test]
    clouds = [cloud.numpy().tobytes() for points, _ in parts for cloud in points]
    assert len(set(clouds)) == len(clouds) == 1797
    assert [round(10 * len(labels) / 1797) for _, labels in parts] == [6, 2, 2]
    for _, labels in parts:
        counts = torch.bincount(labels, minlength=10)
        assert counts.min() >= 0.9 * counts.max() - 2
    again = data.load_digits_clouds(n=64)
    assert torch.equal(again.train[0], digits.train[0]) and torch.equal(again.test[1], digits.test[1])


def test_lift_follows_the_image():
    image = np.zeros((8, 8))
    image[1, 2], image[6, 5] = 4, 12  # row, column
    cloud = data.lift(image, 4000, np.random.default_rng(0))
    assert np.linalg.norm(cloud, axis=1).max() == pytest.approx(1, abs=1e-5)
    bright = cloud[:, 1] < 0.2  # the lower right pixel is the bright one, and low rows lie below
    assert bright.mean() == pytest.approx(0.75, abs=0.03)
    assert cloud[bright, 0].mean() > cloud[~bright, 0].mean()
    extent = np.ptp(cloud[bright], axis=0) / np.ptp(cloud[~bright], axis=0)
    assert extent == pytest.approx([1, 1, 3], rel=0.05)
    assert np.ptp(cloud[bright], axis=0)[2] == pytest.approx(2 * np.ptp(cloud[bright], axis=0)[0], rel=0.05)


def test_tasks_and_subsets(digits):
    small = digits.subset(train=30, val=20, test=10)
    assert [len(labels) for _, labels in (small.train, small.val, small.test)] == [30, 20, 10]
    other = data.parity(small)
    assert torch.equal(other.test[1], small.test[1] % 2) and torch.equal(other.test[0], small.test[0])
    assert len(other.class_names) == 2


def test_radhar_reader(tmp_path):
    """A small file of the same layout: official test split, validation by recording, far clutter gone."""
    rng = np.random.default_rng(0)
    recording = np.repeat(np.arange(30), 3)
    labels = recording % 5
    points = rng.normal(scale=0.3, size=(90, 50, 3)) + np.array([2, 0, 1])
    points[:, :5] += 30
    file = tmp_path / "radhar.npz"
    names = np.array(["boxing", "jack", "jump", "squats", "walk"])
    np.savez(
        file,
        points=points.astype(np.float16),
        labels=labels.astype(np.int16),
        split=(recording >= 25).astype(np.int8),
        recording=recording.astype(np.int16),
        class_names=names,
    )
    clouds = data.load_radhar(file)
    assert [len(split[1]) for split in (clouds.train, clouds.val, clouds.test)] == [60, 15, 15]
    assert clouds.class_names == tuple(names)
    for split, _ in (clouds.train, clouds.val, clouds.test):
        assert split.dtype == torch.float32 and split.square().sum(dim=2).max() <= 1.0001
    assert data.activity_groups(clouds).test[1].max() == 2


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


# --- quickstart ---


def test_quickstart_from_end_to_end(tmp_path, capsys):
    """It saves, reloads and swaps (and asserts equal logits itself), and leaves two adapters and a picture."""
    quickstart.main(["--epochs", "1", "--train", "40", "--val", "20", "--test", "40", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for words in (*quickstart.METHODS, "train: 40 of ", "bit for bit", "second task", "microseconds", "MB"):
        assert words in printed
    for task in ("first", "second"):
        assert (tmp_path / task / "adapter_model.safetensors").is_file()
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


# --- serving ---


def test_serving_answers_every_task_with_its_own_adapter(capsys):
    """It compares every answer with that of the task alone, and ends with an error if one is wrong."""
    serve.main(["--requests", "12", "--workers", "3"])
    printed = capsys.readouterr().out
    assert "16 requests, 3 at a time" in printed and "'damage' was loaded meanwhile" in printed
    assert "each of the 16 answers is what its task gives alone" in printed
    for task in (*serve.TASKS, serve.BASE, serve.LATER):
        assert f"  {task} " in printed


def test_serving_notices_a_wrong_answer():
    points = torch.from_numpy(shapes.sample_shapes(2, n=128))
    model = get_peft_model(serve.backbone(), LoraConfig(r=2, target_modules=["qkv"]), "digit")
    given = serve.answer(model, serve.BASE, 1, points)
    serve.check(model, [given], points)
    with pytest.raises(SystemExit, match="1 of 2 answers are wrong, the first to 'digit'"):
        serve.check(model, [given, dataclasses.replace(given, task="digit", logits=given.logits + 1)], points)


def test_quickstart_needs_the_radar_file(tmp_path):
    with pytest.raises(SystemExit, match=r"--file"):
        quickstart.main(["--data", "radhar", "--out", str(tmp_path)])
