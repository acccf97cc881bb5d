"""Every registered method side by side: what it trains, what it computes, what it needs.

    python -m tools.methods                       print the table (a minute on two cores)
    python -m tools.methods --write               write it to docs/methods.md
    python -m tools.methods --methods LORA VPT    some methods only

The rows come from the registry: a method enters as soon as its configuration is imported. Times are on the page of
`benchmarks.speed`.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from point_peft import (
    METHODS,
    AdapterError,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    TunerConfig,
    describe,
    get_peft_model,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.parts.base import Bank

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
COMMAND = "python -m tools.methods --write"
PLAIN, FULL = "frozen backbone", "full fine-tuning"


# ---- what is compared ------------------------------------------------------------------------------------------------

ALL_LINEAR = ["qkv", "proj", "fc1", "fc2"]

VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "BOTTLENECK": {name: {"placement": name} for name in ("pfeiffer", "houlsby", "adaptformer")},
    "LORA": {
        "qkv": {},
        "q and v": {"qkv": ["q", "v"]},
        "qkv and proj": {"target_modules": ["qkv", "proj"]},
        "all linear": {"target_modules": ALL_LINEAR},
        "all linear, DoRA": {"target_modules": ALL_LINEAR, "use_dora": True},
    },
    "POINT_PEFT": {"": {}, "of the paper": {**PointPEFTConfig.earlier, "init": "published"}},
    "SSF": {"": {}, "mergeable only": {"only_mergeable": True}},
    "STAG": {"std": {}, "sl": {"size": "sl"}},
    "VPT": {"deep": {}, "shallow": {"mode": "shallow"}},
}
"""Method -> name of a row -> fields of the configuration, where one row of defaults is not enough."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Numbers of parameters that the authors' code trains on Point-MAE."""

    parameters: int
    """Those without the head."""
    ours: int | None = None
    """Those of this library, where they are not as many."""
    reason: str = ""
    """The reason why."""
    pool: str | None = None
    """The pooling of its head; None: that of the backbone's own."""


STAG_GATES = "a gate for each graph module makes a fresh adapter start as the backbone"

PUBLISHED: Mapping[str, Published] = {
    "BITFIT": Published(parameters=37_248),
    "BOTTLENECK pfeiffer": Published(parameters=152_256),
    "BOTTLENECK houlsby": Published(parameters=304_512),
    "BOTTLENECK adaptformer": Published(parameters=595_200),
    "DAPT": Published(parameters=721_932, pool="cls+prompt+max"),
    "GA_PROMPT": Published(
        parameters=262_308,
        ours=234_660,
        pool="cls+max+feature",
        reason="27,660 of the published never get a gradient and are left out; 12 gates make a fresh adapter start as "
        "the backbone and its prompts",
    ),
    "GFT": Published(
        parameters=367_616,
        ours=364_544,
        pool="cls+prompt+max",
        reason="3,072 of the published, a second norm of the queries, never run and are left out",
    ),
    "IA3": Published(parameters=27_648),
    "IDPT": Published(
        parameters=1_330_944,
        ours=1_331_328,
        pool="cls+prompt+max",
        reason="the position of the prompt, which the published code leaves random, is trained",
    ),
    "LINEAR_PROBE": Published(parameters=0),
    "LORA qkv": Published(parameters=147_456),
    "LORA q and v": Published(parameters=147_456),
    "LORA qkv and proj": Published(parameters=221_184),
    "LORA all linear": Published(parameters=589_824),
    "LORA all linear, DoRA": Published(parameters=631_296),
    "NORM_TUNING": Published(parameters=19_200),
    "POINT_GST": Published(parameters=355_296),
    "POINT_LORA": Published(parameters=505_217, pool="cls+all_max"),
    "POINT_PEFT": Published(
        parameters=505_482,
        ours=275_556,
        reason="the last half of the blocks is adapted, without the adapters of the memory bank's prior; 58,752 are of "
        "the encoder of neighbourhoods, and 6 gates make a fresh adapter start as the backbone and its prompts",
    ),
    "POINT_PEFT of the paper": Published(
        parameters=505_482, ours=443_214, reason="62,268 of the published never get a gradient and are left out"
    ),
    "PPT": Published(parameters=676_352, pool="cls+mean+prompt"),
    "SSF": Published(parameters=102_912),
    "STAG std": Published(parameters=259_200, ours=259_201, reason=STAG_GATES, pool="raw_mean"),
    "STAG sl": Published(parameters=851_520, ours=851_523, reason=STAG_GATES, pool="raw_mean"),
    "VPT deep": Published(parameters=46_080),
    "VPT shallow": Published(parameters=3_840),
}
"""Label of a row -> what was published; a row that is not here has nothing to compare with."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration of one method."""

    method: str
    variant: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in the table."""
        return f"{self.method} {self.variant}".strip()

    @property
    def pool(self) -> str | None:
        """The pooling of its head, as published; None: that of the backbone's own."""
        known = PUBLISHED.get(self.label)
        return None if known is None else known.pool

    @property
    def config(self) -> TunerConfig:
        """The configuration that it stands for."""
        return METHODS[self.method](**self.fields)


