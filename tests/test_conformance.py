"""What every method guarantees on every backbone. Both enter by registration; nothing is listed here."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import io
import itertools
import os
import pickle
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.modules.batchnorm import _NormBase

from examples import capabilities
from examples.backbones import BACKBONES, CLASSES, Args, Compact, TinyBackbone, compact_like, enliven
from point_peft import (
    METHODS,
    AdapterError,
    AnatomyError,
    LinearProbeConfig,
    MatchError,
    PeftConfig,
    PointPeftError,
    PointPeftModel,
    TunerConfig,
    get_peft_model,
    inject_adapter,
)
from point_peft.injection import SITE, Adapter, get_adapter
from point_peft.model import AdapterSet
from point_peft.tuners.base import Bank
from tests.methods import ToyConfig, config

Config = TunerConfig | PeftConfig

METHOD_NAMES = sorted(METHODS)
PAIRS = [
    pytest.param(method, backbone, id=f"{method}-{name}")
    for name, backbone in BACKBONES.items()
    for method in capabilities.labels(name)
]
"""What the page of capabilities calls supported, in the form that it asks for, and whatever it does not know."""
every_method = pytest.mark.parametrize("method", METHOD_NAMES)
every_pair = pytest.mark.parametrize(("method", "backbone"), PAIRS)


# ---- making adapted models -------------------------------------------------------------------------------------------


def adapt(
    backbone: TinyBackbone, how: str | Config, *, seed: int = 0, fresh: bool = False, **options: Any
) -> PointPeftModel:
    """An adapted backbone in eval mode, its banks filled; but for `fresh`, all its tensors at random values."""
    torch.manual_seed(seed)
    model = get_peft_model(backbone.build(), _config(how, backbone), **options)
    _complete(model, backbone, options.get("adapter_name", "default"), seed, fresh)
    return model.eval()


def add(
    model: AdapterSet, backbone: TinyBackbone, how: str | Config, name: str, *, seed: int = 1, **options: Any
) -> None:
    """A further adapter, like that of `adapt`."""
    torch.manual_seed(seed)
    model.add_adapter(name, _config(how, backbone), **options)
    _complete(model, backbone, name, seed, fresh=False)


def _config(how: str | Config, backbone: TinyBackbone) -> PeftConfig:
    """The configuration, with the anatomy if no preset tells it, so that it is not traced again and again."""
    chosen = PeftConfig.of(config(how) if isinstance(how, str) else how)
    return chosen if backbone.traced is None else dataclasses.replace(chosen, anatomy=backbone.traced)


def _complete(model: AdapterSet, backbone: TinyBackbone, name: str, seed: int, fresh: bool) -> None:
    adapter = get_adapter(model, name)
    for bank in banks(adapter):
        bank._buffers.update(_bank_buffers(model, backbone, name, adapter.config))
    if not fresh:
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for key, tensor in adapter.tensors().items():
                scramble(key, tensor, generator)


def frozen(backbone: TinyBackbone) -> nn.Module:
    """The backbone alone, frozen: torch rounds an attention otherwise where its weights take gradients."""
    return backbone.build().requires_grad_(False)


def banks(adapter: Adapter) -> list[Bank]:
    return [state for state in adapter.shared_states() if isinstance(state, Bank)]


_filled: dict[tuple[str, PeftConfig], dict[str, Tensor]] = {}


def _bank_buffers(model: AdapterSet, backbone: TinyBackbone, name: str, how: PeftConfig) -> dict[str, Tensor]:
    """What the bank of an adapter holds once it is built; built once for a configuration on a backbone."""
    key = (backbone.name, how)
    if key not in _filled:
        build_bank(model, backbone, name)
        _filled[key] = {k: v for k, v in banks(get_adapter(model, name))[0]._buffers.items() if v is not None}
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


def assert_same_values(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def kinds(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]


_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called"))]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that adapting it could change, module by module."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = [*module._parameters.items(), *module._buffers.items()]
        found[path] = {
            "identity": (id(module), type(module)),
            "training": module.training,
            "attributes": sorted(vars(module)),
            "hooks": {name: list(getattr(module, name).items()) for name in _HOOKS},
            "tensors": {name: None if tensor is None else _tensor_state(tensor) for name, tensor in own},
        }
        if isinstance(module, AdapterSet):
            fields = (module.default, sorted(module.unproven), dict(module.frozen_from), dict(module.norm_modes))
            found[path]["adapters"] = (fields, module.active_adapters, list(module.adapters))
    return found


def _tensor_state(tensor: Tensor) -> tuple[Any, ...]:
    digest = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
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


# ---- outputs ---------------------------------------------------------------------------------------------------------


@every_pair
def test_a_sample_does_not_depend_on_its_batch_mates(method: str, backbone: TinyBackbone) -> None:
    model, args = adapt(backbone, method), backbone.inputs(3, 6)
    together = run(model, backbone, args)
    for i in range(3):
        alone = run(model, backbone, backbone.slice(args, i))
        assert distance(alone, together[i : i + 1]) < 1e-5


@every_pair
def test_a_fresh_adapter_changes_what_its_configuration_says(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method, fresh=True)
    changed = distance(run(model, backbone), run(frozen(backbone), backbone))
    assert changed < 1e-5 if config(method).identity_at_init else changed > 1e-4


@every_pair
def test_random_values_and_every_buffer_have_an_effect(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method)
    output = run(model, backbone)
    assert torch.isfinite(output).all()
    assert distance(output, run(frozen(backbone), backbone)) > 1e-3
    generator = torch.Generator().manual_seed(9)
    for name, tensor in get_adapter(model, "default").tensors().items():
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            continue
        before = tensor.clone()
        scramble(name, tensor, generator)
        assert not torch.equal(run(model, backbone), output), f"{name} has no effect"
        tensor.copy_(before)
    assert torch.equal(run(model, backbone), output)


@every_pair
def test_disabled_it_is_the_backbone_bit_for_bit(method: str, backbone: TinyBackbone) -> None:
    model, base = adapt(backbone, method), frozen(backbone)
    with model.disable_adapter():
        assert model.active_adapters == ()
        assert torch.equal(run(model, backbone), run(base, backbone))
    assert not torch.equal(run(model, backbone), run(base, backbone))
    model.train()
    in_training(base)
    with model.disable_adapter():
        torch.manual_seed(4)
        output = run(model, backbone)
        torch.manual_seed(4)
        assert torch.equal(output, run(base, backbone))


@every_pair
def test_bfloat16_autocast_runs_and_stays_near(method: str, backbone: TinyBackbone) -> None:
    if not backbone.bfloat16:
        pytest.skip(f"{backbone.name} itself does not run in bfloat16")
    model = adapt(backbone, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = backbone.select(model(*backbone.inputs(2, 5)))
    # A query that is rounded may retrieve other rows of a bank that are as near.
    tolerance = 0.5 if banks(get_adapter(model, "default")) else 0.15
    assert distance(near.detach().float(), run(model, backbone)) < tolerance
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = backbone.select(model(*backbone.inputs(2, 5)))
    loss_of(output).backward()
    for name, parameter in get_adapter(model, "default").named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


# ---- the backbone stays as it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["the model", "its backbone"])
@every_pair
def test_training_leaves_the_backbone_as_it_is(method: str, backbone: TinyBackbone, who: str) -> None:
    base = backbone.build()
    before, types = values(base), kinds(base)
    model = adapt(backbone, method, fresh=True)
    base = model.get_base_model()
    assert kinds(base) == types
    assert_same_values(base.state_dict(), before)
    adapter = get_adapter(model, "default")
    start = values(adapter)
    model.train()
    if who == "its backbone":
        model.eval()
        adapter.train()
        model.base_model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(backbone.select(model(*backbone.inputs(3, 30 + step)))).backward()
        optimizer.step()
        assert_same_values(base.state_dict(), before)
    assert kinds(base) == types
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.parameters())
    changed = [name for name, tensor in adapter.state_dict().items() if not torch.equal(tensor, start[name])]
    assert set(changed) >= {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    dropouts = [module for module in base.modules() if type(module).__name__ in ("Dropout", "DropPath")]
    assert all(module.training for module in dropouts)
    with model.eval().disable_adapter():
        assert torch.equal(run(model, backbone), run(frozen(backbone), backbone))


@every_pair
def test_the_backbone_s_checkpoint_loads_into_the_adapted_model(method: str, backbone: TinyBackbone) -> None:
    model, other = adapt(backbone, method), frozen(backbone)
    assert model.get_base_model() is model.base_model and type(model.base_model) is type(other)
    torch.manual_seed(1)
    enliven(other)
    output = run(model, backbone)
    model.get_base_model().load_state_dict(other.state_dict(), strict=True)
    assert not torch.equal(run(model, backbone), output)
    with model.disable_adapter():
        assert torch.equal(run(model, backbone), run(other, backbone))
    model.get_base_model().load_state_dict(frozen(backbone).state_dict(), strict=True)
    assert torch.equal(run(model, backbone), output)


@every_pair
def test_every_trainable_tensor_gets_a_gradient(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method)
    loss_of(backbone.select(model(*backbone.inputs(2, 5)))).backward()
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == len(list(get_adapter(model, "default").parameters())) > 0
    for name, parameter in trainable:
        assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient"


# ---- files -----------------------------------------------------------------------------------------------------------


@every_pair
def test_files_carry_the_adapter_bit_for_bit(method: str, backbone: TinyBackbone, tmp_path: Path) -> None:
    model = adapt(backbone, method)
    model.save_pretrained(tmp_path / "a")
    torch.manual_seed(12345)
    reloaded = PointPeftModel.from_pretrained(backbone.build(), tmp_path / "a").eval()
    assert torch.equal(run(reloaded, backbone), run(model, backbone))
    assert_same_values(get_adapter(reloaded, "default").tensors(), get_adapter(model, "default").tensors())
    parameters = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in reloaded.named_parameters()] == parameters  # an optimizer's state goes by their order
    assert not any(parameter.requires_grad for parameter in reloaded.parameters())
    reloaded.save_pretrained(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@every_method
def test_loading_does_not_disturb_the_adapter_in_training(method: str, tmp_path: Path) -> None:
    backbone = BACKBONES["point_mae"]
    adapt(backbone, method, seed=2).save_pretrained(tmp_path)
    model = adapt(backbone, method).train()
    before = fingerprint(get_adapter(model, "default"))
    model.load_adapter(tmp_path, "second")
    assert fingerprint(get_adapter(model, "default")) == before
    assert model.training and get_adapter(model, "second").training and model.active_adapters == ("default",)
    assert not any(parameter.requires_grad for parameter in get_adapter(model, "second").parameters())
    model.train_adapter("second")
    model.freeze_adapter("default")
    assert model.active_adapters == ("default",)
    assert all(parameter.requires_grad for parameter in get_adapter(model, "second").parameters())
    assert not any(parameter.requires_grad for parameter in get_adapter(model, "default").parameters())
    model.set_adapter("second")
    assert not any(parameter.requires_grad for parameter in get_adapter(model, "default").parameters())


# ---- several adapters ------------------------------------------------------------------------------------------------


@every_pair
def test_adapters_are_swapped_without_a_trace(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method, adapter_name="a")
    alone_a = run(model, backbone)
    alone_b = run(adapt(backbone, method, seed=1, adapter_name="b"), backbone)
    add(model, backbone, method, "b", seed=1)
    assert model.active_adapters == ("a",) and torch.equal(run(model, backbone), alone_a)
    model.set_adapter("b")
    assert torch.equal(run(model, backbone), alone_b) and not torch.equal(alone_a, alone_b)
    model.set_adapter("a")
    assert torch.equal(run(model, backbone), alone_a)
    with model.use_adapter("b"):
        assert torch.equal(run(model, backbone), alone_b)
        with model.disable_adapter():
            assert torch.equal(run(model, backbone), run(frozen(backbone), backbone))
    assert torch.equal(run(model, backbone), alone_a)


@every_pair
def test_two_adapters_act_together_in_the_order_given(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method, adapter_name="a")
    add(model, backbone, method, "b")
    alone = {name: _with(model, backbone, [name]) for name in ("a", "b")}
    both, swapped = _with(model, backbone, ["a", "b"]), _with(model, backbone, ["b", "a"])
    outputs = [*alone.values(), both, swapped]
    if method == "LINEAR_PROBE":  # heads do not add up: that of the first counts
        assert torch.equal(both, alone["a"]) and torch.equal(swapped, alone["b"])
    else:
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(outputs, 2))
    model.set_adapter(["a", "b"])
    args = backbone.inputs(3, 6)
    together = run(model, backbone, args)
    assert distance(run(model, backbone, backbone.slice(args, 1)), together[1:2]) < 1e-5
    model.delete_adapter("b")
    assert model.active_adapters == ("a",) and torch.equal(run(model, backbone), alone["a"])


def _with(model: PointPeftModel, backbone: TinyBackbone, names: Sequence[str], args: Args | None = None) -> Tensor:
    with model.use_adapter(names):
        return run(model, backbone, args)


def _ring() -> Iterator[Any]:
    """On every backbone, every method with its neighbour in the alphabet, and the last with the first."""
    for name, backbone in BACKBONES.items():
        methods = capabilities.labels(name)
        neighbours = zip(methods, methods[1:] + methods[:1], strict=True)
        for one, other in dict.fromkeys((min(pair), max(pair)) for pair in neighbours if pair[0] != pair[1]):
            yield pytest.param(one, other, backbone, id=f"{one}-{other}-{name}")


@pytest.mark.parametrize(("one", "other", "backbone"), list(_ring()))
def test_two_methods_are_one_adapter(one: str, other: str, backbone: TinyBackbone, tmp_path: Path) -> None:
    _check_one_adapter([config(one), config(other)], backbone, tmp_path)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(METHOD_NAMES, 2)))
def test_any_two_methods_are_one_adapter(one: str, other: str, tmp_path: Path) -> None:
    _check_one_adapter([config(one), config(other)], BACKBONES["compact"], tmp_path)


def _check_one_adapter(tuners: Sequence[TunerConfig], backbone: TinyBackbone, folder: Path) -> None:
    how = PeftConfig(tuners=tuners)
    model = adapt(backbone, how, fresh=True)
    changed = distance(run(model, backbone), run(frozen(backbone), backbone))
    assert changed < 1e-5 if how.identity_at_init else changed > 1e-4
    rescramble(model)
    args = backbone.inputs(3, 6)
    output = backbone.select(model(*args))
    loss_of(output).backward()
    for name, parameter in get_adapter(model, "default").named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient"
    assert distance(run(model, backbone, backbone.slice(args, 2)), output[2:].detach()) < 1e-5
    model.save_pretrained(folder)
    torch.manual_seed(999)
    reloaded = PointPeftModel.from_pretrained(backbone.build(), folder).eval()
    assert torch.equal(run(reloaded, backbone, args), run(model, backbone, args))


@every_pair
def test_adapters_of_different_methods_live_side_by_side(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method, adapter_name="a")
    add(model, backbone, ToyConfig(modules_to_save=[]), "toy")
    alone = {name: _with(model, backbone, [name]) for name in ("a", "toy")}
    both = _with(model, backbone, ["a", "toy"])
    assert not any(torch.equal(one, other) for one, other in itertools.combinations([*alone.values(), both], 2))
    with model.use_adapter(["toy", "a"]):
        loss_of(backbone.select(model(*backbone.inputs(2, 5)))).backward()
    for name in ("a", "toy"):
        for key, parameter in get_adapter(model, name).named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{name}: {key} got no gradient"
    model.delete_adapter("a")
    model.set_adapter("toy")
    assert torch.equal(run(model, backbone), alone["toy"])


@every_pair
def test_an_adapter_has_a_head_of_its_own_shape(method: str, backbone: TinyBackbone, tmp_path: Path) -> None:
    model = adapt(backbone, method, adapter_name="a")
    first = run(model, backbone)
    path, factory = backbone.other_head
    add(model, backbone, method, "seven", heads={path: factory})
    with model.use_adapter("seven"):
        output = run(model, backbone)
    assert output.shape == (*first.shape[:-1], 7)
    assert torch.equal(run(model, backbone), first)
    model.save_pretrained(tmp_path, "seven")
    reloaded = PointPeftModel.from_pretrained(backbone.build(), tmp_path, "seven").eval()
    assert torch.equal(run(reloaded, backbone), output)
    given = adapt(backbone, method, heads={path: factory()})
    assert run(given, backbone).shape[-1] == 7
    with given.disable_adapter():
        assert run(given, backbone).shape[-1] == CLASSES


@every_pair
def test_default_heads_are_the_ones_that_are_known(method: str, backbone: TinyBackbone) -> None:
    assert {path for path, _ in get_adapter(adapt(backbone, method), "default").own_modules()} == set(backbone.heads)


# ---- copies ----------------------------------------------------------------------------------------------------------


@every_pair
def test_a_deep_copy_is_adapted_and_independent(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method)
    output = run(model, backbone)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied, backbone), output)
    rescramble(copied)
    other = run(copied, backbone)
    assert not torch.equal(other, output) and torch.equal(run(model, backbone), output)
    with torch.no_grad():
        for tensor in (*model.base_model.parameters(), *get_adapter(model, "default").parameters()):
            tensor.mul_(1.1)
    assert torch.equal(run(copied, backbone), other)
    model.delete_adapter("default")
    assert torch.equal(run(copied, backbone), other)
    copied.unload()
    assert run(model, backbone).shape == output.shape


@every_pair
def test_pickle_and_torch_save_carry_the_whole_model(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method)
    output = run(model, backbone)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(run(copied, backbone), output)
        rescramble(copied)
        assert not torch.equal(run(copied, backbone), output) and torch.equal(run(model, backbone), output)


@every_pair
def test_replicas_of_data_parallel_run_on_their_own_tensors(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method, adapter_name="a")
    add(model, backbone, method, "b")
    injected = backbone.build()
    inject_adapter(injected, _config(method, backbone), "a")
    holder = held(injected)
    _complete(holder, backbone, "a", 0, fresh=False)
    add(holder, backbone, method, "b")
    injected.eval()
    args = backbone.inputs(2, 6)
    shards = [backbone.slice(args, i) for i in range(2)]
    for whole, root in ((model, model), (injected, holder)):
        with root.use_adapter("b"):
            expected = []
            for shard, factor in zip(shards, (1.0, 1.02), strict=True):
                changed = copy.deepcopy(whole)
                with torch.no_grad():
                    for parameter in changed.parameters():
                        parameter.mul_(factor)
                (changed if isinstance(changed, AdapterSet) else held(changed)).set_adapter("b")
                expected.append(run(changed, backbone, shard))
            replicas = [_replicate(whole, factor) for factor in (1.0, 1.02)]
            outputs: list[Any] = [None, None]

            def work(i: int, replicas: Any = replicas, outputs: Any = outputs) -> None:
                outputs[i] = replicas[i](*shards[i])

            _in_threads([functools.partial(work, i) for i in range(2)])
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(backbone.select(output), wanted)
        loss_of(torch.cat([backbone.select(output) for output in outputs])).backward()
        for name, parameter in get_adapter(root, "b").named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient"


def _replicate(model: nn.Module, factor: float) -> nn.Module:
    """What `torch.nn.parallel.replicate` does for one device, with tensors that are `factor` times the model's."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    copies = {id(parameter): parameter * factor for parameter in model.parameters()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, copies[id(parameter)])
        for name, buffer in module._buffers.items():
            if buffer is not None:
                setattr(replica, name, buffer.clone())
    first: nn.Module = replicas[modules[0]]
    return first


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
@pytest.mark.parametrize("again", ["inside", "block", "container"])
@every_method
def test_gradient_checkpointing_gives_the_same_gradients(method: str, again: Any, reentrant: bool) -> None:
    backbone = BACKBONES["compact"]
    plain = adapt(backbone, method).train()
    found = _step(plain, backbone, _backward)
    for backward in (_backward, _backward_elsewhere):
        model = _checkpointed(backbone, method, again, reentrant)
        _assert_same_step(_step(model, backbone, backward), found)


