"""Procedural categories: the endless labelled training set of `tools/pretrain.py`.

A category is a family and the numbers that its program draws; an instance draws the same numbers, each a little
changed, and points of its own. So the 17th loft is always a vase of about this profile, and no two of it are equal.

Nearly every solid is a *loft*, a stack of closed rings: superquadrics, supertoroids, prisms, frustums, vases, boxes and
extruded strokes differ only in where the rings lie. A loft is triangulated, and points are drawn uniformly by triangle
area. Unions drop the points that lie inside another part. Reliefs are flat fields of varying thickness, clusters are
blobs, fractals the attractors of iterated affine maps, and movers are jointed bodies seen for a while, as a sensor
that gathers several frames sees them. Some categories are bent, twisted or tapered as a whole.

    points = sample(Program(category=17, instance=3))         # (1024, 3) float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from point_peft.quickstart.data import unit_sphere

Array = npt.NDArray[np.float64]
Points = npt.NDArray[np.float32]


class Program:
    """The random numbers of one instance of a category.

    Whatever is chosen is the category's; whatever is measured is the category's number moved by `jitter` of its range.
    Only `points` is the instance's own: where on the surface the points lie.
    """

    def __init__(self, category: int, instance: int = 0, seed: int = 0, jitter: float = 0.06) -> None:
        self.category = np.random.default_rng((seed, category))
        self.points = np.random.default_rng((seed, category, instance))
        self.jitter = jitter

    def uniform(self, low: Any, high: Any, size: Any = None) -> Any:
        """A number between `low` and `high`, or an array of them."""
        drawn = self.category.uniform(low, high, size)
        moved = drawn + self.jitter * (np.asarray(high) - low) * self.points.normal(size=size)
        return np.clip(moved, low, high)

    def normal(self, size: Any = None) -> Any:
        """A number of the standard normal distribution, or an array of them."""
        return self.category.normal(size=size) + 2 * self.jitter * self.points.normal(size=size)

    def chance(self, share: float, size: Any = None) -> Any:
        """True in `share` of the categories."""
        return self.category.random(size) < share

    def integers(self, low: int, high: int | None = None) -> int:
        """An integer from `low` to `high` - 1, or from 0 to `low` - 1."""
        return int(self.category.integers(low, high))

    def choice(self, of: Any, size: int | None = None, *, replace: bool = True, p: Any = None) -> Any:
        """One of the values, or `size` of them; a number stands for all integers below it."""
        return self.category.choice(of, size, replace=replace, p=p)


def sample(program: Program, n: int = 1024) -> Points:
    """One instance as a cloud (n, 3): centred on its mean, farthest point on the unit sphere."""
    families = list(FAMILIES)
    weights = np.array([FAMILIES[family] for family in families])
    family = families[program.choice(len(families), p=weights / weights.sum())]
    points = family(program, 2 * n)
    if program.chance(0.3):
        points = deform(program, unit_sphere(points))
    chosen = program.points.choice(len(points), n, replace=len(points) < n)
    return unit_sphere(points[chosen]).astype(np.float32)


# --- lofts ---


def sample_loft(program: Program, rings: Array, n: int, joined: bool = False) -> Array:
    """n points, uniform by area, on the surface through `rings` (m, k, 3), each closed; `joined`: last to first."""
    if joined:
        rings = np.concatenate([rings, rings[:1]])
    side = np.concatenate([rings, rings[:, :1]], axis=1)
    a, b, c, d = side[:-1, :-1], side[1:, :-1], side[1:, 1:], side[:-1, 1:]
    triangles = np.concatenate([np.stack([a, b, c], axis=2), np.stack([a, c, d], axis=2)]).reshape(-1, 3, 3)
    edges = triangles[:, 1:] - triangles[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    chosen = np.searchsorted(np.cumsum(area), program.points.random(n) * area.sum(), side="right").clip(
        max=len(area) - 1
    )
    u, v = program.points.random((2, n, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return np.asarray(triangles[chosen, 0] + u * edges[chosen, 0] + v * edges[chosen, 1])


def signed_power(base: Array, exponent: float) -> Array:
    """sign(x) |x|^e, the curve of superquadrics."""
    return np.sign(base) * np.abs(base) ** exponent


def superellipse(exponent: float, count: int) -> Array:
    """(count, 2) closed curve: 1 is a circle, near 0 a square, 2 a diamond."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([signed_power(np.cos(angle), exponent), signed_power(np.sin(angle), exponent)], axis=1)


