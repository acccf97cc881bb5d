"""An anatomy checked: its values against their annotations, what it names against a model."""

from typing import Any

from torch import nn

from point_peft.anatomy.description import Anatomy, Stage
from point_peft.anatomy.structure import prefix_rows
from point_peft.errors import AnatomyError, nearest_names, quoted
from point_peft.schema import MisfitError, from_json, to_json


def anatomy_from_json(data: Any) -> Anatomy:
    """The anatomy that `schema.to_json` gave; raises `AnatomyError` for anything else."""
    try:
        anatomy: Anatomy = from_json(data, Anatomy)
    except MisfitError as error:
        raise AnatomyError(f"an anatomy holds {error}") from error
    return anatomy


def check_anatomy(model: nn.Module, anatomy: Anatomy) -> None:
    """Raise `AnatomyError` if an anatomy names a module or parameter that the model has not."""
    modules = dict(model.named_modules(remove_duplicate=False))
    named: list[str | None] = [*anatomy.stem, *anatomy.final_norms, *anatomy.heads]
    named += [path for read in anatomy.reads for path in (read.module, read.reader)]
    if not anatomy.stages or not all(stage.blocks for stage in anatomy.stages):
        raise AnatomyError("an anatomy needs at least one stage, and every stage at least one block")
    for stage in anatomy.stages:
        named += [tap.module for tap in stage.taps]
        named += [*stage.tokenizer, stage.position_embedding]
        named += [path for block in stage.blocks for path in (block.path, *block.modules)]
        _check_stage(stage)
    if anatomy_from_json(to_json(anatomy)) != anatomy:
        raise AnatomyError("an anatomy holds tuples, not lists")
    for path in named:
        if path is not None and path not in modules:
            near = nearest_names(path, list(modules))
            raise AnatomyError(
                f"the anatomy names {quoted(path)}, which {type(model).__name__} has not; nearest: {near}"
            )
    parameters = dict(model.named_parameters())
    for parameter in anatomy.prefix_parameters:
        if parameter.name not in parameters:
            near = nearest_names(parameter.name, list(parameters), what="parameter")
            name = quoted(parameter.name)
            raise AnatomyError(f"the anatomy names the parameter {name}, which is not there; nearest: {near}")
        rows, prefix = prefix_rows(parameters[parameter.name]), anatomy.stages[0].prefix_tokens
        if parameter.row < 0 or (prefix is not None and parameter.row + rows > prefix):
            raise AnatomyError(
                f"the anatomy puts {rows} rows of '{parameter.name}' at row {parameter.row} of {prefix} prefix tokens"
            )


def _check_stage(stage: Stage) -> None:
    """Raise `AnatomyError` for what no stage can be."""
    steps = [stage.tokens, *stage.outputs, *stage.masks, *stage.padding_masks, *(tap.steps for tap in stage.taps)]
    negative = any(isinstance(step, int) and step < 0 for way in steps for step in way)
    if negative or not stage.tokens or not stage.outputs:
        raise AnatomyError(
            f"the stage of {quoted(stage.blocks[0].path)} says where tensors are by numbers from 0 and names; its "
            "tokens need at least one of them, its outputs at least one place"
        )
    paths = [block.path for block in stage.blocks]
    if len(set(paths)) != len(paths) or not all(paths):
        raise AnatomyError(f"the blocks of a stage must be different modules of the model, got {quoted(paths, 300)}")
    for block in stage.blocks:
        outside = [path for path in block.modules if not (path + ".").startswith(block.path + ".")]
        if outside:
            part, whole = quoted(outside[0]), quoted(block.path)
            raise AnatomyError(f"the anatomy says that {part} is a part of block {whole}: it is not")
