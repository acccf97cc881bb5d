"""GAPrompt: parity with the recorded numbers of the official code, its equations, and where it can be."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AnatomyError,
    GAPromptConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    geometry,
    get_peft_model,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.heads import mlp_head
from point_peft.backbones import PointTransformer
from point_peft.parts.propagation import Neighbourhoods
from point_peft.tuners.ga_prompt import CloudPart, ShapedPart, ShiftNet
from tests import golden
from tests.adapting import full_point_mae, move
from tests.test_golden_base import Recorder, grouping
from tests.zoo import BACKBONES, Compact, clouds, compact_like

# ---- parity ----------------------------------------------------------------------------------------------------------

TOLERANCE = 2e-5  # by the README of the golden files
LEVELS = {
    "abstraction_level1": "first_level",
    "abstraction_level2": "second_level",
    "propagation2": "to_first_level",
    "propagation1": "to_points",
}
# Official names -> ours. What is not here has the same name in both.
RENAMED = {
    r"prompt_cor$": r"ga_prompt.prompt_coordinates",
    r"point_prompt\.points$": r"group_divider.ga_prompt.point_prompts",
    r"shape_feature_mlp\.0\.": r"ga_prompt.shape.0.",
    r"shape_feature_mlp\.3\.": r"ga_prompt.shape.2.",
    r"shift_net\.mlp_position\.0\.": r"group_divider.ga_prompt.shift_net.shift.0.",
    r"shift_net\.mlp_position\.3\.": r"group_divider.ga_prompt.shift_net.shift.2.",
    **{
        rf"shift_net\.{theirs}\.mlp_{kind}s\.": rf"group_divider.ga_prompt.shift_net.{ours}.{own}."
        for theirs, ours in LEVELS.items()
        for kind, own in (("conv", "linears"), ("bn", "norms"))
    },
    r"blocks\.blocks\.(\d+)\.prompt_embeddings": r"blocks.blocks.\1.ga_prompt.embeddings",
    r"blocks\.blocks\.(\d+)\.adapter\.layer_norm\.": r"blocks.blocks.\1.ga_prompt.norm.",
    r"blocks\.blocks\.(\d+)\.adapter\.ln1\.": r"blocks.blocks.\1.ga_prompt.adapter.down.",
    r"blocks\.blocks\.(\d+)\.adapter\.ln2\.": r"blocks.blocks.\1.ga_prompt.adapter.up.",
    r"blocks\.blocks\.(\d+)\.out_transform\.0\.": r"blocks.blocks.\1.ga_prompt.geometry.norm.",
}


def our_name(official: str) -> str:
    for pattern, replacement in RENAMED.items():
        renamed, count = re.subn("^" + pattern, replacement, official)
        if count:
            return renamed
    return official


def published() -> tuple[PointPeftModel, PointTransformer, dict[str, Any], dict[str, Tensor]]:
    """The adapted model of the golden file, in eval mode, the description and what was recorded."""
    description, expected = golden.load("gaprompt")
    config, weights = description["config"], golden.weights(description)
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "cls_dim")
    base = PointTransformer(**{name: config[name] for name in names})
    unlike = "cls_head_finetune."
    base.load_state_dict({n: v if n.startswith(unlike) else weights[n] for n, v in base.state_dict().items()})
    kind = config["propagation_type"]
    assert kind.startswith("replacement"), f"{kind} is recorded, which mixes the samples of a batch"
    how = GAPromptConfig(
        init="published",
        geometry="replacement",
        num_prompts=config["num_tokens"],
        prompt_layers=config["prompt_depth"],
        shift_scale=config["perturbation"],
        shift_centres=config["num_group"],
        shift_neighbours=config["group_size"],
        shape_width=len(weights["shape_feature_mlp.0.weight"]),
        point_prompts=config["point_number"],
        point_prompt_factor=float(config["factor"]),
        adapter_width=config["adapter_config"]["adapter_dim"],
        neighbours=config["group_size"] // 2,
    )
    heads = {"cls_head_finetune": mlp_head(config["trans_dim"], config["cls_dim"], "cls+max+feature")}
    model = get_peft_model(base, how, heads=heads).eval()
    tensors, used = get_adapter(model, "default").tensors(), set(base.state_dict())
    with torch.no_grad():
        for official, value in weights.items():
            if our_name(official) in tensors:
                tensor = tensors.pop(our_name(official))
                tensor.copy_(value.reshape(tensor.shape))
                used.add(official)
    assert not tensors, f"not among the official weights: {sorted(tensors)}"
    without = description.get("weights_without_effect_on_any_stored_tensor")
    unused = weights.keys() - used
    assert without is None or unused <= set(without)
    late = range(config["prompt_depth"], config["depth"])
    assert all(re.search(r"scaler\d$|\.adapter\.scale\.", n) or _block(n) in late for n in unused), unused
    return model, base, description, expected


def _block(name: str) -> int:
    return int(name.split(".")[2])


def parts(model: PointPeftModel, kind: type) -> list[Any]:
    return [part for _, part in get_adapter(model, "default").all_parts() if isinstance(part, kind)]


@torch.no_grad()
def test_it_reproduces_every_recorded_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base, description, expected = published()
    config, points, recorder = description["config"], golden.points(description), Recorder()
    recorder.backbone(base)
    recorder.input(base.group_divider, "points_with_prompts")
    (head,) = (module for _, module in get_adapter(model, "default").own_modules())
    recorder.input(head, "head_in")
    (cloud,) = parts(model, CloudPart)
    net = cloud.shift_net
    chosen: list[Tensor] = []
    near: list[Tensor] = []
    for name, into in (("farthest_point_sample", chosen), ("knn", near)):
        original = getattr(geometry, name)

        def keep(*args: Any, original: Any = original, into: list[Tensor] = into) -> Tensor:
            found: Tensor = original(*args)
            into.append(found)
            return found

        monkeypatch.setattr(geometry, name, keep)
    late: list[Neighbourhoods] = []
    for part in parts(model, ShapedPart):
        part.geometry.register_forward_pre_hook(lambda module, args: late.append(args[2]))
    net.register_forward_hook(lambda module, args, output: recorder.tensors.update(shift_code=output[1]))
    found = {"input.points": points, "logits": model(points)}
    monkeypatch.undo()
    recorded = recorder.tensors
    n = points.shape[1]
    found |= {**recorded, "shifted_points": recorded["points_with_prompts"][:, :n]}
    found["shape_feature"] = recorded["head_in"][:, 2 * config["trans_dim"] :]
    found |= {"shift_fps1": chosen[0], "shift_fps2": chosen[1]}
    found |= {"shift_knn1": near[0].sort(dim=2).values, "shift_knn2": near[1].sort(dim=2).values}
    found |= grouping(recorded["points_with_prompts"], config)
    found |= {"level2_fps_idx": late[0].centre, "level2_knn_idx": late[0].neighbour.sort(dim=2).values}
    found["level2_centres"] = geometry.gather(recorded["centres"], late[0].centre)
    missing = expected.keys() - found.keys()
    assert not missing, f"recorded but not compared: {sorted(missing)}"
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            assert golden.distance(found[name], tensor) <= TOLERANCE, name
        else:
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@torch.no_grad()
def test_a_changed_weight_moves_the_output_as_it_moves_the_official_one() -> None:
    model, base, description, expected = published()
    points = golden.points(description)[:1]
    tensors = {**base.state_dict(), **get_adapter(model, "default").tensors()}
    for name, change in description.get("weakest_effect_on_output_when_weight_becomes_1.1w+0.05", []):
        weight = tensors[our_name(name)]
        before = weight.clone()
        weight.mul_(1.1).add_(0.05)
        found = float((model(points) - expected["logits"][:1]).abs().max())
        weight.copy_(before)
        assert found == pytest.approx(change, rel=0.1, abs=5e-6), name


# ---- the method ------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "modules_to_save": [], "num_prompts": 3, "prompt_layers": 2, "shift_centres": 12, "shift_neighbours": 6,
    "shape_width": 4, "point_prompts": 2, "adapter_width": 4, "neighbours": 5,
}  # fmt: skip
NO_CLOUD: dict[str, Any] = {"shift": False, "point_prompts": 0}


def adapted(name: str = "point_mae", *, fresh: bool = False, **fields: Any) -> PointPeftModel:
    """A tiny backbone, with random values in all tensors of the adapter unless fresh."""
    backbone = BACKBONES[name]
    torch.manual_seed(0)
    config = GAPromptConfig(**{**SMALL, **fields})
    model = get_peft_model(backbone.build(), config, example_inputs=backbone.example).eval()
    if not fresh:
        move(model, 0.1)
    return model


def gradients(model: PointPeftModel) -> dict[str, Tensor]:
    """Of the adapter's parameters, each of which has one."""
    found = {name: p.grad for name, p in model.adapters.named_parameters() if p.grad is not None and p.grad.any()}
    missing = {name for name, _ in model.adapters.named_parameters()} - found.keys()
    assert not missing, f"no gradient: {sorted(missing)}"
    return found


