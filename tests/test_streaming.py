"""Banks of more clouds than memory holds: prototypes that are kept up batch after batch, by one process or several."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import AdapterError, PointPEFTConfig, PointPeftModel, bank, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.bank import Harvest, joint_rows
from point_peft.parts.prototypes import prototypes
from point_peft.tuners.point_peft.prior import MemoryBank
from tests.adapting import banks, fingerprint
from tests.zoo import BACKBONES

LIMIT = 200
CLASSES, CLUSTERS = 4, 6


@pytest.fixture(autouse=True)
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "EXACT_ROWS", LIMIT)


def clustered(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows (n, 16) about six directions in each of four classes, and their classes (n,)."""
    centres = nn.functional.normalize(
        torch.randn(CLASSES, CLUSTERS, 16, generator=torch.Generator().manual_seed(9)), dim=2
    )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    middle = centres[labels, torch.randint(CLUSTERS, (count,), generator=generator)]
    return middle + 0.08 * torch.randn(count, 16, generator=generator), labels


def harvested(rows: Tensor, labels: Tensor | None, size: int, batch: int = 32) -> Harvest:
    """What is left of rows that come in batches."""
    harvest = Harvest(size)
    for at in torch.arange(len(rows)).split(batch):
        harvest.take(rows[at], {} if labels is None else {(1,): labels[at]})
    return harvest


def error(rows: Tensor, labels: Tensor, kept: Tensor, classes: Tensor) -> float:
    """The mean distance of rows to the nearest that was kept of their class, all of unit length."""
    unit, kept = nn.functional.normalize(rows, dim=1), nn.functional.normalize(kept, dim=1)
    far = [torch.cdist(unit[labels == label], kept[classes == label]).amin(dim=1) for label in labels.unique()]
    return float(torch.cat(far).mean())


