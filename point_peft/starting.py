"""Starts from data and from weights for a fresh adapter, instead of random ones.

F. Paischer, L. Hauzenberger, T. Schmied, B. Alkin, M. P. Deisenroth, S. Hochreiter: "Parameter Efficient Fine-tuning
via Explained Variance Adaptation" (EVA), NeurIPS 2025, https://arxiv.org/abs/2410.07170

A layer W_down that leads into few channels sees x (c,). Over all tokens of some batches, with mean m and covariance

    C = E[(x - m)(x - m)^T] = V diag(v) V^T,    W_down <- the first r columns of V

so that what is learnt first acts along the directions in which the task's clouds differ. The share v_i / sum(v) tells
how much of its layer's variance a direction explains. LoRA's ranks are redistributed: of the first `rho` r directions
of every layer, as many as there were ranks in all are kept, those with the largest shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.adapter_set import AdapterSet
from point_peft.adapting.adapter import Adapter
from point_peft.adapting.adding import backbone_for, check_unmerged, replace_adapter, single_adapter
from point_peft.adapting.mixed import choosing
from point_peft.adapting.planning import build_adapter
from point_peft.adapting.site import CHILD, backbone_modules
from point_peft.bank import model_inputs, of_all_processes, processes
from point_peft.config import PeftConfig
from point_peft.errors import AdapterError, PointPeftError, quoted
from point_peft.parts.base import Narrow
from point_peft.running.second import eval_mode

Start = Literal["eva", "pissa"]
K = TypeVar("K")


def initialise(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    how: Start = "eva",
    *,
    to_inputs: Callable[[Any], Any] | None = None,
    adapter_name: str | None = None,
    rho: float = 2.0,
) -> None:
    """Let a fresh adapter (default: the active one) start from data or from the weights that it changes.

    "eva": its layers that lead into few channels, LoRA's A and the down-projections of bottlenecks and of Point-PEFT,
    become principal directions of what they get in one pass over `batches`, as `build_memory_bank` takes them, in eval
    mode and without gradients. LoRA's ranks are redistributed, up to `rho` times r at a layer and possibly none at
    others; `rho=1` keeps them. The sum of the ranks and the scale of each change stay.

    "pissa": LoRA starts from the principal factors of the weights, as `LoraConfig(init_lora_weights="pissa")` does. It
    needs no batches; those that are given, as by a program that tries either, are not gone through. The base is not
    changed by either.

    Call it before an optimizer is made: where ranks change, the adapter gets new tensors. On any error the model is as
    it was. Under torch.distributed, each process goes through its own batches and all end with the same adapter.

    >>> import torch
    >>> from point_peft import LoraConfig, get_peft_model, initialise
    >>> from point_peft.backbones import PointTransformer
    >>> backbone = PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8)
    >>> model = get_peft_model(backbone, LoraConfig(r=4))
    >>> initialise(model, [torch.rand(4, 64, 3), torch.rand(4, 64, 3)], "eva")
    """
    if how not in get_args(Start):
        raise PointPeftError(f"how is {quoted(how)}; allowed: {', '.join(map(repr, get_args(Start)))}")
    if type(rho) not in (int, float) or not 1 <= rho < math.inf:
        raise PointPeftError(f"rho is {quoted(rho)}; allowed: a number of 1 or more")
    root = model if isinstance(model, AdapterSet) else model._modules.get(CHILD)
    if not isinstance(root, AdapterSet):
        raise AdapterError(
            f"a {type(model).__name__} has no adapter to initialise: adapt it first, get_peft_model(...)"
        )
    name, adapter = single_adapter(root.adapters, root.active_adapters, adapter_name)
    check_unmerged(root.merged, "adapters cannot be initialised")
    if how == "pissa":
        _check_fresh(name, _narrow(name, adapter))
        begun = [(tuner, tuner.principal()) for tuner in adapter.config.tuners]
        if not any(principal for _, principal in begun):
            methods = ", ".join(tuner.method for tuner, _ in begun)
            raise AdapterError(
                f"adapter '{name}' ({methods}) does not begin from the factors of weights: PiSSA is a start of LORA"
            )
        config = replace(adapter.config, tuners=tuple(principal or tuner for tuner, principal in begun))
        replace_adapter(root, name, _rebuilt(root, adapter, config))
        return
    if batches is None:
        raise PointPeftError('"eva" needs batches, as build_memory_bank takes them: initialise(model, loader, "eva")')
    _start_from_data(root, name, adapter, batches, to_inputs, rho)


def _start_from_data(
    root: AdapterSet,
    name: str,
    adapter: Adapter,
    batches: Iterable[Any],
    to_inputs: Callable[[Any], Any] | None,
    rho: float,
) -> None:
    layers = _narrow(name, adapter)
    _check_fresh(name, layers)
    variances = _observed(root, name, adapter, layers, batches, to_inputs)
    found = {key: Directions.of(variances[key], _path(key)) for key in layers}
    config = _redistributed(root, adapter, layers, found, rho)
    changed = adapter if config == adapter.config else _rebuilt(root, adapter, config)
    values: list[tuple[Tensor, Tensor]] = []
    for key, (down, _, slices) in _narrow(name, changed).items():
        rows = found[key].first(len(down.weight) // slices, _path(key)).repeat(slices, 1)
        values.append((down.weight, rows.reshape(down.weight.shape)))
    with torch.no_grad():
        for weight, rows in values:
            weight.copy_(rows)
    if changed is not adapter:
        replace_adapter(root, name, changed)


# ---- what layers get -------------------------------------------------------------------------------------------------

Key = tuple[int, str, int]
"""The number of the method, the site, and which of the method's parts there."""


