"""Guarantees of every method beyond `tests/test_conformance.py`, on backbones that stand for the others.

Threads, tasks, processes, replicas, copies, checkpointing, several adapters, failures. `tests.adapting.representatives`
says which method is tried on which backbone; it goes by what is registered, nothing is listed here.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import io
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AnatomyError,
    LinearProbeConfig,
    MatchError,
    PeftConfig,
    PointPeftError,
    PointPeftModel,
    get_peft_model,
    inject_adapter,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.site import SITE
from point_peft.anatomy.presets import known_anatomy
from tests.adapting import (
    METHOD_NAMES,
    PAIRS,
    adapt,
    add,
    assert_same_values,
    assert_unloaded,
    banks,
    complete,
    distance,
    each,
    each_group,
    every_method,
    few,
    few_groups,
    fingerprint,
    form_of,
    frozen,
    gradients,
    held,
    in_groups,
    in_threads,
    kinds,
    loss_of,
    one_adapter,
    plain,
    representatives,
    rescramble,
    run,
    scramble,
    stated,
    unchanged_when_fresh,
    unusual,
    values,
)
from tests.hanging import LONG
from tests.methods import HEADS_ALONE, ToyConfig, config
from tests.zoo import BACKBONES, CLASSES, Args, Compact, TinyBackbone, compact_like, enliven
from tools import capabilities

# ---- which method on which backbone ----------------------------------------------------------------------------------

a_few = each(few(representatives(PAIRS)))
few_together = each_group(few_groups(PAIRS))
every_backbone = each(few(representatives(PAIRS), of=lambda backbone: backbone.name))


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=lambda backbone: backbone.name)
def test_a_backbone_is_of_the_kind_that_it_says(backbone: TinyBackbone) -> None:
    """The first of these that holds; it is stated, because whoever collects tests need not build every backbone."""
    anatomy = backbone.traced or known_anatomy(backbone.build())
    assert anatomy is not None
    stages = anatomy.stages
    holds = {
        "packed": any(stage.layout == "packed" for stage in stages),
        "hierarchical": len(stages) > 1,
        "weights read": any(r.module.startswith(f"{b.path}.") for r in anatomy.reads for b in anatomy.blocks),
        "masked or sequence first": any(
            stage.masks or stage.padding_masks or stage.layout == "gbc" for stage in stages
        ),
        "prefix tokens": any(stage.prefix_tokens != 0 for stage in stages),
        "patch tokens alone": True,
    }
    assert backbone.kind == next(name for name, it_does in holds.items() if it_does)


def test_representatives_are_every_method_on_every_kind_and_every_backbone() -> None:
    found = representatives(PAIRS)
    assert len(set(found)) == len(found) and set(found) <= set(PAIRS)
    assert {(form_of(m), b.kind) for m, b in found} == {(form_of(m), b.kind) for m, b in PAIRS}
    assert {backbone.name for _, backbone in found} == {backbone.name for _, backbone in PAIRS}
    fewer = [pair for pair in PAIRS if pair[0] != "LORA"]  # which moves none of the other methods
    count = len({(form_of(method), backbone.kind) for method, backbone in fewer})
    assert set(representatives(fewer)[:count]) <= set(found)
    some = few(found)
    assert set(some) <= set(found) and len(some) < len(found) / 3
    assert {form_of(method) for method, _ in some} == {form_of(method) for method, _ in PAIRS}
    assert {backbone.kind for _, backbone in some} == {backbone.kind for _, backbone in PAIRS}
    joint = few_groups(PAIRS)
    assert {form_of(method) for methods, _ in joint for method in methods} == {form_of(method) for method, _ in PAIRS}
    assert {backbone.kind for _, backbone in joint} == {backbone.kind for _, backbone in PAIRS}
    assert all((method, backbone) in PAIRS for methods, backbone in joint for method in methods)
    each_once = few(found, of=lambda backbone: backbone.name)
    assert {form_of(method) for method, _ in each_once} == {form_of(method) for method, _ in PAIRS}
    assert {backbone.name for _, backbone in each_once} == {backbone.name for _, backbone in PAIRS}


# ---- outputs ---------------------------------------------------------------------------------------------------------


@a_few
def test_every_buffer_has_an_effect(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method)
    routes = not all(state.in_forward for state in get_adapter(model, "default").shared_states())

    def told() -> Tensor:
        """The output, or the scores of a bank that no forward reads."""
        return model.route(backbone.inputs(2, 5))[1] if routes else run(model, backbone)

    output = told()
    generator = torch.Generator().manual_seed(9)
    for name, tensor in get_adapter(model, "default").tensors().items():
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            continue
        before = tensor.clone()
        scramble(name, tensor, generator)
        assert not torch.equal(told(), output), f"{name} has no effect"
        tensor.copy_(before)
    assert torch.equal(told(), output)


@a_few
def test_bfloat16_autocast_runs_and_stays_near(method: str, backbone: TinyBackbone) -> None:
    if not backbone.bfloat16:
        pytest.skip(f"{backbone.name} itself does not run in bfloat16")
    model = adapt(backbone, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = backbone.select(model(*backbone.inputs(2, 5)))
    # A query that is rounded may retrieve other rows of a bank that are as near.
    tolerance = 0.5 if banks(get_adapter(model, "default")) else 0.15
    assert distance(near.detach().float(), run(model, backbone)) < tolerance
    loss_of(near).backward()
    for name, parameter in get_adapter(model, "default").named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


# ---- the backbone stays as it is -------------------------------------------------------------------------------------


@every_backbone
def test_training_and_unloading_leave_the_backbone_as_it_was(method: str, backbone: TinyBackbone) -> None:
    """Keys, types, values, flags and hooks of the backbone, whether its own train mode is set or the model's."""
    base = unusual(backbone.build())
    before, start, types = fingerprint(base), values(base), kinds(base)
    model = get_peft_model(base, stated(method, backbone))
    complete(model, backbone, "default", 0, fresh=True)
    assert model.get_base_model() is base and kinds(base) == types, "adapting changed a type or a name"
    adapter = get_adapter(model, "default")
    fresh = values(adapter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    # Three steps, because what two zero layers hide has no gradient in the first two.
    for step, who in enumerate(("the model", "its backbone", "the model")):
        _set_training(model.eval(), who)
        optimizer.zero_grad()
        loss_of(backbone.select(model(*backbone.inputs(2, 30 + step)))).backward()
        optimizer.step()
        assert_same_values(base.state_dict(), start, "the backbone in training")
        dropouts = [module for module in base.modules() if type(module).__name__ in ("Dropout", "DropPath")]
        assert all(module.training for module in dropouts), f"train mode of {who} does not reach the dropouts"
    for name, parameter in base.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad, f"{name} of the backbone is trained"
    for name, parameter in adapter.named_parameters():
        assert not torch.equal(parameter, fresh[name]), f"{name} did not learn"
    with model.eval().disable_adapter():
        assert torch.equal(run(model, backbone), plain(backbone)), "after training, disabled, it is not the backbone"
    model.train()
    with model.disable_adapter():
        torch.manual_seed(4)
        output = run(model, backbone)
    # Up to rounding: the library's encoder folds its norms in training, but not where an adapter hooks its layers.
    same = torch.allclose(output, plain(backbone, training=True), atol=1e-5)
    assert same, "disabled in train mode, it is not the backbone"
    model.eval()

    add(model, backbone, method, "second")
    run(model, backbone)
    assert kinds(base) == types, "using it changed a type or a name"
    assert_unloaded(model, before)


def _set_training(model: PointPeftModel, who: str) -> None:
    if who == "the model":
        model.train()
    else:
        get_adapter(model, "default").train()
        model.base_model.train()


@few_together
def test_the_backbone_s_checkpoint_loads_into_the_adapted_model(
    methods: tuple[str, ...], backbone: TinyBackbone
) -> None:
    model, other = adapt(backbone, methods), frozen(backbone)
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


# ---- files -----------------------------------------------------------------------------------------------------------


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


@few_together
def test_adapters_are_swapped_without_a_trace(methods: tuple[str, ...], backbone: TinyBackbone) -> None:
    model = adapt(backbone, methods, adapter_name="a")
    alone_a = run(model, backbone)
    alone_b = run(adapt(backbone, methods, seed=1, adapter_name="b"), backbone)
    add(model, backbone, methods, "b", seed=1)
    assert model.active_adapters == ("a",) and torch.equal(run(model, backbone), alone_a)
    model.set_adapter("b")
    assert torch.equal(run(model, backbone), alone_b) and not torch.equal(alone_a, alone_b)
    model.set_adapter("a")
    assert torch.equal(run(model, backbone), alone_a)
    with model.use_adapter("b"):
        assert torch.equal(run(model, backbone), alone_b)
        with model.disable_adapter():
            assert torch.equal(run(model, backbone), plain(backbone))
    assert torch.equal(run(model, backbone), alone_a)


@a_few
def test_two_adapters_act_together_in_the_order_given(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method, adapter_name="a")
    add(model, backbone, method, "b")
    alone = {name: _with(model, backbone, [name]) for name in ("a", "b")}
    both, swapped = _with(model, backbone, ["a", "b"]), _with(model, backbone, ["b", "a"])
    outputs = [*alone.values(), both, swapped]
    if method in HEADS_ALONE:  # heads do not add up: that of the first counts
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


@few_together
def test_several_methods_are_one_adapter(methods: tuple[str, ...], backbone: TinyBackbone, tmp_path: Path) -> None:
    model = _check_one_adapter(methods, backbone)
    output = run(model, backbone)
    model.save_pretrained(tmp_path)
    torch.manual_seed(999)
    assert torch.equal(run(PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval(), backbone), output)


_labels = capabilities.labels("compact")
_threes = [_labels[i : i + 3] for i in range(0, len(_labels), 3)]


@pytest.mark.parametrize("methods", [one + other for one, other in itertools.combinations(_threes, 2)], ids=" ".join)
def test_any_two_methods_are_one_adapter(methods: Sequence[str]) -> None:
    """Six at a time, so that each two of all are together in one of them."""
    _check_one_adapter(tuple(methods), BACKBONES["compact"])


def _check_one_adapter(methods: tuple[str, ...], backbone: TinyBackbone) -> PointPeftModel:
    how = one_adapter(methods)
    model = adapt(backbone, how, fresh=True)
    changed = distance(run(model, backbone), plain(backbone))
    assert changed < 1e-5 if unchanged_when_fresh(how, backbone) else changed > 1e-4
    rescramble(model)
    args = backbone.inputs(3, 6)
    output = backbone.select(model(*args))
    loss_of(output).backward()
    for name, parameter in get_adapter(model, "default").named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient"
    assert distance(run(model, backbone, backbone.slice(args, 2)), output[2:].detach()) < 1e-5
    return model


@a_few
def test_adapters_of_different_methods_live_side_by_side(method: str, backbone: TinyBackbone) -> None:
    """Both act and learn, alone and together; one that is deleted leaves the other as it was."""
    model = adapt(backbone, ToyConfig(modules_to_save=[], layers_to_transform=[0]), adapter_name="toy")
    output, before = run(model, backbone), fingerprint(model)
    add(model, backbone, method, "a")
    alone, both = _with(model, backbone, ["a"]), _with(model, backbone, ["a", "toy"])
    assert not any(torch.equal(one, other) for one, other in itertools.combinations([output, alone, both], 2))
    model.set_adapter(["toy", "a"])
    loss_of(backbone.select(model(*backbone.inputs(2, 5)))).backward()
    for key, parameter in get_adapter(model, "a").named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), f"{key} got no gradient"
    assert all(parameter.grad is not None for parameter in get_adapter(model, "toy").parameters())
    model.delete_adapter("a")
    assert model.active_adapters == ("toy",)
    assert torch.equal(run(model, backbone), output)
    model.zero_grad()
    after = fingerprint(model)
    for state in (*before.values(), *after.values()):  # hooks may be the same ones under other numbers
        state["hooks"] = {name: sorted(map(repr, dict(hooks).values())) for name, hooks in state["hooks"].items()}
    assert after == before


