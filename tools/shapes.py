"""Procedural solids: the endless training set of `tools/pretrain.py`.

Nearly every solid is a *loft*, a stack of closed rings: superquadrics, supertoroids, prisms, frustums, vases, boxes and
extruded strokes differ only in where the rings lie. A loft is triangulated, and points are drawn uniformly by triangle
area. Unions drop the points that lie inside another part. Reliefs are flat fields of varying thickness. Everything is
sometimes bent, twisted or tapered, cut and made noisy, and in the end scaled to the unit sphere.

    rng = numpy.random.default_rng(0)
    points = sample_shape(rng)                  # (1024, 3) float32
    clouds = sample_shapes(1000, seed=0)        # (1000, 1024, 3) float32, the same for the same seed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from examples.data import unit_sphere

Array = npt.NDArray[np.float64]
Points = npt.NDArray[np.float32]
Generator = np.random.Generator


def sample_shape(rng: Generator, n: int = 1024) -> Points:
    """One random solid as a cloud (n, 3): centred on its mean, farthest point on the unit sphere."""
    families = list(FAMILIES)
    weights = np.array([FAMILIES[family] for family in families])
    family = families[rng.choice(len(families), p=weights / weights.sum())]
    points = family(rng, 2 * n)
    if rng.random() < 0.4:
        points = deform(rng, unit_sphere(points))
    if rng.random() < 0.15:
        points = cut(rng, points)
    points = points[rng.choice(len(points), n, replace=len(points) < n)]
    points = unit_sphere(points)
    if rng.random() < 0.3:
        points = unit_sphere(points + rng.normal(scale=rng.uniform(0.002, 0.02), size=points.shape))
    return points.astype(np.float32)


def sample_shapes(count: int, n: int = 1024, seed: int = 0) -> Points:
    """(count, n, 3) random solids; the i-th depends on `seed` and i alone."""
    return np.stack(list(iterate_shapes(count, n, seed)))


def iterate_shapes(count: int, n: int = 1024, seed: int = 0) -> Iterator[Points]:
    """The clouds of `sample_shapes` one by one, for a progress bar."""
    for index in range(count):
        yield sample_shape(np.random.default_rng((seed, index)), n)


# --- lofts ---


def sample_loft(rng: Generator, rings: Array, n: int, joined: bool = False) -> Array:
    """n points, uniform by area, on the surface through `rings` (m, k, 3), each closed; `joined`: last to first."""
    if joined:
        rings = np.concatenate([rings, rings[:1]])
    side = np.concatenate([rings, rings[:, :1]], axis=1)
    a, b, c, d = side[:-1, :-1], side[1:, :-1], side[1:, 1:], side[:-1, 1:]
    triangles = np.concatenate([np.stack([a, b, c], axis=2), np.stack([a, c, d], axis=2)]).reshape(-1, 3, 3)
    edges = triangles[:, 1:] - triangles[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    chosen = np.searchsorted(np.cumsum(area), rng.random(n) * area.sum(), side="right").clip(max=len(area) - 1)
    u, v = rng.random((2, n, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return np.asarray(triangles[chosen, 0] + u * edges[chosen, 0] + v * edges[chosen, 1])


def signed_power(base: Array, exponent: float) -> Array:
    """sign(x) |x|^e, the curve of superquadrics."""
    return np.sign(base) * np.abs(base) ** exponent


def superellipse(exponent: float, count: int) -> Array:
    """(count, 2) closed curve: 1 is a circle, near 0 a square, 2 a diamond."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([signed_power(np.cos(angle), exponent), signed_power(np.sin(angle), exponent)], axis=1)


def polygon(rng: Generator, count: int) -> Array:
    """(count, 2) outline: a regular polygon or star of 3 to 8 corners, walked at even angles."""
    corners = int(rng.integers(3, 9))
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    corner = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if rng.random() < 0.3:
        middle = (corner + np.roll(corner, -1, axis=0)) / 2 * rng.uniform(0.4, 0.9)
        corner = np.stack([corner, middle], axis=1).reshape(-1, 2)
    where = np.linspace(0, len(corner), count, endpoint=False)
    first = where.astype(int)
    share = (where - first)[:, None]
    return np.asarray(corner[first] * (1 - share) + corner[(first + 1) % len(corner)] * share)


