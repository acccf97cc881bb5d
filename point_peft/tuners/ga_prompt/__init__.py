"""GAPrompt: prompts among the points of the cloud and among its tokens, led by a small network that sees its shape.

Z. Ai, Z. Liu, Y. Lei, Z. Cui, X. Zou, J. Zhou: "GAPrompt: Geometry-Aware Point Cloud Prompt for 3D Vision Model",
ICML 2025, https://arxiv.org/abs/2505.04119

A small PointNet++, the shift net, sees the cloud X before it is grouped. It moves every point, and its code of the
whole cloud becomes the shape z, one vector. Five learned points P join the cloud. So the tokens t, at coordinates c,
are those of another cloud:

    f, code = shift net(X)                      sin and cos of the coordinates, two levels of pooling, and back
    X <- [X + 0.8 f X; 5 P]                     products of coordinates
    z = MLP(code)

At every block, the first six with prompts p of learned embeddings E and coordinates Q:

    p = E + 0.5 z + pos(Q)                      pos: the backbone's own positional embedding
    [x; p; t] <- Block([x; p; t])
    U = [p; t] at [Q; c], or t at c             without prompts
    v_j = GELU(BN(2 max N_j)) + 0.3 U_j         N_j: the 16 nearest of a centre j, farthest point sampling
    t_i <- t_i + 0.3 sum_j w_ij v_j             w_ij = (1 / d_ij^2) / sum over all centres
    t <- t + 0.7 A_16(LN(t + 0.5 z))            without prompts: LN(t); then the prompts are taken out

The prefix tokens and their positions are trained too. The backbone's own head is the default. The published head pools
the shape beside the tokens: `heads={"cls_head_finetune": "cls+max+feature"}`.

When to use it: for classification where the cloud itself may be changed, as of scans that differ from those of the
pre-training. A training step costs as much as full fine-tuning's, because the gradient goes back through the tokenizer
to the cloud. `shift=False, point_prompts=0` leaves the cloud alone.

The learned points get a gradient only through groups that hold them. The published 64 or 128 groups of 32 cover a cloud
of 1,024 points, and do; 12 groups of 8 see a tenth of it, and seldom do. The first training step warns of that:
`point_prompt_init=0.2` then starts the points all over the cloud. It is no default, because such points, unlike those
around the origin, change much of what the frozen backbone makes of a cloud.

Deviations from the published code, each with its reason:

- `geometry="consistent"` (the default): prompts have the coordinates Q, and neighbours are gathered per sample. All
  published configurations gather across samples, so that a sample's output depended on its batch mates.
  `geometry="replacement"` is the published variant without that: prompts in the place of the last tokens.
- `init="identity"` (the default) starts the shift and the up-projections at zero and multiplies what is propagated by
  a learned gate that starts at zero, one scalar a block (12 parameters in Point-MAE). A fresh adapter is then the
  backbone with its prompts. `init="published"` has no gate.
- No parameters exist that the forward cannot reach: 27,660 of the 262,308 published in Point-MAE (the prompts of blocks
  that get none, and an unused scale in every adapter).
- The shift net's layers act on every point once, ahead of the pooling, not on every copy of it in a neighbourhood. That
  is the same function; in training, BatchNorm sees each point once. There is no dropout in its MLPs.
- Of fewer points than centres or neighbours, the shift net takes all; its code ends in zeros.
- Colours and the like that are grouped with the points have their mean at the learned points.
- Prompts have no positions where the backbone's positions are not made of coordinates alone. A backbone of several
  stages has coordinates and a shape for the prompts of each.
- Where the prediction is made from the prefix tokens alone, nothing acts on the last block's patches.
"""

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Anatomy, Block, Stage, Tap
from point_peft.config import TunerConfig
from point_peft.errors import AdapterError, AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, Part, SharedState
from point_peft.parts.batch_norm import batch_norm
from point_peft.parts.bottleneck import Bottleneck, quick_bottleneck
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.propagation import GeometryAwareAdapter, neighbourhoods
from point_peft.parts.second_grouping import run_apart, values_read
from point_peft.parts.sequence import BlockTokens, SequencePart, check_located, check_takes_prompts, small_normal
from point_peft.running.nested import Args, Kwargs, all_arguments, fetch_argument, put_argument
from point_peft.schema import Count, Dropout, Factor, Limit, at_least

Geometry = Literal["consistent", "replacement"]


