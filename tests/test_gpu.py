"""The script for a machine with a GPU works: it runs here at its smallest sizes, on the CPU."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from tools import gpu


def test_the_script_runs_without_a_gpu_and_writes_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setattr(gpu, "LIMIT", math.inf)  # of whoever lends a GPU
    assert gpu.main(["--smallest", "--out", str(tmp_path)]) == 0, (tmp_path / "report.md").read_text(encoding="utf-8")
    outcomes = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["outcomes"]
    assert all(outcome["passed"] for outcome in outcomes)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"{len(outcomes)} of {len(outcomes)} checks passed." in text
    for outcome in outcomes:
        assert f"| {outcome['name']} | yes | {outcome['detail']} |" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md",
        "report.json",
        "speed.md",
        "speed.json",
        "speed.png",
    }


def test_what_fails_or_comes_too_late_is_in_the_report() -> None:
    def fails() -> str:
        raise RuntimeError("another number\nthan a | CPU's")

    failed = gpu.carried_out("sum", fails, time.perf_counter())
    late = gpu.carried_out("product", lambda: "", time.perf_counter() - gpu.LIMIT - 1)
    text = gpu.report([failed, late], torch.device("cpu"))
    assert "| sum | NO | RuntimeError: another number than a / CPU's |" in text
    assert "| product | NO | left out: no time was left |" in text
    assert "0 of 2 checks passed." in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("DEVICE", raising=False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "DEVICE=cpu python -m tools.gpu --smallest" in capsys.readouterr().err
