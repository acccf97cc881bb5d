"""Packages that only some formats need."""

import importlib
from typing import Any

from point_peft.errors import DataError


def optional(module: str, what: str, extra: str = "data") -> Any:
    """A module of a package that is not required; raises `DataError` with the command that installs it.

    `what` says what needs it, such as "LAS and LAZ files"; `extra` is the set of packages that it is in.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise DataError(
            f"{what} need {package}, which cannot be imported ({error}): pip install 'point-peft[{extra}]'"
        ) from error
