"""The bank of features that a router compares a cloud with."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from point_peft.errors import AdapterError
from point_peft.parts.base import FEWEST_ROWS, Bank
from point_peft.parts.prototypes import CHUNK_ROWS, check_lengths, prototypes


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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutingBank:
        """Move the rows, but keep their type: another would tell other distances."""
        before = self.rows
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.rows.dtype != before.dtype:
            self.rows = before.to(self.rows.device)
        return self

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
        rows = self.new_buffer("rows", features.shape)
        for part, into in zip(torch.split(features, CHUNK_ROWS), torch.split(rows, CHUNK_ROWS), strict=True):
            into.copy_(nn.functional.normalize(part.float(), dim=1))
        self.rows = rows
        self.hand_on()
        return len(rows)

    def check(self, base_model: nn.Module) -> None:
        if len(self.rows):
            self._check_rows(self.rows)

    def _check_rows(self, rows: Tensor) -> None:
        if len(rows) < FEWEST_ROWS:
            raise AdapterError(
                f"the routing bank has {len(rows)} rows, and leaving one out needs at least {FEWEST_ROWS}"
            )
