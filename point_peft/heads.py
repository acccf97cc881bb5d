"""Heads of an adapter's own: what `heads=` takes beside modules and functions that make them."""

from point_peft.adapting.heads import POOLS, HeadSource, PooledHead, mlp_head

__all__ = ["POOLS", "HeadSource", "PooledHead", "mlp_head"]
