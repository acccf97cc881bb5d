"""Everything that is the same for all that is compared: recipe, sizes, backbone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from benchmarks.accuracy.entries import FULL, Entry
from point_peft.anatomy.presets import known_anatomy
from point_peft.config import check_fields
from point_peft.errors import PointPeftError
from point_peft.schema import Count, at_least, to_json
from point_peft.training import Recipe
from point_peft.training.folder import write_file
from point_peft.training.models import SMALL, ModelSpec, adapted, backbone_for_task

FILE = "protocol.json"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The conditions of one comparison."""

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=24, keep="last", checkpoint_steps=10**6))
    """Of every training, whose last epoch counts; the learning rate and the seed are put in its place."""
    few_shot_epochs: Count = 40
    """Epochs of few-shot tasks, which have few steps in each and no validation: their last epoch counts."""
    rate_epochs: Annotated[int | None, at_least(1)] = None
    """Epochs of the runs that try learning rates; None: those of the recipe."""
    train_clouds: Annotated[int, at_least(0)] = 320
    """At most so many training clouds, drawn by the seed, the same for all that is compared; 0: all."""
    val_clouds: Annotated[int, at_least(0)] = 300
    """At most so many validation clouds, drawn once; 0: all."""
    curve_clouds: Count = 60
    """So many of these are validated after every epoch, to see whether the training is at its end."""
    test_clouds: Annotated[int, at_least(0)] = 500
    """At most so many test clouds, drawn once; 0: all."""
    corrupted_clouds: Annotated[int, at_least(0)] = 200
    """At most so many of these are also measured corrupted; 0: none."""
    views: Count = 5
    """Augmented versions of each training cloud, which the epochs go round: a frozen stem sees each of them once."""
    groups: Annotated[int | None, at_least(1)] = None
    """Tokens of the embedded backbone; None: its own number."""
    backbone: str = SMALL
    """As `point-peft train --backbone` takes it."""
    checkpoint: str | None = None
    """Weights of the backbone, where it comes without."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.groups is not None and self.backbone != SMALL:
            raise PointPeftError(f"groups are of the backbone {SMALL}; of another they are its own")

    def plain(self, classes: int, seed: int) -> nn.Module:
        """The backbone with a head for so many classes, drawn by the seed."""
        spec = ModelSpec(backbone=self.backbone, checkpoint=self.checkpoint, methods=({},))
        names = [str(number) for number in range(classes)]
        model: Any = backbone_for_task(spec, "classification", names, ("",), seed)
        if self.groups is not None:
            model.group_divider.num_group = self.groups
        return model  # type: ignore[no-any-return]

    def model(self, entry: Entry, classes: int, seed: int) -> nn.Module:
        """The backbone with what an entry puts around it."""
        model = self.plain(classes, seed)
        torch.manual_seed(seed)
        if not entry.configs and entry.method != FULL:
            return model.requires_grad_(False).eval()
        return adapted(model, ModelSpec(backbone=self.backbone, checkpoint=self.checkpoint, methods=entry.configs))

    def weights(self) -> str:
        """A fingerprint of the backbone: of its tensors without heads, which are drawn by the seed."""
        model, found = self.plain(2, 0), hashlib.sha256()
        heads = heads_of(model)
        for name, value in sorted(model.state_dict().items()):
            if not name.startswith(heads):
                found.update(value.detach().contiguous().numpy(force=True).tobytes())
        return found.hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, with the backbone's fingerprint."""
        return {**to_json(self), "weights": self.weights()}

    def claim(self, folder: Path) -> None:
        """Make a folder that of this protocol; raises `PointPeftError` if it holds runs of another one."""
        folder.mkdir(parents=True, exist_ok=True)
        path, own = folder / FILE, self.to_json()
        there = json.loads(path.read_text("utf-8")) if path.exists() else own
        differing = [
            f"{name} was {there.get(name)} and is {own.get(name)}"
            for name in {**there, **own}
            if there.get(name) != own.get(name)
        ]
        if differing:
            raise PointPeftError(
                f"{folder} holds runs of another protocol ({'; '.join(differing)}): say the same again, or --out"
            )
        write_file(path, json.dumps(own, indent=1) + "\n")


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """The paths of the heads of a plain model; none where its anatomy is not known."""
    anatomy = known_anatomy(model)
    return () if anatomy is None else anatomy.heads
