"""Flags of a command line for the fields of a frozen dataclass: names, help and values come from the class alone."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_origin

import yaml  # type: ignore[import-untyped]

from point_peft.errors import PointPeftError, quoted
from point_peft.schema import hints_of

ABSENT: Any = object()
"""The value of a flag that was not given."""


def add_flags(parser: argparse.ArgumentParser, kind: type[Any], title: str, without: Iterable[str] = ()) -> None:
    """Give a parser a flag --field-name for each field of a dataclass but those left out."""
    group, help_texts, left_out = parser.add_argument_group(title), field_docs(kind), set(without)
    hints: dict[str, Any] = hints_of(kind)  # type: ignore[arg-type]
    for item in fields(kind):
        if item.name in left_out:
            continue
        flag, text = f"--{item.name.replace('_', '-')}", help_texts.get(item.name, "")
        words = f"{text} (default: {_shown(item)})".replace("%", "%%").strip()
        if hints[item.name] is bool:
            group.add_argument(flag, dest=item.name, action=argparse.BooleanOptionalAction, default=ABSENT, help=words)
        else:
            group.add_argument(flag, dest=item.name, metavar="VALUE", default=ABSENT, help=words)


def given_flags(options: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """Field -> value of the flags that were given, as the annotations ask for them."""
    given = {item.name: getattr(options, item.name, ABSENT) for item in fields(kind)}
    hints: dict[str, Any] = hints_of(kind)  # type: ignore[arg-type]
    return {
        name: value if isinstance(value, bool) else value_of(value, hints[name], f"--{name.replace('_', '-')}")
        for name, value in given.items()
        if value is not ABSENT
    }


def value_of(text: str, hint: Any, flag: str) -> Any:
    """The value that a text stands for: a list by commas, else YAML; a string stays a string."""
    kinds = [hint, *get_args(hint)]
    if text.lower() in ("none", "null") and type(None) in kinds:
        return None
    listed = [kind for kind in kinds if get_origin(kind) in (tuple, Sequence) or _is_sequence(kind)]
    if listed and not text.startswith(("[", "{")):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if get_args(listed[0])[0] is str:
            return parts
        if "," in text:
            return [_yaml(part, flag) for part in parts]
    if str in kinds and not any(kind in kinds for kind in (int, float, bool)):
        return text
    return _yaml(text, flag)


def _is_sequence(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _yaml(text: str, flag: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PointPeftError(f"{flag} is {quoted(text)}, which is no value: {' '.join(str(error).split())}") from error


def _shown(item: Field[Any]) -> str:
    if item.default is MISSING:
        return "none"
    value = item.default
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "none"
    return str(value)


def field_docs(kind: type[Any]) -> Mapping[str, str]:
    """Field -> the text that stands below it in the class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and documented:
            assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            texts[field.target.id] = " ".join(str(below.value.value).replace("`", "").split())
    return texts