FREQUENCIES = 4
# Channels of one centre of the second level in the code, and the channels inside.
CODE_CHANNELS = 8
FIRST_LEVEL = (64, 32, 64)
SECOND_LEVEL = (64, 32, CODE_CHANNELS)
TO_FIRST_LEVEL = (64, 32)
TO_POINTS = (32, 32)
SHIFT_WIDTH = 64
# How many centres features are interpolated from, and the guard against a distance of zero.
SOURCES = 32
GUARD = 1e-4


def encode(points: Tensor) -> Tensor:
    """[x, sin x, cos x, sin 2x, cos 2x, ..., cos 8x] of points (b, n, 3), as (b, n, 27)."""
    angles = points[:, :, None] * 2.0 ** torch.arange(FREQUENCIES, dtype=points.dtype, device=points.device)[:, None]
    waves = torch.stack([angles.sin(), angles.cos()], dim=3)
    return torch.cat([points, rearrange(waves, "b n f wave xyz -> b n (f wave xyz)")], dim=2)


class PointMlp(nn.Module):
    """Linear layers with BatchNorm and ReLU on each point's features (b, n, c)."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(*pair) for pair in pairwise((inputs, *widths)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(self, features: Tensor, *, recomputing: bool) -> Tensor:
        rows = rearrange(features, "b n c -> (b n) c")
        for linear, norm in zip(self.linears, self.norms, strict=True):
            rows = nn.functional.relu(batch_norm(norm, linear(rows), recomputing=recomputing))
        return rearrange(rows, "(b n) c -> b n c", n=features.shape[1])


class ShiftNet(nn.Module):
    """Two levels of pooling, two of interpolation back to the points, and a shift of each from its features."""

    def __init__(self, centres: int, neighbours: int, *, identity: bool) -> None:
        super().__init__()
        self.centres = centres
        self.neighbours = neighbours
        inputs = 3 + 6 * FREQUENCIES
        self.first_level = PointMlp(inputs, FIRST_LEVEL)
        self.second_level = PointMlp(FIRST_LEVEL[-1], SECOND_LEVEL)
        self.to_first_level = PointMlp(FIRST_LEVEL[-1] + SECOND_LEVEL[-1], TO_FIRST_LEVEL)
        self.to_points = PointMlp(inputs + TO_FIRST_LEVEL[-1], TO_POINTS)
        last = nn.Linear(SHIFT_WIDTH, 3)
        if identity:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.shift = nn.Sequential(nn.Linear(TO_POINTS[-1], SHIFT_WIDTH), nn.ReLU(), last)

    @property
    def code_width(self) -> int:
        """The channels of the code."""
        return self.centres // 2 * CODE_CHANNELS

    def forward(self, points: Tensor, *, recomputing: bool) -> tuple[Tensor, Tensor]:
        """Shifts (b, n, 3) of points (b, n, 3) and the code (b, w) of their shape.

        A cloud of fewer points than centres has a code that ends in zeros.
        """
        encoded = encode(points)
        first, near = _level(points, self.centres, self.neighbours)
        features = _pool(self.first_level(encoded, recomputing=recomputing), near)
        second, near = _level(first, self.centres // 2, self.neighbours // 2)
        coarse = _pool(self.second_level(features, recomputing=recomputing), near)
        code = rearrange(coarse, "b s c -> b (s c)")
        back = torch.cat([features, _interpolate(coarse, second, first)], dim=2)
        back = _interpolate(self.to_first_level(back, recomputing=recomputing), first, points)
        back = self.to_points(torch.cat([encoded, back], dim=2), recomputing=recomputing)
        return self.shift(back), nn.functional.pad(code, (0, self.code_width - code.shape[1]))


def _level(points: Tensor, centres: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Centres (b, s, 3) among points (b, n, 3), and the indices (b, s, k) of the points nearest to each."""
    n = points.shape[1]
    chosen = geometry.gather(points, geometry.farthest_point_sample(points, min(centres, n)))
    return chosen, geometry.knn(chosen, points, min(neighbours, n))


def _pool(features: Tensor, near: Tensor) -> Tensor:
    """The maximum (b, s, c) of features (b, n, c) over neighbourhoods (b, s, k)."""
    # Unlike amax, max keeps only the indices for the backward pass.
    return geometry.gather(features, near).max(dim=2).values


def _interpolate(features: Tensor, sources: Tensor, queries: Tensor) -> Tensor:
    k = min(SOURCES, sources.shape[1])
    return geometry.nearest_interpolate(features, sources, queries, k, GUARD)


