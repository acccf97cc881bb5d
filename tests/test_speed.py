"""The benchmark of speed runs, and what it writes is complete and says the same everywhere. No time is judged here."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from benchmarks import against, page, sections, speed, worker
from benchmarks.bases import QUICK_PUBLISHED
from benchmarks.beside_peft import libraries
from benchmarks.clock import take_turns
from benchmarks.memory import peak_bytes
from benchmarks.results import Measure, Results, Series, Spread
from benchmarks.scene_steps import QUICK_SCENE
from benchmarks.tables import CHAPTERS, HEADLINE, PAPER, loaded
from point_peft import METHODS
from tests.zoo import pointcept
from tools import methods
from tools.methods import FULL, PLAIN

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TABLES = {table.name: table for chapter in CHAPTERS for table in chapter.tables}


# --- what is written ---


def test_a_whole_run_writes_everything_and_says_the_same_everywhere(tmp_path: Path):
    """One test, because two workers would each run the benchmark; of the methods, Point-PEFT and one that merges."""
    folder = tmp_path / "new"
    QUICK_PUBLISHED.make()
    libraries()
    gc.collect()
    gc.freeze()  # also what these have imported, as tests/conftest.py does: every measure of memory collects
    given = ["--quick", "--rounds", "1", "--device", "cpu", "--methods", "POINT_PEFT", "BITFIT", "--out", str(folder)]
    assert speed.main(given) == 0
    results, text = Results.read(folder / "speed.json"), (folder / "speed.md").read_text(encoding="utf-8")
    _check_every_row_has_its_numbers(results, {"POINT_PEFT", PAPER.label}, {"BITFIT"})
    for name in ("scene training", "scene memory"):
        beside = {measure.subject: bool(series.reference) for measure, series in results.of(name).items()}
        assert beside == {"BITFIT": True, "LORA": False, "POINT_PEFT": True, FULL: True}
    assert {measure.table for measure in results.values} == set(TABLES), "a table is measured and not shown, or not"
    assert page.NOT_MEASURED not in text
    assert text == page.page(results, "speed.png")
    assert (folder / "speed.json").read_text(encoding="utf-8") == results.to_json()
    for measure, series in results.values.items():
        assert f"| {measure.subject} | " in text and len(series.values) == len(series.reference or series.values)
    assert "--quick --rounds 1" in results.about["command"] and torch.__version__ in results.about["versions"]
    picture = imread(folder / "speed.png")
    assert picture.shape[0] > 500 and picture.std() > 0.05


def _check_every_row_has_its_numbers(results: Results, headline: set[str], further: set[str]) -> None:
    for name, base, expected in (
        ("training", FULL, headline | further),
        ("inference", PLAIN, headline | further),
        ("memory", FULL, headline | further),
        ("published training", FULL, headline),
        ("published inference", PLAIN, headline),
        ("published memory", FULL, headline),
    ):
        subjects = {measure.subject: series for measure, series in results.of(name).items()}
        assert set(subjects) == {base, *expected}, name
        assert all(value > 0 for series in subjects.values() for value in series.values)
        assert [subject for subject, series in subjects.items() if not series.reference] == [base]


def test_every_registered_method_is_measured():
    """All their rows; a quick run is content with one row a method, and both of Point-PEFT."""
    every, quick = (speed.chosen(speed.parsed(given)) for given in ([], ["--quick"]))
    assert {row.label for row in (*every.headline, *every.further)} == {row.label for row in methods.rows_of()}
    labels = [row.label for row in (*quick.headline, *quick.further)]
    assert {label.split()[0] for label in labels} == set(METHODS) and len(labels) == len(METHODS) + 1
    assert PAPER.label in labels


def test_every_method_that_adapts_scenes_is_measured_on_them():
    """Those that put tokens among others are not; the model's constants are as before afterwards."""
    patch = pointcept.PATCH
    with QUICK_SCENE.open():
        found = {row.method for row in QUICK_SCENE.rows(set(METHODS))}
    assert patch == pointcept.PATCH
    assert {"LORA", "POINT_GST", "GEM", "STAG", "SSF", "BOTTLENECK", "POINT_PEFT"} <= found
    assert not {"VPT", "DAPT", "IDPT"} & found


def test_every_aim_is_about_a_row_that_there_is():
    """Of sizes, a quick run has others."""
    rows = {row.label for row in methods.rows_of()}
    for name in ("published training", "published inference", "training", "inference", "memory"):
        assert set(TABLES[name].aims) <= rows
    assert all(row in methods.rows_of() for row in HEADLINE)
    assert set(TABLES["adapters"].aims) <= {loaded(count) for count in sections.FULL_SETTING.keywords["adapters"]}
    assert all(not table.aims or table.reference for table in TABLES.values())


