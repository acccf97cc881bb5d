"""Memory banks of any size: what retrieval and reduction cost, and how large a file gets."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from point_peft import AdapterError, PointPEFTConfig, PointPeftError, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.files.format import TENSOR_FILE
from point_peft.parts.prototypes import prototypes
from point_peft.running.nested import leaves
from point_peft.tuners.point_peft.prior import MemoryBank
from tests.adapting import PAIRS, adapt, banks, each, full_point_mae, run
from tests.forks import Server
from tests.peak import peak
from tests.zoo import BACKBONES, TinyBackbone


def unit_rows(count: int, channels: int = 24, seed: int = 0) -> Tensor:
    rows = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(rows, dim=1)


# ---- retrieval -------------------------------------------------------------------------------------------------------


def retrieving(file: str) -> Callable[[], None]:
    """MB that a bank of many rows takes, and retrieval from it, which gives the nearest of them all."""

    def work() -> None:
        generator = torch.Generator().manual_seed(0)
        block = nn.functional.normalize(torch.randn(10_000, 384, generator=generator), dim=1).half()
        query = torch.randn(8, 384, generator=generator)
        start = peak()
        bank = MemoryBank(
            384, 8, "backbone", torch.float16, leave_nearest_out=False, standardised=False, temperature=1.0
        ).eval()
        bank.rows = torch.empty(250_000, 384, dtype=torch.float16)
        best = torch.empty(8, 0)
        for number, rows in enumerate(bank.rows.split(10_000)):
            rows.copy_(block.roll(number, dims=1))
            similarity = nn.functional.normalize(query, dim=1) @ rows.float().T
            best = torch.cat([best, similarity.topk(8, dim=1).values], dim=1).topk(8, dim=1).values
        prior = bank.prior(query)
        similarity = torch.einsum("bc,bkc->bk", nn.functional.normalize(query, dim=1), prior[:, 2:])
        torch.testing.assert_close(similarity, best)
        Path(file).write_text(str((peak() - start) * 1024 / 1e6), "utf-8")

    return work


def test_retrieval_among_many_rows_takes_no_copy_of_them(server: Server, tmp_path: Path) -> None:
    """The rows themselves, 192 MB in half precision, and all that retrieval takes beside them, in MB."""
    assert 175 < server.number(retrieving, tmp_path / "growth") < 300


AS_PUBLISHED = PointPEFTConfig.published()
"""Its banks hold the rows as they are given, of unit length."""

# ---- reduction -------------------------------------------------------------------------------------------------------


def bank_of(model: PointPeftModel) -> MemoryBank:
    (bank,) = banks(get_adapter(model, "default"))
    assert isinstance(bank, MemoryBank)
    return bank


def test_a_bank_is_reduced_to_the_size_of_the_configuration() -> None:
    backbone, rows = BACKBONES["point_mae"], 3 * unit_rows(50)
    with pytest.warns(UserWarning, match=r"50 rows of the memory bank were reduced to 20 without labels.*memory_bank="):
        model = get_peft_model(backbone.build(), replace(AS_PUBLISHED, bank_size=20), memory_bank=rows)
    bank = bank_of(model)
    assert torch.equal(bank.rows, prototypes(rows, None, 20).half())
    labels = torch.arange(50) % 5
    bank.fill(rows, labels)
    assert torch.equal(bank.rows, prototypes(rows, labels, 20).half())
    bank.fill(rows, labels, 30)
    assert len(bank.rows) == 30
    bank.fill(rows[:20])
    assert torch.equal(bank.rows, unit_rows(50)[:20].half())
    whole = get_peft_model(backbone.build(), replace(AS_PUBLISHED, bank_size=None), memory_bank=rows)
    assert torch.equal(bank_of(whole).rows, unit_rows(50).half())
    with pytest.raises(AdapterError, match=r"50 rows cannot be reduced to 20: there are 50 classes.*bank_size"):
        bank.fill(rows, torch.arange(50))
    with pytest.raises(PointPeftError, match="bank_size is 0; allowed: 1 or more, or None"):
        PointPEFTConfig(bank_size=0)


def test_building_a_bank_reduces_it_too() -> None:
    backbone = BACKBONES["point_mae"]
    model = get_peft_model(backbone.build(), PointPEFTConfig(memory_bank=True, bank_size=12))
    batches = [backbone.inputs(8, seed)[0] for seed in (1, 2)]
    for size in (None, 14):
        with pytest.warns(UserWarning, match=f"16 rows of the memory bank were reduced to {size or 12} without labels"):
            model.build_memory_bank(batches, size=size)
        assert len(bank_of(model).rows) == (size or 12)


def test_a_file_with_more_rows_is_taken_as_it_is(tmp_path: Path) -> None:
    """Files from before there was a size say nothing of it."""
    backbone = BACKBONES["point_mae"]
    model = get_peft_model(backbone.build(), AS_PUBLISHED, memory_bank=unit_rows(60)).eval()
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    stated = config.read_text()
    assert stated.count('"bank_size": 1800') == 1
    config.write_text(stated.replace('"bank_size": 1800', '"bank_size": 20'))
    again = PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    assert torch.equal(bank_of(again).rows, unit_rows(60).half())
    assert torch.equal(run(again, backbone), run(model, backbone))
    without = "\n".join(line for line in stated.splitlines() if '"bank_size"' not in line)
    config.write_text(without)
    old = PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    assert torch.equal(run(old, backbone), run(model, backbone))


@pytest.mark.parametrize(("options", "rows", "share"), [({"modules_to_save": []}, 0, 0.025), ({}, 11_392, 0.05)])
def test_the_file_of_an_adapter_is_a_small_part_of_the_base_s(
    options: dict[str, Any], rows: int, share: float, tmp_path: Path
) -> None:
    """Without bank and head 2.5 %, with the head and a bank built of 11,392 clouds 5 %."""
    base = full_point_mae().to_empty(device="cpu")
    for tensor in base.state_dict().values():
        tensor.zero_()  # sizes do not depend on values
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = get_peft_model(base, PointPEFTConfig(memory_bank=True, **options))
    if rows:
        bank_of(model).fill(unit_rows(rows, 384), torch.arange(rows) % 15)
    model.save_pretrained(tmp_path)
    assert (tmp_path / TENSOR_FILE).stat().st_size < share * (tmp_path / "base.safetensors").stat().st_size


# ---- labels ----------------------------------------------------------------------------------------------------------

POINTS, LABELS = BACKBONES["point_mae"].inputs(16, 3)[0], torch.arange(16) % 4
NAMES, INDEX = [f"cloud {number}" for number in range(16)], torch.arange(100, 116)


@dataclass
class Sample:
    """A batch as a record: without a first item, so what goes to the model has to be said."""

    points: Tensor
    y: Tensor


FORMS: dict[str, tuple[Callable[[slice], Any], Callable[[Any], Any] | None, Callable[[Any], Any]]] = {
    "taxonomy, id, (points, label)": (
        lambda s: (NAMES[s], NAMES[s], (POINTS[s], LABELS[s])),
        lambda b: b[2][0],
        lambda b: b[2][1],
    ),
    "dict": (lambda s: {"x": POINTS[s], "y": LABELS[s]}, lambda b: b["x"], lambda b: b["y"]),
    "record": (lambda s: Sample(POINTS[s], LABELS[s]), lambda b: b.points, lambda b: b.y),
    "column": (lambda s: [POINTS[s], LABELS[s, None].int()], None, lambda b: b[1]),
    "array": (lambda s: (POINTS[s], LABELS[s]), None, lambda b: b[1].numpy().astype("uint8")),
    "list": (lambda s: (POINTS[s], LABELS[s]), None, lambda b: b[1].tolist()),
    "index before": (lambda s: (POINTS[s], INDEX[s], LABELS[s]), None, lambda b: b[2]),
    "index after": (lambda s: (POINTS[s], LABELS[s], INDEX[s]), None, lambda b: b[1]),
    "also an input": (lambda s: (POINTS[s], LABELS[s], INDEX[s]), lambda b: (b[0],), lambda b: b[1]),
}
"""Batches of some clouds, what gives the model's arguments, and what gives the labels."""
AMBIGUOUS = ("index before", "index after", "also an input")


