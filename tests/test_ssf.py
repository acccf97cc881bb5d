"""SSF: its equation, where it acts, what of it can be merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from point_peft import AdapterError, AnatomyError, MatchError, SSFConfig, get_peft_model
from tests.adapting import full_point_mae, moved, tensors
from tests.zoo import BACKBONES, clouds

pytestmark = pytest.mark.smoke


def adapted(name="point_mae", **fields):
    return moved(SSFConfig(modules_to_save=[], **fields), name)


def test_parameters_on_point_mae():
    """102,912, as METHODS.md counts them; 88,320 without the patch embedding (768) and the shift of qkv (13,824)."""
    assert get_peft_model(full_point_mae(), SSFConfig(modules_to_save=[])).get_nb_trainable_parameters()[0] == 102_912
    mergeable = get_peft_model(full_point_mae(), SSFConfig(modules_to_save=[], only_mergeable=True))
    assert mergeable.get_nb_trainable_parameters()[0] == 88_320


def test_every_site_is_scaled_and_shifted():
    """Against the backbone with a scaling after every module that is meant, put in by hand."""
    model, (points,) = adapted(), clouds(2, 0)
    found, plain = tensors(model), BACKBONES["point_mae"].build()
    sites = {name.removesuffix(".ssf.gamma") for name in found if name.endswith("gamma")}
    inside = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert sites == {"reduce_dim", "norm", *(f"blocks.blocks.{i}.{name}" for i in range(3) for name in inside)}
    for site in sites:
        gamma, beta = found[f"{site}.ssf.gamma"], found[f"{site}.ssf.beta"]
        plain.get_submodule(site).register_forward_hook(lambda m, i, out, gamma=gamma, beta=beta: gamma * out + beta)
    assert torch.allclose(model(points), plain(points), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["point_mae", "point_bert", "uni3d", "pointgpt", "transformer_sequence_first", "torch_pointcloud_ptv1"]
)
def test_what_is_mergeable_merges_exactly(name: str):
    backbone = BACKBONES[name]
    model, args = adapted(name, only_mergeable=True), backbone.inputs(2, 0)
    with torch.no_grad():
        expected = backbone.select(model(*args))
        plain = backbone.select(backbone.build()(*args))
        merged = backbone.select(model.merge_and_unload()(*args))
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.allclose(merged, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_mergeable_is_refused_by_name():
    with pytest.raises(AdapterError, match=r"its PatchPart at 'reduce_dim' \(SSF\) is not a change"):
        adapted().merge()
    with pytest.raises(AdapterError, match=r"its ScaleShiftPart at 'blocks.blocks.0.attn.qkv' \(SSF\) is not a change"):
        adapted(exclude_modules=["reduce_dim"]).merge()


def test_a_patch_embedding_that_ends_in_a_linear_layer_is_that_layer():
    model = adapted("point_bert", target_modules=["reduce_dim"])
    assert [row.parts["default"] for row in model.get_layer_status()] == [("ScaleShiftPart",)]
    model.merge()


def test_a_fused_projection_is_adapted_by_its_rows():
    backbone = BACKBONES["fused_positions"]
    model, plain, args = adapted("fused_positions", layers_to_transform=[1]), backbone.build(), backbone.inputs(2, 0)
    found = tensors(model)

    def pair(site: str) -> tuple[Tensor, Tensor]:
        return found[f"blocks.1.{site}.ssf.gamma"].detach(), found[f"blocks.1.{site}.ssf.beta"].detach()

    for site in ("norm_a", "norm_b", "feed.0", "feed.2"):
        gamma, beta = pair(site)
        module = plain.get_submodule(f"blocks.1.{site}")
        module.register_forward_hook(lambda m, i, out, gamma=gamma, beta=beta: gamma * out + beta)
    attention = plain.get_submodule("blocks.1.attention")
    assert isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None
    (gamma, beta), (outer_gamma, outer_beta) = pair("attention"), pair("attention.out_proj")
    with torch.no_grad():
        attention.in_proj_weight.copy_(attention.in_proj_weight * gamma[:, None])
        attention.in_proj_bias.copy_(attention.in_proj_bias * gamma + beta)
        attention.out_proj.weight.copy_(attention.out_proj.weight * outer_gamma[:, None])
        attention.out_proj.bias.copy_(attention.out_proj.bias * outer_gamma + outer_beta)
        assert torch.allclose(backbone.select(model(*args)), backbone.select(plain(*args)), atol=1e-5)


def test_there_is_no_shift_where_it_could_do_nothing():
    assert "visual.blocks.0.attn.qkv.ssf.beta" not in tensors(adapted("uni3d"))  # its weight is read, it has no bias
    keys = [name for name in tensors(adapted("compact")) if ".attention.k." in name]
    assert keys == [f"blocks.blocks.{i}.attention.k.ssf.gamma" for i in range(2)]  # a softmax would take it away


def test_which_modules():
    some = adapted(layers_to_transform=[1], exclude_modules=["norm1"])
    assert all(row.name.startswith("blocks.blocks.1.") and "norm1" not in row.name for row in some.get_layer_status())
    named = adapted(target_modules=["fc1", "reduce_dim"])
    assert len(named.get_layer_status()) == 4
    with pytest.raises(AnatomyError, match=r"'blocks.blocks.0.attn' is a Attention; SSF adapts linear layers, norms"):
        adapted(target_modules=["attn"])
    with pytest.raises(AnatomyError, match=r"SSF with only_mergeable=True leaves nothing to scale"):
        adapted(target_modules=["reduce_dim"], only_mergeable=True)
    with pytest.raises(MatchError, match=r"no module matches 'fc3'"):
        adapted(target_modules=["fc3"])
