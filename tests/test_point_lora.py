"""PointLoRA: its equations, the recorded numbers of the official code, and where it can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from point_peft import AdapterError, AnatomyError, PointLoRAConfig, PointPeftError, geometry, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.heads import mlp_head
from point_peft.backbones import PointTransformer
from point_peft.tuners.point_lora import LowRankPart, SelectedTokens, negative_entropy, straight_through
from tests import golden
from tests.adapting import full_point_mae, gradients, move, moved
from tests.recording import Sequences
from tests.test_golden_base import compare, grouping
from tests.zoo import BACKBONES, Compact, clouds, compact_like


def small(**fields):
    """A configuration for tiny clouds, of an adapter without a head."""
    sizes = {"num_groups": (9, 6), "group_size": (5, 8), "num_selected": (4, 2), "modules_to_save": []}
    return PointLoRAConfig(**{**sizes, **fields})


def adapted(name="point_mae", **fields):
    """A tiny backbone with random values in all tensors of the adapter."""
    return moved(small(**fields), name, scale=0.1)


def mlp(tensors, name, x):
    w1, b1, w2, b2 = (tensors[f"{name}.{end}"] for end in ("0.weight", "0.bias", "2.weight", "2.bias"))
    return nn.functional.gelu(x @ w1.T + b1) @ w2.T + b2


# ---- what it computes ------------------------------------------------------------------------------------------------


def test_parameters_on_point_mae():
    """As METHODS.md counts them: low-rank factors, predictor, five MLPs, what of the stem is tuned, the prefix."""
    model = get_peft_model(full_point_mae(), PointLoRAConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 221_184 + 74_113 + 125_312 + 50_048 + 33_792 + 768 == 505_217
    tensors = get_adapter(model, "default").tensors()
    count = {name: sum(t.numel() for key, t in tensors.items() if name in key) for name in ("lora_", "predictor")}
    assert count == {"lora_": 221_184, "predictor": 74_113}


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj"])
def test_low_rank_equation(layer):
    model, x = adapted(r=3, lora_alpha=6, shared_mlp_scale=0.7), torch.randn(2, 5, 24)
    tensors, path = get_adapter(model, "default").tensors(), f"blocks.blocks.1.{layer}"
    module = model.base_model.get_submodule(path)
    with torch.no_grad():
        output = module(x)
        with model.disable_adapter():
            expected = module(x)
        a, b = (tensors[f"{path}.point_lora.lora_{which}.weight"] for which in "AB")
        expected += 2 * x @ a.T @ b.T + 0.7 * mlp(tensors, f"point_lora.shared_mlps.{layer.replace('.', '_')}", x)
    assert torch.allclose(output, expected, atol=1e-5)


def test_the_best_tokens_are_selected_and_carried_through_the_blocks():
    model, (points,) = adapted(tuned_modules=[], tuned_tokens=[]), clouds(2, 0)
    tensors, base = get_adapter(model, "default").tensors(), model.base_model
    found = []
    base.blocks.blocks[-1].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(points)
        with model.disable_adapter():
            neighbourhoods, centres = base.group_divider(points)
            fine, coarse = (selection(base, tensors, points, *row) for row in ((9, 5, 4), (6, 8, 2)))
            further = torch.cat([fine[0], coarse[0]], dim=1)
            where = base.pos_embed(torch.cat([fine[1], coarse[1]], dim=1))
            x = torch.cat([base.cls_token.expand(2, -1, -1), base.encoder(neighbourhoods)], dim=1)
            pos = torch.cat([base.cls_pos.expand(2, -1, -1), base.pos_embed(centres)], dim=1)
        for block in base.blocks.blocks:
            x, further = x + pos, further + where
            x = torch.cat([x[:, :1], x[:, 1:] + mlp(tensors, "point_lora.patches", x[:, 1:])], dim=1)
            x = torch.cat([x, further + mlp(tensors, "point_lora.further", further)], dim=1)
            x = x + block.attn(block.norm1(x))  # the low-rank updates in it act
            x, further = (x + block.mlp(block.norm2(x))).split([17, 6], dim=1)
    assert torch.allclose(found[0], x, atol=1e-5)


def selection(base, tensors, points, groups, size, count):
    """The tokens of highest score of one grouping, and where they lie."""
    centres = geometry.gather(points, geometry.farthest_point_sample(points, groups))
    tokens = base.encoder(geometry.gather(points, geometry.knn(centres, points, size)) - centres[:, :, None])
    at = "reduce_dim.point_lora.mask_predictor"
    hidden = torch.relu(tokens @ tensors[f"{at}.fc1.weight"].T + tensors[f"{at}.fc1.bias"])
    p = (hidden @ tensors[f"{at}.fc2.weight"].T + tensors[f"{at}.fc2.bias"])[:, :, 0].sigmoid()
    chosen = p.argsort(dim=1, descending=True)[:, :count]
    return geometry.gather(tokens, chosen), geometry.gather(centres, chosen)


def test_golden():
    description, expected = golden.load("pointlora")
    config, values = description["config"], golden.weights(description)
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "drop_path_rate", "cls_dim")
    model = PointTransformer(**{name: config[name] for name in names})
    own = {
        "blocks.prompt_mlp": "point_lora.patches",
        "blocks.prompt_pos_mlp": "point_lora.further",
        "blocks.prompt_qkv_mlp": "point_lora.shared_mlps.attn_qkv",
        "blocks.prompt_proj_mlp": "point_lora.shared_mlps.attn_proj",
        "lora_mask_predictor.fc1": "reduce_dim.point_lora.mask_predictor.fc1",
        "lora_mask_predictor.fc2": "reduce_dim.point_lora.mask_predictor.fc2",
    }

    def named(name):
        """The name that we have for an official one."""
        for official, ours in own.items():
            if name.startswith(official + "."):
                return ours + name.removeprefix(official)
        name = name.replace(".linear.", ".")
        return f"{name.replace('.lora_', '.point_lora.lora_')}.weight" if ".lora_" in name else name

    head, width = "cls_head_finetune", values["blocks.prompt_mlp.0.weight"].shape[0]
    # The weight of an official low-rank layer is the scale of its shared MLP.
    scales = {name.removesuffix(".weight"): v for name, v in values.items() if v.shape == (1,) and ".attn." in name}
    ours = {named(name): value for name, value in values.items() if name.removesuffix(".weight") not in scales}
    kept = {n: v for n, v in ours.items() if "point_lora." not in n and not n.startswith(head)}
    assert not model.load_state_dict(kept, strict=False).unexpected_keys
    recorded = Sequences(model)
    method = PointLoRAConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_r"],  # the official scaling is never applied
        shared_mlp_width=width,
        token_mlp_width=width,
    )
    heads = {head: mlp_head(config["trans_dim"], config["cls_dim"], "cls+all_max")}
    peft = get_peft_model(model, method, heads=heads).eval()
    adapter = get_adapter(peft, "default")
    tensors = adapter.tensors()
    assert {name for name in ours if "point_lora." in name} <= set(tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(ours[name])
    for path, part in adapter.all_parts():
        if isinstance(part, LowRankPart):
            part.shared_scale = float(scales.pop(path))
        if isinstance(part, SelectedTokens):
            predictor = part.mask_predictor
    assert not scales
    scores = []
    predictor.register_forward_hook(lambda module, args, output: scores.append(output))
    points = golden.points(description)
    recorded.adapted(peft, "default")
    with torch.no_grad():
        found = {"logits": peft(points), "input.points": points, **recorded.tensors, **grouping(points, config)}
        rows = zip(method.num_groups, method.group_size, method.num_selected, strict=True)
        for call, (count, size, best) in enumerate(rows):
            again = grouping(points, {"num_group": count, "group_size": size})
            found |= {f"{name}_{count}": index for name, index in again.items()}
            found[f"centres_{count}"] = geometry.gather(points, again["fps_idx"])
            found[f"selected_{count}"] = scores[call].topk(best, dim=1).indices
            found[f"mask_prob.call{call}"] = scores[call].sigmoid()
            # Ours computes the positions of the selected alone.
            found[f"pos.call{call + 1}"] = model.pos_embed(found[f"centres_{count}"])
    compare(found, expected)
    loss = negative_entropy(scores[0]) + 0.25 * negative_entropy(scores[1])
    assert abs(float(loss) - description["mask_loss"]) < 1e-5


def test_the_task_and_the_entropy_train_the_predictor():
    model, (points,) = adapted(), clouds(2, 0)
    tensors = get_adapter(model, "default").tensors()
    predictor = [tensor for name, tensor in tensors.items() if "mask_predictor" in name]
    model(points).square().sum().backward()
    assert len(predictor) == 4 and all(tensor.grad is not None and tensor.grad.any() for tensor in predictor)
    assert model.auxiliary_loss() == 0, "in eval mode nothing is added"

    model.zero_grad()
    model.train()
    model(points)
    loss = model.auxiliary_loss()
    loss.backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in predictor)
    scores = []
    part = next(part for _, part in get_adapter(model, "default").all_parts() if isinstance(part, SelectedTokens))
    part.mask_predictor.register_forward_hook(lambda module, args, output: scores.append(output))
    with torch.no_grad():
        model(points)
    p = [score.sigmoid() for score in scores]
    terms = [(one * one.log() + (1 - one) * (1 - one).log()).mean() for one in p]
    assert torch.allclose(model.auxiliary_loss(), 0.004 * (terms[0] + 0.25 * terms[1]), atol=1e-6)


def test_the_factor_is_one_with_the_gradient_of_the_logarithm():
    scores = torch.tensor([-200.0, -3.0, 0.0, 200.0], requires_grad=True)
    factor = straight_through(scores)
    factor.sum().backward()
    assert torch.equal(factor, torch.ones(4))
    assert scores.grad is not None and torch.allclose(scores.grad, 1 - scores.detach().sigmoid())


def test_a_fresh_adapter_is_the_backbone_with_selected_tokens():
    """Nothing but the tokens changes the output; as published, m, M1 and M2 begin with something."""
    (points,), outputs = clouds(2, 0), []
    for init in ("identity", "published"):
        torch.manual_seed(0)
        base: Any = BACKBONES["point_mae"].build()
        model = get_peft_model(base, small(init=init, tuned_modules=[], tuned_tokens=[])).eval()
        x = torch.randn(2, 5, 24)
        with torch.no_grad():
            qkv = base.blocks.blocks[0].attn.qkv
            changed = qkv(x)
            outputs.append(model(points))
            with model.disable_adapter():
                assert torch.equal(changed, qkv(x)) == (init == "identity")
                outputs.append(model(points))
    assert torch.equal(outputs[1], outputs[3])
    assert all(not torch.allclose(outputs[i], outputs[1], atol=1e-4) for i in (0, 2))
    assert not PointLoRAConfig().identity_at_init


def test_smaller_clouds_are_taken_as_they_are():
    (points,), outputs = clouds(2, 0), []
    for groups, size, count in (((96, 96), (96, 64), (96, 8)), ((500, 128), (500, 64), (200, 8))):
        torch.manual_seed(0)
        config = small(num_groups=groups, group_size=size, num_selected=count, init="published")
        outputs.append(get_peft_model(BACKBONES["point_mae"].build(), config).eval()(points))
    assert torch.equal(*outputs)


def test_a_sample_does_not_depend_on_its_batch_mates():
    model, (points,) = adapted(), clouds(3, 0)
    with torch.no_grad():
        together = model(points)
        alone = torch.cat([model(points[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_published_head_reads_the_selected_tokens():
    backbone, (points,) = BACKBONES["point_mae"], clouds(2, 0)
    head = {"cls_head_finetune": lambda: mlp_head(24, 3, "cls+all_max")}
    model = get_peft_model(backbone.build(), small(modules_to_save=None), heads=head).eval()
    move(model, 0.1)
    model(points).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing


# ---- how it is run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["inside", "block", "container"])
def test_checkpointing_gives_the_same_gradients(again):
    torch.manual_seed(0)
    plain, (points,), found = Compact(), clouds(2, 0), []
    for base in (compact_like(plain), compact_like(plain, again=again)):
        torch.manual_seed(0)
        model = get_peft_model(base, small())
        move(model, 0.1)
        model.eval()
        get_adapter(model, "default").train()
        (model(points).square().sum() + model.auxiliary_loss()).backward()
        found.append((model.auxiliary_loss(), gradients(model.adapters)))
    assert found[0][0] == found[1][0] < 0
    for name, gradient in found[0][1].items():
        assert torch.allclose(found[1][1][name], gradient, atol=1e-6), name


def test_autocast():
    model, (points,) = adapted(), clouds(2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(points)
    output.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.adapters.parameters())


def test_nothing_is_merged():
    with pytest.raises(AdapterError, match="cannot be merged"):
        adapted().merge()


# ---- where it can be -------------------------------------------------------------------------------------------------


def test_an_attention_whose_layers_are_not_called_does_without_the_shared_mlp():
    name = "transformer_sequence_first"
    with pytest.raises(AnatomyError, match=r"self_attn' is not called as a layer.*the shared MLP.*shared_mlp_width=0"):
        adapted(name)
    model, x = adapted(name, shared_mlp_width=0), torch.randn(5, 2, 24)
    tensors, path = get_adapter(model, "default").tensors(), "encoder.layers.1.self_attn"
    attention = model.base_model.get_submodule(path)
    changed = {}
    for weight, at in {"in_proj_weight": path, "out_proj.weight": f"{path}.out_proj"}.items():
        a, b = (tensors[f"{at}.point_lora.lora_{which}.weight"] for which in "AB")
        changed[weight] = attention.get_parameter(weight) + b @ a
    with torch.no_grad():
        output, _ = attention(x, x, x)
        with model.disable_adapter():
            expected, _ = torch.func.functional_call(attention, changed, (x, x, x))
    assert torch.allclose(output, expected, atol=1e-5)


def test_separate_projections_have_a_shared_mlp_each():
    model = adapted("compact")
    names = {name for name in get_adapter(model, "default").tensors() if name.endswith("0.weight") and "shared" in name}
    layers = ("attention_q", "attention_k", "attention_v", "attention_out")
    assert names == {f"point_lora.shared_mlps.{layer}.0.weight" for layer in layers}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("point_m2ae", r"3 stages with other tokens each"),
        ("pointgpt", r"not known what makes positions of coordinates alone \(position_embedding\)"),
        ("uni3d", r"not known what makes tokens of neighbourhoods \(tokenizer\)"),
    ],
)
def test_refused(name, why):
    with pytest.raises(AnatomyError, match=why):
        adapted(name)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("r", 0, "1 or more"),
        ("lora_alpha", 0, "more than 0"),
        ("shared_mlp_width", -1, "0 or more"),
        ("token_mlp_width", 0, "1 or more"),
        ("num_groups", (), "one number or more, each 1 or more"),
        ("num_groups", (4, 0), "one number or more, each 1 or more"),
        ("group_size", (4,), "2 numbers, as num_groups has, each 1 or more"),
        ("num_selected", (4, 0), "2 numbers, as num_groups has, each 1 or more"),
        ("mask_loss_weights", (1.0, -1.0), "2 numbers, as num_groups has, each 0 or more"),
    ],
)
def test_fields_are_validated(field, value, allowed):
    with pytest.raises(PointPeftError, match=rf"PointLoRAConfig.{field} is .*; allowed: {allowed}"):
        small(**{"num_groups": (128, 64), field: value})
