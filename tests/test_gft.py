"""GFT: the recorded run, the graph and the attentions to it against plain loops, where prompts and graph come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import AdapterError, AnatomyError, GFTConfig, PointPeftError, PointPeftModel, geometry, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.tuners.gft import EnteringPrompts, GraphAttention, GraphPrompts
from tests import golden
from tests.adapting import distance, full_point_mae, moved, run, tensors
from tests.test_golden_base import Recorder, compare, grouping
from tests.zoo import BACKBONES, Args, clouds

HEAD = "cls_head_finetune"
POOL = "cls+prompt+max"


def small(**fields: Any) -> GFTConfig:
    """A configuration for tiny clouds, of an adapter without a head."""
    sizes = {"num_prompts": 3, "neighbours": 4, "edge_widths": [5, 6], "graph_width": 7, "attention_width": 8}
    return GFTConfig(**{**sizes, "num_heads": 2, "modules_to_save": [], **fields})


def parts_of(model: PointPeftModel) -> list[GraphPrompts]:
    """The parts at the blocks, in order."""
    return [part for _, part in get_adapter(model, "default").all_parts() if isinstance(part, GraphPrompts)]


def entering(model: PointPeftModel) -> EnteringPrompts:
    (part,) = [part for part in parts_of(model) if isinstance(part, EnteringPrompts)]
    return part


# ---- what was published ----------------------------------------------------------------------------------------------


def test_parameters_on_point_mae():
    """367,616 are published without the head, and 3,072 of them never run; with the head of three widths 365,839."""
    model = get_peft_model(full_point_mae(), GFTConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 367_616 - 4 * 2 * 384 == 364_544
    graph = entering(model).graph
    assert graph is not None and sum(parameter.numel() for parameter in graph.parameters()) == 140_288
    attentions = [part.attention for part in parts_of(model)]
    assert [number for number, attention in enumerate(attentions) if attention is not None] == [0, 3, 6, 9]
    assert sum(p.numel() for a in attentions if a is not None for p in a.parameters()) == 173_568 - 3_072
    model = get_peft_model(full_point_mae(), GFTConfig(), heads={HEAD: POOL})
    assert model.get_nb_trainable_parameters()[0] == 364_544 + 365_839


def official(name: str) -> str:
    """The name in the recorded run of a tensor of the adapter that is no copy of the backbone's."""
    if name.endswith("gft.prompts"):
        return "prompt"
    path, _, leaf = name.rpartition(".")
    if "gft.graph" in name:
        _, _, inner = path.partition("gft.graph.")
        known = {"joined": "edge_conv.final_conv.0", "norm": "edge_conv.final_conv.1"}
        if inner not in known:
            _, number, layer = inner.split(".")
            known[inner] = f"edge_conv.conv_blocks.{number}.{('edge', 'norm').index(layer)}"
        return f"{known[inner]}.{leaf}"
    block, _, inner = path.partition(".gft.attention.")
    inner = {"query_norm": "q_norm", "graph_norm": "kv_norm", "out": "proj.0"}.get(inner, inner)
    return f"cross_attn_blocks.{int(block.rpartition('.')[2]) // 2}.{inner}.{leaf}"


def golden_model(description: Mapping[str, Any]) -> PointPeftModel:
    config, values = description["config"], golden.weights(dict(description))
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "cls_dim")
    base = PointTransformer(**{name: config[name] for name in names})
    own = {name: values[name] for name in base.state_dict() if not name.startswith(HEAD)}
    base.load_state_dict(own, strict=False)
    method = GFTConfig(
        num_prompts=config["prompt_len"],
        neighbours=config["k"],
        edge_widths=config["feat_dims"],
        graph_width=config["emb_dim"],
        attention_width=config["cross_attn_dim"],
        num_heads=config["cross_attn_heads"],
        attention_dropout=config["cross_attn_drop_rate"],
        attention_layers=config["cross_idx"],
    )
    model = get_peft_model(base, method, heads={HEAD: POOL})
    used = set(own)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            theirs = name if name in values else official(name)
            tensor.copy_(values[theirs].reshape(tensor.shape))
            used.add(theirs)
    left = values.keys() - used
    assert {name.split(".")[2] for name in left} == {"post_norm_layer"}, "those that are never called"
    return model.eval()


