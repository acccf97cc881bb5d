"""Linear probing: the backbone stays as it is, only the heads of the adapter are trained."""

from __future__ import annotations

from point_peft.tuners.linear_probe.config import LinearProbeConfig

__all__ = ["LinearProbeConfig"]
