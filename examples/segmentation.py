"""A label at every point of a scene: it is cut into pieces, an adapter learns some of them, all are put together again.

    python -m examples.segmentation                                   # a made village of three classes
    python -m examples.segmentation survey.laz --scale 50 --gap 10    # your scan, with codes of classes; here in feet

The scene is split from west to east, so that what is tested was never near what is trained. `point-peft train
survey.laz --split-along x` does the same without a line of Python.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft import LoraConfig, get_peft_model
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation, prepare
from point_peft.data.scenes import read_scenes, set_of_scenes
from point_peft.training import Recipe, fit
from point_peft.training.models import ModelSpec, backbone_for_task, to_inputs_of

COLOURS = np.array(["#ccbb44", "#ee6677", "#228833", "#4477aa", "#aa3377", "#66ccee"])


def write_village(file: Path, count: int) -> None:
    """Write a scene of some 100 x 40 m: 0 is ground, 1 houses, 2 trees."""
    rng = np.random.default_rng(0)
    places = rng.uniform([0, 0], [100, 40], (count, 2))
    height = np.sin(places[:, 0] / 15) + 0.1 * rng.normal(size=count)
    labels = np.zeros(count, np.int64)
    for number, centre in enumerate(rng.uniform([4, 4], [96, 36], (60, 2))):
        away = places - centre
        if number % 2:  # a house with a flat roof and walls
            inside = (np.abs(away) < [4, 3]).all(axis=1) & (labels == 0)
            wall = (np.abs(away[inside]) > [3.6, 2.6]).any(axis=1)
            height[inside] += np.where(wall, rng.uniform(0, 4, len(wall)), 4)
        else:  # a tree, of which the crown is seen
            inside = (np.linalg.norm(away, axis=1) < 2) & (labels == 0)
            height[inside] += 4 + rng.normal(size=inside.sum())
        labels[inside] = 1 + (number + 1) % 2
    np.savez(file, points=np.column_stack([places, height]), label=labels)


def main(argv: list[str] | None = None) -> None:
    """Cut, train, put together, draw; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", type=Path, nargs="?", help="a file with labels of points; without it one is made")
    parser.add_argument("--points", type=int, default=40_000, help="points of the scene that is made")
    parser.add_argument("--scale", type=float, default=10.0, help="the length that becomes 1, in the unit of the file")
    parser.add_argument("--gap", type=float, default=2.0, help="between two parts of the split")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("build/segmentation"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    scene_file = args.scene or args.out / "village.npz"
    if args.scene is None:
        write_village(scene_file, args.points)

    # Columns of at most 1024 points; heights are above the lowest point of each.
    preparation = Preparation(num_points=1024, centre="ground", scale=args.scale)
    options = DataOptions(split_along="x", gap=args.gap, preparation=preparation)
    (scene,), codes = read_scenes([scene_file], options)
    pieces = set_of_scenes([scene], codes, options)
    train, val, test = pieces.part("train"), pieces.part("val"), pieces.part("test")
    print(f"{scene_file}: {scene.size} points, {len(train)} + {len(val)} + {len(test)} pieces to train, validate, test")

    # The small Point-MAE that comes with the package, with a head for points; the adapter and the head learn.
    spec = ModelSpec(backbone="point-mae-small")
    backbone = backbone_for_task(spec, "segmentation", pieces.classes, pieces.categories)
    model = get_peft_model(backbone, LoraConfig(r=4))
    recipe = Recipe(task="segmentation", epochs=args.epochs, batch_size=4, class_weights="balanced")
    to_inputs = to_inputs_of(backbone, categories=1)
    run = fit(model, train, val, recipe, out=args.out / "run", test=test, to_inputs=to_inputs, resume=True)
    print(f"{run.folder}: mIoU {run.results['test']['miou']:.1f} % in the east, which was not trained on")

    # The class of every point, by piece, and in the order of the file.
    predictions = []
    model.eval()
    for number in range(len(scene.pieces)):
        points, _, rows = prepare(scene.piece(number), preparation, np.random.default_rng(number))
        with torch.inference_mode():
            scores = model(torch.from_numpy(points)[None], torch.ones(1, 1))[0]
        predictions.append((number, rows, scores.argmax(dim=1).numpy()))
    predicted, cloud = scene.together(predictions), scene.read()

    figure = Figure(figsize=(11, 9), layout="constrained")
    titles = ("labels of the file, from above", "predicted: trained on, validated and tested from left to right")
    for axes, labels, title in zip(figure.subplots(2, 1), (cloud.labels, predicted), titles, strict=True):
        assert labels is not None
        known = labels >= 0
        axes.scatter(*cloud.coordinates[known, :2].T, s=1, c=COLOURS[labels[known] % len(COLOURS)])
        axes.set(title=title, aspect="equal")
    figure.savefig(args.out / "scene.png", dpi=100)
    print(f"picture: {args.out / 'scene.png'}")


if __name__ == "__main__":
    main()
