"""The figures of docs/concepts.md: an adapter beside a backbone, one forward, prompts and their prior, the files.

python -m tools.concepts    write docs/concepts/*.svg
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.method_figures import COLOURS, INK, SOFT, Drawing

OUT = Path(__file__).resolve().parents[1] / "docs" / "concepts"
SMALL, LABEL = 12.5, 13.5
WIDTH = 900


class Figure(Drawing):
    """A drawing with what these figures have more: labelled boxes, dots for hooks, notes of several lines."""

    def labelled(self, x: float, y: float, width: float, height: float, kind: str, label: str, below: str = "") -> None:
        """A box with its label in the middle, and a smaller line below that."""
        self.box(x, y, width, height, kind)
        middle = y + height / 2 + (-3 if below else 4.5)
        self.text(x + width / 2, middle, label, size=LABEL)
        if below:
            self.text(x + width / 2, middle + 16, below, size=SMALL, colour=SOFT)

    def hook(self, x: float, y: float) -> None:
        """A hook: a dot in the colour of parts."""
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="5.5" fill="{COLOURS["part"][1]}"/>')

    def note(self, x: float, y: float, *lines: str, middle: bool = False) -> None:
        """Lines of small text, one below the other."""
        for number, line in enumerate(lines):
            self.text(x, y + 16 * number, line, size=SMALL, colour=SOFT, middle=middle)

    def head(self, title: str) -> None:
        self.text(28, 38, title, size=17, bold=True, middle=False)

    def frame(self, x: float, y: float, width: float, height: float, kind: str, label: str) -> None:
        """A dashed frame with its label inside, at the top."""
        self.box(x, y, width, height, kind, dashed=True)
        self.text(x + 14, y + 23, label, size=LABEL, bold=True, middle=False)


# ---- an adapter beside a backbone ------------------------------------------------------------------------------------

ROWS = ("grouping", "patch embedding", "blocks 0–2", "block 3", "block 4", "block 5", "norm", "head")
PARTS = {
    "block 3": ("part", "part at block 3"),
    "block 4": ("part", "part at block 4"),
    "block 5": ("part", "part at block 5"),
    "norm": ("copy", "norm of its own"),
    "head": ("copy", "head of its own"),
}
"""Module of the backbone -> colour and name of what the adapter has there."""


def adapter() -> str:
    """The backbone at the left, the adapter at the right, and what happens at one of the sites between them."""
    draw = Figure()
    draw.head("An adapter stands beside the backbone")
    wide, right, own, top = 160, 624, 232, 102
    middle = 28 + wide / 2
    draw.text(middle, top - 24, "point cloud")
    draw.frame(right - 16, top - 34, own + 32, 488, "part", 'adapter "grasp"')
    draw.note(right - 2, top + 6, "one module, one file")
    draw.labelled(right, top + 49, own, 48, "shared", "shared by its parts", "memory bank, local attention")
    for number, label in enumerate(ROWS):
        y = top + 54 * number
        draw.line((middle, y - 22 + 4 * (number == 0)), (middle, y), arrow=True)
        draw.labelled(28, y, wide, 32, "frozen", label)
        if label in PARTS:
            draw.line((28 + wide, y + 16), (right, y + 16), dashed=True)
            draw.labelled(right, y, own, 32, *PARTS[label])
    bottom = top + 54 * len(ROWS)
    draw.line((middle, bottom - 22), (middle, bottom), arrow=True)
    draw.text(middle, bottom + 15, "logits")
    draw.text(398, bottom - 45, "stand in the place of the backbone's", size=SMALL, colour=SOFT)
    draw.note(
        28, bottom + 44, "Grey: the backbone, its code, names and values as they were. In colour: the task's own."
    )
    _site(draw, 222, top - 34, top + 54 * 3 + 16)
    return draw.svg(WIDTH, bottom + 62, "An adapter beside a backbone: sites, hooks, parts")


def _site(draw: Figure, x: float, top: float, below: float) -> None:
    """One site with its hooks, enlarged, above the line that leads from it to its part."""
    draw.frame(x, top, 358, 152, "frozen", "a site: block 3")
    y = top + 66
    draw.text(x + 38, y + 4.5, "tokens", size=SMALL)
    draw.line((x + 62, y), (x + 120, y), arrow=True)
    draw.labelled(x + 120, y - 20, 126, 40, "frozen", "its own forward")
    draw.line((x + 246, y), (x + 304, y), arrow=True)
    draw.text(x + 328, y + 4.5, "tokens", size=SMALL)
    for at, name in ((x + 88, "part.before"), (x + 272, "part.after")):
        draw.hook(at, y)
        draw.line((at, y + 7), (at, below - 2), arrow=True)
        draw.text(at + (10 if at < x + 180 else -10 - 62), y + 62, name, size=SMALL, colour=SOFT, middle=False)
    draw.hook(x + 118, y + 36)
    draw.note(x + 130, y + 40, "a hook, without state")


# ---- one forward -----------------------------------------------------------------------------------------------------

TASKS = (("shape", "part", "15 classes"), ("grasp", "shared", "4 classes"), ("None", "frozen", "the plain backbone"))
"""Adapter, colour, what comes out."""


def forward() -> str:
    """One forward of several tasks: the stem once, the blocks once for each."""
    draw = Figure()
    draw.head('model.forward_tasks(clouds, ["shape", "grasp", None])')
    y, left = 178, 330
    draw.text(64, y + 4.5, "clouds")
    draw.line((92, y), (118, y), arrow=True)
    draw.labelled(118, y - 30, 84, 60, "frozen", "grouping")
    draw.line((202, y), (220, y), arrow=True)
    draw.labelled(220, y - 30, 84, 60, "frozen", "patch", "embedding")
    for number, (name, kind, output) in enumerate(TASKS):
        row = y + (number - 1) * 84
        draw.line((304, y), (318, y), (318, row), (left, row), arrow=True)
        _row(draw, left, row, name, kind, output)
    draw.lines.append(f'<rect x="28" y="62" width="30" height="14" rx="5" fill="{COLOURS["part"][1]}"/>')
    draw.note(66, 73.5, "a part of an adapter")
    bottom = y + 84 + 50
    for x, to, words, small in (
        (118, 304, "once", "frozen: no gradient, nothing is kept"),
        (left, 712, "once for each adapter", "blocks ahead of its first part: no gradient"),
    ):
        draw.line((x, bottom), (x, bottom + 8), (to, bottom + 8), (to, bottom))
        draw.text((x + to) / 2, bottom + 28, words, bold=True)
        draw.note((x + to) / 2, bottom + 45, small, middle=True)
    return draw.svg(WIDTH, bottom + 66, "One forward of three tasks: the stem runs once, the blocks once for each task")


def _row(draw: Figure, left: float, y: float, name: str, kind: str, output: str) -> None:
    """The blocks of one task, and its head; blocks with a part have a mark in its colour."""
    colour = COLOURS[kind][1]
    first = {"shape": 3, "grasp": 0, "None": 6}[name]
    for block in range(6):
        x = left + 53 * block
        draw.labelled(x, y - 18, 44, 36, "frozen", "block")
        if block >= first:
            draw.lines.append(f'<rect x="{x + 7:g}" y="{y + 13:g}" width="30" height="14" rx="5" fill="{colour}"/>')
        draw.line((x + 44, y), (x + 53, y), arrow=True)
    x = left + 53 * 6
    draw.labelled(x, y - 18, 64, 36, "frozen" if name == "None" else kind, "head")
    draw.line((x + 64, y), (x + 84, y), arrow=True)
    draw.text(x + 92, y - 1, name if name == "None" else f'"{name}"', bold=True, middle=False)
    draw.note(x + 92, y + 15, output)


# ---- prompts and prior -----------------------------------------------------------------------------------------------

TOKEN, STEP = 22, 26
"""Side of a token, and from one to the next."""


def _tokens(draw: Figure, x: float, y: float, kinds: str) -> float:
    """Tokens beside each other, c: of the class, o: a prompt, p: a patch; where they end."""
    for number, kind in enumerate(kinds):
        draw.box(x + STEP * number, y, TOKEN, TOKEN, {"c": "copy", "o": "part", "p": "frozen"}[kind])
    return x + STEP * len(kinds)


def prompts() -> str:
    """Prompts go in before a block and come out after it; the bank's prior is added to them."""
    draw = Figure()
    draw.head("Prompts go in before a block and come out after it")
    y, x = 98, 28
    draw.note(x, y - 16, "1 class token, 5 patches")
    end = _tokens(draw, x, y, "cppppp")
    draw.line((end, y + 11), (222, y + 11), arrow=True)
    draw.note(222, y - 16, "with 4 prompts")
    end = _tokens(draw, 222, y, "coooo" + "ppppp")
    draw.line((end, y + 11), (514, y + 11), arrow=True)
    draw.labelled(514, y - 14, 96, 50, "frozen", "block")
    draw.line((610, y + 11), (640, y + 11), arrow=True)
    draw.note(640, y - 16, "the next block gets what it expects")
    _tokens(draw, 640, y, "cppppp")
    _prior(draw, 246)
    return draw.svg(WIDTH, 454, "Prompts, and the prior that a memory bank gives them")


