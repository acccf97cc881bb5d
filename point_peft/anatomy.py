"""What the library understands of a backbone: blocks, stages, token layout, coordinates, heads.

The blocks are found by their structure: an attention, a norm and a linear layer outside the attention. What structure
does not tell, such as where the token coordinates come from, is data for known families (`presets`), or is found in one
traced forward (`tracing`).
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from point_peft.errors import AnatomyError, quoted
from point_peft.matching import nearest_names

Layout = Literal["bgc", "gbc", "packed"]
"""How the tokens that a block receives are laid out: (b, g, c), sequence first (g, b, c), or all samples' in (n, c)."""


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
        return f"{self.side}{spell_steps(self.steps)}{other} of '{self.module}'"


def spell_steps(steps: Steps) -> str:
    """Steps as one writes them in Python: `[0].coord`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block; every entry is a module path."""

    path: str
    attention: str
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
    def attention_kind(self) -> str:
        """How query, key and value are made: by one linear layer, by several, or inside nn.MultiheadAttention."""
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
    """Whether the positional embedding is added before every block or before the first only."""
    masks: tuple[Steps, ...] = ()
    """Arguments of a block that say which token may attend to which (..., l, l). What they hold is not assumed."""
    mask_visible: bool = False
    """The entry of a boolean attention mask that lets a token be attended; in torch.nn it is False, in SDPA True."""
    padding_masks: tuple[Steps, ...] = ()
    """Arguments of a block that say which tokens (b, l) are padding."""
    prompts: bool = True
    """Whether prompts can be put among the tokens and are attended there."""
    unknown: str = ""
    """What could not be established, so that no method can use it."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every place where something of the stage is seen."""
        return tuple(tap for tap in (self.coordinates, self.samples, self.points, self.patch_tokens) if tap is not None)

    @property
    def takes_prompts(self) -> bool:
        """Whether prompts can be put among the tokens: not where these are packed, and attended in patches."""
        return self.prompts and self.layout != "packed"


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
    """What a backbone is made of. `str()` gives a readable summary; `dataclasses.replace` corrects a part of it."""

    source: str
    """The preset that supplied what structure does not tell, `traced`, or whatever the user wrote."""
    stages: tuple[Stage, ...]
    stem: tuple[str, ...] = ()
    """Frozen modules ahead of the blocks whose outputs a second pass may reuse: grouping, patch embedding."""
    prefix_parameters: tuple[PrefixParameter, ...] = ()
    final_norms: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    last_block_calls: int = 1
    """How often the block that the prior is taken after runs in one forward."""
    patches_read: bool = True
    """Whether the prediction depends on what the last block makes of the patch tokens, and not on the prefix alone."""
    reads: tuple[Read, ...] = ()
    uncalled: tuple[str, ...] = ()
    """Modules with parameters of their own that a traced forward neither called nor read."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all stages in order."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    def agrees(self, other: Anatomy) -> bool:
        """Whether another says the same, from whatever source it knows it."""
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
        """What can be adapted how: kind of part -> where it can go."""
        blocks, total = self.blocks, len(self.blocks)
        located = [stage for stage in self.stages if stage.coordinates is not None]
        linears = sum(len(b.qkv) + len(b.linears) + (b.projection is not None) for b in blocks)
        prior = "backbone, stem" if self.stages[0].patch_tokens is not None else "backbone"
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
            prefix = "as many as exceed the coordinates" if stage.prefix_tokens is None else stage.prefix_tokens
            shape = "n, c" if stage.layout == "packed" else ", ".join(stage.layout)
            lines += [
                f"stage {index}: {len(stage.blocks)} blocks '{first.path}' … '{stage.blocks[-1].path}'",
                f"  tokens:      ({shape}), c = {stage.width}, prefix tokens: {prefix}",
                f"  found in:    input{spell_steps(stage.tokens)}, "
                + " and ".join(f"output{spell_steps(steps)}" for steps in stage.outputs),
                f"  coordinates: {stage.coordinates or 'unknown: ' + (stage.unknown or 'not stated')}",
                *([f"  samples:     {stage.samples or 'unknown'}"] if stage.layout == "packed" else []),
                f"  points:      {stage.points or 'unknown'}; made into tokens by {_list(stage.tokenizer)}",
                f"  patches:     {stage.patch_tokens or 'unknown'}",
                f"  positions:   added {stage.position.replace('_', ' ')}, made by {_list([stage.position_embedding])}",
                f"  masks:       {_masks(stage)}",
                f"  prompts:     {'yes' if stage.takes_prompts else 'no'}",
                f"  attention:   '{first.attention}', {first.attention_kind} {_list(first.qkv)}",
                f"  projection:  {_list([first.projection])}",
                f"  MLP:         {_list([first.mlp])}; linears outside the attention: {_list(first.linears)}",
                f"  norms:       {_list(first.norms)}; ahead of the MLP {_list([first.mlp_norm])}",
            ]
        parameters = [f"{parameter.name} ({parameter.role})" for parameter in self.prefix_parameters]
        lines += [
            f"stem:          {_list(self.stem)}",
            f"prefix:        {', '.join(parameters) or 'none'}",
            f"final norms:   {_list(self.final_norms)}",
            f"heads:         {_list(self.heads)}" + ("" if self.patches_read else ", from the prefix tokens alone"),
            f"read, not called: {', '.join(f'{read.module!r} by {read.reader!r}' for read in self.reads) or 'none'}",
            *([f"never called:  {_list(self.uncalled)}"] if self.uncalled else []),
            "can be adapted:",
            *(f"  {kind}: {where}" for kind, where in self.adaptable.items()),
        ]
        return "\n".join(lines)


def _masks(stage: Stage) -> str:
    square = [f"input{spell_steps(steps)} (…, l, l)" for steps in stage.masks]
    padding = [f"input{spell_steps(steps)} (b, l)" for steps in stage.padding_masks]
    lets = ", which let attend where True" if stage.mask_visible else ""
    return (", ".join([*square, *padding]) or "none") + lets


def _list(names: Sequence[str | None]) -> str:
    return ", ".join(f"'{name}'" for name in names if name) or "none"


# ---- structure -------------------------------------------------------------------------------------------------------


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, None for anything else.

    A linear layer is what has a two-dimensional weight and no children: `nn.Linear`, PyG's `Linear` and the like.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)):
        return None
    return None if any(module.children()) else (weight.shape[0], weight.shape[1])


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: it says so by its class name and has no children."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


_SPLIT = frozenset({"q", "k", "v", "kv", "qk", "src", "dst", "query", "key", "value", "queries", "keys", "values"})


def _attentions(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Paths of the attention modules, each with the paths of its query, key and value projections."""
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            yield path, ()
            continue
        linears = {name: shape for name, child in module.named_children() if (shape := linear_shape(child))}
        # An MLP that widens threefold is told from a fused projection by the layer that narrows again.
        widths = {width for _, width in linears.values()}
        fused = [name for name, (out, width) in linears.items() if out == 3 * width and out not in widths]
        split = [name for name, child in module.named_children() if _SPLIT & set(name.split("_")) and _linears(child)]
        if len(fused) == 1 and len(_linears(module)) >= 2:
            yield path, (f"{path}.{fused[0]}",)
        elif not fused and len(split) >= 2:
            # In torch_geometric's convolutions the layer for the values has no name but `lin`.
            values = [name for name in linears if name == "lin" and {"lin_src", "lin_dst"} <= set(split)]
            projections = [child for name in (*split, *values) for child in _linears(module.get_submodule(name), name)]
            yield path, tuple(f"{path}.{name}" for name in projections)