def labelled(seed: int = 0) -> PointPeftModel:
    torch.manual_seed(seed)
    return get_peft_model(BACKBONES["point_mae"].build(), PointPEFTConfig(memory_bank=True))


def in_three(batch: Callable[[slice], Any]) -> list[Any]:
    """Batches, the last with one cloud, of which any integer may be the label."""
    return [batch(slice(0, 8)), batch(slice(8, 15)), batch(slice(15, 16))]


@pytest.fixture(scope="module")
def balanced() -> Tensor:
    """The bank that the clouds and their labels make."""
    model = labelled()
    model.build_memory_bank([(POINTS, LABELS)], size=8)
    return bank_of(model).rows


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_what_to_labels_gives_wherever_they_lie(form: str, balanced: Tensor) -> None:
    batch, to_inputs, to_labels = FORMS[form]
    model = labelled()
    model.build_memory_bank(in_three(batch), to_inputs=to_inputs, to_labels=to_labels, size=8)
    assert torch.equal(bank_of(model).rows, balanced)


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_guessed_only_where_there_is_one_reading(form: str, balanced: Tensor, of_one_class: Tensor) -> None:
    batch, to_inputs, _ = FORMS[form]
    model = labelled()
    if form in AMBIGUOUS:
        with pytest.warns(UserWarning, match=r"batch\[1\] or batch\[2\]; to_labels=function"):
            model.build_memory_bank(in_three(batch), to_inputs=to_inputs, size=8)
        assert torch.equal(bank_of(model).rows, of_one_class)
    else:
        model.build_memory_bank(in_three(batch), to_inputs=to_inputs, size=8)
        assert torch.equal(bank_of(model).rows, balanced)