def polygon(program: Program, count: int) -> Array:
    """(count, 2) outline: a regular polygon or star of 3 to 8 corners, walked at even angles."""
    corners = program.integers(3, 9)
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    corner = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if program.chance(0.3):
        middle = (corner + np.roll(corner, -1, axis=0)) / 2 * program.uniform(0.4, 0.9)
        corner = np.stack([corner, middle], axis=1).reshape(-1, 2)
    where = np.linspace(0, len(corner), count, endpoint=False)
    first = where.astype(int)
    share = (where - first)[:, None]
    return np.asarray(corner[first] * (1 - share) + corner[(first + 1) % len(corner)] * share)


def outline(program: Program, count: int = 40) -> Array:
    """(count, 2) random cross-section."""
    return polygon(program, count) if program.chance(0.4) else superellipse(random_exponent(program), count)


def random_exponent(program: Program) -> float:
    """Exponent of a superquadric: boxes, ellipsoids and diamonds about equally often."""
    return float(
        program.choice(
            [program.uniform(0.05, 0.4), program.uniform(0.5, 1.2), program.uniform(1.2, 2.5)], p=[0.4, 0.4, 0.2]
        )
    )


def random_axes(program: Program) -> Array:
    """(3,) half lengths; now and then a plate or a rod."""
    axes = program.uniform(0.3, 1.0, size=3)
    axes[program.chance(0.15, 3)] *= 0.3
    return np.asarray(axes)


def with_caps(rings: Array) -> Array:
    """(m, k, 3) -> (m + 2, k, 3): both ends closed by a ring shrunk to its centre."""
    ends = rings[[0, -1]].mean(axis=1, keepdims=True).repeat(rings.shape[1], axis=1)
    return np.concatenate([ends[:1], rings, ends[1:]])


# --- families: each gives about n points (n, 3), in its own scale and frame ---


def superquadric(program: Program, n: int) -> Array:
    """Ellipsoids, rounded boxes, cylinders, octahedra and all between."""
    return sample_superquadric(program, n, random_axes(program), random_exponent(program), random_exponent(program))


