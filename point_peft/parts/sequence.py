"""Parts at a block, which read its tokens, put prompts among them and take them out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Block, Stage
from point_peft.anatomy.structure import mlp_entrance
from point_peft.errors import AdapterError, AnatomyError
from point_peft.parts.base import Call, Part
from point_peft.running.nested import Args, Kwargs, put_argument
from point_peft.running.tokens import (
    as_layout,
    batch_first,
    block_tokens,
    insert_prompts,
    output_tokens,
    put_output_tokens,
)


@dataclass(frozen=True)
class BlockTokens:
    """The tokens of a block, batch first: prefix tokens (b, e, c), prompts (b, p, c) and patches (b, g, c)."""

    tokens: Tensor
    """All of them in order, (b, e + p + g, c)."""
    prefix: Tensor
    prompts: Tensor
    patches: Tensor

    @staticmethod
    def of(tokens: Tensor, lengths: Sequence[int]) -> BlockTokens:
        """Tokens (b, l, c) parted in three, of these lengths."""
        return BlockTokens(tokens, *torch.split(tokens, list(lengths), dim=1))

    @property
    def located(self) -> Tensor:
        """Those that lie in space, (b, p + g, c)."""
        return self.tokens[:, self.prefix.shape[1] :]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of the three parts."""
        return self.prefix.shape[1], self.prompts.shape[1], self.patches.shape[1]


def small_normal(*shape: int) -> nn.Parameter:
    """A trained tensor that begins small and random, as prompts and positions do."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))


class SequencePart(Part):
    """A part at a block of a stage. The prompts of several methods lie between the prefix and the patch tokens."""

    needs_coordinates = True

    def __init__(self, stage: Stage, number: int) -> None:
        super().__init__()
        self.stage = stage
        self.number = number
        """The stage's number among those of the backbone."""

    def coordinates(self, call: Call) -> Tensor:
        """The coordinates (b, g, 3) of the patch tokens."""
        return call.forward.seen.coordinates[self.number]

    def received(self, call: Call, args: Args, kwargs: Kwargs, prompts: int = 0) -> BlockTokens:
        """The tokens that the block is called with, of which `prompts` are this method's."""
        return self._parted(call, block_tokens(self.stage, call.path, args, kwargs), prompts)

    def returned(self, call: Call, output: Any, prompts: int = 0) -> BlockTokens:
        """The tokens that the block has returned, of which `prompts` are this method's."""
        return self._parted(call, output_tokens(self.stage, call.path, output), prompts)

    def with_prompts(self, call: Call, args: Args, kwargs: Kwargs, prompts: Tensor) -> tuple[Args, Kwargs]:
        """The block's arguments with prompts (b, p, c) put in ahead of the patch tokens; masks grow with them."""
        at = self.received(call, args, kwargs).prefix.shape[1]
        return insert_prompts(self.stage, call.path, args, kwargs, prompts, at)

    def with_tokens(self, args: Args, kwargs: Kwargs, prefix: Tensor, patches: Tensor) -> tuple[Args, Kwargs]:
        """The block's arguments with other tokens in the place of those that it got, as many."""
        tokens = as_layout(torch.cat([prefix, patches], dim=1), self.stage.layout)
        return put_argument(args, kwargs, self.stage.tokens, tokens)

    def without_prompts(self, output: Any, prefix: Tensor, patches: Tensor, prompts: int = 0) -> Any:
        """The block's output with these prefix and patch tokens, and without the `prompts` that this method put in."""
        tokens = as_layout(torch.cat([prefix, patches], dim=1), self.stage.layout)
        return put_output_tokens(self.stage, output, tokens, inserted=prompts, at=prefix.shape[1])

    def handed(self, call: Call, what: str, *, begins: bool) -> Tensor | None:
        """The tokens that the block before has left for this one; None where they begin."""
        # In a direct call of blocks it cannot be told when the next begins, but for the block where they begin.
        fresh = begins and call.forward.inputs is None and not call.forward.recomputing
        key = self.key(call, f"{what} of stage {self.number}")
        tokens = None if fresh else call.forward.handover.take(key, call.path)
        if tokens is None and not begins:
            raise AdapterError(
                f"block '{call.path}' runs before the one whose {what} it should be handed: call the model, or all of "
                "its blocks in order"
            )
        return tokens

    def _parted(self, call: Call, tokens: Tensor, prompts: int) -> BlockTokens:
        rows = batch_first(tokens, self.stage.layout)
        g = rows.shape[1] if self.stage.layout == "packed" else self.coordinates(call).shape[1]
        return BlockTokens.of(rows, (rows.shape[1] - prompts - g, prompts, g))


class InputNote(Part):
    """Notes what its module gets, under a name, for a part at the block that holds the module."""

    def __init__(self, block: Block, name: str) -> None:
        super().__init__()
        self.block = block.path
        self.name = name

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call.forward.handover.note((*self.key(call, self.name), self.block), (*args, *kwargs.values())[0])
        return args, kwargs


