"""The configuration of STAG and how its side network runs along the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from point_peft.anatomy.description import Block, Stage
from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.sequence import check_located
from point_peft.schema import Count, Limit
from point_peft.tuners.stag.parts import SidePart
from point_peft.tuners.stag.side_network import SideNetwork

# Blocks that share a down-projection and blocks that share a graph module, where not all of them do.
DOWN_GROUP = 3
GRAPH_GROUP = 2


@dataclass(frozen=True, kw_only=True)
class STAGConfig(TunerConfig):
    """STAG; `target_modules` and the like choose the blocks that give tokens to the side network, None means all."""

    method: ClassVar[str] = "STAG"

    size: Literal["std", "sl"] = "std"
    """Standard: the same modules at all blocks. Slightly large: a down-projection for three blocks each, and a graph
    module for two."""
    width: Count = 192
    """The channels w of the side tokens."""
    neighbours: Count = 8
    """Tokens in a neighbourhood, itself among them; at most as many as there are."""
    first_graph_layer: Annotated[int | None, Limit("a block number from 0, or None", lambda number: number >= 0)] = None
    """The number of the first block that the side network displaces tokens after; None: half the number of blocks."""
    init: Literal["identity", "published"] = "identity"

    @property
    def identity_at_init(self) -> bool:
        return self.init == "identity"

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        chosen = self.chosen_blocks(backbone)
        first = len(anatomy.blocks) // 2 if self.first_graph_layer is None else self.first_graph_layer
        if chosen[-1][0] < first:
            raise AnatomyError(
                f"{self.method} displaces tokens after the blocks from {first} on, and the last of those that are "
                f"adapted is {chosen[-1][0]}: set first_graph_layer to at most that"
            )
        plan = Blueprint()
        for index, stage in enumerate(anatomy.stages):
            numbered = [(number, block) for number, block in chosen if block in stage.blocks]
            # A stage that is not displaced has no use for side tokens: those of one stage do not fit the next.
            if numbered and numbered[-1][0] >= first:
                self._build_stage(plan, index, stage, numbered, first)
        return plan

    def _build_stage(
        self, plan: Blueprint, index: int, stage: Stage, numbered: Sequence[tuple[int, Block]], first: int
    ) -> None:
        check_located(stage, self.method, stage.blocks[0].path)
        large = self.size == "sl"
        down = {number: str(number - number % DOWN_GROUP if large else 0) for number, _ in numbered}
        graph = {
            number: str(number - (number - first) % GRAPH_GROUP if large else first)
            for number, _ in numbered
            if number >= first
        }
        plan.shared[f"stage_{index}"] = SideNetwork(
            "stag" if index == 0 else f"stag.stage_{index}",
            stage.width,
            self.width,
            dict.fromkeys(down.values()),
            dict.fromkeys(graph.values()),
            gated=self.init == "identity",
        )
        paths = [block.path for block in stage.blocks]
        places = [paths.index(block.path) for _, block in numbered]
        for place, (number, block) in zip(places, numbered, strict=True):
            part = SidePart(
                stage,
                index,
                down=down[number],
                graph=graph.get(number),
                neighbours=self.neighbours,
                begins=place == places[0],
                follows=place == 0 or place - 1 in places,
            )
            plan.parts.append((block.path, part))
