"""Two models on the same clouds: the statistics, the function and the command, and whatever may be wrong with them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from point_peft import LoraConfig, PointPeftError
from point_peft.training import compare, pictures
from point_peft.training.agreement import at_most, kappa, share_interval, sign_test
from point_peft.training.calibration import calibration_error, reliability
from point_peft.training.opening import clouds_of, open_run
from tests.following import follow
from tests.test_several_adapters import count_samples
from tests.test_train_command import BRIEF, CLASSES, PNG, cloud, ply, refused, results, run, write_rocks
from tests.training import adapted, backbone, shapes

ROOT = Path(__file__).parents[1]
HERE = "tests.test_train_command"
NAMES = ("flat", "long", "round")


# ---- statistics ----


def test_calibration_is_the_gap_of_accuracy_and_confidence() -> None:
    right = torch.tensor([True, True, False, False])

    def error(confidence: list[float]) -> float:
        return calibration_error(reliability(torch.tensor(confidence), right))

    assert error([0.5] * 4) == pytest.approx(0.0)
    assert error([0.9] * 4) == pytest.approx(40.0, abs=1e-4)
    assert error([1.0, 1.0, 0.0, 0.0]) == pytest.approx(0.0)
    halves = sum(reliability(torch.full((2,), 0.9), part) for part in right.split(2))
    assert isinstance(halves, Tensor) and calibration_error(halves) == pytest.approx(error([0.9] * 4))


def test_kappa_is_agreement_beyond_chance() -> None:
    assert kappa(torch.tensor([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert kappa(torch.tensor([[25, 25], [25, 25]])) == pytest.approx(0.0)
    assert kappa(torch.eye(3) * 7) == 1.0 and kappa(torch.tensor([[9, 0], [0, 0]])) == 1.0


def test_the_exact_test_and_its_interval() -> None:
    assert sign_test(2, 8) == pytest.approx(2 * (1 + 8 + 28) / 256) and sign_test(6, 8) == pytest.approx(
        sign_test(2, 8)
    )
    assert sign_test(0, 0) == sign_test(4, 8) == 1.0
    assert at_most(3, 3, 0.2) == 1.0 and at_most(0, 3, 0.5) == pytest.approx(1 / 8)
    low, high = share_interval(2, 8)
    assert (low, high) == pytest.approx((0.031854, 0.650856), abs=1e-6)  # as tables of Clopper and Pearson have it
    assert share_interval(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1)) and share_interval(0, 0) == (0.0, 1.0)
    assert 0 < sign_test(5100, 10000) < 0.05


# ---- the function ----


class Fixed(nn.Module):
    """A model that answers what it is told, whatever the clouds."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, points: Tensor) -> Tensor:
        return self.scores[points[:, 0, 0].long()]


def numbered(labels: Tensor) -> TensorDataset:
    """Clouds that bear their own numbers, by which `Fixed` tells them apart."""
    points = torch.arange(len(labels), dtype=torch.float32)[:, None, None].expand(-1, 2, 3)
    return TensorDataset(points.clone(), labels)


def scores(answers: list[int], sure: float = 4.0) -> Tensor:
    return sure * torch.eye(3)[torch.tensor(answers)]


