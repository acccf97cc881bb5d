"""Making adapted models and looking at them: what the tests of every method on every backbone share."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import einops
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from point_peft import METHODS, PeftConfig, PointPeftModel, TunerConfig, get_peft_model
from point_peft.adapter_set import AdapterSet
from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.adapting.site import SITE
from point_peft.backbones import PointTransformer
from point_peft.backbones.layers import Group
from point_peft.parts.base import Bank
from tests.methods import config
from tests.zoo import BACKBONES, Args, TinyBackbone
from tests.zoo.library import transformer
from tools import capabilities

Config = TunerConfig | PeftConfig
Pair = tuple[str, TinyBackbone]
"""A method, or a method with what a backbone asks of it as `tools.capabilities` labels it, and that backbone."""

Grouped = tuple[tuple[str, ...], TinyBackbone]
"""Methods, the tuners of one adapter, and a backbone."""
How = str | Config | tuple[str, ...]
"""A method, a configuration, or the methods of one adapter."""

METHOD_NAMES = sorted(METHODS)
PAIRS: list[Pair] = [(method, backbone) for name, backbone in BACKBONES.items() for method in capabilities.labels(name)]
"""Pairs that the page of capabilities calls supported, in the form that it asks for, and those it does not know."""


def each(pairs: Iterable[Pair], *, smoke: str | None = None) -> pytest.MarkDecorator:
    """Run a test of `method` and `backbone` on each of the pairs; those of the backbone `smoke` are quick ones."""
    named = []
    for method, backbone in pairs:
        marks = [pytest.mark.smoke] if backbone.name == smoke else []
        named.append(pytest.param(method, backbone, id=f"{method}-{backbone.name}", marks=marks))
    return pytest.mark.parametrize(("method", "backbone"), named)


def form_of(method: str) -> str:
    """A method, with what a backbone asks of it other than to leave blocks out, which does not change what it does."""
    name, _, options = method.partition("[")
    return name if options.startswith("target_modules=") else method


def representatives(pairs: Sequence[Pair]) -> list[Pair]:
    """Every method on one backbone of each kind that supports it, and one method on every backbone that is left.

    A checksum of both names draws them: the methods get different backbones, and a new one moves none of the others.
    """
    drawn = sorted(pairs, key=lambda pair: zlib.crc32(f"{pair[0]}-{pair[1].name}".encode()))
    chosen: dict[tuple[str, str], Pair] = {}
    for method, backbone in drawn:
        chosen.setdefault((form_of(method), backbone.kind), (method, backbone))
    left = {backbone.name: (method, backbone) for method, backbone in reversed(drawn)}
    for _, backbone in chosen.values():
        left.pop(backbone.name, None)
    return [*chosen.values(), *left.values()]


def few(pairs: Sequence[Pair], of: Callable[[TinyBackbone], str] = lambda backbone: backbone.kind) -> list[Pair]:
    """Of these pairs one of every method, and one of every kind of backbone or of all that `of` tells them by.

    On models of our own first: for tests that take long.
    """
    pairs = sorted(pairs, key=lambda pair: bool(pair[1].needs))
    chosen: dict[tuple[str, str], Pair] = {}
    for key in (lambda method, backbone: form_of(method), lambda method, backbone: of(backbone)):
        first: dict[str, Pair] = {}
        for pair in pairs:
            first.setdefault(key(*pair), pair)
        chosen |= {(method, backbone.name): (method, backbone) for method, backbone in first.values()}
    return list(chosen.values())


every_method = pytest.mark.parametrize("method", METHOD_NAMES)


def one_adapter(methods: Sequence[str]) -> PeftConfig:
    return PeftConfig(tuners=[config(method) for method in methods])


def each_group(groups: Iterable[Grouped], *, smoke: str | None = None) -> pytest.MarkDecorator:
    """Run a test of `methods` and `backbone` on each of the groups; those of the backbone `smoke` are quick ones."""
    named = []
    for methods, backbone in groups:
        marks = [pytest.mark.smoke] if backbone.name == smoke else []
        named.append(pytest.param(methods, backbone, id=f"{'+'.join(methods)}-{backbone.name}", marks=marks))
    return pytest.mark.parametrize(("methods", "backbone"), named)


def few_groups(pairs: Sequence[Pair], most: int = 4) -> list[Grouped]:
    """As few groups as there are with every method in one and every kind of backbone, `most` methods in each.

    For what is compared bit by bit or tensor by tensor: of all methods at once, that shows what it shows of each.
    Models of our own come first, of these what supports most of the methods that are left, and then what registered
    last: variants, which are smaller.
    """
    supported: dict[str, list[str]] = {}
    for method, backbone in pairs:
        supported.setdefault(backbone.name, []).append(method)
    forms, left_kinds = {form_of(method) for method, _ in pairs}, {backbone.kind for _, backbone in pairs}
    groups: list[Grouped] = []
    while forms or left_kinds:
        gains = {}
        for name, methods in supported.items():
            new = min(len(forms.intersection(map(form_of, methods))), most)
            of_kind = BACKBONES[name].kind in left_kinds or not left_kinds
            gains[name] = of_kind, new > 0, not BACKBONES[name].needs, new
        name = max(reversed(gains), key=gains.__getitem__)
        methods = [method for method in supported[name] if form_of(method) in forms] or supported[name]
        groups.append((tuple(methods[:most]), BACKBONES[name]))
        forms -= set(map(form_of, methods[:most]))
        left_kinds -= {BACKBONES[name].kind}
    return groups


def groups_of(methods: Sequence[str]) -> list[tuple[str, ...]]:
    """The methods in as few groups as there are with nine at most."""
    count = math.ceil(len(methods) / 9)
    return [tuple(methods[first::count]) for first in range(count)]


def in_groups(methods: Sequence[str]) -> pytest.MarkDecorator:
    """Run a test of `methods` on groups of them, each the tuners of one adapter.

    A compiler or an exporter then meets the backbone, and starts, once a group. What a test shows of every method, it
    shows of every tensor of the adapter. Any two methods can be one adapter, which `tests/test_representatives.py`
    holds for those to come as well.
    """
    return pytest.mark.parametrize("methods", groups_of(methods), ids="+".join)


every_pair = each(PAIRS, smoke="point_mae")

ONE_BLOCK = dataclasses.replace(
    BACKBONES["point_bert"], name="point_bert of one block", make=lambda: transformer(depth=1, num_group=12)
)
"""For compilers and exporters, which take their time."""


class OneLayer(nn.Module):
    """A token (b, g, c) of each group (b, g, k, 3) of points: the largest values of one layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, channels)

    def forward(self, groups: Tensor) -> Tensor:
        tokens: Tensor = self.layer(groups).amax(dim=2)
        return tokens


