"""The commands train, evaluate and predict as people use them, and whatever they may get wrong."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from point_peft import PointPeftModel, cli
from point_peft.backbones import PointTransformer, PointTransformerPartSeg, default_backbone
from point_peft.training import pictures, predict_command
from point_peft.training.loop import Loop
from point_peft.training.opening import open_run
from tests.hub_server import HubServer

pytest_plugins = ["tests.hub_fixture"]

HERE = "tests.test_train_command"
SIZES = {"trans_dim": 24, "depth": 2, "num_heads": 2, "encoder_dims": 24, "num_group": 8, "group_size": 8}
CLASSES = ("ball", "box", "sheet")
POINTS = 64
BRIEF = ("--epochs", "1", "--batch-size", "4", "--num-points", str(POINTS), "--augment", "none")
TINY = (*BRIEF, "--backbone", f"{HERE}:make", "--method", "bitfit")
PNG = b"\x89PNG\r\n\x1a\n"
FILES = {"README.md", "recipe.yaml", "run.json", "metrics.jsonl", "curves.png", "confusion.png", "samples.png"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def make(cls_dim: int) -> nn.Module:
    return PointTransformer(**SIZES, cls_dim=cls_dim)  # type: ignore[arg-type]


def make_segmentation(cls_dim: int) -> nn.Module:
    sizes: dict[str, Any] = SIZES
    return PointTransformerPartSeg(**sizes, cls_dim=cls_dim, num_labels=1, taps=(0, 1), head_width=32)


def make_with_an_argument(width: int) -> nn.Module:
    return nn.Linear(3, width)


def cloud(kind: str, seed: int, count: int = 96) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng((len(kind), seed))
    points = rng.normal(size=(count, 3))
    if kind == "ball":
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        return points
    if kind == "box":
        return rng.uniform(-1, 1, (count, 3))
    return points * [1, 1, 0.05]


def ply(path: Path, points: npt.NDArray[np.float64], labels: npt.NDArray[np.int64] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [*points.T] if labels is None else [*points.T, labels]
    names = ["float x", "float y", "float z", *(["int label"] if labels is not None else [])]
    head = ["ply", "format ascii 1.0", f"element vertex {len(points)}", *(f"property {n}" for n in names), "end_header"]
    rows = [" ".join(f"{value:g}" for value in row) for row in zip(*columns, strict=True)]
    path.write_text("\n".join([*head, *rows]) + "\n")


def write_rocks(folder: Path, each: int = 6) -> Path:
    for kind in CLASSES:
        for number in range(each):
            ply(folder / kind / f"{kind}_{number}.ply", cloud(kind, number, 96 - number))
    return folder


@pytest.fixture(autouse=True, scope="module")
def few_pictures() -> Iterator[None]:
    """Pictures as one small file: `tests/test_fit.py` and `tests/test_your_data.py` draw them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "confusions", "samples"):
            patch.setattr(pictures, name, lambda *arguments: PNG)
        patch.setattr(predict_command, "samples", lambda *arguments: PNG)
        yield


