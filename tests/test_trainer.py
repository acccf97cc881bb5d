"""The adapted model in other people's training loops: what its forward says of itself, and transformers' Trainer."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import LoraConfig, PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.backbones import PointTransformer
from tests.adapting import adapt, assert_same_values, every_method, rescramble
from tests.zoo import BACKBONES, CLASSES
from tests.zoo.operators import supply_torchvision_schemas

COMPACT = BACKBONES["compact"]


class Classifier(PointTransformer):
    """A backbone that gives its loss, as models for trainers do, and has a method for it, as the official ones do."""

    def __init__(self) -> None:
        super().__init__(
            trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8, cls_dim=CLASSES
        )
        self.config = SimpleNamespace(num_labels=CLASSES, use_cache=False)

    def forward(self, points: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(points)
        return (
            {"logits": logits} if labels is None else {"loss": self.get_loss_acc(logits, labels)[0], "logits": logits}
        )

    def get_loss_acc(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy."""
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


# ---- what is said of the forward -------------------------------------------------------------------------------------


@every_method
def test_the_signature_is_the_backbones(method: str) -> None:
    model = adapt(COMPACT, method)
    expected = ["points", "adapter_names"]
    assert list(inspect.signature(model.forward).parameters) == expected
    assert list(inspect.signature(type(model).forward).parameters) == ["self", *expected]
    assert type(model).__name__ == "PointPeftModel" and isinstance(model, PointPeftModel)


class Strange(nn.Module):
    """A forward with every kind of argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, points: Tensor, /, *more: Tensor, scale: float = 1.0, **others: Tensor) -> Tensor:
        output: Tensor = self.layer(points + sum(more) + sum(others.values())) * scale
        return output


def test_adapter_names_has_its_place_among_all_kinds_of_arguments() -> None:
    model = get_peft_model(Strange(), LoraConfig(target_modules=["layer"], modules_to_save=[])).eval()
    names = ["points", "more", "scale", "adapter_names", "others"]
    assert list(inspect.signature(model.forward).parameters) == names
    x = torch.rand(2, 3)
    assert torch.equal(model(x, x, scale=2.0, extra=x), model.base_model(x, x, scale=2.0, extra=x))
    assert model(x, adapter_names=["default", None]).shape == (2, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_say_the_same(copied: Callable[[PointPeftModel], PointPeftModel]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Classifier(), LoraConfig()).eval()
    rescramble(model)
    again = copied(model)
    assert inspect.signature(again.forward) == inspect.signature(model.forward)
    points = torch.rand(2, 64, 3)
    assert torch.equal(again(points=points)["logits"], model(points)["logits"])


@torch.no_grad()
def test_methods_and_attributes_of_the_backbone_are_reached_and_adapted() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Classifier(), LoraConfig()).eval()
    rescramble(model)
    points, labels = torch.rand(4, 64, 3), torch.tensor([0, 1, 2, 3])
    output = model(points, labels)
    assert model.config.num_labels == CLASSES
    features = model.forward_features(points)
    with model.disable_adapter():
        assert not torch.allclose(model.forward_features(points), features, atol=1e-3)
    assert torch.equal(model.get_loss_acc(output["logits"], labels)[0], output["loss"])
    assert list(inspect.signature(model.get_loss_acc).parameters) == ["logits", "labels"]
    assert model.get_loss_acc.__doc__ == "Loss and accuracy."
    with pytest.raises(AttributeError, match="'Classifier' object has no attribute 'get_loss'"):
        _ = model.get_loss


# ---- transformers' Trainer -------------------------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"points": torch.rand(64, 3, generator=generator), "labels": i % CLASSES} for i in range(count)]


def trained(folder: Path, seed: int, **options: Any) -> tuple[Any, PointPeftModel]:
    """A trainer of a fresh adapter with a bank, and that."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(7)
    base = Classifier()
    torch.manual_seed(seed)
    model = get_peft_model(base, PointPEFTConfig(memory_bank=True, top_k=2))
    data = rows(12)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps", report_to=[], seed=0,
        per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, learning_rate=1e-2, save_only_model=False,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, **options), model


def test_trainer_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    supply_torchvision_schemas()
    trainer, model = trained(tmp_path / "run", 1)
    model.build_memory_bank([torch.stack([row["points"] for row in rows(12)])])
    before = model.get_base_model().state_dict()
    frozen = {name: tensor.clone() for name, tensor in before.items()}
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert_same_values(model.get_base_model().state_dict(), frozen, "the backbone")
    again, other = trained(tmp_path / "run", 2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 4
    points = torch.stack([row["points"] for row in rows(4)])
    with torch.no_grad():
        assert torch.allclose(other.eval()(points)["logits"], model.eval()(points)["logits"], atol=1e-5)
    assert again.evaluate()["eval_loss"] == pytest.approx(losses[1], abs=1e-5)