class RowsAsGroups(Group):
    """The points in their order, to the last, are the groups, the first of each its centre: nothing to search."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        groups = points[:, -self.num_group * self.group_size :].unflatten(1, (self.num_group, self.group_size))
        center = groups[:, :, 0]
        return groups - center[:, :, None], center


def without_search(backbone: TinyBackbone) -> TinyBackbone:
    """The same, but its groups are rows of points and their tokens simple, for tests of what a method adds to a graph.

    Farthest points and the encoder are most of what a compiler or an exporter has to do for such a model, and have
    tests of their own.
    """

    def make() -> nn.Module:
        model = backbone.make()
        model.group_divider = RowsAsGroups(12, 8)
        model.encoder = OneLayer(model.get_parameter("encoder.second_conv.3.bias").numel())
        return model

    return dataclasses.replace(backbone, name=f"{backbone.name} without search", make=make)


def full_point_mae() -> PointTransformer:
    """Make Point-MAE as published, of shapes without values: for counts, 22 M random numbers need not be drawn."""
    with torch.device("meta"):
        return PointTransformer()


# ---- making adapted models -------------------------------------------------------------------------------------------


def adapt(backbone: TinyBackbone, how: How, *, seed: int = 0, fresh: bool = False, **options: Any) -> PointPeftModel:
    """An adapted backbone in eval mode, its banks filled; but for `fresh`, all its tensors at random values."""
    torch.manual_seed(seed)
    model = get_peft_model(backbone.build(), stated(how, backbone), **options)
    complete(model, backbone, options.get("adapter_name", "default"), seed, fresh)
    return model.eval()


def moved(how: Config, name: str = "point_mae", *, scale: float = 0.2, fresh: bool = False) -> PointPeftModel:
    """A tiny backbone adapted, in eval mode; but for `fresh`, the adapter's parameters moved by random numbers."""
    backbone = BACKBONES[name]
    torch.manual_seed(0)
    model = get_peft_model(backbone.build(), how, example_inputs=backbone.example).eval()
    if not fresh:
        move(model, scale)
    return model