@pytest.fixture(scope="module")
def of_one_class() -> Tensor:
    """The bank of the same clouds that labels which are all alike make."""
    model = labelled()
    model.build_memory_bank([POINTS], to_labels=lambda batch: [0] * len(batch), size=8)
    return bank_of(model).rows


UNLABELLED: dict[str, list[Any]] = {
    "tensors": in_three(lambda s: POINTS[s]),
    "floats": in_three(lambda s: (POINTS[s], LABELS[s].float())),
    "masks": in_three(lambda s: (POINTS[s], LABELS[s] > 1)),
    "of points": in_three(lambda s: (POINTS[s], POINTS[s, :, 0].long())),
    "in some batches": [(POINTS[:8], LABELS[:8]), (POINTS[8:],)],
    "in other places": [(POINTS[:8], LABELS[:8]), (POINTS[8:], NAMES[8:], LABELS[8:])],
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_a_warning_says_that_rows_were_reduced_without_labels(name: str, of_one_class: Tensor) -> None:
    model = labelled()
    with pytest.warns(UserWarning, match=r"reduced to 8 without labels.*no tensor of every batch.*to_labels=") as told:
        model.build_memory_bank(UNLABELLED[name], size=8)
    assert [warning.filename for warning in told] == [__file__]
    assert torch.equal(bank_of(model).rows, of_one_class)
    for size in (None, 16, 20):
        model.build_memory_bank(UNLABELLED[name], size=size)
        assert len(bank_of(model).rows) == 16


def counts_clouds(backbone: TinyBackbone) -> bool:
    """Tell whether one of the model's own inputs is an integer a cloud, such as where the clouds end."""
    return any(not t.is_floating_point() and t.shape == (3,) for _, t in leaves(backbone.inputs(3, 1)))


# Packed tokens have no prompts, which a bank is for.
DENSE = [(m, backbone) for m, backbone in PAIRS if m == "POINT_PEFT" and backbone.kind != "packed"]


@each([(method, backbone) for method, backbone in DENSE if counts_clouds(backbone)])
def test_an_input_of_the_model_is_no_label(method: str, backbone: TinyBackbone) -> None:
    """Moved to another device it is another tensor of the same values."""
    model = adapt(backbone, method)
    with pytest.warns(UserWarning, match="12 rows .* reduced to 9 without labels.*no tensor of every batch can be"):
        model.build_memory_bank([backbone.inputs(3, i) for i in range(4)], to_inputs=copy.deepcopy, size=9)


def test_numbers_of_clouds_that_are_the_whole_batch_are_no_labels(of_one_class: Tensor) -> None:
    model = labelled()
    with pytest.warns(UserWarning, match="no tensor of every batch can be theirs"):
        model.build_memory_bank(torch.arange(16).split(5), to_inputs=lambda numbers: POINTS[numbers], size=8)
    assert torch.equal(bank_of(model).rows, of_one_class)


WRONG_LABELS: list[tuple[Any, str]] = [
    (None, "it gave None"),
    (LABELS.float(), r"a Tensor of shape \(16,\) and type torch.float32"),
    (LABELS > 1, r"type torch.bool"),
    (LABELS[:5], r"shape \(5,\)"),
    (LABELS.reshape(4, 4), r"shape \(4, 4\)"),
    (POINTS, r"shape \(16, 96, 3\)"),
    ([0.5] * 16, r"a list of shape \(16,\) and type torch.float32"),
    (NAMES, "a list that is no tensor"),
    ({"y": LABELS}, "a dict that is no tensor"),
    (3, r"a int of shape \(\)"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_LABELS)
def test_what_is_no_label_of_each_cloud_is_refused_and_the_bank_kept(given: Any, message: str) -> None:
    model = labelled()
    before = bank_of(model).rows
    with pytest.raises(AdapterError, match=f"to_labels must give one integer for each of the 16 clouds.*{message}"):
        model.build_memory_bank([POINTS], to_labels=lambda batch: given)
    assert bank_of(model).rows is before


@pytest.mark.parametrize(
    ("batches", "options", "told"),
    [
        ([(POINTS, LABELS)], {}, "batch[1]"),
        ([(NAMES, (POINTS, LABELS))], {"to_inputs": lambda batch: batch[1][0]}, "batch[1][1]"),
        ([{"x": POINTS, "y": LABELS}], {"to_inputs": lambda batch: batch["x"]}, "batch['y']"),
        ([(POINTS, LABELS)], {"to_labels": lambda batch: batch[1]}, "to_labels"),
        ([(POINTS, INDEX, LABELS)], {}, "batch[1] or batch[2]"),
        ([POINTS], {}, "none"),
    ],
)
def test_the_progress_line_says_what_is_taken_for_labels(
    batches: list[Any], options: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    # Tools that some tests call switch the bars of their process off.
    monkeypatch.setattr(import_module("huggingface_hub.utils.tqdm"), "progress_bar_states", {})
    labelled().build_memory_bank(batches, **options)
    assert f"memory bank (labels: {told})" in terminal.getvalue()
