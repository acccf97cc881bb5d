"""The parts of Point-PEFT: one around every block, one on every MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft.anatomy.description import Stage
from point_peft.parts.base import Call, Part
from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.propagation import GeometryAwareAdapter, neighbourhoods
from point_peft.parts.quick_bottleneck import add_adapted, works_by_hand
from point_peft.running.nested import Args, Kwargs
from point_peft.running.tokens import (
    as_layout,
    batch_first,
    block_tokens,
    insert_prompts,
    output_tokens,
    put_output_tokens,
    token_dim,
)
from point_peft.tuners.point_peft.after_block import Prompts, propagate_and_adapt
from point_peft.tuners.point_peft.geometry_aware import StageState
from point_peft.tuners.point_peft.prior import MemoryBank, query_of


class MlpPart(Part):
    """h <- h + scale * A(h), on the output h of a block's MLP."""

    prefix = "point_peft"

    def __init__(self, adapter: Bottleneck, scale: float) -> None:
        super().__init__()
        self.adapter = adapter
        self.scale = scale

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return add_adapted(output, self.adapter, self.scale)


class Prompt(nn.Module):
    """The prompts of one block: p = dropout(E) + CPA(P), CPA(P) = P + A(P); without a prior P, dropout(E) alone."""

    def __init__(self, count: int, channels: int, dropout: float, prior_adapter: Bottleneck | None) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(count, channels))
        nn.init.trunc_normal_(self.embeddings, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.prior_adapter = prior_adapter

    def forward(self, batch: int, prior: Tensor | None) -> Tensor:
        """Prompts (b, p, c); the prior (b, m, c) enhances the first m of them."""
        prompts: Tensor = self.dropout(self.embeddings).expand(batch, -1, -1)
        if prior is None or self.prior_adapter is None:
            return prompts
        prior = prior.to(prompts.dtype)
        enhanced = prior + self.prior_adapter(prior)
        return prompts + nn.functional.pad(enhanced, (0, 0, 0, prompts.shape[1] - enhanced.shape[1]))


class BlockPart(Part):
    """Prompts go in before the block; the geometry-aware adapter and A act after it; then the prompts come out."""

    prefix = "point_peft"
    needs_coordinates = True

    def __init__(
        self,
        *,
        stage: Stage,
        number: int,
        prompt: Prompt | None,
        geometry: GeometryAwareAdapter | None,
        adapter: Bottleneck,
        prior: str | None,
        centre_ratio: float,
        neighbours: int,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.number = number
        """The stage's number among those of the backbone."""
        self.prompt = prompt
        self.geometry = geometry
        self.adapter = adapter
        self.prior_source = prior
        self.centre_ratio = centre_ratio
        self.neighbours = neighbours

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.prompt is None:
            return args, kwargs
        at = self._prefix(call, block_tokens(self.stage, call.path, args, kwargs), inserted=0)
        prompts = self.prompt(call.forward.seen.coordinates[self.number].shape[0], self._prior(call))
        return insert_prompts(self.stage, call.path, args, kwargs, prompts, at)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        found = output_tokens(self.stage, call.path, output)
        tokens = batch_first(found, self.stage.layout)
        count = 0 if self.prompt is None else len(self.prompt.embeddings)
        prompts = Prompts(self._prefix(call, found, inserted=count), count)
        if self.geometry is None:
            adapted = add_adapted(prompts.taken_from(tokens), self.adapter, 1.0)
        else:
            adapted = self._aware(call, self.geometry, tokens, prompts)
        adapted = as_layout(adapted, self.stage.layout)
        return put_output_tokens(self.stage, output, adapted, inserted=count, at=prompts.at)

    def _aware(self, call: Call, geometry: GeometryAwareAdapter, tokens: Tensor, prompts: Prompts) -> Tensor:
        """What the geometry-aware adapter and A make of tokens (b, l, c).

        But for what is pooled, every token is changed by itself, so the prompts, which end here, need not be.
        """
        state = call.state(f"stage_{self.number}", StageState)
        near, reach = neighbourhoods(
            call.forward,
            self.number,
            self.centre_ratio,
            self.neighbours,
            None if self.prompt is None else state.prompt_coordinates,
            owner=(call.adapter, self.tuner),
            before=prompts.at,
        )
        pooled = state.local_attention(tokens, near)
        if works_by_hand(tokens, self.adapter, geometry) and reach.packed is None and not reach.patches.requires_grad:
            return propagate_and_adapt(tokens, pooled, prompts, geometry, reach, self.adapter)

        def adapt(tokens: Tensor, pooled: Tensor) -> Tensor:
            kept = prompts.taken_from(tokens)
            aware = geometry(kept, tokens, near, reach(), pooled, recomputing=call.forward.recomputing)
            return add_adapted(aware, self.adapter, 1.0)

        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # To keep all of it for the backward pass would take a seventh more memory, to compute it again little time.
            found: Tensor = checkpoint(adapt, tokens, pooled, use_reentrant=False, determinism_check="none")
            return found
        return adapt(tokens, pooled)

    def _prefix(self, call: Call, tokens: Tensor, inserted: int) -> int:
        """How many prefix tokens there are: those that are neither prompts nor patches."""
        if self.stage.layout == "packed":
            return 0
        length = tokens.shape[token_dim(self.stage.layout)]
        return length - inserted - call.forward.seen.coordinates[self.number].shape[1]

    def _prior(self, call: Call) -> Tensor | None:
        """The prior (b, 2 + top_k, c) of the clouds, once per forward; None without a bank."""
        source = self.prior_source
        if source is None:
            return None
        bank = call.state("memory_bank", MemoryBank)
        if not bank.ready:
            return None

        def retrieve() -> Tensor:
            with torch.no_grad():
                return bank.prior(query_of(call.forward.root.backbone_tokens(call.forward, source, call.adapter)))

        return call.forward.once(("point_peft.prior", call.adapter), retrieve)