@few_together
def test_an_adapter_has_a_head_of_its_own_shape(
    methods: tuple[str, ...], backbone: TinyBackbone, tmp_path: Path
) -> None:
    model = adapt(backbone, methods, adapter_name="a")
    first = run(model, backbone)
    path, factory = backbone.other_head
    add(model, backbone, methods, "seven", heads={path: factory})
    with model.use_adapter("seven"):
        output = run(model, backbone)
    assert output.shape == (*first.shape[:-1], 7)
    assert torch.equal(run(model, backbone), first)
    model.save_pretrained(tmp_path, "seven")
    reloaded = PointPeftModel.from_pretrained(backbone.build(), tmp_path, "seven").eval()
    assert torch.equal(run(reloaded, backbone), output)
    given = adapt(backbone, methods, heads={path: factory()})
    assert run(given, backbone).shape[-1] == 7
    with given.disable_adapter():
        assert run(given, backbone).shape[-1] == CLASSES


# ---- copies ----------------------------------------------------------------------------------------------------------


@few_together
def test_a_deep_copy_is_adapted_and_independent(methods: tuple[str, ...], backbone: TinyBackbone) -> None:
    model = adapt(backbone, methods)
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


@few_together
def test_pickle_and_torch_save_carry_the_whole_model(methods: tuple[str, ...], backbone: TinyBackbone) -> None:
    model = adapt(backbone, methods)
    output = run(model, backbone)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), backbone), output)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(copied, backbone), output)
    rescramble(copied)
    assert not torch.equal(run(copied, backbone), output) and torch.equal(run(model, backbone), output)


