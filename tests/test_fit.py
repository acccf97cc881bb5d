"""Training by `fit`: what it leaves behind, which values are kept, and what it refuses before anything is spent."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from point_peft import (
    LinearProbeConfig,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    get_peft_model,
)
from point_peft.files.format import RUN_FILE, TENSOR_FILE
from point_peft.training import Recipe, Run, fit, pictures
from point_peft.training.folder import CHECKPOINT_FILE, METRICS_FILE, PICTURES, RECIPE_FILE
from tests.adapting import assert_same_values
from tests.methods import config
from tests.training import QUICK, Interrupted, adapted, backbone, logits, losses, segmenter, shapes, values_of

TRAIN, VAL, TEST = shapes(15, 1), shapes(9, 2), shapes(9, 3)
WITH_A_BANK = PointPEFTConfig(memory_bank=True, num_prompts=3)
replace = dataclasses.replace


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training of Point-PEFT with everything in it, which is looked at and not changed."""
    recipe = replace(QUICK, epochs=4, ema=0.5, accumulate=2, label_smoothing=0.1, class_weights="balanced")
    out = tmp_path_factory.mktemp("runs") / "first"
    return fit(adapted(WITH_A_BANK), TRAIN, VAL, recipe, out=out, test=TEST)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without pictures, which take longer than such a training."""
    _do_not_draw(monkeypatch)


def _do_not_draw(patch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "confusions", "samples"):
        patch.setattr(pictures, name, lambda *arguments: b"")


# ---- what is left behind ---------------------------------------------------------------------------------------------


def test_the_folder_of_a_run(finished: Run) -> None:
    files = {path.name for path in finished.folder.iterdir()}
    wanted = {RECIPE_FILE, RUN_FILE, METRICS_FILE, *PICTURES, "README.md", "adapter_config.json", TENSOR_FILE}
    assert files == wanted
    for name in PICTURES:
        assert (finished.folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert Recipe.from_yaml(finished.folder / RECIPE_FILE).ema == 0.5
    record = json.loads((finished.folder / RUN_FILE).read_text("utf-8"))
    assert record["finished"] and record["results"] == finished.results and record["classes"] == ["0", "1", "2"]
    card = (finished.folder / "README.md").read_text("utf-8")
    assert "![confusions](confusion.png)" in card and f"{finished.results['test']['accuracy']:.1f} %" in card
    assert "model-index" in card


def test_what_was_trained_goes_into_a_fresh_backbone(finished: Run) -> None:
    model = PointPeftModel.from_pretrained(backbone(), finished.folder)
    assert torch.equal(logits(model, TEST), logits(finished.model, TEST))
    assert len([name for name in values_of(model) if "bank" in name]) > 0
    taken = logits(model, TEST).argmax(dim=1) == TEST.tensors[1]
    assert finished.results["test"]["accuracy"] == pytest.approx(100 * float(taken.double().mean()))


def test_it_learns_and_the_best_epoch_on_validation_is_kept(finished: Run) -> None:
    steps = losses(finished.folder)
    assert len(steps) == 12 and sum(steps[-3:]) < 0.8 * sum(steps[:3])
    validated = [line["val_accuracy"] for line in finished.history]
    assert validated[finished.best_epoch - 1] == max(validated) == finished.results["val"]["accuracy"]
    equal = [line for line in finished.history if line["val_accuracy"] == max(validated)]
    assert min(equal, key=lambda line: line["val_loss"])["epoch"] == finished.best_epoch


@pytest.mark.usefixtures("undrawn")
def test_without_validation_the_last_epoch_is_kept(tmp_path: Path) -> None:
    run = fit(adapted(), TRAIN, None, QUICK, out=tmp_path / "run")
    assert run.best_epoch == 2 and run.results == {} and len(run.history) == 2
    model = PointPeftModel.from_pretrained(backbone(), run.folder)
    assert torch.equal(logits(model, TEST), logits(run.model, TEST))


@pytest.mark.usefixtures("undrawn")
def test_the_last_epoch_is_kept_where_the_recipe_says_so(tmp_path: Path) -> None:
    wrong = TensorDataset(VAL.tensors[0], (VAL.tensors[1] + 2) % 3)  # what is learned makes these worse
    recipe = replace(QUICK, epochs=4)
    best, last, blind = (
        fit(adapted(), TRAIN, val, replace(recipe, keep=keep), out=tmp_path / name)
        for name, val, keep in (("best", wrong, "best"), ("last", wrong, "last"), ("blind", None, "best"))
    )
    assert best.best_epoch < last.best_epoch == blind.best_epoch == 4
    assert torch.equal(logits(last.model, TEST), logits(blind.model, TEST))
    assert not torch.equal(logits(last.model, TEST), logits(best.model, TEST))
    assert "of which epoch 4 is kept, the last" in (last.folder / "README.md").read_text("utf-8")
    with pytest.raises(PointPeftError, match="Recipe.patience is 3; allowed: null where keep is"):
        replace(recipe, keep="last", patience=3)


@pytest.mark.usefixtures("undrawn")
def test_training_stops_when_validation_no_longer_improves(tmp_path: Path) -> None:
    wrong = TensorDataset(VAL.tensors[0], (VAL.tensors[1] + 1) % 3)  # what is learned makes these worse
    run = fit(adapted(), TRAIN, wrong, replace(QUICK, epochs=40, patience=2), out=tmp_path / "run")
    assert len(run.history) == run.best_epoch + 2 < 40
    assert run.results["val"]["accuracy"] == max(line["val_accuracy"] for line in run.history)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("how", ["full", "linear probing", "LinearProbe"])
def test_a_plain_model_and_a_head_alone(tmp_path: Path, how: str) -> None:
    model: nn.Module = backbone()
    if how == "linear probing":
        _probing(model)
    elif how == "LinearProbe":
        model = adapted(LinearProbeConfig())
    before = backbone().state_dict()
    run = fit(model, TRAIN, VAL, replace(QUICK, ema=0.9), out=tmp_path / "run")
    base = model.base_model if isinstance(model, PointPeftModel) else model
    kept = {name for name, value in base.state_dict().items() if torch.equal(value, before[name])}
    inside = {name for name in before if not name.startswith("cls_head_finetune")}
    if how == "full":
        assert "blocks.blocks.0.attn.qkv.weight" not in kept
    else:
        assert inside <= kept  # statistics too
    if how != "LinearProbe":
        fresh = backbone() if how == "full" else _probing(backbone())
        loaded = fit(fresh, TRAIN, VAL, QUICK, out=run.folder, resume=True)
        assert torch.equal(logits(loaded.model, TEST), logits(model, TEST))


def _probing(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_submodule("cls_head_finetune").requires_grad_(True)
    return model


@pytest.mark.usefixtures("undrawn")
def test_points_are_segmented_and_unknown_ones_do_not_count(tmp_path: Path) -> None:
    points = shapes(8, 5).tensors[0]
    labels = (points[..., 0] > 0).long()
    hidden = torch.where(points[..., 1] > 0.2, -1, labels)
    clouds = TensorDataset(points, hidden)
    model = get_peft_model(segmenter(), LoraConfig(r=2))

    def to_inputs(batch: Any) -> tuple[Tensor, Tensor]:
        return batch[0], torch.ones(len(batch[0]), 1)

    recipe = replace(QUICK, epochs=6, batch_size=4, task="segmentation", augment=())
    run = fit(model, clouds, clouds, recipe, out=tmp_path / "run", to_inputs=to_inputs)
    assert set(run.results["val"]) == {"loss", "accuracy", "class_accuracy", "miou"}
    assert losses(run.folder)[-1] < losses(run.folder)[0]
    with torch.no_grad():
        predicted = run.model.eval()(*to_inputs([points])).argmax(dim=2)
    right = 100 * float((predicted == labels)[hidden >= 0].double().mean())
    assert run.results["val"]["accuracy"] == pytest.approx(right)


# ---- the same values -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_the_same_seed_gives_the_same_values_and_another_gives_others(tmp_path: Path) -> None:
    runs = [
        fit(adapted(), TRAIN, VAL, replace(QUICK, seed=seed, num_workers=workers), out=tmp_path / f"{number}")
        for number, (seed, workers) in enumerate([(1, 0), (1, 2), (2, 0)])
    ]
    first, second, other = (losses(run.folder) for run in runs)
    assert first == second and first != other
    assert (runs[0].folder / TENSOR_FILE).read_bytes() == (runs[1].folder / TENSOR_FILE).read_bytes()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("change", ["accumulate", "gradient_checkpointing"])
def test_what_only_saves_memory_changes_no_curve(tmp_path: Path, change: str) -> None:
    value: Any = {"accumulate": 2, "gradient_checkpointing": True}[change]
    curves: list[list[float]] = []
    for own in (QUICK, replace(QUICK, **{change: value})):
        model = adapted(WITH_A_BANK, drop_path_rate=0.0, head_norm=False).eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # which parts of a batch draw apart
        for norm in (module for module in model.adapters.modules() if isinstance(module, nn.BatchNorm1d)):
            norm.momentum = 0.0
        curves.append(losses(fit(model, TRAIN, None, own, out=tmp_path / str(len(curves))).folder))
    tolerance = 0.05 if change == "accumulate" else 1e-5  # norms take the statistics of a part
    assert curves[0] == pytest.approx(curves[1], abs=tolerance)


@pytest.mark.usefixtures("undrawn")
def test_half_precision(tmp_path: Path) -> None:
    run = fit(adapted(), TRAIN, VAL, replace(QUICK, mixed_precision="bf16"), out=tmp_path / "run")
    assert {value.dtype for value in values_of(run.model).values() if value.is_floating_point()} == {torch.float32}
    whole = fit(adapted(), TRAIN, VAL, replace(QUICK, mixed_precision="no"), out=tmp_path / "whole")
    assert losses(run.folder) != losses(whole.folder)
    assert losses(run.folder) == pytest.approx(losses(whole.folder), abs=0.1)
    if not torch.cuda.is_available():
        with pytest.raises(PointPeftError, match="'fp16', which needs a GPU; allowed on CPUs"):
            fit(adapted(), TRAIN, VAL, replace(QUICK, mixed_precision="fp16"), out=tmp_path / "fp16")


# ---- interrupted and resumed -----------------------------------------------------------------------------------------

FULL_RECIPE = replace(QUICK, epochs=3, ema=0.9, patience=3, augment=("scale_translate", "jitter"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The training that the next test interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "confusions", "samples"):
            patch.setattr(pictures, name, lambda *arguments: b"")
        return fit(adapted(WITH_A_BANK), TRAIN, VAL, FULL_RECIPE, out=tmp_path_factory.mktemp("w") / "run")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("reads", [0, 41, 79])
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path, whole: Run, reads: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(adapted(WITH_A_BANK), Interrupted(TRAIN, reads), VAL, FULL_RECIPE, out=out, classes="012")
    if out.exists():
        with pytest.raises(PointPeftError, match="holds an unfinished run: go on with --resume"):
            fit(adapted(WITH_A_BANK), TRAIN, VAL, FULL_RECIPE, out=out)
    # Other values, which the checkpoint replaces, where there is one.
    seed = 5 if (out / CHECKPOINT_FILE).exists() else 0
    torch.manual_seed(99)
    resumed = fit(adapted(WITH_A_BANK, seed=seed), TRAIN, VAL, FULL_RECIPE, out=out, resume=True)
    assert (out / TENSOR_FILE).read_bytes() == (whole.folder / TENSOR_FILE).read_bytes()
    assert (out / METRICS_FILE).read_text("utf-8") == (whole.folder / METRICS_FILE).read_text("utf-8")
    assert resumed.results == whole.results and resumed.best_epoch == whole.best_epoch
    assert not (out / CHECKPOINT_FILE).exists()


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_is_loaded_and_not_trained_again(whole: Run) -> None:
    before = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    model = adapted(WITH_A_BANK, seed=7)
    model.build_memory_bank([TRAIN.tensors[0]])
    run = fit(model, TRAIN, VAL, FULL_RECIPE, out=whole.folder, resume=True)
    assert run.results == whole.results and torch.equal(logits(run.model, TEST), logits(whole.model, TEST))
    assert {path.name: path.read_bytes() for path in whole.folder.iterdir()} == before


@pytest.mark.usefixtures("undrawn")
def test_only_the_same_training_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(adapted(), Interrupted(TRAIN, 40), VAL, QUICK, out=tmp_path / "run", classes="012")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other: list[tuple[Any, Any, str]] = [
        (adapted(), replace(QUICK, lr=1e-3), "another Recipe.lr, 0.01, and not 0.001"),
        (adapted(LoraConfig(r=3)), QUICK, "another set of trained tensors"),
    ]
    for model, recipe, message in other:
        with pytest.raises(PointPeftError, match=message):
            fit(model, TRAIN, VAL, recipe, out=tmp_path / "run", resume=True)
    with pytest.raises(PointPeftError, match="another number of labels of each class"):
        fit(adapted(), shapes(12, 1), VAL, QUICK, out=tmp_path / "run", resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == kept
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(kept[CHECKPOINT_FILE][:1000])
    with pytest.raises(PointPeftError, match="checkpoint.pt' cannot be read"):
        fit(adapted(), TRAIN, VAL, QUICK, out=tmp_path / "run", resume=True)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return TRAIN[0]


class Words(nn.Module):
    """A model that gives no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, points: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(points).mean(dim=1)}


