"""Adapters on backbones in half precision: trained in float32, the output in the backbone's type."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from point_peft import PointPeftModel, describe, get_peft_model, inject_adapter
from tests.adapting import (
    METHOD_NAMES,
    How,
    adapt,
    distance,
    every_method,
    groups_of,
    in_groups,
    loss_of,
    one_adapter,
    run,
    stated,
    tensors,
)
from tests.methods import config
from tests.test_inputs import assert_learns, cast, in_bfloat16, valued
from tests.test_representatives import a_few
from tests.zoo import BACKBONES, TinyBackbone

POINT_MAE = BACKBONES["point_mae"]
HALF = (torch.bfloat16, torch.float16)


def in_half(backbone: TinyBackbone, method: How, dtype: torch.dtype, **options: Any) -> PointPeftModel:
    """An adapter, with the values of the one of `adapt`, made on a backbone that is in half precision already."""
    return valued(get_peft_model(backbone.build().to(dtype), stated(method, backbone), **options), backbone, method)


@functools.cache
def in_float32(methods: tuple[str, ...]) -> Tensor:
    return run(adapt(POINT_MAE, methods), POINT_MAE)


def types(model: PointPeftModel) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.adapters.parameters()}


@a_few
def test_on_a_backbone_in_half_precision(method: str, backbone: TinyBackbone) -> None:
    args = cast(backbone.inputs(2, 5), torch.bfloat16)
    _, rounded = in_bfloat16(backbone, args)
    model = in_half(backbone, method, torch.bfloat16)
    assert types(model) == {torch.float32}
    output = run(model, backbone, args)
    assert output.dtype == torch.bfloat16
    assert distance(output.float(), run(adapt(backbone, method), backbone)) < 0.05 + 5 * rounded
    assert_learns(model, backbone, args)


@pytest.mark.parametrize(("dtype", "far"), [(torch.bfloat16, 0.25), (torch.float16, 0.06)])
@in_groups(METHOD_NAMES)
def test_every_method_in_half_precision(methods: tuple[str, ...], dtype: torch.dtype, far: float) -> None:
    """Where coordinates are rounded that much, other points are the farthest."""
    model, args = in_half(POINT_MAE, methods, dtype), cast(POINT_MAE.inputs(2, 5), dtype)
    output = run(model, POINT_MAE, args)
    assert output.dtype == dtype and distance(output.float(), in_float32(methods)) < far
    assert_learns(model, POINT_MAE, args)
    kept = get_peft_model(POINT_MAE.build().to(dtype), one_adapter(methods), autocast_adapter_dtype=False)
    assert types(kept) == {dtype}


@pytest.mark.parametrize("widens", [True, False])
@in_groups(METHOD_NAMES)
def test_blocks_in_another_type_than_the_rest(methods: tuple[str, ...], widens: bool) -> None:
    """As where a user has cast the blocks: each gets its tokens in its type, and they come out in float32."""
    base = POINT_MAE.build()
    for block in describe(base).blocks:
        module = base.get_submodule(block.path).to(torch.bfloat16)
        module.register_forward_pre_hook(lambda _, args: tuple(value.to(torch.bfloat16) for value in args))
        module.register_forward_hook(lambda _, args, output: output.float())
    model = valued(get_peft_model(base, one_adapter(methods), autocast_adapter_dtype=widens), POINT_MAE, methods)
    assert types(model) == {torch.float32}
    output = run(model, POINT_MAE)
    assert output.dtype == torch.float32 and distance(output, in_float32(methods)) < 0.06
    assert_learns(model, POINT_MAE, POINT_MAE.inputs(2, 5))


@in_groups(METHOD_NAMES)
def test_small_steps_are_not_lost(methods: tuple[str, ...]) -> None:
    """Every value that has a gradient moves in a step of AdamW at 1e-4, in a loop with a gradient scaler."""
    model, args = in_half(POINT_MAE, methods, torch.float16), cast(POINT_MAE.inputs(4, 5), torch.float16)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer, scaler = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0), torch.amp.GradScaler("cpu", 64.0)
    scaler.scale(loss_of(POINT_MAE.select(model(*args)).float())).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(trained, 1.0)
    moving = [p.grad.abs() > 1e-6 for p in trained if p.grad is not None]
    scaler.step(optimizer)
    scaler.update()
    assert len(moving) == len(trained) and scaler.get_scale() == 64.0
    for parameter, old, moves in zip(trained, before, moving, strict=True):
        assert bool((parameter.detach() != old)[moves].all())


@pytest.mark.parametrize("methods", [*groups_of(METHOD_NAMES), ("LORA",)], ids="+".join)
def test_files_say_their_types_and_loading_keeps_the_rule(methods: tuple[str, ...], tmp_path: Path) -> None:
    model, args = in_half(POINT_MAE, methods, torch.bfloat16), cast(POINT_MAE.inputs(2, 5), torch.bfloat16)
    model.save_pretrained(tmp_path / "wide")
    with safe_open(tmp_path / "wide" / "adapter_model.safetensors", framework="pt") as file:
        said = {str(file.get_tensor(name).dtype) for name in file.keys() if "_bank." not in name}  # noqa: SIM118
    assert said <= {"torch.float32", "torch.int64"}
    in_format_of_peft = methods == ("LORA",)
    assert "bfloat16" in (tmp_path / "wide" / "adapter_config.json").read_text() or in_format_of_peft

    def again(folder: str, **options: Any) -> PointPeftModel:
        torch.manual_seed(3)
        return PointPeftModel.from_pretrained(POINT_MAE.build().bfloat16(), tmp_path / folder, **options).eval()

    loaded, narrow = again("wide"), again("wide", autocast_adapter_dtype=False)
    assert types(loaded) == {torch.float32} and types(narrow) == {torch.bfloat16}
    assert torch.equal(run(loaded, POINT_MAE, args), run(model, POINT_MAE, args))
    narrow.save_pretrained(tmp_path / "narrow")
    widened, kept = again("narrow"), again("narrow", autocast_adapter_dtype=False)
    assert types(widened) == {torch.float32} and types(kept) == {torch.bfloat16}
    narrowed = tensors(narrow)
    for name, tensor in tensors(widened).items():
        assert torch.equal(tensor, narrowed[name].to(tensor.dtype)), name
    assert torch.equal(run(kept, POINT_MAE, args), run(narrow, POINT_MAE, args))


def test_every_door_has_the_rule() -> None:
    def base() -> nn.Module:
        return POINT_MAE.build().bfloat16()

    for keeps, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        held: Any = inject_adapter(base(), config("LORA"), autocast_adapter_dtype=keeps)
        held.point_peft.add_adapter("second", config("IA3"), autocast_adapter_dtype=not keeps)
        own = {p.dtype for p in held.point_peft.adapters["default"].parameters()}
        other = {p.dtype for p in held.point_peft.adapters["second"].parameters()}
        assert own == {dtype} and own | other == {torch.float32, torch.bfloat16}
    assert types(get_peft_model(POINT_MAE.build().double(), config("LORA"))) == {torch.float64}


@pytest.mark.parametrize("cloud", ["at one place", "at the origin"])
@every_method
def test_it_is_finite_wherever_the_backbone_is(method: str, cloud: str) -> None:
    """In float16: what a method divides by or takes the exponential of, it has in float32."""
    (points,) = POINT_MAE.inputs(2, 5)
    points = points[:, :1].expand_as(points) if cloud == "at one place" else torch.zeros_like(points)
    args: tuple[Tensor, ...] = (points.half(),)
    model = in_half(POINT_MAE, method, torch.float16)
    with model.disable_adapter():
        assert torch.isfinite(run(model, POINT_MAE, args)).all()
    assert torch.isfinite(run(model, POINT_MAE, args)).all()
    # Of tokens that are all alike, IDPT's four norms in a row make gradients beyond float16, which a scaler skips.
    if (method, cloud) != ("IDPT", "at the origin"):
        assert_learns(model, POINT_MAE, args)
