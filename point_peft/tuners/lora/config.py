"""The configuration of LoRA: which layers, of which rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from torch import nn

from point_peft.anatomy.description import Block
from point_peft.anatomy.structure import linear_shape
from point_peft.config import FrozenMapping, TunerConfig, require
from point_peft.errors import AnatomyError, MatchError, quoted
from point_peft.matching import match_names
from point_peft.nearest import nearest_names
from point_peft.parts.backbone import Backbone, narrowed
from point_peft.parts.base import Blueprint
from point_peft.tuners.lora.parts import LoraPart, QkvLoraPart

V = TypeVar("V")

QKV: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
# A key of a pattern that is no more than a name, with or without an anchor, which nothing in it can make slow.
_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])+")
_ROLES = {"q": {"q", "query", "queries"}, "k": {"k", "key", "keys"}, "v": {"v", "value", "values"}}


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TunerConfig):
    """LoRA on linear layers and nn.Conv1d; `target_modules=None` means the query, key and value of every block.

    Where such a projection is not called but its weight is read (`nn.MultiheadAttention`, EVA attention), the weight is
    adapted; the fused one of `nn.MultiheadAttention` is meant by the name of the attention itself.

    `qkv` says which of query, key and value are adapted, where one fused projection makes all three, one after the
    other. `rank_pattern` and `alpha_pattern` are for layers of another rank or alpha: a key is a module's path, the end
    of one after a dot, or a regular expression for it; the first that matches counts.
    """

    method: ClassVar[str] = "LORA"

    r: int = 8
    """The rank of an update."""
    lora_alpha: float = 8
    """What an update is scaled by, over r."""
    lora_dropout: float = 0.0
    """Dropout of an update's input."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps large ranks alive."""
    use_dora: bool = False
    """Train the length of every row of the weight too."""
    qkv: Sequence[Literal["q", "k", "v"]] = QKV
    """Which of query, key and value are adapted."""
    rank_pattern: Mapping[str, int] = FrozenMapping()
    """Other ranks, by layer."""
    alpha_pattern: Mapping[str, float] = FrozenMapping()
    """Other alphas, by layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r >= 1, self, "r", "1 or more")
        require(self.lora_alpha > 0, self, "lora_alpha", "more than 0")
        require(0.0 <= self.lora_dropout < 1.0, self, "lora_dropout", "0 or more and less than 1")
        require(0 < len(self.qkv) == len(set(self.qkv)), self, "qkv", "one or more of 'q', 'k', 'v', each once")
        object.__setattr__(self, "qkv", tuple(name for name in QKV if name in self.qkv))
        require(all(r >= 1 for r in self.rank_pattern.values()), self, "rank_pattern", "ranks of 1 or more")
        require(all(a > 0 for a in self.alpha_pattern.values()), self, "alpha_pattern", "values of more than 0")

    def build(self, backbone: Backbone) -> Blueprint:
        paths, split = self._targets(backbone)
        ranks = pattern_values(self.rank_pattern, paths, "rank_pattern")
        alphas = pattern_values(self.alpha_pattern, paths, "alpha_pattern")
        plan = Blueprint()
        for path in paths:
            r, alpha = ranks.get(path, self.r), alphas.get(path, self.lora_alpha)
            part = self._part(path, backbone.modules[path], r, alpha, path not in split)
            if part.weight != "weight":
                part.act_by_weight(path)
            plan.parts.append((path, part))
        return plan

    def _targets(self, backbone: Backbone) -> tuple[list[str], frozenset[str]]:
        """The layers that are meant, and those among them that were chosen by `qkv`."""
        blocks: list[Block] | None = None
        split: frozenset[str] = frozenset()
        if self.target_modules is None or self.layers_to_transform is not None:
            blocks = [block for _, block in backbone.select_blocks(self.method, None, None, self.layers_to_transform)]
        if self.target_modules is not None:
            paths = list(match_names(self.target_modules, list(backbone.modules)))
        else:
            paths = [path for block in blocks or () for path in self._projections(block)]
            split = frozenset(path for block in blocks or () if len(block.qkv) > 1 for path in block.qkv)
        return narrowed(paths, self.method, self.exclude_modules, blocks), split

    def _projections(self, block: Block) -> Sequence[str]:
        """The layers of a block that make query, key and value, as far as they are chosen."""
        if len(block.qkv) <= 1 or self.qkv == QKV:
            return block.qkv or (block.attention,)
        roles = {path: _role(path.removeprefix(f"{block.attention}.")) for path in block.qkv}
        unknown = [path for path, role in roles.items() if role is None]
        if unknown:
            raise AnatomyError(
                f"qkv={self.qkv}: whether '{unknown[0]}' makes the query, the key or the value cannot be told from its "
                "name: leave qkv out and name the layers in target_modules"
            )
        return [path for path, role in roles.items() if role in self.qkv]

    def _part(self, path: str, module: nn.Module, r: int, alpha: float, fused: bool) -> LoraPart:
        scale = alpha / (math.sqrt(r) if self.use_rslora else r)
        weight = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        shape = _shape(module, weight)
        if shape is None:
            raise AnatomyError(
                f"'{path}' is a {type(module).__name__}; {self.method} adapts linear layers and nn.Conv1d of one group"
            )
        if self.qkv == QKV or not fused:
            return LoraPart(module, weight, r, scale, self.lora_dropout, self.use_dora)
        if shape[0] != 3 * shape[1] or isinstance(module, nn.Conv1d):
            raise AnatomyError(
                f"qkv={self.qkv} chooses rows of a fused projection, and '{path}' {shape} is none: leave it out, or "
                "leave qkv out and name the layers in target_modules"
            )
        chosen = tuple(QKV.index(name) for name in self.qkv)
        return QkvLoraPart(module, weight, r, scale, self.lora_dropout, self.use_dora, chosen)


def _shape(module: nn.Module, weight: str) -> tuple[int, int] | None:
    """(out, in) of the layer whose weight is adapted, None where it is of a kind that cannot be.

    An nn.MultiheadAttention whose query, key and value are of different widths has no fused projection.
    """
    if isinstance(module, nn.Conv1d):
        return (module.out_channels, module.in_channels) if module.groups == 1 else None
    if weight == "weight":
        return linear_shape(module)
    fused = module._parameters.get(weight)
    return None if fused is None else (fused.shape[0], fused.shape[1])


def _role(name: str) -> str | None:
    """Which of q, k and v a layer of an attention makes that is called so there, None if the name does not say."""
    words = set(re.split(r"[._]", name.lower()))
    found = [role for role, names in _ROLES.items() if names & words]
    return found[0] if len(found) == 1 else None


def pattern_values(pattern: Mapping[str, V], paths: Sequence[str], field: str, required: bool = True) -> dict[str, V]:
    """Path -> the value of the first key that matches it; if `required`, every key must match one of the paths."""
    found: dict[str, V] = {}
    for key, value in pattern.items():
        hits = _matched(key, paths, field, len(pattern))
        if required and not hits:
            near = nearest_names(key, paths)
            raise MatchError(f"no adapted module matches {quoted(key)} ({field}); nearest: {near}")
        for path in hits:
            found.setdefault(path, value)
    return found


def _matched(key: str, paths: Sequence[str], field: str, share: int) -> Sequence[str]:
    """The paths that a key of a pattern means: as a regular expression, for the whole path or its end after a dot."""
    expression = rf"(.*\.)?({key})"
    if _NAME.fullmatch(key):
        compiled = re.compile(expression)
        return [path for path in paths if compiled.fullmatch(path)]
    return match_names(expression, paths, field=field, required=False, share=share)


def anchored(path: str) -> str:
    """A key of a pattern that matches this path alone, and not others that end in it."""
    return "^" + re.escape(path)
