"""The recipe of a training: everything that is chosen but the model, the method and the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]

from point_peft.config import check_fields, require
from point_peft.data.augmenting import AUGMENTATIONS
from point_peft.data.cloud import Task
from point_peft.errors import PointPeftError, nearest_names, quoted
from point_peft.schema import Count, Factor, Limit, at_least, hints_of, to_json
from point_peft.training.yaml_text import problem, read_yaml

_SHARE = Limit("0 or more and less than 1", lambda value: 0 <= value < 1)
Share = Annotated[float, _SHARE]
OptionalFactor = Annotated[float | None, Limit("more than 0", lambda value: value > 0)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training in numbers; the same recipe, model, data and number of processes give the same values, bit for bit.

    With another number of processes they are the same to rounding: a batch is split between processes, not multiplied.
    """

    task: Task = "classification"
    epochs: Count = 50
    batch_size: Count = 16
    """Clouds in one step of the optimizer, over all processes and all `accumulate` parts.

    The batches of an epoch differ by one cloud at most, so that none is left over and none is dropped.
    """
    accumulate: Count = 1
    """Parts in which a process goes through its share of a batch, so that less memory is needed."""
    lr: Factor = 3e-3
    head_lr: OptionalFactor = None
    """That of heads; None: `lr`."""
    prompt_lr: OptionalFactor = None
    """That of prompt tokens and coordinates; None: `lr`."""
    weight_decay: Annotated[float, at_least(0)] = 0.05
    """Of AdamW; none on norms, biases, gates, tokens and coordinates."""
    warm_up: Share = 0.1
    """The share of all steps in which the learning rate rises from 0; then it falls as a cosine to `final_lr`."""
    final_lr: Share = 0.0
    """The share of the learning rate that is left at the end."""
    clip: OptionalFactor = 10.0
    """The largest norm of all gradients together; None: not clipped."""
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] | Sequence[float] = "none"
    """In the loss: "balanced" for weights inverse to the numbers of training clouds (or points), or one a class."""
    ema: Annotated[float | None, _SHARE] = None
    """The decay by step of a running average of what is trained, which is then what is validated and kept."""
    keep: Literal["best", "last"] = "best"
    """The epoch whose values are kept: the best on validation, or the last.

    On few validation clouds the best epoch is partly luck; the last, at the end of the cosine, is often better.
    """
    patience: Annotated[int | None, at_least(1)] = None
    """Training stops after so many epochs in which validation did not improve; None: never early."""
    augment: Sequence[str] = ("scale_translate",)
    """Names of `AUGMENTATIONS`, in this order, drawn for each cloud and epoch; empty: none."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """None: as `accelerate launch` was told, without it "no"."""
    gradient_checkpointing: bool = False
    memory_bank: bool = True
    """Build the memory bank of an adapter that has an empty one, from the training clouds as they are."""
    checkpoint_steps: Count = 100
    """Steps between two checkpoints; one more is written after each epoch."""
    num_workers: Annotated[int, at_least(0)] = 0
    """Processes that read clouds ahead, for each process that trains."""
    seed: Annotated[int, at_least(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.augment:
            if name not in AUGMENTATIONS:
                near = nearest_names(name, list(AUGMENTATIONS), what="augmentation")
                raise PointPeftError(
                    f"Recipe.augment is {quoted(name)}; allowed: {', '.join(AUGMENTATIONS)}; nearest: {near}"
                )
        weights = self.class_weights
        above = isinstance(weights, str) or all(weight > 0 and math.isfinite(weight) for weight in weights)
        require(above, self, "class_weights", "'none', 'balanced' or a number above 0 for each class")
        allowed = 'null where keep is "last": whoever stops early keeps the best'
        require(self.keep == "best" or self.patience is None, self, "patience", allowed)
        require(self.accumulate <= self.batch_size, self, "accumulate", f"at most batch_size, {self.batch_size}")

    def learning_rate(self, step: int, steps: int) -> float:
        """The share of its learning rate with which a group takes a step, counted from 0, of so many."""
        rising = round(self.warm_up * steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        cosine = (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1))) / 2
        return self.final_lr + (1 - self.final_lr) * cosine

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields: dict[str, Any] = to_json(self)
        return fields

    def to_yaml(self) -> str:
        """The fields as YAML, in their order."""
        text: str = yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True)
        return text

    @staticmethod
    def from_json(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
        """The recipe with these values; unknown fields are refused."""
        for name in values:
            if name not in hints_of(Recipe):
                near = nearest_names(str(name), list(hints_of(Recipe)), what="field")
                raise PointPeftError(f"{source} has a field {quoted(name)} that no recipe has; nearest: {near}")
        return Recipe(**values)

    @staticmethod
    def from_yaml(path: str | Path) -> Recipe:
        """The recipe of a file; fields that it leaves out have their defaults."""
        return Recipe.from_json(fields_of_file(path), f"the recipe {quoted(str(path))}")


def fields_of_file(path: str | Path) -> dict[str, Any]:
    """The fields that a recipe's file states, not checked; raises `PointPeftError` if it holds no fields by name."""
    name = quoted(str(path))
    try:
        values = read_yaml(Path(path).read_text("utf-8"))
    except OSError as error:
        raise PointPeftError(f"the recipe {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PointPeftError(f"the recipe {name} is no YAML: {error}") from error
    except yaml.YAMLError as error:
        raise PointPeftError(f"the recipe {name} is no YAML ({problem(error)})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise PointPeftError(f"the recipe {name} holds a {type(values).__name__}, not fields by name")
    return values
