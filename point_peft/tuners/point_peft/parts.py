"""The parts of Point-PEFT: one around every block, one on every MLP, one for the prefix tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from point_peft import tokens as token_ops
from point_peft.anatomy import Layout, PrefixParameter
from point_peft.errors import AnatomyError
from point_peft.tuners.base import Args, Call, Kwargs, Part, TunedTokens
from point_peft.tuners.point_peft.bottleneck import Bottleneck
from point_peft.tuners.point_peft.geometry_aware import GeometryAwareAdapter, StageState, neighbourhoods
from point_peft.tuners.point_peft.prior import MemoryBank, query_of


class MlpPart(Part):
    """h <- h + scale * A(h), on the output h of a block's MLP."""

    prefix = "point_peft"

    def __init__(self, adapter: Bottleneck, scale: float) -> None:
        super().__init__()
        self.adapter = adapter
        self.scale = scale

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return output + self.scale * self.adapter(output).to(output.dtype)


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
        stage: int,
        layout: Layout,
        prompt: Prompt | None,
        geometry: GeometryAwareAdapter,
        adapter: Bottleneck,
        prior: str | None,
        centre_ratio: float,
        neighbours: int,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.layout = layout
        self.prompt = prompt
        self.geometry = geometry
        self.adapter = adapter
        self.prior_source = prior
        self.centre_ratio = centre_ratio
        self.neighbours = neighbours

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.prompt is None:
            return args, kwargs
        tokens, at = args[0], self._prefix(call, args[0], inserted=0)
        length = tokens.shape[token_ops.token_dim(self.layout)]
        count = len(self.prompt.embeddings)
        prompts = self.prompt(len(call.forward.coordinates[self.stage]), self._prior(call))
        tokens = token_ops.insert(tokens, prompts, at, self.layout)
        masks = tuple(token_ops.grow_masks(value, length, count, at) for value in args[1:])
        return (tokens, *masks), {name: token_ops.grow_masks(v, length, count, at) for name, v in kwargs.items()}

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise AnatomyError(f"block '{call.path}' returns a {kind}; tokens in one tensor are needed")
        tokens = token_ops.batch_first(output, self.layout)
        count = 0 if self.prompt is None else len(self.prompt.embeddings)
        prefix = self._prefix(call, output, inserted=count)
        state = call.state(f"stage_{self.stage}", StageState)
        near, weights = neighbourhoods(
            call.forward,
            self.stage,
            state,
            call.adapter,
            self.centre_ratio,
            self.neighbours,
            with_prompts=self.prompt is not None,
        )
        patches = self.geometry(
            tokens[:, prefix + count :],
            tokens[:, prefix:],
            near,
            weights,
            state.local_attention,
            recomputing=call.forward.recomputing,
        )
        # A acts on every token by itself, so the prompts, which end here, need not pass through it.
        kept = torch.cat([tokens[:, :prefix], patches], dim=1)
        return token_ops.batch_first(kept + self.adapter(kept).to(kept.dtype), self.layout)

    def _prefix(self, call: Call, tokens: Tensor, inserted: int) -> int:
        """How many prefix tokens there are: those that are neither prompts nor patches."""
        length = tokens.shape[token_ops.token_dim(self.layout)]
        return length - inserted - call.forward.coordinates[self.stage].shape[1]

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
                return bank.prior(query_of(call.forward.root.backbone_tokens(call.forward, source)))

        return call.forward.once(("point_peft.prior", call.adapter), retrieve)


class PrefixPart(Part):
    """Adds what training has changed of prefix tokens and positions to the tokens that a block gets."""

    def __init__(self, parameters: tuple[PrefixParameter, ...], layout: Layout) -> None:
        super().__init__()
        self.parameters_of_prefix = parameters
        self.layout = layout

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        tuned, base_model = call.state("tokens", TunedTokens), call.forward.root.base_model
        tokens = args[0]
        for parameter in self.parameters_of_prefix:
            shift = tuned.difference(parameter.name, base_model)
            tokens = token_ops.shift_rows(tokens, shift, parameter.row, self.layout)
        return (tokens, *args[1:]), kwargs
