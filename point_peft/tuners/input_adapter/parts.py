"""The trained columns at the backbone's first layer."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Tap
from point_peft.errors import AdapterError, AnatomyError
from point_peft.parts.base import Call, Part
from point_peft.running.nested import Args, Kwargs, fetch_argument, leaves, put
from point_peft.tuners.input_adapter.columns import InputColumns

EXACT = 1e-4
"""By so much of the size of a cloud a point may have moved by rounding, when it is taken relative to a centre."""


def new_columns(call: Call) -> Tensor:
    """The new columns (b, n, e), or packed (n, e), of the clouds of this forward."""
    if call.forward.given is None:
        raise AdapterError(
            f"'{call.path}' gets new columns of the clouds that the model is called with, and this is a direct call of "
            "a part of it: call the model"
        )
    return call.state("columns", InputColumns).extra(call.forward.given)


class NewColumns(Part):
    """y <- y + W_new e on what the backbone's first layer gives for a point with new columns e."""

    prefix = "input_adapter"

    def __init__(self, count: int, out: int, *, grouped: bool, packed: bool) -> None:
        super().__init__()
        self.columns = nn.Linear(count, out, bias=False)
        nn.init.zeros_(self.columns.weight)
        self.grouped = grouped
        """True if a `GroupedColumns` has laid out the columns as the layer will see the points."""
        self.packed = packed

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if call.forward.apart:  # with groups of another method's
            return output
        out = self.columns.out_features
        steps, y = next((steps, value) for steps, value in leaves(output) if value.is_floating_point())
        first = isinstance(call.module, (nn.Conv1d, nn.Conv2d))
        laid = y.movedim(1, -1) if first else y
        extra = self._of_groups(call, laid.shape[:-1].numel()) if self.grouped else self._of_points(call, laid)
        added = self.columns(extra.to(self.columns.weight.dtype)).to(y.dtype).reshape(*laid.shape[:-1], out)
        return put(output, steps, y + (added.movedim(-1, 1) if first else added))

    def _of_points(self, call: Call, laid: Tensor) -> Tensor:
        """The columns of all points, where the layer sees them as they are given."""
        extra = new_columns(call)
        # Of other models, as many rows need not be the same points.
        if laid.shape[:-1] != extra.shape[:-1] or (not self.packed and extra.ndim != 3):
            raise AnatomyError(
                f"the new columns of points {tuple(extra.shape[:-1])} cannot be added at '{call.path}', which sees "
                f"{tuple(laid.shape[:-1])}: groups of points, and no module is known that makes them (Stage.points of "
                "config.anatomy), or others than were given; leave the new columns out of the data"
            )
        return extra

    def _of_groups(self, call: Call, count: int) -> Tensor:
        """The columns (count, e) of the next points of groups: a layer may see some groups at a time."""
        key = self.key(call, "grouped columns")
        rows = call.forward.handover.notes.get(key)
        if rows is None or len(rows) < count:
            raise AnatomyError(
                f"'{call.path}' sees {count} points of groups, and {0 if rows is None else len(rows)} are known that "
                "were grouped: it is not the first layer, name that in target_modules"
            )
        call.forward.handover.note(key, rows[count:])
        return rows[:count]


class GroupedColumns(Part):
    """At the module that groups the points: finds the points of the groups again, and lays out their new columns.

    A point of a group is the one of the cloud that is nearest to centre + offset, which is where it was.
    """

    prefix = "input_adapter"

    def __init__(self, points: Tap) -> None:
        super().__init__()
        self.points = points
        self.looked = False
        """True once it was looked whether the points are found."""

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if call.forward.apart:
            return output
        cloud = fetch_argument(args, kwargs, self.points.steps)[..., :3]
        extra = self._as_grouped(call, new_columns(call), cloud)
        groups, centres = self._groups(call, output)
        wide = torch.promote_types(cloud.dtype, torch.float32)
        places = rearrange(groups.to(wide) + centres.to(wide)[:, :, None], "b g k xyz -> b (g k) xyz").to(cloud.dtype)
        index = geometry.knn(places, cloud, 1)[:, :, 0]
        self._look(call, places, geometry.gather(cloud, index), cloud)
        rows = rearrange(geometry.gather(extra, index), "b m e -> (b m) e")
        call.forward.handover.note(self.key(call, "grouped columns"), rows)
        return output

    def _as_grouped(self, call: Call, extra: Tensor, cloud: Tensor) -> Tensor:
        """The columns (b, n, e) with zeros for points that another method has put behind those of the clouds."""
        more = cloud.shape[1] - extra.shape[1]
        if extra.ndim != 3 or more < 0:
            raise AnatomyError(
                f"'{call.path}' groups {tuple(cloud.shape)}, and the clouds were given as {tuple(extra.shape[:-1])}: "
                "which points these are is not known, so new columns cannot go with them; leave them out of the data"
            )
        return nn.functional.pad(extra, (0, 0, 0, more))

    def _groups(self, call: Call, output: Any) -> tuple[Tensor, Tensor]:
        """The groups (b, g, k, 3) and centres (b, g, 3) among what the module gives."""
        found = [value for _, value in leaves(output) if value.is_floating_point() and value.shape[-1:].numel() >= 3]
        for groups in found:
            for centres in found:
                if groups.ndim == 4 and centres.ndim == 3 and groups.shape[:2] == centres.shape[:2]:
                    return groups[..., :3], centres[..., :3]
        shown = ", ".join(str(tuple(value.shape)) for _, value in leaves(output))
        raise AnatomyError(
            f"'{call.path}' should give groups (b, g, k, 3) relative to their centres (b, g, 3), by which their points "
            f"are found again; it gives {shown}: leave the new columns out of the data"
        )

    def _look(self, call: Call, places: Tensor, found: Tensor, cloud: Tensor) -> None:
        """Raise, in the first forward, where no points are at the places: groups may be scaled or turned."""
        if self.looked or torch.compiler.is_compiling():
            return
        rounding = max(EXACT, 8 * torch.finfo(cloud.dtype).eps) * cloud.abs().amax().clamp(min=1e-6)
        if bool(((places - found).abs().amax() > rounding).item()):
            raise AnatomyError(
                f"the points of the groups that '{call.path}' makes are not those of the cloud less their centres, so "
                "new columns cannot go with them; leave them out of the data"
            )
        self.looked = True
