"""Groups of trainable parameters for an optimizer: who learns how fast, and what decays.

Heads begin at random and prompts small, so they may learn at other rates than what changes a pre-trained backbone.
Weight decay pulls to zero, which is where a weight matrix does no harm; a gain, a place in space or a token has no
reason to be there.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from point_peft.adapting.adapter import Adapter
from point_peft.anatomy.description import Anatomy
from point_peft.anatomy.structure import is_norm
from point_peft.config import require
from point_peft.errors import AdapterError
from point_peft.matching import match_names

NO_DECAY = ", no decay"
HEADS, PROMPTS, ADAPTERS, BACKBONE = "heads", "prompts", "adapters", "backbone"
ORDER = (HEADS, HEADS + NO_DECAY, PROMPTS, ADAPTERS, ADAPTERS + NO_DECAY, BACKBONE, BACKBONE + NO_DECAY)
"""The names of groups in the order in which they are given. What is trained of the base itself is "backbone"."""
Grouped = tuple[str, nn.Parameter]
"""A parameter and the name of its group."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of heads, prompts and the rest, and the weight decay of what decays; None is `lr`."""

    lr: float
    head_lr: float | None = None
    prompt_lr: float | None = None
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr", "prompt_lr", "weight_decay"):
            value = getattr(self, name)
            optional = value is None and name in ("head_lr", "prompt_lr")
            number = isinstance(value, (int, float)) and 0 <= value < float("inf")
            require(optional or number, self, name, "a finite number, 0 or more")

    def of(self, group: str) -> float:
        """The learning rate of a group."""
        own = self.head_lr if group.startswith(HEADS) else self.prompt_lr if group == PROMPTS else None
        return self.lr if own is None else own


def adapter_groups(
    base: nn.Module, adapters: Iterable[Adapter], anatomy: Anatomy | None, rates: Rates
) -> list[dict[str, Any]]:
    """The groups of an adapted model: of all adapters that are trained, and of the base, if it is."""
    found = [grouped for adapter in adapters for grouped in _of_adapter(adapter)]
    return _groups([*found, *_of_base(base, () if anatomy is None else anatomy.heads, anatomy)], rates)


def parameter_groups_of(
    model: nn.Module, heads: Sequence[str], rates: Rates, anatomy: Anatomy | None = None
) -> list[dict[str, Any]]:
    """The same of a plain model, as for full fine-tuning; `heads` are names of modules, each of which must exist.

    Its tokens are what the anatomy says, and every parameter that a module holds by itself and that is no weight.
    """
    paths = match_names(list(heads), [path for path, _ in model.named_modules()], field="heads")
    return _groups(list(_of_base(model, paths, anatomy)), rates)


def _of_adapter(adapter: Adapter) -> Iterator[Grouped]:
    for path, part in adapter.all_parts():
        whole = part.own_module is not None
        kind = HEADS if whole and path in adapter.saved else ADAPTERS
        yield from _of_owner(part, part.token_parameters, kind, whole=whole)
    for state in adapter.shared_states():
        yield from _of_owner(state, state.token_parameters, ADAPTERS, whole=False)


def _of_owner(owner: nn.Module, tokens: Container[str], kind: str, *, whole: bool) -> Iterator[Grouped]:
    """Those of a part or state; of a module of the backbone that is trained `whole`, only its weights decay."""
    for name, holder, parameter in _held(owner):
        decays = _decays(name, holder, parameter) and not (whole and _is_raw(name))
        yield PROMPTS if name in tokens else kind if decays else kind + NO_DECAY, parameter


def _of_base(base: nn.Module, heads: Iterable[str], anatomy: Anatomy | None) -> Iterator[Grouped]:
    prefix = {parameter.name for parameter in (() if anatomy is None else anatomy.prefix_parameters)}
    in_heads = {id(parameter) for path in heads for parameter in base.get_submodule(path).parameters()}
    for name, holder, parameter in _held(base):
        kind = HEADS if id(parameter) in in_heads else BACKBONE
        decays = _decays(name, holder, parameter)
        if name in prefix or (kind == BACKBONE and decays and _is_raw(name)):
            yield PROMPTS, parameter
        else:
            yield kind if decays and not _is_raw(name) else kind + NO_DECAY, parameter


def _held(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, module that holds it, parameter) of every parameter, under each of its names."""
    for path, holder in module.named_modules(remove_duplicate=False):
        for name, parameter in holder._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, holder, parameter


def _is_raw(name: str) -> bool:
    """Tell a parameter that a module holds for itself, as a token, from the weight of a layer."""
    return "weight" not in name.rpartition(".")[2]


def _decays(name: str, holder: nn.Module, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay is for it: not for norms, nor for one value, or one a channel, of whatever shape."""
    vector = parameter.ndim <= 1 or (_is_raw(name) and max(parameter.shape) == parameter.numel())
    return not vector and not is_norm(holder)


def _groups(found: Sequence[Grouped], rates: Rates) -> list[dict[str, Any]]:
    """The groups that are not empty, in order, each parameter in the first that claims it."""
    params: dict[str, list[nn.Parameter]] = {group: [] for group in ORDER}
    known: set[int] = set()
    for group, parameter in found:
        if parameter.requires_grad and id(parameter) not in known:
            known.add(id(parameter))
            params[group].append(parameter)
    if not known:
        raise AdapterError("no parameter is trainable, so there is nothing to optimize: call train_adapter first")
    return [
        {
            "params": held,
            "lr": rates.of(group),
            "weight_decay": 0.0 if group == PROMPTS or group.endswith(NO_DECAY) else rates.weight_decay,
            "name": group,
        }
        for group, held in params.items()
        if held
    ]
