"""The comparison of accuracies: what a difference is worth, which rates are tried, what is done once, the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import jobs
from benchmarks.accuracy.__main__ import ROOT, main, numbers, of_runs
from benchmarks.accuracy.entries import all_entries, entries, entry
from benchmarks.accuracy.frozen import features_of
from benchmarks.accuracy.jobs import Job, Request, run_job
from benchmarks.accuracy.measuring import packed, unpacked
from benchmarks.accuracy.page import BEGIN, END, write
from benchmarks.accuracy.picture import front, legend
from benchmarks.accuracy.pool import work
from benchmarks.accuracy.protocol import Protocol
from benchmarks.accuracy.rates import GRID, best_rate, missing_rates, on_edge
from benchmarks.accuracy.results import Results, collected, difference, restore
from benchmarks.accuracy.sets import Sets, mars_options
from benchmarks.accuracy.statistics import paired_difference, slope
from benchmarks.accuracy.stem import Store
from benchmarks.accuracy.trial import Views
from point_peft import METHODS, LoraConfig, PointPEFTConfig, PointPeftError, TunerConfig, get_peft_model
from point_peft.backbones import PointTransformer
from point_peft.backbones.layers import Encoder
from point_peft.data.cloud import Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.training import Recipe

TINY = """
from point_peft.backbones import PointTransformer
def tiny(cls_dim):
    return PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8,
        cls_dim=cls_dim)
