"""Load adapters: the statements of their files, checked against a backbone, and the adapter that they hold."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.heads import Heads, HeadSource, make_head, match_heads
from point_peft.adapting.planning import build_adapter, plan_adapter, wider
from point_peft.adapting.site import clean_copy, floating_parameter
from point_peft.anatomy.structure import Modules
from point_peft.config import PeftConfig, difference
from point_peft.errors import AdapterError, AdapterFileError, MatchError, PointPeftError, nearest_names, quoted
from point_peft.files.fingerprint import check_fingerprint
from point_peft.files.format import CONFIG_FILE, TENSOR_FILE, AdapterFiles, read_folder
from point_peft.files.head_description import build_head, describe_head
from point_peft.files.peft_format import described, from_peft, to_peft, why_not
from point_peft.files.saving import base_fingerprint
from point_peft.files.tensors import check_tensors, copy_tensors, overwrite_tensors, why_not_in_place
from point_peft.parts.backbone import Backbone


@dataclass(frozen=True)
class Stated:
    """The statements of an adapter's files, and the backbone, which they fit as far as could be told."""

    folder: Path
    files: AdapterFiles
    config: PeftConfig
    heads: Mapping[str, Any]
    """The descriptions of the modules that the adapter has to itself, by path."""
    adapted: list[Any] | None
    """The paths of its sites; None where PEFT does not say."""
    fingerprint: Any
    backbone: Backbone


def read_stated(folder: Path, modules: Modules, backbone_for: Callable[[PeftConfig], Backbone]) -> Stated:
    """Read the files of an adapter and check what can be checked without making it."""
    files = read_folder(folder)
    try:
        about = dict(described(files, modules))
    except MatchError as error:
        raise AdapterFileError(f"the adapter in '{folder}' does not fit this model: {error}") from error
    for name in ("peft_type", "format_version", "point_peft_version"):
        about.pop(name, None)
    heads, adapted = about.pop("heads", None), about.pop("adapted_modules", None)
    fingerprint = about.pop("base_fingerprint", None)
    if not isinstance(heads, dict) or (not isinstance(adapted, list) and not files.foreign):
        raise AdapterFileError(f"'{folder / CONFIG_FILE}' lacks heads or adapted_modules")
    try:
        config = PeftConfig.from_json(about)
    except PointPeftError as error:
        raise AdapterFileError(f"'{folder / CONFIG_FILE}': {error}") from error
    try:
        backbone = backbone_for(config)
    except PointPeftError as error:
        raise AdapterFileError(f"the adapter in '{folder}' does not fit this model: {error}") from error
    for path in heads:
        if not path or path not in modules:
            near = nearest_names(path, list(modules))
            raise AdapterFileError(f"the adapter has its own {quoted(path)}, this model has not; nearest: {near}")
    return Stated(folder, files, config, heads, adapted, fingerprint, backbone)


def restore_adapter(stated: Stated, heads: Heads, *, widen: bool) -> Adapter:
    """The adapter that files hold, not attached; `heads` as in `load_adapter`, types as `build_adapter` says."""
    backbone = stated.backbone
    given = {path: make_head(source, path, backbone) for path, source in match_heads(heads, list(stated.heads)).items()}
    try:
        adapter, tensors = _checked(stated, given, widen=widen)
    except AdapterFileError:
        raise
    except PointPeftError as error:
        raise AdapterFileError(f"the adapter in '{stated.folder}' does not fit this model: {error}") from error
    if stated.files.foreign:
        # PEFT says nothing of the base, and keeps the adapter in another type than that.
        reason, keep_types = why_not(adapter, backbone.modules), False
        if reason is not None:
            raise AdapterFileError(f"the adapter in '{stated.folder}' is not what PEFT makes for this model: {reason}")
    else:
        keep_types = _is_same_base(stated, adapter, tensors)
    like = floating_parameter(backbone.modules)
    device = torch.device("cpu") if like is None else like.device
    kept = stated.files.tensors if keep_types else tensors
    types = {name: wider(kept[name].dtype) if widen else tensors[name].dtype for name in tensors}
    types |= {name: kept[name].dtype for name in adapter.free_rows()}  # of a bank, as the configuration says
    copy_tensors(stated.files.tensors, adapter, tensors, device, types)
    for shared in adapter.shared_states():
        try:
            shared.check(backbone.model)
        except AdapterError as error:
            raise AdapterFileError(f"the adapter in '{stated.folder}': {error}") from error
    return adapter


