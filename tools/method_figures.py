"""A method's figure: the backbone in grey, what the method trains in colour, where it is.

The figure is drawn from an adapter of the method on a point transformer, so a method needs to bring none.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from point_peft import METHODS, describe, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.parts.base import Part, SharedState

DEPTH = 12
CARD, CHIP, GAP = 132, 208, 14
"""Widths of a module and of a part, and the gap between two rows."""
COLUMN = CARD + 24 + CHIP
BLOCK_WIDTH = COLUMN + 80
SMALL = 10.5
LETTER = 0.57
"""The size of small text, and the width of a letter by its size, which is that of wide fonts."""
INK, LINE, SOFT = "#1f2933", "#6b7785", "#5d6874"
COLOURS = {
    "frozen": ("#eceff2", "#aab4bf"),
    "part": ("#ffe8cc", "#d9730d"),
    "copy": ("#d8f3dc", "#2d8a4e"),
    "shared": ("#dbe9ff", "#2f6fca"),
}
"""Kind -> fill and border."""
LEGEND = {
    "frozen": "frozen",
    "part": "part of the method",
    "copy": "trained copy of the backbone's",
    "shared": "shared by its parts",
}


# ---- what is where ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Chip:
    """The parts of one class at one site, over all blocks."""

    name: str
    kind: str
    acts: str = ""
    """On what of its module it acts."""
    blocks: set[int] = field(default_factory=set)
    members: dict[str, set[int]] = field(default_factory=dict)
    """Name of a trained member -> the blocks that have it."""

    def lines(self, width: float) -> list[str]:
        """Lines below its name."""
        inside = ", ".join(name + _where(blocks, self.blocks) for name, blocks in self.members.items())
        at = _where(self.blocks, set(range(DEPTH))).strip(" ()")
        sentences = [text for text in (at, self.acts, f"trains {inside}" if inside else "") if text]
        letters = int(width / (SMALL * LETTER))
        if len("; ".join(sentences)) <= letters:
            sentences = ["; ".join(sentences)]
        return [line for text in sentences for line in textwrap.wrap(text, letters, break_long_words=False)]


def _where(blocks: set[int], whole: set[int]) -> str:
    """' (blocks 0–5)', unless they are the whole, or none at all."""
    if not blocks or blocks == whole:
        return ""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    spelled = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f" ({'block' if len(blocks) == 1 else 'blocks'} {spelled})"


SITES = ("group_divider", "encoder", "reduce_dim", "pos_embed", "blocks", "norm", "cls_head_finetune")
BLOCK_SITES = ("norm1", "attn.qkv", "attn.proj", "attn", "norm2", "mlp.fc1", "mlp.fc2", "mlp")
"""Places in the figure: in the model, and in a block, inner before outer."""
PLACES = {"reduce_dim": "encoder"}
"""Places that are another's too."""


def chips_of(method: str) -> dict[str, list[Chip]]:
    """Site -> its chips, for the defaults of a method; "block" is a block as a whole, "shared" belongs to no site."""
    backbone = PointTransformer(trans_dim=48, encoder_dims=48, depth=DEPTH, num_group=32, group_size=8)
    blocks = [block.path for block in describe(backbone).blocks]
    adapter = get_adapter(get_peft_model(backbone, METHODS[method]()), "default")
    chips: dict[tuple[str, str, str], Chip] = {}
    for path, part in adapter.all_parts():
        number = next((i for i, block in enumerate(blocks) if f"{path}.".startswith(f"{block}.")), None)
        site, inner = _site(path if number is None else path[len(blocks[number]) + 1 :], number is not None)
        name = type(part).__name__ + (f" at {inner}" if inner else "")
        chip = chips.setdefault((site, name, acts := _acts(part)), Chip(name=name, kind=_kind(part), acts=acts))
        within = set() if number is None else {number}
        chip.blocks |= within
        for member in _members(part):
            chip.members.setdefault(member, set()).update(within)
    for state in adapter.shared_states():
        name = type(state).__name__
        chip = chips.setdefault(("shared", name, ""), Chip(name=name, kind=_kind(state)))
        chip.members.update({member: set() for member in _members(state)})
        if state.bank is not None:
            chip.acts = "features of training clouds"
    placed: dict[str, list[Chip]] = {}
    for (site, _, _), chip in chips.items():
        placed.setdefault(site, []).append(chip)
    return placed


def _site(path: str, in_block: bool) -> tuple[str, str]:
    """The place in the figure of a module, and what leads from there to the module."""
    for site in BLOCK_SITES if in_block else SITES:
        if path == site or path.startswith(site + "."):
            return PLACES.get(site, site), path[len(site) + 1 :]
    return ("block" if in_block else "model"), path


