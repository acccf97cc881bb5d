"""The benchmark of speed runs, and what it writes is complete and says the same everywhere. No time is judged here."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from benchmarks import page, sections, speed
from benchmarks.as_published import as_published
from benchmarks.clock import take_turns
from benchmarks.memory import peak_bytes
from benchmarks.results import Measure, Results
from benchmarks.sections import (
    PEAK,
    PUBLISHED_FULL,
    PUBLISHED_PLAIN,
    SCALES,
    SECTIONS,
    STEM,
    WITHOUT_BANK,
    head_bytes,
)
from benchmarks.targets import TARGETS
from point_peft import METHODS, PeftConfig, get_peft_model
from point_peft.files.format import TENSOR_FILE
from tools import methods
from tools.methods import FULL, INFERENCE, PLAIN, TRAINING

CPU = torch.device("cpu")


def rows_of_page(folder: Path, title: str) -> list[list[str]]:
    """The cells of all tables under a title."""
    text = (folder / "speed.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


# --- what is written ---


def test_a_whole_run_writes_everything_and_says_the_same_everywhere(tmp_path: Path):
    """One test, because two workers would each run the benchmark."""
    folder = tmp_path / "new"
    assert speed.main(["--quick", "--rounds", "1", "--device", "cpu", "--out", str(folder)]) == 0
    results = Results.read(folder / "speed.json")
    _check_every_registered_method_has_its_numbers(results)
    _check_every_section_is_measured_and_shown(folder, results)
    _check_file_and_page_say_the_same(folder, results)
    _check_every_target_is_about_something_that_is_measured(results)


def _check_every_registered_method_has_its_numbers(results: Results) -> None:
    rows = methods.rows_of()
    first = {row.method: row.label for row in reversed(rows)}  # a quick run is content with one row a method
    labels = [row.label for row in rows if row.label in (*first.values(), STEM.label)]
    assert {label.split()[0] for label in labels} == set(METHODS)
    for section, quantity, references in (
        ("methods", TRAINING, [PUBLISHED_FULL, FULL]),
        ("methods", INFERENCE, [PUBLISHED_PLAIN, PLAIN, FULL]),
        ("memory", PEAK, [PUBLISHED_FULL, FULL]),
        ("files", WITHOUT_BANK, []),
    ):
        found = results.medians(section, quantity)
        assert [measure.subject for measure in found] == [*references, *labels]
        assert all(value > 0 for value in found.values())


def _check_every_section_is_measured_and_shown(folder: Path, results: Results) -> None:
    assert {measure.section for measure in results.values} == {*SECTIONS, *SCALES} - {"scale"}
    assert page.NOT_MEASURED not in (folder / "speed.md").read_text(encoding="utf-8")
    for title, *_ in page.PARTS:
        assert len(rows_of_page(folder, title)) > 2
    picture = imread(folder / "speed.png")
    assert picture.shape[0] > 500 and picture.std() > 0.05


def _check_file_and_page_say_the_same(folder: Path, results: Results) -> None:
    assert (folder / "speed.md").read_text(encoding="utf-8") == page.page(results, "speed.png")
    assert (folder / "speed.json").read_text(encoding="utf-8") == results.to_json()
    for series in json.loads((folder / "speed.json").read_text(encoding="utf-8"))["series"]:
        assert series["median"] == median(series["values"])
    cells = {row[0]: row[1:] for row in rows_of_page(folder, "Methods")}
    for label in results.subjects("methods"):
        for quantity, reference, column in ((TRAINING, FULL, 1), (INFERENCE, PLAIN, 3)):
            value, by = (results.median("methods", name, quantity) for name in (label, reference))
            assert by is not None
            assert cells[label][column] == ("-" if value is None else f"{value / by:.2f}")
    assert "--quick --rounds 1" in results.about["command"] and torch.__version__ in results.about["versions"]


def _check_every_target_is_about_something_that_is_measured(results: Results) -> None:
    """Of sizes, the quick run has others."""
    known = {(m.section, m.subject, m.quantity) for m in results.values}
    for target in TARGETS:
        assert {place[:3] for place in (target.of, target.by) if place is not None} <= known


# --- the targets ---


def test_a_target_is_met_or_not_as_the_numbers_say():
    first, *_, last = TARGETS
    of, by = (Measure(section="point_peft", subject=subject, quantity=TRAINING) for subject in ("POINT_PEFT", FULL))
    for value, met in ((0.7, "yes"), (0.71, "no")):
        results = Results(about={"command": "x"}, values={of: [value, 9.0, 0.0], by: [1.0]})
        assert f"| {first.text} | at most 0.70 | {value:.2f} | {met} |" in page.page(results, "x.png")
    assert first.measured(Results(about={}, values={of: [1.0]})) is None
    swap = next(target for target in TARGETS if target.bound == "at least")
    assert swap.met(swap.limit) and not swap.met(0.9 * swap.limit)
    rows = Measure(section="bank rows", subject="MemoryBank", quantity=last.of[2], at=last.of[3], unit="bytes")
    assert last.measured(Results(about={}, values={rows: [9e8]})) == pytest.approx(0.9)


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


def test_the_published_form_computes_the_same_and_in_its_own_way():
    torch.manual_seed(0)
    ours = methods.QUICK.make()
    torch.manual_seed(1)
    published = as_published(methods.QUICK.make)
    published.load_state_dict(ours.state_dict())
    # In float32 a maximum of two nearly equal features may be the other one: its gradient then goes elsewhere.
    clouds, labels = methods.QUICK.clouds(4).double(), torch.arange(4)
    ours, published = ours.double(), published.double()
    for training in (False, True):
        found = []
        for model in (ours.train(training), published.train(training)):
            torch.manual_seed(2)
            logits = model(clouds)
            torch.autograd.backward(nn.functional.cross_entropy(logits, labels))
            found.append({"logits": logits} | {name: p.grad for name, p in model.named_parameters()})
            model.zero_grad()
        torch.testing.assert_close(found[1], found[0])
    widths: list[int] = []
    published.encoder.second_conv[0].register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    published(clouds)
    assert widths == [512]  # the maximum beside each point, which ours never puts together


def test_a_file_without_its_head_is_as_large_as_one_that_has_none(tmp_path: Path):
    row = methods.rows_of(["LORA"])[0]
    model = methods.adapted(row, methods.QUICK.make())
    model.save_pretrained(tmp_path / "with")
    alone = get_peft_model(methods.QUICK.make(), PeftConfig(tuners=(row.config,), modules_to_save=()))
    alone.save_pretrained(tmp_path / "without")
    size, without = ((tmp_path / name / TENSOR_FILE).stat().st_size for name in ("with", "without"))
    assert 0 <= size - head_bytes(model) - without < 5000  # what is said of the head's tensors


# --- options ---


def test_options_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for options, reason in (
        (["--write", "--quick"], "--write is for all of it"),
        (["--write", "--sections", "files"], "--write is for all of it"),
        (["--write", "--out", str(tmp_path)], "not allowed with"),
        (["--rounds", "0"], "--rounds is 1 or more"),
        (["--sections", "nothing"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            speed.main(options)
        assert reason in capsys.readouterr().err


def test_what_is_left_out_is_said_to_be(capsys: pytest.CaptureFixture[str]):
    speed.main(["--quick", "--rounds", "1", "--device", "cpu", "--sections", "files", "--methods", "LORA"])
    text = capsys.readouterr().out
    assert text.count(page.NOT_MEASURED) == len(page.PARTS) - 2  # all but the targets and the files
    assert "| LORA qkv |" in text and "| BITFIT |" not in text and "| not measured |" in text


def test_without_peft_its_section_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sections, "libraries", list)
    speed.main(["--quick", "--rounds", "1", "--device", "cpu", "--sections", "peft", "--methods", "LORA"])
    printed = capsys.readouterr()
    assert "pip install peft" in printed.err
    assert printed.out.count(page.NOT_MEASURED) == len(page.PARTS) - 1
