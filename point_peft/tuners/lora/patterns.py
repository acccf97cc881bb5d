"""Values by layer: what `rank_pattern` and `alpha_pattern` say."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from point_peft.errors import MatchError, quoted
from point_peft.matching import match_names
from point_peft.nearest import nearest_names

V = TypeVar("V")

# A key of a pattern that is no more than a name, with or without an anchor, which nothing in it can make slow.
_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])+")


def pattern_values(pattern: Mapping[str, V], paths: Sequence[str], field: str, required: bool = True) -> dict[str, V]:
    """Path -> the value of the first key that matches it; if `required`, every key must match one of the paths."""
    values: dict[str, V] = {}
    for key, value in pattern.items():
        hits = _matched(key, paths, field, len(pattern))
        if required and not hits:
            near = nearest_names(key, paths)
            raise MatchError(f"no adapted module matches {quoted(key)} ({field}); nearest: {near}")
        for path in hits:
            values.setdefault(path, value)
    return values


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
