"""The tiny backbones themselves: what the other tests take for granted of each of them."""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import BACKBONES, TinyBackbone, clouds, register
from tests.zoo.inputs import voxel_dict
from tests.zoo.operators import supply_spconv_on_cpu
from tests.zoo.pointcept import Point, SparseConv

every_backbone = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)

LARGEST = 1_200_000
"""Parameters; `part_seg` has most, in the fixed widths of its decoder."""


def output(model: nn.Module, backbone: TinyBackbone, batch: int, seed: int) -> Tensor:
    return backbone.select(model(*backbone.inputs(batch, seed)))


def test_names_are_unique_and_those_that_methods_rely_on_come_first() -> None:
    assert list(BACKBONES)[:6] == ["point_mae", "point_bert", "pcp_mae", "recon", "point_m2ae", "part_seg"]
    assert all(name == backbone.name for name, backbone in BACKBONES.items())


@every_backbone
def test_a_backbone_is_small_and_gives_numbers_for_each_sample(backbone: TinyBackbone) -> None:
    model = backbone.build()
    assert not any(module.training for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) < LARGEST
    with torch.no_grad():
        for batch in (1, 3):
            out = output(model, backbone, batch, 6)
            assert len(out) == batch and out.shape[-1] == 5 and out.isfinite().all()
    assert (out - out[:1]).abs().max() > 0.02 * out.abs().max()  # the samples differ


@every_backbone
def test_a_sample_does_not_depend_on_its_batch_mates(backbone: TinyBackbone) -> None:
    model, args = backbone.build(), backbone.inputs(3, 6)
    with torch.no_grad():
        together = backbone.select(model(*args))
        for i in range(3):
            alone = backbone.select(model(*backbone.slice(args, i)))
            assert (alone - together[i : i + 1]).abs().max() < 1e-5 * together.abs().max()


@every_backbone
def test_a_backbone_is_the_same_each_time(backbone: TinyBackbone) -> None:
    model, again = backbone.build(), backbone.build()
    assert list(model.state_dict()) == list(again.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():
        expected = output(model, backbone, 2, 5)
        for other in (model, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.manual_seed(0)
            assert torch.equal(output(other, backbone, 2, 5), expected)


@every_backbone
def test_inputs_are_the_same_each_time_and_are_left_alone(backbone: TinyBackbone) -> None:
    args = backbone.inputs(2, 5)
    with torch.no_grad():
        backbone.build()(*args)
    before = _tensors(backbone.inputs(2, 5))
    assert len(before) == len(_tensors(args))
    assert all(torch.equal(a, b) for a, b in zip(_tensors(args), before, strict=True))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []


@every_backbone
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_reach_every_parameter(backbone: TinyBackbone, training: bool) -> None:
    torch.manual_seed(0)
    model = backbone.build().train(training)
    output(model, backbone, 3, 6).square().sum().backward()
    for name, parameter in model.named_parameters():
        if any(f"{name}.".startswith(f"{part}.") for part in backbone.unused):
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


@every_backbone
def test_the_head_can_be_replaced(backbone: TinyBackbone) -> None:
    model = backbone.build()
    for path in backbone.heads:
        model.get_submodule(path)
    path, make = backbone.other_head
    assert path == backbone.heads[-1]
    model.set_submodule(path, make().eval())
    with torch.no_grad():
        assert output(model, backbone, 2, 5).shape[-1] == 7


@every_backbone
def test_training_is_random_where_a_backbone_says_so(backbone: TinyBackbone) -> None:
    """Dropout apart, which is off here."""
    model = backbone.build().train()
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (output(model, backbone, 2, 5) for _ in range(2))
    assert torch.equal(first, second) != backbone.random_in_training


@pytest.mark.parametrize(("package", "names"), [("torch", ["make"]), ("no_package_of_this_name", [])])
def test_a_backbone_of_a_missing_package_is_not_registered(package: str, names: list[str]) -> None:
    @register(needs=(package,), inputs=clouds, slice=lambda args, i: args, heads=("0",), other_head=nn.ReLU)
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5))

    found = BACKBONES.pop("make", None)
    assert ([] if found is None else [found.name]) == names


@pytest.mark.skipif(find_spec("spconv") is None, reason="spconv is not installed")
def test_sparse_convolutions_are_right_on_a_cpu() -> None:
    """spconv's and the one of `pointcept_ptv3`, in eval mode, with the gradients of weight, bias and input."""
    supply_spconv_on_cpu()
    from spconv.pytorch import SparseConvTensor, SubMConv3d

    torch.manual_seed(0)
    (data,) = voxel_dict(2, 0)
    features = torch.randn(len(data["coord"]), 6)
    theirs, ours = SubMConv3d(6, 4, 3).eval(), SparseConv(6, 4)
    with torch.no_grad():
        theirs.bias.normal_()
        ours.weight.copy_(theirs.weight.flatten(1, 3))
        ours.bias.copy_(theirs.bias)
    cells = torch.cat([data["batch"][:, None], data["grid_coord"]], dim=1).int()
    found = []
    for conv in (theirs, ours):
        point = Point(data, feat=features.clone().requires_grad_())
        point.sparsify()
        sparse = SparseConvTensor(point.feat, cells, [8, 8, 8], 2) if conv is theirs else point.sparse_conv_feat
        out = conv(sparse).features
        out.square().sum().backward()
        found.append([out, point.feat.grad, conv.weight.grad, conv.bias.grad])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a.view_as(b), b, rtol=1e-4, atol=1e-4)
