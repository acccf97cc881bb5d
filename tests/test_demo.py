"""The page to try adapters, without a browser: what it answers, what it is told, what it says of bad files."""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from point_peft import LoraConfig, PointPeftModel, get_peft_model
from point_peft.backbones import PointTransformer, default_backbone
from point_peft.cli import main
from point_peft.data.reading import read_cloud
from point_peft.demo import board as boards
from point_peft.demo import command, figure, markup, nearest, picture, shown, task, views
from point_peft.demo.answer import Answer
from point_peft.demo.board import SAMPLES, SHIPPED, Answers, Board, opened_board, sample_files
from point_peft.demo.handling import NOTHING, Handling, facing
from point_peft.demo.recorder import recording
from point_peft.demo.task import unused_name
from point_peft.errors import AdapterFileError, DataError
from point_peft.training.opening import open_run


@pytest.fixture(scope="module")
def board() -> Board:
    return opened_board([])


@pytest.fixture
def handling(board: Board, tmp_path: Path) -> Handling:
    return Handling(board, sample_files(), tmp_path)


@pytest.fixture(scope="module")
def answers(board: Board) -> dict[str, Answers]:
    """The first sample of each adapter that is shipped."""
    files = sample_files()
    return {name: board.answers(next(p for n, p in files.items() if n.startswith(name))) for name in board.names}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's files alone, of another method, with a head for four classes."""
    torch.manual_seed(0)
    model = get_peft_model(
        default_backbone(cls_dim=2), LoraConfig(r=2), heads={"cls_head_finetune": torch.nn.Linear(288, 4)}
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapters") / "four"
    model.save_pretrained(folder)
    return folder


def of(found: Answers, name: str) -> Answer:
    """The answer of a task, which gives one."""
    answer = found.of[name]
    assert isinstance(answer, Answer)
    return answer


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_adapters_of_one_backbone_are_in_one_model(board: Board) -> None:
    radar, digits, ground = board.tasks
    assert board.names == ["radar", "digits", "ground"]
    assert digits.model is radar.model and ground.model is not digits.model
    assert isinstance(digits.model, PointPeftModel) and set(digits.model.adapters) == {"default", "digits"}
    assert digits.has_bank and radar.has_bank and not ground.has_bank and ground.segmentation


def test_an_answer_is_compared_with_the_labels_of_a_file(board: Board, tmp_path: Path) -> None:
    cloud = read_cloud(SAMPLES / "ground_1.laz")
    numbers = open_run(SHIPPED / "ground").predictor.segment(cloud, "a", 32.0)
    codes = np.where(numbers == 1, 2, 1)  # as LAS has them: 2 is ground
    codes[: len(codes) // 4] = 3 - codes[: len(codes) // 4]
    codes[-len(codes) // 4 :] = 0  # of no class
    np.savez(tmp_path / "a.npz", points=cloud.coordinates, labels=codes)
    agreement = of(board.answers(tmp_path / "a.npz"), "ground").agreement
    assert agreement == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize("name", ["digits", "radar"])
def test_an_answer_is_that_of_predict(answers: dict[str, Answers], name: str) -> None:
    found = answers[name]
    assert [name] == [task for task in found.of if found.shown.path.stem.startswith(task)]
    expected = open_run(SHIPPED / name).predictor.classify([read_cloud(found.shown.path)])[0].cpu()
    torch.testing.assert_close(of(found, name).shares, expected)
    # The samples of these two are named after their class.
    assert found.shown.path.stem == f"{name}_{of(found, name).task.classes[of(found, name).best]}"


def test_the_labels_of_points_are_those_of_predict(answers: dict[str, Answers]) -> None:
    found, run = answers["ground"], open_run(SHIPPED / "ground")
    cloud = read_cloud(found.shown.path)
    answer = of(found, "ground")
    expected = run.predictor.segment(cloud, found.shown.name, run.options.tile)
    assert answer.labels is not None
    rows = np.flatnonzero(expected >= 0)
    assert np.array_equal(answer.labels, expected[rows]) and np.array_equal(answer.points, cloud.coordinates[rows])
    assert answer.agreement is None, "the sample has no labels"
    assert float(answer.shares.sum()) == pytest.approx(1) and 0.5 <= answer.sure <= 1


def test_every_task_answers_every_cloud(answers: dict[str, Answers]) -> None:
    for found in answers.values():
        assert list(found.of) == ["radar", "digits", "ground"] and found.swap is not None
        for answer in (
            of(found, name) for name in found.of if name != "radar" or not found.shown.name.startswith("ground")
        ):
            assert answer.attention is not None and answer.neighbourhood is not None
            m = len(answer.points)
            assert len(answer.attention) == len(answer.neighbourhood) == m
            assert answer.attention.min() > 0 and answer.attention.max() < 1 and np.ptp(answer.attention) > 0
            assert len(np.unique(answer.neighbourhood)) > 1 and answer.seconds > 0


def test_answers_are_found_once(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(iter(sample_files().values()))
    first = board.answers(path)
    monkeypatch.setattr(boards, "answer_cloud", lambda *_: pytest.fail("they were found again"))
    assert board.answers(path) is first


def test_neighbourhoods_are_those_of_the_nearest_centre(answers: dict[str, Answers]) -> None:
    answer = of(answers["digits"], "digits")
    assert answer.neighbourhood is not None and len(np.unique(answer.neighbourhood)) == 32
    for token in range(0, 32, 7):
        own = answer.points[answer.neighbourhood == token]
        others = answer.points[answer.neighbourhood != token]
        middle = own.mean(axis=0)
        spread = np.linalg.norm(own - middle, axis=1).mean()
        assert spread < 0.5 * np.linalg.norm(others - middle, axis=1).mean()


def test_attention_to_prompts_is_that_of_the_softmax(board: Board) -> None:
    task = board.tasks[0]
    assert isinstance(task.model, PointPeftModel)
    inner: dict[str, torch.Tensor] = {}
    # Of six blocks the last three are adapted, the first of these with prompts.
    qkv = task.model.base_model.get_submodule("blocks.blocks.3.attn.qkv")
    handle = qkv.register_forward_hook(lambda module, args, output: inner.update(qkv=output))
    points = torch.rand(2, 256, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    with recording(task.model) as notes, task.model.use_adapter("default"):
        task.model(points)
    handle.remove()
    q, k, _ = inner["qkv"].chunk(3, dim=2)
    q, k = (part.reshape(2, -1, 6, 24).transpose(1, 2) for part in (q, k))
    weights = (q @ k.transpose(2, 3) / 24**0.5).softmax(dim=3)
    prompts = q.shape[2] - 33  # one prefix token, 32 patches
    expected = weights[:, :, 1 + prompts :, 1 : 1 + prompts].sum(dim=3).mean(dim=1)
    seen = notes["default"]
    assert prompts == 10 and (seen.block, seen.stage) == (3, 0) and seen.attention is not None
    torch.testing.assert_close(seen.attention, expected)


def test_a_model_is_not_changed_by_being_watched(board: Board) -> None:
    task = board.tasks[0]
    points = torch.rand(1, 256, 3, generator=torch.Generator().manual_seed(1))
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in task.model.modules()]
    with torch.no_grad():
        before = task.model(points)
        with recording(task.model) as notes:
            watched = task.model(points)
    assert torch.equal(before, watched) and len(notes) == 1
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in task.model.modules()]


def test_a_plain_model_has_centres_and_no_prompts() -> None:
    model = PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8).eval()
    with recording(model) as notes:
        model(torch.rand(2, 64, 3))
    assert list(notes) == [None] and notes[None].attention is None and notes[None].centres[0].shape == (2, 8, 3)


# ---- the bank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "radar"])
def test_the_nearest_rows_are_those_of_the_prior(board: Board, answers: dict[str, Answers], name: str) -> None:
    answer = of(answers[name], name)
    task, held = answer.task, answer.task.held
    assert held is not None and task.adapter is not None and len(answer.near) == nearest.SHOWN_ROWS
    bank: Any = nearest.bank_in_forward(held, task.adapter)
    sample, _ = task.predictor.sample(read_cloud(answers[name].shown.path), 0)
    priors: list[torch.Tensor] = []
    own = bank.prior

    def prior(query: torch.Tensor) -> torch.Tensor:
        priors.append(own(query))
        return priors[0]

    bank.prior = prior
    try:
        with torch.no_grad(), held.use_adapter(task.adapter):
            held(sample.points[None])
    finally:
        del bank.prior
    retrieved = priors[0][0, 2:]
    rows = bank.rows[[near.row for near in answer.near]].float()
    assert torch.equal(retrieved, rows)
    likeness = torch.tensor([near.likeness for near in answer.near])
    torch.testing.assert_close(likeness, rows @ priors[0][0, 0], atol=1e-4, rtol=0)
    assert task.clouds is not None and len(task.clouds.points) == len(bank.rows) == len(task.clouds.labels)


def test_bank_clouds_that_are_none_are_told(tmp_path: Path) -> None:
    assert nearest.read_bank_clouds(tmp_path) is None
    np.savez(tmp_path / nearest.BANK_CLOUDS_FILE, points=np.zeros((2, 3)))
    with pytest.raises(DataError, match="holds no points and labels of training clouds"):
        nearest.read_bank_clouds(tmp_path)
    np.savez(tmp_path / nearest.BANK_CLOUDS_FILE, points=np.zeros((2, 3)), labels=np.zeros(2))
    with pytest.raises(DataError, match=re.escape("points must be (rows, n, 3)")):
        nearest.read_bank_clouds(tmp_path)


# ---- adapters of the user's ------------------------------------------------------------------------------------------


def test_an_adapter_alone_joins_the_backbone(lora: Path, tmp_path: Path) -> None:
    own = opened_board([str(lora)])
    task = own.tasks[-1]
    assert task.name == "four" and task.model is own.tasks[0].model
    assert task.classes == ("class 0", "class 1", "class 2", "class 3") and "1024 points" in task.said
    path = next(iter(sample_files().values()))
    found = of(own.answers(path), "four")
    sample, _ = task.predictor.sample(read_cloud(path), 0)
    model = PointPeftModel.from_pretrained(default_backbone(cls_dim=2), lora).eval()
    with torch.no_grad():
        expected = model(sample.points[None]).softmax(dim=1)[0]
    torch.testing.assert_close(found.shares, expected)
    assert found.attention is None and not found.near
    assert "four has no prompts" in text_of(views.view_of(found, "attention").caption)
    assert "class 0" in text_of(markup.answer_panels(own.answers(path), "a", "four"))


def test_an_adapter_of_the_hub_is_downloaded(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | Path] = []
    monkeypatch.setattr(task, "folder_of", lambda source, place: asked.append(source) or lora)  # type: ignore[func-returns-value]
    loaded = Board().add("alice/scans")
    assert asked == ["alice/scans"] and loaded.name == "scans" and len(loaded.classes) == 4


def test_an_adapter_to_a_head_that_is_not_in_its_file_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(default_backbone(cls_dim=2), LoraConfig(r=2, modules_to_save=[]))
    model.save_pretrained(tmp_path / "headless")
    with pytest.raises(AdapterFileError, match="other weights of the backbone"):
        Board().add(str(tmp_path / "headless"))


def test_a_run_on_another_backbone_has_a_model_of_its_own(tmp_path: Path, board: Board) -> None:
    shutil.copytree(SHIPPED / "digits", tmp_path / "digits")
    own = Board()
    own.add(str(SHIPPED / "ground"))
    again = own.add(str(tmp_path / "digits"))
    assert again.adapter == "default" and again.model is not own.tasks[0].model and own.names == ["ground", "digits"]
    assert own.add(str(SHIPPED / "digits")).name == "digits_2"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere/at/all", "nowhere/at/all"),
        ("", "name a folder that holds an adapter or a run"),
        ("   ", "name a folder that holds an adapter or a run"),
    ],
)
def test_a_bad_adapter_is_one_sentence_and_changes_nothing(
    handling: Handling, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    before = handling.board.names
    update = handling.load(source, handling.begin())
    assert list(update) == ["alert"] and update["alert"]["visible"]
    alert = update["alert"]["value"]
    assert 'role="alert"' in alert and said in text_of(alert) and "\n" not in alert
    assert handling.board.names == before


def test_an_adapter_of_another_backbone_is_one_sentence(handling: Handling, tmp_path: Path) -> None:
    small = PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8)
    get_peft_model(small, LoraConfig(r=2)).save_pretrained(tmp_path / "other")
    before = handling.board.names
    update = handling.load(str(tmp_path / "other"), handling.begin())
    assert list(update) == ["alert"] and "other" in text_of(update["alert"]["value"])
    assert handling.board.names == before


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("digits", "digits_2"), ("my run", "my_run"), ("a/b", "a_b"), ("default", "default_2"), ("…", "adapter")],
)
def test_names_are_free_and_an_adapter_may_bear_them(wanted: str, name: str) -> None:
    assert unused_name(wanted, ["digits", "x"]) == name