@torch.no_grad()
def move(model: AdapterSet, scale: float = 0.2) -> None:
    """Add random numbers to the parameters of all adapters."""
    torch.manual_seed(1)
    for parameter in model.adapters.parameters():
        parameter.add_(scale * torch.randn_like(parameter))


def tensors(model: AdapterSet, name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors by their names in a file."""
    return get_adapter(model, name).tensors()


def add(model: AdapterSet, backbone: TinyBackbone, how: How, name: str, *, seed: int = 1, **options: Any) -> None:
    """A further adapter, like that of `adapt`."""
    torch.manual_seed(seed)
    model.add_adapter(name, stated(how, backbone), **options)
    complete(model, backbone, name, seed, fresh=False)


def unchanged_when_fresh(how: TunerConfig | PeftConfig, backbone: TinyBackbone) -> bool:
    """True if a fresh adapter leaves the output as it is: prompts change it, for which packed tokens have no place."""
    return how.identity_at_init or backbone.kind == "packed"


def stated(how: How, backbone: TinyBackbone) -> PeftConfig:
    """The configuration, with the anatomy if no preset tells it, so that it is not traced again and again."""
    if isinstance(how, tuple):
        how = one_adapter(how)
    chosen = PeftConfig.of(config(how) if isinstance(how, str) else how)
    return chosen if backbone.traced is None else dataclasses.replace(chosen, anatomy=backbone.traced)


def complete(model: AdapterSet, backbone: TinyBackbone, name: str, seed: int, fresh: bool) -> None:
    adapter = get_adapter(model, name)
    for bank in banks(adapter):
        bank._buffers.update(_bank_buffers(model, backbone, name, bank))
    if not fresh:
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for key, tensor in adapter.tensors().items():
                scramble(key, tensor, generator)


@functools.cache
def plain(backbone: TinyBackbone, batch: int = 2, seed: int = 5, *, training: bool = False) -> Tensor:
    """The output of the backbone alone; in train mode with the random numbers of seed 4, its statistics held."""
    base = frozen(backbone)
    if training:
        in_training(base)
        torch.manual_seed(4)
    return run(base, backbone, backbone.inputs(batch, seed))


def frozen(backbone: TinyBackbone) -> nn.Module:
    """The backbone alone, frozen: torch rounds an attention otherwise where its weights take gradients."""
    return backbone.build().requires_grad_(False)


def banks(adapter: Adapter) -> list[Bank]:
    return [state for state in adapter.shared_states() if isinstance(state, Bank)]


_filled: dict[tuple[Any, ...], dict[str, Tensor]] = {}


def _bank_buffers(model: AdapterSet, backbone: TinyBackbone, name: str, bank: Bank) -> dict[str, Tensor]:
    """Buffers of an adapter's bank once it is built; built once for what its rows depend on."""
    types = tuple(buffer.dtype for buffer in bank.buffers())
    key = (backbone.name, get_adapter(model, name).config.anatomy, bank.source, bank.size, types)
    if key not in _filled:
        build_bank(model, backbone, name)
        _filled[key] = {k: v for k, v in bank._buffers.items() if v is not None}
    return {k: v.clone() for k, v in _filled[key].items()}


def build_bank(model: AdapterSet, backbone: TinyBackbone, name: str, which: slice = slice(None)) -> None:
    batches = [backbone.inputs(4, seed) for seed in (21, 22, 23, 24)]
    model.build_memory_bank(batches[which], to_inputs=lambda args: args, adapter_name=name)


def scramble(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Other values, of a kind that a tensor of this name can have."""
    noise = torch.randn(tensor.shape, generator=generator)
    if not tensor.is_floating_point():
        tensor.add_(3 if name.endswith("num_batches_tracked") else 0)
    elif name.endswith("running_var"):
        tensor.mul_(noise.abs() + 0.5)
    elif isinstance(tensor, nn.Parameter):
        tensor.add_(0.1 * noise)
    else:
        tensor.add_((0.1 * noise).to(tensor.dtype))


def rescramble(model: AdapterSet, name: str = "default", seed: int = 77) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in get_adapter(model, name).tensors().items():
            scramble(key, tensor, generator)


# ---- looking at models -----------------------------------------------------------------------------------------------


def run(model: nn.Module, backbone: TinyBackbone, args: Args | None = None) -> Tensor:
    """The output on some clouds, without gradients."""
    with torch.no_grad():
        return backbone.select(model(*(backbone.inputs(2, 5) if args is None else args)))


def loss_of(output: Tensor) -> Tensor:
    """A linear function of the output with fixed random coefficients."""
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(8))
    return (output.float() * coefficients).mean()


def one_graph(model: nn.Module, backend: Any = "eager", **options: Any) -> Any:
    """The model compiled, by a compiler that knows no other, with the calls of einops whole in its graph.

    To follow what is inside them takes half of a compilation.
    """
    torch.compiler.reset()
    for function in (einops.rearrange, einops.reduce, einops.repeat):
        torch.compiler.allow_in_graph(function)
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def assert_same_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same for every tensor up to rounding, and not zero for any."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), f"{name} has no effect"
        assert torch.allclose(actual[name], gradient, rtol=1e-4, atol=1e-6), name
        assert distance(actual[name], gradient) < 1e-4, name


def gradients(adapter: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def held(model: nn.Module) -> AdapterSet:
    """The adapters of a model that keeps its class."""
    found = model.get_submodule("point_peft")
    assert isinstance(found, AdapterSet)
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_values(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "values") -> None:
    assert list(actual) == list(expected), f"{what}: other names"
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), f"{what}: {name} is another"


def assert_unloaded(model: PointPeftModel, before: dict[str, Any]) -> None:
    """Take the adapters off: in the modes that it had before eval(), the backbone is as its fingerprint says."""
    base = model.get_base_model()
    for path, module in base.named_modules(remove_duplicate=False):
        if not isinstance(module, _NormBase):
            module.training = before[path]["training"]
    assert model.unload() is base
    after = fingerprint(base)
    for path, module in base.named_modules():
        if isinstance(module, _NormBase):  # eval() asked for this mode
            assert after[path].pop("training") is False, f"the mode of {path} is not the one asked for"
            before[path].pop("training")
    assert after == before, "unload() did not restore the backbone"
    assert not any(SITE in vars(module) for module in base.modules()), "unload() left a site"
    assert model.active_adapters == ()


def kinds(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]


_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called"))]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that adapting it could change, module by module."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own, attributes = [*module._parameters.items(), *module._buffers.items()], vars(module)
        found[path] = {
            "identity": (id(module), type(module)),
            "training": module.training,
            "attributes": set(attributes),
            "hooks": {name: list(attributes[name].items()) for name in _HOOKS if attributes[name]},
            "tensors": {name: None if tensor is None else _tensor_state(tensor) for name, tensor in own},
        }
        if isinstance(module, AdapterSet):
            fields = (module.default, copy.deepcopy(module.frozen))
            found[path]["adapters"] = (fields, module.active_adapters, list(module.adapters))
    return found


def _tensor_state(tensor: Tensor) -> tuple[Any, ...]:
    values = tensor.detach()
    if values.dtype == torch.bfloat16:  # which numpy does not know
        values = values.reshape(-1).view(torch.uint8)
    digest = zlib.crc32(values.numpy().tobytes())
    return id(tensor), type(tensor), tensor.requires_grad, tensor.grad is None, digest


def unusual(model: nn.Module) -> nn.Module:
    """The model with mixed train flags and requires_grad, all of which must be found again."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 4 != 0)
    return model


def in_training(model: nn.Module) -> nn.Module:
    """A plain backbone in train mode, but for the running statistics that a frozen one keeps."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
    return model


def in_threads(tasks: Sequence[Callable[[], None]]) -> None:
    """Run all of them at once; the first error is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(tasks))

    def work(task: Callable[[], None]) -> None:
        try:
            barrier.wait()
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
