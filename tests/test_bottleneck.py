"""Bottleneck adapters: the three placements and their equations."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from point_peft import AdapterError, AnatomyError, BottleneckConfig, PointPeftError, get_peft_model
from point_peft.adapting.adapter import get_adapter
from tests.adapting import full_point_mae, moved
from tests.zoo import BACKBONES, clouds

pytestmark = pytest.mark.smoke

PLACEMENTS = ("houlsby", "pfeiffer", "adaptformer")


def adapted(name="point_mae", **fields):
    return moved(BottleneckConfig(modules_to_save=[], **fields), name)


def adapter(model, site, x, activation):
    """A(x), from the tensors by their names in a file."""
    found = get_adapter(model, "default").tensors()
    values = [found[f"{site}.bottleneck.adapter.{end}"] for end in ("down.weight", "down.bias", "up.weight", "up.bias")]
    w_down, b_down, w_up, b_up = values
    return getattr(nn.functional, activation)(x @ w_down.T + b_down) @ w_up.T + b_up


@pytest.mark.parametrize(
    ("placement", "count"), [("houlsby", 304_512), ("pfeiffer", 152_256), ("adaptformer", 595_200)]
)
def test_parameters_on_point_mae(placement, count):
    """As METHODS.md counts them, at the widths that are published."""
    model = get_peft_model(full_point_mae(), BottleneckConfig(placement=placement, modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize(
    ("placement", "activation", "scale"),
    [("houlsby", "gelu", 1.0), ("pfeiffer", "relu", 1.0), ("adaptformer", "relu", 0.1)],
)
def test_equation(placement, activation, scale):
    model, at = adapted(placement=placement), "blocks.blocks.1"
    block, x = model.base_model.blocks.blocks[1], torch.randn(2, 5, 24)
    with torch.no_grad():
        output = block(x)
        with model.disable_adapter():
            h = block.attn(block.norm1(x))
            if placement == "houlsby":
                h = h + scale * adapter(model, f"{at}.attn.proj", h, activation)
            expected = x + h
            u = block.norm2(expected)
            h = block.mlp(u)
            h = h + scale * adapter(model, f"{at}.mlp", u if placement == "adaptformer" else h, activation)
            expected = expected + h
    assert torch.allclose(output, expected, atol=1e-5)


def test_fields():
    model = adapted(width=5, scale=0.5, activation="gelu", layers_to_transform=[1])
    mlp, x = model.base_model.blocks.blocks[1].mlp, torch.randn(2, 5, 24)
    with torch.no_grad():
        output = mlp(x)
        with model.disable_adapter():
            h = mlp(x)
    assert torch.allclose(output, h + 0.5 * adapter(model, "blocks.blocks.1.mlp", h, "gelu"), atol=1e-5)
    assert model.get_nb_trainable_parameters()[0] == 2 * 5 * 24 + 5 + 24
    model = adapted(dropout=0.9).train()
    (points,) = clouds(2, 0)
    assert not torch.equal(model(points), model(points))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fresh_adapter_is_the_backbone(placement):
    (points,), backbone = clouds(2, 0), BACKBONES["point_mae"]
    model = get_peft_model(backbone.build(), BottleneckConfig(placement=placement, modules_to_save=[])).eval()
    assert torch.equal(model(points), backbone.build()(points))
    with pytest.raises(AdapterError, match=r"its SerialPart|its ParallelPart"):
        model.merge()


def test_after_an_attention_whose_projection_is_not_called():
    model = adapted("pointgpt", placement="houlsby", layers_to_transform=[0])
    attention, x = model.base_model.blocks.layers[0].attn, torch.randn(5, 2, 24)
    with torch.no_grad():
        output, scores = attention(x, x, x)
        with model.disable_adapter():
            h, expected_scores = attention(x, x, x)
        assert torch.allclose(output, h + adapter(model, "blocks.layers.0.attn", h, "gelu"), atol=1e-5)
    assert torch.equal(scores, expected_scores)


def layer_and_expected(model, x):
    """A layer of nn.TransformerEncoder, post-norm, whose MLP is no module, and what it should make of x."""
    layer = model.base_model.encoder.layers[1]
    with torch.no_grad(), model.disable_adapter():
        u = layer.norm1(x + layer.self_attn(x, x, x)[0])
        h = layer.linear2(layer.linear1(u).relu())
        expected = layer.norm2(u + h + 0.1 * adapter(model, "encoder.layers.1.linear2", u, "relu"))
    return layer, expected


def test_beside_an_mlp_that_is_two_layers_of_the_block():
    model, x = adapted("transformer_sequence_first", placement="adaptformer"), torch.randn(5, 2, 24)
    layer, expected = layer_and_expected(model, x)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda factor: layer(x * factor), [1.0, 2.0] * 4))
    # Not bit for bit: torch may split its work otherwise in another thread.
    assert all(torch.allclose(one, several[i % 2], atol=1e-5) for i, one in enumerate(several))
    assert torch.allclose(several[0], expected, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_beside_such_an_mlp_under_checkpointing(reentrant):
    model, x = adapted("transformer_sequence_first", placement="adaptformer"), torch.randn(5, 2, 24, requires_grad=True)
    layer, _ = layer_and_expected(model, x)
    layer(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    again = {name: p.grad for name, p in model.adapters.named_parameters() if p.grad is not None}
    assert len(found) == 4 and list(again) == list(found)
    assert all(torch.allclose(again[name], gradient, atol=1e-6) for name, gradient in found.items())


def test_blocks_without_an_mlp_are_refused():
    with pytest.raises(AnatomyError, match=r"BOTTLENECK adapts the MLP of every block, and 'enc1.1' has none"):
        adapted("official_ptv1")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("placement", "lora", "'houlsby' or 'pfeiffer' or 'adaptformer'"),
        ("width", 0, "1 or more, or None"),
        ("scale", 0.0, "more than 0, or None"),
        ("dropout", 1.0, "0 or more and less than 1"),
        ("activation", "tanh", "'gelu' or 'relu' or None"),
    ],
)
def test_fields_are_validated(field, value, allowed):
    with pytest.raises(PointPeftError, match=rf"BottleneckConfig.{field} is {value!r}; allowed: {allowed}"):
        BottleneckConfig(**{field: value})
