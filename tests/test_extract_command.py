"""The command extract: of a run and of checkpoints, with the accuracy before and after, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from point_peft import PointPeftModel, cli
from point_peft.backbones import PointTransformer
from point_peft.training.opening import open_run
from tests.training import SIZES

HERE = "tests.test_extract_command"
POINTS = 64
BRIEF = ("--epochs", "2", "--batch-size", "4", "--num-points", str(POINTS), "--augment", "none", "--lr", "0.003")


def make(cls_dim: int) -> PointTransformer:
    return PointTransformer(**SIZES, cls_dim=cls_dim)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes."""
    folder = tmp_path_factory.mktemp("data")
    for kind, stretch in (("flat", (1, 1, 0.1)), ("long", (1, 0.1, 0.1))):
        (folder / kind).mkdir()
        for seed in range(12):
            points = np.random.default_rng(seed).normal(size=(90, 3)) * stretch
            np.save(folder / kind / f"{seed}.npy", points)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of full fine-tuning."""
    out = tmp_path_factory.mktemp("runs") / "full"
    backbone = ("--backbone", f"{HERE}:make", "--method", "full")
    assert cli.main(["train", str(data), "--out", str(out), *BRIEF, *backbone]) == 0
    return out


def test_a_run_becomes_an_adapter_that_answers_alike(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    assert cli.main(["extract", str(run), "--energy", "0.9999", "--out", str(out), "--data"]) == 0
    said = capsys.readouterr().out
    assert "cls_head_finetune" in said and "bytes" in said
    before, after = (line for line in said.splitlines() if "accuracy" in line)
    assert before.split(": ", 1)[1] == after.split(": ", 1)[1]
    opened = open_run(run)
    assert f'"{HERE}:make (a backbone of point-peft train)"' in (out / "adapter_config.json").read_text("utf-8")
    torch.manual_seed(9)
    model = PointPeftModel.from_pretrained(base_of(run), out).eval()
    points = torch.randn(3, POINTS, 3)
    with torch.no_grad():
        assert torch.allclose(model(points), opened.model(points), atol=1e-2)
        with model.disable_adapter():
            assert not torch.allclose(model(points), opened.model(points), atol=1e-2)


def base_of(run: Path) -> PointTransformer:
    """The backbone as the run began with it."""
    torch.manual_seed(open_run(run).recipe.seed)
    return make(2)


def test_two_checkpoints_become_an_adapter(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, full, out = tmp_path / "base.pth", tmp_path / "full.pth", tmp_path / "adapter"
    torch.save({"base_model": base_of(run).state_dict()}, base)
    torch.save({"model": open_run(run).model.state_dict()}, full)
    sizes = ["--backbone", f"{HERE}:make", "--num-points", str(POINTS)]
    stated = [str(full), str(base), "--out", str(out), *sizes]
    assert cli.main(["extract", *stated, "--data", str(data), "--split", "all", "--energy", "0.99"]) == 0
    assert capsys.readouterr().out.count("loss ") == 2
    assert (out / "adapter_model.safetensors").exists()
    assert cli.main(["extract", *stated[:2], "--out", str(tmp_path / "again"), *sizes, "--num-classes", "2"]) == 0
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (["--energy", "2"], "energy is 2.0; allowed: a share of the change"),
        (["--num-classes", "2"], "--num-classes is what the run"),
        (["--backbone", "point-mae"], "--backbone is what the run"),
        (["--num-points", "32"], "--num-points is what the run says itself"),
    ],
)
def test_what_a_run_says_itself_and_wrong_shares(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stated: Sequence[str], said: str
) -> None:
    assert cli.main(["extract", str(run), "--out", str(tmp_path / "out"), *stated]) == cli.ERROR
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_full_fine_tuning_or_no_checkpoint(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, there = ["--out", str(tmp_path / "out")], tmp_path / "there"
    lora, broken = tmp_path / "lora", tmp_path / "broken.pth"
    backbone = ["--backbone", f"{HERE}:make"]
    assert cli.main(["train", str(data), "--out", str(lora), *BRIEF, *backbone, "--method", "lora"]) == 0
    broken.write_bytes(b"no tensors")
    there.mkdir()
    (there / "file").write_text("mine", "utf-8")
    state: dict[str, Any] = base_of(run).state_dict()
    del state["norm.bias"]
    torch.save(state, tmp_path / "lacks.pth")
    capsys.readouterr()
    for arguments, said in (
        ([str(lora), *out], "has trained an adapter (LORA) already"),
        ([str(broken), *out, *backbone, "--num-classes", "2"], "cannot be read as tensors only"),
        ([str(tmp_path / "lacks.pth"), *out, *backbone, "--num-classes", "2"], "does not fill 1 tensors of the Point"),
        ([str(broken), *out, *backbone], "--num-classes N is needed"),
        ([str(broken), *out, *backbone, "--data"], "--data names no files"),
        ([str(run), "--out", str(there)], "is there already: name a new folder"),
    ):
        assert cli.main(["extract", *arguments]) == cli.ERROR
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert (there / "file").read_text("utf-8") == "mine"