def _checkpointed(backbone: TinyBackbone, method: str, again: Any, reentrant: bool) -> PointPeftModel:
    """The model of `adapt`, in train mode, with checkpointing."""
    base = compact_like(backbone.build(), again=again, reentrant=reentrant)
    torch.manual_seed(0)
    model = get_peft_model(base, config(method), example_inputs=backbone.example)
    _complete(model, backbone, "default", 0, fresh=False)
    return model.train()


def _step(
    model: PointPeftModel, backbone: TinyBackbone, backward: Callable[[Tensor], None]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(output, gradients, buffers) of one training step of the active adapter."""
    torch.manual_seed(6)
    output = backbone.select(model(*backbone.inputs(3, 5)))
    backward(loss_of(output))
    adapter = get_adapter(model, model.active_adapters[0])
    return output.detach(), gradients(adapter), {name: buffer.clone() for name, buffer in adapter.named_buffers()}


def _assert_same_step(actual: Any, expected: Any) -> None:
    assert torch.equal(actual[0], expected[0])
    assert list(actual[1]) == list(expected[1])
    for name, gradient in expected[1].items():
        assert distance(actual[1][name], gradient) < 1e-5 or gradient.abs().max() < 1e-6, name
    assert_same_values(actual[2], expected[2])


def _backward(loss: Tensor) -> None:
    loss.backward()


def _backward_elsewhere(loss: Tensor) -> None:
    """On another thread, as an accelerator's backward pass runs."""
    _in_threads([lambda: _backward(loss)])


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
@pytest.mark.parametrize("again", ["inside", "block", "container"])
@every_method
def test_checkpointing_remembers_the_adapter_of_each_forward(method: str, again: Any, reentrant: bool) -> None:
    """Two forwards with different adapters, then their backward passes: in turn, and as one."""
    backbone = BACKBONES["compact"]
    for order in ("in turn", "at once"):
        found = []
        for options in ({}, {"again": again, "reentrant": reentrant}):
            torch.manual_seed(0)
            model = get_peft_model(compact_like(backbone.build(), **options), config(method), "a")
            _complete(model, backbone, "a", 0, fresh=False)
            add(model, backbone, method, "b")
            model.eval()
            losses = []
            for name, seed in (("a", 5), ("b", 6)):
                model.set_adapter(name)
                losses.append(loss_of(backbone.select(model(*backbone.inputs(2, seed)))))
            with model.disable_adapter():
                for loss in losses if order == "in turn" else [losses[0] + losses[1]]:
                    _backward(loss)
            found.append({name: gradients(get_adapter(model, name)) for name in ("a", "b")})
        for name in ("a", "b"):
            assert list(found[1][name]) == list(found[0][name])
            for key, gradient in found[0][name].items():
                assert distance(found[1][name][key], gradient) < 1e-5, f"{name}: {key}"


# ---- threads, tasks, exceptions --------------------------------------------------------------------------------------

SETS: tuple[tuple[str, ...], ...] = (("a",), ("b",), ("c",), (), ("a", "b"), ("b", "a"), ("c", "a"), ("a", "b", "c"))


def _crowd(
    backbone: TinyBackbone, method: str, args: Args
) -> tuple[PointPeftModel, dict[tuple[str, ...], Tensor]]:
    """A model of three adapters, and what each of `SETS` gives."""
    model = adapt(backbone, method, adapter_name="a")
    for number, name in enumerate(("b", "c")):
        add(model, backbone, method, name, seed=number + 1)
    return model, {names: _with(model, backbone, names, args) for names in SETS}


def _in_threads(tasks: Sequence[Callable[[], None]]) -> None:
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


@every_pair
def test_eight_threads_with_adapters_of_their_own(method: str, backbone: TinyBackbone) -> None:
    args = backbone.inputs(1, 5)
    model, expected = _crowd(backbone, method, args)

    def with_use(names: tuple[str, ...]) -> None:
        with model.use_adapter(names):
            assert torch.equal(run(model, backbone, args), expected[names]), names
        assert torch.equal(run(model, backbone, args), expected[("a",)])

    def with_set(names: tuple[str, ...]) -> None:
        model.set_adapter(names)
        for _ in range(2):
            assert torch.equal(run(model, backbone, args), expected[names]), names
            assert model.active_adapters == names

    _in_threads([functools.partial(with_use, names) for names in SETS])
    _in_threads([functools.partial(with_set, names) for names in SETS])


@every_method
def test_asyncio_tasks_with_adapters_of_their_own(method: str) -> None:
    backbone = BACKBONES["point_mae"]
    args = backbone.inputs(1, 5)
    model, expected = _crowd(backbone, method, args)

    async def with_use(names: tuple[str, ...]) -> None:
        with model.use_adapter(names):
            for _ in range(2):
                await asyncio.sleep(0)
                assert torch.equal(run(model, backbone, args), expected[names]), names

    async def with_set(names: tuple[str, ...]) -> None:
        model.set_adapter(names)
        for _ in range(2):
            await asyncio.sleep(0)
            assert torch.equal(run(model, backbone, args), expected[names]), names

    async def all_at_once() -> None:
        await asyncio.gather(*(task(names) for names in SETS for task in (with_use, with_set)))

    asyncio.run(all_at_once())
    model.set_adapter("a")
    assert torch.equal(run(model, backbone, args), expected[("a",)])


def test_an_adapter_deleted_elsewhere_is_missed_with_an_error() -> None:
    backbone = BACKBONES["compact"]
    model, args = adapt(backbone, _toy, adapter_name="a"), backbone.inputs(1, 5)
    add(model, backbone, _toy, "b")
    output = run(model, backbone, args)
    with model.use_adapter("b"):
        _in_threads([lambda: model.delete_adapter("b")])
        with pytest.raises(AdapterError, match="adapter 'b' is active in this thread or task, but was deleted"):
            run(model, backbone, args)
        assert model.active_adapters == ()
    assert torch.equal(run(model, backbone, args), output)


@contextmanager
def _raising(module: nn.Module, error: BaseException, when: str) -> Iterator[None]:
    """Within the block the module raises, before its forward or after it."""

    def hook(*_: Any) -> None:
        raise error

    register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@every_pair
def test_an_exception_in_a_forward_leaves_nothing_behind(method: str, backbone: TinyBackbone) -> None:
    model, args = adapt(backbone, method), backbone.inputs(2, 6)
    assert model.anatomy is not None
    first, last = model.anatomy.blocks[0], model.anatomy.blocks[-1]
    output, plain = run(model, backbone), run(frozen(backbone), backbone)
    before = fingerprint(model)
    inside = first.mlp or first.attention
    places = ((first.path, "before"), (inside, "after"), (last.path, "after"), (backbone.heads[-1], "after"))
    for path, when in places:
        for grad in (torch.enable_grad, torch.no_grad):
            raising = _raising(model.base_model.get_submodule(path), RuntimeError("stop here"), when)
            with raising, pytest.raises(RuntimeError, match="^stop here$"), grad():
                model(*args)
        assert torch.equal(run(model, backbone), output)
        with model.disable_adapter():
            assert torch.equal(run(model, backbone), plain)
    assert fingerprint(model) == before


@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt("stop here")], ids=repr)
@every_method
def test_an_exception_does_not_reach_a_direct_call(method: str, error: BaseException) -> None:
    """What was interrupted with an adapter active must not be taken for a forward that still runs."""
    backbone = BACKBONES["point_mae"]
    model, base = adapt(backbone, method), backbone.build()
    (points,) = backbone.inputs(2, 6)
    (others,) = backbone.inputs(3, 7)
    block = model.base_model.get_submodule("blocks.blocks.1")
    with _raising(block, error, "before"), pytest.raises(type(error), match="^stop here$"):
        model(points)
    adapted_features: Any = model.base_model.forward_features
    plain_features: Any = base.forward_features
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(adapted_features(others), plain_features(others))
    assert torch.equal(run(model, backbone), run(adapt(backbone, method), backbone))