def _kind(part: Part | SharedState) -> str:
    if isinstance(part, Part):
        return "copy" if part.own_module is not None or part.tuned else "part"
    return "copy" if part.tuned_tokens else "shared"


def _acts(part: Part) -> str:
    """On what of its module a part acts: told by what its class does itself."""
    kind = type(part)
    if part.own_module is not None:
        return "instead of the frozen one"
    if part.mergeable:
        return "acts on the weights"
    acts = [name for name, method in (("input", "before"), ("output", "after")) if _overrides(kind, method)]
    return "acts on " + " and ".join(acts) if acts else ""


def _overrides(kind: type[Part], method: str) -> bool:
    return getattr(kind, method) is not getattr(Part, method)


def _members(part: Part | SharedState) -> list[str]:
    """The attributes that hold what is trained; a whole module's own are not told."""
    if isinstance(part, Part) and part.own_module is not None:
        return []
    return list(dict.fromkeys(name.split(".")[0].replace("/", ".") for name, _ in part.named_parameters()))


# ---- drawing ---------------------------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """Lines of SVG."""

    lines: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, kind: str, *, dashed: bool = False) -> None:
        """A rounded box in the colours of its kind; dashed: a frame without filling."""
        fill, border = COLOURS[kind]
        style = (
            f'fill="none" stroke="{border}" stroke-dasharray="5 4"' if dashed else f'fill="{fill}" stroke="{border}"'
        )
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" {style} stroke-width="1.3"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12.5,
        bold: bool = False,
        colour: str = INK,
        middle: bool = True,
        width: float = 0,
    ) -> None:
        """A line of text around, or from, a point of its base line; squeezed where it would not fit into a width."""
        attributes = f'x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"'
        attributes += ' text-anchor="middle"' if middle else ""
        attributes += ' font-weight="600"' if bold else ""
        if width and len(text) * size * LETTER > width:
            attributes += f' textLength="{width:g}" lengthAdjust="spacingAndGlyphs"'
        self.lines.append(f"<text {attributes}>{escape(text)}</text>")

    def line(self, *points: tuple[float, float], arrow: bool = False, dashed: bool = False) -> None:
        """A line through points."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        extra = ' marker-end="url(#arrow)"' if arrow else ""
        extra += ' stroke-dasharray="5 4"' if dashed else ""
        self.lines.append(f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.3"{extra}/>')

    def plus(self, x: float, y: float) -> None:
        """A sum."""
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="#ffffff" stroke="{LINE}" stroke-width="1.3"/>')
        self.line((x - 5, y), (x + 5, y))
        self.line((x, y - 5), (x, y + 5))

    def chip(self, x: float, y: float, chip: Chip, width: float = CHIP) -> float:
        """A part with its text; its height."""
        lines = chip.lines(width - 20)
        height = 26 + 14 * len(lines)
        self.box(x, y, width, height, chip.kind)
        self.text(x + 10, y + 17, chip.name, bold=True, middle=False, width=width - 20)
        for i, line in enumerate(lines):
            self.text(x + 10, y + 32 + 14 * i, line, size=SMALL, colour=SOFT, middle=False, width=width - 20)
        return height

    def row(self, x: float, y: float, label: str, chips: Sequence[Chip], *, drawn: bool = True) -> float:
        """A module with the parts that it has; the height of both."""
        below = y
        for chip in chips:
            self.line(
                (x + CARD, y + 17), (x + CARD + 12, y + 17), (x + CARD + 12, below + 17), (x + CARD + 24, below + 17)
            )
            below += self.chip(x + CARD + 24, below, chip) + 6
        if drawn:
            self.box(x, y, CARD, 34, "frozen")
        self.text(x + CARD / 2, y + 21.5, label, width=CARD - 12)
        return max(34, below - 6 - y)

    def svg(self, width: float, height: float, title: str) -> str:
        """The whole file: a white card, so that it can be read on any background."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif">'
        )
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0.5 L7.5 4 L0 7.5 z" fill="{LINE}"/></marker></defs>'
        )
        card = f'<rect width="{width:g}" height="{height:g}" rx="12" fill="#ffffff"/>'
        return "\n".join([head, f"<title>{escape(title)}</title>", arrow, card, *self.lines, "</svg>"]) + "\n"