def _checked(stated: Stated, given: Mapping[str, nn.Module], *, widen: bool) -> tuple[Adapter, Mapping[str, Tensor]]:
    """The adapter that a file asks for, and its tensors, once they are known to be those of the file.

    What a file asks for may be of any size; so it is first made without memory.
    """
    backbone, own = stated.backbone, dict[str, HeadSource](given)
    for path, description in stated.heads.items():
        if path not in own and description != describe_head(clean_copy(backbone.modules[path])):
            own[path] = partial(build_head, description, path)
    planned = plan_adapter(backbone, stated.config, own, list(stated.heads), widen=widen)
    sites = sorted(path for path, _ in planned.sites())
    if stated.adapted not in (None, sites):
        raise AdapterFileError(f"the adapter was made for {_differing(sites, stated.adapted)}")
    tensors = planned.tensors()
    check_tensors(stated.files.tensors, tensors, planned.free_rows(), f"its {TENSOR_FILE}")
    if planned.holds_only(tensors):
        return planned, tensors  # the file's tensors take the places of those without memory
    adapter = build_adapter(backbone, stated.config, own, list(stated.heads), widen=widen)
    return adapter, adapter.tensors()


def swap_values(stated: Stated, adapter: Adapter, name: str) -> None:
    """Give an adapter the values of files in the tensors that it has; what is not built alike is refused."""
    source, tensors = stated.files.tensors, adapter.tensors()
    reason = _difference(stated, adapter)
    if reason is None:
        check_tensors(source, tensors, adapter.free_rows(), f"its {TENSOR_FILE}")
        keep_types = not stated.files.foreign and _is_same_base(stated, adapter, tensors)
        reason = why_not_in_place(source, tensors, keep_types=keep_types)
    if reason is not None:
        raise AdapterFileError(
            f"the adapter in '{stated.folder}' cannot be swapped into '{name}': {reason}; load_adapter adds it as "
            "another adapter"
        )
    overwrite_tensors(source, tensors)
    adapter.config = stated.config
    for shared in adapter.shared_states():
        shared.check(stated.backbone.model)


def _difference(stated: Stated, adapter: Adapter) -> str | None:
    """The first thing that files say and an adapter is not; None: the two differ in their tensors at most."""
    modules = stated.backbone.modules
    if stated.files.foreign:
        reason = why_not(adapter, modules)
        if reason is not None:
            return f"PEFT has written it, and what is there is none of PEFT's: {reason}"
        fields = from_peft(to_peft(adapter, modules), modules)
        heads = fields.pop("heads")
        there = PeftConfig.from_json(fields)
    else:
        there, heads = adapter.config, {path: describe_head(module) for path, module in adapter.own_modules()}
    reason = difference(stated.config, there)
    if reason is not None:
        return reason
    for path in sorted({*stated.heads, *heads}):
        if stated.heads.get(path) != heads.get(path):
            return f"its own '{path}' is {quoted(stated.heads.get(path))}, there it is {quoted(heads.get(path))}"
    sites = sorted(path for path, _ in adapter.sites())
    return None if stated.adapted in (None, sites) else f"it was made for {_differing(sites, stated.adapted)}"


def _differing(sites: Sequence[str], stated: Sequence[Any]) -> str:
    """The modules that only a file states, or only a model has: how many, and the first of them."""
    there, here = {str(path) for path in stated}, set(sites)
    lost, more = sorted(there - here), sorted(here - there)
    ways = [f"lacks {len(lost)} of its {len(stated)} ({_first(lost)})"] if lost else []
    ways += [f"has {len(more)} more ({_first(more)})"] if more else []
    return f"other modules: this model {' and '.join(ways)}" if ways else "modules some of which are named twice"


def _first(paths: Sequence[str]) -> str:
    return ", ".join(map(quoted, paths[:3])) + (", …" if len(paths) > 3 else "")


def _is_same_base(stated: Stated, adapter: Adapter, tensors: Mapping[str, Tensor]) -> bool:
    """Refuse another backbone than the one that files were made for; warn if it may be another, in other types."""
    actual = base_fingerprint(adapter, tensors, stated.backbone.modules)
    warning = check_fingerprint(stated.fingerprint, actual, type(stated.backbone.model).__name__)
    if warning is not None:
        warnings.warn(warning, stacklevel=4)  # where the user has called a method of the model
    return warning is None