def _linears(module: nn.Module, path: str = "") -> list[str]:
    """The paths of the linear layers of a module, itself among them, which has the path `path`."""
    return [name for name, child in module.named_modules(prefix=path) if linear_shape(child)]


def find_blocks(modules: Mapping[str, nn.Module]) -> dict[str, Block]:
    """The transformer blocks among modules by path: the smallest ancestor of an attention with a norm and a linear."""
    every_norm = [path for path, module in modules.items() if is_norm(module)]
    every_linear = [path for path, module in modules.items() if linear_shape(module)]
    blocks: dict[str, Block] = {}
    attentions = dict(_attentions(modules))

    def outside(paths: Sequence[str], block: str, attention: str) -> tuple[str, ...]:
        within, without = block + "." if block else "", attention + "."
        return tuple(path for path in paths if path.startswith(within) and not (path + ".").startswith(without))

    for attention, qkv in attentions.items():
        flat = _flat_block(modules, attention, qkv)
        if flat is not None:
            blocks[attention] = flat
            continue
        path = attention
        while path:
            path = path.rpartition(".")[0]
            norms, linears = outside(every_norm, path, attention), outside(every_linear, path, attention)
            if norms and linears:
                break
        else:
            continue
        if not path or path in blocks:
            continue
        inside = [name for name in _linears(modules[attention], attention) if name not in qkv]
        direct = [name for name in inside if name.rpartition(".")[0] == attention]
        projection = direct if len(direct) == 1 else inside
        mlp = _mlp(modules, path, linears, attentions)
        blocks[path] = Block(
            path=path,
            attention=attention,
            qkv=qkv,
            projection=projection[0] if len(projection) == 1 else None,
            norms=norms,
            mlp=mlp,
            linears=linears,
            mlp_norm=_mlp_norm(modules, path, norms, mlp),
        )
    # A block inside another block's attention search is the container of several blocks, not a block.
    return {path: b for path, b in blocks.items() if not any(other.startswith(path + ".") for other in blocks)}


