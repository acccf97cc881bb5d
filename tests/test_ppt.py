"""PPT: its equation, the recorded numbers of the official code, and where it can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from point_peft import AdapterError, AnatomyError, PointPeftError, PPTConfig, geometry, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.heads import mlp_head
from point_peft.backbones import PointTransformer
from tests import golden
from tests.adapting import full_point_mae, gradients, move, moved
from tests.recording import Sequences
from tests.test_golden_base import compare, grouping
from tests.zoo import BACKBONES, Compact, clouds, compact_like


def small(**fields):
    """A configuration for tiny clouds, of an adapter without a head."""
    return PPTConfig(**{"num_groups": 9, "group_size": 5, "mlp_width": 7, "modules_to_save": [], **fields})


def adapted(name="point_mae", **fields):
    """A tiny backbone with random values in all tensors of the adapter."""
    return moved(small(**fields), name, scale=0.1)


# ---- what it computes ------------------------------------------------------------------------------------------------


def test_parameters_on_point_mae():
    """As METHODS.md counts them: three MLPs, the positional embedding, the first convolution, the prefix."""
    model = get_peft_model(full_point_mae(), PPTConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 3 * 197_248 + 50_048 + 33_792 + 768 == 676_352
    shared = [parameter for state in get_adapter(model, "default").shared_states() for parameter in state.parameters()]
    assert sum(parameter.numel() for parameter in shared) == 3 * 197_248 + 768


@pytest.mark.parametrize("name", ["point_mae", "timm_vit"])
def test_equation(name):
    """Positions are added before every block of the one, once in the other."""
    model, (points,) = adapted(name, tuned_modules=[], tuned_tokens=[]), clouds(2, 0)
    tensors = get_adapter(model, "default").tensors()
    base, once = model.base_model, name == "timm_vit"

    def mlp(which, x):
        w1, b1, w2, b2 = (tensors[f"ppt.{which}.{end}"] for end in ("0.weight", "0.bias", "2.weight", "2.bias"))
        return nn.functional.gelu(x @ w1.T + b1) @ w2.T + b2

    stage = model.anatomy.stages[0]
    grouper, embed = base.get_submodule(stage.points.module), base.get_submodule(str(stage.position_embedding))
    blocks = [base.get_submodule(block.path) for block in stage.blocks]
    first = []
    blocks[0].register_forward_pre_hook(lambda module, args: first.append(args[0]))
    found = []
    blocks[-1].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(points)
        with model.disable_adapter():
            model(points)  # what the first block of the base gets
            middles = geometry.gather(points, geometry.farthest_point_sample(points, 9))
            prompts = geometry.gather(points, geometry.knn(middles, points, 5)) - middles[:, :, None]
            for path in stage.tokenizer:
                prompts = base.get_submodule(path)(prompts)
            where, (_, centres) = embed(middles), grouper(points)
            pos, x = embed(centres), first[-1]
            e = x.shape[1] - pos.shape[1]  # prefix tokens
            if not once:
                pos = torch.cat([base.cls_pos.expand(2, -1, -1), pos], dim=1)
            for number, block in enumerate(blocks):
                again = number > 0 and not once
                x = x + pos if again else x
                prompts = prompts + where if again or number == 0 else prompts
                patches = x[:, e:] + mlp("patches", x[:, e:])
                prompts = prompts + mlp("further", prompts)
                x = torch.cat([x[:, :e], patches, prompts], dim=1)
                scales = (block.ls1, block.ls2) if once else (nn.Identity(), nn.Identity())  # timm's layer scale
                x = x + scales[0](block.attn(block.norm1(x)))
                x = x + scales[1](block.mlp(block.norm2(x))) + mlp("all", x)
                x, prompts = x.split([e + 16, 9], dim=1)
    assert torch.allclose(found[0], x, atol=1e-5)


def test_golden():
    description, expected = golden.load("ppt")
    config, values = description["config"], golden.weights(description)
    model = PointTransformer(
        trans_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        num_group=config["num_group"],
        group_size=config["group_size"],
        encoder_dims=config["embed_dim"],
        drop_path_rate=config["drop_path_rate"],
        cls_dim=config["cls_dim"],
    )
    own = {"blocks.prompt_mlp": "patches", "blocks.prompt_pos_mlp": "further", "blocks.prompt_all_mlp": "all"}
    ours = {
        f"ppt.{own[name.rsplit('.', 2)[0]]}.{'.'.join(name.rsplit('.', 2)[1:])}": value
        for name, value in values.items()
        if name.rsplit(".", 2)[0] in own
    }
    head = "cls_head_finetune"
    kept = {n: v for n, v in values.items() if n.rsplit(".", 2)[0] not in own and not n.startswith(head)}
    assert not model.load_state_dict(kept, strict=False).unexpected_keys
    recorded = Sequences(model)
    width = values["blocks.prompt_mlp.0.weight"].shape[0]
    method = PPTConfig(num_groups=config["prompt_num_group"], group_size=config["prompt_group_size"], mlp_width=width)
    heads = {head: mlp_head(config["embed_dim"], config["cls_dim"], "cls+mean+prompt", activation=nn.GELU)}
    peft = get_peft_model(model, method, heads=heads).eval()
    tensors = get_adapter(peft, "default").tensors()
    assert set(ours) < set(tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(ours[name] if name in ours else values[name])
    points = golden.points(description)
    recorded.adapted(peft, "default")
    with torch.no_grad():
        found = {"logits": peft(points), "input.points": points, **recorded.tensors}
    again = grouping(points, {"num_group": config["prompt_num_group"], "group_size": config["prompt_group_size"]})
    found |= {**grouping(points, config), **{f"prompt_{name}": index for name, index in again.items()}}
    found["prompt_centres"] = geometry.gather(points, again["fps_idx"])
    compare(found, expected)


def test_a_fresh_adapter_is_the_backbone_with_prompts():
    """M1, M2 and M3 begin with nothing: what the prompts change is all. As published, they begin with something."""
    model, (points,) = adapted(tuned_modules=[], tuned_tokens=[]), clouds(2, 0)
    fresh = [
        get_peft_model(BACKBONES["point_mae"].build(), PPTConfig(modules_to_save=[], init=init)).eval()(points)
        for init in ("identity", "identity", "published")
    ]
    assert torch.equal(fresh[0], fresh[1]) and not torch.allclose(fresh[0], fresh[2], atol=1e-4)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(fresh[0], model(points), atol=1e-4)
    assert not PPTConfig().identity_at_init


def test_smaller_clouds_are_taken_as_they_are():
    (points,), outputs = clouds(2, 0), []
    for count in (96, 500):
        torch.manual_seed(0)
        config = small(num_groups=count, group_size=count, init="published")
        outputs.append(get_peft_model(BACKBONES["point_mae"].build(), config).eval()(points))
    assert torch.equal(*outputs)


def test_a_sample_does_not_depend_on_its_batch_mates():
    model, (points,) = adapted(), clouds(3, 0)
    with torch.no_grad():
        together = model(points)
        alone = torch.cat([model(points[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_published_head_reads_the_prompts():
    backbone, (points,) = BACKBONES["point_mae"], clouds(2, 0)
    head = {"cls_head_finetune": lambda: mlp_head(24, 3, "cls+mean+prompt", activation=nn.GELU)}
    model = get_peft_model(backbone.build(), small(modules_to_save=None), heads=head).eval()
    move(model, 0.1)
    model(points).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing


# ---- how it is run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["inside", "block", "container"])
def test_checkpointing_gives_the_same_gradients(again):
    torch.manual_seed(0)
    plain, (points,) = Compact(), clouds(2, 0)
    found = []
    for base in (compact_like(plain), compact_like(plain, again=again)):
        torch.manual_seed(0)
        model = get_peft_model(base, small()).eval()
        move(model, 0.1)
        model(points).square().sum().backward()
        found.append(gradients(model.adapters))
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-6), name


def test_reentrant_checkpointing_is_refused_with_what_to_do():
    model = get_peft_model(Compact(again="block", reentrant=True), PPTConfig(modules_to_save=[]))
    with pytest.raises(AdapterError, match="use_reentrant=False"):
        model(*clouds(2, 0))


def test_autocast():
    model, (points,) = adapted(), clouds(2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(points)
    output.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.adapters.parameters())
    assert torch.allclose(output.float(), model(points), atol=0.1)


def test_a_block_that_is_called_alone_says_what_it_misses():
    model = adapted()
    model.base_model.pos_embed(torch.randn(2, 16, 3))
    with pytest.raises(AdapterError, match=r"'blocks.blocks.0' gets further tokens.* call the model"):
        model.base_model.blocks.blocks[0](torch.randn(2, 17, 24))
    neighbourhoods = torch.randn(2, 16, 8, 3)
    model.base_model.encoder(neighbourhoods)  # there are no clouds to group again


def test_blocks_may_be_left_out():
    """The prompts then pass by them."""
    some, every = adapted(layers_to_transform=[1], tuned_tokens=[]), adapted(tuned_tokens=[])
    assert "blocks.blocks.0" not in dict(get_adapter(some, "default").sites())
    with torch.no_grad():
        assert not torch.allclose(some(*clouds(2, 0)), every(*clouds(2, 0)), atol=1e-4)


def test_what_is_trained_whole_can_be_chosen():
    paths = {path for path, _ in get_adapter(adapted(), "default").sites()}
    assert {"pos_embed", "encoder.first_conv"} < paths
    paths = {path for path, _ in get_adapter(adapted(tuned_modules=["encoder"]), "default").sites()}
    assert "encoder" in paths and "pos_embed" not in paths
    paths = {path for path, _ in get_adapter(adapted("timm_vit"), "default").sites()}
    assert {"positions", "patches.net.lift"} < paths


# ---- where it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("point_m2ae", r"3 stages with other tokens each"),
        ("pcp_mae", r"not known what makes positions of coordinates alone \(position_embedding\)"),
        ("uni3d", r"not known what makes tokens of neighbourhoods \(tokenizer\)"),
        ("padded_patches", r"where the clouds are seen that it groups \(points\), nor"),
    ],
)
def test_refused(name, why):
    with pytest.raises(AnatomyError, match=why):
        adapted(name)


@pytest.mark.parametrize("field", ["num_groups", "group_size", "mlp_width"])
def test_fields_are_validated(field):
    with pytest.raises(PointPeftError, match=rf"PPTConfig.{field} is 0; allowed: 1 or more"):
        small(**{field: 0})
    with pytest.raises(PointPeftError, match=r"PPTConfig.init is 'zero'; allowed: 'identity' or 'published'"):
        small(init="zero")
