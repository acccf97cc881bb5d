"""The picture of the README: one frozen backbone, adapters plugged in, tasks.

python -m tools.overview    write docs/overview.svg
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).resolve().parents[1] / "docs" / "overview.svg"
WIDTH, HEIGHT = 940, 416
INK, SOFT, LINE = "#1f2933", "#5d6874", "#aab4bf"
FROZEN = "#eceff2"
TASKS = (
    ("shapes", "15 classes of scans", "PointPEFTConfig", "#d9730d", "#ffe8cc"),
    ("grasp", "where to take hold", "LoraConfig", "#2f6fca", "#dbe9ff"),
    ("parts", "a label for each point", "PointGSTConfig", "#2d8a4e", "#d8f3dc"),
)
"""Name, meaning, configuration, border and fill."""


def text(x: float, y: float, words: str, *, size: float = 14, fill: str = INK, extra: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{fill}" {extra}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str, extra: str = "") -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="8"'
    return f'<rect {place} fill="{fill}" stroke="{line}" stroke-width="1.5" {extra}/>'


def arrow(points: str, colour: str) -> str:
    return f'<path d="{points}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#tip)"/>'


def mug(x: float, y: float) -> list[str]:
    """A point cloud: points on a mug, seen a little from above."""
    draw = random.Random(3)
    dots = []
    for _ in range(620):
        if draw.random() < 0.78:
            angle, height = draw.uniform(0, 2 * math.pi), draw.uniform(-1, 1)
            place = math.cos(angle) * 0.75, height, math.sin(angle) * 0.75
        else:
            ring, tube = draw.uniform(-1.9, 1.9), draw.uniform(0, 2 * math.pi)
            wide = 0.55 + 0.12 * math.cos(tube)
            place = 0.65 + wide * math.cos(ring), wide * math.sin(ring), 0.12 * math.sin(tube)
        right, up, near = place
        shade = "#3b4754" if near > 0 else "#9aa5b1"
        dots.append(
            f'<circle cx="{x + 48 * right:.1f}" cy="{y - 52 * up + 14 * near:.1f}" r="{1.5 + 0.5 * near:.2f}" '
            f'fill="{shade}"/>'
        )
    return dots


def backbone(left: float, top: float) -> list[str]:
    """The frozen backbone: a row of blocks in one box."""
    parts = [box(left, top, 440, 128, FROZEN, LINE)]
    parts.append(text(left + 18, top + 30, "frozen backbone", size=16, extra='font-weight="600"'))
    parts.append(text(left + 185, top + 30, "Point-MAE, Point-M2AE, PTv3 …", size=12.5, fill=SOFT))
    for number in range(8):
        x = left + 18 + number * 51
        parts.append(box(x, top + 48, 44, 58, "#ffffff", LINE))
        label = "groups" if number == 0 else "block"
        parts.append(text(x + 22, top + 81, label, size=11, fill=SOFT, extra='text-anchor="middle"'))
    return parts


def task(number: int, name: str, meaning: str, config: str, line: str, fill: str) -> list[str]:
    """An adapter below the backbone, where it plugs in, and its head's answer."""
    top, left = 226 + 60 * number, 208
    active = number == 0
    faded = "" if active else 'opacity="0.75"'
    parts = [box(left, top, 440, 46, fill, line, faded)]
    parts.append(text(left + 18, top + 20, f'"{name}"', size=14, extra='font-weight="600"'))
    parts.append(text(left + 18, top + 37, config, size=11.5, fill=SOFT, extra='font-family="monospace"'))
    for block in range(1, 8):
        x = left + 18 + block * 51 + 22
        parts.append(f'<circle cx="{x}" cy="{top + 23}" r="5" fill="{line}" {faded}/>' if block > 2 else "")
        if active and block > 2:
            parts.append(f'<path d="M{x} {top + 18} V188" stroke="{line}" stroke-width="2" stroke-dasharray="3 3"/>')
    parts.append(arrow(f"M{left + 440} {top + 23} H{left + 490}", line))
    parts.append(text(left + 500, top + 20, meaning, size=13.5))
    own = "one small file, its own head" + (" (active)" if active else "")
    parts.append(text(left + 500, top + 37, own, size=11.5, fill=SOFT))
    return parts


def picture() -> str:
    """The whole picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, '
        'DejaVu Sans, sans-serif" role="img" aria-label="One frozen backbone, three adapters plugged in, three tasks">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{SOFT}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>',
        *mug(92, 124),
        text(92, 206, "a point cloud", size=12.5, fill=SOFT, extra='text-anchor="middle"'),
        arrow("M158 124 H200", SOFT),
        *backbone(208, 60),
        text(668, 116, "somebody else's code and weights,", size=13.5),
        text(668, 135, "one copy in memory, never changed", size=13.5),
        text(24, 246, "adapters,", size=13.5),
        text(24, 265, "swapped in", size=13.5),
        text(24, 284, "microseconds", size=13.5),
        text(208, 38, "point_peft", size=19, extra='font-weight="700"'),
    ]
    for number, row in enumerate(TASKS):
        parts += task(number, *row)
    return "\n".join([*filter(None, parts), "</svg>", ""])


if __name__ == "__main__":
    OUT.write_text(picture(), encoding="utf-8")
    print(OUT)