def outline(rng: Generator, count: int = 40) -> Array:
    """(count, 2) random cross-section."""
    return polygon(rng, count) if rng.random() < 0.4 else superellipse(random_exponent(rng), count)


def random_exponent(rng: Generator) -> float:
    """Exponent of a superquadric: boxes, ellipsoids and diamonds about equally often."""
    return float(rng.choice([rng.uniform(0.05, 0.4), rng.uniform(0.5, 1.2), rng.uniform(1.2, 2.5)], p=[0.4, 0.4, 0.2]))


def random_axes(rng: Generator) -> Array:
    """(3,) half lengths; now and then a plate or a rod."""
    axes = rng.uniform(0.3, 1.0, size=3)
    axes[rng.random(3) < 0.15] *= 0.3
    return axes


def with_caps(rings: Array) -> Array:
    """(m, k, 3) -> (m + 2, k, 3): both ends closed by a ring shrunk to its centre."""
    ends = rings[[0, -1]].mean(axis=1, keepdims=True).repeat(rings.shape[1], axis=1)
    return np.concatenate([ends[:1], rings, ends[1:]])


# --- families: each gives about n points (n, 3), in its own scale and frame ---


def superquadric(rng: Generator, n: int) -> Array:
    """Ellipsoids, rounded boxes, cylinders, octahedra and all between."""
    return sample_superquadric(rng, n, random_axes(rng), random_exponent(rng), random_exponent(rng))


