"""Train the adapters that the page to try shows, and put them and some clouds of their tests into the package.

    python -m tools.shipped                    # reads ../shared/data, trains in build/shipped, writes point_peft/demo

Each is trained by `point-peft train` with the choices below, the last epoch counts, and its card has its figures. The
samples are the first test clouds of some classes; for ground, which is trained on procedural scenes, the columns of a
real scan with the greatest heights in them: nobody looked at the answers before they were chosen.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import laspy
import numpy as np
import torch
from torch.utils.data import default_collate

from point_peft import PointPeftModel, cli, geometry
from point_peft.adapting.adapter import get_adapter
from point_peft.bank import banks_of, frozen_tokens
from point_peft.data.cloud_set import CloudSet
from point_peft.demo.board import SAMPLES, SHIPPED
from point_peft.demo.nearest import BANK_CLOUDS_FILE
from point_peft.files.format import CARD_FILE, CONFIG_FILE, RUN_FILE, TENSOR_FILE
from point_peft.quickstart.data import load_digits_clouds
from point_peft.training.folder import RECIPE_FILE, read_record, write_file
from point_peft.training.opening import OpenedRun, clouds_of, open_run
from tools.scenes import labelled_scene

ROOT = Path(__file__).resolve().parents[1]
DRAWN_POINTS = 128
"""Points of a training cloud that stands for a row of a memory bank."""
SCENES, FIRST_SCENE = 45, 1_000_000
"""Procedural scenes for ground, and the number of the first: the encoder of tools.pretrain_scenes has seen others."""
FOOT, COLUMN, WHOLE_COLUMN, SHOWN_POINTS = 0.3048, 36.0, 2000, 4000
"""Metres; the side of a column of the real scan; points of one that is no rest at its edge, and of one shown whole."""
SHOWN_SAMPLES = {"digits": 4, "radar": 5, "ground": 3}

OBJECTS = "--set memory_bank=true --set bank_size=400 --augment rotate_small,stretch --label-smoothing 0.1"
CHOICES = {
    "digits": ("digits.npz", f"{OBJECTS} --keep last --epochs 20"),
    "radar": (
        "radhar.npz",
        f"{OBJECTS} --keep last --epochs 20 --group recording --val-share 0.2 --centre median --reach 2 --scale 2",
    ),
    "ground": (
        "scenes",
        "--kind scene --classes '{other: [1], ground: [2]}' --val-share 0.1 --test-share 0.2 --tile 32 "
        "--num-points 1024 --centre ground --scale 16 --batch-size 4 --augment rotate_z --keep last --epochs 10",
    ),
}
"""Adapter -> its data, and how it is trained."""


def write_digits(path: Path) -> None:
    """The lifted digits as a file of arrays."""
    clouds = load_digits_clouds()
    parts = {"train": clouds.train, "val": clouds.val, "test": clouds.test}
    np.savez_compressed(
        path,
        points=torch.cat([points for points, _ in parts.values()]).numpy(),
        labels=torch.cat([labels for _, labels in parts.values()]).numpy(),
        split=np.repeat(list(parts), [len(labels) for _, labels in parts.values()]),
        class_names=np.array(clouds.class_names),
    )


def write_scenes(folder: Path) -> None:
    """Some procedural scenes, each a file, whose labels are the codes of LAS: 2 is ground, 1 is anything else."""
    folder.mkdir(exist_ok=True)
    for number in range(SCENES):
        points, is_ground = labelled_scene(FIRST_SCENE + number)
        np.savez_compressed(folder / f"scene_{number}.npz", points=points, labels=1 + is_ground.astype(np.uint8))


def ship(name: str, run: Path) -> None:
    """Copy what the page opens of a run: no pictures, no paths of this machine."""
    folder = SHIPPED / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in (CONFIG_FILE, TENSOR_FILE, RECIPE_FILE):
        shutil.copyfile(run / file, folder / file)
    card = (run / CARD_FILE).read_text("utf-8").splitlines()
    write_file(folder / CARD_FILE, "\n".join(line for line in card if not line.startswith("![")).rstrip() + "\n")
    record = read_record(run)
    record["data"]["paths"] = [CHOICES[name][0]]
    write_file(folder / RUN_FILE, json.dumps(record, indent=2) + "\n")


def write_bank_clouds(name: str, run: OpenedRun, train: CloudSet) -> None:
    """Write the training cloud that is most like each row of the memory bank, thinned to a few points."""
    model = run.model
    assert isinstance(model, PointPeftModel)
    (bank,) = banks_of(get_adapter(model, "default"), "default")
    likeness, points, labels = [], [], []
    for first in range(0, len(train), run.recipe.batch_size):
        batch = default_collate([train[i] for i in range(first, min(first + run.recipe.batch_size, len(train)))])
        args, kwargs = run.inference.feed.inputs(batch)
        with torch.no_grad():
            likeness.append(bank.likenesses(bank.query(frozen_tokens(model, args, kwargs, bank.source, "default"))))
        cloud = batch[0].float()
        points.append(geometry.gather(cloud, geometry.farthest_point_sample(cloud, DRAWN_POINTS)))
        labels.append(batch[1])
    most = torch.cat(likeness).argmax(dim=0)
    np.savez_compressed(
        SHIPPED / name / BANK_CLOUDS_FILE,
        points=torch.cat(points)[most].half().numpy(),
        labels=torch.cat(labels)[most].numpy(),
    )


def write_samples(name: str, run: OpenedRun, clouds: CloudSet, scan: Path) -> None:
    """Write the first test cloud of each of some classes as a user's file: raw, with its label in the name."""
    SAMPLES.mkdir(exist_ok=True)
    for old in SAMPLES.glob(f"{name}_*"):
        old.unlink()
    if run.inference.segmentation:
        write_columns(SAMPLES, name, scan)
        return
    test = clouds.part("test")
    labels = [entry.label for entry in test.entries]
    for label in np.linspace(0, len(run.classes) - 1, SHOWN_SAMPLES[name]).round().astype(int).tolist():
        cloud = test.entries[labels.index(label)].read()
        points = cloud.coordinates.astype(np.float16 if name == "digits" else np.float32)
        np.savez_compressed(SAMPLES / f"{name}_{run.classes[label].replace(' ', '_')}.npz", points=points)


