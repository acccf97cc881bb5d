"""The examples of other people's trainers, from end to end on very few clouds."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from point_peft.quickstart import data
from tests.zoo.operators import supply_torchvision_schemas


@pytest.fixture(scope="module")
def digits() -> data.Clouds:
    return data.load_digits_clouds(n=128)


@pytest.mark.parametrize("name", ["transformers_trainer", "lightning_trainer"])
def test_it_trains_saves_and_loads(
    name: str, digits: data.Clouds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The script itself ends with an error where the reloaded adapter answers otherwise."""
    pytest.importorskip(name.partition("_")[0])
    supply_torchvision_schemas()
    example = importlib.import_module(f"examples.{name}")
    monkeypatch.setattr(example, "load_digits_clouds", lambda n: digits)
    capfd.readouterr()
    example.main(["--train", "8", "--test", "4", "--epochs", "2", "--out", str(tmp_path / "out")])
    printed, errors = capfd.readouterr()
    assert errors == ""
    lines = printed[printed.index("trainable params") :].splitlines()[1:]
    number = r"\d+\.\d+"
    expected = [
        rf"epoch 1: loss {number}, validation {number} %",
        rf"epoch 2: loss {number}, validation {number} %",
        rf"test: {number} % of 4 clouds",
        rf".*out: {number} MB, loaded into a fresh backbone, whose logits are equal bit for bit",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line)
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".json", ".md", ".safetensors"]
