"""An anatomy as JSON values."""

from __future__ import annotations

import json
import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from point_peft.anatomy.description import Anatomy
from point_peft.errors import AnatomyError, quoted


def to_json(anatomy: Anatomy) -> dict[str, Any]:
    """An anatomy as JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(anatomy)))
    return plain


def from_json(data: Any) -> Anatomy:
    """The anatomy that `to_json` gave; raises `AnatomyError` for anything else."""
    found: Anatomy = _build(Anatomy, data)
    return found


def _build(hint: Any, value: Any) -> Any:
    """A JSON value as what an annotation asks for."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in options:
            return None
        chosen = [option for option in options if option is not types.NoneType]
        if len(chosen) == 1:
            return _build(chosen[0], value)
        if type(value) in chosen:
            return value
    elif origin is Literal:
        if value in options:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_build(options[0], item) for item in value)
    elif is_dataclass(hint) and isinstance(hint, type):
        names = {item.name for item in fields(hint)}
        needed = {item.name for item in fields(hint) if item.default is MISSING}
        if isinstance(value, dict) and needed <= set(value) <= names:
            hints = get_type_hints(hint)
            return hint(**{name: _build(hints[name], item) for name, item in value.items()})
    elif type(value) is hint:
        return value
    raise AnatomyError(f"an anatomy holds {quoted(value)} where {getattr(hint, '__name__', hint)} is expected")