@pytest.mark.parametrize("name", ["point_mae", "torch_pointcloud"])
@every_method
def test_methods_of_the_backbone_run_adapted(method: str, name: str) -> None:
    backbone = BACKBONES[name]
    model, base, args = adapt(backbone, method), backbone.build(), backbone.inputs(2, 5)
    features: Any = model.forward_features
    head: Any = model.forward_head
    plain: Any = base.forward_features
    with torch.no_grad():
        assert torch.equal(head(features(*args)), model(*args))
        with model.disable_adapter():
            assert torch.equal(features(*args), plain(*args))


# ---- taking adapters off ---------------------------------------------------------------------------------------------


@every_pair
def test_unload_restores_the_backbone(method: str, backbone: TinyBackbone) -> None:
    base = unusual(backbone.build())
    before = fingerprint(base)
    model = get_peft_model(base, config(method), example_inputs=backbone.example)
    _complete(model, backbone, "default", 0, fresh=False)
    add(model, backbone, method, "second")
    for flag in (True, False):
        model.train(flag)
        run(model, backbone)
    modules = [module for _, module in base.named_modules(remove_duplicate=False)]
    for module, state in zip(modules, before.values(), strict=True):
        if not isinstance(module, _NormBase):
            module.training = state["training"]
    for name, parameter in base.named_parameters():
        assert not parameter.requires_grad, name
    assert model.unload() is base
    after = fingerprint(base)
    norms = [path for path, module in base.named_modules() if isinstance(module, _NormBase)]
    for path in norms:  # train(flag) asked for this mode
        assert after[path].pop("training") is False
        before[path].pop("training")
    assert after == before
    assert not any(SITE in vars(module) for module in base.modules())
    assert model.active_adapters == ()
    again = get_peft_model(base, config(method), example_inputs=backbone.example)
    assert isinstance(again, PointPeftModel)
    assert again.unload() is base


