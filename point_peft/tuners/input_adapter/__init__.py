"""Input adapter: clouds whose points have other columns than the frozen backbone takes.

L. Zhang, A. Rao, M. Agrawala: "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023,
https://arxiv.org/abs/2302.05543

It is the smallest extension of a first layer. The paper cited gives a frozen model further inputs in this way, by
layers that begin at zero; none is known to us that does so for points.

A point of the data has columns by name, `channels`; the backbone was trained with `backbone_channels`. Columns of one
name are the same. What the backbone wants and the data lack, such as colours, is zero; what the data have and the
backbone does not know, such as an intensity e, is new. With W the backbone's first layer and W_new trained from zero:

    x = the columns of the backbone, in its order, zeros for those that are lacking
    y = W x + b + W_new e

A fresh adapter leaves the output as that of the zero-filled clouds.

When to use it: beside any other method, `PeftConfig(tuners=(InputAdapterConfig(...), PointPEFTConfig()))`, where
sensors differ from those of the pre-training: no colours, no normals, or an intensity, a velocity, a time. Several
adapters of one backbone may take clouds of different columns.

What it does not do:

- It neither scales nor shifts columns: zero stands for "unknown" only where the pre-training had about zero mean, or
  dropped colours at times.
- Where the first layer sees groups of points, as in Point-MAE, the grouping has to be a module that returns groups
  relative to their centres, and the centres: a point of a group is found again by its place. Of several points at one
  place, the first is taken. A method that groups the clouds a second time (PPT, PointLoRA) does so without new columns.
- Of a convolution over neighbouring voxels, the new columns of the point itself are added, not of those around it.
- The priors of Point-PEFT are those of the zero-filled clouds, as the frozen backbone knows no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from point_peft.anatomy.structure import linear_shape
from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.tuners.input_adapter.columns import InputColumns
from point_peft.tuners.input_adapter.parts import GroupedColumns, NewColumns


@dataclass(frozen=True, kw_only=True)
class InputAdapterConfig(TunerConfig):
    """Columns of points by name; without any, nothing is adapted but the heads.

    `target_modules` names the backbone's first layer, None: the first ahead of the blocks that takes as many values as
    there are `backbone_channels`, alone or behind three coordinates.
    """

    method: ClassVar[str] = "INPUT_ADAPTER"
    adapts_columns: ClassVar[bool] = True

    channels: Sequence[str] | None = None
    """The columns of the clouds that the adapter takes, in their order."""
    backbone_channels: Sequence[str] | None = None
    """The columns that the backbone was trained with, in their order; coordinates first, where it groups points."""
    argument: str | int | None = None
    """The name or number of the columns' tensor among the arguments of the model, or in a mapping there. None: the one
    with as many columns as `channels`; of several, that which is called `feat`, `features` or `x`, or is (b, n, c)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.channels is not None
        require(given == (self.backbone_channels is not None), self, "backbone_channels", "names, if channels has some")
        for name in ("channels", "backbone_channels"):
            columns = getattr(self, name)
            distinct = columns is None or (len(columns) == len(set(columns)) > 0 and all(columns))
            require(distinct, self, name, "one name or more, no two alike")
        known = set(self.backbone_channels or ())
        require(not given or not known.isdisjoint(self.channels or ()), self, "channels", "some of backbone_channels")
        for name in ("exclude_modules", "layers_to_transform"):
            require(getattr(self, name) is None, self, name, "None, because it adapts the first layer alone")

    def build(self, backbone: Backbone) -> Blueprint:
        if self.channels is None or self.backbone_channels is None:
            return Blueprint()
        columns = InputColumns(tuple(self.channels), tuple(self.backbone_channels), self.argument)
        plan = Blueprint(shared={"columns": columns})
        if columns.new:
            path = self._first_layer(backbone, len(self.backbone_channels))
            stage = None if backbone.anatomy is None else backbone.anatomy.stages[0]
            grouped = stage is not None and stage.points is not None
            if stage is not None and stage.points is not None and not stage.points.module:
                raise AnatomyError(
                    f"{self.method}: {type(backbone.model).__name__} groups the clouds in its own forward, and which "
                    "points new columns belong to is found out behind a module that returns groups (b, g, k, 3) and "
                    "their centres: move the grouping into one, or leave the new columns out of the data"
                )
            packed = stage is None or stage.layout == "packed"
            _, out = layer_shape(backbone.modules[path]) or (0, 0)
            if stage is not None and stage.points is not None:
                plan.parts.append((stage.points.module, GroupedColumns(stage.points)))
            plan.parts.append((path, NewColumns(len(columns.new), out, grouped=grouped, packed=packed)))
        return plan

    def _first_layer(self, backbone: Backbone, columns: int) -> str:
        """The path of the backbone's first layer."""
        modules, anatomy = backbone.modules, backbone.anatomy
        if self.target_modules is not None:
            named = match_names(self.target_modules, list(modules))
            if len(named) != 1 or layer_shape(modules[named[0]]) is None:
                raise AnatomyError(
                    f"{self.method}: target_modules should name one linear layer or convolution, the first that sees "
                    f"the points; it names {', '.join(map(repr, named))}"
                )
            return named[0]
        apart: list[str] = []
        if anatomy is not None:
            positions = [s.position_embedding for s in anatomy.stages if s.position_embedding is not None]
            apart = [*positions, *(block.path for block in anatomy.blocks), *anatomy.heads]
        for path, module in modules.items():
            shape = layer_shape(module)
            within = any((path + ".").startswith(other + ".") for other in apart)
            if shape is not None and shape[0] in (columns, columns + 3) and not within:
                return path
        raise AnatomyError(
            f"{self.method}: no layer ahead of the blocks takes {columns} values of a point, or {columns + 3}, as many "
            "as there are backbone_channels; name the first layer in target_modules"
        )


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer or a convolution, of torch or sparse; None for anything else."""
    shape, weight = linear_shape(module), module._parameters.get("weight")
    if shape is not None:
        return shape[1], shape[0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    # Of a sparse one it is (out, ..., in), as in spconv.
    return None if weight is None or weight.ndim < 3 else (weight.shape[-1], weight.shape[0])