# ---- files of the user's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bad.ply", b"no mesh", "bad.ply"),
        ("bad.npz", b"no archive", "bad.npz"),
        ("bad.laz", b"no scan", "bad.laz"),
        ("bad.doc", b"words", "no reader knows the suffix '.doc'"),
        ("empty.npy", b"", "empty.npy"),
    ],
)
def test_a_bad_cloud_is_one_sentence_and_changes_nothing(
    handling: Handling, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    update = handling.upload(str(path), handling.begin())
    assert list(update) == ["alert"] and update["alert"]["visible"]
    text = text_of(update["alert"]["value"])
    assert said in text and str(tmp_path) not in text


def test_a_cloud_without_a_finite_point_is_one_sentence(handling: Handling, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.npy"
    np.save(path, np.full((5, 3), np.nan))
    update = handling.upload(str(path), handling.begin())
    assert list(update) == ["alert"] and "nowhere.npy" in text_of(update["alert"]["value"])


def test_an_uploaded_cloud_is_answered_and_can_be_chosen_again(handling: Handling, tmp_path: Path) -> None:
    path = tmp_path / "mine.npy"
    points = np.random.default_rng(0).normal(size=(300, 3))
    points[3] = np.nan
    np.save(path, points)
    first = handling.begin()
    update = handling.upload(str(path), first)
    assert update["cloud"]["value"] == "mine.npy" and update["cloud"]["choices"] == [*sample_files(), "mine.npy"]
    assert "1 of 300 points hold NaN or infinity" in text_of(update["note"]["value"])
    assert str(tmp_path) not in update["note"]["value"] and not update["alert"]["visible"]
    chosen = replace(first, cloud="mine.npy", uploaded=str(path))
    assert handling.choose(chosen)["answer_a"] == update["answer_a"]
    path.unlink()
    assert "choose or upload a cloud again" in handling.choose(chosen)["alert"]["value"]


def test_what_others_warn_of_is_no_note(tmp_path: Path) -> None:
    with shown.noting(tmp_path / "a.ply") as notes:
        warnings.warn(f"{tmp_path / 'a.ply'}: 1 point is bad", stacklevel=1)
        warnings.warn("unclosed event loop", ResourceWarning, stacklevel=1)
    assert notes == ["a.ply: 1 point is bad"]


def test_of_a_large_scene_the_middle_is_answered_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "MOST_OF_SCENE", 50)
    path = tmp_path / "scene.npz"
    points = np.random.default_rng(0).normal(size=(400, 3))
    np.savez(path, points=points, labels=np.arange(400) % 3)
    whole = shown.read_shown(path)
    part = whole.middle()
    distance = np.linalg.norm(points[:, :2] - np.median(points[:, :2], axis=0), axis=1)
    rows = np.sort(np.argsort(distance)[:50])
    assert np.allclose(part.cloud.coordinates, points[rows]) and part.cloud.labels is not None
    assert np.array_equal(part.cloud.labels, rows % 3) and "Of 400 points, the 50 nearest" in part.part


def test_a_task_that_cannot_take_a_cloud_refuses_and_the_others_answer(handling: Handling, tmp_path: Path) -> None:
    path = tmp_path / "far.npy"
    np.save(path, np.random.default_rng(0).normal(size=(300, 3)) * 1000 + np.arange(300)[:, None] * 1000)
    first = handling.begin()
    update = handling.upload(str(path), replace(first, other="digits"))
    assert first.task == "radar" and not update["alert"]["visible"]
    said = text_of(update["answer_a"]["value"])
    assert "radar gives for this cloud no answer" in said and "no point lies within reach=2" in said
    assert "digits says the cloud is" in said and str(tmp_path) not in said
    assert "do not both answer" in update["compared"]["value"]
    assert "radar gives no answer" in text_of(update["near"]["value"])
    assert "radar none A" in text_of(update["tasks"]["value"])
    (trace,) = [trace for trace in update["plot_a"]["value"].data if trace.visible]
    assert len(trace.x) == 300 and "radar does not answer" in trace.meta["caption"]
    chosen = replace(first, cloud=path.name, uploaded=str(path))
    assert "radar gives no answer for this cloud" in handling.write(chosen)["alert"]["value"]
    assert handling.write(replace(chosen, other="digits"))["download"]["visible"]


# ---- the doings of the page ------------------------------------------------------------------------------------------


def test_the_page_begins_with_a_sample_and_its_answer(handling: Handling) -> None:
    first = handling.begin()
    made = handling.whole(first)
    assert first.cloud in sample_files() and first.task == "radar" and first.other == NOTHING
    assert "radar says the cloud is" in text_of(made["answer_a"]["value"])
    assert re.search(r"Right for 9\d\.\d % of its test clouds\.", text_of(made["answer_a"]["value"]))
    assert made["answer_a"]["value"].count("hidden") == 2 and not made["side_b"]["visible"]
    traces = made["plot_a"]["value"].data
    assert len(traces) == 3 * len(views.VIEWS)
    assert [trace.meta["task"] for trace in traces if trace.visible] == ["radar"]


@pytest.mark.parametrize(("name", "view"), [("ground 1", "label"), ("digits 3", "attention")])
def test_a_sample_brings_its_adapter(handling: Handling, name: str, view: str) -> None:
    update = handling.choose(replace(handling.begin(), cloud=name))
    task = name.split(" ")[0]
    assert update["adapter"]["value"] == task and update["view"]["value"] == view
    (trace,) = [trace for trace in update["plot_a"]["value"].data if trace.visible]
    assert trace.meta["task"] == task and trace.meta["view"] == view


def test_a_swap_tells_the_server_only_of_the_comparison(handling: Handling) -> None:
    first = handling.begin()
    assert set(handling.swap(replace(first, task="digits"))) == {"alert", "compared"}
    told = handling.swap(replace(first, task="digits", other="radar"))["compared"]
    assert "different questions" in told["value"] and told["visible"]
    assert "same adapter" in handling.swap(replace(first, other="radar"))["compared"]["value"]


def test_two_adapters_are_beside_each_other(handling: Handling) -> None:
    first = handling.begin()
    update = handling.compare(replace(first, other="digits"))
    assert update["side_b"]["visible"] and "digits says" in text_of(update["answer_b"]["value"])
    (trace,) = [trace for trace in update["plot_b"]["value"].data if trace.visible]
    assert trace.meta["task"] == "digits"
    assert not handling.compare(first)["side_b"]["visible"]


def changed(answer: Answer, name: str, **fields: Any) -> Answer:
    return replace(answer, task=replace(answer.task, name=name), **fields)


def test_where_two_adapters_differ_is_told(answers: dict[str, Answers]) -> None:
    digits = of(answers["digits"], "digits")
    shares = torch.zeros(10)
    shares[[7, 1]] = torch.tensor([0.75, 0.25])
    other = changed(digits, "other", shares=shares)
    told = text_of(markup.comparison(digits, other))
    assert told.startswith(f"They differ: digits says {digits.task.classes[digits.best]}, other says 7")
    assert "agree on" in text_of(markup.comparison(digits, changed(digits, "other")))
    ground = of(answers["ground"], "ground")
    assert ground.labels is not None
    flipped = ground.labels.copy()
    flipped[: len(flipped) // 4] = 1 - flipped[: len(flipped) // 4]
    share = 100 * (len(flipped) // 4) / len(flipped)
    told = text_of(markup.comparison(ground, changed(ground, "other", labels=flipped)))
    assert told == f"ground and other differ at {share:.1f} % of the points."


def test_a_picture_is_written(handling: Handling, tmp_path: Path) -> None:
    chosen = replace(handling.begin(), other="digits")
    update = handling.write(chosen)
    path = tmp_path / "out.png"
    assert update["download"] == {"value": str(path), "visible": True} and str(path) in update["note"]["value"]
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    handling.folder = tmp_path / "gone"
    assert "cannot be written" in handling.write(chosen)["alert"]["value"]


@pytest.mark.parametrize("view", list(views.VIEWS))
def test_a_picture_of_every_view(answers: dict[str, Answers], view: str) -> None:
    found = answers["ground"]
    assert picture.picture_of("x", [of(found, "ground")], view, 10.0, 20.0).startswith(b"\x89PNG")


def test_all_views_have_as_many_values_as_points(answers: dict[str, Answers]) -> None:
    for name, found in answers.items():
        for view in views.VIEWS:
            own = views.view_of(of(found, name), view)
            low, high = own.limits
            assert len(own.values) == len(of(found, name).points) and low < high and len(own.colours) > 1
            assert low <= own.values.min() and own.values.max() <= high + 1e-6 and own.caption
    assert "ground" in views.view_of(of(answers["ground"], "ground"), "label").caption
    assert "no point its own" in views.view_of(of(answers["digits"], "digits"), "label").caption


def test_at_most_so_many_points_are_drawn(answers: dict[str, Answers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "DRAWN", 100)
    made = figure.figure_of(answers["ground"], "ground", "label", 0.0, 90.0)
    assert max(len(trace.x) for trace in made.data) == 100
    eye = made.layout.scene.camera.eye
    assert (eye.x, eye.y, eye.z) == pytest.approx((0, 0, figure.DISTANCE), abs=1e-6)


def test_the_camera_looks_at_the_broad_side(answers: dict[str, Answers]) -> None:
    digits = of(answers["digits"], "digits")
    assert facing(digits)[1] > 45 > facing(replace(digits, points=digits.points[:, [0, 2, 1]]))[1]


def test_the_reasons_show_the_training_clouds(answers: dict[str, Answers]) -> None:
    html = markup.near_panels(answers["digits"], "digits")
    answer = of(answers["digits"], "digits")
    assert answer.task.clouds is not None
    labels = [str(answer.task.clouds.labels[near.row]) for near in answer.near]
    (own,) = [part for part in html.split("</section>") if 'data-task="digits"' in part]
    assert re.findall(r"<b>(.)</b>", own) == labels and own.count("<svg") == len(labels)
    assert "has no memory bank" in html


def test_words_of_strangers_are_only_words(answers: dict[str, Answers]) -> None:
    digits = of(answers["digits"], "digits")
    evil = "<script>alert(1)</script>"
    classes = (evil, *digits.task.classes[1:])
    task = replace(digits.task, name=evil, predictor=replace(digits.task.predictor, classes=classes), said=evil)
    found = replace(answers["digits"], of={evil: replace(digits, task=task)})
    made = [
        markup.answer_panels(found, "a", evil),
        markup.near_panels(found, evil),
        markup.tasks_table(found),
        markup.comparison(of(found, evil), of(answers["radar"], "radar")),
        markup.alert(evil),
        markup.note([evil]),
        views.view_of(of(found, evil), "label").caption,
    ]
    assert all("<script" not in html and "&lt;script" in html for html in made)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gradio(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "gradio", None)
    yield


def test_without_gradio_there_is_help(no_gradio: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    assert "--adapter FOLDER_OR_REPO" in capsys.readouterr().out


def test_without_gradio_it_says_what_to_install(no_gradio: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "pages to try adapters need gradio" in error and "pip install 'point-peft[demo]'" in error
    assert error.count("\n") == 1


def test_a_bad_adapter_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "gradio", lambda: None)
    assert main(["demo", "--no-browser", "--adapter", "nowhere/at/all"]) == 2
    assert "nowhere/at/all" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "x"])
def test_a_port_is_a_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", f"--port={port}"])
    assert "is no port" in capsys.readouterr().err


def test_a_file_that_is_gone_is_told(board: Board) -> None:
    with pytest.raises(DataError, match="choose or upload a cloud again"):
        board.answers(Path("nowhere.ply"))
