"""The errors of the package, all of them `ValueError`s, so a caller may catch that alone; and names near a miss."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

MAX_COMPARED = 100


class PointPeftError(ValueError):
    """Base of every error that point_peft raises on purpose."""


class MatchError(PointPeftError):
    """A name or pattern matches nothing, matches the wrong thing, or is not a pattern at all."""


class AnatomyError(PointPeftError):
    """The parts of the backbone cannot be established, or do not fit what was asked for."""


class AdapterError(PointPeftError):
    """An adapter name is unknown, duplicate or invalid, or the adapter is in the wrong state for the call."""


class AdapterFileError(PointPeftError):
    """A file cannot be read, or what it holds does not fit the model."""


class DataError(PointPeftError):
    """A file or a folder of clouds is missing, cannot be read, or does not hold what is asked of it."""


class HubError(PointPeftError):
    """The Hub refuses or fails, or what it holds is not what it states."""


def quoted(value: object, limit: int = 80) -> str:
    """Words of a stranger's file, fit for an error: quoted, on one line, cut if they are long."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[: limit - 3] + "..." + (text[0] if isinstance(value, str) else "")


def nearest_names(wanted: str, names: Sequence[str], limit: int = 3, *, what: str = "module") -> str:
    """For an error: the names most like `wanted`, as "'blocks.0.attn.qkv' (12 modules), 'norm'".

    Names that differ only in numbers count as one, shown by the first of them. If nothing is near: "none (there are
    'blocks', 'norm')", with the first components of some names.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        if name:
            groups.setdefault(re.sub(r"\d+", "0", name).lower(), []).append(name)
    # An expression is compared by its words; a class such as \d is not a word of a name.
    words = re.findall(r"\w+", re.sub(r"\\\w", " ", wanted[-MAX_COMPARED:].lower()))
    query = [re.sub(r"\d+", "0", word) for word in words]
    scores = {group: _likeness(query, group.split(".")) for group in groups} if query else {}
    best = max(scores.values(), default=0.0)
    near = sorted((group for group in scores if scores[group] >= max(1.1, best - 0.25)), key=lambda g: -scores[g])
    if near:
        alike = [groups[group] for group in near[:limit]]
        return ", ".join(repr(g[0]) if len(g) == 1 else f"{g[0]!r} ({len(g)} {what}s)" for g in alike)
    tops = list(dict.fromkeys(name.split(".")[0] for name in names if name))
    if not tops:
        return f"none (there are no {what}s)"
    return "none (there are " + ", ".join(map(repr, tops[:6])) + (", …)" if len(tops) > 6 else ")")


def _likeness(query: list[str], name: list[str]) -> float:
    """0 to 2: how alike the last words are, plus how alike the whole is to the name or to as long an end of it."""
    last = _ratio(query[-1], name[-1])
    whole = ".".join(query)
    return last + max(_ratio(whole, ".".join(name)), _ratio(whole, ".".join(name[-len(query) :])))


def _ratio(a: str, b: str) -> float:
    a, b = a[-MAX_COMPARED:], b[-MAX_COMPARED:]
    alike = SequenceMatcher(None, a, b, autojunk=False).ratio()
    return max(alike, 0.7) if len(a) > 2 and a in b else alike


def no_match(wanted: str, names: Sequence[str], what: str, field: str, hint: str) -> MatchError:
    nearest = nearest_names(wanted, names, what=what)
    return MatchError(f"no {what} matches {quoted(wanted, 120)} ({field}); nearest: {nearest}{hint}")