def exact(rows: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The prototypes of all rows at once, with as many of each class, and their classes."""
    return prototypes(rows, labels, size), torch.arange(CLASSES).repeat_interleave(size // CLASSES)


@pytest.mark.parametrize("size", [24, 40])
@pytest.mark.parametrize("order", ["shuffled", "class after class"])
def test_streamed_prototypes_are_nearly_as_good_as_those_of_all_rows(size: int, order: str) -> None:
    rows, labels = clustered(4000)
    if order == "class after class":
        at = labels.argsort(stable=True)
        rows, labels = rows[at], labels[at]
    kept, classes, count, places = harvested(rows, labels, size).rows(None)
    assert classes is not None and (count, places) == (4000, [(1,)])
    assert classes.bincount().tolist() == [size // CLASSES] * CLASSES
    torch.testing.assert_close(kept.norm(dim=1), torch.ones(size))
    best = error(rows, labels, *exact(rows, labels, size))
    assert error(rows, labels, kept, classes) < 1.2 * best
    again, _, _, _ = harvested(rows, labels, size).rows(None)
    assert torch.equal(kept, again)


def test_two_shards_make_one_bank_that_is_as_good() -> None:
    rows, labels = clustered(4000)
    shards = [harvested(rows[rank::2], labels[rank::2], 40) for rank in range(2)]
    for shard in shards:
        shard.condense()
        assert not shard.features and not shard.labels, "rows would be sent to the other processes"
    empty = Harvest(40)
    kept, classes, count, _ = joint_rows([*shards, empty])
    assert classes is not None and count == 4000 and len(kept) == 40
    assert error(rows, labels, kept, classes) < 1.2 * error(rows, labels, *exact(rows, labels, 40))


def test_processes_stream_where_together_they_have_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = clustered(300)
    shards = [harvested(rows[part], labels[part], 40) for part in (slice(0, 150), slice(150, 300))]
    assert [shard.stream for shard in shards] == [None, None]

    def gathered(value: Any, ranks: int | None) -> list[Any]:
        """Each process gives what it has; the other is what the first would be sent."""
        shards[1].condense()
        return [value, shards[1]] if isinstance(value, Harvest) else [value, 150]

    monkeypatch.setattr(bank, "of_all_processes", gathered)
    kept, classes, count, _ = shards[0].rows(2)
    assert len(kept) == 40 and count == 300 and classes is not None


def test_up_to_the_limit_all_rows_are_kept_as_they_are() -> None:
    rows, labels = clustered(LIMIT)
    kept, classes, count, _ = harvested(rows, labels, 40).rows(None)
    order = torch.unique(rows, dim=0, return_inverse=True)[1]
    assert count == LIMIT and classes is not None
    assert torch.equal(kept[order], rows) and torch.equal(classes[order], labels)
    everything, _ = clustered(2 * LIMIT)
    assert len(harvested(everything, None, size=150).rows(None)[0]) == 150
    harvest = Harvest(None)
    for _ in range(3):
        harvest.take(everything, {})
    assert len(harvest.rows(None)[0]) == 2 * LIMIT, "a bank that keeps all rows is not streamed"


# ---- labels ----------------------------------------------------------------------------------------------------------

Labels = Callable[[Tensor], dict[tuple[int | str, ...], Tensor]]


@pytest.mark.parametrize(
    ("early", "late", "places"),
    [
        (lambda y: {(1,): y}, lambda y: {}, []),
        (lambda y: {}, lambda y: {(1,): y}, []),
        (lambda y: {(1,): y, (2,): y}, lambda y: {(1,): y}, [(1,), (2,)]),
        (lambda y: {(1,): y}, lambda y: {(2,): y}, []),
    ],
    ids=["lost", "late", "ambiguous", "moved"],
)
def test_labels_that_are_not_those_of_all_batches_do_not_count(early: Labels, late: Labels, places: list[Any]) -> None:
    rows, labels = clustered(1000)
    harvest = Harvest(40)
    for number, at in enumerate(torch.arange(1000).split(50)):
        harvest.take(rows[at], (early if number < 10 else late)(labels[at]))
    kept, classes, count, found = harvest.rows(None)
    assert classes is None and count == 1000 and found == places and len(kept) == 40
    whole = prototypes(rows, None, 40)
    same = torch.zeros(len(kept), dtype=torch.int64)
    assert error(rows, torch.zeros_like(labels), kept, same) < 1.3 * error(rows, torch.zeros_like(labels), whole, same)


def test_shards_of_other_labels_are_merged_without() -> None:
    rows, labels = clustered(1000)
    first, second = harvested(rows[:500], labels[:500], 40), harvested(rows[500:], None, 40)
    kept, classes, _, places = joint_rows([first, second])
    assert classes is None and places == [] and len(kept) == 40


def test_more_classes_than_rows_and_rows_without_a_direction_are_refused() -> None:
    rows, _ = clustered(400)
    with pytest.raises(AdapterError, match="400 rows cannot be reduced to 40: there are 400 classes"):
        harvested(rows, torch.arange(400), 40).rows(None)
    for value in (0.0, float("nan")):
        spoilt = rows.clone()
        spoilt[300] = value
        with pytest.raises(AdapterError, match="every row of a memory bank must be finite and not zero"):
            harvested(spoilt, None, 40)


# ---- a model ---------------------------------------------------------------------------------------------------------


def held_rows(model: PointPeftModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Say how many of the features that the bank was asked for are in memory."""
    alive: list[weakref.ref[Tensor]] = []
    query = MemoryBank.query

    def spied(self: MemoryBank, tokens: Tensor) -> Tensor:
        found = query(self, tokens)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(MemoryBank, "query", spied)
    return lambda: sum(len(rows) for ref in alive if (rows := ref()) is not None)


def test_a_bank_is_built_of_more_clouds_than_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, peaks = BACKBONES["compact"], []
    monkeypatch.setattr(bank, "EXACT_ROWS", 64)
    torch.manual_seed(0)
    model = get_peft_model(backbone.build(), PointPEFTConfig(memory_bank=True, bank_size=16))
    held = held_rows(model, monkeypatch)

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(20):
            peaks.append(held())
            yield backbone.inputs(16, seed)[0], torch.arange(16) % 4

    model.build_memory_bank(loader())
    gc.collect()
    assert max(peaks) == 64 and max(peaks[5:]) == 32 and held() == 0
    (filled,) = banks(get_adapter(model, "default"))
    first = filled.get_buffer("rows").clone()
    assert first.shape[0] == 16
    model.build_memory_bank(loader())
    assert torch.equal(filled.get_buffer("rows"), first)
    with pytest.warns(UserWarning, match="320 rows of the memory bank were reduced to 16 without labels"):
        model.build_memory_bank(clouds for clouds, _ in loader())
    before = fingerprint(model)
    with pytest.raises(AdapterError, match="320 rows cannot be reduced to 3: there are 4 classes"):
        model.build_memory_bank(loader(), size=3)
    assert fingerprint(model) == before