"""


def tiny() -> PointTransformer:
    return PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8, cls_dim=2)


# ---- what a difference is worth --------------------------------------------------------------------------------------


def answered(share: float, seeds: int = 5, clouds: int = 400, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((seeds, clouds)) < share


@pytest.mark.parametrize("same_clouds", [True, False])
def test_a_difference_is_one_only_where_its_interval_excludes_zero(same_clouds: bool) -> None:
    good, poor = answered(0.8), answered(0.7, seed=1)
    found = paired_difference(good, poor, same_clouds=same_clouds)
    assert found.verdict == "better"
    assert found.low < found.mean < found.high
    assert paired_difference(poor, good, same_clouds=same_clouds).verdict == "worse"
    assert paired_difference(good, answered(0.8, seed=2), same_clouds=same_clouds).verdict == ""
    assert paired_difference(good, good, same_clouds=same_clouds) == (0.0, 0.0, 0.0)


def test_the_interval_holds_what_seeds_and_what_clouds_contribute() -> None:
    none = np.zeros((4, 100), bool)
    by_seed = none.copy()
    by_seed[:2] = True  # two seeds are right in everything
    by_cloud = none.copy()
    by_cloud[:, :50] = True  # every seed is right in the same half
    seeds, clouds = paired_difference(by_seed, none), paired_difference(by_cloud, none)
    assert seeds.mean == clouds.mean == 50.0
    assert (seeds.low, seeds.high) == (0.0, 100.0)
    assert 37 < clouds.low < 43
    assert 57 < clouds.high < 63


def test_the_width_is_that_of_the_normal_approximation() -> None:
    right = answered(0.5, seeds=1, clouds=2500)
    found = paired_difference(right, np.zeros_like(right))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 50 / 50, rel=0.06)


def test_answers_are_packed_without_loss() -> None:
    right = answered(0.5, 1, 37)[0]
    assert np.array_equal(unpacked(packed(right), 37), right)


def test_the_slope_compares_the_last_two_quarters() -> None:
    assert slope([0, 0, 0, 0, 1, 3, 5, 7]) == 4.0
    assert slope([1, 2, 3]) is None


def test_the_front_is_what_nothing_cheaper_beats() -> None:
    assert front([(3, 70), (1, 60), (2, 55), (3, 75), (4, 75)]) == [(1, 60), (3, 75)]


def test_the_picture_shows_methods_and_leaves_their_variants_to_the_tables() -> None:
    assert legend(["LORA", "LORA:r=2", "PPT:num_groups=32"]) == {"LORA": "LORA", "PPT:num_groups=32": "PPT"}
    assert legend(["LORA:r=2", "LORA:r=4"]) == {"LORA:r=2": "LORA:r=2", "LORA:r=4": "LORA:r=4"}


# ---- rates -----------------------------------------------------------------------------------------------------------


def rates_tried(accuracy: Callable[[float], float]) -> dict[float, tuple[float, float]]:
    tried: dict[float, tuple[float, float]] = {}
    while missing := missing_rates(tried):
        tried.update({rate: (accuracy(rate), 0.0) for rate in missing})
    return tried


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        (3e-3, GRID, False),
        (1e-2, (*GRID, 3e-2), False),
        (3e-4, (1e-4, *GRID), False),
        (3e-2, (*GRID, 3e-2, 9e-2), False),
        (1.0, (*GRID, 3e-2, 9e-2), True),
        (1e-6, (3e-5, 1e-4, *GRID), True),
    ],
)
def test_the_grid_grows_until_the_best_rate_is_inside(best: float, tried: tuple[float, ...], edge: bool) -> None:
    found = rates_tried(lambda rate: -abs(np.log(rate / best)))
    assert sorted(found) == pytest.approx(sorted(tried))
    assert on_edge(found) == edge


def test_of_equally_accurate_rates_that_of_the_least_loss_is_taken() -> None:
    assert best_rate({1e-3: (80.0, -0.9), 3e-3: (80.0, -0.7), 1e-2: (79.0, -0.1)}) == 3e-3
    assert best_rate({3e-3: (80.0, -0.7), 1e-3: (80.0, -0.7)}) == 1e-3


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_entries_are_methods_with_their_settings() -> None:
    text = "full,LORA:r=2,POINT_PEFT:layers_to_transform=[0,1];memory_bank=false,ADAPTFORMER,retrieval"
    full, lora, late, adaptformer, retrieval = entries(text)
    assert (full.method, full.configs, full.trains) == ("FULL", (), True)
    assert lora.configs[0]["r"] == 2
    assert (late.configs[0]["layers_to_transform"], late.configs[0]["memory_bank"]) == ([0, 1], False)
    assert (adaptformer.label, adaptformer.configs[0]["placement"]) == ("ADAPTFORMER", "adaptformer")
    assert not retrieval.trains
    assert len({one.print for one in [*entries(text), entry("LORA")]}) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LORRA", "no method is called 'lorra'|no method is called 'LORRA'"),
        ("LORA:rank=2", "nearest: "),
        ("FULL:r=2", "FULL has no settings"),
        ("LORA:published", "published stands alone"),
    ],
)
def test_unknown_entries_are_refused(text: str, message: str) -> None:
    with pytest.raises(PointPeftError, match=message):
        entry(text)


def test_every_registered_method_is_an_entry_or_says_why_not() -> None:
    found, refused = all_entries(tiny, small=False)
    assert {one.method for one in found} | set(refused) >= set(METHODS)
    # As published PointTPA is for five stages.
    assert set(refused) == {"INPUT_ADAPTER", "POINT_TPA:published"}
    on_small, _ = all_entries(tiny, small=True)
    assert [one.method for one in on_small] == [one.method for one in found]
    assert {one.method for one in on_small if one not in found} == {"PPT", "POINT_LORA"}


def test_one_person_is_left_out_and_the_next_one_validates() -> None:
    for name, test, val in (("mars", "4", "3"), ("mars-p2", "2", "3"), ("mars-p4", "4", "1")):
        options = mars_options(name)
        assert (list(options.test_groups), list(options.val_groups)) == ([test], [val])
        assert len(options.train_groups) == 2
    assert numbers("0-2,5") == [0, 1, 2, 5]
    assert of_runs(["run", "--out", "x", "--part", "sets", "--hours=2", "--workers", "1", "--seeds", "0"]) == [
        "run",
        "--part",
        "sets",
        "--seeds",
        "0",
    ]
    with pytest.raises(PointPeftError, match="no task is called 'dgits'; nearest: 'digits'"):
        Sets(radhar=Path(), mars=Path()).check("dgits")


# ---- runs ------------------------------------------------------------------------------------------------------------


def request(out: Path, part: str = "sets", **changes: Any) -> Request:
    given = {"tasks": ["digits"], "entries": entries("FULL,RETRIEVAL"), "seeds": [0, 1], "lr": 3e-3}
    return Request(part=part, out=out, **{**given, **changes})


def done(out: Path, job: Job) -> None:
    job.path(out).parent.mkdir(parents=True, exist_ok=True)
    job.path(out).write_text("{}")


def log(out: Path, job: Job) -> Path:
    return job.path(out).with_suffix(".log")


def fails(out: Path, job: Job) -> None:
    if job.entry.method != "RETRIEVAL":
        raise PointPeftError("it was too hot")
    done(out, job)


def test_seeds_are_outermost_and_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    asked = request(tmp_path, tasks=["digits", "mars"])
    order = [(job.seed, job.task, job.entry.label) for job in asked.jobs()]
    assert order == sorted(order)
    done(tmp_path, asked.jobs()[1])
    assert asked.due() == [asked.jobs()[0], *asked.jobs()[2:]]
    kept = asked.jobs()[1].path(tmp_path).stat().st_mtime_ns
    assert work(asked.due, partial(done, tmp_path), partial(log, tmp_path), workers=2, hours=None) == (7, [])
    assert asked.due() == []
    assert asked.jobs()[1].path(tmp_path).stat().st_mtime_ns == kept


def test_a_run_that_fails_leaves_its_log_and_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = request(tmp_path, seeds=[0])
    count, failed = work(asked.due, partial(fails, tmp_path), partial(log, tmp_path), workers=1, hours=None)
    assert (count, [job.entry.label for job in failed]) == (1, ["FULL"])
    assert "PointPeftError: it was too hot" in capsys.readouterr().out
    assert "Traceback" in log(tmp_path, failed[0]).read_text()


def test_no_run_begins_once_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = request(tmp_path)
    assert work(asked.due, partial(done, tmp_path), partial(log, tmp_path), workers=2, hours=0.0) == (0, [])
    assert "4 runs are left" in capsys.readouterr().out


def rate_run(out: Path, lr: float, accuracy: float, text: str = "LORA", task: str = "digits") -> None:
    job = Job(part="rates", task=task, entry=entry(text), seed=0, lr=lr)
    record = {"part": "rates", "task": task, "entry": text, "seed": 0, "lr": lr}
    job.path(out).parent.mkdir(parents=True, exist_ok=True)
    job.path(out).write_text(json.dumps({**record, "validated": accuracy, "validated_loss": 1.0}))


def test_the_rate_is_that_of_validation_or_that_of_the_method_itself(tmp_path: Path) -> None:
    asked = request(tmp_path, entries=entries("LORA,LORA:r=2,RETRIEVAL"), seeds=[0], lr=None)
    with pytest.raises(PointPeftError, match="no learning rate was tried for LORA: "):
        asked.jobs()
    for lr, accuracy in zip(GRID, (60, 70, 80, 75), strict=True):
        rate_run(tmp_path, lr, accuracy)
    assert [job.lr for job in asked.jobs()] == [3e-3, 3e-3, None]
    assert request(tmp_path, "rates", entries=entries("LORA")).due() == []
    rate_run(tmp_path, 1e-2, 90)
    assert [job.lr for job in request(tmp_path, "rates", entries=entries("LORA")).due()] == [3e-2]
    both = request(tmp_path, "rates", entries=entries("LORA"), tasks=["digits", "mars"])
    assert [(job.task, job.lr) for job in both.due()] == [("mars", lr) for lr in GRID]
    for lr, accuracy in zip(GRID, (60, 95, 80, 60), strict=True):
        rate_run(tmp_path, lr, accuracy, task="mars")
    assert both.due() == []
    assert [job.lr for job in asked.jobs()] == [1e-3, 1e-3, None]


def test_a_transfer_needs_the_run_that_it_begins_with(tmp_path: Path) -> None:
    with pytest.raises(PointPeftError, match="begins with the same run of --part sets --tasks radhar"):
        request(tmp_path, "transfer").jobs()


def test_a_folder_has_one_protocol(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    protocol = Protocol(backbone=f"{tmp_path / 'tiny.py'}:tiny")
    protocol.claim(tmp_path / "out")
    protocol.claim(tmp_path / "out")
    with pytest.raises(PointPeftError, match="train_clouds was 320 and is 8"):
        Protocol(backbone=protocol.backbone, train_clouds=8).claim(tmp_path / "out")


def solids(count: int = 16) -> CloudSet:
    """Flat and long clouds of two classes, half of them to train on."""
    splits: list[Split] = ["train", "val", "train", "test"]
    rng = np.random.default_rng(0)
    own = [rng.normal(size=(64, 3)) * ([1, 1, 0.1] if i % 2 else [0.1, 0.1, 1]) for i in range(count)]
    held = [
        Entry(read=partial(Cloud, coordinates=points), source="", label=i % 2, split=splits[i // 2 % 4])
        for i, points in enumerate(own)
    ]
    return CloudSet(entries=tuple(held), task="classification", classes=("long", "flat"))


def test_a_run_from_clouds_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    recipe = Recipe(epochs=4, batch_size=4)
    protocol = Protocol(backbone=f"{tmp_path / 'tiny.py'}:tiny", recipe=recipe, corrupted_clouds=2)
    sets = Sets(radhar=Path(), mars=Path(), _open={"radhar": solids(), "mars": solids()})
    out = tmp_path / "out"
    protocol.claim(out)
    asked = request(out, tasks=["radhar"], entries=entries("FULL,POINT_PEFT,CONVERGED_PROBE,RETRIEVAL"), seeds=[0])
    monkeypatch.setattr("point_peft.training.report._draw", lambda *_: None)
    monkeypatch.setattr("point_peft.training.pictures.curves", lambda *_: b"")
    for job in asked.jobs():
        run_job(job, sets, protocol, out, timed_seed=0)
    full, adapter, probe, retrieval = (json.loads(job.path(out).read_text()) for job in asked.jobs())
    assert len(full["val"]) == len(full["train_loss"]) == 4
    assert full["trainable_without_head"] > adapter["trainable_without_head"] > probe["trainable_without_head"] == 0
    assert full["file_bytes"] > adapter["file_bytes"] > 0
    assert full["seconds_an_epoch"] > 0
    assert probe["trainable"] == 2 * (48 + 1)
    assert all(len(run["corrupted"]["density"]) == 3 for run in (full, adapter, probe, retrieval))
    assert 0 <= full["validated"] <= 100
    monkeypatch.setattr(jobs, "RADARS", ("radhar", "mars"))
    moved = next(job for job in request(out, "transfer", entries=entries("CONVERGED_PROBE"), seeds=[0]).jobs())
    run_job(moved, sets, protocol, out, timed_seed=0)
    kept = next(job for job in asked.jobs() if job.entry.label == "POINT_PEFT")
    transfer = Job(part="transfer", task="radhar-to-mars", entry=kept.entry, seed=0, lr=kept.lr)
    run_job(transfer, sets, protocol, out, timed_seed=0)
    assert main(["page", "--out", str(out), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "accuracy.md").read_text("utf-8")
    assert "| POINT_PEFT | " in text and "## From one radar to the other" in text
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert main(["restore", "--out", str(tmp_path / "again"), "--docs", str(tmp_path)]) == 0
    assert replace(asked, out=tmp_path / "again").due() == []
    assert main(["page", "--out", str(tmp_path / "again"), "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "accuracy.md").read_text("utf-8") == text
    assert main(["restore", "--out", str(out), "--docs", str(tmp_path)]) == 2
    assert "holds runs: name a folder without" in capsys.readouterr().err


def computed(model: torch.nn.Module, points: Tensor, store: Store, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of clouds that the encoder of a served model computes; the answers are those without a store."""
    counted, plain = [], Encoder.forward

    def forward(encoder: Encoder, neighborhood: Tensor) -> Tensor:
        counted.append(len(neighborhood))
        return plain(encoder, neighborhood)

    expected = model(points)
    monkeypatch.setattr(Encoder, "forward", forward)
    with store.serving(model):
        torch.testing.assert_close(model(points), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    return sum(counted)


def test_a_frozen_stem_sees_a_cloud_once_and_one_that_is_trained_or_adapted_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = torch.randn(5, 64, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    base = tiny().eval()
    state = base.state_dict()

    def adapted(config: TunerConfig) -> torch.nn.Module:
        own = tiny().eval()
        own.load_state_dict(state)
        return get_peft_model(own, config).eval()

    store = Store.read(tmp_path / "stem.pt")
    assert computed(adapted(LoraConfig()), points[:3], store, monkeypatch) == 3
    store.write()
    again = Store.read(tmp_path / "stem.pt")
    assert computed(adapted(PointPEFTConfig(memory_bank=False)), points, again, monkeypatch) == 2
    assert computed(base, points, again, monkeypatch) == 5
    inner = adapted(LoraConfig(target_modules="encoder.first_conv.3"))
    assert computed(inner, points, again, monkeypatch) == 5


def test_training_goes_round_the_views_and_everything_else_sees_the_clouds_as_they_are() -> None:
    clouds, model = solids(), tiny().eval()
    views = Views(clouds, model, ("scale_translate",), views=2, seed=0)
    assert torch.equal(views[1].points, clouds[1].points)
    model.train()
    first, second, third = (views[1].points for _ in range(3))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    assert not torch.equal(first, clouds[1].points)
    other = Views(clouds, model, ("scale_translate",), views=2, seed=1)
    assert not torch.equal(other[1].points, first)


# ---- the page --------------------------------------------------------------------------------------------------------


def results() -> Results:
    runs = [
        {
            **{"part": part, "task": task, "entry": name, "seed": seed, "lr": 1e-3, "clouds": [32, 8, 200]},
            **{"accuracy": 100 * float(right.mean()), "ece": 3.0},
            **{"right": packed(right), "count": 200, "trainable": 10, "trainable_without_head": 5},
            **{"seconds_an_epoch": 2.0 - place, "slope": 0.5, "file_bytes": 10**6},
        }
        for part, task in (("sets", "digits"), ("people", "mars-p1"), ("few_shot", "digits-5x10"))
        for place, (name, share) in enumerate({"FULL": 0.5, "POINT_PEFT": 0.9}.items())
        for seed in range(3)
        for right in [answered(share, 1, 200, seed)[0]]
    ]
    rates = [{"task": "digits", "entry": "FULL", "tried": {"0.001": [70.0, -1.0], "0.003": [60.0, -1.0]}}]
    recipe = Recipe().to_json()
    protocol = {
        **{"recipe": recipe, "train_clouds": 32, "val_clouds": 8, "test_clouds": 200, "groups": None, "views": 5},
        **{"curve_clouds": 4, "rate_epochs": None},
    }
    about = {"protocol": {**protocol, "backbone": "tiny", "weights": "abc"}, "commands": ["python -m it"]}
    return Results(about=about, runs=runs, rates=rates)


def test_the_page_keeps_what_stands_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.accuracy.page.draw", lambda *_: None)
    found = results()
    path = write(found, tmp_path)
    path.write_text(
        path.read_text("utf-8").replace("(Five", "Take this. (Five") + "\nAnd a word at the end.\n", "utf-8"
    )
    first = path.read_text("utf-8")
    write(Results.read(tmp_path / "accuracy.json"), tmp_path)
    assert path.read_text("utf-8") == first
    assert "Take this." in first and first.endswith("And a word at the end.\n")
    gain = difference(found.of("sets", "digits")["POINT_PEFT"], found.of("sets", "digits")["FULL"])
    assert gain is not None and f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}] better" in first
    assert "**0.001: 70.0**, 0.003: 60.0 !" in first
    assert "python -m it" in first and "0.50" in first
    path.write_text("no marks", "utf-8")
    with pytest.raises(PointPeftError, match="each once"):
        write(found, tmp_path)
    assert BEGIN in first and END in first


