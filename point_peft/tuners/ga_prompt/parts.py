"""The parts of GAPrompt: one where the cloud is grouped, one at every block."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Stage, Tap
from point_peft.errors import AdapterError, AnatomyError
from point_peft.parts.base import Call, Part, SharedState
from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.propagation import GeometryAwareAdapter, Neighbourhoods, neighbourhoods
from point_peft.parts.second_grouping import run_apart
from point_peft.parts.sequence import BlockTokens, SequencePart, small_normal
from point_peft.running.nested import Args, Kwargs, all_arguments, fetch_argument, put_argument
from point_peft.tuners.ga_prompt.shift_net import ShiftNet

Geometry = Literal["consistent", "replacement"]


class ShapeState(SharedState):
    """State of the blocks of one stage: where the prompts lie, and the MLP that makes the shape of the code."""

    def __init__(self, prefix: str, prompts: int, shape: nn.Sequential | None) -> None:
        super().__init__()
        self.prefix = prefix
        self.prompt_coordinates = small_normal(prompts, 3) if prompts else None
        self.shape = shape


def shape_mlp(inputs: int, width: int, channels: int) -> nn.Sequential:
    """The MLP that turns the code of a cloud into its shape (b, c)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, channels))


class CloudPart(Part):
    """Ahead of the grouping: x <- x + scale * shift(x) * x for all points, then point prompts behind them.

    Of what is grouped beside the points, such as colours, the point prompts have the mean. The code of the shift net
    becomes the shapes that blocks and heads take.
    """

    prefix = "ga_prompt"

    def __init__(
        self,
        tap: Tap,
        shift_net: ShiftNet | None,
        shift_scale: float,
        prompts: int,
        factor: float,
        shapes: tuple[int, ...],
        feature: int | None,
    ) -> None:
        super().__init__()
        self.tap = tap
        self.shift_net = shift_net
        self.shift_scale = shift_scale
        self.point_prompts = nn.Parameter(torch.empty(prompts, 3).uniform_(-0.01, 0.01)) if prompts else None
        self.factor = factor
        self.shapes = shapes
        """The stages that take a shape."""
        self.feature = feature
        """The stage whose shape a head pools."""

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if call.forward.apart:
            return args, kwargs
        points = fetch_argument(args, kwargs, self.tap.steps)
        if not isinstance(points, Tensor) or points.ndim != 3 or points.shape[2] != 3:
            got = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
            raise AnatomyError(f"the {self.tap} should be clouds (b, n, 3) that GA_PROMPT can change; it is {got}")
        beside = list(all_arguments(args, kwargs)) if self.point_prompts is not None else []
        args, kwargs = put_argument(args, kwargs, self.tap.steps, self._changed(call, points))
        for steps, value in beside:
            if steps != self.tap.steps and value.ndim == 3 and value.shape[:2] == points.shape[:2]:
                args, kwargs = put_argument(args, kwargs, steps, self._with_means(value))
        return args, kwargs

    def _changed(self, call: Call, points: Tensor) -> Tensor:
        if self.shift_net is not None:
            # In full precision, because points would be moved to the nearest of few places.
            with torch.autocast(points.device.type, enabled=False):
                shift, code = self.shift_net(points, recomputing=call.forward.recomputing)
                points = points + self.shift_scale * shift * points
            self._leave_shapes(call, code)
        if self.point_prompts is None:
            return points
        prompts = repeat(self.factor * self.point_prompts.to(points.dtype), "p xyz -> b p xyz", b=points.shape[0])
        return torch.cat([points, prompts], dim=1)

    def _leave_shapes(self, call: Call, code: Tensor) -> None:
        for stage in self.shapes:
            shape = call.state(f"stage_{stage}", ShapeState).shape
            assert shape is not None
            made = shape(code)
            call.forward.handover.leave((call.adapter, self.tuner, f"shape for stage {stage}"), made)
            if stage == self.feature:
                call.forward.handover.leave((call.adapter, self.tuner, "feature"), made)

    def _with_means(self, value: Tensor) -> Tensor:
        assert self.point_prompts is not None
        mean = value.mean(dim=1, keepdim=True, dtype=None if value.is_floating_point() else torch.float32)
        return torch.cat([value, mean.to(value.dtype).expand(-1, self.point_prompts.shape[0], -1)], dim=1)