def test_parameters_on_point_mae() -> None:
    """As METHODS.md counts them, without those that never get a gradient; the gates of the default init come on top."""
    for init, gates in (("published", 0), ("identity", 12)):
        config: Any = {"modules_to_save": [], "init": init}
        model = get_peft_model(full_point_mae(), GAPromptConfig(**config))
        assert model.get_nb_trainable_parameters()[0] == 262_308 - 27_660 + gates
    (cloud,) = parts(model, CloudPart)
    assert sum(parameter.numel() for parameter in cloud.shift_net.parameters()) == 25_371


@pytest.mark.parametrize("kind", ["consistent", "replacement"])
@torch.no_grad()
def test_equations(kind: str) -> None:
    """The cloud, a block with prompts and one without, once more in plain loops."""
    model = adapted(geometry=kind, tuned_tokens=[])
    base: Any = model.get_base_model()
    (points,) = clouds(2, 0)
    grouped: list[Tensor] = []
    given: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    base.group_divider.register_forward_pre_hook(lambda module, args: grouped.append(args[0]))
    numbers = (0, 2)

    def keep(into: dict[int, Tensor], number: int, value: Tensor) -> None:
        into.setdefault(number, value)  # of the first call

    for number in numbers:
        block = base.blocks.blocks[number]
        # Ahead of the part's own hook, which puts the prompts in.
        block.register_forward_pre_hook(lambda module, args, n=number: keep(given, n, args[0]), prepend=True)
        block.register_forward_hook(lambda module, args, output, n=number: keep(made, n, output))
    model(points)
    (cloud,) = parts(model, CloudPart)
    shift, code = cloud.shift_net(points, recomputing=False)
    prompts = (5 * cloud.point_prompts).expand(2, -1, -1)
    assert torch.allclose(grouped[0], torch.cat([points + 0.8 * shift * points, prompts], dim=1), atol=1e-6)
    tensors = get_adapter(model, "default").tensors()
    with model.disable_adapter():
        _, centres = base.group_divider(grouped[0])
        shape = _mlp(code, tensors, "ga_prompt.shape.0", "ga_prompt.shape.2", nn.functional.gelu)
        places = tensors["ga_prompt.prompt_coordinates"]
        for number in numbers:
            own = {n.removeprefix(f"blocks.blocks.{number}.ga_prompt."): t for n, t in tensors.items()}
            for i in range(2):
                x, z = given[number][i], 0.5 * shape[i]
                p, ahead = x[:0], places[:0]
                if number == 0:
                    p, ahead = own["embeddings"] + z + base.pos_embed(places[None])[0], places
                x = base.blocks.blocks[number](torch.cat([x[:1], p, x[1:]])[None])[0]
                cls, p, t = x[:1], x[1 : 1 + len(p)], x[1 + len(p) :]
                t = _propagated(own, p, t, ahead, centres[i], kind)
                shaped = t + z if number == 0 else t
                normed = nn.functional.layer_norm(shaped, shaped.shape[1:], own["norm.weight"], own["norm.bias"])
                t = t + 0.7 * _mlp(normed, own, "adapter.down", "adapter.up", lambda v: v * torch.sigmoid(1.702 * v))
                assert torch.allclose(made[number][i], torch.cat([cls, t]), atol=1e-4)