def test_runs_of_other_defaults_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "protocol.json").write_text("{}")
    rate_run(tmp_path, 1e-3, 70.0)
    stale = tmp_path / "runs" / "rates" / "digits" / "LORA-00000000" / "seed0-lr0.001.json"
    stale.parent.mkdir(parents=True)
    stale.write_text(json.dumps({"part": "rates", "task": "digits", "entry": "LORA"}))
    found, left_out = collected(tmp_path)
    assert (len(found.rates), left_out) == (1, 1)


def test_a_restored_run_of_other_defaults_is_left_out(tmp_path: Path) -> None:
    rate_run(tmp_path / "old", 1e-3, 70.0)
    rate_run(tmp_path / "old", 1e-3, 75.0, text="SSF")
    (tmp_path / "old" / "protocol.json").write_text("{}")
    found, _ = collected(tmp_path / "old")
    found.about["prints"]["SSF"] = "SSF-00000000"
    assert restore(found, tmp_path / "new") == 2
    again, left_out = collected(tmp_path / "new")
    assert (again.rates, left_out) == ([one for one in found.rates if one["entry"] == "LORA"], 1)


def test_the_frozen_features_are_what_the_head_reads() -> None:
    model, clouds = tiny().eval(), solids()
    values, labels = features_of(model, "cls_head_finetune", clouds)
    points: Tensor = torch.stack([clouds[index].points for index in range(3)])
    with torch.no_grad():
        tokens = model.forward_features(points)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], dim=1)
    assert np.allclose(values[:3], expected.numpy(), atol=1e-5)
    assert labels[:4].tolist() == [0, 1, 0, 1]


def test_the_record_beside_the_page_is_of_what_its_labels_mean_today() -> None:
    """A default that moves on makes other adapters of an old label: its runs then are no runs of it any more."""
    prints = Results.read(ROOT / "docs" / "accuracy.json").about["prints"]
    assert prints == {label: entry(label).print for label in prints}
