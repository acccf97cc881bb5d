"""IA3: its equation, which rows are keys and values, merging."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from point_peft import AnatomyError, IA3Config, describe, get_peft_model
from tests.adapting import full_point_mae, moved, tensors
from tests.zoo import BACKBONES, clouds

pytestmark = pytest.mark.smoke


def adapted(name="point_mae", **fields):
    return moved(IA3Config(modules_to_save=[], **fields), name, scale=0.3)


def test_parameters_on_point_mae():
    """27,648, as METHODS.md counts them: 384 keys, 384 values and 1536 hidden channels in each of 12 blocks."""
    model = get_peft_model(full_point_mae(), IA3Config(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 27_648


def test_equation():
    """Attention and MLP of a block written out, from a fused projection."""
    model = adapted()
    block, found = model.base_model.blocks.blocks[1], tensors(model)
    l_k, l_v = found["blocks.blocks.1.attn.qkv.ia3.scale"].chunk(2)
    l_ff = found["blocks.blocks.1.mlp.fc2.ia3.scale"]
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        mixed, hidden = block.attn(x), block.mlp(x)
        with model.disable_adapter():
            q, k, v = block.attn.qkv(x).chunk(3, dim=-1)
            first = torch.nn.functional.gelu(block.mlp.fc1(x))
            heads = block.attn.num_heads

            def split(t):
                return t.unflatten(-1, (heads, -1)).transpose(1, 2)

            scores = split(q) @ split(l_k * k).mT / (24 / heads) ** 0.5
            expected = block.attn.proj((scores.softmax(-1) @ split(l_v * v)).transpose(1, 2).flatten(2))
            assert torch.allclose(mixed, expected, atol=1e-5)
            assert torch.allclose(hidden, block.mlp.fc2(l_ff * first), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scaled"),
    [
        ("compact", {"attention.k": 24, "attention.v": 24, "mlp.3": 48}),
        ("fused_positions", {"attention": 48, "feed.2": 48}),
        ("transformer_sequence_first", {"self_attn": 48, "linear2": 48}),
        ("pyg_point_transformer", {"conv.lin_src": 24, "conv.lin": 24, "lin2": 48}),
        ("uni3d_swiglu", {"attn.k_proj": 24, "attn.v_proj": 24, "mlp.fc2": 96}),
        ("pointcept_ptv3", {"attn.qkv": 32, "mlp.0.fc2": 32}),
    ],
)
def test_keys_values_and_hidden_channels_are_found(name: str, scaled: dict[str, int]):
    model = adapted(name, layers_to_transform=[0])
    block = model.anatomy.blocks[0].path
    assert {key: len(tensor) for key, tensor in tensors(model).items()} == {
        f"{block}.{site}.ia3.scale": size for site, size in scaled.items()
    }


@pytest.mark.parametrize("name", ["point_mae", "compact", "uni3d", "pointgpt", "transformer_sequence_first"])
def test_merging_is_exact(name: str):
    backbone = BACKBONES[name]
    model, args = adapted(name), backbone.inputs(2, 0)
    with torch.no_grad():
        expected = backbone.select(model(*args))
        model.merge()
        assert torch.allclose(backbone.select(model(*args)), expected, rtol=1e-4, atol=1e-5)
        model.unmerge()
        assert torch.equal(backbone.select(model(*args)), expected)
        assert torch.allclose(backbone.select(model.merge_and_unload()(*args)), expected, rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_is_the_backbone():
    (points,), backbone = clouds(2, 0), BACKBONES["point_mae"]
    model = get_peft_model(backbone.build(), IA3Config(modules_to_save=[])).eval()
    assert torch.allclose(model(points), backbone.build()(points), atol=1e-6)


def test_blocks_without_an_mlp_need_scale_mlp_false():
    with pytest.raises(AnatomyError, match=r"and 'enc1.1' has none that was found: set scale_mlp=False"):
        adapted("official_ptv1")
    model = adapted("official_ptv1", scale_mlp=False, layers_to_transform=[0])
    assert [row.name for row in model.get_layer_status()] == [
        "enc1.1.transformer2.linear_k",
        "enc1.1.transformer2.linear_v",
    ]


def test_names_that_do_not_tell_keys_from_values_are_refused():
    backbone = BACKBONES["compact"]
    model = backbone.build()
    anatomy = describe(model, *backbone.inputs(2, 1))
    stage = anatomy.stages[0]
    first = dataclasses.replace(stage.blocks[0], qkv=("blocks.blocks.0.attention.q", "blocks.blocks.0.attention.out"))
    stated = dataclasses.replace(anatomy, stages=(dataclasses.replace(stage, blocks=(first, *stage.blocks[1:])),))
    with pytest.raises(AnatomyError, match=r"the names of 'blocks.blocks.0.attention.q', .*out' do not tell"):
        get_peft_model(model, IA3Config(modules_to_save=[], anatomy=stated))
