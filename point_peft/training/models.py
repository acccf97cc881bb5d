"""Models by name, for the command line: a backbone for a task, what is trained of it, and what it takes of a batch."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from point_peft.backbones import (
    HierarchicalPointTransformer,
    HierarchicalPointTransformerPartSeg,
    PointTransformer,
    PointTransformerPartSeg,
    default_backbone,
    load_checkpoint,
)
from point_peft.backbones.checkpoint import EMBEDDED
from point_peft.config import METHODS, PeftConfig, TunerConfig
from point_peft.data.cloud import CloudBatch, Task
from point_peft.errors import PointPeftError, nearest_names, quoted
from point_peft.model import get_peft_model
from point_peft.schema import hints_of
from point_peft.training.flags import value_of

SMALL = "point-mae-small"
FULL = "full"
"""The name of no method: full fine-tuning."""
SPEC = "package.module:callable or file.py:callable that makes the backbone, with its weights"
_POINT_BERT = {"encoder_dims": 256, "num_group": 64}
_RECON = {"prefix_tokens": ("cls", "img", "text")}
FAMILIES: dict[str, dict[str, Any]] = {
    "point-mae": {},
    "act": {},
    "point-bert": _POINT_BERT,
    "pcp-mae": {"pos_features": "sine"},
    "recon": _RECON,
    "point-m2ae": {},
}
"""Name -> arguments of the reference backbone that reads the published checkpoints of this family."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model, told in words that a run's folder can hold."""

    backbone: str
    checkpoint: str | None = None
    methods: tuple[Mapping[str, Any], ...] = ()
    """The configurations of the methods, as JSON; none: full fine-tuning of the plain backbone."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        methods = [dict(own) for own in self.methods]
        return {"backbone": self.backbone, "checkpoint": self.checkpoint, "methods": methods}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> ModelSpec:
        """The spec of a run's folder."""
        return ModelSpec(backbone=values["backbone"], checkpoint=values["checkpoint"], methods=tuple(values["methods"]))


def backbone_for_task(
    spec: ModelSpec, task: Task, classes: Sequence[str], categories: Sequence[str], seed: int = 0
) -> nn.Module:
    """The backbone with a head for these classes; what is not in its weights is drawn by `seed`.

    Raises `PointPeftError` where nothing has that name, or weights are missing.
    """
    torch.manual_seed(seed)
    if ":" in spec.backbone:
        model = made_by(spec.backbone, {"num_classes": len(classes), "cls_dim": len(classes)})
        if spec.checkpoint is not None:
            load_checkpoint(model, spec.checkpoint)
        return model
    if spec.backbone == SMALL:
        if spec.checkpoint is not None:
            raise PointPeftError(f"{SMALL} comes with its weights: leave --checkpoint out")
        return default_backbone(len(classes)) if task == "classification" else _small_segmentation(classes, categories)
    if spec.backbone not in FAMILIES:
        near = nearest_names(spec.backbone, [SMALL, *FAMILIES], what="backbone")
        raise PointPeftError(
            f"no backbone is called {quoted(spec.backbone)}; nearest: {near}; there are "
            f"{', '.join([SMALL, *FAMILIES])}, and {SPEC}"
        )
    model = _family(spec.backbone, task, classes, categories)
    if spec.checkpoint is not None:
        load_checkpoint(model, spec.checkpoint)
    elif spec.methods:
        raise PointPeftError(
            f"the backbone {quoted(spec.backbone)} has no weights here, and an adapter on noise learns little: give "
            f"--checkpoint FILE of the published weights, or take {SMALL}"
        )
    return model


def filled(model: nn.Module, path: Path) -> nn.Module:
    """A copy of a model with all of its values from a checkpoint; raises `PointPeftError` where that lacks some."""
    copied = copy.deepcopy(model)
    report = load_checkpoint(copied, path)
    if report.missing:
        raise PointPeftError(
            f"{path} does not fill {len(report.missing)} tensors of the {type(model).__name__}, '{report.missing[0]}' "
            "among them: say which backbone it is by --backbone, and the number of its classes by --num-classes"
        )
    return copied


def _family(name: str, task: Task, classes: Sequence[str], categories: Sequence[str]) -> nn.Module:
    own, hierarchical = FAMILIES[name], name == "point-m2ae"
    if task == "classification":
        kind: Any = HierarchicalPointTransformer if hierarchical else PointTransformer
        return _module(kind(**own, cls_dim=len(classes)))
    if name == "recon":
        raise PointPeftError("recon is for classification here; take point-mae, act, pcp-mae or point-m2ae")
    kind = HierarchicalPointTransformerPartSeg if hierarchical else PointTransformerPartSeg
    return _module(kind(**own, cls_dim=len(classes), num_labels=len(categories)))


def _module(made: Any) -> nn.Module:
    assert isinstance(made, nn.Module)
    return made


def _small_segmentation(classes: Sequence[str], categories: Sequence[str]) -> nn.Module:
    """Segmentation on the encoder of the small backbone that comes with the package."""
    sizes = json.loads(EMBEDDED.with_suffix(".json").read_text("utf-8"))
    model = PointTransformerPartSeg(
        **{**sizes, "num_group": 128, "group_size": 16},
        cls_dim=len(classes),
        num_labels=len(categories),
        taps=(1, 3, 5),
        head_width=256,
    )
    load_checkpoint(model, EMBEDDED.with_suffix(".safetensors"))
    return model


