"""Modules that an adapter has to itself: a trained copy of a module of the base, or a head of another shape."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.site import clean_copy, first_names
from point_peft.anatomy.description import Anatomy, Stage
from point_peft.anatomy.structure import linear_shape, unclaimed
from point_peft.config import PeftConfig
from point_peft.errors import AdapterError, AnatomyError, quoted
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Call, Part
from point_peft.parts.tuned import TunedModule
from point_peft.running.nested import Args, Kwargs
from point_peft.running.tokens import as_layout, batch_first, output_tokens

HeadSource = nn.Module | Callable[[], nn.Module] | str
"""A head, a function without arguments that makes one, or the name of a pooled head: see `PooledHead`."""
Heads = Mapping[str, HeadSource] | None
"""Heads of an adapter's own by the names of the modules that they stand in for."""
POOLS = ("cls", "max", "mean", "prompt", "all_max", "all_mean", "raw_mean", "feature")
"""Names for what a head can pool, after the final norm: the first prefix token; the maximum or mean over the patch
tokens; the mean over the prompts that a method leaves in the sequence to its end; the maximum over patches and such
prompts; the mean over all tokens, prefix too; the same ahead of the final norm; a feature that a method offers."""


class OwnModule(TunedModule):
    """A head of the adapter's own, or a module of `modules_to_save`."""


class PooledHead(nn.Sequential):
    """Layers on pooled tokens, c channels for each entry of `pool`; it stands in for the backbone's head.

    `pool` joins names of `POOLS` by "+": "cls+max" is the head of Point-MAE (2C), "cls+prompt+max" that of IDPT and
    DAPT (3C). Whatever the backbone pools itself is not used.
    """

    def __init__(self, pool: str, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.pool = "+".join(split_pool(pool))


def mlp_head(
    channels: int,
    num_classes: int,
    pool: str,
    *,
    hidden: int = 256,
    dropout: float = 0.5,
    activation: type[nn.Module] = nn.ReLU,
) -> PooledHead:
    """The head of most point-cloud methods: three linear layers with BatchNorm and dropout on pooled tokens."""

    def layer(inputs: int) -> tuple[nn.Module, ...]:
        return nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), activation(), nn.Dropout(dropout)

    first, second = layer(channels * len(split_pool(pool))), layer(hidden)
    return PooledHead(pool, *first, *second, nn.Linear(hidden, num_classes))


def pools_of(head: nn.Module) -> tuple[str, ...]:
    """The names of what a head pools of the tokens itself; none of a head that takes what the base has pooled."""
    return split_pool(head.pool) if isinstance(head, PooledHead) else ()


def split_pool(pool: str) -> tuple[str, ...]:
    names = tuple(pool.split("+"))
    wrong = [name for name in names if name not in POOLS]
    if wrong or len(set(names)) != len(names):
        raise AdapterError(f"a head pools {quoted(pool)}; allowed: different ones of {', '.join(POOLS)}, joined by '+'")
    return names


class PooledModule(OwnModule):
    """A pooled head at the base's head: it takes what `PooledTokens` noted instead of what the base has pooled."""

    module: PooledHead

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        notes, names = call.forward.handover.notes, split_pool(self.module.pool)
        if "feature" in names:
            offered = call.forward.handover.left(call.adapter, "feature")
            if len(offered) != 1:
                raise AdapterError(
                    f"the head at '{call.path}' pools 'feature', and {len(offered)} of the adapter's methods offer one"
                )
            notes[call.adapter, "pooled", "feature"] = offered[0]
        return self.module(torch.cat([notes[call.adapter, "pooled", name].to(output.dtype) for name in names], dim=1))


