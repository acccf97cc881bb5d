"""The table, the pages and the figures of methods: all are there, they say what is so, and a new method enters."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from point_peft import METHODS, PointPeftError
from point_peft.hub.card import markdown
from tests.adapting import full_point_mae
from tests.methods import ToyConfig
from tools import method_figures, method_pages, methods
from tools.methods import BASE, PUBLISHED, QUICK, Row

ROOT = Path(__file__).parent.parent
ROWS = methods.rows_of()

NEW_METHOD = '''"""ShiftTuning: one trained vector is added to the output of every MLP.

A. Nobody: "Shifts", nowhere 2026, https://example.org/shifts_1

    h <- h + s

When to use it: never, it is a test.

Deviations from the published code, each with its reason:

- nothing was published.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from point_peft import TunerConfig
from point_peft.parts.base import Blueprint, Part


class ShiftPart(Part):
    prefix = "shift"

    def __init__(self, width, start):
        super().__init__()
        self.shift = nn.Parameter(torch.full((width,), start))

    def after(self, call, args, kwargs, output):
        return output + self.shift


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(TunerConfig):
    """Shifts."""

    method: ClassVar[str] = "SHIFT"

    start: float = 0.0
    """What the shift
    *begins* with."""

    def build(self, backbone):
        stages = backbone.known_anatomy(self.method).stages
        return Blueprint(
            parts=[(block.mlp, ShiftPart(stage.width, self.start)) for stage in stages for block in stage.blocks]
        )
