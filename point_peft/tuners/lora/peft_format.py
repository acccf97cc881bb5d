"""LoRA as PEFT's configuration says it; what that says and is not implemented here is refused by name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from point_peft.errors import AdapterFileError, MatchError, nearest_names, quoted
from point_peft.matching import match_names
from point_peft.parts.base import Part
from point_peft.tuners.lora.parts import LoraPart

# Fields of PEFT 0.21 that say the same here, under the same name.
SHARED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
# Fields that `read_fields` works out.
_RESOLVED = (
    *("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "base_model_name_or_path", "revision", "peft_type"),
)
# Fields without an effect on what a saved adapter computes; those of an initialisation count where that is chosen.
_HARMLESS = (
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "megatron_core", "qalora_group_size"),
    *("runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
# Fields of what is not implemented, with the values at which they do nothing.
_INACTIVE: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "layers_pattern": (None, "", []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False,),
}
# What A and B begin with, where the base stays as it is.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def why_no_layer(path: str, part: Part, module: nn.Module) -> str | None:
    """A reason why PEFT cannot say what is at a layer; None if it can."""
    assert isinstance(part, LoraPart)
    if part.pissa_A is not None:
        return "LoraConfig.init_lora_weights: PEFT's PiSSA takes another base; convert_to_lora makes plain LoRA of it"
    if part.chosen:
        return f"LoraConfig.qkv: PEFT adapts all rows of '{path}' or none"
    if part.by_weight:
        return f"'{path}' is not called, its weight is read by another module: PEFT adapts layers that are called"
    if not isinstance(module, nn.Linear) and type(module) is not nn.Conv1d:
        return f"'{path}' is a {type(module).__name__}, which PEFT does not adapt"
    if isinstance(module, nn.Conv1d) and (module.dilation != (1,) or module.padding_mode != "zeros"):
        return f"'{path}' is an nn.Conv1d with dilation or a padding_mode, which PEFT would leave out"
    return None


def exactly(paths: Sequence[str], names: Sequence[str]) -> list[str] | str:
    """A pattern for these of the names and no others: a list, or where one ends as another does, an expression."""
    listed = sorted(paths)
    return listed if set(match_names(listed, names)) == set(paths) else "|".join(map(re.escape, listed))


def read_fields(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Our fields, and the modules to save whole, that PEFT's configuration of LoRA means among the modules `names`."""
    _check_fields(fields)
    saved = _saved(fields.get("modules_to_save"), names)
    paths = [path for path in _targets(fields, names) if not path.startswith(tuple(f"{name}." for name in saved))]
    if not paths:
        stated = fields["target_modules"]
        entries = [stated] if isinstance(stated, str) else stated
        near = nearest_names(str(entries[0]) if entries else "", names)
        raise AdapterFileError(f"target_modules={quoted(stated)} of PEFT's LoraConfig means none here; nearest: {near}")
    tuner = {name: fields[name] for name in SHARED if name in fields}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = fields.get(name) or {}
        if not isinstance(pattern, dict):
            raise AdapterFileError(f"{name} of PEFT's LoraConfig is {quoted(pattern)}, not an object")
        # PEFT passes over what matches nothing.
        used = pattern_values({key: key for key in pattern}, paths, name, required=False)
        tuner[name] = {key: value for key, value in pattern.items() if key in used.values()}
    return {**tuner, "target_modules": exactly(paths, names)}, saved


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse what asks for more than is implemented."""
    unknown = sorted(set(fields) - {*SHARED, *_RESOLVED, *_HARMLESS, *_INACTIVE})
    if unknown:
        raise AdapterFileError(
            f"PEFT's LoraConfig has no field {quoted(unknown[0])} that this version of point_peft knows; a newer PEFT "
            "may have written it"
        )
    for name, inactive in _INACTIVE.items():
        if name in fields and fields[name] not in inactive:
            raise AdapterFileError(f"{name}={quoted(fields[name])} of PEFT's LoraConfig is not implemented here")
    init = fields.get("init_lora_weights", True)
    if init not in _INITS:
        raise AdapterFileError(
            f"init_lora_weights={quoted(init)} of PEFT's LoraConfig changes the base's weights, and the file does not "
            "hold them: let PEFT convert the adapter (path_initial_model_for_weight_conversion) and save it again"
        )


def _saved(stated: Any, names: Sequence[str]) -> list[str]:
    """The modules that PEFT would save whole: those whose name ends with an entry, wherever that begins."""
    entries = stated or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
        raise AdapterFileError(f"modules_to_save={quoted(stated)} of PEFT's LoraConfig is not a list of names")
    saved = [name for name in names if name.endswith(tuple(entries))]
    return [name for name in saved if not name.startswith(tuple(f"{other}." for other in saved))]


def _targets(fields: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The layers that PEFT would adapt, by its rules: an entry of a list may match nothing."""
    stated, excluded, layers = (fields.get(n) for n in ("target_modules", "exclude_modules", "layers_to_transform"))
    for name, value in (("target_modules", stated), ("exclude_modules", excluded or [])):
        if not isinstance(value, (str, list)):
            raise AdapterFileError(f"{name}={quoted(value)} of PEFT's LoraConfig is neither a list nor a string")
    assert isinstance(stated, (str, list))
    meant = match_names(stated, names, required=False)
    out = set(match_names(excluded, names, field="exclude_modules", required=False)) if excluded else set()
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not numbers:
        return [path for path in meant if path not in out]
    if not all(type(number) is int for number in numbers) or isinstance(stated, str):
        raise AdapterFileError(
            f"layers_to_transform={quoted(layers)} of PEFT's LoraConfig must be numbers beside a list of target_modules"
        )
    # PEFT takes the first number in a path for the layer's, but a module named in full for meant, whatever its layer.
    return [path for path in meant if path not in out and (path in stated or _layer_of(path) in numbers)]


def _layer_of(path: str) -> int | None:
    number = _LAYER.match(path)
    return int(number[1]) if number else None


V = TypeVar("V")

# A key of a pattern that is no more than a name, with or without an anchor, which nothing in it can make slow.
_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])+")


def pattern_values(pattern: Mapping[str, V], paths: Sequence[str], field: str, required: bool = True) -> dict[str, V]:
    """Path -> the value of the first key that matches it; if `required`, every key must match one of the paths."""
    values: dict[str, V] = {}
    for key, value in pattern.items():
        hits = _matched(key, paths, field, len(pattern))
        if required and not hits:
            near = nearest_names(key, paths)
            raise MatchError(f"no adapted module matches {quoted(key)} ({field}); nearest: {near}")
        for path in hits:
            values.setdefault(path, value)
    return values


def _matched(key: str, paths: Sequence[str], field: str, share: int) -> Sequence[str]:
    """The paths that a key of a pattern means: as a regular expression, for the whole path or its end after a dot."""
    expression = rf"(.*\.)?({key})"
    if _NAME.fullmatch(key):
        compiled = re.compile(expression)
        return [path for path in paths if compiled.fullmatch(path)]
    return match_names(expression, paths, field=field, required=False, share=share)


def anchored(path: str) -> str:
    """A key of a pattern that matches this path alone, and not others that end in it."""
    return "^" + re.escape(path)
