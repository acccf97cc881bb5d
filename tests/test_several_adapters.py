"""Several adapters in one call: one a sample, or several tasks for one cloud."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import METHODS, AdapterError, LoraConfig, PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from tests.adapting import adapt, add, complete, rescramble
from tests.zoo import BACKBONES, TinyBackbone, clouds, pointcept
from tools import capabilities


def mixed_model(backbone: TinyBackbone, *methods: str) -> PointPeftModel:
    """A backbone with an adapter for each of the methods that it takes, as each is asked for, all at random values."""
    labels = [label for label in capabilities.labels(backbone.name) if label.split("[")[0] in methods]
    model = adapt(backbone, labels[0], adapter_name=name_of(labels[0]))
    for seed, label in enumerate(labels[1:], start=1):
        add(model, backbone, label, name_of(label), seed=seed)
    return model.eval()


def name_of(label: str) -> str:
    return label.split("[")[0]


def alone(model: PointPeftModel, name: str | None, args: Any) -> Any:
    """Output of the model with one adapter, or with none."""
    if name is None:
        with model.disable_adapter():
            return model(*args)
    with model.use_adapter(name):
        return model(*args)


def count_samples(module: nn.Module) -> Counter[str]:
    """Numbers of samples that a module computes from now on."""
    counts: Counter[str] = Counter()
    forward: Callable[..., Any] = type(module).forward

    class Counting(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            counts["samples"] += len(args[0])
            return forward(self, *args)

    module.__class__ = Counting
    return counts


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@torch.no_grad()
def test_each_sample_goes_to_its_adapter_and_every_task_gets_its_answer(backbone: TinyBackbone) -> None:
    model = mixed_model(backbone, "LORA", "POINT_PEFT")
    args = backbone.inputs(5, 0)
    kinds = [*model.adapters, None]
    names = [kinds[i % len(kinds)] for i in (0, 1, 3, 1, 2)]
    if backbone.name == "torch_pointcloud_octformer":
        with pytest.raises(AdapterError, match="is a Octree that holds tensors, and cannot be divided"):
            model(*args, adapter_names=names)
        return
    expected = {kind: backbone.select(alone(model, kind, backbone.inputs(5, 0))) for kind in set(names)}
    found = backbone.select(model(*args, adapter_names=names))
    for i, kind in enumerate(names):
        assert torch.allclose(found[i], expected[kind][i], atol=2e-5, rtol=1e-4), kind
    differ = [not torch.allclose(expected[kind], expected[names[0]], atol=1e-3) for kind in set(names) - {names[0]}]
    assert all(differ)

    tasks = model.forward_tasks(args, kinds)
    assert list(tasks) == kinds
    for kind, output in tasks.items():
        assert torch.allclose(backbone.select(output), expected[kind], atol=1e-5), kind


@torch.no_grad()
def test_every_method_in_one_batch() -> None:
    backbone = BACKBONES["point_mae"]
    model = mixed_model(backbone, *METHODS)
    assert set(model.adapters) == set(METHODS)
    names = [*METHODS, None]
    (points,) = backbone.inputs(len(names), 0)
    found = model(points, adapter_names=names)
    for i, name in enumerate(names):
        expected = alone(model, name, (points[i : i + 1],))[0]
        assert torch.allclose(found[i], expected, atol=2e-5, rtol=1e-4), name
    tasks = model.forward_tasks(points[:2], names)
    for name in names:
        assert torch.allclose(tasks[name], alone(model, name, (points[:2],)), atol=2e-5, rtol=1e-4), name


@pytest.mark.parametrize(
    ("config", "asking"),
    [(PointPEFTConfig(memory_bank=True), 0), (PointPEFTConfig.published(), 1)],
    ids=["late", "published"],
)
@torch.no_grad()
def test_frozen_work_runs_once(config: PointPEFTConfig, asking: int) -> None:
    backbone = BACKBONES["point_mae"]
    # Fresh, so that both are known to be made for the prefix tokens of this base.
    model = adapt(backbone, config, adapter_name="POINT_PEFT", fresh=True)
    for name, other in (("LORA", LoraConfig()), ("second", config)):
        model.add_adapter(name, other)
        complete(model, backbone, name, 0, fresh=True)
    model.eval()
    base: Any = model.get_base_model()
    encoder, last = count_samples(base.encoder), count_samples(base.blocks.blocks[-1])
    (points,) = clouds(4, 0)
    model(points, adapter_names=["POINT_PEFT", "LORA", None, "second"])
    # The blocks run once for each sample with its adapter, and once for the two that ask what is after the last.
    assert (encoder["samples"], last["samples"]) == (4, 4 + 2 * asking)
    encoder.clear()
    last.clear()
    model.forward_tasks(points[:1], ["POINT_PEFT", "second", "LORA", None])
    assert (encoder["samples"], last["samples"]) == (1, 4 + asking)


@torch.no_grad()
def test_a_second_pass_of_one_cloud_does_not_compute_the_stem_again() -> None:
    model = mixed_model(BACKBONES["point_mae"], "POINT_PEFT")
    encoder = count_samples(model.get_submodule("base_model.encoder"))
    model(*clouds(1, 0))
    assert encoder["samples"] == 1
    assert all("forward" not in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_a_forward_that_somebody_has_set_runs_once_too_and_stays() -> None:
    """accelerate sets a module's `forward` where it moves weights between devices."""
    model = mixed_model(BACKBONES["point_mae"], "POINT_PEFT")
    expected = model(*clouds(2, 0))
    encoder = model.get_submodule("base_model.encoder")
    calls: list[int] = []
    plain = encoder.forward

    def counting(neighborhood: Tensor) -> Tensor:
        calls.append(len(neighborhood))
        found: Tensor = plain(neighborhood)
        return found

    encoder.__dict__["forward"] = counting
    assert torch.equal(model(*clouds(2, 0)), expected)
    assert calls == [2] and encoder.__dict__["forward"] is counting


