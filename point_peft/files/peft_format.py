"""Adapters in the file format of the PEFT package, both ways, for methods that PEFT has too. PEFT is not needed.

Its tensors are ours by name and shape. Its configuration says less: which base it was made for, the anatomy and the
like stand in the record in the header of the tensors. What it says of a method, the method's configuration knows.
"""

from collections.abc import Mapping
from typing import Any

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.site import clean_copy
from point_peft.anatomy.structure import Modules
from point_peft.files.format import PEFT_TYPE, AdapterFiles, methods_of_peft
from point_peft.files.head_description import describe_head


def why_not(adapter: Adapter, modules: Modules) -> str | None:
    """A reason why an adapter cannot be said in PEFT's format; None if it can."""
    tuner, *others = adapter.config.tuners
    if others or tuner.peft_type is None:
        methods = " and ".join(tuner.method for tuner in adapter.config.tuners)
        return f"PEFT reads {' or '.join(methods_of_peft())} alone, this adapter is {methods}"
    parts = adapter.weight_changes()
    reason = tuner.why_not_peft(parts, modules)
    if reason is not None:
        return reason
    for path in parts:
        if sum(module is modules[path] for module in modules.values()) > 1:
            return f"'{path}' is a module under two names, of which PEFT adapts one"
    for path, module in adapter.own_modules():
        if describe_head(module) != describe_head(clean_copy(modules[path])):
            return f"the adapter's own '{path}' is built otherwise than the base's, and PEFT knows only copies of that"
        more = [name for name in modules if name != path and name.endswith(path)]
        if more:
            return f"modules_to_save: PEFT would take '{more[0]}' for '{path}', because its name ends so"
    return None


def to_peft(adapter: Adapter, modules: Modules) -> dict[str, Any]:
    """PEFT's `adapter_config.json` of an adapter that can be said so."""
    tuner = adapter.config.tuners[0]
    return {
        "peft_type": tuner.peft_type,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
        "revision": adapter.config.revision,
        "modules_to_save": list(adapter.saved) or None,
        **tuner.to_peft(list(adapter.weight_changes()), list(modules)),
    }


def described(files: AdapterFiles, modules: Modules) -> dict[str, Any]:
    """The configuration of an adapter as our own format has it, whoever wrote its files.

    A configuration that was edited by hand counts; what the record says beside it stays.
    """
    if files.config["peft_type"] == PEFT_TYPE or files.about is files.record:
        return files.about
    stated = from_peft(files.config, modules)
    if files.record is None:
        return stated
    heads = files.record.get("heads")
    known = heads if isinstance(heads, dict) else {}
    heads = {path: known.get(path, description) for path, description in stated["heads"].items()}
    return {**files.record, **stated, "heads": heads}


def from_peft(fields: Mapping[str, Any], modules: Modules) -> dict[str, Any]:
    """PEFT's configuration of a method, for this backbone, as our own format says it."""
    kind = methods_of_peft()[fields["peft_type"]]
    tuner, saved = kind.from_peft(fields, [name for name in modules if name])
    return {
        "tuners": [{"method": kind.method, **tuner}],
        "modules_to_save": saved,
        "base_model_name_or_path": fields.get("base_model_name_or_path"),
        "revision": fields.get("revision"),
        "heads": {path: describe_head(clean_copy(modules[path])) for path in saved},
    }
