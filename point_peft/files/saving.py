"""Save adapters: the configuration of each, the fingerprint of its backbone, its files."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from point_peft.adapting.adapter import Adapter
from point_peft.anatomy.presets import known_anatomy
from point_peft.anatomy.structure import Modules
from point_peft.config import PeftConfig
from point_peft.errors import AdapterError, PointPeftError, quoted
from point_peft.files.fingerprint import fingerprint
from point_peft.files.format import FORMAT_VERSION, PEFT_TYPE, Card, write_folder
from point_peft.files.head_description import describe_head
from point_peft.files.peft_format import to_peft, why_not
from point_peft.files.tensors import is_sharded
from point_peft.parts.backbone import Backbone
from point_peft.version import __version__

Format = Literal["auto", "peft", "point_peft"]


def save_adapters(
    folder: Path,
    adapters: Mapping[str, Adapter],
    backbone: Backbone,
    format: Format,
    card: Callable[[Adapter], Card],
    *,
    half: bool = False,
) -> None:
    """Write adapters: a single one, or the one named "default", into the folder itself, others into subfolders."""
    if format not in get_args(Format):
        raise PointPeftError(f"format is {quoted(format)}; allowed: {', '.join(map(repr, get_args(Format)))}")
    parameters = [p for module in (backbone.model, *adapters.values()) for p in module.parameters()]
    if any(map(is_sharded, parameters)):
        raise AdapterError(
            "adapters cannot be saved while tensors of the model are spread over processes (fully_shard): gather them, "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), load that into a model that "
            "is not sharded and save it; fit does so by itself"
        )
    reasons = {
        name: f'format="{format}"' if format == "point_peft" else why_not(adapter, backbone.modules)
        for name, adapter in adapters.items()
    }
    for name, reason in reasons.items():
        if format == "peft" and reason is not None:
            raise AdapterError(f"adapter '{name}' cannot be saved in PEFT's format: {reason}")
    for name, adapter in adapters.items():
        own = folder if len(adapters) == 1 or name == "default" else folder / name
        config, record = _file_config(adapter, backbone), None
        if reasons[name] is None:
            config, record = to_peft(adapter, backbone.modules), config
        tensors = {key: _halved(name, key, t) for key, t in adapter.tensors().items()} if half else adapter.tensors()
        write_folder(own, config, tensors, card(adapter), record)


def _halved(adapter_name: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor in half precision, if it is float32; an error if it holds larger values than that has."""
    if tensor.dtype != torch.float32:
        return tensor
    halved = tensor.detach().half()
    if bool(halved.isinf().any()):
        raise AdapterError(
            f"adapter '{adapter_name}' cannot be saved with half=True: '{name}' has values that are too large for it"
        )
    return halved


def _file_config(adapter: Adapter, backbone: Backbone) -> dict[str, Any]:
    return {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "point_peft_version": __version__,
        **_with_anatomy(adapter.config, backbone).to_json(),
        "heads": {path: describe_head(module) for path, module in adapter.own_modules()},
        "adapted_modules": sorted(path for path, _ in adapter.sites()),
        "base_fingerprint": base_fingerprint(adapter, adapter.tensors(), backbone.modules),
    }


def _with_anatomy(config: PeftConfig, backbone: Backbone) -> PeftConfig:
    """The configuration with the anatomy in it, unless the model alone tells it wherever the file is read."""
    anatomy = backbone.anatomy
    alone = anatomy is None or config.stated_anatomy is not None or anatomy == known_anatomy(backbone.model)
    return config if alone else replace(config, anatomy=anatomy)


def base_fingerprint(adapter: Adapter, own: Iterable[str], modules: Modules) -> dict[str, Any]:
    """The fingerprint of what the adapter takes from the base: all but the tensors `own` that it has itself."""
    # By module and not by name, for a module may have several.
    inside = {id(module) for path in adapter.saved for module in modules[path].modules()}
    named = [(path, name) for path, _, name in (full.rpartition(".") for full in own)]
    replaced = {(id(modules[path]), name) for path, name in named if path in modules}
    tensors: dict[str, Tensor] = {}
    for path, module in modules.items():
        kept = (item for item in module._buffers.items() if item[0] not in module._non_persistent_buffers_set)
        for name, tensor in () if id(module) in inside else (*module._parameters.items(), *kept):
            if tensor is not None and (id(module), name) not in replaced:
                tensors[f"{path}.{name}" if path else name] = tensor
    return fingerprint(tensors)
