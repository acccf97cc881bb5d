"""docs/your_data.md, followed word for word: its commands, its recipe and its Python, in their order, on few clouds."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import pytest
import torch

from tests.following import follow
from tests.hub_server import HubServer
from tests.test_train_command import CLASSES, cloud, ply

pytest_plugins = ["tests.hub_fixture"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "your_data.md"
OBJECTS, SCENE = PAGE.read_text("utf-8").split("## Ground in an airborne scan")
SURVEY = ROOT.parent / "shared" / "data" / "autzen_trim.laz"
SURVEYED = 3000
"""So many points of it are taken, drawn at random."""


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_from_a_folder_of_scans_to_a_pushed_adapter(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in CLASSES:
        for number in range(6):
            ply(Path("scans") / kind / f"{kind}_{number}.ply", cloud(kind, number, 400))
    names: dict[str, Any] = {}
    follow(OBJECTS, names)

    files = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`.*?) \|", OBJECTS.split("```")[2], flags=re.M)))
    assert {path.name for path in Path("runs/first").iterdir()} == set(files), "the page's table of the run's files"
    pushed = hub.commits("alice/scans")[0].files
    assert set(pushed) - {".gitattributes"} == set(files) - {"run.json"}
    said = capsys.readouterr().out
    assert "runs/first holds this run, and it is finished" in said and "  jitter " in said
    with Path("predictions/predictions.csv").open() as file:
        first, _ = csv.DictReader(file)
    own = dict(zip(CLASSES, names["probabilities"][0].tolist(), strict=True))
    assert {name: float(first[name]) for name in CLASSES} == pytest.approx(own, abs=1e-4), "as elsewhere, in Python"
    assert "class_weights: balanced" in Path("runs/careful/recipe.yaml").read_text()
    assert names["run"].results["test"] == json.loads(Path("runs/python/run.json").read_text())["results"]["test"]


@pytest.mark.skipif(not SURVEY.exists(), reason="../shared/data/autzen_trim.laz is not there")
@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_ground_in_an_airborne_scan(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    survey = laspy.read(SURVEY)
    drawn = np.random.default_rng(0).choice(len(survey.points), SURVEYED, replace=False)
    survey.points = survey.points[np.sort(drawn)]
    survey.write("survey.laz")
    names: dict[str, Any] = {}
    follow(SCENE, names)

    made = laspy.read("labelled/survey.laz")
    assert np.array_equal(made.xyz, survey.xyz) and np.array_equal(made.red, survey.red)
    assert set(np.unique(made.classification).tolist()) <= {1, 2} and Path("labelled/survey.png").exists()
    assert json.loads(Path("runs/ground/run.json").read_text())["classes"] == ["other", "ground"]
    with torch.no_grad():
        scores = names["ground"](torch.rand(1, 2048, 3), torch.ones(1, 1))
    assert scores.shape == (1, 2048, 2) and torch.isfinite(scores).all()