def _path(key: Key) -> str:
    return key[1]


def _narrow(name: str, adapter: Adapter) -> dict[Key, Narrow]:
    """The layers of an adapter that lead into few channels."""
    found: dict[Key, Narrow] = {}
    for path, part in adapter.all_parts():
        layers = part.narrow
        if layers is not None:
            place = sum(1 for number, site, _ in found if (number, site) == (part.tuner, path))
            found[part.tuner, path, place] = layers
    if not found:
        methods = ", ".join(tuner.method for tuner in adapter.config.tuners)
        raise AdapterError(
            f"adapter '{name}' ({methods}) has no layers that lead into few channels, as LORA, BOTTLENECK and "
            "POINT_PEFT have: there is nothing to initialise"
        )
    return found


def _check_fresh(name: str, layers: Mapping[Key, Narrow]) -> None:
    for (_, path, _), (_, up, _) in layers.items():
        if bool(up.weight.any()):
            raise AdapterError(
                f"adapter '{name}' has an effect already, at '{path}', which another start would spoil: initialise a "
                "fresh adapter that begins with none"
            )


@dataclass
class Variance:
    """The number of rows that were seen, their mean (c,) and the sum (c, c) of their squared deviations from it."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Variance:
        """That of rows (n, c)."""
        wide = rows.double()
        mean = wide.mean(dim=0)
        centred = wide - mean
        return cls(len(rows), mean, centred.T @ centred)

    def joined(self, other: Variance) -> Variance:
        """That of the rows of both."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        return Variance(count, mean, scatter)


def _add(seen: dict[K, Variance], key: K, variance: Variance) -> None:
    seen[key] = seen[key].joined(variance) if key in seen else variance


def _observed(
    root: AdapterSet,
    name: str,
    adapter: Adapter,
    layers: Mapping[Key, Narrow],
    batches: Iterable[Any],
    to_inputs: Callable[[Any], Any] | None,
) -> dict[Key, Variance]:
    """The variance of what each layer gets in one pass over all batches, of all processes."""
    own: dict[Key, Variance] = {}
    ranks, modules = processes(), [*backbone_modules(root).values(), *adapter.modules()]
    watched = [(key, _path(key), layer.down) for key, layer in layers.items()]
    with watching(watched, own), eval_mode(modules), choosing(root, (name,)), torch.no_grad():
        count = 0
        for batch in batches:
            args, kwargs = model_inputs(batch, to_inputs)
            root.base_model(*args, **kwargs)
            count += 1
    seen: dict[Key, Variance] = {}
    for part in of_all_processes(own, ranks):
        for key, variance in part.items():
            _add(seen, key, variance)
    if sum(of_all_processes(count, ranks)) == 0:
        raise AdapterError("initialise got no batches")
    for key in layers:
        if key not in seen:
            raise AdapterError(
                f"'{_path(key)}' was not called in any batch, so what it gets is not known, as where another module "
                "reads its weight: leave it out with exclude_modules"
            )
    return seen