def _with_label(label: int) -> TensorDataset:
    labels = TRAIN.tensors[1].clone()
    labels[4] = label
    return TensorDataset(TRAIN.tensors[0], labels)


UNLABELLED = TensorDataset(VAL.tensors[0], torch.full((9,), -1))
FLOATS = TensorDataset(TRAIN.tensors[0], torch.rand(15))
NONE = TensorDataset(torch.empty(0, 48, 3), torch.empty(0, dtype=torch.int64))
NAMED = {"classes": "012"}
CHECKPOINTED = replace(QUICK, gradient_checkpointing=True)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("cloud 4 of 'train' has the label 3, but there are 3 classes, 0 to 2", {"train": _with_label(3)}),
    ("cloud 4 of 'val' has the label -2", {"val": _with_label(-2)}),
    ("the data set 'train' has no clouds", {"train": NONE, **NAMED}),
    ("train is a DataLoader: give its data set", {"train": DataLoader(TRAIN), **NAMED}),
    ("train is a Endless without a length", {"train": Endless(), **NAMED}),
    ("no cloud of 'val' has a label that is known", {"val": UNLABELLED}),
    ("labels must be integers, not torch.float32", {"train": FLOATS}),
    ("Recipe.patience needs validation", {"val": None, "recipe": replace(QUICK, patience=1)}),
    ("Recipe.class_weights has 2 numbers for 3 classes", {"recipe": replace(QUICK, class_weights=(1.0, 2.0))}),
    ("too small for 1 processes that", {"recipe": replace(QUICK, accumulate=5), "train": shapes(13)}),
    ("nothing is trained: no parameter", {"model": backbone().requires_grad_(False)}),
    ("the model gives a dict: pass to_logits=", {"model": Words(), **NAMED}),
    (r"the model gives \(5, 3\) for labels \(5,\) of 4 classes", {"classes": "0123"}),
    ("a Words has no method set_grad_checkpointing", {"model": Words(), **NAMED, "recipe": CHECKPOINTED}),
    ("accelerate refuses", {"log_with": "nothing"}),
    ("a batch is a dict, not a tuple", {"train": [{"points": torch.rand(48, 3)}] * 6, **NAMED}),
]


