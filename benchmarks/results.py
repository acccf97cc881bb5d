"""What was measured, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One thing that is measured."""

    table: str
    """The quantity."""
    subject: str
    """Of what: a row."""
    at: int | None = None
    """Where a size is varied: the size."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The middle of several values, and where half of them lie."""

    low: float
    middle: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The median, and the quartiles around it."""
        if len(values) == 1:
            return Spread(low=values[0], middle=values[0], high=values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return Spread(low=low, middle=median(values), high=high)


@dataclass(frozen=True, kw_only=True)
class Series:
    """What each round gave: seconds or bytes; one value where nothing is a matter of chance."""

    values: Sequence[float]
    reference: Sequence[float] = ()
    """What it is compared with, in the same rounds; empty: with nothing."""

    @property
    def ratios(self) -> Sequence[float]:
        """Of each round: what a busy machine slows, it slows on both sides."""
        if not self.reference:
            return []
        return [value / other for value, other in zip(self.values, self.reference, strict=True)]


Values = Mapping[Measure, Series]


@dataclass(frozen=True, kw_only=True)
class Results:
    """A run of the benchmark."""

    about: Mapping[str, str]
    """Conditions, in words."""
    values: Values

    def of(self, table: str) -> dict[Measure, Series]:
        """What belongs to a table, in the order in which it was measured."""
        return {measure: series for measure, series in self.values.items() if measure.table == table}

    def to_json(self) -> str:
        """All values, with what the page shows of them."""
        entries = []
        for measure, series in self.values.items():
            shown = {"spread": asdict(Spread.of(series.values))}
            if series.reference:
                shown["ratio"] = asdict(Spread.of(series.ratios))
            entries.append({**asdict(measure), **shown, **asdict(series)})
        return json.dumps({"about": dict(self.about), "series": entries}, indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> Results:
        """The results of a file."""
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

        def part(kind: type[Any], entry: Mapping[str, Any]) -> Any:
            return kind(**{name: entry[name] for name in kind.__dataclass_fields__})

        values = {part(Measure, entry): part(Series, entry) for entry in known["series"]}
        return Results(about=known["about"], values=values)