def sample_superquadric(program: Program, n: int, axes: Array, north: float, east: float) -> Array:
    """n points on the superquadric of half lengths `axes` (3,) and its two exponents."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, 25)
    radius, height = np.cos(latitude).clip(0) ** north, signed_power(np.sin(latitude), north)
    around = superellipse(east, 40)
    tall = np.broadcast_to(height[:, None, None], (25, 40, 1))
    return sample_loft(program, np.concatenate([radius[:, None, None] * around, tall], axis=2) * axes, n)


def supertoroid(program: Program, n: int) -> Array:
    """Rings of round, square or diamond section along a round, square or diamond path; flat ones too."""
    path, section = superellipse(random_exponent(program), 48), superellipse(random_exponent(program), 20)
    inner, height = program.uniform(0.1, 0.6), program.uniform(0.1, 0.8)
    radius = 1 + inner * section[:, 0]
    flat = radius[None, :, None] * path[:, None]
    tall = np.broadcast_to(height * section[None, :, 1:], (48, 20, 1))
    return sample_loft(program, np.concatenate([flat, tall], axis=2) * [1, program.uniform(0.4, 1), 1], n, joined=True)


def frustum(program: Program, n: int) -> Array:
    """Prisms, pyramids, cones, cylinders and frustums, with caps and sometimes twisted."""
    around = outline(program)
    height, top = program.uniform(0.2, 2.0), program.choice([0.0, 1.0, program.uniform(0.1, 1.0)])
    return loft_outline(program, n, around, np.linspace(1, top, 8), np.linspace(-height / 2, height / 2, 8))


def vase(program: Program, n: int) -> Array:
    """Solids with a smooth random profile, round or not."""
    level = np.linspace(0, 1, 20)
    waves = program.normal(size=4) / np.arange(1, 5)
    phases = program.uniform(0, np.pi, size=4)
    profile = 1 + 0.5 * (waves[:, None] * np.sin(np.pi * np.arange(1, 5)[:, None] * level + phases[:, None])).sum(
        axis=0
    )
    return loft_outline(program, n, outline(program), np.abs(profile).clip(0.05), level * program.uniform(0.5, 3))


def loft_outline(program: Program, n: int, around: Array, radius: Array, height: Array) -> Array:
    """n points on the solid whose section `around` (k, 2) is scaled by `radius` (m,) at `height` (m,); ends closed."""
    scaled = radius[:, None, None] * around * [1, program.uniform(0.3, 1)]
    tall = np.broadcast_to(height[:, None, None], (*scaled.shape[:2], 1))
    return sample_loft(program, with_caps(np.concatenate([scaled, tall], axis=2)), n)


def box(program: Program, n: int) -> Array:
    """Boxes, plates and beams with sharp edges."""
    half = random_axes(program)
    square = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    tall = np.broadcast_to(np.array([-1.0, 1.0])[:, None, None], (2, 4, 1))
    rings = np.concatenate([np.broadcast_to(square, (2, 4, 2)), tall], axis=2)
    return sample_loft(program, with_caps(rings) * half, n)


def curve(program: Program, count: int) -> Array:
    """(count, 2) planar pen stroke in about [-1, 1]^2: polyline, arc, spiral or smooth wiggle, sometimes closed."""
    time = np.linspace(0, 1, count)
    kind = program.integers(4)
    if kind == 0:  # straight pieces
        knots = program.uniform(-1, 1, size=(program.integers(2, 5), 2))
        return np.stack([np.interp(time, np.linspace(0, 1, len(knots)), knots[:, axis]) for axis in range(2)], axis=1)
    if kind == 1:  # arc of an ellipse, or all of it
        start, sweep = program.uniform(0, 2 * np.pi), program.choice([2 * np.pi, program.uniform(1.5, 6)])
        angle = start + sweep * time
        radii, middle = program.uniform(0.4, 1, size=2), program.uniform(-0.3, 0.3, size=2)
        return np.asarray(np.stack([np.cos(angle), np.sin(angle)], axis=1) * radii + middle)
    if kind == 2:  # spiral, hook
        angle = program.uniform(0, 2 * np.pi) + program.uniform(2, 9) * time
        radius = np.interp(time, [0, 1], program.uniform(0.1, 1, size=2))
        return np.asarray(np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None])
    phase, size = (
        program.uniform(0, 2 * np.pi, size=(3, 2)),
        program.normal(size=(3, 2)) / np.array([[1], [1.5], [2.5]]),
    )
    wave = np.sin(np.pi * np.arange(1, 4)[:, None, None] * time[:, None] + phase[:, None])
    return np.asarray((size[:, None] * wave).sum(axis=0))


def pen_strokes(program: Program, count: int) -> Array:
    """(s, count, 2) one to three strokes, as in letters and signs, that share a place."""
    strokes = [curve(program, count)]
    for _ in range(int(program.choice(3, p=[0.5, 0.3, 0.2]))):
        stroke = curve(program, count) * program.uniform(0.4, 1)
        touched, touching = strokes[0][program.integers(count)], stroke[program.integers(count)]
        strokes.append(stroke - touching + touched)
    return np.stack(strokes)


def strokes(program: Program, n: int) -> Array:
    """Letters-like solids: pen strokes extruded to bars of rectangular or round section."""
    width, thick, section = (
        program.uniform(0.06, 0.3),
        program.uniform(0.06, 0.5),
        superellipse(program.choice([0.1, 1.0]), 12),
    )
    drawn = pen_strokes(program, 24)
    shares = np.linalg.norm(np.diff(drawn, axis=1), axis=2).sum(axis=1) + 0.05
    counts = np.ceil(n * shares / shares.sum()).astype(int)
    pieces = zip(drawn, counts, strict=True)
    return np.concatenate([sample_loft(program, bar(line, width, thick, section), count) for line, count in pieces])


def bar(line: Array, width: float, thick: float, section: Array) -> Array:
    """Rings (m + 2, k, 3) of a bar along `line` (m, 2): `section` (k, 2) times `width` in the plane, `thick` across."""
    along = np.gradient(line, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True).clip(1e-9)
    sideways = np.stack([-along[:, 1], along[:, 0], np.zeros(len(line))], axis=1)
    spine = np.concatenate([line, np.zeros((len(line), 1))], axis=1)
    offset = section[None, :, :1] * sideways[:, None] * width + section[None, :, 1:] * np.array([0, 0, thick])
    return with_caps(spine[:, None] + offset)


def tube(program: Program, n: int) -> Array:
    """Pipes and ropes: a round or square section along a smooth curve in space."""
    time = np.linspace(0, 1, 32)
    knots = program.uniform(-1, 1, size=(4, 3))
    blend = np.stack([(1 - time) ** 3, 3 * time * (1 - time) ** 2, 3 * time**2 * (1 - time), time**3], axis=1)
    spine = blend @ knots
    along = np.gradient(spine, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True).clip(1e-9)
    first = np.cross(along, program.normal(size=3))
    first /= np.linalg.norm(first, axis=1, keepdims=True).clip(1e-9)
    second = np.cross(along, first)
    section = superellipse(random_exponent(program), 14) * program.uniform(0.05, 0.35, size=2)
    rings = spine[:, None] + section[None, :, :1] * first[:, None] + section[None, :, 1:] * second[:, None]
    return sample_loft(program, with_caps(rings), n)


def relief(program: Program, n: int) -> Array:
    """Plates of varying density and thickness: blurred strokes or blobs on a coarse grid, filled with points."""
    size = program.integers(6, 17)
    grid = (np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), axis=-1) + 0.5) / size * 2.4 - 1.2
    blobs = program.uniform(-1, 1, size=(program.integers(2, 9), 2))
    marks = pen_strokes(program, 32).reshape(-1, 2) if program.chance(0.8) else blobs
    spread = program.uniform(0.08, 0.3)
    near = ((grid[:, :, None] - marks) ** 2).sum(axis=-1).min(axis=-1)
    height = np.exp((near.min() - near) / (2 * spread**2)).ravel()
    height[height < 0.1] = 0
    cell = program.points.choice(size * size, n, p=height / height.sum())
    flat = grid.reshape(-1, 2)[cell] + program.points.uniform(-1.2, 1.2, size=(n, 2)) / size
    tall = program.points.uniform(-1, 1, size=n) * height[cell] * program.uniform(0.05, 0.4)
    return np.concatenate([flat, tall[:, None]], axis=1)


def union(program: Program, n: int) -> Array:
    """Two to four superquadrics in random poses; points inside another part are dropped: the outer skin stays."""
    parts = program.integers(2, 5)
    axes = np.stack([random_axes(program) for _ in range(parts)])
    powers = np.array([[random_exponent(program), random_exponent(program)] for _ in range(parts)])
    turns, places = random_rotations(program, parts), program.uniform(-0.8, 0.8, size=(parts, 3))
    kept = []
    for part in range(parts):
        points = sample_superquadric(program, 2 * n, axes[part], *powers[part]) @ turns[part].T + places[part]
        hidden = np.zeros(len(points), dtype=bool)
        for other in range(parts):
            if other != part:
                local = np.abs((points - places[other]) @ turns[other]) / axes[other]
                north, east = powers[other]
                disc = (local[:, 0] ** (2 / east) + local[:, 1] ** (2 / east)) ** (east / north)
                hidden |= disc + local[:, 2] ** (2 / north) < 1
        area = (axes[part] * np.roll(axes[part], 1)).sum() / 3  # of the axes' box, at most one
        kept.append(points[~hidden][: int(area * 2 * n * (~hidden).mean())])
    points = np.concatenate(kept)
    return points if len(points) >= n // 4 else superquadric(program, n)


def assembly(program: Program, n: int) -> Array:
    """Two to four solids of any simple family in random poses, as furniture and tools are made of."""
    parts = program.integers(2, 5)
    simple: list[Callable[[Program, int], Array]] = [superquadric, supertoroid, frustum, box, box, vase, strokes]
    turns = random_rotations(program, parts)
    if program.chance(0.5):
        turns[:] = np.eye(3)  # parts of man-made things are often aligned
    pieces = []
    for turn, family in zip(turns, program.choice(len(simple), parts), strict=True):
        size = program.uniform(0.3, 1)
        piece = simple[family](program, max(int(n * size**2), 32))
        pieces.append(unit_sphere(piece) @ turn.T * size + program.uniform(-0.8, 0.8, size=3))
    return np.concatenate(pieces)


def clusters(program: Program, n: int) -> Array:
    """Two to seven blobs of their own sizes, stretches and densities, as scattered echoes are."""
    parts = program.integers(2, 8)
    places, spreads = program.uniform(-1, 1, (parts, 3)), program.uniform(0.05, 0.5, (parts, 3))
    shares = program.uniform(0.2, 1, parts)
    part = program.points.choice(parts, n, p=shares / shares.sum())
    return np.asarray(places[part] + spreads[part] * program.points.normal(size=(n, 3)))


def fractal(program: Program, n: int) -> Array:
    """The attractor of two to six affine maps, each applied as often as it is large."""
    maps = program.integers(2, 7)
    linear, shift = program.uniform(-0.8, 0.8, (maps, 3, 3)), program.uniform(-1, 1, (maps, 3))
    u, length, v = np.linalg.svd(linear)
    linear = u * length.clip(0.1, 0.75)[:, None] @ v
    size = np.abs(np.linalg.det(linear)) + 0.02
    points = np.zeros((n, 3))
    for step in program.points.choice(maps, (24, n), p=size / size.sum()):
        points = np.einsum("nij,nj->ni", linear[step], points) + shift[step]
    return points


def mover(program: Program, n: int) -> Array:
    """A jointed body of three to seven limbs, each of which swings or stays, over the time in which it is seen."""
    limbs = program.integers(3, 8)
    parent = [program.integers(limb) for limb in range(1, limbs)]
    along = unit_rows(program.normal((limbs, 3)) * program.choice([[1, 1, 1], [0.4, 0.4, 1.5]])) * program.uniform(
        0.3, 1, (limbs, 1)
    )
    axis, swing = unit_rows(program.normal((limbs, 3))), program.uniform(0, 1.4, limbs) * program.chance(0.5, limbs)
    phase, tempo, wide = (
        program.uniform(0, 6.3, limbs),
        program.uniform(0.5, 2, limbs),
        program.uniform(0.02, 0.12, limbs),
    )
    shares = np.linalg.norm(along, axis=1) + 0.2
    drift = program.uniform(-1, 1, 3) * program.chance(0.3)
    limb = program.points.choice(limbs, n, p=shares / shares.sum())
    time = program.points.random(n)
    # The pose of every limb at the time at which each point is seen: (n, 3) its start, (n, 3) its direction.
    start, tips, points = np.zeros((n, 3)), np.empty((limbs, n, 3)), np.empty((n, 3))
    for number in range(limbs):
        angle = swing[number] * np.sin(2 * np.pi * tempo[number] * time + phase[number])
        direction = turned(along[number], axis[number], angle)
        start = tips[parent[number - 1]] if number else start
        tips[number] = start + direction
        own = limb == number
        points[own] = (start + program.points.random((n, 1)) * direction)[own]
    return np.asarray(points + wide[limb, None] * program.points.normal(size=(n, 3)) + drift * time[:, None])


def turned(vector: Array, axis: Array, angle: Array) -> Array:
    """A vector (3,) turned about a unit axis (3,) by each angle (n,), as (n, 3): the formula of Rodrigues."""
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.asarray(vector * cos + np.cross(axis, vector) * sin + axis * (axis @ vector) * (1 - cos))


FAMILIES: dict[Callable[[Program, int], Array], float] = {
    superquadric: 1,
    supertoroid: 1,
    frustum: 1.5,
    vase: 1.5,
    box: 0.5,
    strokes: 3,
    tube: 1,
    relief: 3,
    union: 1.5,
    assembly: 3,
    clusters: 1.5,
    fractal: 1.5,
    mover: 3,
}


# --- deformations ---


def random_rotations(program: Program, count: int) -> Array:
    """(count, 3, 3) rotations, uniform over all orientations (from uniform unit quaternions)."""
    w, x, y, z = unit_rows(program.normal(size=(count, 4))).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def unit_rows(rows: Array) -> Array:
    """(m, c) with rows of norm one."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9))


def deform(program: Program, points: Array) -> Array:
    """(n, 3) tapered, twisted or bent along a random axis of the frame."""
    order = program.choice(3, 3, replace=False)
    x, y, z = points[:, order].T
    kind = program.integers(3)
    if kind == 0:
        scale = 1 + program.uniform(-0.7, 0.7) * z
        x, y = x * scale, y * scale
    elif kind == 1:
        angle = program.uniform(-2, 2) * z
        x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    else:
        bend = program.uniform(0.3, 1.2)
        radius = 1 / bend + x
        x, z = radius * np.cos(bend * z) - 1 / bend, radius * np.sin(bend * z)
    return np.stack([x, y, z], axis=1)[:, np.argsort(order)]