def write_columns(folder: Path, name: str, scan: Path) -> None:
    """Write columns of a real scan with the greatest heights in them, in metres.

    Without labels: the file has code 1, unassigned, for what is not ground and for much that is.
    """
    source = laspy.read(scan)
    points = FOOT * np.stack([source.x, source.y, source.z], axis=1)
    _, column = np.unique(np.floor((points[:, :2] - points[:, :2].min(axis=0)) / COLUMN), axis=0, return_inverse=True)
    rows = [np.flatnonzero(column == number) for number in range(column.max() + 1)]
    whole = [points[own] for own in rows if WHOLE_COLUMN <= len(own) <= SHOWN_POINTS]
    relief = [float(np.ptp(np.quantile(own[:, 2], [0.02, 0.98]))) for own in whole]
    for number, chosen in enumerate(np.argsort(relief)[: -SHOWN_SAMPLES[name] - 1 : -1].tolist(), start=1):
        own = whole[chosen]
        header = laspy.LasHeader(point_format=3, version="1.2")
        header.scales, header.offsets = np.full(3, 0.01), np.floor(own.min(axis=0))
        las = laspy.LasData(header)
        las.x, las.y, las.z = own.T
        las.write(folder / f"{name}_{number}.laz")


MADE = {"digits": write_digits, "ground": write_scenes}
"""Adapter -> what writes its data."""
SCAN = "autzen_trim.laz"


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, and write it into the package; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.shipped", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="where the real sets are")
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "shipped", help="where the runs go")
    parser.add_argument("--only", nargs="+", choices=sorted(CHOICES), default=list(CHOICES))
    options = parser.parse_args(argv)
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        file, choices = CHOICES[name]
        data = options.runs / file if name in MADE else options.data / file
        if name in MADE and not data.exists():
            MADE[name](data)
        code = cli.main(["train", str(data), "--out", str(options.runs / name), "--resume", *shlex.split(choices)])
        if code:
            return code
        run = open_run(options.runs / name)
        clouds = clouds_of(run, split="all")
        ship(name, run.folder)
        if not run.inference.segmentation:
            write_bank_clouds(name, run, clouds.part("train"))
        write_samples(name, run, clouds, options.data / SCAN)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