def test_what_is_told_of_two_classifiers() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    a, b = Fixed(scores([0, 0, 1, 2, 2, 0])), Fixed(scores([0, 1, 1, 1, 0, 1], sure=1.0))
    found = compare(a, b, numbered(labels), NAMES, batch_size=4)
    assert found.right == (2, 2, 1, 1) and found.clouds == found.answers == found.labelled == 6
    assert (found.a.accuracy, found.b.accuracy) == pytest.approx((400 / 6, 50.0)) and found.a.miou is None
    assert found.agreement == pytest.approx(100 * 2 / 6)
    assert found.pairs == ((1, 2, 0), (0, 1, 0), (1, 1, 0))
    lead = found.lead
    assert lead is not None and (lead.a, lead.b, lead.p) == (2, 1, 1.0) and lead.share == pytest.approx(100 / 3)
    assert lead.low < 100 / 3 < lead.high
    assert [(own.name, own.labels, own.a, own.b) for own in found.of_classes] == [
        ("flat", 2, 100.0, 50.0), ("long", 2, 50.0, 100.0), ("round", 2, 50.0, 0.0),
    ]  # fmt: skip
    assert [(own.index, own.true, own.a, own.b) for own in found.differing] == [
        (1, "flat", "flat", "long"), (3, "long", "round", "long"), (4, "round", "round", "flat"),
        (5, "round", "flat", "long"),
    ]  # fmt: skip
    sure = float(torch.tensor([4.0, 0, 0]).softmax(0)[0])
    assert found.a.confidence == pytest.approx(100 * sure, rel=1e-5)
    assert found.a.calibration_error == pytest.approx(100 * abs(sure - 4 / 6), rel=1e-4)
    wrong = torch.nn.functional.cross_entropy(a.scores.detach(), labels)
    assert found.a.loss == pytest.approx(float(wrong), rel=1e-5)
    assert sum(row[0] for row in found.a.reliability) == 6


def test_two_adapters_of_one_model_answer_as_each_alone_and_the_stem_runs_once() -> None:
    model = adapted(LoraConfig(r=2))
    model.add_adapter("b", LoraConfig(r=3))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    model.eval()
    clouds = shapes(10)
    alone = {}
    for name in ("default", "b"):
        with torch.no_grad(), model.use_adapter(name):
            alone[name] = model(clouds.tensors[0]).argmax(dim=1)
    assert not torch.equal(alone["default"], alone["b"])
    counts = count_samples(model.base_model.get_submodule("encoder"))
    found = compare(model, model, clouds, NAMES, adapters=("default", "b"), together=True)
    assert counts["samples"] == 2 * 10, "once for both, and once for both at once"
    differing = (alone["default"] != alone["b"]).nonzero().flatten().tolist()
    assert [own.index for own in found.differing] == differing
    right = [100 * float((alone[name] == clouds.tensors[1]).double().mean()) for name in ("default", "b")]
    assert (found.a.accuracy, found.b.accuracy) == pytest.approx(tuple(right))
    with torch.no_grad(), model.use_adapter(["default", "b"]):
        both = model(clouds.tensors[0]).argmax(dim=1) == clouds.tensors[1]
    assert found.together is not None and found.together.accuracy == pytest.approx(100 * float(both.double().mean()))
    *_, last = (p for name, p in model.adapters.named_parameters() if name.startswith("default.") and p.shape == (3,))
    with torch.no_grad():
        last.add_(torch.tensor([0.0, 0.0, 1e4]))
    found = compare(model, model, clouds, NAMES, adapters=("default", "b"), together=True)
    assert found.together is not None and found.together.accuracy == found.a.accuracy == 30.0, "it is A's head"
    same = compare(model, model, clouds, NAMES, adapters=("b", "b"))
    assert same.agreement == 100 and same.kappa == 1 and same.lead is not None and same.lead.share is None


def test_segmentation_leads_by_clouds_and_not_by_points() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, -1]])
    clouds = TensorDataset(numbered(labels).tensors[0], labels)
    a = Fixed(torch.stack([scores(own) for own in ([0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0])]))
    b = Fixed(torch.stack([scores(own) for own in ([0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 2, 0])]))
    found = compare(a, b, clouds, NAMES, task="segmentation", batch_size=2)
    assert found.clouds == 3 and found.answers == 12 and found.labelled == 11
    assert found.right == (4, 3, 1, 3) and found.lead is not None and (found.lead.a, found.lead.b) == (2, 1)
    assert [(own.index, own.share) for own in found.differing] == [(1, 50.0), (0, 25.0), (2, 25.0)]
    assert found.a.miou == pytest.approx(100 * (4 / 8 + 3 / 4 + 0) / 3) and found.a.accuracy == pytest.approx(700 / 11)


