"""Every registered backbone adapted: what is found of it, a step of training, and that the adapter comes off and back.

    python -m tools.any_backbone                               all of them
    python -m tools.any_backbone --backbone uni3d pointgpt     these
    python -m tools.any_backbone --traced --method LORA        by one traced forward alone, with another method

The exit status is 1 if a backbone is refused, the loss does not fall, the disabled adapter leaves a trace, or the
reloaded one gives another output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from torch import Tensor, nn

from point_peft import METHODS, PointPeftError, PointPeftModel, get_peft_model
from point_peft.anatomy.description import Anatomy, Tap, spell_steps
from point_peft.anatomy.presets import known_anatomy
from point_peft.tracing.understanding import trace
from tests.zoo import BACKBONES, TinyBackbone
from tools.capabilities import fill_bank, labelled, labels, spell

WIDTH = 160
"""Columns of the table."""
FALLBACK = "LORA"
LEARNING_RATE = 3e-5
"""So small that the loss falls with the widest of the heads, which has 6208 inputs."""
HEADER = (
    "backbone",
    "known by",
    "blocks",
    "layout",
    "width",
    "coordinates",
    "qkv",
    "prompts",
    "method",
    "trained",
    "loss",
    "then",
    "disable",
    "reload",
)
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"
COORDINATES = HEADER.index("coordinates")
KINDS = {
    "one fused projection": "fused",
    "split projections": "split",
    "nn.MultiheadAttention": "torch",
    "none": "none",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Result of one backbone."""

    name: str
    anatomy: Anatomy | None = None
    """None where the backbone was refused."""
    method: str = ""
    changes: str = ""
    """Changes of the method's defaults, as one writes them."""
    share: float = 0.0
    """Of the parameters, those that are trained."""
    before: float = 0.0
    after: float = 0.0
    disabled: bool = False
    """True if the output without the trained adapter is bit for bit that of the backbone."""
    reloaded: bool = False
    """True if the saved adapter on a fresh backbone gives the output bit for bit."""
    error: str = ""

    @property
    def holds(self) -> bool:
        """True if all is as it should be."""
        return not self.error and self.after < self.before and self.disabled and self.reloaded


# ---- one backbone ----------------------------------------------------------------------------------------------------


def choose(name: str, method: str) -> str:
    """The label of a method in the form that the page of capabilities asks for, else that of LORA."""
    found = {labelled(label)[0]: label for label in labels(name)}
    return found.get(method, found.get(FALLBACK, FALLBACK))


def attempt(name: str, method: str, traced: bool) -> Row:
    """The row of a backbone; an error of the library or of the model stands in the row."""
    chosen, changes = labelled(choose(name, method))
    try:
        row = adapt(BACKBONES[name], chosen, changes, traced)
    except (PointPeftError, RuntimeError) as error:
        row = Row(name=name, error=f"{type(error).__name__}: {error}")
    return replace(row, method=chosen, changes=spell(changes) if changes else "")


def adapt(backbone: TinyBackbone, method: str, changes: Mapping[str, Any], traced: bool) -> Row:
    """Adapt a backbone, train one step, take the adapter off, save it and load it into a fresh copy."""
    torch.manual_seed(0)
    args = backbone.inputs(4, 1)
    with torch.no_grad():
        # Frozen: torch rounds an attention otherwise where its weights take gradients.
        plain = backbone.select(backbone.build().requires_grad_(False)(*args))
    model = backbone.build()
    anatomy = None if traced else known_anatomy(model)
    if anatomy is None:
        anatomy = trace(model, backbone.inputs(3, 1), {})
    config = METHODS[method](**changes, anatomy=anatomy if traced else None)
    example = None if traced else backbone.example
    adapted = get_peft_model(model, config, example_inputs=example)
    fill_bank(adapted, backbone)
    trainable, total = adapted.get_nb_trainable_parameters()
    with torch.no_grad():
        before = float(loss(backbone, adapted.eval(), args))
    step(backbone, adapted, args)
    with torch.no_grad():
        after = float(loss(backbone, adapted.eval(), args))
        trained = backbone.select(adapted(*args))
        with adapted.disable_adapter():
            disabled = backbone.select(adapted(*args))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapted.save_pretrained(folder)
        # A stated anatomy travels with the adapter: nothing is traced here.
        again = PointPeftModel.from_pretrained(backbone.build(), folder)
        reloaded = backbone.select(again.eval()(*args))
    return Row(
        name=backbone.name,
        anatomy=anatomy,
        share=trainable / total,
        before=before,
        after=after,
        disabled=torch.equal(disabled, plain),
        reloaded=torch.equal(reloaded, trained),
    )


