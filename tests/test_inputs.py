"""Inputs of every kind: other floating types, features of points, odd, empty, degenerate and broken clouds.

`tests/test_conformance.py` covers batches of one in eval mode, `tests/test_representatives.py` bfloat16 autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import AnatomyError, PointPeftError, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer, PointTransformerPartSeg
from tests.adapting import (
    PAIRS,
    How,
    adapt,
    assert_same_values,
    banks,
    distance,
    each,
    every_method,
    few,
    frozen,
    gradients,
    loss_of,
    plain,
    representatives,
    rescramble,
    run,
    stated,
)
from tests.methods import config
from tests.test_representatives import a_few
from tests.zoo import BACKBONES, Args, TinyBackbone


def changed(args: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs with every tensor in them changed."""
    if isinstance(args, Tensor):
        return change(args)
    if isinstance(args, dict):
        return {name: changed(value, change) for name, value in args.items()}
    return type(args)(changed(value, change) for value in args) if isinstance(args, tuple | list) else args


def cast(args: Args, dtype: torch.dtype) -> Args:
    found: Args = changed(args, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return found


def assert_learns(model: PointPeftModel, backbone: TinyBackbone, args: Args) -> None:
    """A training step gives every trainable tensor a finite gradient."""
    loss_of(backbone.select(model.train()(*args))).backward()
    adapter = get_adapter(model, "default")
    found = gradients(adapter)
    assert list(found) == [name for name, _ in adapter.named_parameters()]
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name


def in_bfloat16(backbone: TinyBackbone, args: Args) -> tuple[nn.Module, float]:
    """A backbone in that type, which the test is skipped without, and how far its output is from that in float32."""
    base = frozen(backbone).to(torch.bfloat16)
    try:
        return base, distance(run(base, backbone, args).float(), plain(backbone))
    except (RuntimeError, KeyError):
        pytest.skip(f"{backbone.name} itself does not run in bfloat16")


def valued(model: PointPeftModel, backbone: TinyBackbone, method: How) -> PointPeftModel:
    """The model with the values of the adapter of `adapt`, in its own types."""
    own, source = (get_adapter(one, "default") for one in (model, adapt(backbone, method)))
    for bank, other in zip(banks(own), banks(source), strict=True):
        bank._buffers.update(other._buffers)
    values = source.tensors()
    with torch.no_grad():
        for name, tensor in own.tensors().items():
            tensor.copy_(values[name])
    return model.eval()


# ---- floating types --------------------------------------------------------------------------------------------------


SLOW = ("PPT",)
"""Methods that run the patch encoder on so many groups that a CPU takes seconds for it in half precision."""


@a_few
def test_float64_and_float16_autocast_give_nearly_the_same(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method)
    output = run(model, backbone)
    if backbone.bfloat16 and method not in SLOW:
        with torch.autocast("cpu", dtype=torch.float16):
            assert distance(run(model, backbone).float(), output) < 0.05
            assert_learns(model, backbone, backbone.inputs(2, 5))
    wide = adapt(backbone, method).double()
    found = run(wide, backbone, cast(backbone.inputs(2, 5), torch.float64))
    assert found.dtype == torch.float64 and distance(found.float(), output) < 1e-4
    assert_learns(wide, backbone, cast(backbone.inputs(2, 5), torch.float64))


@a_few
def test_bfloat16_weights(method: str, backbone: TinyBackbone) -> None:
    """An adapter made on a backbone of that type is one that was cast with it, and about as exact as the backbone."""
    args = cast(backbone.inputs(2, 5), torch.bfloat16)
    base, rounded = in_bfloat16(backbone, args)
    exact = adapt(backbone, method)
    model = adapt(backbone, method).to(torch.bfloat16)
    for bank, source in zip(banks(get_adapter(model, "default")), banks(get_adapter(exact, "default")), strict=True):
        assert_same_values(bank.state_dict(), source.state_dict(), "the bank")
    output = run(model, backbone, args)
    assert output.dtype == torch.bfloat16 and distance(output.float(), run(exact, backbone)) < 0.05 + 5 * rounded
    made = get_peft_model(base, stated(method, backbone), autocast_adapter_dtype=False)
    assert torch.equal(run(valued(made, backbone, method), backbone, args), output)
    assert_learns(made, backbone, args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@every_method
def test_a_gpu_gives_the_same(method: str) -> None:
    backbone = BACKBONES["point_mae"]
    model = adapt(backbone, method)
    output, args = run(model, backbone), changed(backbone.inputs(2, 5), lambda tensor: tensor.cuda())
    model.cuda()
    assert distance(run(model, backbone, args).cpu(), output) < 1e-3
    with torch.autocast("cuda", dtype=torch.float16):
        assert distance(run(model, backbone, args).float().cpu(), output) < 0.5
    output = backbone.select(model.train()(*args))
    output.float().square().mean().backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(get_adapter(model, "default")).values())


# ---- degenerate and broken clouds ------------------------------------------------------------------------------------


def at_one_place(tensor: Tensor) -> Tensor:
    """The points of a cloud (b, n, 3), or of all packed ones (n, 3), moved to the first."""
    if not tensor.is_floating_point():
        return tensor
    return tensor[..., :1, :].expand_as(tensor).contiguous() if tensor.ndim > 1 else tensor


def half_twice(tensor: Tensor) -> Tensor:
    """Each second point of a cloud moved to the one before it."""
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return tensor
    return tensor[..., torch.arange(tensor.shape[-2]) // 2 * 2, :]


@a_few
def test_points_at_one_place(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, method)
    for change in (at_one_place, half_twice):
        args = changed(backbone.inputs(2, 5), change)
        try:
            run(frozen(backbone), backbone, args)
        except RuntimeError:
            continue  # one cell of a grid is less than the neighbours that the backbone asks for
        together = run(model.eval(), backbone, args)
        assert torch.isfinite(together).all()
        for i in range(2):
            assert distance(run(model, backbone, backbone.slice(args, i)), together[i : i + 1]) < 1e-4
        model.zero_grad()
        assert_learns(model, backbone, args)


DENSE = [pair for pair in PAIRS if all(isinstance(arg, Tensor) and arg.ndim == 3 for arg in pair[1].inputs(3, 5))]


@each(few(representatives(DENSE)))
def test_a_cloud_that_is_no_number_spoils_no_other(method: str, backbone: TinyBackbone) -> None:
    model, args = adapt(backbone, method), backbone.inputs(3, 5)
    expected = run(model, backbone, args)
    spoilt = changed(args, lambda tensor: tensor.index_fill(0, torch.tensor(1), torch.nan))
    found = run(model, backbone, spoilt)
    assert distance(found[[0, 2]], expected[[0, 2]]) < 1e-5
    assert found[1].isnan().any() or not torch.equal(found[1], expected[1])


# ---- how many --------------------------------------------------------------------------------------------------------


@a_few
def test_an_empty_batch_is_as_for_the_backbone_or_refused(method: str, backbone: TinyBackbone) -> None:
    """Inputs of a backbone are taken or refused clearly; where it fails itself, nothing else goes wrong."""
    args, model = changed(backbone.inputs(2, 5), lambda tensor: tensor[:0]), adapt(backbone, method)
    failure: type[BaseException] = PointPeftError
    try:
        shape: torch.Size | None = run(frozen(backbone), backbone, args).shape
    except (RuntimeError, PointPeftError) as error:
        failure, shape = type(error), None
    with suppress(failure, PointPeftError):
        assert run(model, backbone, args).shape == shape


@pytest.mark.parametrize("n", [16, 133, 1021])
def test_any_number_of_points_that_is_enough(n: int) -> None:
    backbone = BACKBONES["point_mae"]
    points = torch.rand(2, n, 3, generator=torch.Generator().manual_seed(n))
    for method in ("POINT_PEFT", "POINT_GST", "GEM", "PPT"):
        model = adapt(backbone, method)
        together = run(model, backbone, (points,))
        assert torch.isfinite(together).all()
        assert distance(run(model, backbone, (points[1:],)), together[1:]) < 1e-5


def test_too_few_points_or_clouds_are_refused() -> None:
    model = adapt(BACKBONES["point_mae"], "LORA")
    with pytest.raises(PointPeftError, match=r"are \(2, 15, 3\); allowed: .* at least 16 points, .* 16 groups of 8"):
        model(torch.rand(2, 15, 3))
    with pytest.raises(PointPeftError, match=r"are \(0, 96, 3\); allowed: one cloud or more"):
        model(torch.rand(0, 96, 3))


# ---- features of points ----------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "trans_dim": 24,
    "depth": 2,
    "num_heads": 4,
    "num_group": 16,
    "group_size": 8,
    "encoder_dims": 24,
    "cls_dim": 5,
}


@every_method
def test_points_with_features(method: str) -> None:
    torch.manual_seed(0)
    base = PointTransformer(in_channels=6, **SIZES)
    points = torch.rand(3, 100, 6, generator=torch.Generator().manual_seed(1))
    if method in ("PPT", "POINT_LORA"):
        with pytest.raises(AnatomyError, match="'encoder' reads 6 values of a point"):
            get_peft_model(base, config(method))
        return
    model = get_peft_model(base, config(method)).eval()
    if banks(get_adapter(model, "default")):
        model.build_memory_bank([points, points.flip(1) / 2, points / 3, points.sqrt()])
    rescramble(model)
    with torch.no_grad():
        output = model(points)
        assert distance(model(points[1:2]), output[1:2]) < 1e-5
        moved, dyed = points.clone(), points.clone()
        moved[..., 0] *= 0.5
        dyed[..., 4] *= 0.5
        for other in (moved, dyed):
            assert distance(model(other), output) > 1e-4


def test_features_of_points_do_not_move_the_groups() -> None:
    torch.manual_seed(0)
    bare = PointTransformerPartSeg(num_labels=4, taps=(1,), **SIZES).eval()
    featured = PointTransformerPartSeg(num_labels=4, taps=(1,), in_channels=5, **SIZES).eval()
    state = bare.state_dict()
    weight = state["encoder.first_conv.0.weight"]
    state["encoder.first_conv.0.weight"] = torch.cat([weight, torch.zeros(len(weight), 2, 1)], dim=1)
    featured.load_state_dict(state)
    points, label = torch.rand(2, 100, 5), torch.eye(4)[:2]
    torch.testing.assert_close(featured(points, label), bare(points[..., :3], label))
    for wrong in (points[..., :4], points[..., :3]):
        with pytest.raises(PointPeftError, match=r"points must be \(b, n, 5\), got .*in_channels=5"):
            featured(wrong, label)
    with pytest.raises(PointPeftError, match=r"in_channels is 2; allowed: 3 or more"):
        PointTransformer(in_channels=2)