@torch.no_grad()
def test_heads_of_other_widths_give_a_list() -> None:
    backbone = BACKBONES["point_mae"]
    model = mixed_model(backbone, "LORA")
    head, make = backbone.other_head
    model.add_adapter("seven", LoraConfig(), heads={head: make})
    (points,) = clouds(3, 0)
    found = model(points, adapter_names=["seven", "LORA", "seven"])
    assert [tuple(output.shape) for output in found] == [(1, 7), (1, 5), (1, 7)]
    for i, name in enumerate(["seven", "LORA", "seven"]):
        assert torch.allclose(found[i], alone(model, name, (points[i : i + 1],)), atol=1e-5)
    tasks = model.forward_tasks(points, ["seven", "LORA"])
    assert [len(output[0]) for output in tasks.values()] == [7, 5]


def test_tasks_can_be_trained_together_and_their_losses_add_up() -> None:
    model = mixed_model(BACKBONES["point_mae"], "POINT_LORA", "LORA")
    model.get_base_model().eval()
    model.adapters.train()
    (points,) = clouds(3, 0)
    outputs = model.forward_tasks(points, ["POINT_LORA", "LORA"])
    auxiliary = model.auxiliary_loss()
    with model.use_adapter("POINT_LORA"):
        model(points)
        assert torch.allclose(model.auxiliary_loss(), auxiliary) and auxiliary != 0
    torch.stack([output.square().mean() for output in outputs.values()]).sum().backward()
    for name in model.adapters:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in get_adapter(model, name).parameters())


@torch.no_grad()
def test_labels_beside_the_clouds_are_not_taken_for_ends_of_samples() -> None:
    class WithLabels(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, points: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"logits": self.base(points), "labels": labels}

    torch.manual_seed(0)
    model = get_peft_model(WithLabels(BACKBONES["point_mae"].build()), LoraConfig(modules_to_save=[]), "a").eval()
    rescramble(model, "a")
    (points,) = clouds(3, 0)
    labels = torch.tensor([1, 2, 3])
    found = model(points, labels, adapter_names=["a", None, "a"])
    assert torch.equal(found["labels"], labels)
    assert not torch.allclose(found["logits"][0], alone(model, None, (points, labels))["logits"][0], atol=1e-3)


