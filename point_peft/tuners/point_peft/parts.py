"""The parts of Point-PEFT: one around every block, one on every MLP, one for the prefix tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from point_peft import tokens as token_ops
from point_peft.anatomy import PrefixParameter, Stage
from point_peft.errors import AdapterError
from point_peft.tokens import Args, Kwargs
from point_peft.tuners.base import Call, Part, TunedTokens
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
        at = self._prefix(call, token_ops.block_tokens(self.stage, call.path, args, kwargs), inserted=0)
        prompts = self.prompt(len(call.forward.coordinates[self.number]), self._prior(call))
        return token_ops.insert_prompts(self.stage, call.path, args, kwargs, prompts, at)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        found = token_ops.output_tokens(self.stage, call.path, output)
        tokens = token_ops.batch_first(found, self.stage.layout)
        count = 0 if self.prompt is None else len(self.prompt.embeddings)
        prefix = self._prefix(call, found, inserted=count)
        patches = tokens[:, prefix + count :]
        if self.geometry is not None:
            patches = self._aware(call, self.geometry, patches, tokens[:, prefix:])
        # A acts on every token by itself, so the prompts, which end here, need not pass through it.
        kept = torch.cat([tokens[:, :prefix], patches], dim=1)
        adapted = token_ops.as_layout(kept + self.adapter(kept).to(kept.dtype), self.stage.layout)
        return token_ops.put_output_tokens(self.stage, output, adapted, inserted=count, at=prefix)

    def _aware(self, call: Call, geometry: GeometryAwareAdapter, patches: Tensor, tokens: Tensor) -> Tensor:
        """The patches after the geometry-aware adapter; `tokens` are the prompts, if any, and the patches."""
        state = call.state(f"stage_{self.number}", StageState)
        near, propagate = neighbourhoods(
            call.forward,
            self.number,
            state,
            call.adapter,
            self.centre_ratio,
            self.neighbours,
            with_prompts=self.prompt is not None,
        )
        recomputing = call.forward.recomputing
        aware: Tensor = geometry(patches, tokens, near, propagate, state.local_attention, recomputing=recomputing)
        return aware

    def _prefix(self, call: Call, tokens: Tensor, inserted: int) -> int:
        """How many prefix tokens there are: those that are neither prompts nor patches."""
        if self.stage.layout == "packed":
            return 0
        length = tokens.shape[token_ops.token_dim(self.stage.layout)]
        return length - inserted - call.forward.coordinates[self.number].shape[1]

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


class PrefixPart(Part):
    """Adds what training has changed of prefix tokens and positions to the tokens that a block gets.

    In the second pass it adds what the base that the adapter was made for had there more than this one.
    """

    in_second_pass = True

    def __init__(self, parameters: tuple[PrefixParameter, ...], stage: Stage) -> None:
        super().__init__()
        self.parameters_of_prefix = parameters
        self.stage = stage

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return self._shift(call, args, kwargs, call.state("tokens", TunedTokens).difference)

    def before_second(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return self._shift(call, args, kwargs, call.state("tokens", TunedTokens).base_difference)

    def _shift(
        self, call: Call, args: Args, kwargs: Kwargs, difference: Callable[[str, nn.Module], Tensor]
    ) -> tuple[Args, Kwargs]:
        tokens = token_ops.block_tokens(self.stage, call.path, args, kwargs)
        later = self._called_before(call)
        for parameter in self.parameters_of_prefix:
            if later and (parameter.role == "token" or self.stage.position == "once"):
                continue
            shift = difference(parameter.name, call.forward.root.base_model)
            tokens = token_ops.shift_rows(tokens, shift, parameter.row, self.stage.layout)
        return token_ops.put_argument(args, kwargs, self.stage.tokens, tokens)

    def _called_before(self, call: Call) -> bool:
        """Whether this block has run in this forward already, as one that is used for several layers does."""
        key = call.adapter, call.path
        if call.forward.recomputing:
            if call.forward.calls[key] > 1:
                raise AdapterError(
                    f"block '{call.path}' runs several times in a forward, and checkpointing runs it again: which of "
                    "its runs that is cannot be told, so its prefix tokens cannot be tuned; set tuned_tokens=[]"
                )
            return False
        call.forward.calls[key] += 1
        return call.forward.calls[key] > 1
