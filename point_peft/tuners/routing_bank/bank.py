"""The bank of features that a router compares a cloud with."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from point_peft.errors import AdapterError
from point_peft.parts.base import FEWEST_ROWS, Bank
from point_peft.parts.prototypes import check_lengths, prototypes


class RoutingBank(Bank):
    """Features (rows, c) of training clouds, of unit length and in half precision; no rows until it is built."""

    free_rows: ClassVar[frozenset[str]] = frozenset({"rows"})
    in_forward: ClassVar[bool] = False

    def __init__(self, channels: int, size: int | None) -> None:
        super().__init__()
        self.prefix = "routing_bank"
        self.source = "backbone"
        self.size = size
        self.register_buffer("rows", torch.zeros(0, channels, dtype=torch.float16))

    def features(self) -> Tensor:
        return self.rows.float()

    def fill(self, features: Tensor, labels: Tensor | None = None, size: int | None = None) -> int:
        wanted = self.rows.shape[1]
        if features.ndim != 2 or features.shape[1] != wanted:
            raise AdapterError(f"a routing bank is (rows, {wanted}) here, got {tuple(features.shape)}")
        check_lengths(features)
        limit = self.size if size is None else size
        features = features.detach() if limit is None else prototypes(features.detach(), labels, limit)
        self._check_rows(features)
        return self.keep(features, partial(nn.functional.normalize, dim=1))

    def check(self, base_model: nn.Module) -> None:
        if len(self.rows):
            self._check_rows(self.rows)

    def _check_rows(self, rows: Tensor) -> None:
        if len(rows) < FEWEST_ROWS:
            raise AdapterError(
                f"the routing bank has {len(rows)} rows, and leaving one out needs at least {FEWEST_ROWS}"
            )
