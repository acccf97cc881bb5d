"""The commands of the command line for trainings and trained models: their flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from point_peft.data.cloud import COORDINATES
from point_peft.data.corrupting import CORRUPTIONS
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.training.compare_command import compare_sources
from point_peft.training.evaluate_command import evaluate
from point_peft.training.extract_command import extract_adapter
from point_peft.training.flags import add_flags
from point_peft.training.models import FAMILIES, FULL, SMALL, SPEC
from point_peft.training.predict_command import predict
from point_peft.training.recipe import Recipe
from point_peft.training.tasks import FewShot
from point_peft.training.train_command import train

BACKBONES = ", ".join([SMALL, *FAMILIES])
DATA = "a folder of classes, a manifest, a file of arrays, scenes, or one of the field's sets"
Commands = Any  # argparse does not say the type of what add_subparsers gives


def add_commands(commands: Commands) -> None:
    """Give a command line these commands."""
    # A shortened --processes would not be taken out when the command starts itself in several.
    command = commands.add_parser("train", help="train an adapter on your own clouds", allow_abbrev=False)
    command.add_argument("data", metavar="DATA", nargs="+", type=Path, help=DATA)
    command.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder of the run")
    command.add_argument("--backbone", default=SMALL, help=f"{BACKBONES}; or {SPEC} (default: {SMALL})")
    command.add_argument("--checkpoint", metavar="FILE", help="published weights of the backbone")
    command.add_argument(
        "--method", metavar="NAME", action="append", help=f"several are one adapter; {FULL}: none (default: point_peft)"
    )
    command.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[], help="of a method")
    command.add_argument(
        "--backbone-channels",
        metavar="NAMES",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        default=COORDINATES,
        help="the columns that the backbone takes; where --channels are others, an input adapter goes between "
        "(default: x,y,z)",
    )
    command.add_argument("--recipe", metavar="FILE", type=Path, help="a YAML file; flags go before it")
    command.add_argument("--resume", action="store_true", help="go on where the run was interrupted, or begin it")
    command.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, naming them")
    command.add_argument("--log-with", metavar="TRACKER", action="append", help="of accelerate, such as tensorboard")
    command.add_argument("--processes", metavar="N", type=_count, default=1, help="of this machine (default: 1)")
    command.add_argument(
        "--few-shot", metavar="WAYSxSHOTS", type=_few_shot, help="train on so many clouds of so many classes, as 5x10"
    )
    command.add_argument("--trial", metavar="NUMBER", type=_number, help="the draw of --few-shot (default: 0)")
    command.add_argument(
        "--trials", metavar="N", type=_count, help="draws of --few-shot from the first on, each in a folder of FOLDER"
    )
    add_flags(command, Recipe, "recipe", without=("task",))
    add_flags(command, Preparation, "preparation")
    add_flags(command, DataOptions, "data", without=("preparation", "seed"))
    command.add_argument(
        "--data-seed", metavar="VALUE", type=_number, default=0, help="of splits and draws (default: 0)"
    )
    command.set_defaults(run=train)
    _add_questions(commands)
    _add_compare(commands)
    _add_extract(commands)


def _add_questions(commands: Commands) -> None:
    command = commands.add_parser("evaluate", help="measure a run on a split, as it is and corrupted")
    command.add_argument("folder", metavar="RUN", type=Path)
    command.add_argument("data", metavar="DATA", nargs="*", type=Path, help=f"{DATA} (default: the run's)")
    command.add_argument("--split", default="test", choices=("train", "val", "test", "all"))
    command.add_argument("--corruptions", metavar="KINDS", help=f"all, or some of {','.join(CORRUPTIONS)}")
    command.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, naming them")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("predict", help="predict classes of files, or of their points")
    command.add_argument("folder", metavar="RUN", type=Path)
    command.add_argument("files", metavar="FILE", nargs="+", type=Path)
    command.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="another folder than the files'")
    command.add_argument("--category", help="the kind of object, for parts of several kinds")
    command.set_defaults(run=predict)


def _add_extract(commands: Commands) -> None:
    command = commands.add_parser(
        "extract",
        help="turn a fully fine-tuned model into an adapter",
        description="FULL is a run of train --method full, or a checkpoint; BASE the checkpoint that it began as.",
    )
    command.add_argument("full", metavar="FULL", type=Path)
    command.add_argument("base", metavar="BASE", type=Path, nargs="?")
    command.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder of the adapter")
    command.add_argument(
        "--energy", metavar="SHARE", type=float, default=0.9, help="of each layer's squared change (default: 0.9)"
    )
    command.add_argument("--backbone", metavar="NAME", help=f"of a checkpoint, as for train (default: {SMALL})")
    command.add_argument("--num-classes", metavar="N", type=_count, help="of a checkpoint: that it tells apart")
    command.add_argument(
        "--data", metavar="DATA", nargs="*", type=Path, help="weigh changes on its training clouds, tell accuracies"
    )
    command.add_argument("--split", default="test", choices=("train", "val", "test", "all"), help="for the accuracies")
    command.add_argument("--half", action="store_true", help="write float16, in half the size")
    add_flags(command, Preparation, "preparation, of a checkpoint's data")
    add_flags(command, DataOptions, "data, of a checkpoint", without=("preparation", "seed"))
    command.set_defaults(run=extract_adapter)


def _add_compare(commands: Commands) -> None:
    command = commands.add_parser("compare", help="say where two runs or adapters differ, and who is right there")
    source = "a run, an adapter, or a repository of the Hub"
    command.add_argument("first", metavar="A", help=source)
    command.add_argument("second", metavar="B", help=f"{source}, of the same classes")
    command.add_argument("--data", metavar="DATA", nargs="+", type=Path, default=[], help=f"{DATA} (default: A's)")
    command.add_argument("--split", default="test", choices=("train", "val", "test", "all"))
    command.add_argument("--together", action="store_true", help="also measure both adapters at once, with A's head")
    command.add_argument("--out", metavar="FOLDER", type=Path, help="for compare.json and the picture compare.png")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, naming them")
    command.add_argument("--backbone", help=f"of two adapters, where neither is a run: {BACKBONES}; or {SPEC}")
    command.add_argument("--checkpoint", metavar="FILE", help="published weights of that backbone")
    add_flags(command, Preparation, "preparation, with --backbone")
    add_flags(command, DataOptions, "data, with --backbone", without=("preparation", "seed"))
    command.set_defaults(run=compare_sources)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _few_shot(text: str) -> FewShot:
    ways, cross, shots = text.lower().partition("x")
    if not cross or not all(part.isascii() and part.isdigit() and 0 < int(part) < 2**31 for part in (ways, shots)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WAYSxSHOTS, such as 5x10: classes, and clouds of each")
    return FewShot(ways=int(ways), shots=int(shots))