def _prior(draw: Figure, top: float) -> None:
    """The prior of a memory bank: the likest rows, weighed, are added to the prompts."""
    title = "With a memory bank they depend on similar training clouds"
    draw.text(28, top - 48, title, size=15, bold=True, middle=False)
    draw.labelled(28, top + 46, 164, 50, "frozen", "feature of this cloud", "ahead of the first part")
    draw.line((192, top + 71), (238, top + 71), arrow=True)
    draw.text(214, top + 62, "like?", size=SMALL, colour=SOFT)
    draw.frame(238, top - 22, 246, 200, "shared", "memory bank")
    draw.note(252, top + 17, "a row for a training cloud, or for", "several: at most 1,800")
    for row, share in enumerate((0.0, 0.55, 0.0, 0.3, 0.0, 0.15)):
        y = top + 44 + 20 * row
        draw.box(252, y, 118, 14, "part" if share else "shared")
        if share:
            draw.text(382, y + 11.5, f"{share:.2f}", size=SMALL, colour=INK, middle=False)
            draw.line((414, y + 7), (446, y + 7), (446, top + 71), (526, top + 71), arrow=True)
    draw.labelled(526, top + 46, 140, 50, "part", "prior", "likest rows, mean")
    draw.line((666, top + 71), (700, top + 71), arrow=True)
    draw.labelled(700, top + 46, 112, 50, "part", "small adapter")
    draw.line((812, top + 71), (856, top + 71), (856, top - 72), (299, top - 72), (299, 128), arrow=True)
    draw.text(640, top - 80, "added to the prompts", size=SMALL, colour=SOFT)
    words = "Nothing in the bank is trained: it is made once, of", "training clouds, by the frozen backbone, and"
    draw.note(526, top + 118, *words, "saved in the adapter's file.")