def test_an_aim_is_met_where_the_whole_range_is():
    of = Measure(table="training", subject="POINT_PEFT")
    for values, met in (([0.5, 0.55, 0.6], "yes"), ([0.5, 0.55, 0.9], "no"), ([0.61], "no")):
        results = Results(about={"command": "x"}, values={of: Series(values=values, reference=[1.0] * len(values))})
        assert f"| at most 0.6 | {met} |" in page.page(results, "x.png")
    assert "Aims that are met: 0 of 1. Not met: POINT_PEFT (training)." in page.page(results, "x.png")


def test_a_ratio_is_that_of_each_round():
    series = Series(values=[1.0, 4.0, 9.0, 9.0], reference=[2.0, 4.0, 3.0, 3.0])
    assert series.ratios == [0.5, 1.0, 3.0, 3.0]
    assert Spread.of(series.ratios) == Spread(low=0.875, middle=2.0, high=3.0)
    assert page.ratio_of(series) == "2.00 [0.88, 3.00]"
    assert page.spelled(Spread.of([0.0123]), "s") == "12.3 ms"
    assert page.spelled(Spread.of([1.2e6, 1.4e6, 1.9e6]), "bytes") == "1.40 [1.30, 1.65] MB"


# --- two checkouts ---


def test_two_checkouts_take_turns(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """This one beside itself, without a module that the published class needs: with the other backbone alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in tests/conftest.py
    given = ["--against", str(ROOT), "--quick", "--rounds", "1", "--hide", "torch_geometric"]
    assert speed.main(given) == 0
    lines = [line.strip("| ").split(" | ") for line in capfd.readouterr().out.splitlines()[2:]]
    assert {line[0].split(":")[0] for line in lines} == {"reference training", "reference inference"}
    for line in lines:
        assert len(line) == 6 and all(float(ratio) > 0 for ratio in line[3:])


def test_a_worker_has_both_backbones_with_every_subject():
    runs = worker.subjects(batch=2, points=64, depth=2, groups=8)
    assert [name.split(": ")[0] for name in runs] == 4 * ["published training", "published inference"] + 4 * [
        "reference training", "reference inference",
    ]  # fmt: skip
    assert all(run() > 0 for run in runs.values())


def test_a_worker_that_fails_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with (
        pytest.raises(RuntimeError, match="a worker ended with status 1"),
        against.working(tmp_path, {"batch": 2}, ["torch"]),
    ):
        pass
    assert "import of torch halted" in capfd.readouterr().err


# --- how it is measured ---


def test_all_take_turns_and_the_first_round_does_not_count():
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    took = take_turns({name: partial(run, name) for name in "ab"}, 2)
    assert order == ["a", "b"] * 3 and took == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_the_peak_of_memory_is_what_lives_at_once():
    """Memory that was taken before does not count, tensors that a backward needs do."""
    mega = 250_000  # floats of a megabyte
    kept = torch.zeros(mega)
    network = nn.Sequential(nn.Flatten(0), nn.Linear(1, 1))

    def one_after_another() -> None:
        for _ in range(3):
            torch.zeros(5 * mega)

    def at_once() -> list[Tensor]:
        return [torch.zeros(5 * mega) for _ in range(3)]

    def with_gradient() -> None:
        x = torch.zeros(mega, requires_grad=True)
        torch.autograd.backward(((x + kept).square() * 2).sum())

    assert peak_bytes(one_after_another, CPU) == 5e6
    assert peak_bytes(at_once, CPU) == 15e6
    assert 3e6 <= peak_bytes(with_gradient, CPU) < 7e6
    assert peak_bytes(lambda: network(torch.zeros(1)), CPU) < 1000


# --- options ---


def test_options_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for options, reason in (
        (["--write", "--quick"], "--write is for all of it"),
        (["--write", "--sections", "files"], "--write is for all of it"),
        (["--write", "--out", str(tmp_path)], "not allowed with"),
        (["--rounds", "0"], "--rounds is 1 or more"),
        (["--sections", "nothing"], "invalid choice"),
        (["--against", str(tmp_path)], "no package point_peft in"),
    ):
        with pytest.raises(SystemExit):
            speed.main(options)
        assert reason in capsys.readouterr().err


def test_what_is_left_out_is_said_to_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sections, "libraries", list)
    monkeypatch.setattr(sections, "torch_pointcloud_is_there", bool)
    given = ["--quick", "--rounds", "1", "--device", "cpu", "--methods", "LORA"]
    speed.main([*given, "--sections", "files", "peft", "published"])
    printed = capsys.readouterr()
    assert "pip install peft" in printed.err and "pip install torch-pointcloud" in printed.err
    assert printed.out.count(page.NOT_MEASURED) == len(TABLES) - 1
    assert "| LORA qkv |" in printed.out and "| BITFIT |" not in printed.out
