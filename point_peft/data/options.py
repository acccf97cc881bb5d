"""Choices about data that are opened: which form they have, how they are split and prepared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from point_peft.config import require
from point_peft.data.cloud import Task
from point_peft.data.preparing import Preparation
from point_peft.schema import Count, Limit, at_least, fits, frozen, hints_of, limits_of, spell

Share = Annotated[float, Limit("0 or more and less than 1", lambda share: 0 <= share < 1)]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Stated choices for `open_data`; what the data say themselves, such as official splits, needs none."""

    kind: str = "auto"
    """"auto": the path is recognised; or "folder" of classes, "manifest", "arrays", "scene" (one cloud or several, each
    cut into pieces), or the name of one of the field's sets."""
    task: Task | None = None
    """None: classification where clouds have labels, else segmentation."""
    group: str | None = None
    """The column of an array set or of a manifest whose equal values never lie in two splits."""
    train_groups: Sequence[str] = ()
    """The groups to train on; empty where others are named: the rest."""
    val_groups: Sequence[str] = ()
    test_groups: Sequence[str] = ()
    val_share: Share = 0.1
    """The share that is held out for validation where the data have no such split; 0: none."""
    test_share: Share = 0.2
    """The share that is held out for tests where the data have no splits at all; 0: none."""
    split_along: str | None = None
    """"x" or "y": one scene is split across this axis, from its least value on: train, validation, test."""
    gap: Annotated[float, at_least(0)] = 0.0
    """The length, in the unit of the file, between two parts of a split scene that belongs to neither."""
    tile: Annotated[float | None, Limit("more than 0", lambda tile: tile > 0)] = None
    """The side of the square columns that a scene is cut into, in the unit of the file; None: so long that a column has
    about 3/4 of `num_points` points."""
    classes: Mapping[str, Sequence[int]] | None = None
    """Name -> codes of the labels in the files that are of this class; points of other codes are unknown. None: each
    code that occurs is a class."""
    label_field: str | None = None
    """The column of the points' labels in a file; None: one that is called label, class, classification or so."""
    variant: str | None = None
    """The variant of one of the field's sets, of those that have several."""
    preparation: Preparation = Preparation()  # noqa: RUF009 - it is frozen
    seed: Annotated[int, at_least(0)] = 0
    """Of splits, of points drawn on meshes, and of points drawn from larger clouds."""
    num_samples: Count = 10_000
    """Points drawn on the surface of a mesh, before the preparation."""

    def __post_init__(self) -> None:
        if isinstance(self.classes, Mapping):
            codes = {name: frozen(values) for name, values in self.classes.items()}
            object.__setattr__(self, "classes", codes)
        for name, hint in hints_of(DataOptions).items():
            object.__setattr__(self, name, frozen(getattr(self, name)))
            require(fits(getattr(self, name), hint), self, name, spell(hint))
        for name, limits in limits_of(DataOptions).items():
            for limit in limits if getattr(self, name) is not None else ():
                require(limit.holds(getattr(self, name)), self, name, limit.words)
        require(self.val_share + self.test_share < 1, self, "test_share", "less than 1 together with val_share")
        require(self.split_along in (None, "x", "y"), self, "split_along", "'x', 'y' or None")
        require(not (self.split_along and self.names_groups), self, "split_along", "None where groups are named")
        require(self.gap == 0 or self.split_along is not None, self, "gap", "0 where split_along is None")
        codes_of_all = [code for codes in (self.classes or {}).values() for code in codes]
        distinct = len(set(codes_of_all)) == len(codes_of_all) and all((self.classes or {}).values())
        require(distinct and self.classes != {}, self, "classes", "one code or more for each class, each in one class")
        groups = [*self.train_groups, *self.val_groups, *self.test_groups]
        require(len(set(groups)) == len(groups), self, "test_groups", "groups that are named once, in one split")

    @property
    def names_groups(self) -> bool:
        """True where the groups of some split are named."""
        return bool(self.train_groups or self.val_groups or self.test_groups)
