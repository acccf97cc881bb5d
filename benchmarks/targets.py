"""What was aimed at, and whether it is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.beside_peft import OURS, THEIRS
from benchmarks.results import Results
from benchmarks.sections import (
    LORA,
    PEAK,
    POINT_PEFT,
    PUBLISHED_FULL,
    PUBLISHED_PLAIN,
    RETRIEVAL_PEAK,
    STEM,
    SWAP,
    WITH_BANK,
    WITHOUT_BANK,
    WITHOUT_HEAD,
)
from tools.methods import FULL, INFERENCE, PLAIN, TRAINING

Place = tuple[str, str, str, int | None]
"""Section, subject, quantity and size of a measure."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound of one median, as a multiple of another or by itself."""

    text: str
    bound: Literal["at most", "at least"]
    limit: float
    of: Place
    by: Place | None = None
    style: Literal["ratio", "share", "GB"] = "ratio"

    def measured(self, results: Results) -> float | None:
        """What is to be bounded; None: it was not measured."""
        value = results.median(*self.of)
        unit = {"ratio": 1.0, "share": 1.0, "GB": 1e9}[self.style] if self.by is None else results.median(*self.by)
        return None if value is None or unit is None else value / unit

    def met(self, value: float) -> bool:
        """Whether a measured value keeps the bound."""
        return value <= self.limit if self.bound == "at most" else value >= self.limit

    def spelled(self, value: float) -> str:
        """A value as one reads it."""
        return {"ratio": f"{value:.2f}", "share": f"{100 * value:.1f} %", "GB": f"{value:.2f} GB"}[self.style]


def _of_methods(row: str, name: str, what: str, limit: float) -> list[Target]:
    """A bound for a row of the methods, of the reference backbone in its own form and as published."""
    references, section = {
        TRAINING: ((FULL, PUBLISHED_FULL), "point_peft"),
        INFERENCE: ((PLAIN, PUBLISHED_PLAIN), "point_peft"),
        PEAK: ((FULL, PUBLISHED_FULL), "memory"),
    }[what]
    return [
        Target(
            text=f"{name}: {what}, of the {reference}",
            bound="at most",
            limit=limit,
            of=(section, row, what, None),
            by=(section, reference, what, None),
        )
        for reference in references
    ]


def _beside_peft(what: str, limit: float) -> Target:
    """Times as fast as PEFT."""
    return Target(
        text=f"`{what}`: PEFT's time, as a multiple of ours",
        bound="at least",
        limit=limit,
        of=("peft", THEIRS, what, None),
        by=("peft", OURS, what, None),
    )


def _of_file(what: str, text: str, limit: float) -> Target:
    return Target(
        text=text,
        bound="at most",
        limit=limit,
        of=("files", POINT_PEFT.label, what, None),
        by=("files", PLAIN, "file", None),
        style="share",
    )


TARGETS: Sequence[Target] = (
    *_of_methods(POINT_PEFT.label, "Point-PEFT with a bank", TRAINING, 0.70),
    *_of_methods(POINT_PEFT.label, "Point-PEFT with a bank", INFERENCE, 1.50),
    *_of_methods(POINT_PEFT.label, "Point-PEFT with a bank", PEAK, 0.45),
    *_of_methods(STEM.label, 'Point-PEFT with `prior="stem"`', TRAINING, 0.55),
    *_of_methods(STEM.label, 'Point-PEFT with `prior="stem"`', INFERENCE, 1.10),
    *_of_methods(STEM.label, 'Point-PEFT with `prior="stem"`', PEAK, 0.45),
    _of_file(WITHOUT_HEAD, "Point-PEFT's file without a bank and without a head, of the backbone's", 0.025),
    _of_file(WITHOUT_BANK, "Point-PEFT's file without a bank, with a head, of the backbone's", 0.025),
    _of_file(WITH_BANK, "Point-PEFT's file with a bank of 11,392 clouds and a head, of the backbone's", 0.05),
    _beside_peft(SWAP, 5.0),
    _beside_peft("disable_adapter", 5.0),
    _beside_peft("get_peft_model", 1.0),
    _beside_peft("add_adapter", 1.0),
    _beside_peft("load_adapter", 1.0),
    _beside_peft("from_pretrained", 1.0),
    Target(
        text="inference with 20 adapters loaded, of that with one",
        bound="at most",
        limit=1.05,
        of=("adapters", LORA.label, INFERENCE, 20),
        by=("adapters", LORA.label, INFERENCE, 1),
    ),
    Target(
        text="retrieval among 1,000,000 rows: peak memory, bank included",
        bound="at most",
        limit=1.0,
        of=("bank rows", "MemoryBank", RETRIEVAL_PEAK, 1_000_000),
        style="GB",
    ),
)
