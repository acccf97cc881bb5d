"""Procedural outdoor scenes as an airborne scanner sees them: terrain, buildings, trees, cars, hedges and wires.

Nothing of them was ever measured. A ray comes down on every point of the ground, nearly straight; what it meets first
is what is seen, but leaves and wires let many rays through.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
SIDE = 64.0
"""Length of a scene, metres."""


def scene(seed: int) -> Floats:
    """Points (n, 3) in metres of scene number `seed`, z up."""
    return labelled_scene(seed)[0]


def labelled_scene(seed: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Points (n, 3) in metres of scene number `seed`, z up, and which of them (n,) the bare ground reflected."""
    random = np.random.default_rng(seed)
    n = int(SIDE**2 * random.uniform(1.0, 3.5))
    places = random.uniform(-SIDE / 2, SIDE / 2, (n, 2))
    ground = Terrain(random)
    height = ground(places)
    for _ in range(random.integers(0, 14)):
        height = building(random, ground, places, height)
    for _ in range(random.integers(0, 30)):
        height = box(random, ground, places, height, (4.6, 1.9), (1.3, 2.2))  # cars
    for _ in range(random.integers(0, 8)):
        height = box(random, ground, places, height, (random.uniform(5, 40), 0.8), (0.8, 3.0))  # hedges and walls
    for _ in range(random.integers(0, 4)):
        height = wire(random, ground, places, height)
    for _ in range(random.integers(0, int(random.choice([6, 40, 120])))):
        height = tree(random, ground, places, height)
    points = np.concatenate([places, height[:, None]], axis=1)
    noise: Floats = random.normal(0, random.uniform(0.02, 0.12), points.shape)
    return points + noise, height <= ground(places)


class Terrain:
    """Heights of the ground: a slope and waves, sometimes with a bank along a line."""

    def __init__(self, random: np.random.Generator) -> None:
        count = 8
        length = np.exp(random.uniform(np.log(12), np.log(250), count))
        angle = random.uniform(0, 2 * np.pi, count)
        self.wave = 2 * np.pi / length * np.stack([np.cos(angle), np.sin(angle)])
        self.phase = random.uniform(0, 2 * np.pi, count)
        self.size = length * random.choice([0.002, 0.008, 0.02]) * random.uniform(0, 1, count)
        self.slope = random.normal(0, random.choice([0.01, 0.05, 0.12]), 2)
        self.bank = random.uniform(0.8, 5) * (random.random() < 0.4)
        turn = random.uniform(0, 2 * np.pi)
        self.across, self.middle = np.array([np.cos(turn), np.sin(turn)]), random.uniform(-30, 30)
        self.width = random.uniform(1, 8)

    def __call__(self, places: Floats) -> Floats:
        """Heights (n,) at places (n, 2)."""
        waves = (self.size * np.sin(places @ self.wave + self.phase)).sum(axis=1)
        step = 1 / (1 + np.exp(-np.clip((places @ self.across - self.middle) / self.width * 4, -30, 30)))
        heights: Floats = waves + places @ self.slope + self.bank * step
        return heights


def somewhere(random: np.random.Generator, places: Floats) -> tuple[Floats, Floats]:
    """Places (n, 2) in the frame of an object, turned and moved by chance; and its own place (1, 2)."""
    middle, angle = random.uniform(-SIDE / 2, SIDE / 2, 2), random.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (places - middle) @ turn, middle[None]


def building(random: np.random.Generator, ground: Terrain, places: Floats, height: Floats) -> Floats:
    """Heights with a house, flat or gabled, some points on its walls."""
    own, middle = somewhere(random, places)
    half, walls = random.uniform(3, 22, 2), random.uniform(2.5, 14)
    pitch = random.choice([0.0, random.uniform(0.2, 1.0)])
    base = float(ground(middle)[0])
    inside = (np.abs(own) < half).all(axis=1)
    roof = base + walls + pitch * (half[1] - np.abs(own[:, 1]))
    edge = (np.abs(own) - half).max(axis=1)
    on_wall = (np.abs(edge) < 0.35) & (random.random(len(places)) < 0.5)
    seen = np.where(on_wall, base + walls * random.random(len(places)), roof)
    return np.where(inside | on_wall, np.maximum(seen, height), height)


def box(
    random: np.random.Generator,
    ground: Terrain,
    places: Floats,
    height: Floats,
    size: tuple[float, float],
    heights: tuple[float, float],
) -> Floats:
    """Heights with a box that stands on the ground."""
    own, middle = somewhere(random, places)
    inside = (np.abs(own) < np.array(size) / 2).all(axis=1)
    top = ground(places) if size[0] > 5 else ground(middle)
    return np.where(inside, np.maximum(top + random.uniform(*heights), height), height)


def wire(random: np.random.Generator, ground: Terrain, places: Floats, height: Floats) -> Floats:
    """Heights with a wire that hangs through, which few rays meet."""
    own, middle = somewhere(random, places)
    met = (np.abs(own[:, 1]) < 0.5) & (random.random(len(places)) < 0.5)
    hung = ground(middle)[0] + random.uniform(6, 20) + random.uniform(0.0005, 0.003) * own[:, 0] ** 2
    return np.where(met, np.maximum(hung, height), height)


def tree(random: np.random.Generator, ground: Terrain, places: Floats, height: Floats) -> Floats:
    """Heights with a crown, in which a ray ends at some depth or nowhere, or with a bush."""
    own, middle = somewhere(random, places)
    bush = random.random() < 0.3
    radius = random.uniform(0.6, 2.0) if bush else random.uniform(1.5, 6.5)
    flat = random.uniform(0.6, 2.0)
    depth = np.sqrt(np.clip(1 - (own**2).sum(axis=1) / radius**2, 0, None)) * radius * flat
    centre = float(ground(middle)[0]) + (0.5 * radius if bush else radius * flat + random.uniform(0.5, 6))
    leaves = random.uniform(0.35, 0.95)
    ends = centre + depth * (1 - 2 * random.random(len(places)) ** random.uniform(1, 3))
    met = (depth > 0) & (random.random(len(places)) < leaves)
    return np.where(met, np.maximum(ends, height), height)