class PooledTokens(Part):
    """At the final norm, or where there is none at the last block: notes what a pooled head takes of all tokens.

    Prompts that a method leaves in the sequence to its end pass through the norm with the others.
    """

    needs_coordinates = True

    def __init__(self, stage: Stage, number: int, pool: str, *, at_block: bool) -> None:
        super().__init__()
        self.stage = stage
        self.number = number
        self.names = split_pool(pool)
        self.at_block = at_block

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        prompts = call.forward.handover.left(call.adapter, "prompts")
        if self.at_block or not prompts:
            return args, kwargs
        tokens = batch_first(args[0], self.stage.layout)
        joined = torch.cat([tokens, *(prompt.to(tokens.dtype) for prompt in prompts)], dim=1)
        return (as_layout(joined, self.stage.layout), *args[1:]), kwargs

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        left = call.forward.handover.left(call.adapter, "prompts")
        given = output_tokens(self.stage, call.path, output) if self.at_block else output
        tokens = batch_first(given, self.stage.layout)
        count = sum(prompts.shape[1] for prompts in left)
        if self.at_block:
            tokens = torch.cat([tokens, *(prompts.to(tokens.dtype) for prompts in left)], dim=1)
        own, prompts = torch.split(tokens, [tokens.shape[1] - count, count], dim=1)
        ahead = tokens if self.at_block else batch_first((*args, *kwargs.values())[0], self.stage.layout)
        self._note(call, own, prompts, ahead)
        return output if self.at_block else as_layout(own, self.stage.layout)

    def _note(self, call: Call, own: Tensor, prompts: Tensor, ahead: Tensor) -> None:
        g = call.forward.seen.coordinates[self.number].shape[1]
        patches = own[:, own.shape[1] - g :]
        if ("prompt" in self.names or "all_max" in self.names) and not prompts.shape[1]:
            raise AdapterError(
                "a head pools prompts, and none of the adapter's methods leaves any in the sequence to its end: use a "
                f"method that does, or a head of {', '.join(name for name in POOLS if name != 'prompt')}"
            )
        pools: dict[str, Callable[[], Tensor]] = {
            "cls": lambda: own[:, 0],
            "max": lambda: patches.amax(dim=1),
            "mean": lambda: patches.mean(dim=1),
            "prompt": lambda: prompts.mean(dim=1),
            "all_max": lambda: torch.cat([patches, prompts], dim=1).amax(dim=1),
            "all_mean": lambda: torch.cat([own, prompts], dim=1).mean(dim=1),
            "raw_mean": lambda: ahead.mean(dim=1),
        }
        for name in self.names:
            if name in pools:
                call.forward.handover.notes[call.adapter, "pooled", name] = pools[name]()


def make_own_modules(
    backbone: Backbone, config: PeftConfig, heads: Heads, saved: Sequence[str] | None
) -> dict[str, nn.Module]:
    """The modules that an adapter has to itself, by path: what `heads` gives, else copies of the base's.

    `saved` says by full path which they are, and `heads` then names them so too; None: what the configuration says.
    """
    modules = backbone.modules
    chosen = {id(modules[path]) for path in (_saved_paths(backbone, config, heads) if saved is None else saved)}
    # In the order of the backbone, read from a file or not: an optimizer's state goes by the order of parameters.
    paths = [path for number, path in first_names(modules).items() if number in chosen]
    sources = match_heads(heads, paths) if saved is None else dict(heads or {})
    own = {p: make_head(sources[p], p, backbone) if p in sources else clean_copy(modules[p]) for p in paths}
    return {path: module.requires_grad_(True) for path, module in own.items()}


def _saved_paths(backbone: Backbone, config: PeftConfig, heads: Heads) -> tuple[str, ...]:
    """Paths of the modules that a configuration gives an adapter to itself, outer ones only."""
    names, stated = list(backbone.modules), config.saved_modules
    if stated is None:
        meant = () if backbone.anatomy is None else backbone.anatomy.heads
    else:
        meant = match_names(stated, names, field="modules_to_save")
    chosen = dict.fromkeys([*meant, *match_names(list(heads or ()), names, field="heads")])
    return tuple(p for p in chosen if not any(p.startswith(other + ".") for other in chosen))


