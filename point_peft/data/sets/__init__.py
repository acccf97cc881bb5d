"""The field's own data sets, as they are downloaded: one module each, with `recognises` and `read`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions


class KnownSet(NamedTuple):
    """One of the field's sets: how its folder is told, and read."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, DataOptions], CloudSet]


SETS: dict[str, KnownSet] = {}
"""Name -> the set; filled from the modules of this folder."""
