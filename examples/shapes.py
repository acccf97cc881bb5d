"""Clouds of simple shapes, made on the spot for examples that need other clouds than the lifted digits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

KINDS = ("ball", "box", "cone", "cylinder")


def shape(kind: str, count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Points (count, 3) on the surface of a shape, stretched along its axes, turned about z, with some noise."""
    angle, height = rng.uniform(0, 2 * np.pi, count), rng.uniform(-1, 1, count)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if kind == "ball":
        points = np.column_stack([circle * np.sqrt(1 - height**2)[:, None], height])
    elif kind == "box":
        points = rng.uniform(-1, 1, (count, 3))
        points[np.arange(count), rng.integers(3, size=count)] = rng.choice([-1.0, 1.0], count)
    elif kind == "cone":
        radius = np.sqrt(rng.uniform(0, 1, count))  # even on the surface
        points = np.column_stack([circle * radius[:, None], 1 - 2 * radius])
    else:
        points = np.column_stack([circle, height])
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    turned: npt.NDArray[np.float64] = points * rng.uniform(0.6, 1.4, 3) @ rotation
    return turned + rng.normal(scale=0.02, size=(count, 3))