def rows_of(methods: Sequence[str] | None = None) -> list[Row]:
    """The rows of these methods, by default of all that are registered."""
    names = sorted(METHODS) if methods is None else methods
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise PointPeftError(f"method {unknown[0]!r} is unknown; known methods: {', '.join(sorted(METHODS))}")
    return [
        Row(method=name, variant=variant, fields=fields)
        for name in names
        for variant, fields in VARIANTS.get(name, {"": {}}).items()
    ]


def heads(row: Row, backbone: nn.Module) -> dict[str, str]:
    """The published head of a row, as `add_adapter` takes it; nothing where it is the backbone's own."""
    return {} if row.pool is None else dict.fromkeys(describe(backbone).heads, row.pool)


def adapted(row: Row, backbone: nn.Module) -> PointPeftModel:
    """A backbone with an adapter of a row, and with the published head."""
    return get_peft_model(backbone, row.config, heads=heads(row, backbone))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The backbone that all methods are put on, and the clouds that it gets."""

    name: str
    make: Callable[..., nn.Module]
    points: int
    bank_rows: int
    """Rows of a memory bank, for methods that have one."""

    def clouds(self, batch: int) -> Tensor:
        """Random clouds (b, n, 3), the same every time."""
        return torch.randn(batch, self.points, 3, generator=torch.Generator().manual_seed(0))

    def inputs(self, batch: int) -> tuple[Any, ...]:
        """These clouds as the backbone wants them."""
        return (self.clouds(batch),)

    def adapt(self, row: Row) -> PointPeftModel:
        """A fresh backbone with an adapter of that row; a memory bank holds random rows."""
        torch.manual_seed(0)
        backbone = self.make()
        model = adapted(row, backbone)
        self.fill(model)
        return model

    def fill(self, model: PointPeftModel, name: str = "default") -> bool:
        """Fill the memory bank of a model's adapter with random rows of 15 classes; False: it has none."""
        banks = [state for state in get_adapter(model, name).shared_states() if isinstance(state, Bank)]
        for bank in banks:
            width = describe(model.base_model).stages[-1].width
            bank.fill(torch.randn(self.bank_rows, width), torch.arange(self.bank_rows) % 15)
        return bool(banks)


_tiny = partial(PointTransformer, trans_dim=48, encoder_dims=48, num_group=32, group_size=8)

BASE = Bench(name="Point-MAE", make=PointTransformer, points=2048, bank_rows=11392)
"""The backbone of the published numbers, and Point-PEFT's bank: a row a training cloud of ScanObjectNN."""
QUICK = Bench(name="a tiny point transformer", make=_tiny, points=256, bank_rows=64)


# ---- what does not depend on the machine -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of a row that need no clock."""

    parameters: int
    """Trainable parameters without the head."""
    head: int
    gmac: float
    """Billions of multiply-adds of one cloud's forward, as torch counts them."""
    mergeable: bool | None
    """None: nothing but the head is trained."""
    needs_coordinates: bool
    needs_bank: bool


def facts(row: Row, bench: Bench = BASE) -> Facts:
    """Adapt the backbone and look."""
    model = bench.adapt(row)
    parameters, head = trained(model)
    return Facts(
        parameters=parameters,
        head=head,
        gmac=gmac(model, bench),
        mergeable=_mergeable(row) if parameters else None,
        needs_coordinates=_needs_coordinates(row),
        needs_bank=any(isinstance(state, Bank) for state in get_adapter(model, "default").shared_states()),
    )


def trained(model: PointPeftModel) -> tuple[int, int]:
    """The trained parameters of a model's adapter: those that are not the head's, and the head's."""
    adapter = get_adapter(model, "default")
    heads = describe(model.base_model).heads
    head = sum(_size(module) for path, module in adapter.own_modules() if path in heads)
    return _size(adapter) - head, head


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def gmac(model: nn.Module, bench: Bench) -> float:
    """Billions of multiply-adds of one cloud's forward in eval mode, convolutions and matrix products."""
    # The fused attention of CPUs is not counted by torch, the plain one is.
    # Gradients stay on: without them torch's counter stumbles over a parameter that is handed to a module.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(bench.clouds(1))
    return float(counter.get_total_flops()) / 2e9


def _mergeable(row: Row) -> bool:
    """Tell whether all but the head can be folded into the backbone."""
    try:
        get_peft_model(QUICK.make(), PeftConfig(tuners=(row.config,), modules_to_save=())).merge()
    except AdapterError:
        return False
    return True