@every_pair
def test_unload_at_once_restores_every_flag(method: str, backbone: TinyBackbone) -> None:
    base = unusual(backbone.build())
    before = fingerprint(base)
    get_peft_model(base, config(method), example_inputs=backbone.example).unload()
    assert fingerprint(base) == before
    held(inject_adapter(base, config(method), example_inputs=backbone.example)).unload()
    assert fingerprint(base) == before


@every_pair
def test_a_deleted_adapter_leaves_the_others_as_they_were(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, ToyConfig(modules_to_save=[], layers_to_transform=[0]), adapter_name="toy")
    output, before = run(model, backbone), fingerprint(model)
    add(model, backbone, method, "b")
    run(model, backbone)
    model.set_adapter(["toy", "b"])
    run(model, backbone)
    model.delete_adapter("b")
    assert model.active_adapters == ("toy",)
    assert torch.equal(run(model, backbone), output)
    after = fingerprint(model)
    for state in (*before.values(), *after.values()):  # hooks may be the same ones under other numbers
        state["hooks"] = {name: sorted(map(repr, dict(hooks).values())) for name, hooks in state["hooks"].items()}
    assert after == before


@every_pair
def test_merging_is_exact_or_refused(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, config(method, modules_to_save=[backbone.heads[-1]]))
    before = fingerprint(model)
    with pytest.raises(AdapterError, match="cannot be merged|could not be merged"):
        model.merge()  # its head may have another shape or class, and is never part of the backbone
    assert fingerprint(model) == before
    if method == "LINEAR_PROBE":
        return
    model = adapt(backbone, config(method, modules_to_save=[]))
    adapter, output, before = get_adapter(model, "default"), run(model, backbone), fingerprint(model)
    able = all(part.mergeable for _, part in adapter.all_parts()) and not list(adapter.shared_states())
    if not able:
        with pytest.raises(AdapterError, match="cannot be merged"):
            model.merge()
        assert fingerprint(model) == before
        return
    model.merge()
    assert model.merged_adapters == ("default",)
    assert distance(run(model, backbone), output) < 1e-4
    refused: list[Callable[[], Any]] = [
        model.unload,
        lambda: model.delete_adapter("default"),
        lambda: model.add_adapter("second", config(method)),
    ]
    for call in refused:
        with pytest.raises(AdapterError, match="merged into the backbone"):
            call()
    model.unmerge()
    assert fingerprint(model) == before and torch.equal(run(model, backbone), output)
    merged = model.merge_and_unload()
    assert distance(run(merged, backbone), output) < 1e-4
    assert not any(SITE in vars(module) or module._forward_hooks for module in merged.modules())