def sample_superquadric(rng: Generator, n: int, axes: Array, north: float, east: float) -> Array:
    """n points on the superquadric of half lengths `axes` (3,) and its two exponents."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, 25)
    radius, height = np.cos(latitude).clip(0) ** north, signed_power(np.sin(latitude), north)
    around = superellipse(east, 40)
    tall = np.broadcast_to(height[:, None, None], (25, 40, 1))
    return sample_loft(rng, np.concatenate([radius[:, None, None] * around, tall], axis=2) * axes, n)


def supertoroid(rng: Generator, n: int) -> Array:
    """Rings of round, square or diamond section along a round, square or diamond path; flat ones too."""
    path, section = superellipse(random_exponent(rng), 48), superellipse(random_exponent(rng), 20)
    inner, height = rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.8)
    radius = 1 + inner * section[:, 0]
    flat = radius[None, :, None] * path[:, None]
    tall = np.broadcast_to(height * section[None, :, 1:], (48, 20, 1))
    return sample_loft(rng, np.concatenate([flat, tall], axis=2) * [1, rng.uniform(0.4, 1), 1], n, joined=True)


def frustum(rng: Generator, n: int) -> Array:
    """Prisms, pyramids, cones, cylinders and frustums, with caps and sometimes twisted."""
    around = outline(rng)
    height, top = rng.uniform(0.2, 2.0), rng.choice([0.0, 1.0, rng.uniform(0.1, 1.0)])
    return loft_outline(rng, n, around, np.linspace(1, top, 8), np.linspace(-height / 2, height / 2, 8))


def vase(rng: Generator, n: int) -> Array:
    """Solids with a smooth random profile, round or not."""
    level = np.linspace(0, 1, 20)
    waves = rng.normal(size=4) / np.arange(1, 5)
    phases = rng.uniform(0, np.pi, size=4)
    profile = 1 + 0.5 * (waves[:, None] * np.sin(np.pi * np.arange(1, 5)[:, None] * level + phases[:, None])).sum(
        axis=0
    )
    return loft_outline(rng, n, outline(rng), np.abs(profile).clip(0.05), level * rng.uniform(0.5, 3))


def loft_outline(rng: Generator, n: int, around: Array, radius: Array, height: Array) -> Array:
    """n points on the solid whose section `around` (k, 2) is scaled by `radius` (m,) at `height` (m,); ends closed."""
    scaled = radius[:, None, None] * around * [1, rng.uniform(0.3, 1)]
    tall = np.broadcast_to(height[:, None, None], (*scaled.shape[:2], 1))
    return sample_loft(rng, with_caps(np.concatenate([scaled, tall], axis=2)), n)


def box(rng: Generator, n: int) -> Array:
    """Boxes, plates and beams with sharp edges."""
    half = random_axes(rng)
    square = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    tall = np.broadcast_to(np.array([-1.0, 1.0])[:, None, None], (2, 4, 1))
    rings = np.concatenate([np.broadcast_to(square, (2, 4, 2)), tall], axis=2)
    return sample_loft(rng, with_caps(rings) * half, n)


def curve(rng: Generator, count: int) -> Array:
    """(count, 2) planar pen stroke in about [-1, 1]^2: polyline, arc, spiral or smooth wiggle, sometimes closed."""
    time = np.linspace(0, 1, count)
    kind = rng.integers(4)
    if kind == 0:  # straight pieces
        knots = rng.uniform(-1, 1, size=(rng.integers(2, 5), 2))
        return np.stack([np.interp(time, np.linspace(0, 1, len(knots)), knots[:, axis]) for axis in range(2)], axis=1)
    if kind == 1:  # arc of an ellipse, or all of it
        start, sweep = rng.uniform(0, 2 * np.pi), rng.choice([2 * np.pi, rng.uniform(1.5, 6)])
        angle = start + sweep * time
        radii, middle = rng.uniform(0.4, 1, size=2), rng.uniform(-0.3, 0.3, size=2)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radii + middle
    if kind == 2:  # spiral, hook
        angle = rng.uniform(0, 2 * np.pi) + rng.uniform(2, 9) * time
        radius = np.interp(time, [0, 1], rng.uniform(0.1, 1, size=2))
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    phase, size = rng.uniform(0, 2 * np.pi, size=(3, 2)), rng.normal(size=(3, 2)) / np.array([[1], [1.5], [2.5]])
    wave = np.sin(np.pi * np.arange(1, 4)[:, None, None] * time[:, None] + phase[:, None])
    return np.asarray((size[:, None] * wave).sum(axis=0))


def pen_strokes(rng: Generator, count: int) -> Array:
    """(s, count, 2) one to three strokes, as in letters and signs, that share a place."""
    strokes = [curve(rng, count)]
    for _ in range(int(rng.choice(3, p=[0.5, 0.3, 0.2]))):
        stroke = curve(rng, count) * rng.uniform(0.4, 1)
        touched, touching = strokes[0][rng.integers(count)], stroke[rng.integers(count)]
        strokes.append(stroke - touching + touched)
    return np.stack(strokes)


def strokes(rng: Generator, n: int) -> Array:
    """Letters-like solids: pen strokes extruded to bars of rectangular or round section."""
    width, thick, section = rng.uniform(0.06, 0.3), rng.uniform(0.06, 0.5), superellipse(rng.choice([0.1, 1.0]), 12)
    drawn = pen_strokes(rng, 24)
    shares = np.linalg.norm(np.diff(drawn, axis=1), axis=2).sum(axis=1) + 0.05
    counts = np.ceil(n * shares / shares.sum()).astype(int)
    pieces = zip(drawn, counts, strict=True)
    return np.concatenate([sample_loft(rng, bar(line, width, thick, section), count) for line, count in pieces])


def bar(line: Array, width: float, thick: float, section: Array) -> Array:
    """Rings (m + 2, k, 3) of a bar along `line` (m, 2): `section` (k, 2) times `width` in the plane, `thick` across."""
    along = np.gradient(line, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True).clip(1e-9)
    sideways = np.stack([-along[:, 1], along[:, 0], np.zeros(len(line))], axis=1)
    spine = np.concatenate([line, np.zeros((len(line), 1))], axis=1)
    offset = section[None, :, :1] * sideways[:, None] * width + section[None, :, 1:] * np.array([0, 0, thick])
    return with_caps(spine[:, None] + offset)


def tube(rng: Generator, n: int) -> Array:
    """Pipes and ropes: a round or square section along a smooth curve in space."""
    time = np.linspace(0, 1, 32)
    knots = rng.uniform(-1, 1, size=(4, 3))
    blend = np.stack([(1 - time) ** 3, 3 * time * (1 - time) ** 2, 3 * time**2 * (1 - time), time**3], axis=1)
    spine = blend @ knots
    along = np.gradient(spine, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True).clip(1e-9)
    first = np.cross(along, rng.normal(size=3))
    first /= np.linalg.norm(first, axis=1, keepdims=True).clip(1e-9)
    second = np.cross(along, first)
    section = superellipse(random_exponent(rng), 14) * rng.uniform(0.05, 0.35, size=2)
    rings = spine[:, None] + section[None, :, :1] * first[:, None] + section[None, :, 1:] * second[:, None]
    return sample_loft(rng, with_caps(rings), n)


def relief(rng: Generator, n: int) -> Array:
    """Plates of varying density and thickness: blurred strokes or blobs on a coarse grid, filled with points."""
    size = int(rng.integers(6, 17))
    grid = (np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), axis=-1) + 0.5) / size * 2.4 - 1.2
    blobs = rng.uniform(-1, 1, size=(rng.integers(2, 9), 2))
    marks = pen_strokes(rng, 32).reshape(-1, 2) if rng.random() < 0.8 else blobs
    spread = rng.uniform(0.08, 0.3)
    near = ((grid[:, :, None] - marks) ** 2).sum(axis=-1).min(axis=-1)
    height = np.exp((near.min() - near) / (2 * spread**2)).ravel()
    height[height < 0.1] = 0
    cell = rng.choice(size * size, n, p=height / height.sum())
    flat = grid.reshape(-1, 2)[cell] + rng.uniform(-1.2, 1.2, size=(n, 2)) / size
    tall = rng.uniform(-1, 1, size=n) * height[cell] * rng.uniform(0.05, 0.4)
    return np.concatenate([flat, tall[:, None]], axis=1)


def union(rng: Generator, n: int) -> Array:
    """Two to four superquadrics in random poses; points inside another part are dropped: the outer skin stays."""
    parts = int(rng.integers(2, 5))
    axes = np.stack([random_axes(rng) for _ in range(parts)])
    powers = np.array([[random_exponent(rng), random_exponent(rng)] for _ in range(parts)])
    turns, places = random_rotations(rng, parts), rng.uniform(-0.8, 0.8, size=(parts, 3))
    kept = []
    for part in range(parts):
        points = sample_superquadric(rng, 2 * n, axes[part], *powers[part]) @ turns[part].T + places[part]
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
    return points if len(points) >= n // 4 else superquadric(rng, n)


def assembly(rng: Generator, n: int) -> Array:
    """Two to four solids of any simple family in random poses, as furniture and tools are made of."""
    parts = int(rng.integers(2, 5))
    simple: list[Callable[[Generator, int], Array]] = [superquadric, supertoroid, frustum, box, box, vase, strokes]
    turns = random_rotations(rng, parts)
    if rng.random() < 0.5:
        turns[:] = np.eye(3)  # parts of man-made things are often aligned
    pieces = []
    for turn, family in zip(turns, rng.choice(len(simple), parts), strict=True):
        size = rng.uniform(0.3, 1)
        piece = simple[family](rng, max(int(n * size**2), 32))
        pieces.append(unit_sphere(piece) @ turn.T * size + rng.uniform(-0.8, 0.8, size=3))
    return np.concatenate(pieces)


FAMILIES: dict[Callable[[Generator, int], Array], float] = {
    superquadric: 1.5,
    supertoroid: 1,
    frustum: 1.5,
    vase: 1,
    box: 0.7,
    strokes: 2,
    tube: 0.8,
    relief: 2,
    union: 1.5,
    assembly: 2,
}


# --- deformations ---


def random_rotations(rng: Generator, count: int) -> Array:
    """(count, 3, 3) rotations, uniform over all orientations (from uniform unit quaternions)."""
    w, x, y, z = unit_rows(rng.normal(size=(count, 4))).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def unit_rows(rows: Array) -> Array:
    """(m, c) with rows of norm one."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9))


def deform(rng: Generator, points: Array) -> Array:
    """(n, 3) tapered, twisted or bent along a random axis of the frame."""
    order = rng.permutation(3)
    x, y, z = points[:, order].T
    kind = rng.integers(3)
    if kind == 0:
        scale = 1 + rng.uniform(-0.7, 0.7) * z
        x, y = x * scale, y * scale
    elif kind == 1:
        angle = rng.uniform(-2, 2) * z
        x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    else:
        bend = rng.uniform(0.3, 1.2)
        radius = 1 / bend + x
        x, z = radius * np.cos(bend * z) - 1 / bend, radius * np.sin(bend * z)
    return np.stack([x, y, z], axis=1)[:, np.argsort(order)]


def cut(rng: Generator, points: Array) -> Array:
    """(n, 3) -> fewer: one side of a random plane, 55 to 90 % of the points, as a sensor sees a part of a thing."""
    depth = points @ unit_rows(rng.normal(size=(1, 3)))[0]
    return np.asarray(points[depth <= np.quantile(depth, rng.uniform(0.55, 0.9))])