def loss(backbone: TinyBackbone, model: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """The cross-entropy of the logits (b, ..., classes); the samples' classes are dealt out in turn."""
    logits = backbone.select(model(*args))
    classes = torch.arange(len(logits)) % logits.shape[-1]
    count = logits[..., 0].numel()
    return nn.functional.cross_entropy(logits.reshape(count, -1), classes.repeat_interleave(count // len(logits)))


def step(backbone: TinyBackbone, model: nn.Module, args: tuple[Any, ...]) -> None:
    """One step of AdamW, in eval mode: in train mode a head's batch norm moves the loss without any training too."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    torch.autograd.backward(loss(backbone, model.eval(), args))
    optimiser.step()


# ---- the table -------------------------------------------------------------------------------------------------------


def shortened(text: str, width: int) -> str:
    """Text with its middle left out where it is too long."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 3 // 4
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def cells(row: Row, mark: str) -> list[str]:
    """The cells of a row, in the order of `HEADER`; no more than name, method and error of one that was refused."""
    anatomy = row.anatomy
    if anatomy is None:
        return [row.name, row.error]
    stages, first = anatomy.stages, anatomy.stages[0]
    prefix = "?" if first.prefix_tokens is None else str(first.prefix_tokens)
    kinds = dict.fromkeys(KINDS[block.attention_kind] for block in anatomy.blocks)
    return [
        row.name,
        shortened(anatomy.source.removeprefix("preset "), 16),
        "+".join(str(len(stage.blocks)) for stage in stages),
        first.layout if first.layout == "packed" else f"{first.layout}, {prefix}",
        ",".join(str(stage.width) for stage in stages),
        "unknown" if first.coordinates is None else place(first.coordinates),
        "/".join(kinds),
        said(any(stage.takes_prompts for stage in stages)),
        row.method + mark,
        f"{100 * row.share:.1f}%",
        f"{row.before:.4f}",
        f"{row.after:.4f}" + ("" if row.after < row.before else "!"),
        said(row.disabled),
        said(row.reloaded),
    ]


def place(tap: Tap) -> str:
    """Where a tensor is seen, in few letters."""
    side = "in" if tap.side == "input" else "out"
    return f"{side}{spell_steps(tap.steps)} {tap.module or 'model'}"


def said(value: bool) -> str:
    return "yes" if value else "no"


def table(rows: Sequence[Row]) -> str:
    """The rows below their header, in at most `WIDTH` columns, and what the marks mean."""
    notes = dict(zip(dict.fromkeys(row.changes for row in rows if row.changes), MARKS, strict=False))
    found = [cells(row, notes.get(row.changes, "")) for row in rows]
    whole = [list(HEADER), *(row for row in found if len(row) == len(HEADER))]
    widths = [max(len(row[column]) for row in whole) for column in range(len(HEADER))]
    left = WIDTH - (sum(widths) - widths[COORDINATES] + len(HEADER) - 1)
    widths[COORDINATES] = min(widths[COORDINATES], max(left, len("coordinates")))
    widths[0] = max(widths[0], *(len(row[0]) for row in found), 0)
    lines = []
    for row in [list(HEADER), *found]:
        if len(row) < len(HEADER):
            lines.append(f"{row[0]:<{widths[0]}} {shortened(row[1], max(WIDTH - widths[0] - 1, 20))}")
            continue
        fitted = [shortened(cell, width) for cell, width in zip(row, widths, strict=True)]
        lines.append(" ".join(f"{cell:<{width}}" for cell, width in zip(fitted, widths, strict=True)).rstrip())
    return "\n".join([*lines, "", *(f"{mark} {changes}" for changes, mark in notes.items())]).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", choices=BACKBONES, default=list(BACKBONES), metavar="NAME")
    parser.add_argument("--method", choices=sorted(METHODS), default="POINT_PEFT", help=f"else {FALLBACK}")
    parser.add_argument("--traced", action="store_true", help="leave the presets out and trace every backbone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # Not taken where hooks are attached; its rounding is not that of the layers themselves.
    torch.backends.mha.set_fastpath_enabled(False)
    disable_progress_bars()
    begin = time.perf_counter()
    rows = [attempt(name, options.method, options.traced) for name in options.backbone]
    print(table(rows))
    failed = [row.name for row in rows if not row.holds]
    print(f"\n{len(rows)} backbones in {time.perf_counter() - begin:.1f} s, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
