"""A backbone as a method sees it while it plans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from point_peft.anatomy.description import Anatomy, Block
from point_peft.errors import AnatomyError
from point_peft.matching import match_names

Names = str | Sequence[str] | None
"""A regular expression or a list of names, as `match_names` reads them; None: nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A backbone as a method sees it while it plans: to be read, not changed."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    """Every module by path, under each of its names."""
    anatomy: Anatomy | None
    why_unknown: str = ""
    """The reason why there is no anatomy."""
    tuned_tokens: frozenset[str] = frozenset()
    """Prefix tokens and positions that a method before this one in the adapter trains."""
    pooled: frozenset[str] = frozenset()
    """Names, of `heads.POOLS`, of what the adapter's own heads pool of the tokens; empty for the base's heads."""

    def known_anatomy(self, method: str) -> Anatomy:
        """The anatomy, which the method cannot do without."""
        if self.anatomy is None:
            raise AnatomyError(
                f"{method} adapts transformer blocks and needs to know how {type(self.model).__name__} is built, but "
                f"{self.why_unknown}"
            )
        return self.anatomy

    def select_blocks(
        self, method: str, targets: Names, excluded: Names, layers: Sequence[int] | None
    ) -> tuple[tuple[int, Block], ...]:
        """(number, block) of the blocks that are meant: all, or those that the three fields of a config leave."""
        blocks = self.known_anatomy(method).blocks
        names = [block.path for block in blocks]
        chosen = set(names) if targets is None else set(match_names(targets, names, what="block"))
        if excluded is not None:
            chosen -= set(match_names(excluded, names, what="block", field="exclude_modules"))
        for layer in layers or ():
            if layer >= len(blocks):
                raise AnatomyError(
                    f"layers_to_transform: there is no block {layer}, the blocks are 0 to {len(blocks) - 1}"
                )
        kept = tuple((i, b) for i, b in enumerate(blocks) if b.path in chosen and (layers is None or i in layers))
        if not kept:
            raise AnatomyError(f"{method}: target_modules, exclude_modules and layers_to_transform leave no block")
        return kept


def narrowed(paths: Sequence[str], method: str, excluded: Names, blocks: Sequence[Block] | None) -> list[str]:
    """The modules that `exclude_modules` and, where blocks are given, `layers_to_transform` leave; at least one."""
    kept = [p for p in paths if blocks is None or any(p.startswith(block.path + ".") for block in blocks)]
    if excluded is not None:
        out = set(match_names(excluded, kept, field="exclude_modules"))
        kept = [path for path in kept if path not in out]
    if not kept:
        raise AnatomyError(f"{method}: exclude_modules and layers_to_transform leave no module")
    return kept
