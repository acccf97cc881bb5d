"""The rows of an adapter's memory bank that are most like a cloud: the training clouds by which it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from point_peft.adapter_set import AdapterSet
from point_peft.adapting.adapter import get_adapter
from point_peft.bank import frozen_tokens
from point_peft.errors import DataError, quoted
from point_peft.parts.base import Bank

BANK_CLOUDS_FILE = "bank_clouds.npz"
SHOWN_ROWS = 8


@dataclass(frozen=True)
class BankClouds:
    """The training cloud that each row of a bank is of, or stands for."""

    points: npt.NDArray[np.float32]
    """(rows, n, 3)"""
    labels: npt.NDArray[np.int64]
    """(rows,)"""


@dataclass(frozen=True)
class Neighbour:
    """A row of a bank that is like a cloud."""

    row: int
    likeness: float
    """The cosine of the two features, as the bank compares them."""


def read_bank_clouds(folder: Path) -> BankClouds | None:
    """The training clouds beside an adapter, None where there are none; raises `DataError` for a file that is none."""
    path = folder / BANK_CLOUDS_FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            points, labels = file["points"].astype(np.float32), file["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{quoted(str(path))} holds no points and labels of training clouds: {error}") from error
    if points.ndim != 3 or points.shape[2] != 3 or labels.shape != points.shape[:1]:
        raise DataError(
            f"{quoted(str(path))}: points must be (rows, n, 3) and labels (rows,), got {points.shape} and "
            f"{labels.shape}"
        )
    return BankClouds(points, labels)


def bank_in_forward(held: AdapterSet, adapter: str) -> Bank | None:
    """The filled bank that an adapter looks up in its forward; None where it has none."""
    for state in get_adapter(held, adapter).shared_states():
        if state.bank is not None and state.bank.in_forward and not state.bank.lacks_rows():
            return state.bank
    return None


def nearest_rows(held: AdapterSet, adapter: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Neighbour]:
    """The rows of the adapter's bank most like the one cloud of these arguments, best first; none without a bank."""
    bank = bank_in_forward(held, adapter)
    if bank is None:
        return []
    with torch.no_grad():
        query = bank.query(frozen_tokens(held, args, kwargs, bank.source, adapter))
        likeness, rows = bank.likenesses(query)[0].topk(min(SHOWN_ROWS, len(bank.rows)))
    return [Neighbour(row, value) for row, value in zip(rows.tolist(), likeness.tolist(), strict=True)]