def figure(method: str, name: str) -> str:
    """The figure of a method, which goes by a name in its title, as SVG."""
    chips = chips_of(method)
    drawing = Drawing()
    drawing.text(28, 38, f"What {name} adds to Point-MAE", size=17, bold=True, middle=False)
    left = _model(drawing, 28, 64, chips)
    right = _block(drawing, 28 + COLUMN + 40, 64, chips)
    width = 28 + COLUMN + 40 + BLOCK_WIDTH + 28
    bottom = max(left, right) + 28
    x: float = 28
    for kind, meaning in LEGEND.items():
        drawing.box(x, bottom, 16, 16, kind)
        drawing.text(x + 23, bottom + 12.5, meaning, size=11.5, colour=SOFT, middle=False)
        x += 23 + 7 * len(meaning) + 26
    return drawing.svg(width, bottom + 36, f"{name}: the parts of the method at their sites in a backbone")


def _model(drawing: Drawing, x: float, y: float, chips: dict[str, list[Chip]]) -> float:
    """The whole backbone from the cloud to the prediction, and what is shared; where it ends."""
    middle, beside = x + CARD / 2, x + CARD + 24
    y += drawing.row(x, y, "point cloud", chips.get("model", []), drawn=False)
    down, y = y, y + GAP

    def module(site: str, label: str) -> None:
        nonlocal down, y
        drawing.line((middle, down), (middle, y), arrow=True)
        down = y + 34
        y += drawing.row(x, y, label, chips.get(site, [])) + GAP + 6

    module("group_divider", "grouping")
    centres = down + 7
    module("encoder", "patch embedding")
    drawing.line((middle, centres), (x + CARD + 6, centres), (x + CARD + 6, y + 9), (beside, y + 9), arrow=True)
    drawing.row(beside, y, "position embedding", [])
    drawing.line((beside, y + 25), (middle + 9, y + 25), arrow=True)
    drawing.line((middle, down), (middle, y + 16), arrow=True)
    drawing.plus(middle, y + 25)
    down, y = y + 34, y + 40
    for chip in chips.get("pos_embed", []):
        y += drawing.chip(beside, y, chip) + 6
    y += GAP
    # To the block beside; parts at the container of the blocks lie on top of it.
    drawing.line((x + CARD, y + 17), (x + COLUMN + 40, y + 17), dashed=True)
    module("blocks", f"{DEPTH} blocks")
    module("norm", "final norm")
    module("cls_head_finetune", "head")
    drawing.line((middle, down), (middle, y), arrow=True)
    drawing.text(middle, y + 16, "prediction")
    y += 24
    shared = chips.get("shared", [])
    if shared:
        y += 30
        drawing.text(x, y, "Shared by the parts", bold=True, middle=False)
        y += 10
        for chip in shared:
            y += drawing.chip(x, y, chip, COLUMN) + 6
    return y


def _block(drawing: Drawing, left: float, top: float, chips: dict[str, list[Chip]]) -> float:
    """One block with its two residual branches; where it ends."""
    x, y = left + 44, top + 34
    middle, skip = x + CARD / 2, left + 22
    drawing.text(left + 16, top + 22, f"each of the {DEPTH} blocks", size=12.5, bold=True, middle=False)
    whole = chips.get("block", [])
    last = [chip for chip in whole if chip.acts == "acts on output"]
    for chip in whole:
        if chip not in last:
            y += drawing.chip(x, y, chip, COLUMN) + 6
    start = y
    for branch in (
        (("norm1", "norm1"), ("attn.qkv", "attn.qkv"), ("attn", "attention"), ("attn.proj", "attn.proj")),
        (("norm2", "norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp", "GELU"), ("mlp.fc2", "mlp.fc2")),
    ):
        previous = start
        y = start + 2 * GAP
        for site, label in branch:
            drawing.line((middle, previous), (middle, y), arrow=True)
            height = drawing.row(x, y, label, [] if site in ("attn", "mlp") else chips.get(site, []))
            previous = y + 34
            y += height + GAP
        outer = branch[2][0]
        for chip in chips.get(outer, []):
            chip_y = y
            drawing.line((middle, chip_y + 17), (x + CARD + 24, chip_y + 17))
            y += drawing.chip(x + CARD + 24, chip_y, chip) + 6
        y += 10
        drawing.line((middle, previous), (middle, y - 9), arrow=True)
        drawing.plus(middle, y)
        drawing.line((middle, start + GAP), (skip, start + GAP), (skip, y), (middle - 9, y), arrow=True)
        start = y + 9
    bottom = start + GAP
    for chip in last:
        drawing.line((middle, bottom - GAP), (middle, bottom), arrow=True)
        bottom += drawing.chip(x, bottom, chip, COLUMN) + GAP
    drawing.line((middle, bottom - GAP), (middle, bottom + 12), arrow=True)
    bottom += 20
    drawing.box(left, top, BLOCK_WIDTH, bottom - top, "frozen", dashed=True)
    return bottom