def _flat_block(modules: Mapping[str, nn.Module], path: str, qkv: Sequence[str]) -> Block | None:
    """A block, one of a list, that has its query, key and value layers itself, beside norms and other layers."""
    if not qkv or not isinstance(modules[path.rpartition(".")[0]], (nn.ModuleList, nn.ModuleDict)):
        return None
    width = (linear_shape(modules[qkv[0]]) or (0, 0))[1]
    norms = tuple(name for name, child in modules[path].named_modules(prefix=path) if is_norm(child))
    weights = [modules[name]._parameters.get("weight") for name in norms]
    linears = tuple(name for name in _linears(modules[path], path) if name not in qkv)
    if not linears or not any(weight is not None and weight.shape[0] == width for weight in weights):
        return None
    mlp = _mlp(modules, path, linears, {})
    return Block(
        path=path,
        attention=path,
        qkv=tuple(qkv),
        projection=None,
        norms=norms,
        mlp=mlp,
        linears=linears,
        mlp_norm=_mlp_norm(modules, path, norms, mlp),
    )


def _mlp(
    modules: Mapping[str, nn.Module], block: str, linears: Sequence[str], attentions: Mapping[str, Any]
) -> str | None:
    """The first child of a block whose linear layers widen and narrow again; or the layer that ends such a pair."""
    for name, _ in modules[block].named_children():
        child = f"{block}.{name}"
        shapes = [linear_shape(modules[path]) for path in linears if path.startswith(child + ".")]
        first, last = (shapes[0], shapes[-1]) if shapes else (None, None)
        attends = any((path + ".").startswith(child + ".") for path in attentions)
        if len(shapes) >= 2 and first and last and first[1] == last[0] and not attends:
            return _innermost(modules, child)
    own = [path for path in linears if path.rpartition(".")[0] == block]
    for one, two in pairwise(own):
        (wide, width), (out, hidden) = linear_shape(modules[one]) or (0, 0), linear_shape(modules[two]) or (0, 0)
        if wide == hidden and width == out and wide > width:
            return two
    return None


def mlp_linears(block: Block) -> tuple[str, str] | None:
    """The first and the last linear layer of a block's MLP; None if it has none that was found."""
    if block.mlp is None:
        return None
    inside = [path for path in block.linears if path.startswith(block.mlp + ".")]
    if inside:
        return inside[0], inside[-1]
    # The MLP is then the second of two layers side by side.
    beside = [path for path in block.linears if path.rpartition(".")[0] == block.mlp.rpartition(".")[0]]
    at = beside.index(block.mlp) if block.mlp in beside else 0
    return (beside[at - 1], block.mlp) if at else None


def mlp_entrance(block: Block) -> str | None:
    """The module whose input is that of a block's MLP: the MLP itself, or its first layer where it is not a module."""
    ends = mlp_linears(block)
    return ends[0] if ends is not None and ends[1] == block.mlp else block.mlp


def _mlp_norm(modules: Mapping[str, nn.Module], block: str, norms: Sequence[str], mlp: str | None) -> str | None:
    """The second of a block's own norms, as pre-norm blocks have it; a traced forward verifies it."""
    # What stands beside layers in a child of the block, as in a positional encoding, is not the block's own.
    own = [path for path in norms if not _linears(modules[f"{block}.{path[len(block) + 1 :].split('.')[0]}"])]
    return own[1] if mlp is not None and len(own) > 1 else None


def _innermost(modules: Mapping[str, nn.Module], path: str) -> str:
    """Down from containers of one module: those of some models do not return tokens as a tensor."""
    inner = [name for name, child in modules[path].named_children() if _linears(child)]
    if len(inner) != 1 or isinstance(modules[f"{path}.{inner[0]}"], (nn.ModuleList, nn.ModuleDict)):
        return path
    return _innermost(modules, f"{path}.{inner[0]}")


def block_width(model: nn.Module, block: Block) -> int:
    """The number of channels c of a block's tokens, read from its norms, its own before those of its children."""
    for path in sorted(block.norms, key=lambda path: path.count(".")):
        weight = model.get_submodule(path)._parameters.get("weight")
        if weight is not None:
            return weight.shape[0]
    raise AnatomyError(f"cannot tell the token width of block '{block.path}': none of its norms has a weight")


def stage_groups(model: nn.Module, blocks: Sequence[Block]) -> list[tuple[Block, ...]]:
    """Blocks in order, grouped into stages: neighbours of one container, class and width."""

    def kind(block: Block) -> tuple[str, type[nn.Module], int]:
        container = re.sub(r"\d+$", "", block.path)
        return container, type(model.get_submodule(block.path)), block_width(model, block)

    return [tuple(group) for _, group in groupby(blocks, kind)]


