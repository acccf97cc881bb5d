"""The tiny backbones themselves: what the other tests take for granted of each of them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from tests.zoo import BACKBONES, TinyBackbone, clouds, register
from tests.zoo.inputs import voxel_dict
from tests.zoo.operators import supply_spconv_on_cpu
from tests.zoo.pointcept import Point, SparseConv

every_backbone = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)

LARGEST = 1_200_000
"""Parameters; `part_seg` has most, in the fixed widths of its decoder."""


def test_names_are_unique_and_those_that_methods_rely_on_come_first() -> None:
    assert list(BACKBONES)[:6] == ["point_mae", "point_bert", "pcp_mae", "recon", "point_m2ae", "part_seg"]
    assert all(name == backbone.name for name, backbone in BACKBONES.items())


@every_backbone
def test_a_backbone_is_what_the_matrix_takes_for_granted(backbone: TinyBackbone) -> None:
    """It is small, in eval mode, and the same each time; its samples differ, and do not depend on each other."""
    model, again, args = backbone.build(), backbone.build(), backbone.inputs(3, 6)
    assert not any(module.training for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) < LARGEST
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():
        together = backbone.select(model(*args))
        assert torch.equal(backbone.select(again(*backbone.inputs(3, 6))), together), "it is another each time"
        alone = backbone.select(model(*backbone.slice(args, 1)))
    assert len(together) == 3 and together.shape[-1] == 5 and together.isfinite().all()
    assert (together - together[:1]).abs().max() > 0.02 * together.abs().max(), "the samples do not differ"
    assert (alone - together[1:2]).abs().max() < 1e-5 * together.abs().max()
    assert backbone.other_head[0] == backbone.heads[-1]


@every_backbone
def test_training_is_random_where_a_backbone_says_so(backbone: TinyBackbone) -> None:
    """Dropout apart, which is off here; a gradient then reaches every parameter that the output depends on."""
    model = backbone.build().train()
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    torch.manual_seed(0)
    first, second = (backbone.select(model(*backbone.inputs(3, 6))) for _ in range(2))
    assert torch.equal(first, second) != backbone.random_in_training
    first.square().sum().backward()
    for name, parameter in model.named_parameters():
        used = not any(f"{name}.".startswith(f"{part}.") for part in backbone.unused)
        assert used == (parameter.grad is not None and bool(parameter.grad.any())), name


@pytest.mark.parametrize(("package", "names"), [("torch", ["make"]), ("no_package_of_this_name", [])])
def test_a_backbone_of_a_missing_package_is_not_registered(package: str, names: list[str]) -> None:
    @register(needs=(package,), inputs=clouds, slice=lambda args, i: args, heads=("0",), other_head=nn.ReLU)
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5))

    entered = BACKBONES.pop("make", None)
    assert ([] if entered is None else [entered.name]) == names


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
    results = []
    for conv in (theirs, ours):
        point = Point(data, feat=features.clone().requires_grad_())
        point.sparsify()
        sparse = SparseConvTensor(point.feat, cells, [8, 8, 8], 2) if conv is theirs else point.sparse_conv_feat
        out = conv(sparse).features
        out.square().sum().backward()
        results.append([out, point.feat.grad, conv.weight.grad, conv.bias.grad])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.view_as(b), b, rtol=1e-4, atol=1e-4)
