"""The point prior: a memory bank of training features and its parameter-free attention."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn

from point_peft.errors import AdapterError
from point_peft.parts.base import Bank
from point_peft.parts.prototypes import CHUNK_ROWS, check_lengths, prototypes


class MemoryBank(Bank):
    """Features (rows, c) of training clouds, one row of unit length a cloud or prototype; no rows until it is built."""

    free_rows: ClassVar[frozenset[str]] = frozenset({"rows"})

    def __init__(
        self,
        channels: int,
        top_k: int,
        source: str,
        dtype: torch.dtype,
        *,
        leave_nearest_out: bool,
        standardised: bool,
        temperature: float,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.prefix = "point_peft.memory_bank"
        self.top_k = top_k
        self.source = source
        self.size = size
        """Rows that `fill` reduces more of them to. What a file holds is taken as it is."""
        self.leave_nearest_out = leave_nearest_out
        self.temperature = temperature
        self.register_buffer("rows", torch.zeros(0, channels, dtype=dtype))
        if standardised:
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("deviation", torch.ones(channels))
        self.standardised = standardised
        self.warned = False

    def features(self) -> Tensor:
        rows = self.rows.float()
        if not self.standardised:
            return rows
        # A row has the direction of (u - m) / s, so u = m + r s row; that u has unit length gives r > 0, as |m| < 1.
        along = rows * self.deviation
        a, b, c = along.square().sum(dim=1), along @ self.mean, self.mean.square().sum() - 1
        length = ((b.square() - a * c).sqrt() - b) / a
        return self.mean + length[:, None] * along

    def likenesses(self, query: Tensor) -> Tensor:
        return self._direction(query.float()) @ self.rows.float().T

    def fill(self, features: Tensor, labels: Tensor | None = None, size: int | None = None) -> int:
        """Take features (rows, c) as the bank, scaled to unit length; more than `size` are reduced to prototypes.

        `size` None is the size that the bank was made with, labels (rows,) say which class each row is of.
        """
        wanted = self.rows.shape[1]
        if features.ndim != 2 or features.shape[1] != wanted:
            raise AdapterError(f"a memory bank is (rows, {wanted}) here, got {tuple(features.shape)}")
        features = features.detach()
        check_lengths(features)
        limit = self.size if size is None else size
        if limit is not None:
            features = prototypes(features, labels, limit)
        self._check_rows(features)
        if self.standardised:
            self._measure(features)
        return self.keep(features, self._direction)

    def check(self, base_model: nn.Module) -> None:
        if len(self.rows):
            self._check_rows(self.rows)

    def _check_rows(self, rows: Tensor) -> None:
        if len(rows) < self.top_k + self.leave_nearest_out:
            raise AdapterError(
                f"the memory bank has {len(rows)} rows, retrieval of the top {self.top_k} needs at least "
                f"{self.top_k + self.leave_nearest_out}"
            )

    @property
    def ready(self) -> bool:
        """True if the bank holds rows. The first time that it does not, a warning says so."""
        if len(self.rows) == 0 and not self.warned and not torch.compiler.is_compiling():
            self.warned = True
            warnings.warn(
                "the memory bank is empty, so the prompts work without their prior: call "
                "model.build_memory_bank(batches)",
                stacklevel=2,
            )
        return len(self.rows) > 0

    def prior(self, query: Tensor) -> Tensor:
        """[q; f; V] of queries q (b, c), as (b, 2 + top_k, c): V the rows most like q, f their softmax mean."""
        # Autocast would compare in bfloat16, whose steps are wider than the gaps between the similarities.
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            direction = self._direction(query)
            similarity, values = self._nearest(direction)
            weights = (self.temperature * similarity).softmax(dim=1)
            mean = torch.einsum("bk,bkc->bc", weights, values)
            q = direction if self.standardised else query
            return torch.cat([q[:, None], mean[:, None], values], dim=1)

    def _measure(self, features: Tensor) -> None:
        """Take mean and standard deviation (c,) of features (rows, c), each scaled to unit length."""
        unit = nn.functional.normalize(features.float(), dim=1)
        self.mean = self.new_buffer("mean", unit.shape[1:]).copy_(unit.mean(dim=0))
        # A channel that hardly differs within the bank would otherwise decide alone how like a query that does is.
        deviation = unit.std(dim=0, correction=0)
        deviation = deviation.clamp_min(max(0.01 * float(deviation.mean()), 1e-6))
        self.deviation = self.new_buffer("deviation", deviation.shape).copy_(deviation)

    def _direction(self, features: Tensor) -> Tensor:
        """Features (m, c) as they are compared: of unit length, and before that as deviations from the bank's mean."""
        unit = nn.functional.normalize(features, dim=1)
        return nn.functional.normalize((unit - self.mean) / self.deviation, dim=1) if self.standardised else unit

    def _nearest(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities (b, k) and rows (b, k, c) of the best, descending; the bank is read in chunks."""
        skip = int(self.leave_nearest_out and self.training)
        count = self.top_k + skip
        best_similarity = query.new_empty(query.shape[0], 0)
        best_index = torch.empty(query.shape[0], 0, dtype=torch.int64, device=query.device)
        for start in range(0, len(self.rows), CHUNK_ROWS):
            similarity = query @ self.rows[start : start + CHUNK_ROWS].float().T
            value, index = similarity.topk(min(count, similarity.shape[1]), dim=1)
            best_similarity = torch.cat([best_similarity, value], dim=1)
            best_index = torch.cat([best_index, index + start], dim=1)
            best_similarity, order = best_similarity.topk(min(count, best_similarity.shape[1]), dim=1)
            best_index = best_index.gather(1, order)
        kept = best_index[:, skip:]
        rows = self.rows.index_select(0, kept.flatten()).float().reshape(*kept.shape, self.rows.shape[1])
        return best_similarity[:, skip:], rows
