"""docs/own_method.md: its module is found on the path, does what the page says, and conforms; what goes wrong there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.test_methods_table import ON_ONE_BACKBONE

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "own_method.md").read_text("utf-8")
MODULE, USE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
MISTAKES = """
import json
import os
import pathlib
import pytest
from point_peft import AdapterError, AdapterFileError, PointPeftError, TunerConfig

def unstated():
    class BlockGates(TunerConfig):
        pass

def taken():
    class Other(TunerConfig):
        method = "LORA"

def unknown():
    del METHODS["BLOCK_GATES"]
    PointPeftModel.from_pretrained(again.unload(), "adapter")

gates = BlockGatesConfig(modules_to_save=[])
mistakes = [
    (TypeError, unstated),
    (TypeError, taken),
    (PointPeftError, lambda: BlockGatesConfig(speed=0)),
    (AdapterFileError, unknown),
    (AdapterError, lambda: get_peft_model(default_backbone(cls_dim=3), gates).merge()),
    (UserWarning, lambda: detached(get_peft_model(default_backbone(cls_dim=3), gates))),
]

def detached(model):
    gate = type(next(part for part in model.modules() if type(part).__name__ == "Gate"))
    after = gate.after
    gate.after = lambda self, call, args, kwargs, output: after(self, call, args, kwargs, output).detach()
    model.train()(torch.rand(2, 256, 3))

for words, (kind, mistake) in zip(said, mistakes, strict=True):
    check = pytest.warns if kind is UserWarning else pytest.raises
    with check(kind, match=words):
        mistake()
"""


def test_the_module_is_found_used_and_conforms_and_mistakes_are_told(tmp_path: Path) -> None:
    """In another process, as a method enters the registry for good."""
    folder = tmp_path / "mine" / "point_peft" / "tuners"
    folder.mkdir(parents=True)
    (folder / "block_gates.py").write_text(MODULE, "utf-8")
    (folder.parents[1] / "on_one_backbone.py").write_text(ON_ONE_BACKBONE, "utf-8")
    said = [re.escape(words) for words in re.findall(r"^\| `(.+?)`[ (|]", TEXT.split("## What can go")[1], flags=re.M)]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "on_one_backbone"]
    suite = ["-q", *plugins, "-k", "BLOCK_GATES-point_mae", "tests/test_conformance.py"]
    script = f"""
import torch
torch.set_num_threads(1)
{USE}
import os
import pytest
here = os.getcwd()
os.chdir({str(ROOT)!r})
assert pytest.main({suite!r}) == 0
os.chdir(here)
said = {said!r}
{MISTAKES}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "mine"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert re.search(r"\d passed", done.stdout) and "Gate.gate" in done.stdout