@dataclass(frozen=True, kw_only=True)
class GAPromptConfig(TunerConfig):
    """GAPrompt with its published constants. `target_modules` and the like choose among the transformer blocks."""

    method: ClassVar[str] = "GA_PROMPT"

    num_prompts: Annotated[int, at_least(0)] = 10
    """Prompts p that each of the prompt layers gets."""
    prompt_layers: Annotated[int, at_least(0)] = 6
    """The number of adapted blocks that get prompts, counted from the first."""
    shift: bool = True
    """Let a shift net move the points of the cloud and give its shape to prompts and adapters."""
    shift_scale: Factor = 0.8
    shift_centres: Annotated[int, at_least(2)] = 128
    """Centres of the shift net's first level, half as many of its second: as many as the backbone has tokens."""
    shift_neighbours: Annotated[int, at_least(2)] = 32
    """Points in a neighbourhood of its first level, half as many of its second."""
    shape_width: Count = 16
    shape_scale: Factor = 0.5
    point_prompts: Annotated[int, at_least(0)] = 5
    """Learned points that join the cloud."""
    point_prompt_factor: Factor = 5.0
    """Their factor, by which they learn faster."""
    point_prompt_init: Factor = 0.01
    """They start at random within so much of the origin along each axis, before the factor. They learn while groups of
    points hold them, and a warning says if none does: 0.2 spreads them over a cloud in the unit sphere."""
    adapter_width: Count = 16
    adapter_dropout: Dropout = 0.1
    adapter_scale: Factor = 0.7
    centre_ratio: Annotated[float, Limit("more than 0 and at most 1", lambda ratio: 0 < ratio <= 1)] = 0.5
    """Centres of neighbourhoods per patch token."""
    neighbours: Count = 16
    """Tokens in a neighbourhood, at most as many as there are tokens."""
    propagation_scale: Annotated[float, at_least(0)] = 0.3
    centre_scale: Annotated[float, at_least(0)] = 0.3
    geometry: Geometry = "consistent"
    """Prompts are neighbours of patches by coordinates of their own, or "replacement": in the place of the last."""
    tuned_tokens: str | Sequence[str] | None = None
    """Prefix tokens and positions that are trained; None: all."""
    init: Literal["identity", "published"] = "identity"

    @property
    def identity_at_init(self) -> bool:
        """A fresh adapter is the backbone with its prompts, among the tokens and among the points."""
        without = self.num_prompts == 0 or self.prompt_layers == 0
        return self.init == "identity" and without and self.point_prompts == 0

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        chosen = [block for _, block in self.chosen_blocks(backbone)]
        prompted = chosen[: self.prompt_layers] if self.num_prompts else []
        last, plan = len(anatomy.stages) - 1, Blueprint()
        feature = last if self.shift and "feature" in backbone.pooled else None
        shapes: list[int] = []
        shift_net = None
        if self.shift:
            shift_net = ShiftNet(self.shift_centres, self.shift_neighbours, identity=self.init == "identity")
        for index, stage in enumerate(anatomy.stages):
            blocks = [block for block in chosen if block in stage.blocks]
            with_prompts = [block for block in prompted if block in blocks]
            shape = None
            if shift_net is not None and (with_prompts or index == feature):
                hidden = nn.Linear(shift_net.code_width, self.shape_width)
                shape = nn.Sequential(hidden, nn.GELU(), nn.Linear(self.shape_width, stage.width))
                shapes.append(index)
            places = self._build_blocks(plan, anatomy, index, blocks, with_prompts)
            if places or shape is not None:
                prefix = "ga_prompt" if index == 0 else f"ga_prompt.stage_{index}"
                plan.shared[f"stage_{index}"] = ShapeState(prefix, self.num_prompts if places else 0, shape)
        if self.shift or self.point_prompts:
            cloud = self._cloud_tap(backbone)
            plan.parts.append((cloud.module, CloudPart(cloud, shift_net, self, tuple(shapes), feature)))
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan

    def _cloud_tap(self, backbone: Backbone) -> Tap:
        """Where the cloud can be changed before it is grouped."""
        stage = backbone.known_anatomy(self.method).stages[0]
        tap = stage.points
        # A model that groups in its own forward may need the cloud as it was, for a label of every point.
        if tap is None or tap.side != "input" or not tap.module:
            raise AnatomyError(
                f"{self.method} changes the cloud before it is grouped, and no module is known that is given the "
                "cloud and groups it: set shift=False and point_prompts=0 to keep its prompts among the tokens, or "
                "state it in config.anatomy (Stage.points)"
            )
        values = values_read(backbone, stage) if stage.tokenizer else 3
        if values != 3 and _takes_one_tensor(backbone.modules[tap.module]):
            raise AnatomyError(
                f"{self.method} changes clouds (b, n, 3), and those that '{tap.module}' is given hold {values} values "
                f"of a point, which '{stage.tokenizer[0]}' reads: set shift=False and point_prompts=0"
            )
        return tap

    def _build_blocks(
        self, plan: Blueprint, anatomy: Anatomy, index: int, blocks: Sequence[Block], prompted: Sequence[Block]
    ) -> bool:
        """Add the parts of the blocks of a stage; returns whether its prompts have coordinates that something reads."""
        stage = anatomy.stages[index]
        if blocks and stage.layout == "packed":
            raise AnatomyError(
                f"{self.method} puts prompts into the cloud and among its tokens, and the tokens of '{blocks[0].path}' "
                "are packed, which have no place for either: use POINT_PEFT, which does without, or POINT_GST"
            )
        if prompted:
            check_takes_prompts(stage, self.method, "Set num_prompts=0, or use LORA, SSF or BOTTLENECK")
        if blocks:
            check_located(stage, self.method, blocks[0].path)
        # Where the prediction is made from the prefix tokens alone, nothing reads the last block's patches.
        unread = None if anatomy.patches_read else anatomy.blocks[-1]
        for block in blocks:
            if block == unread and block not in prompted:
                continue
            part = ShapedPart(stage, index, self, prompts=block in prompted, propagates=block != unread)
            plan.parts.append((block.path, part))
        among = self.geometry == "consistent" and any(block != unread for block in prompted)
        return among or (bool(prompted) and stage.position_embedding is not None)