@pytest.fixture(scope="module")
def rocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rocks(tmp_path_factory.mktemp("data") / "rocks")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of clouds whose files have labels of points."""
    folder = tmp_path_factory.mktemp("data") / "halves"
    rows = ["file,split"]
    for number in range(8):
        points = cloud("box", number)
        ply(folder / f"s{number}.ply", points, (points[:, 2] > 0).astype(np.int64))
        rows.append(f"s{number}.ply,{'train' if number < 5 else 'val' if number < 6 else 'test'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(rocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test changes."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert run("train", rocks, "--out", out, *TINY) == 0
    return out


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], said: str, *arguments: object, left: Path | None = None) -> None:
    """Exit code 2, one line that says so, and nothing written at `left`."""
    capsys.readouterr()
    try:
        code: object = run(*arguments)
    except SystemExit as exit_:
        code = exit_.code
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert code == 2 and "error: " in last and said in last
    assert err.count("\n") == 1 or err.startswith("usage: ")
    assert left is None or not left.exists()


def results(folder: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((folder / "run.json").read_text())["results"]
    return found


# ---- from data to an adapter that others use ----


def test_train(rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "run", tmp_path / "own.py"
    file.write_text(f"from {HERE} import make\n")
    assert run("train", rocks, "--out", out, *TINY, "--backbone", f"{file}:make") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{rocks}: classification, 3 classes (ball, box, sheet); clouds: 12 train, 3 val, 3 test",
        f"next: point-peft evaluate {out}; point-peft predict {out} FILE … --out FOLDER",
    ]
    assert said.err.splitlines()[-1] == f"the run is in {out}"
    assert {file.name for file in out.iterdir()} == FILES | ADAPTER
    card = (out / "README.md").read_text()
    assert "name: rocks (test)" in card and "| rocks (val) |" in card and "The classes of rocks (test):" in card
    assert "The classes, from 0 on: ball, box, sheet." in card
    assert "own.py:make" in card and str(tmp_path) not in card


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("evaluate", trained, "--json", "--split", "val") == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["clouds"] == 3 and measured["results"]["as they are"] == pytest.approx(results(trained)["val"])
    assert run("evaluate", trained, "--corruptions", "jitter,dropout") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{trained} on rocks (test), 3 clouds" and lines[1].startswith("  as they are: loss ")
    assert [line.split()[0] for line in lines[2:]] == ["accuracy", "1", "jitter", "dropout", "mean"]
    assert len(lines[4].split("%")) == 7  # five severities and their mean


def test_evaluate_other_clouds(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that lacks a class, and is too small to be split, with the same names."""
    ply(tmp_path / "few" / "sheet" / "a.ply", cloud("sheet", 50))
    capsys.readouterr()
    assert run("evaluate", trained, tmp_path / "few", "--split", "all") == 0
    assert capsys.readouterr().out.startswith(f"{trained} on few (all), 1 clouds")
    ply(tmp_path / "few" / "tree" / "a.ply", cloud("sheet", 51))
    refused(
        capsys, "the class 'tree' of these data is none of the run's", "evaluate", trained, tmp_path / "few",
        "--split", "all",
    )  # fmt: skip