'''


picture = functools.cache(method_pages.picture)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return full_point_mae()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(METHODS, "TOY", ToyConfig)
    yield "TOY"


# --- the table ---


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_its_rows_for_everything_that_is_registered():
    assert list(dict.fromkeys(row.method for row in ROWS)) == sorted(METHODS)
    # A head alone, a method that merges, and one with a published row beside the default.
    rows = methods.rows_of(["LINEAR_PROBE", "IA3", "POINT_PEFT"])
    text = methods.page(rows, QUICK)
    lines = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    assert tuple(lines[0]) == methods.HEADER
    assert [line[0] for line in lines[2:]] == [methods.PLAIN, methods.FULL, *(row.label for row in rows)]
    for line in lines[4:]:
        parameters, whole, _, gmac, above, *answers = line[1:]
        assert int(parameters.replace(",", "")) < int(whole.replace(",", ""))
        assert float(gmac) > 0 and float(above) >= 0
        assert set(answers) <= {"yes", "no", "-"}
    assert methods.COMMAND in text


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_published_count_is_ours_or_the_difference_is_explained(row: Row, base: nn.Module):
    model = methods.adapted(row, base)
    parameters, head = methods.trained(model)
    model.unload()
    known = PUBLISHED.get(row.label)
    assert head == 267_535 or row.pool
    if known is not None:
        assert parameters == (known.parameters if known.ours is None else known.ours)
        differs = known.ours not in (None, known.parameters)
        assert differs == bool(known.reason), "a difference is explained, and nothing else"


def test_what_was_published_belongs_to_a_row():
    labels = {row.label for row in ROWS}
    assert not [label for label in PUBLISHED if label.split()[0] in METHODS and label not in labels]
    assert not [name for name, variants in methods.VARIANTS.items() if name in METHODS and not variants]


@pytest.mark.parametrize(
    ("method", "mergeable", "coordinates", "bank"),
    [
        ("LORA", True, False, False),
        ("LINEAR_PROBE", None, False, False),
        ("POINT_PEFT", False, True, False),
        ("TOY", False, False, False),
    ],
)
def test_facts_are_found_out(method, mergeable, coordinates, bank, toy):
    found = methods.facts(Row(method=method), QUICK)
    assert (found.mergeable, found.needs_coordinates, found.needs_bank) == (mergeable, coordinates, bank)


def test_multiply_adds_are_counted_those_of_attention_too():
    attention = 12 * 2 * 129**2 * 384 / 1e9
    base = full_point_mae().to_empty(device="cpu")  # whatever the values are
    assert methods.gmac(base, BASE) == pytest.approx(4.241 + attention, abs=0.001)
    wide, narrow = (methods.facts(Row(method="LORA", fields={"r": r}), QUICK).gmac for r in (8, 4))
    tokens, width = 33, 48
    assert wide - narrow == pytest.approx(12 * (8 - 4) * tokens * (width + 3 * width) / 1e9)


def test_unknown_methods_and_mixed_options_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(PointPeftError, match="'LORAX' is unknown; known methods: BITFIT"):
        methods.rows_of(["LORAX"])
    with pytest.raises(SystemExit):
        methods.main(["--write", "--quick"])
    assert "leave out --quick" in capsys.readouterr().err


# --- pages ---


def test_every_method_has_its_page_and_its_figure_as_the_code_says(monkeypatch: pytest.MonkeyPatch):
    for name in ("gmac", "_mergeable", "_needs_coordinates"):  # what is measured is not compared here
        monkeypatch.setattr(methods, name, lambda *arguments: 0.0)
    present = {path.name: path.read_text(encoding="utf-8") for path in method_pages.FOLDER.glob("*")}
    wanted = {"README.md", *(f"{method.lower()}{ending}" for method in METHODS for ending in (".md", ".svg"))}
    hint = "write them anew: python -m tools.method_pages"
    assert set(present) == wanted, hint
    assert present["README.md"] == method_pages.index(), hint
    for method in METHODS:
        assert present[f"{method.lower()}.svg"] == picture(method), hint
        written, said = (
            _timeless(text) for text in (present[f"{method.lower()}.md"], method_pages.page(method, QUICK))
        )
        assert written == said, hint


def _timeless(text: str) -> str:
    """A page without the section of what is measured, which takes the base backbone."""
    return re.sub(r"## On .*?(?=\n## )", "", text, flags=re.DOTALL)


def test_a_docstring_is_taken_apart(monkeypatch: pytest.MonkeyPatch, toy: str):
    module = sys.modules[ToyConfig.__module__]
    monkeypatch.setattr(module, "__doc__", NEW_METHOD.split('"""')[1])
    text = method_pages.text_of(toy)
    assert (text.name, text.summary) == ("ShiftTuning", "One trained vector is added to the output of every MLP.")
    assert text.citation == ['A. Nobody: "Shifts", nowhere 2026, https://example.org/shifts_1']
    assert text.body == ["```text\nh <- h + s\n```"]
    assert text.use == ["Never, it is a test."] and text.deviations == ["- nothing was published."]


def test_plain_text_stays_what_it_is():
    assert markdown("x_i <- 2 * `a_b` [1]") == r"x\_i \<- 2 \* `a_b` \[1\]"
    assert markdown("see https://a.org/b_c") == "see https://a.org/b_c"
    assert method_pages.cell("one\nline\n\nand | more") == r"one line<br>and \| more"


def test_a_page_lists_the_method_s_own_fields_only():
    meanings = method_pages.meanings(METHODS["POINT_PEFT"])
    assert meanings["adapter_scale"] == "Scale of the adapter after the MLP; 0: no adapter there."
    assert "target_modules" not in meanings and "method" not in meanings


# --- figures ---


def test_a_figure_shows_parts_where_they_are():
    chips = method_figures.chips_of("POINT_PEFT")
    assert [chip.name for chip in chips["mlp"]] == ["MlpPart"]
    (block,) = [chip for chip in chips["block"] if chip.name == "BlockPart"]
    assert block.members["prompt"] == {6, 7, 8} and block.members["geometry"] == set(range(6, 12))
    assert {chip.name for chip in chips["shared"]} == {"StageGeometry", "TunedTokens"}
    assert [chip.name for chip in chips["cls_head_finetune"]] == ["OwnModule"]
    assert "prompt (blocks 6–8)" in " ".join(block.lines(400))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_figure_is_well_formed_and_nothing_in_it_overlaps(method: str):
    text = picture(method)
    root = ElementTree.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    space = "{http://www.w3.org/2000/svg}"
    filled = [item for item in root.findall(f"{space}rect")[1:] if item.attrib["fill"] != "none"]
    boxes = [tuple(float(item.attrib[name]) for name in ("x", "y", "width", "height")) for item in filled]
    for x, y, w, h in boxes:
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for i, (x, y, w, h) in enumerate(boxes):
        for other_x, other_y, other_w, other_h in boxes[:i]:
            apart = x >= other_x + other_w or other_x >= x + w or y >= other_y + other_h or other_y >= y + h
            assert apart


# --- a method of someone else ---


ON_ONE_BACKBONE = """
from tests import adapting
adapting.PAIRS[:] = [(method, backbone) for method, backbone in adapting.PAIRS if backbone.name == "point_mae"]
"""
"""A plugin of pytest: no other backbone is made while tests are collected."""
TRAINING = "test_training_and_unloading_leave_the_backbone_as_it_was"
GUARANTEES = ("tests/test_conformance.py", f"tests/test_representatives.py::{TRAINING}")


def test_a_new_module_enters_registry_files_table_pages_figure_and_conformance_matrix(tmp_path: Path):
    """One file, nothing else is edited; among the methods of point_peft it need not even be imported.

    Nor is the suite told of it: it finds the method on the path, and runs every guarantee on it.
    """
    folder = tmp_path / "point_peft" / "tuners"
    folder.mkdir(parents=True)
    (folder / "shift_tuning.py").write_text(NEW_METHOD, encoding="utf-8")
    imported = NEW_METHOD.replace("ShiftTuning", "Imported").replace("Shift", "Import").replace("SHIFT", "IMPORT")
    (tmp_path / "imported.py").write_text(imported, encoding="utf-8")
    (tmp_path / "on_one_backbone.py").write_text(ON_ONE_BACKBONE, encoding="utf-8")
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "on_one_backbone"]
    guarantees = ["-q", *plugins, "-k", "SHIFT-point_mae", *GUARANTEES]
    script = f"""
import os
import pytest
import torch
torch.set_num_threads(1)
import imported
from point_peft import METHODS, PointPeftModel, get_peft_model
from tests.zoo import BACKBONES
from tools import method_pages, methods
backbone = BACKBONES["point_mae"]
model = get_peft_model(backbone.build(), METHODS["SHIFT"]()).eval()
with torch.no_grad():
    for parameter in model.adapters.parameters():
        parameter.normal_()
model.save_pretrained("adapter")
again = PointPeftModel.from_pretrained(backbone.build(), "adapter").eval()
points = backbone.inputs(2, 0)
assert torch.equal(again(*points), model(*points))
with model.disable_adapter():
    assert not torch.equal(again(*points), model(*points))
methods.main(["--quick", "--methods", "SHIFT", "IMPORT"])
for method in ("SHIFT", "IMPORT"):
    print(method_pages.page(method, methods.QUICK))
    print(method_pages.picture(method))
print(method_pages.index())
os.chdir({str(ROOT)!r})
raise SystemExit(pytest.main({guarantees!r}))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    for line in (
        "| SHIFT | 576 | 96,079 | - |",
        "| IMPORT | 576 | 96,079 | - |",
        "# ShiftTuning",
        "One trained vector is added to the output of every MLP.",
        "```text\nh <- h + s\n```",
        "from point_peft.tuners.shift_tuning import ShiftConfig",
        "from imported import ImportConfig",
        "model = get_peft_model(default_backbone(cls_dim=10), ShiftConfig())",
        r"| `start` | `0.0` | What the shift \*begins\* with. |",
        "Not tried yet",
        "ShiftPart",
        "ImportPart",
        "| `SHIFT` | [ShiftTuning](shift.md) |",
        "| `IMPORT` | [Imported](import.md) |",
        "3 passed",
    ):
        assert line in done.stdout, done.stdout