def _needs_coordinates(row: Row) -> bool:
    """Tell whether it counts for the method where points or tokens lie: a stretched space gives it another output.

    The backbone itself sees nothing of the stretching: its positional embedding takes it back.
    """

    def output(*stretch: float) -> Tensor:
        torch.manual_seed(0)
        backbone = QUICK.make()
        assert isinstance(backbone, PointTransformer)
        factors = torch.tensor(stretch)
        first = backbone.pos_embed[0]
        assert isinstance(first, nn.Linear)
        with torch.no_grad():
            first.weight.div_(factors)
        backbone.pos_embed.register_forward_pre_hook(lambda module, args: (args[0] * factors,))
        model = get_peft_model(backbone, row.config)
        QUICK.fill(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.adapters.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            logits: Tensor = model.eval()(QUICK.clouds(2))
        return logits

    return not torch.equal(output(1.0, 1.0, 1.0), output(4.0, 0.5, 2.0))


# ---- the table -------------------------------------------------------------------------------------------------------

HEADER = (
    "method",
    "trained, without head",
    "with head",
    "published, without head",
    "GMAC",
    "on top",
    "merges",
    "needs coordinates",
    "needs a bank",
)


def table(cells: Sequence[Sequence[str]], header: Sequence[str]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *cells)]


def yes(value: bool | None) -> str:
    """The word of a table for it."""
    return {True: "yes", False: "no", None: "-"}[value]


def published(row: Row, measured: int, bench: Bench, notes: list[str]) -> str:
    """The cell for what was published for the base; what explains a difference goes to the notes."""
    known = PUBLISHED.get(row.label) if bench is BASE else None
    if known is None:
        return "-"
    if known.parameters == measured:
        return f"{known.parameters:,}"
    notes.append(f"{row.label}: {known.reason or 'the difference is not explained'}.")
    return f"{known.parameters:,} ({len(notes)})"


def machine() -> str:
    """Where it was measured, and with which torch."""
    kind = f"{platform.system()} {platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{kind}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cells(row: Row, known: Facts, compared: str, base_gmac: float) -> list[str]:
    """The line of a row."""
    return [
        row.label,
        f"{known.parameters:,}",
        f"{known.parameters + known.head:,}",
        compared,
        f"{known.gmac:.2f}",
        f"{known.gmac - base_gmac:.2f}",
        yes(known.mergeable),
        yes(known.needs_coordinates),
        yes(known.needs_bank),
    ]


def page(rows: Sequence[Row], bench: Bench) -> str:
    """The table for these rows, with what it says about itself."""
    plain = bench.make()
    total, base_gmac = _size(plain), gmac(plain, bench)
    notes: list[str] = []
    cells = [
        [PLAIN, "0", "0", "-", f"{base_gmac:.2f}", "0.00", "-", "no", "no"],
        [
            FULL,
            f"{total - sum(_size(plain.get_submodule(head)) for head in describe(plain).heads):,}",
            f"{total:,}",
            "-",
            f"{base_gmac:.2f}",
            "0.00",
            "-",
            "no",
            "no",
        ],
    ]
    for row in tqdm(rows, desc="facts", leave=False):
        known = facts(row, bench)
        compared = published(row, known.parameters, bench, notes)
        cells.append(_cells(row, known, compared, base_gmac))
    lines = [
        "# All methods on one backbone",
        "",
        f"Made by `{COMMAND}`, nothing in it is written by hand; [methods/](methods/README.md) has a page a method.",
        "",
        f"- Backbone: {bench.name}, {total / 1e6:.1f} M parameters, clouds of {bench.points} points.",
        f"- The same on every machine (here {machine()}):",
        "  *trained* parameters; *GMAC* of one cloud's forward (matrix",
        "  products, convolutions and attention, counted by `torch.utils.flop_counter`); whether all but the head",
        "  *merges* into the backbone (tried); whether the method *needs coordinates* (tried: in a stretched space, of",
        "  which the backbone sees nothing, it computes something else); whether it *needs a bank* (here",
        f"  {bench.bank_rows:,} random rows). Heads are the published ones, else the backbone's.",
        "- Published: what the authors' code trains, without the head. Papers give this backbone 4.91 GMAC: our patch",
        "  embedding multiplies what a group has in common once a group, not once a point. Compare what is *on top*.",
        "",
        *table(cells, HEADER),
    ]
    if notes:
        lines += ["", "Where ours differs from what was published:", ""]
        lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="these methods only; default: all registered")
    parser.add_argument("--quick", action="store_true", help="a tiny backbone: a try, no numbers to quote")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}, with all methods on the base")
    options = parser.parse_args(argv)
    if options.write and (options.quick or options.methods):
        parser.error("--write is for all methods on the base backbone: leave out --quick and --methods")
    bench = QUICK if options.quick else BASE
    text = page(rows_of(options.methods), bench)
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
