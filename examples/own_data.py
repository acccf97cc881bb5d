"""Files of your own: a folder for each class becomes a trained adapter, and the adapter tells the class of a new file.

    python -m examples.own_data                        # writes 160 PLY files of four shapes itself
    python -m examples.own_data scans --epochs 50      # your folder: scans/CLASS/FILES, of any format that is read

`point-peft train scans/` does the same without a line of Python.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from examples.shapes import KINDS, shape
from point_peft import PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.data.opening import open_data
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation, prepare
from point_peft.data.reading import read_cloud
from point_peft.training import Recipe, fit


def write_shapes(folder: Path, each: int) -> None:
    """Write so many files of each shape, with 600 points and more."""
    rng = np.random.default_rng(0)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            cloud = shape(kind, 600 + number, rng)
            columns = "".join(f"property float {name}\n" for name in "xyz")
            head = f"ply\nformat ascii 1.0\nelement vertex {len(cloud)}\n{columns}end_header"
            np.savetxt(folder / kind / f"{kind}_{number:02}.ply", cloud, fmt="%.5f", header=head, comments="")


def main(argv: list[str] | None = None) -> None:
    """Write files if there are none, read, train, load, predict; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="a folder of classes; without it one is made")
    parser.add_argument("--each", type=int, default=40, help="files of each shape, where they are made")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("build/own_data"))
    args = parser.parse_args(argv)
    data = args.data or args.out / "shapes"
    if args.data is None:
        write_shapes(data, args.each)

    # What is read, how it is split, and how each cloud is prepared, here for good.
    preparation = Preparation(num_points=512)
    clouds = open_data(data, DataOptions(preparation=preparation))
    train, val, test = clouds.part("train"), clouds.part("val"), clouds.part("test")
    print(f"{data}: {len(train)} clouds to train on, {len(val)} to validate, {len(test)} to test")
    print(f"classes: {', '.join(clouds.classes)}")

    # The run's folder has the adapter, its card, the curves, the confusions and the recipe.
    model = get_peft_model(default_backbone(len(clouds.classes)), PointPEFTConfig())
    # With resume=True, a run that was interrupted goes on, and one that is finished is read.
    recipe = Recipe(epochs=args.epochs)
    run = fit(model, train, val, recipe, out=args.out / "run", test=test, resume=True)
    print(f"{run.folder}: {run.results['test']['accuracy']:.1f} % of the test clouds")

    # Anywhere else: the adapter in a fresh backbone, and a file prepared as those of the training were.
    model = PointPeftModel.from_pretrained(default_backbone(len(clouds.classes)), run.folder).eval()
    file = Path(test.entries[0].source)
    points = prepare(read_cloud(file), preparation, np.random.default_rng(0)).points
    with torch.no_grad():
        probabilities = model(torch.from_numpy(points)[None])[0].softmax(dim=0)
    shares = ", ".join(f"{name} {100 * p:.0f} %" for name, p in zip(clouds.classes, probabilities, strict=True))
    print(f"{file.name}: {shares}")


if __name__ == "__main__":
    main()
