"""What is compared: a method with its settings, full fine-tuning, or a classifier that trains nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from point_peft import METHODS, PointPeftError, TunerConfig
from point_peft.errors import quoted
from point_peft.training.models import ModelSpec, adapted, method_configs

FULL, PROBE, RETRIEVAL = "FULL", "CONVERGED_PROBE", "RETRIEVAL"
UNTRAINED = (PROBE, RETRIEVAL)
"""Classifiers on the frozen features."""
PUBLISHED = "published"
"""The name of a class method of a configuration, and of a variant: the constants that were published."""
EVA = "eva"
"""The name of a start from the training clouds, and of a variant: METHOD:eva."""
NAMED: Mapping[str, str] = {"ADAPTFORMER": "BOTTLENECK:placement=adaptformer"}
"""Name -> the entry that it means."""
ON_SMALL: Mapping[str, str] = {
    "PPT": "PPT:num_groups=32;group_size=16",
    "POINT_LORA": "POINT_LORA:num_groups=[32,16];group_size=[16,32];num_selected=[8,2]",
}
"""Method -> its entry on the embedded backbone: as published, a further grouping is as fine as the backbone's own.

That has 32 groups of 16 points; with the defaults, for Point-MAE's 128 of 32, a step takes twenty times LoRA's.
"""


@dataclass(frozen=True)
class Entry:
    """One line of the comparison."""

    label: str
    """As it is written on the command line."""
    method: str
    """The name of a registered method, or FULL, PROBE or RETRIEVAL."""
    configs: tuple[Mapping[str, Any], ...] = ()
    """The configuration of the method, as JSON; none: there is no adapter."""
    eva: bool = False
    """True if the adapter starts from the training clouds."""

    @property
    def trains(self) -> bool:
        """Tell whether it has a learning rate."""
        return self.method not in UNTRAINED

    @property
    def print(self) -> str:
        """A name for files, which is another one once the method's defaults are others."""
        text = json.dumps([self.method, *self.configs], sort_keys=True)
        return f"{re.sub('[^A-Za-z0-9.]+', '_', self.label)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def entry(text: str) -> Entry:
    """The entry `METHOD`, `METHOD:field=value;field=value`, `METHOD:published`, `METHOD:eva`, or one of `NAMED`.

    Raises `PointPeftError` for unknown methods and fields.
    """
    method, _, settings = NAMED.get(text, text).partition(":")
    method = method.strip().upper()
    if method in (FULL, *UNTRAINED):
        if settings:
            raise PointPeftError(f"{quoted(text)}: {method} has no settings")
        return Entry(text, method)
    given = [setting.strip() for setting in settings.split(";") if setting.strip()]
    eva = EVA in given
    given = [setting for setting in given if setting != EVA]
    (config,) = method_configs([method], [setting for setting in given if setting != PUBLISHED])
    if PUBLISHED in given:
        kind: Any = METHODS[config["method"]]
        if len(given) > 1 or not _states_published(kind):
            raise PointPeftError(f"{quoted(text)}: {PUBLISHED} stands alone, and the method must have such constants")
        config = kind.published().to_json()
    return Entry(text, config["method"], (config,), eva)


def entries(text: str) -> list[Entry]:
    """Entries divided by commas, except those inside brackets: `LORA,POINT_PEFT:layers_to_transform=[3,4,5]`."""
    parts = re.split(r",(?![^\[]*\])", text)
    return [entry(part.strip()) for part in parts if part.strip()]


def all_entries(make: Callable[[], nn.Module], *, small: bool) -> tuple[list[Entry], dict[str, str]]:
    """Everything that can be compared on the backbone that `make` gives, and label -> why another method cannot.

    `small` says that it is the embedded one.
    """
    found, refused = [Entry(FULL, FULL), *(Entry(name, name) for name in UNTRAINED)], {}
    for name, kind in METHODS.items():
        if kind.adapts_columns:
            refused[name] = "it fits clouds with other columns, beside another method"
            continue
        texts = [
            ON_SMALL.get(name, name) if small else name,
            *([f"{name}:{PUBLISHED}"] if _states_published(kind) else []),
        ]
        for one in map(entry, texts):
            try:
                adapted(make(), ModelSpec(backbone="", methods=one.configs))
            except PointPeftError as error:
                refused[one.label] = str(error)
            else:
                found.append(one)
    return found, refused


def _states_published(kind: type[TunerConfig]) -> bool:
    return PUBLISHED in vars(kind)
