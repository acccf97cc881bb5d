"""What the library understands of a backbone: by presets, and by one traced forward."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from torch import nn

from examples.backbones import BACKBONES, clouds, supply_pyg_operators
from point_peft import AnatomyError, PointPEFTConfig, PointPeftError, describe, get_peft_model
from point_peft.anatomy import find_blocks, linear_shape
from point_peft.backbones.layers import Encoder, Group
from point_peft.presets import known_anatomy
from point_peft.tracing import trace


@pytest.mark.parametrize("name", BACKBONES)
def test_blocks_are_found_by_structure(name):
    model = BACKBONES[name].build()
    blocks = find_blocks(model)
    attentions = {path: type(model.get_submodule(path)).__name__ for path in (b.attention for b in blocks.values())}
    assert blocks and all("Attention" in kind for kind in attentions.values())
    assert all(len(block.norms) == 2 and len(block.linears) == 2 and block.projection for block in blocks.values())


@pytest.mark.parametrize("name", [name for name in BACKBONES if "recon" not in name])
def test_a_traced_forward_agrees_with_the_preset(name):
    backbone = BACKBONES[name]
    model = backbone.build()
    known, traced = known_anatomy(model), trace(model, backbone.inputs(3, 1), {})
    assert known is not None
    # The last layer of the patch embedding may be an identity, which has the same output.
    a, b = (dataclasses.replace(anatomy.stages[0], patch_tokens=None) for anatomy in (known, traced))
    assert a == b
    assert traced.prefix_parameters == known.prefix_parameters
    assert traced.final_norms == known.final_norms
    assert set(traced.heads) == set(known.heads)


def test_tracing_leaves_the_model_as_it_was():
    model = BACKBONES["point_mae"].build().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    trace(model, clouds(2, 0), {})
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(generator, torch.random.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Unknown(nn.Module):
    """A point transformer with names that no preset has: sequence first, positions added once, a dotted CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Group(16, 8)
        self.patchify = Encoder(24)
        self.where = nn.Linear(3, 24)
        self.extra = nn.ParameterDict({"summary": nn.Parameter(torch.randn(1, 1, 24))})
        self.trunk = nn.ModuleList(
            nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, norm_first=True) for _ in range(3)
        )
        self.last = nn.LayerNorm(24)
        self.classifier = nn.Linear(24, 4)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        neighborhood, center = self.sampler(points)
        tokens = self.patchify(neighborhood) + self.where(center)
        tokens = torch.cat([self.extra["summary"].expand(len(points), -1, -1), tokens], 1).transpose(0, 1)
        for block in self.trunk:
            tokens = block(tokens)
        logits: torch.Tensor = self.classifier(self.last(tokens)[0])
        return logits


def test_an_unknown_model_is_traced_and_adapted():
    torch.manual_seed(0)
    model, (points,) = Unknown(), clouds(3, 0)
    with pytest.raises(AnatomyError, match=r"no preset describes it: pass example_inputs"):
        get_peft_model(model, PointPEFTConfig(memory_bank=False))
    anatomy = describe(model, points)
    (stage,) = anatomy.stages
    assert [block.path for block in stage.blocks] == ["trunk.0", "trunk.1", "trunk.2"]
    assert (stage.layout, stage.prefix_tokens, stage.position, stage.width) == ("gbc", 1, "once", 24)
    assert str(stage.coordinates) == "output[1] of 'sampler'"
    assert [parameter.name for parameter in anatomy.prefix_parameters] == ["extra.summary"]
    assert (anatomy.final_norms, anatomy.heads) == (("last",), ("classifier",))


def test_describe_reads_well():
    text = str(describe(BACKBONES["point_mae"].build()))
    assert "stage 0: 3 blocks 'blocks.blocks.0' … 'blocks.blocks.2'" in text
    assert "prefix tokens: 1" in text and "output[1] of 'group_divider'" in text and "'cls_head_finetune'" in text


def test_what_cannot_be_traced_is_refused():
    points = torch.rand(2, 32, 3)
    with pytest.raises(AnatomyError, match=r"no transformer block was found in Linear"):
        describe(nn.Linear(3, 3), points)
    with pytest.raises(PointPeftError, match=r"no preset describes Linear: pass example inputs"):
        describe(nn.Linear(3, 3))

    class Blind(Unknown):
        def forward(self, points: torch.Tensor) -> torch.Tensor:
            tokens = torch.randn(3, 17, 24)
            for block in self.trunk:
                tokens = block(tokens)
            logits: torch.Tensor = self.classifier(self.last(tokens)[0])
            return logits

    assert "coordinates: unknown: the coordinates of the tokens of 'trunk.0' (3, 17, 24) were not found" in str(
        describe(Blind(), points)
    )
    with pytest.raises(AnatomyError, match=r"needs to know where the tokens .* lie .*'trunk.0' \(3, 17, 24\)"):
        get_peft_model(Blind(), PointPEFTConfig(), example_inputs=points)


def test_linear_layers_are_known_by_what_they_are():
    pyg = pytest.importorskip("torch_geometric.nn")
    assert linear_shape(nn.Linear(3, 5)) == linear_shape(pyg.Linear(3, 5)) == (5, 3)
    assert linear_shape(nn.Embedding(5, 3)) is None
    assert linear_shape(nn.LayerNorm(5)) is None


@pytest.mark.filterwarnings("ignore:the memory bank is empty")
@pytest.mark.parametrize(
    ("module", "name", "layout", "prefix", "stages"),
    [
        ("point_bert", "PointBERTClassification", "bgc", 1, 1),
        ("pointgpt", "PointGPTClassification", "gbc", 2, 1),
        ("point_m2ae", "PointM2AEClassification", "bgc", 0, 3),
    ],
)
def test_models_of_others_are_traced_and_adapted(module, name, layout, prefix, stages):
    """torch-pointcloud's, unmodified: sequence first with a causal mask, and three stages of different widths too."""
    supply_pyg_operators()
    torch.manual_seed(0)
    kind = getattr(importlib.import_module(f"torch_pointcloud.models.{module}"), name)
    backbone = kind(0, 5) if stages == 3 else kind(0, 5, depth=2)
    positions, samples = torch.rand(3 * 640, 3), torch.arange(3).repeat_interleave(640)
    anatomy = describe(backbone.eval(), None, positions, samples)
    assert len(anatomy.stages) == stages
    assert all((stage.layout, stage.prefix_tokens) == (layout, prefix) for stage in anatomy.stages)
    with torch.no_grad():
        plain = backbone(None, positions, samples)
        model = get_peft_model(backbone, PointPEFTConfig(), example_inputs=(None, positions, samples))
        for parameter in model.adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        adapted = model(None, positions, samples)
        alone = model(None, positions[640:1280], samples[:640])
        assert not torch.allclose(adapted, plain, atol=1e-3)
        assert torch.allclose(adapted[1:2], alone, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(None, positions, samples), plain)