class WholeSequences(Recorder):
    """Records all rows, where the backbone sees its own alone between two blocks: ahead of what takes prompts out."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: dict[str, Tensor] = {}

    def adapted(self, model: PointPeftModel) -> None:
        base: Any = model.base_model
        self.backbone(base)
        for number, (block, part) in enumerate(zip(base.blocks.blocks, parts_of(model), strict=True)):
            self.first(block, f"block_out.{number}")
            if part.attention is not None:
                self.output(part.attention, f"cross_out.{number}")
        self.first(base.norm, "final_norm")
        entrance = entering(model)
        assert entrance.graph is not None
        self.input(entrance.graph, "graph_in")
        self.output(entrance.graph, "graph_out")
        for number, convolution in enumerate(entrance.graph.convolutions):
            self.output(convolution, f"edge_out.{number}")
        self.input(dict(get_adapter(model, "default").own_modules())[HEAD], "head_in")

    def first(self, module: nn.Module, name: str) -> None:
        """The output of a module before any other hook has changed it."""

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.whole[name] = output

        module.register_forward_hook(keep, prepend=True)


def test_the_recorded_run(monkeypatch):
    description, expected = golden.load("gft")
    config, points = description["config"], golden.points(description)
    model, recorder = golden_model(description), WholeSequences()
    recorder.adapted(model)
    near: list[Tensor] = []
    search = geometry.feature_knn

    def spy(features: Tensor, k: int) -> Tensor:
        near.append(search(features, k))
        return near[-1]

    monkeypatch.setattr(geometry, "feature_knn", spy)
    with torch.no_grad():
        logits = model(points)
    ours = {**recorder.tensors, **recorder.whole, **grouping(points, config), "logits": logits, "input.points": points}
    ours |= {f"edge_knn_idx.{number}": index.sort(dim=2).values for number, index in enumerate(near)}
    assert len(near) == len(config["feat_dims"]), "one graph for all blocks"
    # The norm gets the prompts behind the patches.
    count = config["prompt_len"]
    prefix, patches, prompts = ours["final_norm"].split([1, config["num_group"], count], dim=1)
    ours["final_norm"] = torch.cat([prefix, prompts, patches], dim=1)
    compare(ours, expected)


# ---- what it computes ------------------------------------------------------------------------------------------------


def test_an_attention_by_hand():
    attention, x, g = GraphAttention(6, 5, 4, 2, 0.0), torch.randn(2, 3, 6), torch.randn(2, 7, 5)
    with torch.no_grad():
        assert torch.equal(attention(x, g), x), "it begins with nothing"
        for parameter in attention.parameters():
            parameter.normal_()
        q, normed = attention.query(attention.query_norm(x)), attention.graph_norm(g)
        k, v = attention.key(normed), attention.value(normed)
        heads = []
        for own in (slice(0, 2), slice(2, 4)):
            weights = torch.softmax(q[..., own] @ k[..., own].transpose(1, 2) / 2**0.5, dim=2)
            heads.append(weights @ v[..., own])
        expected = x + nn.functional.gelu(attention.out(torch.cat(heads, dim=2)))
        assert torch.allclose(attention(x, g), expected, atol=1e-5)


def test_dropout_acts_in_training_alone():
    attention, x, g = GraphAttention(6, 5, 4, 2, 0.5), torch.randn(2, 3, 6), torch.randn(2, 7, 5)
    nn.init.normal_(attention.out.weight)
    assert not torch.allclose(attention(x, g), attention(x, g))
    attention.eval()
    assert torch.equal(attention(x, g), attention(x, g))


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_one_long_sequence(layers):
    """Against a loop over the blocks that keeps the prompts in the sequence, as published, and knows no hooks."""
    model, count = moved(small(attention_layers=layers)), 3
    base: Any = model.base_model
    own, (points,), entrance = tensors(model), clouds(2, 0), entering(model)
    tuned = dict(get_adapter(model, "default").sites())["encoder.first_conv"][0]
    with torch.no_grad():
        found = model(points)
        with model.disable_adapter():
            neighbourhoods, centres = base.group_divider(points)
            first, base.encoder.first_conv = base.encoder.first_conv, tuned.module
            patches = base.reduce_dim(base.encoder(neighbourhoods))
            base.encoder.first_conv = first
            prompts = entrance.prompts.expand(2, -1, -1)
            pos = [own["cls_pos"].expand(2, -1, -1), torch.zeros_like(prompts), base.pos_embed(centres)]
            x = torch.cat([own["cls_token"].expand(2, -1, -1), prompts, patches], dim=1)
            assert entrance.graph is not None
            g = entrance.graph(x, recomputing=False)
            asked = 0
            for block, part in zip(base.blocks.blocks, parts_of(model), strict=True):
                x = block(x + torch.cat(pos, dim=1))
                if part.attention is not None:
                    x, asked = part.attention(x, g), asked + 1
            x = base.norm(x)
            expected = base.forward_head(torch.cat([x[:, :1], x[:, 1 + count :]], dim=1))
    assert asked == len(layers or [0])
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_fresh_adapter_is_the_backbone_with_its_prompts():
    """So it does not depend on the graph; and the attentions have a gradient from the first step on."""
    model, (points,) = moved(small(), fresh=True), clouds(2, 0)
    expected = model(points)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(points), expected, atol=1e-4)
    graph = entering(model).graph
    assert graph is not None
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.normal_()
    assert torch.equal(model(points), expected)
    model(points).square().sum().backward()
    outs = [part.attention.out for part in parts_of(model) if part.attention is not None]
    assert len(outs) == 1 and all(out.weight.grad is not None and out.weight.grad.any() for out in outs)


@pytest.mark.parametrize("std", [1.0, 3.0])
def test_prompts_begin_with_their_standard_deviation(std):
    prompts = entering(moved(small(num_prompts=500, prompt_std=std), fresh=True)).prompts.detach()
    assert float(prompts.std()) == pytest.approx(std, rel=0.05) and abs(float(prompts.mean())) < 0.05 * std


# ---- what the graph is made of ---------------------------------------------------------------------------------------


def graph_input(model: PointPeftModel, args: Args, number: int = 0) -> Tensor:
    """What the graph is made of, in the stage of that number."""
    entrances = [part for part in parts_of(model) if isinstance(part, EnteringPrompts)]
    seen: list[Tensor] = []
    graph = entrances[number].graph
    assert graph is not None
    handle = graph.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(*args)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("tuned", [["encoder"], ["encoder.first_conv.0"], []])
def test_the_graph_is_of_the_tokens_of_the_trained_tokenizer(tuned):
    """Where the adapter has a copy of what makes the tokens, the base's are seen: then by taking positions away."""
    model, (points,) = moved(small(tuned_modules=tuned), "compact"), clouds(2, 0)
    patches: list[Tensor] = []
    model.base_model.get_submodule("encoder").register_forward_hook(lambda module, args, out: patches.append(out))
    found = graph_input(model, (points,))[:, 4:]
    assert torch.allclose(found, patches[0], atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        model(points)
    assert torch.allclose(patches[1], found, atol=1e-4) == (not tuned)


@pytest.mark.parametrize("name", ["point_mae", "recon", "pointgpt", "uni3d"])
@pytest.mark.parametrize("tokens", [None, []])
def test_prefix_and_patches_have_no_position_in_the_graph(name, tokens):
    """Whatever positions are, trained or not: others give another output and the same graph."""
    model: Any = moved(small(tuned_tokens=tokens, tuned_modules=[]), name)
    stage, points = model.anatomy.stages[0], BACKBONES[name].inputs(2, 0)
    names = [parameter.name for parameter in model.anatomy.prefix_parameters if parameter.role == "position"]
    places = [tensors(model).get(name, model.base_model.get_parameter(name)) for name in names]
    if stage.position_embedding is not None:
        places += model.base_model.get_submodule(stage.position_embedding).parameters()
    outputs, graphs = [], []
    for _ in range(2):
        graphs.append(graph_input(model, points))
        outputs.append(run(model, BACKBONES[name], points))
        with torch.no_grad():
            for place in places:
                place.add_(torch.randn_like(place))
    assert places and distance(outputs[0], outputs[1]) > 1e-3
    assert distance(graphs[0], graphs[1]) < 1e-5


def test_a_later_start():
    """The prompts enter at the first of the chosen blocks, and the graph is of what the block before it has made."""
    model: Any = moved(small(layers_to_transform=[1, 2]))
    (points,) = clouds(2, 0)
    made: list[Tensor] = []
    model.base_model.get_submodule("blocks.blocks.0").register_forward_hook(lambda m, args, out: made.append(out))
    graph = graph_input(model, (points,))
    assert [part.attention is not None for part in parts_of(model)] == [True, False]
    assert torch.equal(torch.cat([graph[:, :1], graph[:, 4:]], dim=1), made[0])
    assert torch.equal(graph[:, 1:4], entering(model).prompts.expand(2, -1, -1))
    with pytest.raises(AdapterError, match=r"'blocks.blocks.1' runs before the one whose tokens it should be handed"):
        model.base_model.pos_embed(torch.randn(2, 16, 3))
        model.base_model.get_submodule("blocks.blocks.1")(torch.randn(2, 17, 24))


def test_every_stage_has_its_own():
    model: Any = moved(small(), "point_m2ae")
    widths = [stage.width for stage in model.anatomy.stages]
    entrances = [part for part in parts_of(model) if isinstance(part, EnteringPrompts)]
    assert [part.prompts.shape[1] for part in entrances] == widths == [12, 24, 24]
    assert all(part.graph is not None and part.attention is not None for part in entrances)
    for number, stage in enumerate(model.anatomy.stages):
        found = graph_input(model, BACKBONES["point_m2ae"].inputs(2, 0), number)
        assert found.shape[2] == stage.width and found[:, :3].equal(entrances[number].prompts.expand(2, -1, -1))
    # A stage that nothing asks a graph of has none, and its prompts all the same.
    model = moved(small(attention_layers=[2]), "point_m2ae")
    entrances = [part for part in parts_of(model) if isinstance(part, EnteringPrompts)]
    assert [part.graph is not None for part in entrances] == [False, True, False]


def test_fewer_tokens_than_neighbours():
    outputs = [moved(small(neighbours=k), scale=0.1)(*clouds(2, 0)) for k in (1 + 3 + 16, 100, 4)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], atol=1e-4)