@few_together
def test_replicas_of_data_parallel_run_on_their_own_tensors(methods: tuple[str, ...], backbone: TinyBackbone) -> None:
    model = adapt(backbone, methods, adapter_name="a")
    add(model, backbone, methods, "b")
    injected = backbone.build()
    inject_adapter(injected, stated(methods, backbone), "a")
    holder = held(injected)
    complete(holder, backbone, "a", 0, fresh=False)
    add(holder, backbone, methods, "b")
    injected.eval()
    args = backbone.inputs(2, 6)
    shards = [backbone.slice(args, i) for i in range(2)]
    for whole, root in ((model, model), (injected, holder)):
        with root.use_adapter("b"):
            expected = []
            for shard, factor in zip(shards, (1.0, 1.02), strict=True):
                with _times(whole, factor):
                    expected.append(run(whole, backbone, shard))
            replicas = [_replicate(whole, factor) for factor in (1.0, 1.02)]
            outputs: list[Any] = [None, None]

            def work(i: int, replicas: Any = replicas, outputs: Any = outputs) -> None:
                outputs[i] = replicas[i](*shards[i])

            in_threads([functools.partial(work, i) for i in range(2)])
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(backbone.select(output), wanted)
        loss_of(torch.cat([backbone.select(output) for output in outputs])).backward()
        for name, parameter in get_adapter(root, "b").named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient"


