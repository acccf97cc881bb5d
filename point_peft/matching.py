"""Which names a list of entries or a regular expression means, and what is near when it means none.

The one rule for every field that names modules: a list holds names, exact or a dotted suffix; a single string is a
regular expression for the whole name; every list entry, and every expression, must match something.

An expression may come from a stranger's file, and `re` backtracks without bound. So the expression is only parsed by
Python; matching it follows the set of all positions that it can have reached, which needs no backtracking.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from point_peft.errors import MatchError

MAX_PATTERN_LENGTH = 1000
MAX_PATTERN_GROUPS = 100
MAX_STEPS = 1_000_000
MAX_COMPARED = 100

# The standard library's own parser; its public name in Python 3.10 warns in later versions.
_parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


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
        return _match_expression(patterns, names, what, field, required, share)
    found: set[str] = set()
    for entry in patterns:
        if not isinstance(entry, str) or not entry:
            raise MatchError(f"{field}: an entry must be a non-empty string, not {entry!r}")
        hits = [name for name in names if name == entry or name.endswith("." + entry)]
        if required and not hits:
            is_name = entry.replace(".", "").isidentifier() or entry.replace(".", "").isalnum()
            hint = "" if is_name else "; a list holds names, a regular expression is given as one string"
            raise _no_match(entry, names, what, field, hint)
        found.update(hits)
    return tuple(name for name in names if name in found)


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
        return ", ".join(_shown(groups[group], what) for group in near[:limit])
    tops = list(dict.fromkeys(name.split(".")[0] for name in names if name))
    if not tops:
        return f"none (there are no {what}s)"
    return "none (there are " + ", ".join(map(repr, tops[:6])) + (", …)" if len(tops) > 6 else ")")


def _shown(group: list[str], what: str) -> str:
    return repr(group[0]) if len(group) == 1 else f"{group[0]!r} ({len(group)} {what}s)"


def _likeness(query: list[str], name: list[str]) -> float:
    """0 to 2: how alike the last words are, plus how alike the whole is to the name or to as long an end of it."""
    last = _ratio(query[-1], name[-1])
    whole = ".".join(query)
    return last + max(_ratio(whole, ".".join(name)), _ratio(whole, ".".join(name[-len(query) :])))


def _ratio(a: str, b: str) -> float:
    a, b = a[-MAX_COMPARED:], b[-MAX_COMPARED:]
    alike = SequenceMatcher(None, a, b, autojunk=False).ratio()
    return max(alike, 0.7) if len(a) > 2 and a in b else alike


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")


def _no_match(wanted: str, names: Sequence[str], what: str, field: str, hint: str) -> MatchError:
    nearest = nearest_names(wanted, names, what=what)
    return MatchError(f"no {what} matches {_short(wanted)} ({field}); nearest: {nearest}{hint}")


# ---- regular expressions ---------------------------------------------------------------------------------------------


class _Scan:
    """One name under an expression. A set of positions is an int: bit i stands for the place before character i."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0
        self._masks: dict[Callable[[str], bool], int] = {}

    def where(self, test: Callable[[str], bool]) -> int:
        """The positions whose character passes the test."""
        if test not in self._masks:
            self._masks[test] = sum(1 << i for i, character in enumerate(self.text) if test(character))
        return self._masks[test]


_Matcher = Callable[[_Scan, int], int]
"""From the positions where a piece of an expression may begin to those where it may end."""


class _Unsupported(Exception):
    """The message names a construct that is not supported."""


class _TooMuchWork(Exception):
    """Matching has taken more steps than it may."""


def _match_expression(
    pattern: str, names: Sequence[str], what: str, field: str, required: bool, share: int
) -> tuple[str, ...]:
    if not pattern:
        raise MatchError(f"{field}: the regular expression is empty")
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise MatchError(f"{field}: the regular expression is longer than {MAX_PATTERN_LENGTH} characters")
    if pattern.count("(") > MAX_PATTERN_GROUPS:
        raise MatchError(f"{field}: the regular expression has more than {MAX_PATTERN_GROUPS} groups")
    try:
        parsed = _parser.parse(pattern)
        if parsed.state.flags & ~re.UNICODE:
            raise _Unsupported("an inline flag")
        matcher = _sequence(parsed)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        raise MatchError(f"{field}: {_short(pattern)} is not a regular expression: {error.msg}{where}") from error
    except OverflowError as error:
        raise MatchError(f"{field}: {_short(pattern)} is not a regular expression: {error}") from error
    except _Unsupported as error:
        raise MatchError(f"{field}: {_short(pattern)} uses {error}, which is not supported here") from error
    found, steps = [], MAX_STEPS - MAX_STEPS // share
    for name in names:
        scan = _Scan(name)
        scan.steps = steps
        try:
            ends = matcher(scan, 1)
        except _TooMuchWork as error:
            raise MatchError(f"{field}: {_short(pattern)} takes too long to match") from error
        if ends >> len(name) & 1:
            found.append(name)
        steps = scan.steps
    if required and not found:
        hint = ""
        if any(name == pattern or name.endswith("." + pattern) for name in names):
            hint = f"; a string is a regular expression for the whole name, a list [{pattern!r}] matches its end"
        raise _no_match(pattern, names, what, field, hint)
    return tuple(found)