# ---- files -----------------------------------------------------------------------------------------------------------

KEPT = (
    ("methods and their fields", "part", 0),
    ("fingerprint of the backbone", "frozen", 0),
    ("what was traced or stated of it", "frozen", 0),
    ("parts, and what they share", "part", 1),
    ("memory bank", "shared", 1),
    ("heads, copies of norms and biases", "copy", 1),
    ("method, base, licence, how to load", "frozen", 2),
)
"""What is saved, its colour, and the number of its file."""
FILES = (
    ("adapter_config.json", "JSON, at most 1 MB"),
    ("adapter_model.safetensors", "tensors, no code"),
    ("README.md", "your own text in it stays"),
)
LEFT = ("the backbone's weights", "which adapter is active", "trained or frozen", "the optimizer's state")


def files() -> str:
    """What goes into which of the three files, and what into none."""
    draw = Figure()
    draw.head("What save_pretrained writes")
    top, wide = 70, 284
    row, places = 42, []
    for number, (_, about) in enumerate(FILES):
        y = top + row * (1, 4, 6)[number] - 13
        draw.labelled(392, y, 224, 58, "frozen", FILES[number][0], about)
        places.append(y + 29)
    for number, (label, kind, file) in enumerate(KEPT):
        y = top + row * number
        draw.labelled(28, y, wide, 32, kind, label)
        draw.line((28 + wide, y + 16), (344, y + 16), (344, places[file]), (392, places[file]), arrow=True)
    x = 660
    draw.frame(x, top, WIDTH - 28 - x, 40 + 44 * len(LEFT), "frozen", "in none of them")
    for number, label in enumerate(LEFT):
        draw.labelled(x + 14, top + 38 + 44 * number, WIDTH - 56 - x, 32, "frozen", label)
    draw.note(x, top + 66 + 44 * len(LEFT), "A whole training, to be resumed,", "is point-peft train's checkpoint.")
    return draw.svg(WIDTH, top + row * len(KEPT) + 22, "What is in the three files of an adapter, and what is not")


FIGURES: dict[str, Callable[[], str]] = {"adapter": adapter, "forward": forward, "prompts": prompts, "files": files}


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (OUT / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(OUT / f"{name}.svg")


if __name__ == "__main__":
    main()
