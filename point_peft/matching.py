"""Which names a list of entries or a regular expression means, and what is near when it means none.

The one rule for every field that names modules: a list holds names, exact or a dotted suffix; a single string is a
regular expression for the whole name; every list entry, and every expression, must match something.
"""

from collections.abc import Sequence

from point_peft.errors import MatchError, no_match
from point_peft.expressions import match_expression


def match_names(
    patterns: str | Sequence[str],
    names: Sequence[str],
    *,
    what: str = "module",
    field: str = "target_modules",
    required: bool = True,
    share: int = 1,
) -> tuple[str, ...]:
    """The names that `patterns` means, in the order of `names` and each once.

    A list entry means the names equal to it or ending in "." and it. A string is a regular expression for the whole
    name. The empty name (a model's root) is never matched. `what` and `field` are for the errors: what is being named
    and which field named it. Not `required`, an entry may match nothing. That many as `share` says together take no
    longer than one may.

    Raises `MatchError` if an entry or the expression matches no name, is empty or is not a string, or if the
    expression is invalid, too large, or uses a construct that is not supported (flags, back-references, look-behind).
    """
    names = [name for name in dict.fromkeys(names) if name]
    if isinstance(patterns, str):
        return match_expression(patterns, names, what, field, required, share)
    meant: set[str] = set()
    for entry in patterns:
        if not isinstance(entry, str) or not entry:
            raise MatchError(f"{field}: an entry must be a non-empty string, not {entry!r}")
        hits = [name for name in names if name == entry or name.endswith("." + entry)]
        if required and not hits:
            is_name = entry.replace(".", "").isidentifier() or entry.replace(".", "").isalnum()
            hint = "" if is_name else "; a list holds names, a regular expression is given as one string"
            raise no_match(entry, names, what, field, hint)
        meant.update(hits)
    return tuple(name for name in names if name in meant)