def _sequence(nodes: Iterable[tuple[Any, Any]]) -> _Matcher:
    matchers = [_node(str(op), value) for op, value in nodes]

    def run(scan: _Scan, starts: int) -> int:
        for matcher in matchers:
            scan.steps += 1
            if scan.steps > MAX_STEPS:
                raise _TooMuchWork
            if not starts:
                break
            starts = matcher(scan, starts)
        return starts

    return run


def _node(op: str, value: Any) -> _Matcher:
    if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return _character(_test(op, value))
    if op == "BRANCH":
        return _branch([_sequence(option) for option in value[1]])
    if op == "SUBPATTERN":
        _, added, removed, body = value
        if added or removed:
            raise _Unsupported("an inline flag")
        return _sequence(body)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):  # greedy or not: the same names match
        low, high, body = value
        return _repeat(_sequence(body), int(low), int(high))
    if op in ("ASSERT", "ASSERT_NOT"):
        direction, body = value
        if direction < 0:
            raise _Unsupported("a look-behind")
        return _look_ahead(_sequence(body), op == "ASSERT")
    if op == "AT":
        return _place(str(value))
    construct = {"GROUPREF": "a back-reference", "GROUPREF_EXISTS": "a conditional group"}
    raise _Unsupported(construct.get(op, op.lower().replace("_", " ")))


def _character(test: Callable[[str], bool]) -> _Matcher:
    return lambda scan, starts: (starts & scan.where(test)) << 1


def _branch(options: list[_Matcher]) -> _Matcher:
    def run(scan: _Scan, starts: int) -> int:
        ends = 0
        for option in options:
            ends |= option(scan, starts)
        return ends

    return run


def _repeat(body: _Matcher, low: int, high: int) -> _Matcher:
    def run(scan: _Scan, starts: int) -> int:
        for _ in range(low):
            ends = body(scan, starts)
            if ends == starts:
                break
            starts = ends
        reached = fresh = starts
        for _ in range(high - low):
            fresh = body(scan, fresh) & ~reached
            if not fresh:
                break
            reached |= fresh
        return reached

    return run


def _look_ahead(body: _Matcher, wanted: bool) -> _Matcher:
    def run(scan: _Scan, starts: int) -> int:
        places = [1 << i for i in range(len(scan.text) + 1) if starts >> i & 1]
        return sum(place for place in places if bool(body(scan, place)) == wanted)

    return run


def _place(kind: str) -> _Matcher:
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return lambda scan, starts: starts & 1
    if kind in ("AT_END", "AT_END_STRING"):
        return lambda scan, starts: starts & 1 << len(scan.text)
    if kind not in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
        raise _Unsupported(kind.lower().replace("_", " "))

    def run(scan: _Scan, starts: int) -> int:
        words = scan.where(_is_word)
        boundaries = words ^ words << 1
        return starts & (boundaries if kind == "AT_BOUNDARY" else ~boundaries)

    return run


def _test(op: str, value: Any) -> Callable[[str], bool]:
    """A question to one character, from the parser's words for it."""
    if op == "LITERAL":
        return _is_literal(value)
    if op == "NOT_LITERAL":
        return lambda character: ord(character) != value
    if op == "ANY":
        return _is_any
    if op == "RANGE":
        low, high = value
        return lambda character: low <= ord(character) <= high
    if op == "CATEGORY":
        kind = str(value)
        test = _CATEGORIES[kind.replace("NOT_", "")]
        return (lambda character: not test(character)) if "NOT_" in kind else test
    assert op == "IN", op
    negated = str(value[0][0]) == "NEGATE"
    tests = [_test(str(item), argument) for item, argument in value[negated:]]
    return lambda character: any(test(character) for test in tests) != negated


@cache
def _is_literal(code: int) -> Callable[[str], bool]:
    literal = chr(code)
    return lambda character: character == literal


def _is_any(character: str) -> bool:
    return character != "\n"


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": _is_word,
}