def test_what_is_asked_wrongly_is_refused() -> None:
    backbone = BACKBONES["point_mae"]
    model = mixed_model(backbone, "LORA")
    args = backbone.inputs(3, 0)
    with pytest.raises(AdapterError, match="there is no adapter 'lora'; adapters: 'LORA'"):
        model(*args, adapter_names=["LORA", "lora", None])
    with pytest.raises(AdapterError, match=re.escape("adapter_names has 2 entries, one for each sample")):
        model(*args, adapter_names=["LORA", None])
    with pytest.raises(AdapterError, match="name adapters in a list, None for the plain backbone; got 'LORA'"):
        model(*args, adapter_names="LORA")
    with pytest.raises(AdapterError, match="a task is named twice"):
        model.forward_tasks(args, ["LORA", None, "LORA"])
    with pytest.raises(AdapterError, match=re.escape("adapter_names is for inference: call model.eval() first")):
        model.train()(*args, adapter_names=["LORA", None, None])
    model = get_peft_model(backbone.build(), LoraConfig(modules_to_save=[]), "LORA")
    model.eval().merge()
    with pytest.raises(AdapterError, match="while 'LORA' is merged"):
        model.forward_tasks(args, ["LORA"])


@torch.no_grad()
def test_an_error_in_one_adapter_leaves_nothing_behind() -> None:
    backbone = BACKBONES["point_mae"]
    model = mixed_model(backbone, "LORA", "POINT_PEFT")
    args = backbone.inputs(3, 0)
    before = alone(model, "POINT_PEFT", args)
    handle = model.get_submodule("base_model.norm").register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(*args, adapter_names=["LORA", None, "POINT_PEFT"])
    handle.remove()
    assert torch.equal(alone(model, "POINT_PEFT", args), before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def stop(module: nn.Module, args: Any, output: Any) -> None:
    raise KeyboardInterrupt


# ---- models that draw random numbers ---------------------------------------------------------------------------------


def shuffled(backbone: TinyBackbone, monkeypatch: pytest.MonkeyPatch) -> PointPeftModel:
    """A model of Point Transformer V3 that draws its serial orders at random in every forward, in eval mode too."""
    code = pointcept._z_code
    monkeypatch.setattr(pointcept, "_z_code", lambda cell: code(cell[:, torch.randperm(3)]))
    if backbone.needs:  # this one draws while training only; others of its kind always do
        theirs: Any = importlib.import_module("torch_pointcloud.models.point_transformer_v3")
        serialize = theirs.serialize
        monkeypatch.setattr(theirs, "serialize", lambda *of, **how: serialize(*of, **{**how, "shuffle": True}))
    return mixed_model(backbone, "LORA", "IA3", "BITFIT")


@pytest.mark.parametrize("name", [name for name in BACKBONES if "ptv3" in name])
@torch.no_grad()
def test_every_adapter_of_a_batch_gets_the_same_random_orders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = BACKBONES[name]
    model = shuffled(backbone, monkeypatch)
    names = [*model.adapters, None, *model.adapters]
    args = backbone.inputs(len(names), 0)

    def seeded(run: Callable[[], Any], seed: int) -> Any:
        torch.manual_seed(seed)
        return run()

    expected = {
        kind: backbone.select(seeded(lambda kind=kind: alone(model, kind, backbone.inputs(len(names), 0)), 3))  # type: ignore[misc]
        for kind in set(names)
    }
    others = [backbone.select(seeded(lambda: alone(model, None, args), seed)) for seed in (4, 5, 6)]
    assert any(not torch.allclose(other, expected[None], atol=1e-4) for other in others)
    found = backbone.select(seeded(lambda: model(*args, adapter_names=names), 3))
    for i, kind in enumerate(names):
        assert torch.allclose(found[i], expected[kind][i], atol=2e-5, rtol=1e-4), kind
    tasks = seeded(lambda: model.forward_tasks(args, [*model.adapters, None]), 3)
    for kind, output in tasks.items():
        assert torch.allclose(backbone.select(output), expected[kind], atol=2e-5, rtol=1e-4), kind