def twice_the_maximum(tokens: Tensor, near: Neighbourhoods) -> Tensor:
    """2 max N_j (b, s, c) over neighbourhoods among tokens (b, l, c): each is added to itself, as published."""
    doubled: Tensor = 2.0 * reduce(geometry.gather(tokens, near.neighbour), "b s k c -> b s c", "max")
    return doubled


class ShapedPart(SequencePart):
    """Prompts go in before the block; propagation and A act on the patches after it; then the prompts come out."""

    prefix = "ga_prompt"

    def __init__(
        self,
        stage: Stage,
        number: int,
        *,
        prompts: int,
        shape_scale: float,
        adapter: Bottleneck | None,
        adapter_scale: float,
        geometry: GeometryAwareAdapter | None,
        geometry_kind: Geometry,
        centre_ratio: float,
        neighbours: int,
    ) -> None:
        super().__init__(stage, number)
        self.embeddings = small_normal(prompts, stage.width) if prompts else None
        self.shape_scale = shape_scale
        """Zero without a shift net, which leaves no shape."""
        self.norm = None if adapter is None else nn.LayerNorm(stage.width)
        self.adapter = adapter
        self.adapter_scale = adapter_scale
        self.geometry = geometry
        self.consistent = geometry_kind == "consistent"
        self.centre_ratio = centre_ratio
        self.neighbours = neighbours

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.embeddings is None:
            return args, kwargs
        prompts: Tensor = repeat(self.embeddings, "p c -> b p c", b=self.coordinates(call).shape[0])
        if self.stage.position_embedding is not None:
            places = call.state(f"stage_{self.number}", ShapeState).prompt_coordinates
            assert places is not None
            prompts = prompts + run_apart(call.forward, [self.stage.position_embedding], places[None])
        if self.shape_scale:
            shape = rearrange(self.shape_scale * self._shape(call), "b c -> b 1 c")
            call.forward.handover.notes[self._note(call)] = shape
            prompts = prompts + shape
        return self.with_prompts(call, args, kwargs, prompts)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        count = 0 if self.embeddings is None else self.embeddings.shape[0]
        got = self.returned(call, output, prompts=count)
        patches = got.patches if self.geometry is None else self._propagated(call, self.geometry, got)
        shape = call.forward.handover.notes.pop(self._note(call), None)
        # A acts on every token by itself, so the prompts, which end here, need not pass through it.
        if self.adapter is not None and self.norm is not None:
            shaped = patches if shape is None else patches + shape
            patches = patches + self.adapter_scale * self.adapter(self.norm(shaped)).to(patches.dtype)
        return self.without_prompts(output, got.prefix, patches, prompts=count)

    def _propagated(self, call: Call, geometry: GeometryAwareAdapter, got: BlockTokens) -> Tensor:
        """The patches with what the centres propagate to them."""
        count, among = got.prompts.shape[1], self.consistent and got.prompts.shape[1] > 0
        ahead = call.state(f"stage_{self.number}", ShapeState).prompt_coordinates if among else None
        near, propagate = neighbourhoods(
            call.forward, self.number, self.centre_ratio, self.neighbours, ahead, owner=(call.adapter, self.tuner)
        )
        if among:
            tokens = torch.cat([got.prompts, got.patches], dim=1)
        else:  # the last patches replaced by the prompts, as far as there are any
            g = got.patches.shape[1]
            tokens = torch.cat([got.patches[:, : max(0, g - count)], got.prompts[:, :g]], dim=1)
        recomputing = call.forward.recomputing
        pooled = twice_the_maximum(tokens, near)
        propagated: Tensor = geometry(got.patches, tokens, near, propagate(), pooled, recomputing=recomputing)
        return propagated

    def _shape(self, call: Call) -> Tensor:
        """The shape (b, c) of the clouds."""
        key = call.adapter, self.tuner, f"shape for stage {self.number}"
        taken = call.forward.handover.take(key, call.path)
        if taken is None:
            raise AdapterError(
                f"block '{call.path}' gets prompts with the shape of the cloud, which GA_PROMPT makes when that is "
                "grouped, and in this forward none was: call the model, or a method that groups the cloud too"
            )
        # Left again, which is refused where a block runs without the gradient that it needs.
        call.forward.handover.leave(key, taken)
        return taken

    def _note(self, call: Call) -> tuple[str, int, str]:
        return call.adapter, self.tuner, f"shape at {call.path}"