def note_stream(block: Block, method: str) -> tuple[str, InputNote]:
    """The site and the part that note a block's stream of tokens after the attention."""
    if block.mlp_norm is None:
        raise AnatomyError(
            f"{method} reads the tokens of '{block.path}' between its attention and its MLP, at the norm ahead of the "
            "MLP, and that was not found: name it in config.anatomy (Block.mlp_norm), pass example_inputs, or use "
            "another method"
        )
    return block.mlp_norm, InputNote(block, "stream")


def noted_stream(call: Call, part: SequencePart, like: BlockTokens) -> Tensor:
    """The stream that was noted for a part in this call of a block, batch first, of those tokens that `like` has."""
    key = (call.adapter, part.tuner, "stream", call.path)
    noted = batch_first(call.forward.handover.noted(key, call.path), part.stage.layout).to(like.tokens.dtype)
    # Methods that act closer to the block may have had prompts in it: they lay before the patch tokens.
    ahead = like.prefix.shape[1] + like.prompts.shape[1]
    g = like.patches.shape[1]
    if noted.shape[1] == ahead + g:
        return noted
    return torch.cat([noted[:, :ahead], noted[:, noted.shape[1] - g :]], dim=1)


class EntrancePart(Part):
    """A part at a block's MLP that reads what the MLP gets."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block.path
        self.noted = mlp_entrance(block) != block.mlp
        """True if an `InputNote` is needed, because this module is only the last layer of the MLP."""

    def entrance(self, call: Call, args: Args, kwargs: Kwargs) -> Tensor:
        """The input of the MLP, in this call of the block."""
        given: Tensor = (*args, *kwargs.values())[0]
        if self.noted:
            key = call.adapter, self.tuner, "entrance", self.block
            return call.forward.handover.noted(key, call.path).to(given.dtype)
        return given


def mlp_of(block: Block, method: str) -> str:
    """The module that returns what a block's MLP adds; `AnatomyError` if there is none."""
    if block.mlp is None:
        raise AnatomyError(
            f"{method} adapts the MLP of every block, and '{block.path}' has none that was found: name it in "
            "config.anatomy, or use LORA, SSF or NORM_TUNING"
        )
    return block.mlp


def at_mlp(block: Block, part: EntrancePart) -> list[tuple[str, Part]]:
    """The sites of a part at a block's MLP, and of what notes for it what the MLP gets."""
    entrance = mlp_entrance(block)
    assert block.mlp is not None and entrance is not None  # who asks has seen to it
    noting: list[tuple[str, Part]] = [(entrance, InputNote(block, "entrance"))] if part.noted else []
    return [*noting, (block.mlp, part)]


class LastingPrompts(SequencePart):
    """Prompts that come in at one block and stay in the sequence through the blocks of the method after it.

    Between two blocks the base has its own tokens only: what it does to them there, it does not do to prompts.
    """

    def __init__(self, stage: Stage, number: int, *, begins: bool, pooled: bool) -> None:
        super().__init__(stage, number)
        self.begins = begins
        self.pooled = pooled
        """True if a head of the adapter pools what is left of the prompts after this block."""

    def made(self, call: Call, args: Args, kwargs: Kwargs) -> Tensor:
        """The prompts (b, p, c) at the block where they come in."""
        raise NotImplementedError

    def entering(self, call: Call, prompts: Tensor) -> Tensor:
        """The prompts as a block gets them."""
        return prompts

    def leaving(self, call: Call, prompts: Tensor) -> Tensor:
        """The prompts as they are handed on, of what the block has returned in their place."""
        return prompts

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        handed = self.handed(call, "prompts", begins=self.begins)
        prompts = self.entering(call, self.made(call, args, kwargs) if handed is None else handed)
        call.forward.handover.notes[(*self.key(call, f"prompts of stage {self.number}"), call.path)] = prompts
        return self.with_prompts(call, args, kwargs, prompts)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        key = self.key(call, f"prompts of stage {self.number}")
        count = call.forward.handover.notes.pop((*key, call.path)).shape[1]
        got = self.returned(call, output, prompts=count)
        prompts = self.leaving(call, got.prompts)
        call.forward.handover.leave(key, prompts, call.path)
        if self.pooled:
            call.forward.handover.leave(self.key(call, "prompts"), prompts, call.path)
        return self.without_prompts(output, got.prefix, got.patches, prompts=count)


def check_located(stage: Stage, method: str, path: str) -> None:
    """Raise `AnatomyError` unless it is known where the tokens of a stage, which has the block `path`, lie in space."""
    if stage.coordinates is None:
        raise AnatomyError(
            f"{method} needs to know where the tokens of '{path}' lie in space: "
            f"{stage.unknown or 'config.anatomy states no coordinates'}. LORA, SSF and BOTTLENECK do without"
        )


def check_takes_prompts(stage: Stage, method: str, advice: str) -> None:
    """Raise `AnatomyError`, with advice, unless prompts can be put among the tokens of a stage."""
    path = stage.blocks[0].path
    if stage.coordinates is None:
        raise AnatomyError(
            f"{method} puts prompts ahead of the patch tokens of '{path}', and needs to know how many these are by "
            f"their coordinates: {stage.unknown or 'config.anatomy states none'}. {advice}"
        )
    if not stage.takes_prompts:
        raise AnatomyError(
            f"{method} puts prompts among the tokens of '{path}', which has no place for them: {stage.why_no_prompts}. "
            f"{advice}"
        )