def frozen_heads(anatomy: Anatomy | None, base: nn.Module, adapter: Adapter) -> list[str]:
    """Heads that stay as the base has them, or parts of heads: no pre-training fills them, the adapter trains none."""
    trained = {base.get_submodule(path) for path, part in adapter.all_parts() if part.own_module is not None}
    trained |= {base.get_submodule(path) for path in adapter.saved}
    whole = {inner for module in trained for inner in module.modules()}
    left: list[str] = []
    for path in () if anatomy is None else anatomy.heads:
        head = base.get_submodule(path)
        if head not in whole:
            left += [path] if trained.isdisjoint(head.modules()) else unclaimed(head, trained, path)
    return left


def warn_of_frozen_heads(anatomy: Anatomy | None, base: nn.Module, adapter: Adapter) -> None:
    """Warn of heads that the configuration leaves out where it names others; an empty list says that it is meant."""
    left = frozen_heads(anatomy, base, adapter)
    if left and adapter.config.saved_modules != ():
        listed = ", ".join(f"'{path}'" for path in left)
        warnings.warn(
            f"frozen, and no pre-training fills: {listed}. If the base was not trained to its end, this is noise. Name "
            "it in modules_to_save too, or leave that argument out, which takes all heads; [] says that none is to be "
            "trained",
            stacklevel=4,  # where the user has called get_peft_model
        )


def match_heads(heads: Heads, saved: Sequence[str]) -> dict[str, HeadSource]:
    """The `heads` argument by full module path."""
    own: dict[str, HeadSource] = {}
    for name, source in (heads or {}).items():
        for path in [name] if name in saved else match_names([name], saved, field="heads"):
            if path in own:
                raise AdapterError(f"heads names '{path}' twice")
            own[path] = source
    return own


def make_head(source: HeadSource, path: str, backbone: Backbone) -> nn.Module:
    """The head that a `heads` argument gives for a module path. A module is copied: each adapter has its own."""
    if isinstance(source, nn.Module):
        return copy.deepcopy(source)
    if isinstance(source, str):
        return _named_head(source, path, backbone)
    if not callable(source):
        raise AdapterError(
            f"heads[{path!r}] must be an nn.Module, a function that makes one, or the name of a pooled head, not "
            f"{quoted(source)}"
        )
    head = source()
    if not isinstance(head, nn.Module):
        raise AdapterError(f"heads[{path!r}] must give an nn.Module, it gave a {type(head).__name__}")
    shared = {id(p) for p in backbone.model.parameters()}.intersection(map(id, head.parameters()))
    return copy.deepcopy(head) if shared else head


def _named_head(pool: str, path: str, backbone: Backbone) -> PooledHead:
    """A pooled head with as many classes as the head of the base that it stands in for."""
    shapes = [shape for module in backbone.modules[path].modules() if (shape := linear_shape(module))]
    if not shapes:
        raise AdapterError(
            f"heads[{path!r}]={pool!r} takes the number of classes from the last linear layer there, and "
            f"'{path}' has none: pass heads.mlp_head(...)"
        )
    return mlp_head(backbone.known_anatomy("a pooled head").stages[-1].width, shapes[-1][0], pool)


def place_head(head: nn.Module, path: str, backbone: Backbone) -> list[tuple[str, Part]]:
    """The parts, by site, that a module of the adapter's own needs to stand in for that of the base."""
    if not isinstance(head, PooledHead):
        return [(path, OwnModule(head))]
    anatomy = backbone.known_anatomy("a pooled head")
    stage, norms = anatomy.stages[-1], anatomy.final_norms
    if stage.layout == "packed" or stage.coordinates is None or len(norms) > 1:
        why = "the coordinates of its tokens, by which they are counted, are not known"
        if stage.layout == "packed":
            why = "its tokens are packed"
        elif len(norms) > 1:
            why = "it has several final norms"
        raise AnatomyError(
            f"the head {head.pool!r} at '{path}' pools the tokens of {type(backbone.model).__name__} itself, and "
            f"cannot: {why}. Pass a module that takes what the base has pooled"
        )
    site = norms[0] if norms else stage.blocks[-1].path
    noting = PooledTokens(stage, len(anatomy.stages) - 1, head.pool, at_block=not norms)
    return [(site, noting), (path, PooledModule(head))]