def prefix_rows(tensor: Tensor) -> int:
    """How many token rows a prefix tensor (1, rows, c), (rows, c) or (c,) stands for."""
    return tensor.numel() // tensor.shape[-1]


# ---- as JSON ---------------------------------------------------------------------------------------------------------


def to_json(anatomy: Anatomy) -> dict[str, Any]:
    """An anatomy as JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(anatomy)))
    return plain


def from_json(data: Any) -> Anatomy:
    """The anatomy that `to_json` gave; raises `AnatomyError` for anything else."""
    found: Anatomy = _build(Anatomy, data)
    return found


def _build(hint: Any, value: Any) -> Any:
    """A JSON value as what an annotation asks for."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in options:
            return None
        chosen = [option for option in options if option is not types.NoneType]
        if len(chosen) == 1:
            return _build(chosen[0], value)
        if type(value) in chosen:
            return value
    elif origin is Literal:
        if value in options:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_build(options[0], item) for item in value)
    elif is_dataclass(hint) and isinstance(hint, type):
        names = {item.name for item in fields(hint)}
        needed = {item.name for item in fields(hint) if item.default is MISSING}
        if isinstance(value, dict) and needed <= set(value) <= names:
            hints = get_type_hints(hint)
            return hint(**{name: _build(hints[name], item) for name, item in value.items()})
    elif type(value) is hint:
        return value
    raise AnatomyError(f"an anatomy holds {quoted(value)} where {getattr(hint, '__name__', hint)} is expected")


def check_anatomy(model: nn.Module, anatomy: Anatomy) -> None:
    """Raise `AnatomyError` if an anatomy names a module or parameter that the model has not."""
    modules = dict(model.named_modules(remove_duplicate=False))
    named: list[str | None] = [*anatomy.stem, *anatomy.final_norms, *anatomy.heads]
    named += [path for read in anatomy.reads for path in (read.module, read.reader)]
    if not anatomy.stages or not all(stage.blocks for stage in anatomy.stages):
        raise AnatomyError("an anatomy needs at least one stage, and every stage at least one block")
    for stage in anatomy.stages:
        named += [tap.module for tap in stage.taps]
        named += [*stage.tokenizer, stage.position_embedding]
        for block in stage.blocks:
            named += [
                block.path,
                block.attention,
                *block.qkv,
                block.projection,
                *block.norms,
                block.mlp,
                *block.linears,
                block.mlp_norm,
            ]
        _check_stage(stage)
    if from_json(to_json(anatomy)) != anatomy:
        raise AnatomyError("an anatomy holds tuples, not lists")
    for path in named:
        if path is not None and path not in modules:
            near = nearest_names(path, list(modules))
            raise AnatomyError(
                f"the anatomy names {quoted(path)}, which {type(model).__name__} has not; nearest: {near}"
            )
    parameters = dict(model.named_parameters())
    for parameter in anatomy.prefix_parameters:
        if parameter.name not in parameters:
            near = nearest_names(parameter.name, list(parameters), what="parameter")
            name = quoted(parameter.name)
            raise AnatomyError(f"the anatomy names the parameter {name}, which is not there; nearest: {near}")
        rows, prefix = prefix_rows(parameters[parameter.name]), anatomy.stages[0].prefix_tokens
        if parameter.row < 0 or (prefix is not None and parameter.row + rows > prefix):
            raise AnatomyError(
                f"the anatomy puts {rows} rows of '{parameter.name}' at row {parameter.row} of {prefix} prefix tokens"
            )


def _check_stage(stage: Stage) -> None:
    """Raise `AnatomyError` for what no stage can be."""
    steps = [stage.tokens, *stage.outputs, *stage.masks, *stage.padding_masks, *(tap.steps for tap in stage.taps)]
    negative = any(isinstance(step, int) and step < 0 for way in steps for step in way)
    if negative or not stage.tokens or not stage.outputs:
        raise AnatomyError(
            f"the stage of '{stage.blocks[0].path}' says where tensors are by numbers from 0 and names; its tokens "
            "need at least one of them, its outputs at least one place"
        )
    paths = [block.path for block in stage.blocks]
    if len(set(paths)) != len(paths) or not all(paths):
        raise AnatomyError(f"the blocks of a stage must be different modules of the model, got {paths}")
    for block in stage.blocks:
        parts = [block.attention, block.mlp, block.mlp_norm, block.projection]
        parts += [*block.qkv, *block.norms, *block.linears]
        outside = [part for part in parts if part is not None and not (part + ".").startswith(block.path + ".")]
        if outside:
            raise AnatomyError(f"the anatomy says that '{outside[0]}' is a part of block '{block.path}': it is not")