# ---- failures --------------------------------------------------------------------------------------------------------


def _no_head() -> nn.Module:
    raise RuntimeError("the factory fails")


def _named(name: Any, backbone: TinyBackbone) -> dict[str, Any]:
    return {"config": _toy, "adapter_name": name}


_toy = ToyConfig(modules_to_save=[])
FAILURES: dict[str, tuple[Callable[[TinyBackbone], dict[str, Any]], type[Exception], str]] = {
    "unknown target": (lambda b: {"config": ToyConfig(target_modules=["nope"])}, MatchError, "nope"),
    "broken pattern": (lambda b: {"config": ToyConfig(target_modules="blocks.(")}, MatchError, r"blocks\.\("),
    "unmatched exclusion": (lambda b: {"config": ToyConfig(exclude_modules=["nope"])}, MatchError, "nope"),
    "no such layer": (lambda b: {"config": ToyConfig(layers_to_transform=[99])}, AnatomyError, "no block 99"),
    "unknown module to save": (lambda b: {"config": ToyConfig(modules_to_save=["nope"])}, MatchError, "nope"),
    "container to save": (
        lambda b: {"config": LinearProbeConfig(modules_to_save=["blocks.blocks"])},
        AdapterError,
        "'blocks.blocks' is a ModuleList, which is never called",
    ),
    "parts in a module to save": (lambda b: {"config": ToyConfig(modules_to_save=["blocks"])}, AdapterError, "lies in"),
    "unknown head": (lambda b: {"config": _toy, "heads": {"nope": nn.Linear(2, 2)}}, MatchError, "nope"),
    "failing factory": (lambda b: {"config": _toy, "heads": {b.heads[-1]: _no_head}}, RuntimeError, "factory fails"),
    "factory of a number": (lambda b: {"config": _toy, "heads": {b.heads[-1]: lambda: 3}}, AdapterError, "gave a int"),
    "failing method": (lambda b: {"config": ToyConfig(fails=True)}, RuntimeError, "the toy fails"),
    "no configuration": (lambda b: {"config": "LORA"}, PointPeftError, "config must be"),
    "no bank": (lambda b: {"config": _toy, "memory_bank": torch.ones(20, 24)}, AdapterError, "no memory bank"),
    **{
        f"name {name!a:.12}": (functools.partial(_named, name), AdapterError, "is not valid")
        for name in ("", "a/b", "..", "a..b", "-x", ".x", "a b", "ä", "a" * 101, 3, None)
    },
}