@pytest.mark.parametrize(("message", "given"), REFUSED, ids=[message for message, _ in REFUSED])
def test_it_is_refused_before_anything_is_written(tmp_path: Path, message: str, given: dict[str, Any]) -> None:
    arguments = {"model": adapted(), "train": TRAIN, "val": VAL, "recipe": QUICK, **given, "out": tmp_path / "run"}
    with pytest.raises(PointPeftError, match=message):
        fit(**arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("undrawn")
def test_folders_that_are_in_use(tmp_path: Path, whole: Run) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for name, message in {"file": "is a file: name another", "full": "is not empty and holds no run"}.items():
        with pytest.raises(PointPeftError, match=message):
            fit(adapted(), TRAIN, VAL, QUICK, out=tmp_path / name, resume=True)
    with pytest.raises(PointPeftError, match="holds a finished run or name another folder|holds a finished run"):
        fit(adapted(), TRAIN, VAL, QUICK, out=whole.folder)


@pytest.mark.usefixtures("undrawn")
def test_a_loss_that_is_not_finite_is_an_error_with_advice(tmp_path: Path) -> None:
    far = TensorDataset(TRAIN.tensors[0].clone(), TRAIN.tensors[1])
    far.tensors[0][3, 0] = float("inf")
    with pytest.raises(PointPeftError, match=r"the loss of step \d is nan: take a lower lr"):
        fit(adapted(), far, None, replace(QUICK, augment=(), memory_bank=False), out=tmp_path / "run")


@pytest.mark.usefixtures("undrawn")
def test_trackers_get_the_curve(tmp_path: Path) -> None:
    fit(adapted(), TRAIN, VAL, QUICK, out=tmp_path / "run", log_with="tensorboard")
    assert [path.name for path in (tmp_path / "run" / "point_peft").rglob("events.out.tfevents*")]
    shutil.rmtree(tmp_path / "run")


@pytest.mark.usefixtures("undrawn")
def test_several_methods_and_a_further_loss(tmp_path: Path) -> None:
    tuners = PeftConfig(tuners=(config("POINT_LORA"), LoraConfig(r=2)))
    run = fit(adapted(tuners), TRAIN, VAL, QUICK, out=tmp_path / "run")
    model = PointPeftModel.from_pretrained(backbone(), run.folder, is_trainable=True)
    assert torch.equal(logits(model, TEST), logits(run.model, TEST))
    assert_same_values(values_of(model), values_of(run.model))