def test_without_labels_agreement_is_told_and_nothing_else() -> None:
    found = compare(Fixed(scores([0, 1, 2])), Fixed(scores([0, 1, 0])), numbered(torch.full((3,), -1)), NAMES)
    assert found.agreement == pytest.approx(200 / 3) and found.labelled == 0
    unknown = (found.a.accuracy, found.a.miou, found.a.loss, found.a.calibration_error, found.right, found.lead)
    assert unknown == (None,) * 6
    assert found.differing[0].true is None and found.differing[0].a == "round"
    some = compare(Fixed(scores([0, 1, 2])), Fixed(scores([0, 1, 0])), numbered(torch.tensor([0, -1, -1])), NAMES)
    assert some.labelled == 1 and some.a.accuracy == 100.0


def test_what_cannot_be_compared() -> None:
    clouds, good = numbered(torch.tensor([0, 1])), Fixed(scores([0, 1]))
    with pytest.raises(PointPeftError, match="the outputs of B are not finite for cloud 1: a training that diverged"):
        compare(good, Fixed(torch.tensor([[1.0, 0, 0], [1.0, float("nan"), 0]])), clouds, NAMES)
    with pytest.raises(PointPeftError, match=r"B gives \(2, 3\) for 2 clouds, .* the 2 classes: flat, long"):
        compare(Fixed(torch.eye(2)), good, clouds, NAMES[:2])
    with pytest.raises(PointPeftError, match="there are no clouds to compare on"):
        compare(good, good, TensorDataset(torch.zeros(0, 2, 3), torch.zeros(0)), NAMES)
    with pytest.raises(PointPeftError, match="the names of the classes are not known: give classes="):
        compare(good, good, clouds)
    with pytest.raises(PointPeftError, match="together needs two adapters of one backbone in one model"):
        compare(backbone(), backbone(1), clouds, NAMES, together=True)


# ---- the command ----


@pytest.fixture(scope="module")
def rocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rocks(tmp_path_factory.mktemp("data") / "rocks")


