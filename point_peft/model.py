"""The adapted model: adding, activating, training, merging, saving and removing adapters."""

from __future__ import annotations

import inspect
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from point_peft.adapting import second_pass
from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.adapting.attaching import attach_model, attach_sites, detach_model, detach_sites, frozen_norms
from point_peft.adapting.combining import combine
from point_peft.adapting.heads import HeadSource, make_head, match_heads
from point_peft.adapting.mixed import run_stem, sharing
from point_peft.adapting.planning import build_adapter, plan_adapter
from point_peft.adapting.site import CHILD, SITE, backbone_modules, clean_copy, floating_parameter
from point_peft.anatomy.checking import check_anatomy
from point_peft.anatomy.description import Anatomy
from point_peft.anatomy.presets import known_anatomy
from point_peft.config import Combination, PeftConfig, TunerConfig, difference
from point_peft.errors import AdapterError, AdapterFileError, AnatomyError, MatchError, PointPeftError, quoted
from point_peft.files import fingerprint as fingerprint_module
from point_peft.files import peft_format
from point_peft.files.fingerprint import check_fingerprint
from point_peft.files.format import CARD_FILE, CONFIG_FILE, FORMAT_VERSION, PEFT_TYPE, TENSOR_FILE, AdapterFiles, Card
from point_peft.files.head_description import build_head, describe_head
from point_peft.files.peft_format import from_peft, to_peft, why_not
from point_peft.files.reading import read_folder
from point_peft.files.tensors import check_tensors, copy_tensors, overwrite_tensors, why_not_in_place
from point_peft.files.writing import write_folder
from point_peft.hub import card
from point_peft.hub.card import About, citation, for_repository, render
from point_peft.hub.place import Token, check_names, is_repo_id
from point_peft.hub.pulling import download
from point_peft.hub.pushing import push
from point_peft.nearest import nearest_names
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Bank
from point_peft.running import forward as forward_module
from point_peft.running.batching import Batch
from point_peft.running.forward import (
    Forward,
    Key,
    auxiliary_losses,
    choose_adapters,
    chosen_adapters,
    close_forward,
    eval_mode,
    forget,
    mark,
    open_forward,
    opened,
    reopen,
)
from point_peft.running.reading import depth, unwind
from point_peft.tracing.understanding import trace, verified
from point_peft.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self

M = TypeVar("M", bound=nn.Module)
Format = Literal["auto", "peft", "point_peft"]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class LayerStatus:
    """What is attached to one module of the backbone."""

    name: str
    module_type: str
    parts: Mapping[str, tuple[str, ...]]
    """Adapter -> the kinds of its parts here."""
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    requires_grad: Mapping[str, bool]
    devices: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """The state of an adapted model as a whole."""

    base_model_type: str
    available_adapters: tuple[str, ...]
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    methods: Mapping[str, tuple[str, ...]]
    """Adapter -> its methods."""
    requires_grad: Mapping[str, bool]
    trainable_params: int
    total_params: int
    num_adapter_layers: int


