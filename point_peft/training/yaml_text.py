"""YAML as people write it: 1e-3 is a number, and `no` is a word."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1, but for numbers and booleans, which are those of YAML 1.2, and without dates."""


_BOOL, _INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _INT, _FLOAT, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FRACTION = r"[-+]?(?:(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(_FRACTION), list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """The value that a YAML text stands for, of plain types; raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)


def problem(error: yaml.YAMLError) -> str:
    """One line on what is wrong with a text, and where."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    said = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return place + " ".join(str(said).split())
