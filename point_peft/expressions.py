"""Regular expressions of strangers, matched without backtracking.

An expression may come from a stranger's file, and `re` backtracks without bound. So the expression is only parsed by
Python; matching it follows the set of all positions that it can have reached, which needs no backtracking.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from point_peft.errors import MatchError, no_match, quoted

MAX_PATTERN_LENGTH = 1000
MAX_PATTERN_GROUPS = 100
MAX_STEPS = 1_000_000
# The standard library's own parser; its public name in Python 3.10 warns in later versions.
_parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class _Scan:
    """One name under an expression. A set of positions is an int: bit i stands for the place before character i."""

    def __init__(self, text: str, steps: int) -> None:
        self.text = text
        self.steps = steps
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


def match_expression(
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
        raise MatchError(f"{field}: {quoted(pattern, 120)} is not a regular expression: {error.msg}{where}") from error
    except OverflowError as error:
        raise MatchError(f"{field}: {quoted(pattern, 120)} is not a regular expression: {error}") from error
    except _Unsupported as error:
        raise MatchError(f"{field}: {quoted(pattern, 120)} uses {error}, which is not supported here") from error
    matched, steps = [], MAX_STEPS - MAX_STEPS // share
    for name in names:
        scan = _Scan(name, steps)
        try:
            ends = matcher(scan, 1)
        except _TooMuchWork as error:
            raise MatchError(f"{field}: {quoted(pattern, 120)} takes too long to match") from error
        if ends >> len(name) & 1:
            matched.append(name)
        steps = scan.steps
    if required and not matched:
        hint = ""
        if any(name == pattern or name.endswith("." + pattern) for name in names):
            hint = f"; a string is a regular expression for the whole name, a list [{pattern!r}] matches its end"
        raise no_match(pattern, names, what, field, hint)
    return tuple(matched)


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
        test = _test(op, value)
        return lambda scan, starts: (starts & scan.where(test)) << 1
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
        test = _CLASSES[kind.rpartition("_")[2]]
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


_CLASSES: dict[str, Callable[[str], bool]] = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}