class AdapterSet(nn.Module):
    """The adapters of one backbone and everything that can be done with them.

    `PointPeftModel` is one that also owns its backbone. A model that keeps its own class (`inject_adapter`) holds one
    as its child `point_peft`.
    """

    base_model: nn.Module
    anatomy: Anatomy | None
    """None where no preset fits and nothing was traced; then no method that needs it can be added."""

    def __init__(self, model: nn.Module, anatomy: Anatomy | AnatomyError) -> None:
        super().__init__()
        self._hold(model)
        self.adapters = nn.ModuleDict()
        self.key = Key()
        self.default = ()
        self.traced: Forward | None = None
        self.losses: tuple[Tensor, ...] = ()
        self.unproven: set[str] = set()
        self.anatomy = None if isinstance(anatomy, AnatomyError) else anatomy
        self.why_unknown = str(anatomy) if isinstance(anatomy, AnatomyError) else ""
        self.merged: dict[str, dict[str, Tensor]] = {}
        """Merged adapter -> the base's tensors as they were, by name."""
        self.frozen_from: dict[str, bool] = {}
        self.norm_modes: dict[str, bool] = {}
        self.training = model.training

    @property
    def default(self) -> tuple[str, ...]:
        """The adapters that are active in every thread or task that has not chosen for itself."""
        return self._default

    @default.setter
    def default(self, names: tuple[str, ...]) -> None:
        self._default = names
        # What is compiled finds the active adapters by their place: by name, it would be compiled again for each.
        self.slots: dict[str, nn.Module] = {str(i): get_adapter(self, name) for i, name in enumerate(names)}

    def _hold(self, model: nn.Module) -> None:
        self.__dict__["base_model"] = model  # not as a child: the model holds this module

    def backbone_tokens(self, forward: Forward, source: str, adapter: str) -> Tensor:
        """Patch tokens (b, g, c) of the frozen backbone without adapters, see `second_pass.backbone_tokens`."""
        return second_pass.backbone_tokens(self, forward, source, adapter)

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.default = self.active_adapters  # replicas run on threads of their own
        return replica

    def get_base_model(self) -> nn.Module:
        """The backbone itself."""
        return self.base_model

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode of adapters and backbone; the backbone's running statistics never move."""
        super().train(mode)
        self._hold_norms(mode)
        return self

    def _hold_norms(self, mode: bool) -> None:
        for path, module in frozen_norms(self).items():
            self.norm_modes[path] = mode
            module.training = False

    # ---- adding and removing ----

    def add_adapter(
        self,
        adapter_name: str,
        config: TunerConfig | PeftConfig,
        *,
        heads: Mapping[str, HeadSource] | None = None,
        memory_bank: Tensor | None = None,
    ) -> None:
        """Add an adapter beside the others; it is trainable and, unless it is the first, not active.

        `heads` gives it heads of its own shape: module name -> module, or a function that makes one.
        On any error the model is as it was.
        """
        self._check_new(adapter_name)
        adapter = self._build(PeftConfig.of(config), heads)
        if memory_bank is not None:
            self._bank_of(adapter, adapter_name).fill(memory_bank)
        self._attach(adapter_name, adapter)

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise AdapterError(
                f"adapter name {name!r} is not valid: at most 100 letters, digits, '_' and '-', the first not '-'"
            )
        if name in self.adapters._modules:
            raise AdapterError(f"there is an adapter '{name}' already: delete it first or choose another name")
        self._check_unmerged("adapters cannot be added")

    def _build(self, config: PeftConfig, heads: Mapping[str, HeadSource] | None) -> Adapter:
        return build_adapter(self._backbone(config), config, heads)

    def _backbone(self, config: PeftConfig, modules: Mapping[str, nn.Module] | None = None) -> Backbone:
        modules = backbone_modules(self) if modules is None else modules
        anatomy = self._anatomy_for(config)
        return Backbone(model=self.base_model, modules=modules, anatomy=anatomy, why_unknown=self.why_unknown)

    def _anatomy_for(self, config: PeftConfig) -> Anatomy | None:
        """The anatomy that a further adapter goes by: what its configuration states, or what is known."""
        stated = config.stated_anatomy
        if stated is None:
            return self.anatomy
        check_anatomy(self.base_model, stated)
        if not self.adapters or self.anatomy is None:
            return stated
        if not stated.agrees(self.anatomy):
            raise AdapterError(
                "the configuration states another anatomy than the one that the adapters of this model go by: leave it "
                "out, or begin with a model without adapters"
            )
        return self.anatomy

    def _attach(self, name: str, adapter: Adapter) -> None:
        anatomy = self._anatomy_for(adapter.config)
        if not self.frozen_from:
            self.anatomy = anatomy
            self._freeze_and_attach()
        elif anatomy != self.anatomy:  # the adapters so far, if any, did without one
            self.anatomy = anatomy
            detach_model(self)
            attach_model(self)
            for other in self.adapters:
                attach_sites(self, get_adapter(self, other))
        adapter.train(self.training)
        self.adapters._modules[name] = adapter
        self.unproven.add(name)
        attach_sites(self, adapter)
        if not self.default and len(self.adapters) == 1:
            self.set_adapter(name)

    def _freeze_and_attach(self) -> None:
        own = CHILD + "."
        parameters = [(n, p) for n, p in self.base_model.named_parameters() if not n.startswith(own)]
        self.frozen_from = {name: parameter.requires_grad for name, parameter in parameters}
        for _, parameter in parameters:
            parameter.requires_grad_(False)
        norms = frozen_norms(self)
        self.norm_modes = {path: module.training for path, module in norms.items()}
        for module in norms.values():
            module.training = False
        attach_model(self)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Combination = "linear",
        svd_rank: int | None = None,
    ) -> None:
        """Add a LoRA adapter that combines others at the same layers, each with a weight, which may be negative.

        "cat" is the weighted sum of their changes exactly, of the rank of all together; "svd" is the best approximation
        of it of rank `svd_rank` (default: the largest of theirs); "linear" adds up the factors, which is cheap, keeps
        the rank, and is rough. Modules of their own (heads) must be equal, since these do not add up.

        The new adapter is frozen and not active. On any error the model is as it was.
        """
        self._check_new(adapter_name)
        chosen = {name: get_adapter(self, name) for name in self._names(adapters)}
        self._attach(adapter_name, combine(chosen, weights, combination_type, svd_rank, self._backbone))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; the others stay as they are. If it was active, it no longer is.

        This thread or task lets go of what it used the adapter for, so that its memory is free at once.
        """
        adapter = self._adapter(adapter_name)
        self._check_unmerged("adapters cannot be deleted")
        del self.adapters._modules[adapter_name]
        self.unproven.discard(adapter_name)
        self.default = tuple(name for name in self.default if name != adapter_name)
        chosen = chosen_adapters(self)
        if chosen is not None:
            choose_adapters(self, tuple(name for name in chosen if name != adapter_name))
        forget(self)
        detach_sites(self, adapter, [get_adapter(self, other) for other in self.adapters])

    def unload(self) -> nn.Module:
        """Take all adapters off and return the backbone as it was: hooks, requires_grad and train flags too."""
        self._check_unmerged("the model cannot be unloaded")
        return self._detach()

    def _detach(self) -> nn.Module:
        base = self.base_model
        detach_model(self)
        for name, parameter in base.named_parameters():
            if name in self.frozen_from:
                parameter.requires_grad_(self.frozen_from[name])
        for path, mode in self.norm_modes.items():
            base.get_submodule(path).training = mode
        self.adapters = nn.ModuleDict()
        self.default, self.merged, self.frozen_from, self.norm_modes = (), {}, {}, {}
        choose_adapters(self, None)
        forget(self)
        base._modules.pop(CHILD, None)
        return base

    def _adapter(self, name: str) -> Adapter:
        if not isinstance(name, str) or name not in self.adapters._modules:
            known = ", ".join(f"'{other}'" for other in self.adapters) or "none"
            raise AdapterError(f"there is no adapter {name!r}; adapters: {known}")
        return get_adapter(self, name)

    def _names(self, names: str | Sequence[str] | None) -> tuple[str, ...]:
        if names is None:
            return tuple(self.adapters)
        chosen = (names,) if isinstance(names, str) else tuple(names)
        for name in chosen:
            self._adapter(name)
        if len(set(chosen)) != len(chosen):
            raise AdapterError(f"an adapter is named twice in {list(chosen)}")
        return chosen

    # ---- activation ----

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The adapters that a forward started here uses, in the order in which they act."""
        active = forward_module.active_adapters(self)
        gone = [name for name in active if name not in self.adapters._modules]
        return tuple(name for name in active if name not in gone)

    @property
    def active_adapter(self) -> str | tuple[str, ...]:
        """The name of the active adapter, or all names if there are several or none."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter, or several in this order, the active ones.

        It holds for this thread or task, and for every other that has not chosen for itself. What is trained does not
        change; see `train_adapter`.
        """
        names = self._names(adapter_name)
        self._check_unmerged("the active adapters cannot be changed")
        self.default = names
        choose_adapters(self, names)

    @contextmanager
    def use_adapter(self, adapter_name: str | Sequence[str]) -> Iterator[None]:
        """Within the block, and only in this thread or task, these adapters are active.

        Code compiled with `torch.compile` follows `set_adapter` and does not see this.
        """
        with self._chosen(self._names(adapter_name)):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block, and only in this thread or task, the model is the plain backbone."""
        with self._chosen(()):
            yield

    @contextmanager
    def _chosen(self, names: tuple[str, ...]) -> Iterator[None]:
        self._check_unmerged("the active adapters cannot be changed")
        before = chosen_adapters(self)
        choose_adapters(self, names)
        try:
            yield
        finally:
            choose_adapters(self, before)

    # ---- several adapters in one call ----

    def forward_tasks(self, inputs: Any, tasks: Sequence[str | None]) -> dict[str | None, Any]:
        """The outputs of several adapters for the same inputs, by name; None is the plain backbone.

        `inputs` is a tensor, a tuple of positional or a dict of named arguments of the model. What the frozen backbone
        computes for all of them alike, its stem and the second pass for priors, is computed once.
        """
        names = self._tasks(tasks)
        if len(set(names)) != len(names):
            raise AdapterError(f"a task is named twice in {list(names)}")
        args, kwargs = _arguments(inputs)
        with sharing(self, args, kwargs, 0):
            return {name: self._run(name, args, kwargs) for name in names}

    def forward_mixed(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], adapter_names: Sequence[str | None]
    ) -> Any:
        """What the model gives for a batch, each sample with its own adapter; None is the plain backbone.

        Each output equals that of its adapter alone. Adapters run one after another, each on its samples; the stem runs
        once, for the whole batch, and the second pass for priors once, for the samples that have one. Where outputs do
        not fit together, as those of heads of different widths, they are a list: for each sample what the model gives
        for it alone.
        """
        names = self._tasks(adapter_names)
        if any(module.training for module in (self, self.base_model)):
            raise AdapterError(
                "adapter_names is for inference: call model.eval() first, or train one adapter at a time"
            )
        given = dict(kwargs)
        batch = Batch.of(args, given, len(names))
        if len(set(names)) == 1:
            return self._run(names[0], args, given)
        device = next(self.base_model.parameters()).device
        groups = {
            name: torch.tensor([i for i, other in enumerate(names) if other == name], device=device)
            for name in dict.fromkeys(names)
        }
        asking = [name for name in groups if name is not None and get_adapter(self, name).asks_backbone]
        with sharing(self, args, given, batch.count) as whole:
            run_stem(self, whole)
            outputs = self._run_groups(whole, batch, {name: groups[name] for name in groups if name not in asking})
            if asking:
                rows = torch.cat([groups[name] for name in asking]).sort().values
                part, whole.rows = batch.part(rows), rows
                with sharing(self, part.args, part.kwargs, part.count) as shared:
                    own = {name: torch.searchsorted(rows, groups[name]) for name in asking}
                    outputs += [(rows[at], output) for at, output in self._run_groups(shared, part, own)]
        return batch.joined(outputs)

    def _run_groups(
        self, shared: Forward, batch: Batch, groups: Mapping[str | None, Tensor] | Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Any]]:
        """(samples, output) of adapters, each for its samples of a batch."""
        outputs: list[tuple[Tensor, Any]] = []
        for name, rows in groups.items():
            part, shared.rows = batch.part(rows), rows
            outputs.append((rows, self._run(name, part.args, part.kwargs)))
        return outputs

    def _tasks(self, names: Sequence[str | None]) -> tuple[str | None, ...]:
        if isinstance(names, str) or not names:
            raise AdapterError(f"name adapters in a list, None for the plain backbone; got {names!r}")
        self._check_unmerged("adapters cannot take turns")
        for name in names:
            if name is not None:
                self._adapter(name)
        return tuple(names)

    def _run(self, name: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self._chosen(() if name is None else (name,)):
            return self.base_model(*args, **kwargs)

    # ---- what is trained ----

    def train_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let the parameters of these adapters be trained."""
        self._set_requires_grad(adapter_name, True)

    def freeze_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Keep the parameters of these adapters as they are."""
        self._set_requires_grad(adapter_name, False)

    def _set_requires_grad(self, names: str | Sequence[str], value: bool) -> None:
        for name in self._names(names):
            for parameter in get_adapter(self, name).parameters():
                parameter.requires_grad_(value)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters of the model, adapters included."""
        parameters = {id(p): p for module in (self.base_model, self) for p in module.parameters()}.values()
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print the trainable parameters of each adapter by part, and their share of the model's."""
        print(self.trainable_parameters_report())

    def trainable_parameters_report(self) -> str:
        """The table that `print_trainable_parameters` prints."""
        rows: list[tuple[str, str, int]] = []
        for name in self.adapters:
            counts: Counter[str] = Counter()
            for label, parameter in self._labelled(get_adapter(self, name)):
                if parameter.requires_grad:
                    counts[label] += parameter.numel()
            rows += [(name, label, count) for label, count in counts.items()]
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        names = max([len(name) for name, _, _ in rows], default=0)
        labels = max([len(label) for _, label, _ in rows], default=0)
        lines = [f"{name:<{names}}  {label:<{labels}}  {count:>13,}" for name, label, count in rows]
        return "\n".join(
            [*lines, f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"]
        )

    @staticmethod
    def _labelled(adapter: Adapter) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter with the kind of thing that it belongs to."""
        own = dict(adapter.own_modules())
        for path, part in adapter.all_parts():
            for child, parameter in part.named_parameters():
                yield (
                    f"own module '{path}'" if path in own else f"{type(part).__name__}.{child.split('.')[0]}",
                    parameter,
                )
        for shared in adapter.shared_states():
            for child, parameter in shared.named_parameters():
                yield f"{type(shared).__name__}.{child.split('.')[0]}", parameter

    def get_layer_status(self) -> list[LayerStatus]:
        """One row for every module of the backbone that something is attached to."""
        found: dict[str, dict[str, nn.ModuleList]] = {}
        for name in self.adapters:
            for path, parts in get_adapter(self, name).sites():
                found.setdefault(path, {})[name] = parts
        merged = self.merged_adapters
        return [
            LayerStatus(
                name=path,
                module_type=type(self.base_model.get_submodule(path)).__name__,
                parts={name: tuple(type(part).__name__ for part in parts) for name, parts in by_name.items()},
                active_adapters=tuple(name for name in self.active_adapters if name in by_name),
                merged_adapters=tuple(name for name in merged if name in by_name),
                requires_grad={
                    name: any(p.requires_grad for p in parts.parameters()) for name, parts in by_name.items()
                },
                devices={
                    name: tuple(sorted({str(p.device) for p in parts.parameters()})) for name, parts in by_name.items()
                },
            )
            for path, by_name in found.items()
        ]

    def get_model_status(self) -> ModelStatus:
        """The state of the model as a whole."""
        trainable, total = self.get_nb_trainable_parameters()
        adapters = {name: get_adapter(self, name) for name in self.adapters}
        return ModelStatus(
            base_model_type=type(self.base_model).__name__,
            available_adapters=tuple(adapters),
            active_adapters=self.active_adapters,
            merged_adapters=self.merged_adapters,
            methods={name: tuple(tuner.method for tuner in a.config.tuners) for name, a in adapters.items()},
            requires_grad={name: any(p.requires_grad for p in a.parameters()) for name, a in adapters.items()},
            trainable_params=trainable,
            total_params=total,
            num_adapter_layers=len({path for a in adapters.values() for path, _ in a.sites()}),
        )

    # ---- merging ----

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        """The adapters that are folded into the backbone's weights."""
        return tuple(self.merged)

    def _check_unmerged(self, what: str) -> None:
        if self.merged:
            raise AdapterError(
                f"{what} while '{self.merged_adapters[0]}' is merged into the backbone: call unmerge() first"
            )

    def merge(self, adapter_name: str | None = None) -> None:
        """Fold an adapter (default: the active one) into the backbone's weights; `unmerge` restores them exactly.

        An error names what cannot be merged, and leaves everything as it was.
        """
        self._check_unmerged("no second adapter can be merged")
        name = self._single(adapter_name)
        adapter = get_adapter(self, name)
        for path, part in adapter.all_parts():
            if not part.mergeable:
                raise AdapterError(
                    f"adapter '{name}' cannot be merged: its {type(part).__name__} at '{path}' "
                    f"({adapter.config.tuners[part.tuner].method}) is not a change of the backbone's weights"
                )
        if any(adapter.shared_states()):
            raise AdapterError(f"adapter '{name}' cannot be merged: it has state that does not belong to a module")
        merged: list[tuple[Tensor, Tensor, str]] = []
        for path, part in adapter.all_parts():
            module = self.base_model.get_submodule(path)
            for own, value in part.weights(module).items():
                value = value.detach()
                if not bool(torch.isfinite(value).all()):
                    raise AdapterError(f"merging '{name}' would give '{path}.{own}' values that are not finite")
                merged.append((module.get_parameter(own), value, f"{path}.{own}"))
        names = [key for _, _, key in merged]
        twice = [key for key, count in Counter(names).items() if count > 1]
        if twice:
            raise AdapterError(f"adapter '{name}' cannot be merged: two of its parts change '{twice[0]}'")
        self.merged = {name: {key: tensor.detach().clone() for tensor, _, key in merged}}
        with torch.no_grad():
            for tensor, value, _ in merged:
                tensor.copy_(value)
        self.default = ()
        choose_adapters(self, ())

    def unmerge(self) -> None:
        """Take the merged adapter out of the backbone's weights, which are again what they were; it is active again."""
        if not self.merged:
            raise AdapterError("no adapter is merged")
        ((name, values),) = self.merged.items()
        with torch.no_grad():
            for key, value in values.items():
                self.base_model.get_parameter(key).copy_(value)
        self.merged = {}
        self.set_adapter(name)

    def merge_and_unload(self, adapter_name: str | None = None) -> nn.Module:
        """Fold an adapter into the backbone for good and return the backbone without hooks."""
        self.merge(adapter_name)
        return self._detach()

    def _single(self, name: str | None) -> str:
        if name is not None:
            self._adapter(name)
            return name
        if len(self.active_adapters) != 1:
            raise AdapterError(
                f"name one adapter: active are {list(self.active_adapters)}, present {list(self.adapters)}"
            )
        return self.active_adapters[0]

    # ---- losses ----

    def auxiliary_loss(self) -> Tensor:
        """What the methods of the last forward in this thread or task add to the training loss, 0 if nothing.

        It is the sum over all active adapters, each term weighted by its configuration. `torch.nn.DataParallel` runs
        forwards on threads of its own, and theirs are not seen here.
        """
        losses = auxiliary_losses(self)
        if losses:
            return torch.stack([loss.float() for loss in losses]).sum()
        return torch.zeros((), device=next(self.base_model.parameters()).device)

    # ---- memory bank ----

    def build_memory_bank(
        self,
        batches: Iterable[Any],
        *,
        to_inputs: Callable[[Any], Any] | None = None,
        size: int | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Fill the memory bank of an adapter (default: the active one) with features of training clouds.

        A batch is a tensor, or a tuple whose first item goes to the model and whose second, if it is a tensor of b
        integers, holds the labels; otherwise `to_inputs(batch)` gives the model's arguments: one argument, a tuple of
        positional or a dict of named ones. `size` reduces the bank to as many rows by k-means in each class; None: to
        as many as the configuration says.

        The features are those of the frozen backbone in eval mode, so the bank does not depend on what is trained.
        Under accelerate, or torch.distributed alone, each process goes through its own batches and all end with the
        same bank.
        """
        name = self._single(adapter_name)
        bank = self._bank_of(get_adapter(self, name), name)
        if size is not None and (type(size) is not int or size < 1):
            raise PointPeftError(f"size is {size!r}; allowed: 1 or more, or None")
        ranks = _ranks()
        features: list[Tensor] = []
        labels: list[Tensor] = []
        progress = tqdm(  # type: ignore[no-untyped-call]
            batches, desc="memory bank", unit="batch", disable=ranks is not None and torch.distributed.get_rank() > 0
        )
        with eval_mode(self.base_model.modules()):
            for batch in progress:
                tokens = self._features(_model_inputs(batch, to_inputs), bank.source, name)
                features.append(bank.query(tokens).float().cpu())
                label = _labels(batch, len(features[-1]))
                if label is not None:
                    labels.append(label.cpu())
        if ranks is not None:
            gathered: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(gathered, (features, labels))
            features = [entry for part, _ in gathered for entry in part]
            labels = [entry for _, part in gathered for entry in part]
        if not features:
            raise AdapterError("build_memory_bank got no batches")
        rows = torch.cat(features)
        classes = torch.cat(labels) if sum(map(len, labels)) == len(rows) else None
        # Sorted rows do not depend on the order of batches and processes, and a cloud seen twice counts once.
        rows, member = torch.unique(rows, dim=0, return_inverse=True)
        if classes is not None:
            classes = torch.zeros(len(rows), dtype=classes.dtype).scatter_(0, member, classes)
        bank.fill(rows, classes, size)

    def _bank_of(self, adapter: Adapter, name: str) -> Bank:
        for shared in adapter.shared_states():
            if shared.bank is not None:
                return shared.bank
        methods = ", ".join(tuner.method for tuner in adapter.config.tuners)
        raise AdapterError(
            f"adapter '{name}' ({methods}) has no memory bank: its configuration asks for none, or no block that is as "
            "wide as the features has prompts"
        )

    def _features(self, inputs: tuple[tuple[Any, ...], dict[str, Any]], source: str, adapter: str) -> Tensor:
        args, kwargs = inputs
        with torch.no_grad(), self._chosen(()):
            forward = open_forward(self, args, kwargs)
            try:
                return self.backbone_tokens(forward, source, adapter)
            finally:
                close_forward(forward)

    # ---- files ----

    def save_pretrained(
        self,
        save_directory: str | Path,
        adapter_name: str | Sequence[str] | None = None,
        *,
        format: Format = "auto",
    ) -> None:
        """Write an adapter into a folder: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

        Without a name all adapters are written: a single one, or the one named "default", into the folder itself,
        the others into a subfolder of their name. Each is replaced as a whole or not at all. No network is touched.

        An adapter of LoRA alone is written so that the PEFT package reads it too, unless it has something that PEFT's
        `format` cannot say: "peft" makes that an error, which names it; "point_peft" never writes PEFT's format.
        """
        self._save(Path(save_directory), self._names(adapter_name), format, lambda about: about)

    def _save(self, folder: Path, names: Sequence[str], format: Format, said: Callable[[About], About]) -> None:
        """Write adapters; `said` adds to what their cards say."""
        if format not in get_args(Format):
            raise PointPeftError(f"format is {quoted(format)}; allowed: {', '.join(map(repr, get_args(Format)))}")
        if not self.adapters:
            raise AdapterError("there is no adapter to save")
        self._check_unmerged("adapters cannot be saved")
        if not names:
            raise AdapterError("save_pretrained got an empty list of adapters: name at least one")
        modules = backbone_modules(self)
        reasons = {
            name: f'format="{format}"' if format == "point_peft" else why_not(get_adapter(self, name), modules)
            for name in names
        }
        for name, reason in reasons.items():
            if format == "peft" and reason is not None:
                raise AdapterError(f"adapter '{name}' cannot be saved in PEFT's format: {reason}")
        for name, reason in reasons.items():
            own = folder if len(names) == 1 or name == "default" else folder / name
            adapter = get_adapter(self, name)
            config, record = self._file_config(adapter, modules), None
            if reason is None:
                config, record = to_peft(adapter, modules), config
            write_folder(own, config, adapter.tensors(), self._card(adapter, said), record)

    def _file_config(self, adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {
            "peft_type": PEFT_TYPE,
            "format_version": FORMAT_VERSION,
            "point_peft_version": __version__,
            **self._stated(adapter.config).to_json(),
            "heads": {path: describe_head(module) for path, module in adapter.own_modules()},
            "adapted_modules": sorted(path for path, _ in adapter.sites()),
            "base_fingerprint": self._fingerprint(adapter, adapter.tensors(), modules),
        }

    def _stated(self, config: PeftConfig) -> PeftConfig:
        """The configuration with the anatomy in it, unless the model alone tells it wherever the file is read."""
        alone = (
            self.anatomy is None or config.stated_anatomy is not None or self.anatomy == known_anatomy(self.base_model)
        )
        return config if alone else replace(config, anatomy=self.anatomy)

    @staticmethod
    def _fingerprint(adapter: Adapter, own: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The fingerprint of what the adapter takes from the base: all but the tensors that it has of its own."""
        own, inside = set(own), tuple(path + "." for path in adapter.saved)
        tensors: dict[str, Tensor] = {}
        for path, module in modules.items():
            kept = (item for item in module._buffers.items() if item[0] not in module._non_persistent_buffers_set)
            for name, tensor in (*module._parameters.items(), *kept):
                full = f"{path}.{name}" if path else name
                if tensor is not None and full not in own and not full.startswith(inside):
                    tensors[full] = tensor
        return fingerprint_module.fingerprint(tensors)

    def _card(self, adapter: Adapter, said: Callable[[About], About]) -> Card:
        """The README of an adapter's folder; where what is there cannot be read, it stays."""

        def over(existing: str | None, size: int) -> str:
            new = render(said(self._about(adapter, size)))
            try:
                return card.kept(existing, new)
            except PointPeftError as error:
                warnings.warn(f"{CARD_FILE} is left as it is: {error}", stacklevel=2)
                return existing or new

        return over

    def _about(self, adapter: Adapter, size: int) -> About:
        """What the card of an adapter says, its file having `size` bytes."""
        parameters = sum(parameter.numel() for parameter in adapter.parameters())
        own = CHILD + "."
        base = sum(p.numel() for name, p in self.base_model.named_parameters() if not name.startswith(own))
        sites = [self.base_model.get_submodule(path) for path, _ in adapter.sites() if path not in adapter.saved]
        return About(
            methods={tuner.method: citation(tuner.method) for tuner in adapter.config.tuners},
            base_kind=type(self.base_model).__name__,
            base_model=adapter.config.base_model_name_or_path,
            revision=adapter.config.revision,
            parameters=parameters,
            all_parameters=base + parameters,
            size=size,
            modules=Counter(type(module).__name__ for module in sites),
            heads=adapter.saved,
        )

    def push_to_hub(
        self,
        repo_id: str,
        adapter_name: str | Sequence[str] | None = None,
        *,
        subfolder: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: Token = None,
        revision: str | None = None,
        create_pr: bool = False,
        format: Format = "auto",
        results: Mapping[str, Mapping[str, float]] | None = None,
        datasets: Sequence[str] = (),
        license: str | None = None,
        pipeline_tag: str | None = None,
        tags: Sequence[str] = (),
    ) -> str:
        """Push adapters to a repository of the Hub, in one commit, and return its address, or that of the pull request.

        They lie there as `save_pretrained` lays them out, or within `subfolder`, with one model card for all at the
        root. The repository is made if need be, `private` if so asked for, and so is the branch `revision`. Other files
        of the repository stay, and so does what its owner wrote into the card.

        The card says what is known, and what you add: `results` (dataset -> metric -> value), `datasets`, `license`,
        `pipeline_tag`, further `tags`.
        """
        names = self._names(adapter_name)
        where = [subfolder] if subfolder else []
        check_names(repo_id, revision, subfolder)

        def said(about: About) -> About:
            return replace(
                about,
                results=results or {},
                datasets=tuple(datasets),
                license=license,
                pipeline_tag=pipeline_tag,
                tags=tuple(tags),
            )

        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), names, format, said)
            files = {
                "/".join([*where, *path.relative_to(folder).parts]): path.read_bytes()
                for path in sorted(Path(folder).rglob("*"))
                if path.is_file()
            }
        return push(
            for_repository(files, repo_id),
            repo_id,
            commit_message=commit_message or f"Upload {', '.join(names)} with point_peft {__version__}",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            merge_card=card.merged,
        )

    def load_adapter(
        self,
        source: str | Path,
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
        heads: Mapping[str, HeadSource] | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Add the adapter of a folder, or of a repository of the Hub; it is not made active unless it is the only one.

        A folder may be one that the PEFT package has written, of LoRA. Everything is checked first: names, shapes,
        types and values of all tensors, and that the backbone is the one that the adapter was trained on, which PEFT's
        files do not tell. On any error the model is as it was. `heads` gives modules of classes that a
        file cannot describe. All that follows but `subfolder` is for the Hub.
        """
        self._check_new(adapter_name)
        folder = _folder_of(
            source,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        stated = self._read(folder)
        adapter = self._restore(stated, heads)
        adapter.requires_grad_(is_trainable)
        self._attach(adapter_name, adapter)

    def swap_adapter_(
        self,
        source: str | Path,
        adapter_name: str = "default",
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Give an adapter the values of another, of a folder or of a repository of the Hub, in the tensors that it has.

        No tensor is made or moved, so code compiled with `torch.compile` is not compiled again and an optimizer goes on
        with the new values. What is active, what is trained and in which mode stays. The result is that of
        `load_adapter`, which also says what is checked; what is not built alike (other methods, fields, heads, modules,
        shapes, types, rows of a bank) is refused. On any error model and adapter are as they were.

        All values are written in one step, but a forward that runs meanwhile in another thread reads them one by one,
        and may see some old and some new. Where an adapter is in use, load the other beside it and call `set_adapter`.
        """
        adapter = self._adapter(adapter_name)
        self._check_unmerged("adapters cannot be swapped")
        folder = _folder_of(
            source,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        stated = self._read(folder)
        reason = self._why_no_swap(stated, adapter)
        if reason is not None:
            raise AdapterFileError(
                f"the adapter in '{folder}' cannot be swapped into '{adapter_name}': {reason}; load_adapter adds it as "
                "another adapter"
            )
        overwrite_tensors(stated.files.tensors, adapter.tensors())
        adapter.config = stated.config
        for shared in adapter.shared_states():
            shared.check(self.base_model)

    def _why_no_swap(self, stated: _Stated, adapter: Adapter) -> str | None:
        """What keeps the values of files from taking the places of an adapter's; None if nothing does."""
        reason = self._difference(stated, adapter)
        if reason is not None:
            return reason
        source, tensors = stated.files.tensors, adapter.tensors()
        check_tensors(source, tensors, adapter.free_rows(), f"its {TENSOR_FILE}")
        keep_types = not stated.files.foreign and self._is_same_base(stated, adapter, tensors)
        return why_not_in_place(source, tensors, keep_types=keep_types)

    def _difference(self, stated: _Stated, adapter: Adapter) -> str | None:
        """What the files of an adapter say that another is not; None: the two differ in their tensors at most."""
        modules = stated.backbone.modules
        if stated.files.foreign:
            reason = why_not(adapter, modules)
            if reason is not None:
                return f"PEFT has written it, and what is there is none of PEFT's: {reason}"
            described = from_peft(to_peft(adapter, modules), modules)
            there = PeftConfig.from_json({name: value for name, value in described.items() if name != "heads"})
            heads = described["heads"]
        else:
            there, heads = adapter.config, {path: describe_head(module) for path, module in adapter.own_modules()}
        reason = difference(stated.config, there)
        if reason is not None:
            return reason
        for path in sorted({*stated.heads, *heads}):
            if stated.heads.get(path) != heads.get(path):
                return f"its own '{path}' is {quoted(stated.heads.get(path))}, there it is {quoted(heads.get(path))}"
        sites = sorted(path for path, _ in adapter.sites())
        return None if stated.adapted in (None, sites) else f"it adapts {_differing(sites, stated.adapted)} otherwise"

    def _read(self, folder: Path) -> _Stated:
        """Read the files of an adapter and check what can be checked without making it."""
        files = read_folder(folder)
        modules = backbone_modules(self)
        try:
            about = dict(peft_format.described(files, modules))
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
            backbone = self._backbone(config, modules)
        except PointPeftError as error:
            raise AdapterFileError(f"the adapter in '{folder}' does not fit this model: {error}") from error
        for path in heads:
            if not path or path not in modules:
                near = nearest_names(path, list(modules))
                raise AdapterFileError(f"the adapter has its own {quoted(path)}, this model has not; nearest: {near}")
        return _Stated(
            folder=folder,
            files=files,
            config=config,
            heads=heads,
            adapted=adapted,
            fingerprint=fingerprint,
            backbone=backbone,
        )

    def _is_same_base(self, stated: _Stated, adapter: Adapter, tensors: Mapping[str, Tensor]) -> bool:
        """Refuse another backbone than the one that files were made for; warn if it may be another, in other types."""
        kind = type(self.base_model).__name__
        actual = self._fingerprint(adapter, tensors, stated.backbone.modules)
        warning = check_fingerprint(stated.fingerprint, actual, kind)
        if warning is not None:
            warnings.warn(warning, stacklevel=4)
        return warning is None

    def _restore(self, stated: _Stated, heads: Mapping[str, HeadSource] | None) -> Adapter:
        """The adapter that files hold; `heads` as in `load_adapter`."""
        given = {
            path: make_head(source, path, stated.backbone)
            for path, source in match_heads(heads, list(stated.heads)).items()
        }
        try:
            adapter, tensors = self._checked(stated, given)
        except AdapterFileError:
            raise
        except PointPeftError as error:
            raise AdapterFileError(f"the adapter in '{stated.folder}' does not fit this model: {error}") from error
        if stated.files.foreign:
            # PEFT says nothing of the base, and keeps the adapter in another type than that.
            reason, keep_types = why_not(adapter, stated.backbone.modules), False
            if reason is not None:
                raise AdapterFileError(
                    f"the adapter in '{stated.folder}' is not what PEFT makes for this model: {reason}"
                )
        else:
            keep_types = self._is_same_base(stated, adapter, tensors)
        like = floating_parameter(stated.backbone.modules)
        device = torch.device("cpu") if like is None else like.device
        copy_tensors(stated.files.tensors, adapter, tensors, device, keep_types=keep_types)
        for shared in adapter.shared_states():
            try:
                shared.check(self.base_model)
            except AdapterError as error:
                raise AdapterFileError(f"the adapter in '{stated.folder}': {error}") from error
        return adapter

    @staticmethod
    def _checked(stated: _Stated, given: Mapping[str, nn.Module]) -> tuple[Adapter, Mapping[str, Tensor]]:
        """The adapter that a file asks for, and its tensors, once they are known to be those of the file.

        What a file asks for may be of any size; so it is first made without memory.
        """
        backbone, own = stated.backbone, dict[str, HeadSource](given)
        for path, description in stated.heads.items():
            if path not in own and description != describe_head(clean_copy(backbone.modules[path])):
                own[path] = partial(build_head, description, path)
        planned = plan_adapter(backbone, stated.config, own, list(stated.heads))
        sites = sorted(path for path, _ in planned.sites())
        if stated.adapted not in (None, sites):
            differing = _differing(sites, stated.adapted)
            raise AdapterFileError(f"the adapter was made for modules {differing} otherwise than this model has them")
        where = f"its {TENSOR_FILE}"
        tensors = planned.tensors()
        check_tensors(stated.files.tensors, tensors, planned.free_rows(), where)
        if planned.holds_only(tensors):
            return planned, tensors  # the file's tensors take the places of those without memory
        adapter = build_adapter(backbone, stated.config, own, list(stated.heads))
        return adapter, adapter.tensors()


@dataclass(frozen=True, kw_only=True)
class _Stated:
    """What the files of an adapter say, for the backbone of a model, which it fits as far as could be told."""

    folder: Path
    files: AdapterFiles
    config: PeftConfig
    heads: Mapping[str, Any]
    """The descriptions of the modules that the adapter has to itself, by path."""
    adapted: list[Any] | None
    """The paths of its sites; None where PEFT does not say."""
    fingerprint: Any
    backbone: Backbone


def _differing(sites: Sequence[str], stated: Sequence[Any]) -> str:
    """The first of the modules that only one of two lists names."""
    found = sorted(set(sites) ^ {str(path) for path in stated})
    return ", ".join(map(quoted, found[:3])) or "named twice"


class PointPeftModel(AdapterSet):
    """A frozen backbone with adapters. Made by `get_peft_model` or `from_pretrained`.

    What it does not have itself is looked up on the backbone: `model.forward_features(x)` runs the adapted backbone's.
    """

    def _hold(self, model: nn.Module) -> None:
        self.base_model = model

    def forward(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Run the backbone with the active adapters; arguments and result are the backbone's.

        `adapter_names` names an adapter for each sample instead, None for the plain backbone; see `forward_mixed`.
        """
        before, reads = opened(self), depth()
        try:
            if adapter_names is not None:
                return self.forward_mixed(args, kwargs, adapter_names)
            if self.__dict__.get("_is_replica", False):
                with forward_module.replica(self):
                    return self.base_model(*args, **kwargs)
            return self.base_model(*args, **kwargs)
        finally:
            # Hooks end a forward, but not one that Ctrl-C ends.
            reopen(self, before)
            unwind(reads)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "_modules" not in self.__dict__:
                raise
            found = getattr(self.base_model, name)
        if inspect.ismethod(found) and found.__self__ is self.base_model:
            return _Method(self, name)
        return found

    @staticmethod
    def from_pretrained(
        model: nn.Module,
        source: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        heads: Mapping[str, HeadSource] | None = None,
        example_inputs: Any = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> PointPeftModel:
        """Adapt a backbone, in place, with the adapter of a folder or of a repository of the Hub ("owner/name").

        On any error the backbone is as it was. See `load_adapter`.
        """
        _check_plain(model)
        peft_model = PointPeftModel(model, _anatomy(model, example_inputs))
        peft_model.load_adapter(
            source,
            adapter_name,
            is_trainable=is_trainable,
            heads=heads,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return peft_model


class _Method:
    """A method of the backbone, run as a forward of the adapted model."""

    def __init__(self, root: PointPeftModel, name: str) -> None:
        self.root = root
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = open_forward(self.root, args, kwargs)
        forward.method = self.name
        try:
            output = getattr(self.root.base_model, self.name)(*args, **kwargs)
        finally:
            close_forward(forward)
        if torch.is_grad_enabled():
            mark(forward, output)
        return output


def get_peft_model(
    model: nn.Module,
    config: TunerConfig | PeftConfig,
    adapter_name: str = "default",
    *,
    example_inputs: Any = None,
    memory_bank: Tensor | None = None,
    heads: Mapping[str, HeadSource] | None = None,
) -> PointPeftModel:
    """Freeze a backbone and give it a trainable adapter. The given model is changed in place.

    `example_inputs` (a tensor, a tuple of positional or a dict of named arguments) lets one forward be traced, for a
    model that no preset describes, or to verify what a preset says. `memory_bank` (rows, c) is the bank of Point-PEFT,
    if it is at hand. `heads` gives the adapter heads of its own shape: module name -> module, or a function that makes
    one.

    On any error the model is as it was, bit for bit.
    """
    _check_plain(model)
    peft_model = PointPeftModel(model, _anatomy(model, example_inputs))
    peft_model.add_adapter(adapter_name, config, heads=heads, memory_bank=memory_bank)
    return peft_model


def inject_adapter(
    model: M,
    config: TunerConfig | PeftConfig,
    adapter_name: str = "default",
    *,
    example_inputs: Any = None,
    memory_bank: Tensor | None = None,
    heads: Mapping[str, HeadSource] | None = None,
) -> M:
    """Like `get_peft_model`, for a model that keeps its own class and forward; returns that model.

    Its adapters are its child `point_peft` (an `AdapterSet`), with all that can be done to them; a further call adds a
    further adapter. The model's own tensors keep their names; a checkpoint of the backbone alone still loads.
    """
    held = model._modules.get(CHILD)
    if isinstance(held, AdapterSet):
        held.add_adapter(adapter_name, config, heads=heads, memory_bank=memory_bank)
        return model
    _check_plain(model)
    if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise AdapterError(f"a {type(model).__name__} would run its adapters as one of its layers: use get_peft_model")
    adapters = AdapterSet(model, _anatomy(model, example_inputs))
    adapters.add_adapter(adapter_name, config, heads=heads, memory_bank=memory_bank)
    model._modules[CHILD] = adapters
    return model


def describe(model: nn.Module, *example_inputs: Any) -> Anatomy:
    """What the library understands of a backbone; `str()` of the result is readable.

    Without example inputs only what structure and presets tell; with them, a forward is traced, which also verifies
    what a preset says.
    """
    anatomy = _anatomy(model, example_inputs or None)
    if isinstance(anatomy, AnatomyError):
        raise anatomy
    return anatomy


def _anatomy(model: nn.Module, example_inputs: Any) -> Anatomy | AnatomyError:
    """What is known of a model, or why nothing is."""
    known = known_anatomy(model)
    if example_inputs is None:
        kind = type(model).__name__
        return known or AnatomyError(
            f"no preset describes {kind}: pass example_inputs=(...), two or more clouds, to let one forward be traced"
        )
    args, kwargs = _arguments(example_inputs)
    try:
        traced = trace(model, args, kwargs)
    except AnatomyError as error:
        return known or error
    return traced if known is None else verified(known, traced)


def _folder_of(
    source: str | Path,
    *,
    subfolder: str | None,
    revision: str | None,
    token: Token,
    cache_dir: str | Path | None,
    local_files_only: bool,
    force_download: bool,
) -> Path:
    """Where the files of an adapter lie: a folder that is there, or what is downloaded from the Hub."""
    if isinstance(source, str) and not Path(source).exists() and is_repo_id(source):
        return download(
            source,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    if revision is not None or force_download:
        raise PointPeftError(f"revision and force_download are for repositories of the Hub; '{source}' is a path")
    return Path(source) / subfolder if subfolder else Path(source)


def _check_plain(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PointPeftError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, AdapterSet):
        raise AdapterError("the model is adapted already: use add_adapter")
    for path, module in model.named_modules():
        if SITE in module.__dict__ or isinstance(module, AdapterSet):
            raise AdapterError(
                f"'{path or type(model).__name__}' is part of an adapted model already: use its add_adapter"
            )


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _model_inputs(batch: Any, to_inputs: Callable[[Any], Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if to_inputs is not None:
        return _arguments(to_inputs(batch))
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return (batch[0],), {}
    raise AdapterError(
        f"a batch must be a tensor or a tuple that begins with one, not {type(batch).__name__}: pass "
        "to_inputs=function that turns a batch into the model's arguments"
    )


def _ranks() -> int | None:
    """The number of processes that work together, None if this one is alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise AdapterError(
            f"this is one of {launched} processes, but torch.distributed is not initialised, so they would end with "
            "different banks: create the accelerate.Accelerator (or call init_process_group) first"
        )
    return None


def _labels(batch: Any, count: int) -> Tensor | None:
    """The labels of a batch: a second item that is a tensor of `count` integers."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        return None
    labels = batch[1].reshape(-1)
    return labels if len(labels) == count and not labels.is_floating_point() else None