def _mlp(x: Tensor, weights: dict[str, Tensor], one: str, two: str, activation: Any) -> Tensor:
    hidden: Tensor = activation(x @ weights[f"{one}.weight"].T + weights[f"{one}.bias"])
    return hidden @ weights[f"{two}.weight"].T + weights[f"{two}.bias"]


def _propagated(own: dict[str, Tensor], p: Tensor, t: Tensor, ahead: Tensor, c: Tensor, kind: str) -> Tensor:
    """The patches of one sample after propagation."""
    if kind == "consistent":
        tokens, places = torch.cat([p, t]), torch.cat([ahead, c])
    else:
        tokens, places = torch.cat([t[: len(t) - len(p)], p]), c
    chosen = geometry.farthest_point_sample(places[None], len(t) // 2)[0]
    values = []
    for centre in chosen:
        near = (places - places[centre]).norm(dim=1).argsort()[:5]
        pooled = 2 * tokens[near].amax(dim=0)
        mean, var = own["geometry.norm.running_mean"], own["geometry.norm.running_var"]
        pooled = (pooled - mean) / (var + 1e-5).sqrt() * own["geometry.norm.weight"] + own["geometry.norm.bias"]
        values.append(nn.functional.gelu(pooled) + 0.3 * tokens[centre])
    out = []
    for place, token in zip(c, t, strict=True):
        weights = 1 / ((places[chosen] - place).square().sum(dim=1) + 1e-8)
        propagated = (weights / weights.sum()) @ torch.stack(values)
        out.append(token + own["geometry.gate"] * 0.3 * propagated)
    return torch.stack(out)


@torch.no_grad()
def test_the_shift_net_acts_on_copies_as_on_points() -> None:
    """Pooling what layers make of neighbours, copy by copy, is pooling what they make of points."""
    torch.manual_seed(0)
    net, points = ShiftNet(16, 4, identity=False).eval(), torch.rand(2, 40, 3) * 2 - 1
    _, code = net(points, recomputing=False)
    for i in range(2):
        x = points[i]
        encoded = torch.cat([x] + [wave(2.0**f * x) for f in range(4) for wave in (torch.sin, torch.cos)], dim=1)
        features = encoded
        for level, count, k in ((net.first_level, 16, 4), (net.second_level, 8, 2)):
            chosen = geometry.farthest_point_sample(x[None], count)[0]
            pooled = []
            for centre in chosen:
                near = (x - x[centre]).norm(dim=1).argsort()[:k]
                pooled.append(level(features[near][None], recomputing=False)[0].amax(dim=0))
            x, features = x[chosen], torch.stack(pooled)
        assert torch.allclose(code[i], features.flatten(), atol=1e-5)


@torch.no_grad()
def test_a_fresh_adapter_is_the_backbone_with_prompts() -> None:
    (points,) = clouds(2, 0)
    found = {}
    for fields in ({}, {"init": "published"}, {"point_prompts": 0, "num_prompts": 0}):
        model = adapted(fresh=True, **fields)
        with model.disable_adapter():
            plain = model(points)
        found[str(fields)] = float((model(points) - plain).abs().max())
        config: Any = {**SMALL, **fields}
        assert GAPromptConfig(**config).identity_at_init == (found[str(fields)] < 1e-6)
    assert found["{}"] > 1e-4
    identity, published = (adapted(fresh=True, init=init) for init in ("identity", "published"))
    (one,), (other,) = parts(identity, CloudPart), parts(published, CloudPart)
    assert not one.shift_net(points, recomputing=False)[0].any()
    assert other.shift_net(points, recomputing=False)[0].any()


@pytest.mark.parametrize("count", [16, 24, 96])
@pytest.mark.parametrize("kind", ["consistent", "replacement"])
@torch.no_grad()
def test_small_clouds_and_no_batch_mates(count: int, kind: str) -> None:
    """With the published sizes of the shift net, on clouds that are smaller than they ask for."""
    model = adapted(geometry=kind, shift_centres=128, shift_neighbours=32, num_prompts=10, neighbours=16)
    (points,) = clouds(3, 0)
    together = model(points[:, :count])
    assert bool(together.isfinite().all())
    alone = torch.cat([model(points[i : i + 1, :count]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["point_mae", "point_m2ae", "uni3d", "pcp_mae"])
@pytest.mark.parametrize("kind", ["consistent", "replacement"])
def test_every_tensor_gets_a_gradient(name: str, kind: str) -> None:
    model, backbone = adapted(name, geometry=kind), BACKBONES[name]
    backbone.select(model(*backbone.inputs(3, 0))).square().sum().backward()
    gradients(model)


def test_the_published_head_reads_the_shape() -> None:
    backbone, (points,) = BACKBONES["point_mae"], clouds(2, 0)
    heads = {"cls_head_finetune": "cls+max+feature"}
    for layers in (2, 0):
        config = GAPromptConfig(**{**SMALL, "modules_to_save": None, "prompt_layers": layers})
        model = get_peft_model(backbone.build(), config, heads=heads).eval()
        move(model, 0.1)
        model(points).square().sum().backward()
        assert "adapters.default.shared.0.stage_0.shape.0.weight" in {name for name, _ in model.named_parameters()}
        gradients(model)
    # Without prompts and such a head, nothing would read it.
    assert not any("shape" in name for name in get_adapter(adapted(prompt_layers=0), "default").tensors())


@torch.no_grad()
def test_learned_points_have_the_mean_colour() -> None:
    model = adapted("uni3d")
    grouped: list[Any] = []
    model.get_base_model().get_submodule("group_divider").register_forward_pre_hook(
        lambda m, args: grouped.append(args)
    )
    args = BACKBONES["uni3d"].inputs(2, 0)
    model(*args)
    points, colours = grouped[0]
    assert points.shape == colours.shape and points.shape[1] == args[0].shape[1] + 2
    mean = colours[:, :-2].mean(dim=1, keepdim=True)
    assert torch.allclose(colours[:, -2:], mean.expand(-1, 2, -1), atol=1e-6)


def test_without_a_known_grouping_the_prompts_among_the_tokens_remain() -> None:
    with pytest.raises(AnatomyError, match=r"no module is known.* set shift=False and point_prompts=0"):
        adapted("torch_pointcloud")
    model, args = adapted("torch_pointcloud", **NO_CLOUD), BACKBONES["torch_pointcloud"].inputs(2, 0)
    model(*args).square().sum().backward()
    gradients(model)
    assert not parts(model, CloudPart)


def test_the_statistics_of_its_norms_move_in_training_only() -> None:
    model, (points,) = adapted(), clouds(3, 0)
    name = "group_divider.ga_prompt.shift_net.to_points.norms.0.running_mean"
    before = get_adapter(model, "default").tensors()[name].clone()
    model(points)
    assert torch.equal(get_adapter(model, "default").tensors()[name], before)
    model.train()(points)
    assert not torch.equal(get_adapter(model, "default").tensors()[name], before)


# ---- how it is run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["inside", "block", "container"])
def test_checkpointing_gives_the_same_gradients(again: str) -> None:
    torch.manual_seed(0)
    plain, (points,) = Compact(), clouds(2, 0)
    found = []
    for base in (compact_like(plain), compact_like(plain, again=again)):
        torch.manual_seed(0)
        model = get_peft_model(base, GAPromptConfig(**SMALL)).eval()
        move(model, 0.1)
        model(points).square().sum().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-6 + 1e-5 * float(gradient.abs().max())), name


def test_reentrant_checkpointing_is_refused_with_what_to_do() -> None:
    model = get_peft_model(Compact(again="block", reentrant=True), GAPromptConfig(**SMALL))
    with pytest.raises(AdapterError, match="use_reentrant=False"):
        model(*clouds(2, 0))


def test_autocast() -> None:
    """The cloud is moved in full precision: it is grouped as without."""
    model, (points,) = adapted(), clouds(2, 0)
    grouped: list[Tensor] = []
    model.get_base_model().get_submodule("group_divider").register_forward_pre_hook(
        lambda m, args: grouped.append(args[0])
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = model(points)
    output.float().square().sum().backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    assert torch.allclose(output.float(), model(points), atol=0.3)
    assert torch.equal(grouped[0], grouped[1])


def test_with_point_peft_in_one_adapter() -> None:
    """Coordinates then carry gradients, so what both propagate by is made for each block."""
    backbone, (points,) = BACKBONES["point_mae"], clouds(3, 0)
    other = PointPEFTConfig(memory_bank=False, num_prompts=2, neighbours=5, modules_to_save=[])
    model = get_peft_model(backbone.build(), PeftConfig(tuners=[GAPromptConfig(**SMALL), other])).eval()
    move(model, 0.1)
    model(points).square().sum().backward()
    gradients(model)
    with torch.no_grad():
        alone = torch.cat([model(points[i : i + 1]) for i in range(3)])
        assert torch.allclose(alone, model(points), atol=1e-5)


def test_a_block_that_is_called_alone_says_what_it_misses() -> None:
    model = adapted()
    base: Any = model.get_base_model()
    base.pos_embed(torch.randn(2, 16, 3))
    with pytest.raises(AdapterError, match=r"'blocks.blocks.0' gets prompts with the shape.* call the model"):
        base.blocks.blocks[0](torch.randn(2, 17, 24))


# ---- where it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("torch_pointcloud_ptv3", {}, r"are packed, .*use POINT_PEFT, which does without, or POINT_GST"),
        ("padded_patches", {}, r"GA_PROMPT puts prompts ahead of the patch tokens of 'blocks.0'"),
        ("padded_patches", {"num_prompts": 0}, r"GA_PROMPT needs to know where the tokens of 'blocks.0' lie in space"),
        ("point_features", {}, r"no module is known that is given the cloud and groups it"),
    ],
)
def test_refused(name: str, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(AnatomyError, match=why):
        adapted(name, **fields)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_prompts", -1, "0 or more"),
        ("point_prompts", -1, "0 or more"),
        ("shift_centres", 1, "2 or more"),
        ("shape_width", 0, "1 or more"),
        ("shift_scale", 0.0, "more than 0"),
        ("centre_scale", -0.1, "0 or more"),
        ("adapter_dropout", 1.0, "0 or more and less than 1"),
        ("centre_ratio", 0.0, "more than 0 and at most 1"),
        ("geometry", "permutation", "'consistent' or 'replacement'"),
    ],
)
def test_fields_are_validated(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(PointPeftError, match=rf"GAPromptConfig.{field} is .*; allowed: {allowed}"):
        GAPromptConfig(**{field: value})