@contextmanager
def watching(layers: Iterable[tuple[K, str, nn.Module]], seen: dict[K, Variance]) -> Iterator[None]:
    """In here, what layers (key, path for errors, module) get is added to what has been seen of them."""

    def watch(key: K, path: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            _add(seen, key, Variance.of(_rows(layer, args[0], path)))

        return layer.register_forward_pre_hook(see)

    handles = [watch(key, path, layer) for key, path, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(down: nn.Module, x: Tensor, path: str) -> Tensor:
    """The inputs of a layer as rows (n, c), of which each leads to an output of its own."""
    if not bool(torch.isfinite(x).all()):
        raise AdapterError(f"'{path}' got values that are not finite: look at the clouds of the batches")
    if isinstance(down, nn.Conv1d):
        if down.kernel_size != (1,):
            raise AdapterError(
                f"'{path}' is a convolution of kernel {down.kernel_size[0]}, whose start from data is not known: leave "
                "it out with exclude_modules"
            )
        return rearrange(x, "b c n -> (b n) c")
    return rearrange(x, "... c -> (...) c")


# ---- directions and ranks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Directions:
    """The principal directions (c, c) of what a layer gets, the first explaining the largest share (c,) of it."""

    rows: Tensor
    shares: Tensor
    count: int
    """The number of rows that they are of."""

    @classmethod
    def of(cls, variance: Variance, path: str) -> Directions:
        """Those of some variance."""
        values, vectors = torch.linalg.eigh(variance.scatter)
        values = values.flip(0).clamp_min(0)
        if not bool(values[0] > 0):
            raise AdapterError(f"'{path}' gets the same for every token, which has no directions: leave it out")
        # The sign is arbitrary and other on other machines: the largest entry of each is positive.
        rows = vectors.T.flip(0)
        signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
        return cls(rows * signs, values / values.sum(), variance.count)

    def first(self, rank: int, path: str) -> Tensor:
        """The first of them (rank, c)."""
        if rank > min(len(self.rows), self.count - 1):
            raise AdapterError(
                f"'{path}' leads into {rank} channels, but what it gets has {min(len(self.rows), self.count - 1)} "
                "directions at most: give more clouds, or a smaller rank"
            )
        return self.rows[:rank]


def _redistributed(
    root: AdapterSet, adapter: Adapter, layers: Mapping[Key, Narrow], found: Mapping[Key, Directions], rho: float
) -> PeftConfig:
    """The configuration with ranks by the shares of variance, where the method has ranks of their own by layer."""
    names, tuners = list(backbone_modules(root)), list(adapter.config.tuners)
    for number, tuner in enumerate(tuners):
        ranks = {_path(key): len(down.weight) // n for key, (down, _, n) in layers.items() if key[0] == number}
        shares = {_path(key): directions.shares for key, directions in found.items() if key[0] == number}
        tuners[number] = tuner.with_ranks(distributed(ranks, shares, rho), names)
    return replace(adapter.config, tuners=tuple(tuners))


def distributed(ranks: Mapping[str, int], shares: Mapping[str, Tensor], rho: float) -> dict[str, int]:
    """As many ranks in all, given to the largest of the first `rho` r shares (c,) of every layer; of equal ones, r."""
    offered = [(float(share), path) for path, r in ranks.items() for share in shares[path][: max(r, round(rho * r))]]
    kept = sorted(offered, key=lambda offer: -offer[0])[: sum(ranks.values())]
    return {path: sum(1 for _, owner in kept if owner == path) for path in ranks}


def _rebuilt(root: AdapterSet, adapter: Adapter, config: PeftConfig) -> Adapter:
    """The adapter of another configuration, not attached, with the values of all tensors that both have alike."""
    widen = any(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    heads = dict(adapter.own_modules())
    rebuilt = build_adapter(backbone_for(root, config), config, heads, adapter.saved, widen=widen)
    narrow = {id(layer.weight) for layers in _narrow("", rebuilt).values() for layer in layers[:2]}
    before = adapter.tensors()
    with torch.no_grad():
        for name, tensor in rebuilt.tensors().items():
            if name in before and id(tensor) not in narrow and before[name].shape == tensor.shape:
                tensor.copy_(before[name])
    return rebuilt
