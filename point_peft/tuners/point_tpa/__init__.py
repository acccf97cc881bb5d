"""PointTPA: a bottleneck beside the MLP whose weights are, in some blocks, mixed anew for each region of a scene.

S. Liu, C. Zheng, X. Zhou, T. Feng, D. Liang, X. Bai: "PointTPA: Dynamic Network Parameter Adaptation for 3D Scene
Understanding", CVPR 2026, https://arxiv.org/abs/2604.04933

With tokens x after the attention and y after the block, in every block:

    u = LN(x)
    y <- y + W_up relu(D(u)) + b_up                 c -> m -> c
    D(u) = W u + b                                  in most blocks
    D(u) = (sum_k a_jk W_k) u + sum_k a_jk b_k      in the last block of each stage, for tokens of group j

The n tokens of a cloud are cut, along the curve of the block's own attention, into S groups of s = ceil(n / S) that
follow one another, the last of which may be shorter. The shares of the K banks come from the mean of a group:

    z_j = sum over group j of u / s
    a_j = softmax((V2 relu(V1 z_j) + c2) / 4)

W_up and b_up start at zero: a fresh adapter is the backbone. As published it has 1.1 % of the parameters of Sonata.

When to use it: for scenes on Point Transformer V3, Sonata and what is made like them, with thousands of tokens, parts
of which want other features than others. On single objects of some hundred tokens a group is a handful of tokens;
BOTTLENECK is the same without groups, at less time.

Deviations from the published code, each with its reason:

- A cloud is cut by its own length. Published, it is that of the longest cloud of the batch, so that a cloud's output
  depended on its batch mates.
- W_up is zero at the start, as written there, where a later initialisation of the whole model overwrites it.
- Where blocks are given no serial order, as on all dense backbones, the curve is one of ours: a Z-order curve through
  1,024 cells along the longest side of each cloud. It depends on the cloud alone.
- Prefix tokens (CLS and the like), which have no place on a curve, are one group more, with whatever other methods put
  into the sequence.
- The defaults, eight groups and two banks, are for some hundred tokens a cloud; `published()` has the paper's, for five
  stages from 10,000 to 100,000 tokens on.
- In a last group that is shorter the mean is divided by s all the same, as published, for files that were trained so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from einops import rearrange

from point_peft.anatomy.description import Block, Stage
from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call
from point_peft.parts.sequence import SequencePart, check_located, note_stream, noted_stream
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, Limit
from point_peft.tuners.point_tpa.adapter import ParameterAdapter
from point_peft.tuners.point_tpa.groups import Cut, Grouping, Groups, cloud_sizes, own_order, places_of, serial_order


def _each_at_least(least: int) -> Limit:
    def holds(value: int | Sequence[int]) -> bool:
        return value >= least if isinstance(value, int) else bool(value) and min(value) >= least

    return Limit(f"{least} or more, or a list of such numbers, one for each stage", holds)


@dataclass(frozen=True, kw_only=True)
class PointTPAConfig(TunerConfig):
    """PointTPA; `target_modules` and the like choose among the transformer blocks, None means all.

    A list has one number for each stage that has such a block.
    """

    method: ClassVar[str] = "POINT_TPA"

    width: Count = 64
    """The channels m in the middle."""
    banks: Annotated[int | Sequence[int], _each_at_least(2)] = 2
    """The weights K that a group's own are mixed of."""
    groups: Annotated[int | Sequence[int], _each_at_least(1)] = 8
    """Groups S that a cloud is cut into, or tokens of a group, as `grouping` says."""
    grouping: Grouping = "number"
    """Cut every cloud into `groups` groups, or into groups of `groups` tokens."""
    dynamic_blocks: Sequence[int] | None = None
    """Numbers, from 0, of the blocks with a projection for each group; None: the last of each stage."""
    dynamic_up: bool = False
    """Mix the up-projection of these blocks too, which the paper's results do without."""

    @classmethod
    def published(cls) -> PointTPAConfig:
        """The method as on Sonata: five stages, the first of which has most tokens."""
        return cls(banks=(4, 4, 2, 2, 2), groups=(200, 100, 50, 20, 10))

    def build(self, backbone: Backbone) -> Blueprint:
        stages = self.chosen_stages(backbone)
        dynamic = self._dynamic(backbone, [blocks for _, _, blocks in stages])
        banks = self._by_stage("banks", self.banks, len(stages))
        groups = self._by_stage("groups", self.groups, len(stages))
        plan = Blueprint()
        for (number, stage, blocks), k, s in zip(stages, banks, groups, strict=True):
            check_located(stage, self.method, blocks[0].path)
            for block in blocks:
                mixed = block.path in dynamic
                adapter = ParameterAdapter(
                    stage.width, self.width, k if mixed else None, dynamic_up=mixed and self.dynamic_up
                )
                cut = Cut(self.grouping, s) if mixed else None
                plan.parts.append((block.path, ParameterPart(stage, number, block, adapter, cut)))
                plan.parts.append(note_stream(block, self.method))
        return plan

    def _by_stage(self, name: str, value: int | Sequence[int], stages: int) -> Sequence[int]:
        """The value of a field as one number for each of so many stages."""
        values = [value] * stages if isinstance(value, int) else value
        if len(values) != stages:
            raise AnatomyError(
                f"{name} has {len(values)} numbers, and {stages} stages of the backbone have blocks that {self.method} "
                "adapts: state one number for each of them, or one for all"
            )
        return values

    def _dynamic(self, backbone: Backbone, stages: Sequence[Sequence[Block]]) -> set[str]:
        """Paths of the blocks with a dynamic projection."""
        if self.dynamic_blocks is None:
            return {blocks[-1].path for blocks in stages}
        chosen: Mapping[int, Block] = dict(self.chosen_blocks(backbone))
        for number in self.dynamic_blocks:
            if number not in chosen:
                raise AnatomyError(
                    f"dynamic_blocks: block {number} is not among those that {self.method} adapts: "
                    f"{', '.join(map(str, chosen))}"
                )
        return {chosen[number].path for number in self.dynamic_blocks}