@pytest.fixture(scope="module")
def runs(rocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs that no test changes: three of one backbone, full fine-tuning too, and one of another."""
    out = tmp_path_factory.mktemp("runs")
    how = (*BRIEF, "--backbone", f"{HERE}:make")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "confusions", "samples"):
            patch.setattr(pictures, name, lambda *arguments: PNG)
        lora = ("--set", "r=2", "--lr", "0.1")
        for name, own in {"bitfit": (), "lora": lora, "full": (), "bitfit-1": ("--seed", "1")}.items():
            method = name.removesuffix("-1")
            assert run("train", rocks, "--out", out / name, *how, "--method", method, *own) == 0
        yield out


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run("compare", *arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_two_runs(runs: Path, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    capsys.readouterr()
    arguments = ("compare", runs / "bitfit", runs / "lora", "--split", "all", "--together")
    assert run(*arguments, "--out", out) == 0
    text = capsys.readouterr().out
    found = json.loads((out / "compare.json").read_text())
    lines = text.splitlines()
    assert lines[:3] == [f"A: {runs / 'bitfit'}", f"B: {runs / 'lora'}", "on rocks (all): 18 clouds in 3 classes"]
    assert re.search(r"^ +A +B +A with B +B - A$", text, re.M) and "agreement: " in text and "Cohen's kappa" in text
    assert (out / "compare.png").read_bytes().startswith(PNG) and found["clouds"] == 18
    names = [own["cloud"] for own in found["differing"]]
    assert all(name.startswith(str(rocks)) for name in names)
    assert run(*arguments, "--json") == 0 and json.loads(capsys.readouterr().out) == found
    for who, name in (("a", "bitfit"), ("b", "lora")):
        measured, _ = open_run(runs / name).inference.measure(clouds_of(open_run(runs / name), split="all"))
        assert found[who]["accuracy"] == pytest.approx(measured["accuracy"])
        assert found[who]["loss"] == pytest.approx(measured["loss"], rel=1e-4)


def test_runs_on_different_backbones_are_compared_apart(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, runs / "full", runs / "bitfit")
    assert found["clouds"] == 3 and found["together"] is None
    assert found["a"]["accuracy"] == pytest.approx(results(runs / "full")["test"]["accuracy"])
    assert found["b"]["accuracy"] == pytest.approx(results(runs / "bitfit")["test"]["accuracy"])
    refused(
        capsys, "together needs two adapters of one backbone", "compare", runs / "full", runs / "lora", "--together"
    )


def test_a_run_with_itself(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, runs / "lora", runs / "lora")
    assert found["agreement"] == 100 and found["kappa"] == 1 and found["lead"]["p"] == 1 and not found["differing"]


def adapter_of(runs: Path, name: str, place: Path) -> Path:
    """The adapter's files of a run alone."""
    place.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(runs / name / file, place)
    return place


def test_adapters_without_their_runs(
    runs: Path, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (adapter_of(runs, name, tmp_path / name) for name in ("bitfit", "lora"))
    wanted = told(capsys, runs / "bitfit", runs / "lora", "--split", "all")
    on = ("--backbone", f"{HERE}:make", "--data", rocks, "--split", "all", "--num-points", 64)
    for found in (told(capsys, a, b, *on), told(capsys, runs / "bitfit", b, "--split", "all")):
        assert found["pairs"] == wanted["pairs"] and found["a"]["loss"] == pytest.approx(wanted["a"]["loss"])
    turned = told(capsys, a, runs / "lora", "--split", "all")
    assert turned["pairs"] == wanted["pairs"] and turned["b"]["loss"] == pytest.approx(wanted["b"]["loss"])
    beside_full = told(capsys, runs / "full", b, "--split", "all")
    assert beside_full["b"]["loss"] == pytest.approx(wanted["b"]["loss"])
    refused(capsys, "this adapter belongs to other weights of the backbone", "compare", runs / "bitfit-1", b)
    refused(capsys, "neither ", "compare", a, b)
    full = ("compare", runs / "full", b, "--backbone", f"{HERE}:make", "--data", rocks)
    refused(capsys, "trained the model itself and holds no adapter", *full)
    refused(capsys, "--num-points is for adapters on a --backbone", "compare", runs / "lora", b, "--num-points", 64)
    other = tmp_path / "other.py"
    lines = ["import torch", f"from {HERE} import make as drawn", "def make(cls_dim):", "    torch.manual_seed(7)"]
    other.write_text("\n".join([*lines, "    return drawn(cls_dim)", ""]))
    elsewhere = ("--backbone", f"{other}:make", "--data", rocks)
    refused(capsys, "this adapter belongs to other weights of the backbone", "compare", a, b, *elsewhere)


def test_the_page_s_section_is_followed(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, section = (ROOT / "docs" / "many_adapters.md").read_text("utf-8").split("## Comparing two adapters")
    monkeypatch.chdir(tmp_path)
    for name, own in {"first": "bitfit", "second": "lora"}.items():
        shutil.copytree(runs / own, Path("runs") / name)
    names: dict[str, Any] = {}
    follow(section, names)
    found = json.loads(Path("comparison/compare.json").read_text())
    assert Path("comparison/compare.png").exists() and names["found"].agreement == pytest.approx(found["agreement"])


def test_data_without_labels(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        ply(tmp_path / f"s{number}.ply", cloud("box", number))
    (tmp_path / "m.csv").write_text("file\ns0.ply\ns1.ply\ns2.ply\n")
    how = (runs / "bitfit", runs / "lora", "--data", tmp_path / "m.csv", "--split", "all")
    found = told(capsys, *how)
    assert found["labelled"] == 0 and found["a"]["accuracy"] is None and found["clouds"] == 3
    assert run("compare", *how, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "labels are known of 0 of 3 clouds" in said and "nothing tells who is right" in said


def test_the_same_classes_in_another_order(
    runs: Path, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the order in which a run numbers its classes, those of one name are compared."""
    copy, turned = tmp_path / "turned", [2, 0, 1]
    shutil.copytree(runs / "full", copy)
    record = json.loads((copy / "run.json").read_text())
    record["classes"] = [CLASSES[place] for place in turned]
    (copy / "run.json").write_text(json.dumps(record))
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    last = max(name.rpartition(".")[0] for name, value in tensors.items() if value.shape[:1] == (3,))
    for name in (f"{last}.weight", f"{last}.bias"):
        tensors[name] = tensors[name][turned].contiguous()
    safetensors.torch.save_file(tensors, copy / "model.safetensors")
    found = told(capsys, runs / "full", copy, "--split", "all")
    assert found["agreement"] == 100 and found["a"]["loss"] == pytest.approx(found["b"]["loss"])
    record["classes"] = ["ball", "box", "tree"]
    (copy / "run.json").write_text(json.dumps(record))
    said = "A and B answer with different classes: only A knows sheet; only B knows tree"
    refused(capsys, said, "compare", runs / "full", copy)


def test_outputs_that_are_not_finite(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "diverged"
    shutil.copytree(runs / "full", copy)
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    safetensors.torch.save_file({name: value * np.nan for name, value in tensors.items()}, copy / "model.safetensors")
    refused(capsys, "the outputs of B are not finite for ", "compare", runs / "lora", copy)


def test_segmentation(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["file,split"]
    for number in range(8):
        points = cloud("box", number)
        ply(tmp_path / f"s{number}.ply", points, (points[:, 2] > 0).astype(np.int64))
        rows.append(f"s{number}.ply,{'train' if number < 4 else 'test'}")
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    how = ("--backbone", f"{HERE}:make_segmentation", "--method")
    with monkeypatch.context() as patch:
        for name in ("curves", "confusions", "samples"):
            patch.setattr(pictures, name, lambda *arguments: PNG)
        for name in ("bitfit", "lora"):
            assert run("train", tmp_path / "m.csv", "--out", tmp_path / name, *BRIEF, *how, name) == 0
    found = told(capsys, tmp_path / "bitfit", tmp_path / "lora", "--out", tmp_path / "out")
    assert found["answers"] == 4 * 64 and found["a"]["miou"] is not None
    assert found["a"]["miou"] == pytest.approx(results(tmp_path / "bitfit")["test"]["miou"])
    assert run("compare", tmp_path / "bitfit", tmp_path / "lora") == 0
    assert "4 clouds with 256 points in 2 classes" in capsys.readouterr().out
    refused(capsys, "A is a classification and B a segmentation", "compare", runs / "lora", tmp_path / "lora")


def test_wrong_questions_of_two(runs: Path, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = runs / "bitfit", runs / "lora", tmp_path / "out"
    for split in ("train", "val"):
        ply(tmp_path / "few" / split / "ball" / "a.ply", cloud("ball", 0))
    few = ("--data", tmp_path / "few", "--out", out)
    refused(capsys, "no clouds are of the split 'test'; there are train, val, all", "compare", a, b, *few, left=out)
    (tmp_path / "file").write_text("")
    refused(capsys, "is a file: name a folder", "compare", a, b, "--out", tmp_path / "file")
    refused(capsys, "invalid choice: 'tst'", "compare", a, b, "--split", "tst")
    refused(capsys, "none does not exist", "compare", a, b, "--data", "none")
    refused(capsys, "is no run and holds no adapter", "compare", a, rocks, "--out", out, left=out)
