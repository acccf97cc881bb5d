"""The anatomy of a model of a known family."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from point_peft.anatomy.description import Anatomy, Block, PrefixParameter, Read, Stage, Tap
from point_peft.anatomy.families import PRESETS, Preset, StagePreset
from point_peft.anatomy.structure import (
    Modules,
    block_width,
    find_blocks,
    linear_shape,
    prefix_rows,
    stage_groups,
    unclaimed,
)


def prefixes(modules: Modules, preset: Preset) -> list[str]:
    """The prefixes of paths under which a model's modules hold a backbone of this family; "" for the model itself."""
    first = preset.requires[0]
    return [
        prefix
        for prefix in (path.removesuffix(first) for path in modules if path.endswith(first))
        if (not prefix or prefix.endswith("."))
        and all(prefix + other in modules for other in preset.requires)
        and not any(prefix + other in modules for other in preset.absent)
    ]


def from_preset(model: nn.Module, modules: Modules, preset: Preset, prefix: str) -> Anatomy | None:
    """The anatomy of a model, with all its modules, that has a backbone of this family under a prefix."""
    every_block = find_blocks(modules)
    stages: list[Stage] = []
    for entry in preset.stages:
        pattern = re.compile(re.escape(prefix) + f"(?:{entry.blocks})")
        blocks = [block for path, block in every_block.items() if pattern.fullmatch(path)]
        groups = stage_groups(model, blocks)
        stages += [_stage(model, modules, entry, prefix, number, group) for number, group in enumerate(groups)]
    if not stages:
        return None
    parameters: list[PrefixParameter] = []
    known = dict(model.named_parameters())
    role: Literal["token", "position"]
    for role, names in (("token", preset.tokens), ("position", preset.positions)):
        row = 0
        for name in names:
            if prefix + name in known:
                parameters.append(PrefixParameter(name=prefix + name, role=role, row=row))
                row += prefix_rows(known[prefix + name])
    rows = sum(prefix_rows(known[parameter.name]) for parameter in parameters if parameter.role == "token")
    # Some models have an identity in the place of a final norm.
    norms = [path for path in (prefix + norm for norm in preset.final_norms) if path in modules]
    norms = [path for path in norms if not isinstance(modules[path], nn.Identity)]
    return Anatomy(
        source=f"preset {preset.name}",
        stages=tuple(
            replace(stage, prompts=False)
            if stage.unknown
            else replace(stage, prefix_tokens=rows, prompts=stage.layout != "packed")
            for stage in stages
        ),
        stem=tuple(prefix + path for path in preset.stem if prefix + path in modules),
        prefix_parameters=tuple(parameters),
        final_norms=tuple(norms),
        heads=tuple(unclaimed(model, _encoder_side(modules, preset, prefix, stages))),
        patches_read=preset.patches_read,
        reads=tuple(
            Read(module=path, reader=_reader(modules, path))
            for path in modules
            if preset.reads is not None and re.fullmatch(re.escape(prefix) + preset.reads, path)
        ),
    )


def _reader(modules: Modules, path: str) -> str:
    """The module that reads the weights of another: the nearest that holds it and is no nn.Sequential, which calls."""
    above = path.rpartition(".")[0]
    while isinstance(modules[above], nn.Sequential):
        above = above.rpartition(".")[0]
    return above


def _encoder_side(modules: Modules, preset: Preset, prefix: str, stages: Sequence[Stage]) -> set[nn.Module]:
    """The modules that a pre-training checkpoint of the family fills; whatever lies in one of them it fills too."""
    embeddings = [entry.embedding for entry in preset.stages if entry.embedding is not None]
    named = {prefix + name for name in (*preset.stem, *preset.final_norms, *embeddings)}
    named |= {block.path for stage in stages for block in stage.blocks}
    further = re.compile(re.escape(prefix) + f"(?:{preset.encoder})")
    return {module for path, module in modules.items() if path and (path in named or further.fullmatch(path))}


def _stage(
    model: nn.Module, modules: Modules, entry: StagePreset, prefix: str, number: int, blocks: tuple[Block, ...]
) -> Stage:
    def path(template: str) -> str:
        first = blocks[0].path
        above = first.rpartition(".")[0].rpartition(".")[0]
        named = template.format(stage=number, first=first, above=above)
        return named if template.startswith(("{first}", "{above}")) else prefix + named

    def tap(entry: Tap) -> Tap:
        return replace(entry, module=path(entry.module))

    where = None if entry.coordinates is None else tap(entry.coordinates)
    embedding = path(entry.embedding) if entry.embedding is not None else None
    if embedding is not None and embedding in modules and _made_from_coordinates(modules[embedding]):
        where = Tap(module=embedding, side="input")
    else:
        embedding = None
    samples = [tap(one) for one in entry.samples if path(one.module) in modules]
    patches = [path(name) for name in entry.patch_tokens if path(name) in modules]
    if entry.mlp_norm is not None:
        blocks = tuple(replace(block, mlp_norm=f"{block.path}.{entry.mlp_norm}") for block in blocks)
    return Stage(
        blocks=blocks,
        width=block_width(model, blocks[0]),
        layout=entry.layout,
        tokens=entry.tokens,
        outputs=entry.outputs,
        coordinates=where,
        dropped=entry.dropped,
        unknown=entry.unknown,
        samples=samples[-1] if samples else None,
        # Where the grouping is a function, the clouds are what the model gets.
        points=tap(entry.points) if entry.points is not None and path(entry.points.module) in modules else None,
        tokenizer=tuple(patches) if entry.neighbourhoods else (),
        position_embedding=embedding,
        patch_tokens=Tap(module=patches[-1], side="output", steps=()) if patches else None,
        position=entry.position,
        masks=entry.masks,
    )


def _made_from_coordinates(embedding: nn.Module) -> bool:
    """Tell whether the first layer of a positional embedding reads three channels."""
    shapes = [shape for module in embedding.modules() if (shape := linear_shape(module))]
    return bool(shapes) and shapes[0][1] == 3


def known_anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy by the first preset that fits, None if none does, or if the model holds two backbones."""
    modules = dict(model.named_modules())
    for preset in PRESETS:
        fitting = (from_preset(model, modules, preset, prefix) for prefix in prefixes(modules, preset))
        anatomies = [anatomy for anatomy in fitting if anatomy is not None]
        if anatomies:
            return anatomies[0] if len(anatomies) == 1 else None
    return None
