"""Sights of the tokens while a model runs: coordinates, samples, clouds and patches of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Seen:
    """Filled by the taps of a forward, read by parts at blocks; it lives as long as the forward's record.

    That is beyond the forward where checkpointing may run a block again, which then reads it again.
    """

    coordinates: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> coordinates (b, g, 3) of its patch tokens, in token order; of packed tokens (n, 3)."""
    samples: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> for packed tokens, which sample each belongs to: numbers (n,) or ends of samples (b,)."""
    patches: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> patch embedding (b, g, c), before positions are added."""
    points: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> the clouds (b, n, 3) that its tokens were grouped from."""
    misplaced: dict[int, str] = field(default_factory=dict)
    """Stage -> the error of its coordinates, for those that need them."""
    begun: set[int] = field(default_factory=set)
    """Stages of which a block has run."""
    first: tuple[str, int] | None = None
    """The kind of what was seen first, and its stage."""

    def again(self) -> Seen:
        """The same for a pass that goes on from here; no block has run in it."""
        copied = Seen()
        for name in ("coordinates", "samples", "patches", "points", "misplaced"):
            setattr(copied, name, dict(getattr(self, name)))
        return copied
