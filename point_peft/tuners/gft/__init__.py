"""GFT: prompts stay in the sequence, and its blocks look again and again at one graph of the tokens that went in.

M. Dhakal, V. R. Dasari, R. Sunderraman, Y. Ding: "GFT: Graph Feature Tuning for Efficient Point Cloud Analysis",
WACV 2026, https://arxiv.org/abs/2511.10799

With prefix tokens z, P learned prompts p and patch tokens t, x = [z; p; t], ahead of the first block and before any
position is added, a graph network (DGCNN) reads x once. Prefix and prompts are nodes like all others:

    y_0 = x
    y_i[j] = max over l in kNN(y_(i-1)[j]) of LeakyReLU(BN(W_i [y_(i-1)[l] - y_(i-1)[j] ; y_(i-1)[j]]))      i = 1 .. 4
    g = LeakyReLU(BN(W_g [y_1; y_2; y_3; y_4]))

Neighbours are those in the space of the features y_(i-1), another graph in each layer. The blocks are frozen, and after
every third of them, from the first on, all tokens ask the graph:

    x <- Block(x + pos)                                                     prompts have no position
    x <- x + GELU(W_o Attention(W_q LN(x), W_k LN(g), W_v LN(g)) + b_o)

Also trained are the prefix tokens with their positions and the first layers of the tokenizer. The published head reads
the prompts too: `heads={"cls_head_finetune": "cls+prompt+max"}`.

When to use it: for classification with a plain point transformer where IDPT is too large: it reads the same kind of
graph with a quarter of IDPT's parameters, and not at one block alone.

Deviations from the published code, each with its reason:

- W_o and b_o start at zero. GELU(0) is zero and has slope 1/2, so that a fresh adapter is the backbone with its
  prompts, and learns from the first step on.
- The second norm of the queries, which the published code has and never calls, is left out: 3,072 of the 367,616
  parameters that it counts on Point-MAE without the head.
- The tokenizer's BatchNorm keeps the statistics of the backbone while its weight and bias are trained.
- The backbone's own head is the default.
- Between two blocks the base has its own tokens only; the prompts are handed on beside them. They lie ahead of the
  patches, where a causal mask lets these attend to them. The final norm sees those that a head pools.
- Each stage of a backbone with several has prompts, a graph and attentions of its own: published for one stage only.
- Where the patch tokens are seen with their positions alone, these are taken off again as the backbone's positional
  embedding makes them; where it is not known, they stay, and make another graph.
- For part segmentation the model keeps its own head, which reads its own tokens. Published is a decoder of 3 M
  parameters there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from point_peft.anatomy.description import Block, PrefixParameter, Stage
from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call
from point_peft.parts.feature_graph import EdgeNetwork
from point_peft.parts.prefix import less_positions, tune_prefix
from point_peft.parts.second_grouping import run_apart
from point_peft.parts.sequence import LastingPrompts, SequencePart, check_takes_prompts
from point_peft.parts.tuned import first_layers
from point_peft.running.nested import Args, Kwargs
from point_peft.running.tokens import as_layout, batch_first, output_tokens, put_output_tokens
from point_peft.schema import Count, Dropout, Factor, Limit

Source = Literal["block before", "patch embedding", "input"]
# Of the blocks of a stage, one in so many is followed by an attention to the graph.
EVERY = 3


@dataclass(frozen=True, kw_only=True)
class GFTConfig(TunerConfig):
    """GFT; `target_modules` and the like choose among the transformer blocks."""

    method: ClassVar[str] = "GFT"

    num_prompts: Count = 50
    """Prompts P, which enter at the first block of a stage and stay to its last."""
    prompt_std: Factor = 1.0
    """The standard deviation of the prompts at the start."""
    neighbours: Count = 20
    """Nearest tokens in the space of features, itself among them; at most as many as there are."""
    edge_widths: Annotated[
        Sequence[int], Limit("one number or more, each 1 or more", lambda widths: min(widths, default=0) >= 1)
    ] = (64, 64, 64, 64)
    """The channels that each edge convolution gives."""
    graph_width: Count = 256
    """The channels of g."""
    attention_width: Count = 32
    """The channels of queries, keys and values, of all heads together."""
    num_heads: Count = 1
    """2 was published for all but the hardest ScanObjectNN and few-shot."""
    attention_dropout: Dropout = 0.0
    """Of the attention's weights."""
    attention_layers: Annotated[
        Sequence[int] | None,
        Limit("None, or one block number or more, from 0", lambda layers: min(layers, default=-1) >= 0),
    ] = None
    """Numbers of the blocks, counted from 0 over all of them, that an attention to the graph follows; None: of those
    that are chosen in a stage, the first and every third after it."""
    tuned_modules: str | Sequence[str] | None = None
    """Modules that are trained whole; None: the first layers of the tokenizer, where it is known."""
    tuned_tokens: str | Sequence[str] | None = None
    """Prefix tokens and positions that are trained; None: all."""

    identity_at_init = False  # prompts are attended from the start

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.attention_width % self.num_heads == 0
        require(fits, self, "num_heads", f"a divisor of attention_width, which is {self.attention_width}")

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        plan = Blueprint(modules=self._modules_to_tune(backbone), holds_statistics=True)
        asking = self._asking(backbone)
        for number, stage, blocks in self.chosen_stages(backbone):
            check_takes_prompts(stage, self.method, "Use a method that adapts the layers, as LORA or SSF")
            graph = None
            if not asking.isdisjoint(blocks):
                graph = EdgeNetwork(stage.width, self.edge_widths, self.graph_width, self.neighbours)
            source = _source(stage, blocks[0], plan.modules)
            if graph is not None and source == "block before":
                before = stage.blocks[stage.blocks.index(blocks[0]) - 1]
                plan.parts.append((before.path, TokensAhead(stage, number)))
            for block in blocks:
                attention = self._attention(stage.width) if block in asking else None
                pooled = block == anatomy.blocks[-1] and bool(backbone.pooled)
                part = GraphPrompts(stage, number, attention, begins=block == blocks[0], pooled=pooled)
                if part.begins:
                    positions = [p for p in anatomy.prefix_parameters if p.role == "position" and number == 0]
                    prompts = nn.init.normal_(torch.empty(self.num_prompts, stage.width), std=self.prompt_std)
                    part = EnteringPrompts(part, prompts, graph, source, positions)
                plan.parts.append((block.path, part))
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan

    def _modules_to_tune(self, backbone: Backbone) -> list[str]:
        if self.tuned_modules is not None:
            return list(match_names(self.tuned_modules, list(backbone.modules), field="tuned_modules"))
        return [first_layers(backbone, path) for path in backbone.known_anatomy(self.method).stages[0].tokenizer[:1]]

    def _asking(self, backbone: Backbone) -> set[Block]:
        """The blocks that an attention to the graph follows."""
        if self.attention_layers is None:
            return {block for _, _, blocks in self.chosen_stages(backbone) for block in blocks[::EVERY]}
        chosen = dict(self.chosen_blocks(backbone))
        for layer in self.attention_layers:
            if layer not in chosen:
                raise AnatomyError(
                    f"{self.method}: attention_layers names block {layer}, which is not one of the chosen blocks: "
                    f"{', '.join(map(str, chosen))}"
                )
        return {chosen[layer] for layer in self.attention_layers}

    def _attention(self, channels: int) -> GraphAttention:
        widths = channels, self.graph_width, self.attention_width
        return GraphAttention(*widths, self.num_heads, self.attention_dropout)


