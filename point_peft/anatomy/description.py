"""A backbone as the library understands it: blocks, stages, token layout, coordinates, heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Layout = Literal["bgc", "gbc", "packed"]
"""The layout of the tokens that a block receives: (b, g, c), sequence first (g, b, c), or all samples' in (n, c)."""
Steps = tuple[int | str, ...]
"""The way to a tensor inside nested tuples, lists and mappings: numbers and names of items."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A place where a tensor can be seen while the model runs: in what a module is called with, or in what it returns.

    The first step into an input is the number of a positional or the name of a keyword argument; an output without
    steps is the output itself.
    """

    module: str
    side: Literal["input", "output"]
    steps: Steps = ()
    """For an input, none means the first positional argument."""
    else_steps: Steps = ()
    """Where it is seen if the steps lead nowhere; none: nowhere else."""

    def __post_init__(self) -> None:
        if self.side == "input" and not self.steps:
            object.__setattr__(self, "steps", (0,))

    def __str__(self) -> str:
        other = f" or {spell_steps(self.else_steps)}" if self.else_steps else ""
        return f"{self.side}{spell_steps(self.steps)}{other} of " + (f"'{self.module}'" if self.module else "the model")


def spell_steps(steps: Steps) -> str:
    """Steps as one writes them in Python: `[0].coord`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block; every entry is a module path."""

    path: str
    attention: str | None
    """None: the tokens meet in another way, as in a state-space model, and linear layers are all that is adapted."""
    qkv: tuple[str, ...]
    projection: str | None
    norms: tuple[str, ...]
    mlp: str | None
    """The module that returns what the MLP adds to the tokens."""
    linears: tuple[str, ...]
    """The linear layers outside the attention, those of the MLP among them."""
    mlp_norm: str | None = None
    """The norm ahead of the MLP: what it gets is the stream of tokens after the attention."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of all modules in it that have a role."""
        named = (self.attention, *self.qkv, self.projection, *self.norms, self.mlp, *self.linears, self.mlp_norm)
        return tuple(path for path in named if path is not None)

    @property
    def attention_kind(self) -> str:
        """The way query, key and value are made: by one linear layer, by several, or inside nn.MultiheadAttention; or
        "none".
        """
        if self.attention is None:
            return "none"
        return {0: "nn.MultiheadAttention", 1: "one fused projection"}.get(len(self.qkv), "split projections")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Blocks of one width that see the same tokens."""

    blocks: tuple[Block, ...]
    width: int
    layout: Layout = "bgc"
    tokens: Steps = (0,)
    """Where the tokens are in what a block is called with."""
    outputs: tuple[Steps, ...] = ((),)
    """Where they are in what it returns; all but the first are copies, such as the features of a sparse tensor."""
    prefix_tokens: int | None = None
    """Tokens before the patch tokens (CLS and the like); None: the token count less the number of coordinates."""
    coordinates: Tap | None = None
    """Where the coordinates of the patch tokens, (b, g, 3) or packed (n, 3), are seen, at the latest by a block."""
    dropped: int = 0
    """The number of coordinates, the last ones of those seen, whose token the model drops ahead of the blocks."""
    samples: Tap | None = None
    """For packed tokens: where it is seen which sample each belongs to, as numbers (n,) or as ends of samples (b,)."""
    points: Tap | None = None
    """Where the clouds (b, n, 3) are seen that are grouped: at best the input of the module that does."""
    tokenizer: tuple[str, ...] = ()
    """The modules that, one after another, turn neighbourhoods (b, g, k, 3), each relative to its centre, into the
    patch embedding."""
    patch_tokens: Tap | None = None
    """Where the patch embedding (b, g, c) is seen, before positions are added."""
    position_embedding: str | None = None
    """The module that turns coordinates (b, g, 3) into positions (b, g, c)."""
    position: Literal["every_block", "once"] = "every_block"
    """Added before every block, or before the first only."""
    masks: tuple[Steps, ...] = ()
    """Arguments of a block that say which token may attend to which (..., l, l). What they hold is not assumed."""
    mask_visible: bool = False
    """The entry of a boolean attention mask that lets a token be attended; in torch.nn it is False, in SDPA True."""
    padding_masks: tuple[Steps, ...] = ()
    """Arguments of a block that say which tokens (b, l) are padding."""
    prompts: bool = True
    """True if prompts can be put among the tokens and are attended there."""
    unknown: str = ""
    """The reason why something could not be established, so that no method can use it."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every place where something of the stage is seen."""
        return tuple(tap for tap in (self.coordinates, self.samples, self.points, self.patch_tokens) if tap is not None)

    @property
    def takes_prompts(self) -> bool:
        """True if prompts can be put among the tokens: not where these are packed, and attended in patches."""
        return self.prompts and self.layout != "packed"

    @property
    def why_no_prompts(self) -> str:
        """The reason why it takes none, for an error."""
        if self.layout == "packed":
            return "its tokens are packed, and attended in patches of a serial order or of neighbours"
        if self.unknown:
            return (
                "none that is known, as the traced forward did not show where tokens lie and nothing was put there; if "
                "it is attended there, state prompts=True in config.anatomy"
            )
        return "what was put there was not attended, or the block did not accept it"


