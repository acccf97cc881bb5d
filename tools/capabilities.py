"""Which method works on which backbone: tried out on every pair, and written to docs/capabilities.md.

    python -m tools.capabilities           write the page
    python -m tools.capabilities --check   fail if the page says otherwise

A pair is supported if every part of the adapter runs, every trainable tensor gets a gradient, the adapter changes the
output, and without it the backbone's output is what it was. Where a method's defaults do not fit a backbone, the
alternatives that its error names are tried.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars

from point_peft import METHODS, PointPeftError, PointPeftModel, TunerConfig, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.parts.base import Bank
from tests.zoo import BACKBONES, TinyBackbone

PAGE = Path(__file__).parent.parent / "docs" / "capabilities.md"

ON_PATCHES: Mapping[str, Any] = {"target_modules": r".*\.local_blocks\.\d+"}
"""For a backbone that has further blocks, on queries."""
ALTERNATIVES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "DAPT": ({"internal_prompts": False},),
    "GA_PROMPT": ({"shift": False, "point_prompts": 0}, ON_PATCHES),
    "GEM": (ON_PATCHES,),
    "GFT": (ON_PATCHES,),
    "IA3": ({"scale_mlp": False},),
    "POINT_GST": (ON_PATCHES,),
    "POINT_LORA": ({"shared_mlp_width": 0},),
    "POINT_PEFT": ({"adapter_scale": 0.0}, ON_PATCHES),
    "POINT_TPA": (ON_PATCHES,),
    "VPT": (ON_PATCHES,),
}
"""Changes of a method's defaults that are tried, in this order, where the defaults are refused."""


def spell(changes: Mapping[str, Any]) -> str:
    """Changes of defaults as one writes them."""
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "yes"


def configurations(method: str) -> list[Mapping[str, Any]]:
    """The changes of a method's defaults that are tried, in this order, until one is not refused."""
    return [{}, *ALTERNATIVES.get(method, ())]


def probe(method: str, backbone: TinyBackbone) -> tuple[str, str]:
    """("yes" or the changes of defaults that are needed, "") or ("no", why)."""
    first = ""
    for changes in configurations(method):
        why = refusal(METHODS[method](**changes), backbone)
        if why is None:
            return spell(changes), ""
        first = first or why
    return "no", first


def refusal(config: TunerConfig, backbone: TinyBackbone) -> str | None:
    """The reason why a backbone is refused; None if the adapter works, `RuntimeError` where nothing happens."""
    try:
        _train(config, backbone)
    except PointPeftError as error:
        return str(error).replace(type(backbone.build()).__name__, "the backbone")
    return None


def _train(config: TunerConfig, backbone: TinyBackbone) -> None:
    """Adapt and look; `PointPeftError` where the backbone is refused, `RuntimeError` where nothing happens."""
    torch.manual_seed(0)
    args = backbone.inputs(3, 1)
    model = get_peft_model(backbone.build(), replace(config, anatomy=backbone.traced))
    with torch.no_grad():
        # Frozen: torch rounds an attention otherwise where its weights take gradients.
        plain = backbone.select(backbone.build().requires_grad_(False)(*args))
    fill_bank(model, backbone)
    model.eval()(*args)  # which proves that every part runs
    parameters = dict(model.adapters.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        with model.disable_adapter():
            disabled = backbone.select(model(*args))
    adapted = backbone.select(model(*args))
    torch.autograd.backward((adapted * torch.randn_like(adapted)).sum())
    without = [name for name, parameter in parameters.items() if parameter.grad is None or not parameter.grad.any()]
    if without:
        raise RuntimeError(f"{config.method} on {backbone.name}: no gradient for {without}")
    if torch.allclose(adapted, plain) or not torch.equal(disabled, plain):
        raise RuntimeError(f"{config.method} on {backbone.name}: it has no effect, or one that stays")


def fill_bank(model: PointPeftModel, backbone: TinyBackbone) -> None:
    """Build the memory bank of the model's adapter, if it has one."""
    if any(isinstance(state, Bank) for state in get_adapter(model, "default").shared_states()):
        model.build_memory_bank([backbone.inputs(4, seed) for seed in range(4)], to_inputs=lambda batch: batch)


def matrix() -> dict[str, dict[str, tuple[str, str]]]:
    """Backbone -> method -> what `probe` says."""
    return {
        name: {method: probe(method, backbone) for method in sorted(METHODS)} for name, backbone in BACKBONES.items()
    }


def page(answers: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """The page for a matrix."""
    methods = sorted({method for row in answers.values() for method in row})
    reasons: dict[str, int] = {}
    lines = [
        "# What works where",
        "",
        "Every method was tried on every one of the test suite's backbones: a fresh adapter, its gradients, the output",
        "with and without it. `python -m tools.capabilities` made this page, nothing in it is written by hand. A",
        "cell holds the fields of the configuration that the backbone asks for, if the defaults do not do.",
        "",
        f"| backbone | {' | '.join(methods)} |",
        f"|---|{'---|' * len(methods)}",
    ]
    for name, row in answers.items():
        cells = []
        for method in methods:
            answer, why = row[method]
            if answer == "no":
                note = reasons.setdefault(re.sub(r"'[^']*'|\([\d, ]+\)|\d+ stages", "…", why), len(reasons) + 1)
                cells.append(f"no ({note})")
            else:
                cells.append(answer if answer == "yes" else f"`{answer}`")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if reasons:
        lines += ["", "Reasons, as the errors give them:", ""]
        lines += [f"{number}. {why}" for why, number in reasons.items()]
    return "\n".join(lines) + "\n"


def known() -> dict[tuple[str, str], str | None]:
    """(method, backbone) -> the changes of defaults that the page asks for, as `spell` has them; None: unsupported."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    if not rows:
        return {}
    methods = rows[0][1:]
    return {
        (method, row[0]): None if cell.startswith("no") else cell.strip("`")
        for row in rows[1:]
        for method, cell in zip(methods, row[1:], strict=True)
    }


def labels(backbone: str) -> list[str]:
    """Every method that the page does not call unsupported on a backbone, as `METHOD` or `METHOD[changes]`."""
    page = known()
    answers = {method: page.get((method, backbone), "yes") for method in sorted(METHODS)}
    return [name if how == "yes" else f"{name}[{how}]" for name, how in answers.items() if how is not None]


def labelled(label: str) -> tuple[str, Mapping[str, Any]]:
    """The method and the changes of its defaults that a label stands for."""
    method, _, how = label.removesuffix("]").partition("[")
    spelled = {spell(changes): changes for changes in configurations(method)}
    return method, spelled[how or "yes"]


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write, but fail if the page says otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Not taken where hooks are attached; its rounding is not that of the layers themselves.
    torch.backends.mha.set_fastpath_enabled(False)
    disable_progress_bars()
    text = page(matrix())
    if options.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("the page is right" if same else "the page says otherwise: python -m tools.capabilities")
        return 0 if same else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
