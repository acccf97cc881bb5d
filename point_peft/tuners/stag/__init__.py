"""STAG: a narrow graph network runs beside the frozen backbone and displaces the tokens of its later blocks.

T. Furuya: "Token Adaptation via Side Graph Convolution for Efficient Fine-tuning of 3D Point Cloud Transformers", 2025,
https://arxiv.org/abs/2502.14142

At every block l, with prefix tokens z and patch tokens t at coordinates c (positions are not in t), side tokens s start
at zero:

    s   <- s + D t                                          ahead of the block: c -> w, w = 192
    t   <- Block(z, t)
    s_i <- W (W_1 s_i + max_j W_2 s_j)                      after it, l >= L/2: j are the 8 nearest of c_i, itself too
    v   =  g relu(U s)                                      w -> c
    t   <- t + v,   z <- z + mean v

"std" has one D and one graph module (W_1, W_2, W, U) for all blocks. "sl", slightly large, has a D for every three
blocks and a graph module for every two.

When to use it: where memory and time of training are short. Nothing before the first displacement needs a gradient
through the backbone, so the first half of the blocks is run forward only. It needs coordinates, but no prompts.

Deviations from the published code, each with its reason:

- `init="identity"` (the default) multiplies each graph module's displacement by a learned gate g that starts at zero:
  a fresh adapter is the backbone, for one parameter a graph module more than published (1 in "std", 3 in "sl" on 12
  blocks). An up-projection of zero would not do: relu has no gradient there, and nothing would ever be trained.
  `init="published"` has no gate.
- The base's own head is the default. The published one, `heads={...: "raw_mean"}`, pools the mean over all tokens ahead
  of the final norm.
- Which blocks have a graph module is written down for 12 blocks; in others it is the second half. Where stages differ
  in their tokens, each has side tokens of its own, as far as a block of it is displaced.
- W_2 is taken once per token and then gathered, and the maximum is taken before W_1 s_i is added to it, which does not
  depend on j: the result is the same.
- Packed tokens (PTv3 and the like) find their neighbours within their sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Block, Stage
from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, SharedState
from point_peft.parts.sequence import SequencePart, check_located
from point_peft.running.forward import Forward
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, Limit

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
        late = [number for number, _ in numbered if number >= first]
        graph = {number: str(number - (number - first) % GRAPH_GROUP if large else first) for number in late}
        prefix, gated = "stag" if index == 0 else f"stag.stage_{index}", self.init == "identity"
        downs, graphs = dict.fromkeys(down.values()), dict.fromkeys(graph.values())
        plan.shared[f"stage_{index}"] = SideNetwork(prefix, stage.width, self.width, downs, graphs, gated=gated)
        paths = [block.path for block in stage.blocks]
        places = [paths.index(block.path) for _, block in numbered]
        for place, (number, block) in zip(places, numbered, strict=True):
            begins, follows = place == places[0], place == 0 or place - 1 in places
            layers = down[number], graph.get(number)
            part = SidePart(stage, index, *layers, self.neighbours, begins=begins, follows=follows)
            plan.parts.append((block.path, part))


class SidePart(SequencePart):
    """s <- s + D t ahead of a block; after it a step of the side tokens s, and their displacement, where it has one."""

    def __init__(
        self, stage: Stage, number: int, down: str, graph: str | None, neighbours: int, *, begins: bool, follows: bool
    ) -> None:
        super().__init__(stage, number)
        self.down = down
        self.graph = graph
        self.neighbours = neighbours
        self.begins = begins
        """True where the side tokens of the stage start."""
        self.follows = follows
        """True if what comes before it is known without the positions that the base adds: the block before has a part,
        or there is none."""

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        forward = call.forward
        side = self.handed(call, "side tokens", begins=self.begins)
        network = call.state(f"stage_{self.number}", SideNetwork)
        added = network.down[self.down](self._tokens(call, self.received(call, args, kwargs).patches, side is None))
        side = added if side is None else side + added
        if self.graph is None:
            forward.handover.leave(self.key(call, f"side tokens of stage {self.number}"), side, call.path)
        else:
            forward.handover.notes[call.adapter, "stag", call.path] = side
        return args, kwargs

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        tokens = self.returned(call, output)
        prefix, patches = tokens.prefix, tokens.patches
        if self.graph is not None:
            module = call.state(f"stage_{self.number}", SideNetwork).graph[self.graph]
            assert isinstance(module, GraphModule)
            near = neighbours(call.forward, self.number, self.neighbours)
            side, displaced = module(call.forward.handover.notes.pop((call.adapter, "stag", call.path)), near)
            call.forward.handover.leave(self.key(call, f"side tokens of stage {self.number}"), side, call.path)
            displaced = displaced.to(patches.dtype)
            prefix, patches = prefix + displaced.mean(dim=1, keepdim=True), patches + displaced
            output = self.without_prompts(output, prefix, patches)
        if self.stage.position == "every_block":
            call.forward.handover.leave(self.key(call, f"tokens of stage {self.number}"), patches, call.path)
        return output

    def _tokens(self, call: Call, received: Tensor, first: bool) -> Tensor:
        """The patch tokens ahead of the block, without positions where the base has just added them."""
        tokens = None
        if self.follows and first:
            tokens = call.forward.seen.patches.get(self.number)
        elif self.follows and self.stage.position == "every_block":
            tokens = call.forward.handover.take(self.key(call, f"tokens of stage {self.number}"), call.path)
        # What a stage gets need not be its patch embedding as it was: a model may mask tokens.
        return received if tokens is None or tokens.shape != received.shape else tokens.to(received.dtype)


class SideNetwork(SharedState):
    """The down-projections and graph modules that the blocks of one stage share, by the number of their first block."""

    def __init__(
        self, prefix: str, channels: int, width: int, down: Iterable[str], graph: Iterable[str], *, gated: bool
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.down = nn.ModuleDict({name: nn.Linear(channels, width) for name in down})
        self.graph = nn.ModuleDict({name: GraphModule(channels, width, gated=gated) for name in graph})


class GraphModule(nn.Module):
    """One step of the side tokens among their neighbours, and what they displace the backbone's tokens by."""

    def __init__(self, channels: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)
        self.neighbour = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, channels)
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, side: Tensor, neighbour: Tensor) -> tuple[Tensor, Tensor]:
        """Side tokens (b, g, w) after the step, and displacements (b, g, c); `neighbour` (b, g, k) are indices."""
        # Unlike amax, max keeps only the indices for the backward pass.
        near = geometry.gather(self.neighbour(side), neighbour).max(dim=2).values
        side = self.mix(self.own(side) + near)
        displaced = nn.functional.relu(self.up(side))
        return side, displaced if self.gate is None else self.gate * displaced


def neighbours(forward: Forward, stage: int, k: int) -> Tensor:
    """Indices (b, g, k) of the patch tokens nearest to each, or packed (1, n, k); once per forward."""
    points = forward.seen.coordinates[stage]
    if stage in forward.seen.samples:
        return forward.once(("stag", stage, k), lambda: _packed(points, forward.seen.samples[stage], k))
    return forward.once(("stag", stage, k), lambda: geometry.knn(points, points, min(k, points.shape[1])))


def _packed(points: Tensor, samples: Tensor, k: int) -> Tensor:
    order, ends = geometry.gathered(samples, len(points))
    points = points.detach()[order]
    nearest = order[geometry.ragged_knn(points, ends, points, ends, k)]
    return nearest[order.argsort()][None]
