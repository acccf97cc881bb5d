"""Packages that other libraries need and ours does not: it works where they cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT = """
import importlib, pkgutil, sys, tempfile

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "peft", "transformers"):
            raise RuntimeError(f"{name}: operator torchvision::nms does not exist")

sys.meta_path.insert(0, Broken())
import torch
import point_peft
from point_peft.backbones import PointTransformer

for module in pkgutil.walk_packages(point_peft.__path__, "point_peft."):
    if module.name not in ("point_peft.__main__", "point_peft.integrations.peft"):
        importlib.import_module(module.name)
sizes = {"trans_dim": 24, "depth": 2, "num_heads": 2, "num_group": 16, "group_size": 8, "encoder_dims": 24}
base = PointTransformer(**sizes, cls_dim=5)
clouds = torch.rand(2, 96, 3)
for method, config in point_peft.METHODS.items():
    model = point_peft.get_peft_model(base, config()).eval()
    with torch.no_grad():
        expected = model(clouds)
    if method == "LORA":
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = point_peft.PointPeftModel.from_pretrained(model.unload(), folder).eval()
            assert torch.equal(loaded(clouds), expected)
            base = loaded.unload()
    else:
        base = model.unload()
"""


def test_every_method_without_torchvision_peft_and_transformers() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_troubleshooting_says_what_to_do() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    for words in ("torchvision::nms does not exist", "Could not import module", "download.pytorch.org/whl/cpu"):
        assert words in text