class ParameterPart(SequencePart):
    """Adds to a block's output what the adapter makes of its tokens after the attention."""

    prefix = "point_tpa"

    def __init__(self, stage: Stage, number: int, block: Block, adapter: ParameterAdapter, cut: Cut | None) -> None:
        super().__init__(stage, number)
        self.adapter = adapter
        self.cut = cut
        """None where no projection depends on groups."""
        self.attention = (block.attention or block.path).removeprefix(block.path).removeprefix(".")
        """The path of the attention in the block; "" where the block is one itself."""

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.cut is not None and self.stage.layout == "packed":
            attention = call.module.get_submodule(self.attention)
            order = serial_order(self.stage, attention, call.path, args, kwargs)
            if order is None:
                order = own_order(call.forward, self.number)
            call.forward.handover.notes[self._order(call)] = order
        return args, kwargs

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        got = self.returned(call, output)
        stream, ahead = noted_stream(call, self, got), got.prefix.shape[1]
        change = self.adapter(rearrange(stream, "b l c -> (b l) c"), self._groups(call, ahead))
        change = rearrange(change.to(got.tokens.dtype), "(b l) c -> b l c", b=stream.shape[0])
        return self.without_prompts(output, got.prefix + change[:, :ahead], got.patches + change[:, ahead:])

    def _groups(self, call: Call, ahead: int) -> Groups | None:
        """The groups of the tokens of all clouds, of which `ahead` in each have no place in space."""
        if self.cut is None:
            return None
        if self.stage.layout == "packed":
            order = call.forward.handover.notes.pop(self._order(call))
            return self.cut.packed(order, cloud_sizes(call.forward, self.number))
        return self.cut.dense(places_of(call.forward, self.number), ahead)

    def _order(self, call: Call) -> tuple[str, int, str, str]:
        return (*self.key(call, "order"), call.path)
