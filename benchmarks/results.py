"""What was measured, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One thing that is measured."""

    section: str
    subject: str
    """Of what: a row of a table."""
    quantity: str
    """What of it: a column."""
    at: int | None = None
    """Where a size is varied: the size."""
    unit: Literal["s", "bytes"] = "s"


Values = Mapping[Measure, Sequence[float]]
"""Measure -> what each round gave; one value where nothing is a matter of chance."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """A run of the benchmark."""

    about: Mapping[str, str]
    """Conditions, in words."""
    values: Values

    def medians(self, section: str, quantity: str | None = None) -> dict[Measure, float]:
        """The medians of a section, or of one of its quantities, in the order in which they were measured."""
        return {
            measure: median(values)
            for measure, values in self.values.items()
            if measure.section == section and quantity in (None, measure.quantity)
        }

    def subjects(self, *sections: str) -> list[str]:
        """What these sections have measures of, in the order in which it was measured."""
        return list(dict.fromkeys(measure.subject for measure in self.values if measure.section in sections))

    def median(self, section: str, subject: str, quantity: str, at: int | None = None) -> float | None:
        """The median of one measure; None: it was not measured."""
        found = self.medians(section, quantity)
        return next((value for m, value in found.items() if (m.subject, m.at) == (subject, at)), None)

    def to_json(self) -> str:
        """All values, with their medians."""
        series = [
            {**asdict(measure), "median": median(values), "values": list(values)}
            for measure, values in self.values.items()
        ]
        return json.dumps({"about": dict(self.about), "series": series}, indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> Results:
        """The results of a file."""
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values = {
            Measure(**{name: entry[name] for name in Measure.__dataclass_fields__}): entry["values"]
            for entry in found["series"]
        }
        return Results(about=found["about"], values=values)