# ---- what it is trained with, and where it cannot be -----------------------------------------------------------------


def test_statistics_of_the_tokenizer_stay_and_its_scales_are_trained():
    model, (points,) = moved(small()).train(), clouds(4, 0)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    model(points).square().sum().backward()
    for name, tensor in tensors(model).items():
        moved_on = not torch.equal(tensor, before[name])
        assert moved_on == (".graph." in name and not isinstance(tensor, nn.Parameter)), name
        assert not isinstance(tensor, nn.Parameter) or (tensor.grad is not None and tensor.grad.any()), name
    assert any(name.startswith("encoder.first_conv.1.running") for name in before)


def test_modules_and_tokens_to_train():
    everything = {"encoder.first_conv.0.weight", "cls_token", "cls_pos"}
    assert everything < tensors(moved(small(), fresh=True)).keys()
    left = tensors(moved(small(tuned_modules=[], tuned_tokens=["cls_pos"]), fresh=True)).keys()
    assert left.isdisjoint(everything - {"cls_pos"}) and "cls_pos" in left


def test_refused_where_tokens_take_no_prompts():
    with pytest.raises(AnatomyError, match=r"GFT puts prompts among the tokens of .* packed.*Use a method that adapts"):
        moved(small(), "pointcept_ptv3")


def test_an_attention_after_a_block_that_is_not_there():
    with pytest.raises(AnatomyError, match=r"attention_layers names block 9, which is not one .* blocks: 0, 1, 2"):
        moved(small(attention_layers=[0, 9]))
    with pytest.raises(AnatomyError, match=r"attention_layers names block 0, which is not one .* blocks: 1, 2"):
        moved(small(attention_layers=[0], layers_to_transform=[1, 2]))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_prompts": 0}, r"GFTConfig.num_prompts is 0; allowed: 1 or more"),
        ({"prompt_std": 0.0}, r"GFTConfig.prompt_std is 0.0; allowed: more than 0"),
        ({"edge_widths": []}, r"GFTConfig.edge_widths is \(\); allowed: one number or more, each 1 or more"),
        ({"edge_widths": [8, 0]}, r"GFTConfig.edge_widths is \(8, 0\); allowed: one number or more, each 1 or more"),
        ({"num_heads": 3}, r"GFTConfig.num_heads is 3; allowed: a divisor of attention_width, which is 32"),
        ({"attention_dropout": 1.0}, r"GFTConfig.attention_dropout is 1.0; allowed: 0 or more and less than 1"),
        ({"attention_layers": []}, r"GFTConfig.attention_layers is \(\); allowed: None, or one block number or more"),
        ({"attention_layers": [-1]}, r"GFTConfig.attention_layers is \(-1,\); allowed: None, or one block number"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(PointPeftError, match=match):
        GFTConfig(**fields)