@dataclass(frozen=True, kw_only=True)
class PrefixParameter:
    """A tensor of prefix tokens or of their positions, added to the tokens ahead of the blocks."""

    name: str
    role: Literal["token", "position"]
    row: int
    """The first of the token rows that it stands for."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A module that is not called itself: another module reads its weights."""

    module: str
    reader: str


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The make of a backbone. `str()` gives a readable summary; `dataclasses.replace` corrects a part of it."""

    source: str
    """The preset that supplied what structure does not tell, `traced`, or whatever the user wrote."""
    stages: tuple[Stage, ...]
    stem: tuple[str, ...] = ()
    """Frozen modules ahead of the blocks whose outputs a second pass may reuse: grouping, patch embedding."""
    prefix_parameters: tuple[PrefixParameter, ...] = ()
    final_norms: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    last_block_calls: int = 1
    """Runs, in one forward, of the block that the prior is taken after."""
    patches_read: bool = True
    """True if the prediction depends on what the last block makes of the patch tokens, and not on the prefix alone."""
    reads: tuple[Read, ...] = ()
    uncalled: tuple[str, ...] = ()
    """Modules with parameters of their own that a traced forward neither called nor read."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all stages in order."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    def agrees(self, other: Anatomy) -> bool:
        """Tell whether another says the same, from whatever source it knows it."""
        return replace(self, source=other.source) == other

    @property
    def queried(self) -> int:
        """The last stage whose coordinates are known, after which a prior is taken; 0 if none is."""
        located = [index for index, stage in enumerate(self.stages) if stage.coordinates is not None]
        return located[-1] if located else 0

    def stage_of(self, block: Block) -> int:
        """The index of the stage that a block belongs to."""
        return next(index for index, stage in enumerate(self.stages) if block in stage.blocks)

    @property
    def adaptable(self) -> dict[str, str]:
        """Kind of part -> where it can go."""
        blocks, total = self.blocks, len(self.blocks)
        located = [stage for stage in self.stages if stage.coordinates is not None]
        linears = sum(len(b.qkv) + len(b.linears) + (b.projection is not None) for b in blocks)
        prior = "block, backbone, stem" if self.stages[0].patch_tokens is not None else "block, backbone"
        prompted = [stage for stage in located if stage.takes_prompts]
        return {
            "prompts": f"{sum(len(stage.blocks) for stage in prompted)} of {total} blocks",
            "geometry": f"{sum(len(stage.blocks) for stage in located)} of {total} blocks",
            "adapters after the MLP": f"{sum(b.mlp is not None for b in blocks)} of {total} blocks",
            "low-rank updates": f"{linears} linear layers in blocks",
            "prior from": prior if prompted else "none",
        }

    def __str__(self) -> str:
        lines = [f"backbone known by: {self.source}"]
        for index, stage in enumerate(self.stages):
            first = stage.blocks[0]
            # What was looked for by the coordinates, or with prompts, is not known without them.
            nothing = "not found" if stage.unknown else "none"
            counted = nothing if stage.coordinates is None else "as many as exceed the coordinates"
            prefix = counted if stage.prefix_tokens is None else stage.prefix_tokens
            shape = "n, c" if stage.layout == "packed" else ", ".join(stage.layout)
            lines += [
                f"stage {index}: {len(stage.blocks)} blocks '{first.path}' … '{stage.blocks[-1].path}'",
                f"  tokens:      ({shape}), c = {stage.width}, prefix tokens: {prefix}",
                f"  found in:    input{spell_steps(stage.tokens)}, "
                + " and ".join(f"output{spell_steps(steps)}" for steps in stage.outputs),
                f"  coordinates: {stage.coordinates or 'unknown: ' + (stage.unknown or 'not stated')}"
                + (f", without the last {stage.dropped}" if stage.dropped else ""),
                *([f"  samples:     {stage.samples or 'unknown'}"] if stage.layout == "packed" else []),
                f"  points:      {stage.points or 'unknown'}; made into tokens by {_list(stage.tokenizer)}",
                f"  patches:     {stage.patch_tokens or 'unknown'}",
                f"  positions:   {_positions(stage) or nothing}",
                f"  masks:       {_masks(stage) or nothing}",
                f"  prompts:     {'yes' if stage.takes_prompts else 'not tried' if stage.unknown else 'no'}",
                f"  attention:   {_attention(first)}",
                f"  projection:  {_list([first.projection])}",
                f"  MLP:         {_list([first.mlp])}; linears outside the attention: {_list(first.linears)}",
                f"  norms:       {_list(first.norms)}; ahead of the MLP {_list([first.mlp_norm])}",
            ]
        parameters = [f"{parameter.name} ({parameter.role})" for parameter in self.prefix_parameters]
        lines += [
            f"stem:          {_list(self.stem)}",
            f"prefix:        {', '.join(parameters) or ('not found' if self.stages[0].unknown else 'none')}",
            f"final norms:   {_list(self.final_norms)}",
            f"heads:         {_list(self.heads)}" + ("" if self.patches_read else ", from the prefix tokens alone"),
            f"read, not called: {', '.join(f'{read.module!r} by {read.reader!r}' for read in self.reads) or 'none'}",
            *([f"never called:  {_list(self.uncalled)}"] if self.uncalled else []),
            "can be adapted:",
            *(f"  {kind}: {where}" for kind, where in self.adaptable.items()),
        ]
        return "\n".join(lines)


def _positions(stage: Stage) -> str:
    if stage.unknown and stage.position_embedding is None:
        return ""
    return f"added {stage.position.replace('_', ' ')}, made by {_list([stage.position_embedding])}"


def _masks(stage: Stage) -> str:
    square = [f"input{spell_steps(steps)} (…, l, l)" for steps in stage.masks]
    padding = [f"input{spell_steps(steps)} (b, l)" for steps in stage.padding_masks]
    lets = ", which let attend where True" if stage.mask_visible else ""
    return ", ".join([*square, *padding]) + (lets if square or padding else "")


def _attention(block: Block) -> str:
    if block.attention is None:
        return "none: of these blocks the linear layers alone are adapted"
    return f"'{block.attention}', {block.attention_kind} {_list(block.qkv)}"


def _list(names: Sequence[str | None]) -> str:
    return ", ".join(f"'{name}'" for name in names if name) or "none"
