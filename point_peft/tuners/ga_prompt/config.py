"""The configuration of GAPrompt and how it lays its parts out over a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from point_peft.anatomy.description import Anatomy, Block, Tap
from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.propagation import GeometryAwareAdapter
from point_peft.parts.quick_bottleneck import quick_bottleneck
from point_peft.parts.sequence import check_located, check_takes_prompts
from point_peft.schema import Count, Dropout, Factor, Limit, at_least
from point_peft.tuners.ga_prompt.parts import CloudPart, Geometry, ShapedPart, ShapeState, shape_mlp
from point_peft.tuners.ga_prompt.shift_net import ShiftNet


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
                shape = shape_mlp(shift_net.code_width, self.shape_width, stage.width)
                shapes.append(index)
            places = self._build_blocks(plan, anatomy, index, blocks, with_prompts)
            if places or shape is not None:
                prefix = "ga_prompt" if index == 0 else f"ga_prompt.stage_{index}"
                plan.shared[f"stage_{index}"] = ShapeState(prefix, self.num_prompts if places else 0, shape)
        if self.shift or self.point_prompts:
            cloud, prompts, factor = self._cloud_tap(anatomy), self.point_prompts, self.point_prompt_factor
            part = CloudPart(cloud, shift_net, self.shift_scale, prompts, factor, tuple(shapes), feature)
            plan.parts.append((cloud.module, part))
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan

    def _cloud_tap(self, anatomy: Anatomy) -> Tap:
        """Where the cloud can be changed before it is grouped."""
        tap = anatomy.stages[0].points
        # A model that groups in its own forward may need the cloud as it was, for a label of every point.
        if tap is None or tap.side != "input" or not tap.module:
            raise AnatomyError(
                f"{self.method} changes the cloud before it is grouped, and no module is known that is given the "
                "cloud and groups it: set shift=False and point_prompts=0 to keep its prompts among the tokens, or "
                "state it in config.anatomy (Stage.points)"
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
                "are packed, which have no place for either: use POINT_PEFT with num_prompts=0 or POINT_GST"
            )
        if prompted:
            check_takes_prompts(
                stage, self.method, "Set num_prompts=0 to keep its propagation, or use LORA, SSF or BOTTLENECK"
            )
        if blocks:
            check_located(stage, self.method, blocks[0].path)
        # Where the prediction is made from the prefix tokens alone, nothing reads the last block's patches.
        unread = None if anatomy.patches_read else anatomy.blocks[-1]
        identity = self.init == "identity"
        for block in blocks:
            if block == unread and block not in prompted:
                continue
            reads = block != unread
            part = ShapedPart(
                stage,
                index,
                prompts=self.num_prompts if block in prompted else 0,
                shape_scale=self.shape_scale if self.shift else 0.0,
                adapter=quick_bottleneck(stage.width, self.adapter_width, self.adapter_dropout, identity=identity)
                if reads
                else None,
                adapter_scale=self.adapter_scale,
                geometry=GeometryAwareAdapter(
                    stage.width,
                    batch_norm=True,
                    scale=self.propagation_scale,
                    centre_scale=self.centre_scale,
                    gated=identity,
                )
                if reads
                else None,
                geometry_kind=self.geometry,
                centre_ratio=self.centre_ratio,
                neighbours=self.neighbours,
            )
            plan.parts.append((block.path, part))
        among = self.geometry == "consistent" and any(block != unread for block in prompted)
        return among or (bool(prompted) and stage.position_embedding is not None)