def to_inputs_of(model: nn.Module, categories: int) -> Callable[[Any], Any] | None:
    """A function from batches to arguments for models that also take the kinds of objects, one-hot; else None."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) < 2:
        return None

    def inputs(batch: CloudBatch) -> tuple[Tensor, Tensor]:
        return batch.points, F.one_hot(batch.categories, categories).to(batch.points.dtype)

    return inputs


def adapted(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The model with a fresh adapter of the spec's methods; without any, the model itself, all of it trained."""
    if not spec.methods:
        return model.requires_grad_(True)
    tuners = tuple(TunerConfig.from_json(own) for own in spec.methods)
    config = PeftConfig(tuners=tuners, base_model_name_or_path=base_name(spec))
    return get_peft_model(model, config)


def base_name(spec: ModelSpec) -> str:
    """The words for a spec's backbone in an adapter's configuration.

    Of a file only its name: where it lies is nobody else's concern. And no name that could be a repository's.
    """
    return f"{Path(spec.backbone).name} (a backbone of point-peft train)"


def method_configs(names: Sequence[str], settings: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """The JSON of methods by name, with settings "field=value", or "method.field=value" where several have the field.

    Raises `PointPeftError` for unknown methods and fields.
    """
    if FULL in names:
        if len(names) > 1 or settings:
            raise PointPeftError(f"--method {FULL} is full fine-tuning, without adapters and settings")
        return ()
    known = {name.lower(): name for name in METHODS}
    chosen: dict[str, dict[str, Any]] = {}
    for name in names:
        method = known.get(name.lower().replace("-", "_"))
        if method is None:
            near = nearest_names(name, [*known, FULL], what="method")
            there = ", ".join([*known, FULL])
            raise PointPeftError(f"no method is called {quoted(name)}; nearest: {near}; there are {there}")
        if method in chosen:
            raise PointPeftError(f"--method {name} is given twice; several methods in one adapter are different ones")
        chosen[method] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        owner, _, field = path.rpartition(".")
        if not equals:
            raise PointPeftError(f"--set {quoted(setting)} must be field=value")
        meant = [m for m in chosen if owner.lower().replace("-", "_") in ("", m.lower())]
        fitting = [m for m in meant if field in hints_of(METHODS[m])]
        if len(fitting) != 1:
            fields = sorted({name for m in chosen for name in hints_of(METHODS[m])})
            near = nearest_names(field, fields, what="field")
            which = f"several methods have it: write {fitting[0].lower()}.{path}" if fitting else f"nearest: {near}"
            raise PointPeftError(f"--set {quoted(setting)}: {which}")
        chosen[fitting[0]][field] = value_of(text, hints_of(METHODS[fitting[0]])[field], f"--set {field}")
    return tuple(METHODS[method](**values).to_json() for method, values in chosen.items())


def with_columns(
    methods: tuple[dict[str, Any], ...], channels: Sequence[str], backbone_channels: Sequence[str]
) -> tuple[dict[str, Any], ...]:
    """The methods, with an input adapter before them where clouds have other columns than the backbone takes.

    Raises `PointPeftError` for full fine-tuning, which has no adapter to put one in.
    """
    adapting = {name: kind for name, kind in METHODS.items() if kind.adapts_columns}
    if list(channels) == list(backbone_channels) or any(own["method"] in adapting for own in methods):
        return methods
    if not methods:
        raise PointPeftError(
            f"--channels {','.join(channels)} are not the columns of the backbone, {','.join(backbone_channels)}, and "
            f"without an adapter nothing is put between: say --backbone-channels, or another --method than {FULL}"
        )
    fields = {"channels": list(channels), "backbone_channels": list(backbone_channels)}
    (name,) = adapting
    return TunerConfig.from_json({"method": name, **fields}).to_json(), *methods


def made_by(spec: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The backbone that `package.module:callable` or `file.py:callable` makes, given those arguments that it takes."""
    origin, _, name = spec.rpartition(":")
    if not origin or not name:
        raise PointPeftError(f"MODEL is {quoted(spec)}; allowed: {SPEC}")
    made: Any = _imported(origin)
    for part in name.split("."):
        if part not in dir(made):
            raise PointPeftError(f"MODEL: {quoted(origin)} has no {quoted(name)}")
        made = getattr(made, part)
    if callable(made) and not isinstance(made, nn.Module):
        signature = inspect.signature(made)
        given = {name: value for name, value in arguments.items() if name in signature.parameters}
        try:
            signature.bind(**given)
        except TypeError as error:
            raise PointPeftError(
                f"MODEL: {quoted(spec)}: {error}; num_classes and cls_dim are given to what takes them, all else needs "
                "a default"
            ) from error
        made = made(**given)
    if not isinstance(made, nn.Module):
        raise PointPeftError(f"MODEL: {quoted(spec)} gives a {type(made).__name__}, not an nn.Module")
    return made


def _imported(origin: str) -> Any:
    if origin.endswith(".py"):
        if not Path(origin).is_file():
            raise PointPeftError(f"MODEL: there is no file {quoted(origin)}")
        spec = importlib.util.spec_from_file_location(Path(origin).stem, origin)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # as an import does; dataclasses and pickle look there
        try:
            spec.loader.exec_module(module)
        except (SyntaxError, ImportError) as error:
            raise PointPeftError(f"MODEL: cannot import {quoted(origin)}: {error}") from error
        return module
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return importlib.import_module(origin)
    except (SyntaxError, ImportError) as error:
        raise PointPeftError(f"MODEL: cannot import {quoted(origin)}: {error}") from error