@contextmanager
def _times(model: nn.Module, factor: float) -> Iterator[None]:
    """Within the block the parameters are `factor` times what they are."""
    parameters = list(model.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(factor)
        yield
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _replicate(model: nn.Module, factor: float) -> nn.Module:
    """Do as `torch.nn.parallel.replicate` does for one device, with tensors that are `factor` times the model's."""
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


# Those that change nothing when fresh are one adapter; two that put tokens before the others cannot be checkpointed
# together. Each alone with the reentrant kind, which some of them refuse.
AS_ONE = [
    tuple(method for method in METHOD_NAMES if config(method).identity_at_init),
    *[(method,) for method in METHOD_NAMES if not config(method).identity_at_init],
]
CHECKPOINTED = [
    *[pytest.param(methods, False, id=f"{'+'.join(methods)}-saved-tensors") for methods in AS_ONE],
    *[pytest.param((method,), True, id=f"{method}-reentrant") for method in METHOD_NAMES],
]


@pytest.mark.parametrize("again", ["inside", "block", "container"])
@pytest.mark.parametrize(("methods", "reentrant"), CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(methods: tuple[str, ...], again: Any, reentrant: bool) -> None:
    backbone = BACKBONES["compact"]
    found = _plain_step(methods)
    for backward in (_backward, _backward_elsewhere):
        model = _checkpointed(backbone, methods, again, reentrant)
        with _refusing(reentrant):
            _assert_same_step(_step(model, backbone, backward), found)


@contextmanager
def _refusing(reentrant: bool) -> Iterator[None]:
    """A method that hands tensors on beside the tokens refuses the reentrant kind, which would lose their gradient."""
    try:
        yield
    except AdapterError as error:
        if not reentrant or "use_reentrant=False" not in str(error):
            raise


@functools.cache
def _plain_step(methods: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    backbone = BACKBONES["compact"]
    return _step(adapt(backbone, methods).train(), backbone, _backward)


def _checkpointed(backbone: TinyBackbone, methods: tuple[str, ...], again: Any, reentrant: bool) -> PointPeftModel:
    """The model of `adapt`, in train mode, with checkpointing."""
    base = compact_like(backbone.build(), again=again, reentrant=reentrant)
    torch.manual_seed(0)
    model = get_peft_model(base, stated(methods, backbone), example_inputs=backbone.example)
    complete(model, backbone, "default", 0, fresh=False)
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
    in_threads([lambda: _backward(loss)])


@pytest.mark.parametrize(
    ("again", "methods", "reentrant"),
    [
        *[(again, *of.values) for again in ("inside", "block", "container") for of in CHECKPOINTED if not of.values[1]],
        *[("block", *of.values) for of in CHECKPOINTED if of.values[1]],
    ],
)
def test_checkpointing_remembers_the_adapter_of_each_forward(
    methods: tuple[str, ...], again: Any, reentrant: bool
) -> None:
    """Two forwards with different adapters, then their backward passes: in turn, and as one.

    The reentrant kind is tried at blocks alone: what it runs again elsewhere, the test above compares.
    """
    with _refusing(reentrant):
        _assert_same_gradients(_remembered(methods, again=again, reentrant=reentrant), _remembered(methods))


def _assert_same_gradients(found: dict[tuple[str, str], dict[str, Tensor]], wanted: dict[tuple[str, str], Any]) -> None:
    assert list(found) == list(wanted)
    for where, gradients_there in wanted.items():
        assert list(found[where]) == list(gradients_there)
        for key, gradient in gradients_there.items():
            assert distance(found[where][key], gradient) < 1e-5, f"{where}: {key}"


@functools.cache
def _remembered(methods: tuple[str, ...], **checkpointing: Any) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(order, adapter) -> the gradients of two adapters, by both orders of their backward passes."""
    backbone = BACKBONES["compact"]
    torch.manual_seed(0)
    model = get_peft_model(compact_like(backbone.build(), **checkpointing), stated(methods, backbone), "a")
    complete(model, backbone, "a", 0, fresh=False)
    add(model, backbone, methods, "b")
    model.eval()
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for order in ("in turn", "at once"):
        model.zero_grad()
        losses = []
        for name, seed in (("a", 5), ("b", 6)):
            model.set_adapter(name)
            losses.append(loss_of(backbone.select(model(*backbone.inputs(2, seed)))))
        with model.disable_adapter():
            for loss in losses if order == "in turn" else [losses[0] + losses[1]]:
                _backward(loss)
        found |= {(order, name): gradients(get_adapter(model, name)) for name in ("a", "b")}
    return found


# ---- threads, tasks, exceptions --------------------------------------------------------------------------------------

SETS: tuple[tuple[str, ...], ...] = (("a",), ("b",), (), ("a", "b"), ("b", "a"))


def _crowd(
    backbone: TinyBackbone, method: str | tuple[str, ...], args: Args, sets: Sequence[tuple[str, ...]]
) -> tuple[PointPeftModel, dict[tuple[str, ...], Tensor]]:
    """A model of the adapters that are named in `sets`, and what each of these gives."""
    model = adapt(backbone, method, adapter_name="a")
    for number, name in enumerate(sorted({name for names in sets for name in names} - {"a"})):
        add(model, backbone, method, name, seed=number + 1)
    return model, {names: _with(model, backbone, names, args) for names in sets}


@few_together
def test_eight_threads_with_adapters_of_their_own(methods: tuple[str, ...], backbone: TinyBackbone) -> None:
    args = backbone.inputs(1, 5)
    model, expected = _crowd(backbone, methods, args, SETS)
    everyone = threading.Barrier(8, timeout=LONG)

    def with_use(names: tuple[str, ...]) -> None:
        with model.use_adapter(names):
            everyone.wait()  # all have their adapters before any of them runs
            assert torch.equal(run(model, backbone, args), expected[names]), names
        assert model.active_adapters == ("a",)

    def with_set(names: tuple[str, ...]) -> None:
        model.set_adapter(names)
        everyone.wait()
        assert torch.equal(run(model, backbone, args), expected[names]), names
        assert model.active_adapters == names

    for task in (with_use, with_set):
        in_threads([functools.partial(task, names) for names in itertools.islice(itertools.cycle(expected), 8)])


@in_groups(METHOD_NAMES)
def test_asyncio_tasks_with_adapters_of_their_own(methods: tuple[str, ...]) -> None:
    backbone = BACKBONES["point_mae"]
    args = backbone.inputs(1, 5)
    model, expected = _crowd(backbone, methods, args, SETS)

    async def with_use(names: tuple[str, ...]) -> None:
        with model.use_adapter(names):
            await asyncio.sleep(0)
            assert torch.equal(run(model, backbone, args), expected[names]), names

    async def with_set(names: tuple[str, ...]) -> None:
        model.set_adapter(names)
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
        in_threads([lambda: model.delete_adapter("b")])
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


@few_together
def test_an_exception_in_a_forward_leaves_nothing_behind(methods: tuple[str, ...], backbone: TinyBackbone) -> None:
    model, args = adapt(backbone, methods), backbone.inputs(2, 6)
    assert model.anatomy is not None
    first, last = model.anatomy.blocks[0], model.anatomy.blocks[-1]
    output = run(model, backbone)
    before = fingerprint(model)
    inside = first.mlp or first.attention or first.linears[0]
    places = ((first.path, "before"), (inside, "after"), (last.path, "after"), (backbone.heads[-1], "after"))
    for path, when in places:
        for grad in (torch.enable_grad, torch.no_grad):
            raising = _raising(model.base_model.get_submodule(path), RuntimeError("stop here"), when)
            with raising, pytest.raises(RuntimeError, match="^stop here$"), grad():
                model(*args)
        assert torch.equal(run(model, backbone), output)
    with model.disable_adapter():
        assert torch.equal(run(model, backbone), plain(backbone))
    assert fingerprint(model) == before


@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt("stop here")], ids=repr)
@in_groups(METHOD_NAMES)
def test_an_exception_does_not_reach_a_direct_call(methods: tuple[str, ...], error: BaseException) -> None:
    """A forward that was interrupted with an adapter active must not be taken for a forward that still runs."""
    backbone = BACKBONES["point_mae"]
    model, base = adapt(backbone, methods), backbone.build()
    (points,) = backbone.inputs(2, 6)
    (others,) = backbone.inputs(3, 7)
    block = model.base_model.get_submodule("blocks.blocks.1")
    with _raising(block, error, "before"), pytest.raises(type(error), match="^stop here$"):
        model(points)
    adapted_features: Any = model.base_model.forward_features
    plain_features: Any = base.forward_features
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(adapted_features(others), plain_features(others))
    assert torch.equal(run(model, backbone), run(adapt(backbone, methods), backbone))


@pytest.mark.parametrize(
    ("method", "name"),
    [(label, name) for name in ("point_mae", "torch_pointcloud") for label in capabilities.labels(name)],
)
def test_methods_of_the_backbone_run_adapted(method: str, name: str) -> None:
    backbone = BACKBONES[name]
    model, base, args = adapt(backbone, method), backbone.build(), backbone.inputs(2, 5)
    features: Any = model.forward_features
    head: Any = model.forward_head
    without: Any = base.forward_features
    with torch.no_grad():
        assert torch.equal(head(features(*args)), model(*args))
        with model.disable_adapter():
            assert torch.equal(features(*args), without(*args))


# ---- taking adapters off ---------------------------------------------------------------------------------------------


@a_few
def test_unload_at_once_restores_every_flag(method: str, backbone: TinyBackbone) -> None:
    base = unusual(backbone.build())
    before = fingerprint(base)
    get_peft_model(base, stated(method, backbone)).unload()
    assert fingerprint(base) == before
    held(inject_adapter(base, stated(method, backbone))).unload()
    assert fingerprint(base) == before


@a_few
def test_a_head_is_not_merged(method: str, backbone: TinyBackbone) -> None:
    """It may have another shape or class: `merge` refuses it, and `merge_and_unload` puts it in the base's place."""
    model = adapt(backbone, config(method, modules_to_save=list(backbone.heads)))
    before, output, names = fingerprint(model), run(model, backbone), list(model.base_model.state_dict())
    adapter = get_adapter(model, "default")
    able = all(part.mergeable or part.own_module is not None for _, part in adapter.all_parts())
    own = "its own '.*' is not a change .* merge_and_unload\\(\\) puts it in the place"
    with pytest.raises(AdapterError, match=own if able else "cannot be merged"):
        model.merge()
    assert fingerprint(model) == before
    if not able:
        with pytest.raises(AdapterError, match="cannot be merged: its .* is not a change of the backbone's weights$"):
            model.merge_and_unload()
        assert fingerprint(model) == before, "a refused merge changed the model"
        return
    merged = model.merge_and_unload()
    assert distance(run(merged, backbone), output) < 1e-4, "merged for good, it gives another output"
    assert list(merged.state_dict()) == names, "merged for good, it has other names"
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
@pytest.mark.parametrize("name", ["point_mae"])
def test_a_failed_injection_leaves_the_model_as_it_was(name: str, failure: str, entrance: str) -> None:
    make, error, match = FAILURES[failure]
    _check_failure(BACKBONES[name], entrance, make(BACKBONES[name]), error, match)


@pytest.mark.parametrize("entrance", ENTRANCES)
@few_together
def test_a_failure_beside_methods_leaves_the_model_as_it_was(
    methods: tuple[str, ...], backbone: TinyBackbone, entrance: str
) -> None:
    tuners = [*(config(method) for method in methods), ToyConfig(fails=True)]
    options = {"config": stated(PeftConfig(tuners=tuners), backbone)}
    _check_failure(backbone, entrance, options, RuntimeError, "the toy fails")


def _check_failure(
    backbone: TinyBackbone, entrance: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = unusual(backbone.build())
    if entrance == "add_adapter":
        adapted = get_peft_model(model, stated(ToyConfig(), backbone))
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
    enter(model, stated(ToyConfig(), backbone))  # and it can still be adapted


def test_names_that_are_taken_or_unknown_are_refused() -> None:
    backbone = BACKBONES["compact"]
    model = adapt(backbone, _toy)
    before = fingerprint(model)
    with pytest.raises(AdapterError, match="there is an adapter 'default' already"):
        model.add_adapter("default", _toy)
    with pytest.raises(AdapterError, match="is part of an adapted model"):
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
    with pytest.raises(AnatomyError, match=r"block 'blocks\.blocks\.\d' " + message):
        run(model, backbone)
    base.layout = "right"
    assert torch.equal(run(model, backbone), output)


# ---- a model that keeps its class ------------------------------------------------------------------------------------


@few_together
def test_an_injected_model_keeps_its_class_and_checkpoint(
    methods: tuple[str, ...], backbone: TinyBackbone, tmp_path: Path
) -> None:
    without = frozen(backbone)
    base = backbone.build()
    before = fingerprint(base)
    torch.manual_seed(0)
    model = inject_adapter(base, stated(methods, backbone))
    assert model is base and type(model) is type(without) and "forward" not in vars(model)
    holder = held(model)
    assert holder.get_base_model() is model
    complete(holder, backbone, "default", 0, fresh=False)
    expected = run(adapt(backbone, methods), backbone)
    assert torch.equal(run(model, backbone), expected)
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in holder.parameters()} != set()
    with holder.disable_adapter():
        assert torch.equal(run(model, backbone), plain(backbone))

    full = values(model)
    assert [name for name in full if not name.startswith("point_peft.")] == list(without.state_dict())
    model.load_state_dict(without.state_dict(), strict=True)
    model.load_state_dict(full, strict=True)
    del full[next(name for name in full if name.startswith("point_peft."))]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(full, strict=True)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, backbone), expected)
        rescramble(held(copied))
        assert not torch.equal(run(copied, backbone), expected)
    assert torch.equal(run(model, backbone), expected)
    _check_injected_training(model, backbone, without)
    model.eval()
    expected = run(model, backbone)
    holder.save_pretrained(tmp_path)
    assert torch.equal(run(PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval(), backbone), expected)
    inject_adapter(model, ToyConfig(), "second")
    assert torch.equal(run(model, backbone), expected) and list(holder.adapters) == ["default", "second"]
    assert holder.unload() is model
    assert torch.equal(run(model, backbone), run(backbone.build(), backbone))
    assert fingerprint(model) == before


def _check_injected_training(model: nn.Module, backbone: TinyBackbone, without: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(backbone.select(model(*backbone.inputs(3, 30 + step)))).backward()
        optimizer.step()
    base = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("point_peft.")}
    assert_same_values(base, without.state_dict())