ENTRANCES = ("get_peft_model", "inject_adapter", "add_adapter")


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", ["point_mae", "torch_pointcloud_part_seg"])
def test_a_failed_injection_leaves_the_model_as_it_was(name: str, failure: str, entrance: str) -> None:
    make, error, match = FAILURES[failure]
    _check_failure(BACKBONES[name], entrance, make(BACKBONES[name]), error, match)


@pytest.mark.parametrize("entrance", ENTRANCES)
@every_pair
def test_a_failure_beside_a_method_leaves_the_model_as_it_was(
    method: str, backbone: TinyBackbone, entrance: str
) -> None:
    options = {"config": PeftConfig(tuners=[config(method), ToyConfig(fails=True)])}
    _check_failure(backbone, entrance, options, RuntimeError, "the toy fails")


def _check_failure(
    backbone: TinyBackbone, entrance: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = unusual(backbone.build())
    if entrance == "add_adapter":
        adapted = get_peft_model(model, ToyConfig(), example_inputs=backbone.example)
        before = fingerprint(adapted)
        with pytest.raises(error, match=match):
            adapted.add_adapter(**{"adapter_name": "second", **options})
        assert fingerprint(adapted) == before
        run(adapted, backbone)
        return
    before = fingerprint(model)
    enter: Any = get_peft_model if entrance == "get_peft_model" else inject_adapter
    with pytest.raises(error, match=match):
        enter(model, example_inputs=backbone.example, **options)
    assert fingerprint(model) == before
    enter(model, ToyConfig(), example_inputs=backbone.example)  # and it can still be adapted


def test_names_that_are_taken_or_unknown_are_refused() -> None:
    backbone = BACKBONES["compact"]
    model = adapt(backbone, _toy)
    before = fingerprint(model)
    with pytest.raises(AdapterError, match="there is an adapter 'default' already"):
        model.add_adapter("default", _toy)
    with pytest.raises(AdapterError, match="adapted model already"):
        get_peft_model(model.base_model, _toy)
    with pytest.raises(AdapterError, match="adapted already"):
        get_peft_model(model, _toy)
    with pytest.raises(AdapterError, match="no adapter 'other'; adapters: 'default'"):
        model.set_adapter("other")
    with pytest.raises(AdapterError, match="named twice"):
        model.set_adapter(["default", "default"])
    with pytest.raises(AdapterError, match="no adapter 'defaul'"), model.use_adapter("defaul"):
        pass
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        model.delete_adapter("other")
    assert fingerprint(model) == before


def test_a_model_that_no_preset_describes_is_refused_untouched() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = fingerprint(model)
    with pytest.raises(AnatomyError, match="no preset describes"):
        get_peft_model(model, ToyConfig())
    with pytest.raises(AdapterError, match="would run its adapters as one of its layers"):
        inject_adapter(model, LinearProbeConfig(modules_to_save=["0"]))
    assert fingerprint(model) == before


@every_method
def test_a_module_that_is_never_called_is_reported(method: str) -> None:
    backbone = BACKBONES["compact"]
    base = compact_like(backbone.build(), spare=True)
    message = r"'spare'.* had no effect, because that module \(Linear\) was not called"
    model = get_peft_model(base, config(method, modules_to_save=["spare", "cls_head_finetune"]))
    _complete(model, backbone, "default", 0, fresh=False)
    for _ in range(2):
        with pytest.raises(AdapterError, match=message):
            run(model, backbone)
    with model.disable_adapter():
        assert torch.equal(run(model, backbone), run(frozen(backbone), backbone))
    with pytest.raises(AdapterError, match="'spares' is a ModuleList, which is never called: name what it holds"):
        model.add_adapter("second", config(method, modules_to_save=["spares"]))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("one token more", r"should get 1 prefix .*\(2, 16, 3\); it got tokens \(2, 18, 24\)"),
        ("sequence first", r"should get 1 prefix .*\(2, 16, 3\); it got tokens \(17, 2, 24\)"),
        ("flat", r"should get tokens \(b, g, c\), c = 24, at its input\[0\]; got \(34, 24\)"),
    ],
    ids=["prefix", "sequence-first", "flat"],
)
@every_method
def test_a_block_that_gets_other_tokens_is_reported(method: str, layout: str, message: str) -> None:
    backbone = BACKBONES["compact"]
    model = adapt(backbone, method)
    output = run(model, backbone)
    base = model.base_model
    assert isinstance(base, Compact)
    base.layout = layout
    if not any(part.needs_coordinates for _, part in get_adapter(model, "default").all_parts()):
        base.layout = "one token more"  # which is nothing to this method
        assert run(model, backbone).shape == output.shape
        return
    with pytest.raises(AnatomyError, match=r"block 'blocks\.blocks\.0' " + message):
        run(model, backbone)
    base.layout = "right"
    assert torch.equal(run(model, backbone), output)