def _source(stage: Stage, first: Block, tuned: Sequence[str]) -> Source:
    """The place where the tokens are seen that go into the first block, those of it that have no position yet."""
    if first != stage.blocks[0]:
        return "block before"
    tap = stage.patch_tokens
    # A tap sees what the base's module gives, and not the copy of it that the adapter trains.
    hidden = tap is None or any(f"{tap.module}.".startswith(f"{path}.") for path in tuned)
    return "input" if hidden else "patch embedding"


class TokensAhead(SequencePart):
    """At the block before the first that is chosen: hands on the tokens (b, l, c) that it returns."""

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        tokens = self.returned(call, output).tokens
        call.forward.handover.leave(self.key(call, f"tokens of stage {self.number}"), tokens, call.path)
        return output


class GraphAttention(nn.Module):
    """x + GELU(W_o Attention(W_q LN(x), W_k LN(g), W_v LN(g)) + b_o) for tokens x (b, l, c) and a graph g (b, m, e)."""

    def __init__(self, channels: int, graph_width: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_norm = nn.LayerNorm(channels)
        self.graph_norm = nn.LayerNorm(graph_width)
        self.query = nn.Linear(channels, width, bias=False)
        self.key = nn.Linear(graph_width, width, bias=False)
        self.value = nn.Linear(graph_width, width, bias=False)
        self.out = nn.Linear(width, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        normed = self.graph_norm(g)
        q, k, v = (
            rearrange(rows, "b l (h a) -> b h l a", h=self.heads)
            for rows in (self.query(self.query_norm(x)), self.key(normed), self.value(normed))
        )
        dropout = self.dropout if self.training else 0.0
        answers = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        change = nn.functional.gelu(self.out(rearrange(answers, "b h l a -> b l (h a)")))
        return x + change.to(x.dtype)


class GraphPrompts(LastingPrompts):
    """The prompts at a block, and the attention of all tokens to the graph after it, where it has one."""

    prefix = "gft"

    def __init__(
        self, stage: Stage, number: int, attention: GraphAttention | None, *, begins: bool, pooled: bool
    ) -> None:
        super().__init__(stage, number, begins=begins, pooled=pooled)
        self.attention = attention

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if self.attention is not None:
            g = self.handed(call, "graph", begins=False)
            x = batch_first(output_tokens(self.stage, call.path, output), self.stage.layout)
            output = put_output_tokens(self.stage, output, as_layout(self.attention(x, g), self.stage.layout))
        return super().after(call, args, kwargs, output)


class EnteringPrompts(GraphPrompts):
    """The same at the first block: it holds the prompts, and makes the graph of all tokens ahead of the block."""

    token_parameters = frozenset({"prompts"})

    def __init__(
        self,
        part: GraphPrompts,
        prompts: Tensor,
        graph: EdgeNetwork | None,
        source: Source,
        positions: Sequence[PrefixParameter],
    ) -> None:
        super().__init__(part.stage, part.number, part.attention, begins=True, pooled=part.pooled)
        self.prompts = nn.Parameter(prompts)
        self.graph = graph
        self.source = source
        self.positions = tuple(positions)
        """Those that the prefix tokens have at the first block."""

    def made(self, call: Call, args: Args, kwargs: Kwargs) -> Tensor:
        prompts = repeat(self.prompts, "p c -> b p c", b=self.coordinates(call).shape[0])
        if self.graph is not None:
            prefix, patches = self._without_positions(call, args, kwargs)
            x = torch.cat([prefix, prompts.to(patches.dtype), patches], dim=1)
            g = self.graph(x, recomputing=call.forward.recomputing)
            call.forward.handover.leave(self.key(call, f"graph of stage {self.number}"), g, call.path)
        return prompts

    def _without_positions(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor]:
        """Prefix (b, e, c) and patch tokens (b, g, c) as they are before positions are added to them."""
        got = self.received(call, args, kwargs)
        if self.source == "block before":
            ahead = self.handed(call, "tokens", begins=False)
            assert ahead is not None  # else it is an error
            prefix, patches = torch.split(ahead, [got.prefix.shape[1], got.patches.shape[1]], dim=1)
            return prefix, patches
        return less_positions(got.prefix, self.positions, call), self._patches(call, got.patches)

    def _patches(self, call: Call, received: Tensor) -> Tensor:
        known = call.forward.seen.patches.get(self.number) if self.source == "patch embedding" else None
        # A model may mask some of its patch embedding, or drop them.
        if known is not None and known.shape == received.shape:
            return known.to(received.dtype)
        if self.stage.position_embedding is None:
            return received
        return received - run_apart(call.forward, [self.stage.position_embedding], self.coordinates(call))