def test_predict(trained: Path, rocks: Path, tmp_path: Path) -> None:
    files = [rocks / "ball" / "ball_1.ply", rocks / "box" / "box_2.ply"]
    assert run("predict", trained, *files, "--out", tmp_path / "p") == 0
    assert {file.name for file in (tmp_path / "p").iterdir()} == {"predictions.csv", "samples.png"}
    with (tmp_path / "p" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    for row in rows:
        shares = {name: float(row[name]) for name in CLASSES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3) and shares[row["class"]] == max(shares.values())


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_the_default_method_goes_through_the_hub_into_a_fresh_backbone(
    hub: HubServer, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Point-PEFT, the default of the command."""
    out = tmp_path / "run"
    assert run("train", rocks, "--out", out, *BRIEF) == 0
    capsys.readouterr()
    assert run("evaluate", out, "--json") == 0
    measured = json.loads(capsys.readouterr().out)["results"]["as they are"]
    assert measured == pytest.approx(results(out)["test"], rel=1e-4)
    assert run("push", out, "alice/rocks") == 0
    assert len(hub.commits("alice/rocks")) == 2, "one commit beside the first"
    assert run("pull", "alice/rocks", tmp_path / "pulled") == 0
    model = PointPeftModel.from_pretrained(default_backbone(3), tmp_path / "pulled").eval()
    clouds = torch.from_numpy(np.stack([cloud(kind, 9, POINTS) for kind in CLASSES]).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(model(clouds), open_run(out).model.cpu()(clouds))


# ---- methods, tasks, data ----


def test_full_fine_tuning_has_no_adapter_to_push(
    rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("train", rocks, "--out", out, *BRIEF, "--backbone", f"{HERE}:make", "--method", "full") == 0
    assert {entry.name for entry in out.iterdir()} == FILES | {"model.safetensors"}
    capsys.readouterr()
    assert run("evaluate", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"]["as they are"] == pytest.approx(results(out)["test"])
    refused(capsys, "has no adapter, only model.safetensors", "push", out, "alice/rocks")


def test_two_methods_a_recipe_and_flags_before_it(rocks: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text("lr: 1e-4\nepochs: 7\nseed: 3\n")
    methods = ("--method", "lora", "--method", "bitfit", "--set", "lora.r=2")
    assert run("train", rocks, "--out", out, *BRIEF, "--backbone", f"{HERE}:make", *methods, "--recipe", recipe) == 0
    told = (out / "recipe.yaml").read_text()
    assert "lr: 0.0001\n" in told and "epochs: 1\n" in told and "seed: 3\n" in told
    spec = json.loads((out / "run.json").read_text())["model"]["methods"]
    assert [own["method"] for own in spec] == ["LORA", "BITFIT"] and spec[0]["r"] == 2


def test_parts_of_objects(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    model = ("--backbone", f"{HERE}:make_segmentation", "--method", "lora", "--classes", "{low: [0], high: [1]}")
    assert run("train", parts / "manifest.csv", "--out", out, *BRIEF, *model) == 0
    assert "segmentation, 2 classes (low, high); clouds: 5 train, 1 val, 2 test" in capsys.readouterr().out
    assert "| halves (test) |" in (out / "README.md").read_text()
    assert run("predict", out, parts / "s0.ply", "--out", tmp_path / "p") == 0
    with (tmp_path / "p" / "s0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 96 and {row["class"] for row in rows} <= {"low", "high"}
    assert (tmp_path / "p" / "s0.png").exists()


def test_a_scene(tmp_path: Path) -> None:
    """LAZ goes in, and LAZ with the predicted classes comes out, otherwise as it was."""
    rng = np.random.default_rng(0)
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales = np.full(3, 0.01)
    las = laspy.LasData(header)
    places = rng.uniform([500_000, 4_000_000, 0], [500_024, 4_000_008, 8], (3000, 3))
    las.x, las.y, las.z = places.T
    las.intensity = rng.integers(0, 1000, 3000).astype(np.uint16)
    las.classification = np.where(places[:, 2] > 4, 6, 2).astype(np.uint8)
    las.write(tmp_path / "town.laz")
    scene = ("--split-along", "x", "--tile", "4", "--backbone", f"{HERE}:make_segmentation", "--method", "lora")
    out = tmp_path / "run"
    assert run("train", tmp_path / "town.laz", "--out", out, *BRIEF, *scene) == 0
    assert run("predict", out, tmp_path / "town.laz", "--out", tmp_path / "p") == 0
    made = laspy.read(tmp_path / "p" / "town.laz")
    assert len(made.points) == 3000 and np.array_equal(made.intensity, las.intensity)
    assert set(np.unique(made.classification).tolist()) <= {2, 6}


def test_few_shot_trials(rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    task = (*TINY, "--few-shot", "2x3")
    assert run("train", rocks, "--out", out, *task, "--trials", 2) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("clouds: 6 train, 0 val, 2 test") and "2-way 3-shot, 2 trials: test accuracy " in said[-1]
    found = [results(out / f"trial-{number}")["test"]["accuracy"] for number in range(2)]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["trials"].values()) == found and summary["mean"] == pytest.approx(np.mean(found))
    assert summary["standard_deviation"] == pytest.approx(np.std(found))
    assert run("evaluate", out / "trial-1", "--json") == 0
    again = json.loads(capsys.readouterr().out)["results"]["as they are"]["accuracy"]
    assert again == pytest.approx(found[1])
    refused(capsys, "is not empty: name another, or go on", "train", rocks, "--out", out, *task, "--trials", 2)
    before = {path: path.stat().st_mtime_ns for path in out.glob("trial-*/*")}
    assert run("train", rocks, "--out", out, *task, "--trials", 2, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("trial-*/*")} == before
    other = (*TINY, "--few-shot", "2x2", "--trials", 2, "--resume")
    refused(capsys, "a run with other data", "train", rocks, "--out", out, *other)


def test_one_few_shot_trial_is_that_of_many(rocks: Path, tmp_path: Path) -> None:
    assert run("train", rocks, "--out", tmp_path / "a", *TINY, "--few-shot", "2x3", "--trial", 1) == 0
    name = json.loads((tmp_path / "a" / "run.json").read_text())["name"]
    assert name == "rocks, 2-way 3-shot, trial 1"


# ---- folders of runs ----


def test_a_finished_run_is_told_and_not_changed(trained: Path, rocks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    capsys.readouterr()
    assert run("train", rocks, "--out", trained, *TINY, "--resume") == 0
    assert "holds this run, and it is finished" in capsys.readouterr().out
    refused(capsys, "holds a finished run: name another folder", "train", rocks, "--out", trained, *TINY)
    more = ("train", rocks, "--out", trained, *TINY, "--resume")
    refused(capsys, "a run with epochs 1, not 2", *more, "--epochs", 2)
    refused(capsys, "a run with another backbone or method", *more, "--method", "lora")
    refused(capsys, "a run with other data or another preparation", *more, "--scale", "none")
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_an_interrupted_run_is_gone_on_with(
    rocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def interrupt(loop: Loop) -> None:
        loop.checkpoint()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "run", interrupt)
        assert run("train", rocks, "--out", out, *TINY) == 130
    assert "say the same again with --resume" in capsys.readouterr().err
    refused(capsys, "holds an unfinished run: go on with --resume", "train", rocks, "--out", out, *TINY)
    refused(capsys, "is not finished: go on with train --resume", "evaluate", out)
    refused(capsys, "is not finished: go on with train --resume", "push", out, "alice/rocks")
    more = ("train", rocks, "--out", out, *TINY, "--resume")
    refused(capsys, "a run with other data or another preparation", *more, "--num-points", 80)
    refused(capsys, "a run with another backbone or method", *more, "--method", "lora")
    whole = (out / "checkpoint.pt").read_bytes()
    for damaged in (b"garbage", whole[:2000]):
        (out / "checkpoint.pt").write_bytes(damaged)
        refused(capsys, "checkpoint.pt' cannot be read", *more)
    (out / "checkpoint.pt").write_bytes(whole)
    assert run(*more) == 0
    assert run("evaluate", out) == 0


# ---- what may be wrong with a command ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "x"], "Recipe.epochs is 'x'; allowed: an integer"),
        (["--lr", "-1"], "Recipe.lr is -1; allowed: more than 0"),
        (["--augment", "jiter"], "Recipe.augment is 'jiter'; allowed: none, "),
        (["--epoks", "3"], "unrecognized arguments: --epoks 3"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--processes", "0"], "'0' is not a number from 1 on"),
        (["--mixed-precision", "bf17"], "Recipe.mixed_precision is 'bf17'; allowed: 'no' or 'bf16' or 'fp16' or None"),
        (["--class-weights", "1,2"], "Recipe.class_weights has 2 numbers for 3 classes"),
        (["--patience", "2", "--val-share", "0"], "Recipe.patience needs validation"),
        (["--val-share", "0.9", "--test-share", "0.5"], "DataOptions.test_share is 0.5; allowed: less than 1 together"),
        (["--kind", "foldr"], "kind 'foldr' is unknown; nearest: 'folder'"),
        (["--task", "segmentation"], "is a folder of classes, which says nothing of points"),
        (["--channels", "x,y,z,nx"], "no channel 'nx'; there are x, y, z"),
        (["--classes", "{a: [1"], "--classes is '{a: [1', which is no value"),
        (["--num-points", "4"], "each of at least 8 points, because this backbone makes 8 groups of 8; the model gets"),
        (["--backbone", "point-maee"], "no backbone is called 'point-maee'; nearest: 'point-mae'"),
        (["--backbone", "point-mae"], "give --checkpoint FILE of the published weights, or take point-mae-small"),
        (["--backbone", "none.py:make"], "there is no file"),
        (["--backbone", f"{HERE}:mak"], f"'{HERE}' has no 'mak'"),
        (["--backbone", f"{HERE}:make_with_an_argument"], "missing a required argument: 'width'"),
        (["--checkpoint", "none.pth"], "there is no checkpoint file"),
        (["--method", "lorra"], "no method is called 'lorra'; nearest: 'lora'"),
        (["--method", "bitfit"], "--method bitfit is given twice"),
        (["--method", "full"], "--method full is full fine-tuning"),
        (["--set", "r=3"], "--set 'r=3': nearest: "),
        (["--set", "r"], "--set 'r' must be field=value"),
        (["--num-points", "none"], "clouds of train have 91 to 96 points, and those of a batch must have equally many"),
        (["--log-with", "tensorbord"], "the tracker 'tensorbord': it is unknown; installed: "),
        (["--log-with", "comet_ml"], "the tracker 'comet_ml': it is not installed"),
        (["--few-shot", "5"], "'5' is not WAYSxSHOTS, such as 5x10"),
        (["--few-shot", "5x10"], "0 of 3 classes have 10 clouds to train on"),
        (["--trials", "3"], "say which, as by --few-shot 5x10"),
        (["--recipe", "none.yaml"], "the recipe 'none.yaml' cannot be read"),
    ],
)
def test_wrong_words(
    arguments: list[str], said: str, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    refused(capsys, said, "train", rocks, "--out", out, *TINY, *arguments, left=out)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 3\n", "has a field 'epoch' that no recipe has; nearest: 'epochs'"),
        ("- 1\n", "holds a list, not fields by name"),
        ("epochs: [\n", "is no YAML (line 2, column 1: "),
        ("lr: fast\n", "Recipe.lr is 'fast'; allowed: a finite number"),
        ("task: segmentation\n", "is a folder of classes, which says nothing of points"),
    ],
)
def test_wrong_recipes(text: str, said: str, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "r.yaml", tmp_path / "run"
    file.write_text(text)
    refused(capsys, said, "train", rocks, "--out", out, *TINY, "--recipe", file, left=out)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def make(:\n", "cannot import"),
        ("import nothing_of_that_name\n", "No module named 'nothing_of_that_name'"),
        ("make = 3\n", "gives a int, not an nn.Module"),
    ],
)
def test_wrong_files_of_backbones(
    text: str, said: str, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "wrong_backbone.py", tmp_path / "run"
    file.write_text(text)
    refused(capsys, said, "train", rocks, "--out", out, *TINY, "--backbone", f"{file}:make", left=out)
    checkpoint = ("--checkpoint", file)
    refused(capsys, "cannot be read as tensors only", "train", rocks, "--out", out, *TINY, *checkpoint, left=out)


@pytest.mark.parametrize("text", ["[]", "{", '{"format_version": 1}', '{"format_version": 1, "finished": true}'])
def test_damaged_runs(
    text: str, trained: Path, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "run.json").write_text(text)
    refused(capsys, "run", "evaluate", out)
    refused(capsys, "run", "train", rocks, "--out", out, *TINY, "--resume")


@pytest.fixture(
    params=[
        "missing", "empty folder", "unreadable", "no points", "nan", "unknown class", "no train", "labels", "no labels",
        "scene", "task",
    ]
)  # fmt: skip
def bad(request: pytest.FixtureRequest, rocks: Path, parts: Path, tmp_path: Path) -> tuple[Path, str]:
    """Data that cannot be trained on, and what is said of them."""
    folder, what = tmp_path / "bad", request.param
    files = {"unreadable": "garbage", "no points": "\n", "nan": "nan nan nan\n" * 30}
    said = {"unreadable": "cannot be read", "no points": "holds no points", "nan": "hold NaN or infinity"}
    if what == "missing":
        return folder, "does not exist"
    folder.mkdir()
    if what == "empty folder":
        return folder, "has no folders of classes"
    if what in files:
        shutil.copytree(rocks, folder, dirs_exist_ok=True)
        (folder / "ball" / ("z.ply" if what == "unreadable" else "z.txt")).write_text(files[what])
        return folder, said[what]
    if what == "unknown class":
        for place in ("train/ball", "train/box", "test/ball", "test/tree"):
            ply(folder / place / "a.ply", cloud("ball", 1))
        return folder, "class 'tree' is in test, but not in train"
    if what == "no train":
        (folder / "m.csv").write_text(f"file,split\n{parts}/s0.ply,val\n{parts}/s1.ply,test\n")
        return folder / "m.csv", "no cloud is for training; there are only val and test"
    if what == "scene":
        return parts / "s0.ply", "say how to split, as by --split-along x"
    if what == "task":
        return parts / "manifest.csv", "for each cloud in classification and for each point in segmentation"
    points = np.stack([cloud("ball", number) for number in range(6)]).astype(np.float32)
    labels = {"labels": np.array([0, 1, 2, 0, 1, 7])} if what == "labels" else {}
    np.savez(folder / "set.npz", points=points, class_names=np.array(CLASSES), **labels)  # type: ignore[arg-type]
    return folder / "set.npz", "it should be 0 to 2" if what == "labels" else "label"


def test_bad_data(bad: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    refused(capsys, bad[1], "train", bad[0], "--out", out, *TINY, left=out)


@pytest.mark.filterwarnings("default:left out")
def test_bad_files_are_left_out_by_name(rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "rocks", tmp_path / "run"
    shutil.copytree(rocks, folder)
    (folder / "ball" / "z.ply").write_text("garbage")
    assert run("train", folder, "--out", out, *TINY, "--skip-bad") == 0
    told = capsys.readouterr()
    assert "clouds: 12 train, 3 val, 3 test" in told.out
    assert f"point-peft: warning: left out: {folder / 'ball' / 'z.ply'} cannot be read" in told.err
    assert run("evaluate", out) == 0
    refused(capsys, "cannot be read", "evaluate", out, folder)


def test_a_folder_with_other_things_is_left_alone(
    rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused(capsys, "is not empty and holds no run: name another", "train", rocks, "--out", tmp_path, *TINY)
    trials = ("--few-shot", "2x3", "--trials", "2", "--resume")
    refused(capsys, "holds other things than trials", "train", rocks, "--out", tmp_path, *TINY, *trials)
    refused(capsys, "is a file: name another", "train", rocks, "--out", tmp_path / "mine.txt", *TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def wrong_questions() -> Iterator[tuple[list[str], str]]:
    yield ["evaluate", "ROCKS"], "holds no run: 'run.json' cannot be read"
    yield ["evaluate", "RUN", "none"], "none does not exist"
    yield ["evaluate", "RUN", "--split", "tst"], "invalid choice: 'tst'"
    yield ["evaluate", "RUN", "--corruptions", "jiter"], "no corruption is called 'jiter'; nearest: 'jitter'"
    yield ["evaluate", "RUN", "--corruptions", ""], "there are jitter, dropout"
    yield ["evaluate", "RUN", "PARTS/manifest.csv"], "the class '0' of these data is none of the run's"
    yield ["predict", "ROCKS", "ROCKS/ball/ball_0.ply", "--out", "OUT"], "holds no run"
    yield ["predict", "RUN", "none.ply", "--out", "OUT"], "none.ply does not exist"
    yield ["predict", "RUN", "ROCKS", "--out", "OUT"], "is no file: name files of clouds"
    yield ["predict", "RUN", "RUN/curves.png", "--out", "OUT"], "no reader knows the suffix '.png'"
    yield ["predict", "RUN", "ROCKS/ball/ball_0.ply", "--out", "ROCKS/ball"], "is where the files lie"
    yield ["predict", "RUN", "ROCKS/ball/ball_0.ply", "--out", "RUN/run.json"], "is a file: name a folder"
    yield ["predict", "RUN", *["ROCKS/ball/ball_0.ply"] * 2, "--out", "OUT"], "two of the files have one name"
    yield ["predict", "RUN", "ROCKS/ball/ball_0.ply", "--out", "OUT", "--category", "x"], "leave --category out"


@pytest.mark.parametrize(("arguments", "said"), list(wrong_questions()))
def test_wrong_questions_to_a_run(
    arguments: list[str],
    said: str,
    trained: Path,
    rocks: Path,
    parts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": trained, "ROCKS": rocks, "PARTS": parts, "OUT": tmp_path / "out"}
    told = []
    for text in arguments:
        first, slash, rest = text.partition("/")
        told.append(f"{places[first]}{slash}{rest}" if first in places else text)
    refused(capsys, said, *told, left=tmp_path / "out")
