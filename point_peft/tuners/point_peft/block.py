"""Point-PEFT at a block: prompts before it, the geometry-aware adapter and A after it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Stage
from point_peft.parts.base import Call
from point_peft.parts.bottleneck import Bottleneck, add_adapted
from point_peft.parts.propagation import GeometryAwareAdapter, Neighbourhoods, Reach, neighbourhoods
from point_peft.parts.recomputing import recomputed
from point_peft.parts.sequence import BlockTokens, SequencePart
from point_peft.running.nested import Args, Kwargs, put_argument
from point_peft.running.tokens import as_layout, block_tokens, put_output_tokens, shift_rows
from point_peft.tuners.point_peft.local_attention import StageGeometry
from point_peft.tuners.point_peft.neighbourhood import NeighbourhoodEncoder
from point_peft.tuners.point_peft.prior import MemoryBank
from point_peft.tuners.point_peft.prompt import Prompt


class BlockPart(SequencePart):
    """Prompts go in before the block; the geometry-aware adapter and A act after it; then the prompts come out."""

    prefix = "point_peft"
    token_parameters = frozenset({"prompt.embeddings", "prefix_shift"})

    def __init__(
        self,
        *,
        stage: Stage,
        number: int,
        prompt: Prompt | None,
        geometry: GeometryAwareAdapter | None,
        adapter: Bottleneck,
        prior: str | None,
        prefix: int,
        neighbourhood: NeighbourhoodEncoder | None,
        centre_ratio: float,
        neighbours: int,
    ) -> None:
        super().__init__(stage, number)
        self.prompt = prompt
        self.geometry = geometry
        self.adapter = adapter
        self.prior_source = prior
        """Where the prior's query comes from, as `Bank.source` says; None: the prompts have no prior."""
        self.prefix_shift = nn.Parameter(torch.zeros(prefix, stage.width)) if prefix else None
        self.neighbourhood = neighbourhood
        self.centre_ratio = centre_ratio
        self.neighbours = neighbours

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        P = None if self.prior_source is None else self._prior(call, self.received(call, args, kwargs).patches)
        if self.prefix_shift is not None:
            tokens = block_tokens(self.stage, call.path, args, kwargs)
            tokens = shift_rows(tokens, self.prefix_shift, 0, self.stage.layout)
            args, kwargs = put_argument(args, kwargs, self.stage.tokens, tokens)
        if self.neighbourhood is not None:
            got = self.received(call, args, kwargs)
            around = self.neighbourhood.of(call, self.coordinates(call))
            args, kwargs = self.with_tokens(args, kwargs, got.prefix, got.patches + around.to(got.patches.dtype))
        if self.prompt is None:
            return args, kwargs
        return self.with_prompts(call, args, kwargs, self.prompt(self.coordinates(call).shape[0], P))

    def unused(self, call: Call) -> Iterable[Tensor]:
        own = None if self.prompt is None else self.prompt.prior_adapter
        return () if own is None or len(call.state("memory_bank", MemoryBank).rows) else own.parameters()

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        count = 0 if self.prompt is None else len(self.prompt.embeddings)
        got = self.returned(call, output, prompts=count)
        if self.geometry is None:
            tokens = add_adapted(torch.cat([got.prefix, got.patches], dim=1), self.adapter, 1.0)
        else:
            tokens = self._geometry_aware(call, got)
        tokens = as_layout(tokens, self.stage.layout)
        return put_output_tokens(self.stage, output, tokens, inserted=count, at=got.prefix.shape[1])

    def _geometry_aware(self, call: Call, got: BlockTokens) -> Tensor:
        """Prefix and patches (b, e + g, c) after the geometry-aware adapter and A."""
        shared = call.state(f"stage_{self.number}", StageGeometry)
        Q = None if self.prompt is None else shared.prompt_coordinates
        near, reach = neighbourhoods(
            call.forward, self.number, self.centre_ratio, self.neighbours, Q, owner=(call.adapter, self.tuner)
        )
        near = near.after(got.prefix.shape[1])
        m = shared.local_attention.pooled(got.tokens, near.neighbour)
        # Kept for the backward pass, what is made here would take a seventh of the memory of a training step.
        tokens: Tensor = recomputed(self, got.tokens, got.lengths, m, Q, near, reach, random=True)
        return tokens

    def forward(
        self, tokens: Tensor, lengths: Sequence[int], m: Tensor, Q: Tensor | None, near: Neighbourhoods, reach: Reach
    ) -> Tensor:
        """t_i <- t_i + 0.3 sum_j w_ij v_j for the patches, then x <- x + A(x) for all tokens.

        A acts on every token by itself, so the prompts, which end here, need not pass through it.
        """
        got = BlockTokens.of(tokens, lengths)
        assert self.geometry is not None
        recomputing = reach.forward.recomputing
        t = self.geometry(got.patches, got.tokens, near, reach(Q), m, recomputing=recomputing)
        return add_adapted(torch.cat([got.prefix, t], dim=1), self.adapter, 1.0)

    def _prior(self, call: Call, patches: Tensor) -> Tensor | None:
        """The prior P (b, 2 + top_k, c) of clouds with these patch tokens here, once per forward; None without rows."""
        source = self.prior_source
        assert source is not None
        bank = call.state("memory_bank", MemoryBank)
        if not bank.ready:
            return None

        def retrieve() -> Tensor:
            with torch.no_grad():
                # What the blocks ahead of the first adapted one have made of a cloud, no second pass makes otherwise.
                plain = source == call.path and not call.forward.second.acted
                root = call.forward.root
                tokens = patches if plain else root.backbone_tokens(call.forward, source, call.adapter)
                return bank.prior(bank.query(tokens))

        return call.forward.once(("point_peft.prior", call.adapter), retrieve)
