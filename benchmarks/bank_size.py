"""What a smaller memory bank costs: the accuracy of the quickstart with all rows and with fewer.

    python -m benchmarks.bank_size             print the table (some minutes on two cores)
    python -m benchmarks.bank_size --write     write it to docs/bank_size.md

A bank of 11,392 clouds, that of the published numbers, is kept as 1,800 rows by default: 16 %. Here there are
600 training clouds, fewer than that, so the share is the same: 95 rows. The learning rate is the quickstart's, chosen
on the validation split with all rows; the last epoch counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

from point_peft import PointPEFTConfig, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.quickstart.compare import LEARNING_RATES, Run, outcome
from point_peft.quickstart.data import Clouds, load_digits_clouds
from point_peft.quickstart.training import Recipe, batches, train
from tools.methods import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "bank_size.md"
SHARES = (1.0, 1800 / 11392)


def page(train: int, seeds: int, epochs: int) -> str:
    """The accuracy with banks of several sizes, in Markdown."""
    data = load_digits_clouds().subset(train, 100, None)
    cells: list[list[str]] = []
    options = f"--train {train} --seeds {seeds} --epochs {epochs} "
    for share in SHARES:
        config = PointPEFTConfig(memory_bank=True, num_prompts=10)
        size = max(round(share * train), 10)
        runs = [trained(data, Recipe(epochs=epochs), seed, replace(config, bank_size=size)) for seed in range(seeds)]
        tests, vals = [run.test for run in runs], [run.curve.val[-1] for run in runs]
        cells.append([f"{size}", f"{100 * size / train:.0f} %", _spread(vals), _spread(tests)])
    return "\n".join(
        [
            "# The size of the memory bank",
            "",
            f"Made by `python -m benchmarks.bank_size {options}--write`; nothing in it is written by hand.",
            "",
            f"- {data.name}, {train} training clouds, {epochs} epochs, {seeds} seeds, mean ± standard deviation,",
            f"  the last epoch; {date.today()}.",
            "- `bank_size` is 1,800 rows by default: 16 % of the bank of the published numbers (11,392 clouds).",
            "",
            *table(cells, ["rows", "of the clouds", "validation accuracy", "test accuracy"]),
            "",
        ]
    )


def trained(data: Clouds, recipe: Recipe, seed: int, config: PointPEFTConfig) -> Run:
    """Point-PEFT as in the comparison of the quickstart, but with a bank of the training clouds."""
    torch.manual_seed(seed)
    model = get_peft_model(default_backbone(cls_dim=len(data.class_names)), config)
    model.build_memory_bank(batches(data.train))
    return outcome(model, data, train(model, data, recipe, LEARNING_RATES["Point-PEFT"]))


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f} %{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=600, help="training clouds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(argv)
    text = page(options.train, options.seeds, options.epochs)
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