# ---- a model that keeps its class ------------------------------------------------------------------------------------


@every_pair
def test_an_injected_model_keeps_its_class_and_checkpoint(method: str, backbone: TinyBackbone, tmp_path: Path) -> None:
    plain = frozen(backbone)
    base = backbone.build()
    before = fingerprint(base)
    torch.manual_seed(0)
    model = inject_adapter(base, config(method), example_inputs=backbone.example)
    assert model is base and type(model) is type(plain) and "forward" not in vars(model)
    holder = held(model)
    assert holder.get_base_model() is model
    _complete(holder, backbone, "default", 0, fresh=False)
    expected = run(adapt(backbone, method), backbone)
    assert torch.equal(run(model, backbone), expected)
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in holder.parameters()} != set()
    with holder.disable_adapter():
        assert torch.equal(run(model, backbone), run(plain, backbone))

    full = values(model)
    assert [name for name in full if not name.startswith("point_peft.")] == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    model.load_state_dict(full, strict=True)
    del full[next(name for name in full if name.startswith("point_peft."))]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(full, strict=True)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, backbone), expected)
        rescramble(held(copied))
        assert not torch.equal(run(copied, backbone), expected) and torch.equal(run(model, backbone), expected)
    _check_injected_training(model, backbone, plain)
    model.eval()
    expected = run(model, backbone)
    holder.save_pretrained(tmp_path)
    assert torch.equal(run(PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval(), backbone), expected)
    inject_adapter(model, ToyConfig(), "second")
    assert torch.equal(run(model, backbone), expected) and list(holder.adapters) == ["default", "second"]
    assert holder.unload() is model
    assert torch.equal(run(model, backbone), run(backbone.build(), backbone))
    assert fingerprint(model) == before


