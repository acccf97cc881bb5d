"""The scene encoder's clouds, cells and pre-training, and the comparison on an airborne scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import scenes as comparison
from benchmarks.scenes import Row, Run
from point_peft import PointPeftError
from tests.zoo import BACKBONES
from tools import pretrain_scenes
from tools.pretrain_scenes import BLOCK, NEIGHBOURS, REACHES, geometry_around, hidden_cells, turned
from tools.scene_encoder import CELL, FAR, WEIGHTS, cells_of, load
from tools.scenes import SIDE, Terrain, scene

needs_the_encoder = pytest.mark.skipif(
    "torch_pointcloud_sonata" not in BACKBONES, reason="torch-pointcloud or spconv is not installed"
)


def test_a_scene_is_its_seed_s_and_most_of_it_lies_on_the_ground() -> None:
    points = scene(3)
    assert np.array_equal(points, scene(3)) and not np.array_equal(points[:10], scene(4)[:10])
    assert np.abs(points[:, :2]).max() < SIDE / 2 + 1 and np.isfinite(points).all()
    ground = Terrain(np.random.default_rng(0))
    assert np.array_equal(ground(points[:5, :2]), ground(points[:5, :2]))


def test_a_cell_has_the_mean_of_its_points() -> None:
    own = np.array([[0.1, 0.1, 0.0], [0.3, 0.1, 0.2], [1.0, 0.1, 0.0], [0.1, 5 * CELL + 0.2, 0.1]])
    cells = cells_of(own)
    assert cells.grid.tolist() == [[0, 0, 0], [0, 5, 0], [1, 0, 0]]
    assert cells.cell_of.tolist() == [0, 0, 2, 1]
    np.testing.assert_allclose(cells.centroids[cells.cell_of[0]], own[:2].mean(axis=0))
    # Features are coordinates from the middle, in units of 20 m, and from the middle of the cell.
    np.testing.assert_allclose(np.ptp(cells.features[:, 0].numpy()) * FAR, np.ptp(cells.centroids[:, 0]), rtol=1e-5)
    inside = (cells.centroids - own.min(axis=0)) / CELL - cells.grid.numpy() - 0.5
    np.testing.assert_allclose(cells.features[:, 3:], inside, atol=1e-6)


def test_a_turned_scene_is_the_scene_turned() -> None:
    """The means of the cells, mirrored and with their axes exchanged, whatever chance does."""
    cells = cells_of(scene(0)[:500])
    before = cells.grid + 0.5 + cells.features[:, 3:]
    seen = set()
    for seed in range(12):
        features, grid = turned(cells, np.random.default_rng(seed))
        after = grid + 0.5 + features[:, 3:]
        ranges = [np.ptp(after[:, axis].numpy()) for axis in range(3)]
        order = [0, 1, 2] if np.isclose(ranges[0], np.ptp(before[:, 0].numpy()), atol=1e-4) else [1, 0, 2]
        back = after[:, order]
        for axis in (0, 1):
            mirrored = not torch.allclose(back[:, axis], before[:, axis], atol=1e-4)
            seen.add((order[0], axis, mirrored))
            if mirrored:
                back[:, axis] = cells.grid[:, axis].max() + 1 - back[:, axis]
        torch.testing.assert_close(back, before, atol=1e-4, rtol=0)
    assert len(seen) == 8, "chance turned and mirrored not all"


def test_the_geometry_that_is_told() -> None:
    step = np.arange(24.0)
    plane = np.stack([*np.meshgrid(step, step), np.zeros((24, 24))], axis=2).reshape(-1, 3)
    told = geometry_around(np.concatenate([plane, [[12.3, 12.3, 1.0]]]))
    heights, shapes = told[:, : 2 * len(REACHES)], told[:, 2 * len(REACHES) :]
    on_plane, above = heights[:-1], heights[-1]
    assert np.allclose(above[::2], np.log1p(1.0)) and np.allclose(above[1::2], 0)
    assert np.allclose(on_plane[:, ::2], 0), "nothing is below the plane"
    per = shapes.shape[1] // len(NEIGHBOURS)
    below, upright = shapes[-1, ::per], shapes[0, per - 1 :: per]
    assert np.allclose(below, [1 - 1 / k for k in NEIGHBOURS])  # all but itself
    assert np.allclose(upright, 1), "the plane's normal is upright"


def test_whole_columns_are_hidden_and_about_half_of_them() -> None:
    grid = torch.stack(torch.meshgrid(*(torch.arange(60),) * 2, torch.arange(2), indexing="ij"), dim=3).view(-1, 3)
    hidden = hidden_cells(grid, np.random.default_rng(0))
    assert 0.3 < hidden.float().mean() < 0.7
    sheet = hidden.view(60, 60, 2)
    assert torch.equal(sheet[..., 0], sheet[..., 1])
    edges = (sheet[1:, :, 0] != sheet[:-1, :, 0]).any(dim=1).nonzero()[:, 0]
    assert len(set((edges % BLOCK).tolist())) == 1


@needs_the_encoder
def test_pre_training_writes_what_load_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # it lasts as long as the process
    out = tmp_path / "encoder.safetensors"
    pretrain_scenes.main(["--scenes", "1", "--steps", "2", "--seed", "5", "--out", str(out)])
    assert f"{out}: 3.49 MB" in capsys.readouterr().out
    model = load(out)
    assert {name for name, _ in model.named_parameters()} <= set(load_file(out))


@needs_the_encoder
def test_the_weights_are_small_and_of_this_encoder() -> None:
    assert WEIGHTS.stat().st_size < 4e6
    cells = cells_of(scene(1)[:2000])
    model = load().eval()
    with torch.no_grad():
        features, *_, stages = model(**cells.inputs())
    assert features.isfinite().all() and len(stages) == 2


class Answer(nn.Module):
    """Logits for the given classes of cells."""

    def __init__(self, classes: Tensor) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor, pos_grid: Tensor, batch: Tensor, return_intermediates: bool) -> Tensor:
        return nn.functional.one_hot(self.classes, 2).float()


def test_the_mean_over_classes_counts_points_not_cells() -> None:
    cells = cells_of(np.array([[0.1, 0.1, 0.1], [0.2, 0.1, 0.1], [2.0, 0.1, 0.1], [4.0, 0.1, 0.1]]))
    labels = torch.tensor([0, 1, 1, 1])
    # The first cell holds two points, one of each class: 1 of 2, and 2 of 3.
    assert comparison.mean_iou(Answer(torch.tensor([0, 1, 1])), [(cells, labels)]) == pytest.approx(
        100 * (1 / 2 + 2 / 3) / 2
    )


def test_rates_come_first_and_then_the_best_one_s_seeds(tmp_path: Path) -> None:
    row = Row("linear_probe")
    tried = comparison.due(tmp_path, [row], 8)
    assert [own.lr for own in tried] == list(comparison.RATES)
    for number, own in enumerate(tried):
        own.path(tmp_path).write_text(f'{{"lr": {own.lr}, "val": {number % 2}}}')
    assert comparison.due(tmp_path, [row], 8) == [
        Run(row, seed, comparison.RATES[1], 8, "test") for seed in comparison.SEEDS
    ]


def test_a_row_is_named_or_a_variant_of_one() -> None:
    every = [Row("full"), Row("adapter", "LORA")]
    assert comparison.row_of("full", every) == every[0]
    assert str(comparison.row_of("adapter LORA:r=4", every)) == "adapter LORA:r=4"
    with pytest.raises(PointPeftError, match="no row is called 'adapter LORE'; nearest: 'adapter LORA'"):
        comparison.row_of("adapter LORE:r=4", every)


def test_the_page_says_what_was_found() -> None:
    found = [
        {"row": row, "seed": seed, "lr": 1e-3, "split": "test", "trainable": 10, "test": test + seed, "val": 50.0}
        | {"seconds": seconds, "peak_bytes": 2**20}
        for row, test, seconds in (("full", 60.0, 2.0), ("adapter LORA", 61.0, 1.0))
        for seed in (0, 1)
    ]
    found += [
        {"row": row, "lr": lr, "split": "val", "val": 40.0}
        for row in ("full", "adapter LORA")
        for lr in comparison.RATES
    ]
    page = list(comparison.lines(found, {"points": "1, 2, 3", "epochs": 4, "refused": {"VPT": "no place"}}))
    best, other = (line for line in page if line.startswith(("| adapter", "| full")) and "±" in line)
    assert best == "| adapter LORA | 61.5 ± 0.7 | 50.0 | 10 | 0.001 | 1.00 | 0.50 | 1 |"
    assert other.startswith("| full | 60.5 ± 0.7 |")
    assert "- VPT: no place" in page