def _takes_one_tensor(module: nn.Module) -> bool:
    """Tell whether nothing can be given to a module beside its first argument."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return len(kinds) == 1 and kinds[0] is inspect.Parameter.POSITIONAL_OR_KEYWORD


class ShapeState(SharedState):
    """State of the blocks of one stage: where the prompts lie, and the MLP that makes the shape of the code."""

    token_parameters = frozenset({"prompt_coordinates"})

    def __init__(self, prefix: str, prompts: int, shape: nn.Sequential | None) -> None:
        super().__init__()
        self.prefix = prefix
        self.prompt_coordinates = small_normal(prompts, 3) if prompts else None
        self.shape = shape


class CloudPart(Part):
    """Ahead of the grouping: x <- x + scale * shift(x) * x for all points, then point prompts behind them.

    Of what is grouped beside the points, such as colours, the point prompts have the mean. The code of the shift net
    becomes the shapes that blocks and heads take.
    """

    prefix = "ga_prompt"
    token_parameters = frozenset({"point_prompts"})

    def __init__(
        self, tap: Tap, shift_net: ShiftNet | None, config: GAPromptConfig, shapes: tuple[int, ...], feature: int | None
    ) -> None:
        super().__init__()
        self.tap = tap
        self.shift_net = shift_net
        self.shift_scale = config.shift_scale
        prompts = config.point_prompts
        reach = config.point_prompt_init
        self.point_prompts = nn.Parameter(torch.empty(prompts, 3).uniform_(-reach, reach)) if prompts else None
        self.factor = config.point_prompt_factor
        self.looked = False
        """True once it was looked whether the point prompts learn."""
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
            raise AnatomyError(
                f"the {self.tap} should be clouds (b, n, 3) that GA_PROMPT can change; it is {got}: set shift=False "
                "and point_prompts=0"
            )
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
        cloud = torch.cat([points, prompts], dim=1)
        if not torch.compiler.is_compiling() and self.training and cloud.requires_grad and not self.looked:
            cloud.register_hook(self._look)  # type: ignore[no-untyped-call]
        return cloud

    def _look(self, gradient: Tensor) -> None:
        """Warn, once, where a gradient (b, n + p, 3) reaches points of the clouds and none of the p prompts."""
        assert self.point_prompts is not None
        if not self.looked and gradient.any() and not gradient[:, -self.point_prompts.shape[0] :].any():
            warnings.warn(
                f"the point prompts of GA_PROMPT do not learn in the first step: no group of points that "
                f"'{self.tap.module}' made holds one of them. Where groups leave much of a cloud out, set "
                "point_prompt_init=0.2, which starts them all over a cloud in the unit sphere, or point_prompts=0",
                stacklevel=2,
            )
        self.looked = True

    def _leave_shapes(self, call: Call, code: Tensor) -> None:
        for stage in self.shapes:
            shape = call.state(f"stage_{stage}", ShapeState).shape
            assert shape is not None
            made = shape(code)
            call.forward.handover.leave(self.key(call, f"shape for stage {stage}"), made, call.path)
            if stage == self.feature:
                call.forward.handover.leave(self.key(call, "feature"), made, call.path)

    def _with_means(self, value: Tensor) -> Tensor:
        assert self.point_prompts is not None
        mean = value.mean(dim=1, keepdim=True, dtype=None if value.is_floating_point() else torch.float32)
        return torch.cat([value, mean.to(value.dtype).expand(-1, self.point_prompts.shape[0], -1)], dim=1)


class ShapedPart(SequencePart):
    """Prompts go in before the block; propagation and A act on the patches after it; then the prompts come out."""

    prefix = "ga_prompt"
    token_parameters = frozenset({"embeddings"})

    def __init__(self, stage: Stage, number: int, config: GAPromptConfig, *, prompts: bool, propagates: bool) -> None:
        super().__init__(stage, number)
        self.config = config
        self.embeddings = small_normal(config.num_prompts, stage.width) if prompts else None
        self.norm: nn.LayerNorm | None = None
        self.adapter: Bottleneck | None = None
        self.geometry: GeometryAwareAdapter | None = None
        if propagates:
            c, identity = stage.width, config.init == "identity"
            scale, centre = config.propagation_scale, config.centre_scale
            self.norm = nn.LayerNorm(c)
            self.adapter = quick_bottleneck(c, config.adapter_width, config.adapter_dropout, identity=identity)
            self.geometry = GeometryAwareAdapter(c, batch_norm=True, scale=scale, centre_scale=centre, gated=identity)

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.embeddings is None:
            return args, kwargs
        prompts: Tensor = repeat(self.embeddings, "p c -> b p c", b=self.coordinates(call).shape[0])
        if self.stage.position_embedding is not None:
            places = call.state(f"stage_{self.number}", ShapeState).prompt_coordinates
            assert places is not None
            prompts = prompts + run_apart(call.forward, [self.stage.position_embedding], places[None])
        if self.config.shift:
            shape = rearrange(self.config.shape_scale * self._shape(call), "b c -> b 1 c")
            call.forward.handover.notes[self.key(call, f"shape at {call.path}")] = shape
            prompts = prompts + shape
        return self.with_prompts(call, args, kwargs, prompts)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        count = 0 if self.embeddings is None else self.embeddings.shape[0]
        got = self.returned(call, output, prompts=count)
        patches = got.patches if self.geometry is None else self._propagated(call, self.geometry, got)
        shape = call.forward.handover.notes.pop(self.key(call, f"shape at {call.path}"), None)
        # A acts on every token by itself, so the prompts, which end here, need not pass through it.
        if self.adapter is not None and self.norm is not None:
            shaped = patches if shape is None else patches + shape
            patches = patches + self.config.adapter_scale * self.adapter(self.norm(shaped)).to(patches.dtype)
        return self.without_prompts(output, got.prefix, patches, prompts=count)

    def _propagated(self, call: Call, adapter: GeometryAwareAdapter, got: BlockTokens) -> Tensor:
        """The patches with what the centres propagate to them."""
        config, count = self.config, got.prompts.shape[1]
        among = config.geometry == "consistent" and count > 0
        ahead = call.state(f"stage_{self.number}", ShapeState).prompt_coordinates if among else None
        near, reach = neighbourhoods(
            call.forward, self.number, config.centre_ratio, config.neighbours, ahead, owner=(call.adapter, self.tuner)
        )
        if among:
            tokens = got.located
        else:  # the last patches replaced by the prompts, as far as there are any
            g = got.patches.shape[1]
            tokens = torch.cat([got.patches[:, : max(0, g - count)], got.prompts[:, :g]], dim=1)
        # 2 max N_j, (b, s, c): each is added to itself, as published.
        pooled = 2.0 * reduce(geometry.gather(tokens, near.neighbour), "b s k c -> b s c", "max")
        recomputing = call.forward.recomputing
        propagated: Tensor = adapter(got.patches, tokens, near, reach(ahead), pooled, recomputing=recomputing)
        return propagated

    def _shape(self, call: Call) -> Tensor:
        """The shape (b, c) of the clouds."""
        key = self.key(call, f"shape for stage {self.number}")
        taken = call.forward.handover.take(key, call.path)
        if taken is None:
            raise AdapterError(
                f"block '{call.path}' gets prompts with the shape of the cloud, which GA_PROMPT makes when that is "
                "grouped, and in this forward none was: call the model, or a method that groups the cloud too"
            )
        # Left again, which is refused where a block runs without the gradient that it needs.
        call.forward.handover.leave(key, taken, call.path)
        return taken
