"""The state of an adapted model: what is attached where, what is active, what is trained."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.heads import frozen_heads
from point_peft.anatomy.description import Anatomy

Adapters = Mapping[str, Adapter]


@dataclass(frozen=True, kw_only=True)
class LayerStatus:
    """The state of one module of the backbone that something is attached to."""

    name: str
    module_type: str
    parts: Mapping[str, tuple[str, ...]]
    """Adapter -> the kinds of its parts here."""
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    unproven_adapters: tuple[str, ...]
    """Those whose parts here have not run in any forward, but for compiled ones, which do not tell."""
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


def layer_status(
    base: nn.Module, adapters: Adapters, active: Sequence[str], merged: Sequence[str]
) -> list[LayerStatus]:
    sites: dict[str, dict[str, nn.ModuleList]] = {}
    for name, adapter in adapters.items():
        for path, parts in adapter.sites():
            sites.setdefault(path, {})[name] = parts
    return [
        LayerStatus(
            name=path,
            module_type=type(base.get_submodule(path)).__name__,
            parts={name: tuple(type(part).__name__ for part in parts) for name, parts in here.items()},
            active_adapters=tuple(name for name in active if name in here),
            merged_adapters=tuple(name for name in merged if name in here),
            unproven_adapters=tuple(name for name in here if path in adapters[name].silent),
            requires_grad={name: _is_trained(parts) for name, parts in here.items()},
            devices={name: tuple(sorted({str(p.device) for p in parts.parameters()})) for name, parts in here.items()},
        )
        for path, here in sites.items()
    ]


def model_status(base: nn.Module, adapters: Adapters, active: Sequence[str], merged: Sequence[str]) -> ModelStatus:
    trainable, total = count_parameters(base, adapters)
    return ModelStatus(
        base_model_type=type(base).__name__,
        available_adapters=tuple(adapters),
        active_adapters=tuple(active),
        merged_adapters=tuple(merged),
        methods={name: tuple(tuner.method for tuner in a.config.tuners) for name, a in adapters.items()},
        requires_grad={name: _is_trained(adapter) for name, adapter in adapters.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len({path for adapter in adapters.values() for path, _ in adapter.sites()}),
    )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def count_parameters(base: nn.Module, adapters: Adapters) -> tuple[int, int]:
    parameters = {id(p): p for module in (base, *adapters.values()) for p in module.parameters()}.values()
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def trainable_parameters_report(base: nn.Module, adapters: Adapters, anatomy: Anatomy | None) -> str:
    counts: Counter[tuple[str, str]] = Counter()
    for name, adapter in adapters.items():
        for label, parameter in _labelled(adapter):
            if parameter.requires_grad:
                counts[name, label] += parameter.numel()
    trainable, total = count_parameters(base, adapters)
    share = 100 * trainable / total if total else 0.0
    names = max([len(name) for name, _ in counts], default=0)
    labels = max([len(label) for _, label in counts], default=0)
    lines = [f"{name:<{names}}  {label:<{labels}}  {count:>13,}" for (name, label), count in counts.items()]
    for name, adapter in adapters.items():
        left = {
            "no pre-training fills": frozen_heads(anatomy, base, adapter),
            "some pre-trainings leave out": _frozen_tokens(anatomy, adapter),
        }
        lines += [f"{name:<{names}}  {choice}" for choice in adapter.choices]
        lines += [f"{name:<{names}}  frozen, and {why}: {', '.join(paths)}" for why, paths in left.items() if paths]
    return "\n".join([*lines, f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"])


def _frozen_tokens(anatomy: Anatomy | None, adapter: Adapter) -> list[str]:
    """Prefix tokens and their positions that an adapter neither trains nor keeps."""
    own = {name for state in adapter.shared_states() for name in (*state.tuned_tokens, *state.kept_tokens)}
    prefix = () if anatomy is None else anatomy.prefix_parameters
    return [parameter.name for parameter in prefix if parameter.name not in own]


def _labelled(adapter: Adapter) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with the kind of thing that it belongs to."""
    own = dict(adapter.own_modules())
    for path, part in adapter.all_parts():
        for child, parameter in part.named_parameters():
            kind = f"own module '{path}'" if path in own else f"{type(part).__name__}.{child.split('.')[0]}"
            yield kind, parameter
    for shared in adapter.shared_states():
        for child, parameter in shared.named_parameters():
            yield f"{type(shared).__name__}.{child.split('.')[0]}", parameter
