"""LoRA adapters in the file format of the PEFT package, both ways. PEFT itself is not needed.

Its tensors are ours by name and shape. Its configuration says less: which base it was made for, the anatomy and the
like stand in the record in the header of the tensors. And it says some things that are not implemented here: these are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.site import clean_copy
from point_peft.errors import AdapterFileError, quoted
from point_peft.files.format import LORA_TYPE, AdapterFiles
from point_peft.files.head_description import describe_head
from point_peft.matching import match_names
from point_peft.nearest import nearest_names
from point_peft.tuners.lora import LoraConfig, LoraPart, anchored, pattern_values

# Fields of PEFT 0.21 that say the same here, under the same name.
_SHARED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
# Fields that `from_peft` works out.
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


def why_not(adapter: Adapter, modules: Mapping[str, nn.Module]) -> str | None:
    """Why an adapter cannot be said in PEFT's format; None if it can."""
    methods = [tuner.method for tuner in adapter.config.tuners]
    if methods != [LoraConfig.method]:
        return f"PEFT reads LORA alone, this adapter is {' and '.join(methods)}"
    for path, part in adapter.all_parts():
        reason = _why_no_layer(path, part, modules[path]) if isinstance(part, LoraPart) else None
        if reason is not None:
            return reason
        if sum(module is modules[path] for module in modules.values()) > 1:
            return f"'{path}' is a module under two names, of which PEFT adapts one"
    for path, module in adapter.own_modules():
        if describe_head(module) != describe_head(clean_copy(modules[path])):
            return f"the adapter's own '{path}' is built otherwise than the base's, and PEFT knows only copies of that"
        more = [name for name in modules if name != path and name.endswith(path)]
        if more:
            return f"modules_to_save: PEFT would take '{more[0]}' for '{path}', because its name ends so"
    return None


def _why_no_layer(path: str, part: LoraPart, module: nn.Module) -> str | None:
    if part.chosen:
        return f"LoraConfig.qkv: PEFT adapts all rows of '{path}' or none"
    if part.by_weight:
        return f"'{path}' is not called, its weight is read by another module: PEFT adapts layers that are called"
    if type(module) is nn.Conv1d:
        if module.dilation != (1,) or module.padding_mode != "zeros":
            return f"'{path}' is an nn.Conv1d with dilation or a padding_mode, which PEFT would leave out"
        return None
    return (
        None if isinstance(module, nn.Linear) else f"'{path}' is a {type(module).__name__}, which PEFT does not adapt"
    )


def to_peft(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of an adapter that can be said so."""
    tuner = adapter.config.tuners[0]
    assert isinstance(tuner, LoraConfig)
    paths = [path for path, part in adapter.all_parts() if isinstance(part, LoraPart)]
    ranks = pattern_values(tuner.rank_pattern, paths, "rank_pattern")
    alphas = pattern_values(tuner.alpha_pattern, paths, "alpha_pattern")
    return {
        "peft_type": LORA_TYPE,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
        "revision": adapter.config.revision,
        **{name: getattr(tuner, name) for name in _SHARED},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": exactly(paths, list(modules)),
        "modules_to_save": list(adapter.saved) or None,
        # By full path: PEFT goes by the first key that matches, in an order that a file does not keep.
        "rank_pattern": {anchored(path): rank for path, rank in ranks.items()},
        "alpha_pattern": {anchored(path): alpha for path, alpha in alphas.items()},
    }


def exactly(paths: Sequence[str], names: Sequence[str]) -> list[str] | str:
    """What means these of the names and no others: a list, or where one ends as another does, an expression."""
    listed = sorted(paths)
    return listed if set(match_names(listed, names)) == set(paths) else "|".join(map(re.escape, listed))


def described(files: AdapterFiles, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The configuration of an adapter as our own format has it, whoever wrote its files.

    A configuration that was edited by hand counts; what the record says beside it stays.
    """
    if files.config["peft_type"] != LORA_TYPE:
        return files.config
    if files.record is not None and not files.edited:
        return files.record
    found = from_peft(files.config, modules)
    if files.record is None:
        return found
    heads = files.record.get("heads")
    known = heads if isinstance(heads, dict) else {}
    heads = {path: known.get(path, description) for path, description in found["heads"].items()}
    return {**files.record, **found, "heads": heads}


def from_peft(fields: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """PEFT's configuration of LoRA, for this backbone, as our own format says it."""
    _check_fields(fields)
    names = [name for name in modules if name]
    saved = _saved(fields.get("modules_to_save"), names)
    paths = [path for path in _targets(fields, names) if not path.startswith(tuple(f"{name}." for name in saved))]
    if not paths:
        stated = fields["target_modules"]
        entries = [stated] if isinstance(stated, str) else stated
        near = nearest_names(str(entries[0]) if entries else "", names)
        raise AdapterFileError(f"target_modules={quoted(stated)} of PEFT's LoraConfig means none here; nearest: {near}")
    tuner = {name: fields[name] for name in _SHARED if name in fields}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = fields.get(name) or {}
        if not isinstance(pattern, dict):
            raise AdapterFileError(f"{name} of PEFT's LoraConfig is {quoted(pattern)}, not an object")
        # PEFT passes over what matches nothing.
        used = pattern_values({key: key for key in pattern}, paths, name, required=False)
        tuner[name] = {key: value for key, value in pattern.items() if key in used.values()}
    return {
        "tuners": [{"method": LoraConfig.method, **tuner, "target_modules": exactly(paths, names)}],
        "modules_to_save": saved,
        "base_model_name_or_path": fields.get("base_model_name_or_path"),
        "revision": fields.get("revision"),
        "heads": {path: describe_head(clean_copy(modules[path])) for path in saved},
    }


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse what asks for more than is implemented."""
    unknown = sorted(set(fields) - {*_SHARED, *_RESOLVED, *_HARMLESS, *_INACTIVE})
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
    found = [name for name in names if name.endswith(tuple(entries))]
    return [name for name in found if not name.startswith(tuple(f"{other}." for other in found))]


def _targets(fields: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The layers that PEFT would adapt, by its rules: an entry of a list may match nothing."""
    stated, excluded, layers = (fields.get(n) for n in ("target_modules", "exclude_modules", "layers_to_transform"))
    for name, value in (("target_modules", stated), ("exclude_modules", excluded or [])):
        if not isinstance(value, (str, list)):
            raise AdapterFileError(f"{name}={quoted(value)} of PEFT's LoraConfig is neither a list nor a string")
    assert isinstance(stated, (str, list))
    found = match_names(stated, names, required=False)
    out = set(match_names(excluded, names, field="exclude_modules", required=False)) if excluded else set()
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not numbers:
        return [path for path in found if path not in out]
    if not all(type(number) is int for number in numbers) or isinstance(stated, str):
        raise AdapterFileError(
            f"layers_to_transform={quoted(layers)} of PEFT's LoraConfig must be numbers beside a list of target_modules"
        )
    # PEFT takes the first number in a path for the layer's, but a module named in full for meant, whatever its layer.
    return [path for path in found if path not in out and (path in stated or _layer_of(path) in numbers)]


def _layer_of(path: str) -> int | None:
    found = _LAYER.match(path)
    return int(found[1]) if found else None