def _check_injected_training(model: nn.Module, backbone: TinyBackbone, plain: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(backbone.select(model(*backbone.inputs(3, 30 + step)))).backward()
        optimizer.step()
    base = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("point_peft.")}
    assert_same_values(base, plain.state_dict())


# ---- several processes -----------------------------------------------------------------------------------------------

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
SPREAD = ("point_mae", "compact")
"""The backbones that the tests with several processes run on."""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each of two processes found, see `_on_rank`."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = spawn(_on_rank, args=(port, str(folder)), nprocs=2, join=False)
    assert context is not None
    deadline = time.monotonic() + 240
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two processes did not end in time")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _on_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    process = PartialState(cpu=True)
    torch.set_num_threads(1)  # which accelerate has set otherwise; sums in one order, as in tests/conftest.py
    assert process.num_processes == 2 and process.process_index == rank
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, method in itertools.product(SPREAD, METHOD_NAMES):
        backbone = BACKBONES[name]
        torch.manual_seed(0)
        model = get_peft_model(backbone.build(), config(method))
        adapter = get_adapter(model, "default")
        if banks(adapter):
            build_bank(model, backbone, "default", slice(rank, None, 2))
        bank = {key: tensor.clone() for state in banks(adapter) for key, tensor in state.named_buffers()}
        rescramble(model)
        spread = nn.parallel.DistributedDataParallel(model.eval())
        loss_of(backbone.select(spread(*backbone.inputs(3, 40 + rank)))).backward()
        averaged = gradients(adapter)
        optimizer = torch.optim.AdamW(spread.parameters(), lr=0.01)
        spread.train()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(backbone.select(spread(*backbone.inputs(3, 50 + rank)))).backward()
            optimizer.step()
        found[name, method] = {
            "bank": bank,
            "gradients": averaged,
            "trained": {key: parameter.detach() for key, parameter in adapter.named_parameters()},
            "base": values(model.base_model),
        }
    torch.save(found, Path(folder) / f"{rank}.pt")
    process.destroy_process_group()


@needs_processes
@pytest.mark.parametrize("name", SPREAD)
@every_method
def test_two_processes_train_as_one(method: str, name: str, two_processes: Any) -> None:
    backbone = BACKBONES[name]
    first, second = (found[name, method] for found in two_processes)
    assert_same_values(first["gradients"], second["gradients"])
    assert_same_values(first["trained"], second["trained"])
    for found in (first, second):
        assert_same_values(found["base"], backbone.build().state_dict())
    torch.manual_seed(0)
    model = adapt(backbone, method, fresh=True)
    adapter = get_adapter(model, "default")
    if banks(adapter):
        build_bank(model, backbone, "default")
    rescramble(model)
    loss = sum(loss_of(backbone.select(model(*backbone.inputs(3, 40 + rank)))) for rank in range(2)) / 2
    _backward(loss)  # type: ignore[arg-type]
    assert list(first["gradients"]) == list(gradients(adapter))
    for key, gradient in gradients(adapter).items():
        assert distance(first["gradients"][key], gradient) < 1e-5, key


@needs_processes
@pytest.mark.parametrize("name", SPREAD)
@every_method
def test_two_processes_build_the_bank_that_one_builds(method: str, name: str, two_processes: Any) -> None:
    backbone = BACKBONES[name]
    model = adapt(backbone, method, fresh=True)
    adapter = get_adapter(model, "default")
    if not banks(adapter):
        with pytest.raises(AdapterError, match="has no memory bank"):
            build_bank(model, backbone, "default")
        return
    for flag in (False, True):
        model.train(flag)
        with nullcontext() if flag else torch.no_grad():
            build_bank(model, backbone, "default")
        alone = {key: tensor for state in banks(adapter) for key, tensor in state.named_buffers()}
        assert len(next(iter(alone.values()))) == 16
        for found in two_processes:
            assert_same_values(found[name, method]["bank"], alone)
