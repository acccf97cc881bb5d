"""Models that look like one of a family and are not, or do something that few models do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from point_peft import (
    AnatomyError,
    BitFitConfig,
    LinearProbeConfig,
    LoraConfig,
    PointPEFTConfig,
    PointPeftModel,
    describe,
    get_peft_model,
    inject_adapter,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.backbones.layers import Group
from point_peft.running.reading import depth, unwind
from tests.zoo import BACKBONES, clouds, enliven

WIDTH = 24


class Official(PointTransformer):
    """Point-MAE with its names; subclasses go their own way from the patches to the tokens."""

    def __init__(self) -> None:
        super().__init__(
            trans_dim=WIDTH, depth=3, num_heads=4, num_group=16, group_size=8, encoder_dims=WIDTH, cls_dim=5
        )

    def forward_features(self, points: Tensor) -> Tensor:
        neighborhood, center = self.group_divider(points)
        tokens, pos = self.embedded(self.encoder(neighborhood), center)
        for block in self.blocks.blocks:
            tokens = self.advance(block, tokens, pos)
        out: Tensor = self.norm(tokens)
        return out

    def embedded(self, patches: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        return self._prepend("token", patches), self._prepend("pos", self.pos_embed(center))

    def advance(self, block: nn.Module, tokens: Tensor, pos: Tensor) -> Tensor:
        out: Tensor = block(tokens + pos)
        return out


class Sorted(Official):
    """Centres and patches are brought into another order after grouping."""

    def embedded(self, patches: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        order = center[..., 0].argsort(dim=1)[..., None]
        return super().embedded(patches.take_along_dim(order, 1), center.take_along_dim(order, 1))


class TokenLast(Official):
    """The class token comes after the patches."""

    def _prepend(self, kind: str, patches: Tensor) -> Tensor:
        return super()._prepend(kind, patches).roll(-1, dims=1)


class PositionOnce(Official):
    def embedded(self, patches: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        tokens, pos = super().embedded(patches, center)
        return tokens + pos, torch.zeros(())


class ClassTokenOnly(Official):
    """The head reads the class token alone."""

    def forward_head(self, tokens: Tensor) -> Tensor:
        return super().forward_head(tokens[:, :1].expand(-1, 2, -1))


class TokenInHead(Official):
    """The class token is read a second time."""

    def forward_head(self, tokens: Tensor) -> Tensor:
        return super().forward_head(tokens + self.get_parameter("cls_token"))


class Again(Official):
    """The first block runs twice."""

    def forward_features(self, points: Tensor) -> Tensor:
        neighborhood, center = self.group_divider(points)
        tokens, pos = self.embedded(self.encoder(neighborhood), center)
        for number in (0, 1, 2, 0):
            tokens = self.blocks.blocks[number](tokens + pos)
        out: Tensor = self.norm(tokens)
        return out


class Scaled(Official):
    """Clouds are moved and scaled to a unit ball first."""

    def forward_features(self, points: Tensor) -> Tensor:
        points = points - points.mean(1, keepdim=True)
        return super().forward_features(points / points.norm(dim=2).amax(1)[:, None, None])


def build(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    enliven(model)
    return model.eval()


def tuned(model: nn.Module, points: Tensor, **changes: Any) -> PointPeftModel:
    return get_peft_model(model, PointPEFTConfig(memory_bank=False, **changes), example_inputs=points).eval()


@pytest.mark.parametrize("kind", [Official, Sorted, PositionOnce, TokenInHead, Again, Scaled])
def test_tuned_class_tokens_act_as_if_the_backbone_had_them(kind: type[Official]) -> None:
    (points,) = clouds(3, 0)
    plain, changed = build(kind), build(kind)
    model = tuned(build(kind), points, num_prompts=0)
    adapter = get_adapter(model, "default")
    tokens = {name: tensor for name, tensor in adapter.tensors().items() if name in ("cls_token", "cls_pos")}
    assert set(tokens) == ({"cls_pos"} if kind is TokenInHead else {"cls_token", "cls_pos"})
    with torch.no_grad():
        for name, tensor in tokens.items():
            tensor.add_(torch.randn_like(tensor))
            changed.get_parameter(name).copy_(tensor)
        assert torch.allclose(model(points), changed(points), atol=1e-5)
        assert not torch.allclose(model(points), plain(points), atol=1e-2)


def test_coordinates_are_seen_in_the_order_of_the_tokens() -> None:
    (points,) = clouds(2, 0)
    for anatomy in (describe(build(Sorted)), describe(build(Sorted), points)):
        assert str(anatomy.stages[0].coordinates) == "input[0] of 'pos_embed'"


def test_tracing_does_not_mind_the_mode_that_it_is_called_in() -> None:
    (points,) = clouds(2, 0)
    model = build(FromRecord)
    expected = describe(model, Record(pos=points))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert describe(model, Record(pos=points)) == expected


def test_an_example_corrects_what_a_preset_says() -> None:
    (points,) = clouds(2, 0)
    with pytest.raises(AnatomyError, match=r"POINT_PEFT needs to know where the tokens of 'blocks.blocks.1' lie"):
        tuned(build(TokenLast), points)
    get_peft_model(build(TokenLast), LoraConfig(), example_inputs=points)
    assert describe(build(PositionOnce), points).stages[0].position == "once"
    assert describe(build(Official), points) == describe(build(Official))
    assert not describe(build(ClassTokenOnly), points).patches_read
    model = tuned(build(ClassTokenOnly), points)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.autograd.backward(model(points).square().sum())
    assert all(p.grad is not None and p.grad.any() for p in model.adapters.parameters())


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Official()
        del self.backbone.cls_head_finetune
        self.new_head = nn.Linear(WIDTH, 3)

    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = self.new_head(self.backbone.forward_features(points).amax(1))
        return logits


def test_the_head_of_a_wrapper_is_the_adapter_s() -> None:
    (points,) = clouds(2, 0)
    for options in ({}, {"example_inputs": points}):
        model = get_peft_model(build(Wrapper), LinearProbeConfig(), **options)
        assert [path for path, _ in get_adapter(model, "default").own_modules()] == ["new_head"]


@pytest.mark.parametrize("name", ["head", "classifier"])
def test_a_head_by_another_name_is_not_left_frozen(name: str) -> None:
    class Renamed(Official):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, self.cls_head_finetune)
            del self.cls_head_finetune

        def forward_head(self, tokens: Tensor) -> Tensor:
            logits: Tensor = getattr(self, name)(torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], dim=1))
            return logits

    model = get_peft_model(build(Renamed), LoraConfig())
    assert [path for path, _ in get_adapter(model, "default").own_modules()] == [name]
    model(*clouds(2, 0))


class Two(nn.Module):
    """A coarse and a fine backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = Official(), Official()

    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = self.coarse(points[:, ::2]) + self.fine(points)
        return logits


def test_of_two_backbones_none_is_left_out() -> None:
    (points,) = clouds(2, 0)
    with pytest.raises(AnatomyError, match=r"no preset describes Two: pass example_inputs"):
        get_peft_model(build(Two), LoraConfig())
    model = get_peft_model(build(Two), LoraConfig(), example_inputs=points)
    sites = {path.split(".")[0] for path, _ in get_adapter(model, "default").sites()}
    assert sites == {"coarse", "fine"}


class Pair(nn.Module):
    """One backbone for two clouds."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Official()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        logits: Tensor = self.backbone(one) - self.backbone(other)
        return logits


def test_a_backbone_that_runs_twice_in_a_forward_is_refused_where_it_would_mix_up_its_clouds() -> None:
    (one,), (other,) = clouds(2, 0), clouds(2, 1)
    model = get_peft_model(build(Pair), PointPEFTConfig(memory_bank=False))
    with pytest.raises(AnatomyError, match=r"run on a second set of points in one forward.*call the model once"):
        model(one, other)
    get_peft_model(build(Pair), LoraConfig())(one, other)


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class InDataclass(Official):
    def forward(self, points: Tensor) -> Any:
        return Output(super().forward(points))


class Record:
    """Like torch_geometric's Data: attributes, and a way to ask for all of them."""

    def __init__(self, **values: Tensor) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return self.values


class FromRecord(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = Official()
        self.group, self.embed, self.where = inner.group_divider, inner.encoder, inner.pos_embed
        self.layers, self.head = inner.blocks.blocks, nn.Linear(WIDTH, 5)

    def forward(self, data: Record) -> Tensor:
        neighborhood, center = self.group(data.values["pos"])
        tokens = self.embed(neighborhood) + self.where(center)
        for layer in self.layers:
            tokens = layer(tokens)
        logits: Tensor = self.head(tokens.amax(1))
        return logits


def test_dataclasses_and_records_are_looked_into() -> None:
    (points,) = clouds(2, 0)
    assert describe(build(InDataclass), points).heads == ("cls_head_finetune",)
    anatomy = describe(build(FromRecord), Record(pos=points))
    assert str(anatomy.stages[0].coordinates) == "input[0] of 'where'"
    get_peft_model(build(FromRecord), PointPEFTConfig(memory_bank=False, anatomy=anatomy))(Record(pos=points))


class Coloured(nn.Module):
    """Packed blocks that are given colours as well as coordinates."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, tokens: Tensor, colour: Tensor, place: Tensor, batch: Tensor) -> Tensor:
            normed = self.norm(tokens)
            mask = batch[:, None] == batch
            mixed = nn.functional.scaled_dot_product_attention(self.q(normed), self.k(normed), self.v(normed), mask)
            out: Tensor = tokens + self.mlp(mixed)
            return out

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, colour: Tensor, place: Tensor, batch: Tensor) -> Tensor:
        tokens = self.embed(torch.cat([colour, place], dim=1))
        for block in self.blocks:
            tokens = block(tokens, colour, place, batch)
        logits: Tensor = self.head(tokens)
        return logits


def test_colours_are_not_taken_for_coordinates() -> None:
    model, args = build(Coloured), (torch.rand(20, 3), torch.rand(20, 3), torch.arange(2).repeat_interleave(10))
    message = r"more than one tensor \(20, 3\) that may be the coordinates .*input\[1\], input\[2\]"
    with pytest.raises(AnatomyError, match=message):
        get_peft_model(model, PointPEFTConfig(num_prompts=0), example_inputs=args)
    get_peft_model(model, LoraConfig(), example_inputs=args)(*args)


def test_ctrl_c_inside_an_attention_leaves_no_adapted_weights_behind() -> None:
    backbone = BACKBONES["head_masks"]
    model, args = backbone.build().requires_grad_(False), backbone.inputs(2, 5)
    with torch.no_grad():
        plain = model(*args)
        inject_adapter(model, LoraConfig(), example_inputs=backbone.inputs(3, 1))
        holder: Any = model.point_peft
        for parameter in holder.parameters():
            parameter.add_(torch.randn_like(parameter))
        adapted = model(*args)
        attention = model.get_submodule("blocks.0.attention")

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = attention.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt, match="^$"):
            model(*args)
        handle.remove()
        assert depth() == 1  # which torch tells no hook of
        with holder.disable_adapter():
            assert torch.equal(model(*args), plain)
        assert torch.equal(model(*args), adapted)
    unwind(0)


def test_layers_chosen_from_the_end_get_their_prompts() -> None:
    model = get_peft_model(build(Official), PointPEFTConfig(layers_to_transform=[1, 2], memory_bank=False))
    prompts = [name for name, _ in model.adapters.named_parameters() if name.endswith("prompt.embeddings")]
    assert len(prompts) == 1 and "blocks/blocks/1" in prompts[0]


def test_a_head_that_begins_with_a_norm_is_a_head(tmp_path: Path) -> None:
    class NormedHead(Official):
        def __init__(self) -> None:
            super().__init__()
            self._modules["norm"] = nn.Identity()
            self.cls_head_finetune = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))

        def forward_head(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.cls_head_finetune(tokens.amax(1))
            return logits

    (points,) = clouds(2, 0)
    for config in (BitFitConfig(), PointPEFTConfig(memory_bank=False)):
        model = get_peft_model(build(NormedHead), config, example_inputs=points).eval()
        model.save_pretrained(tmp_path)
        again = PointPeftModel.from_pretrained(build(NormedHead), tmp_path).eval()
        assert torch.equal(again(points), model(points))


class BegunAnywhere(Official):
    """Groups in a function of its own forward and runs its blocks there; in training the order of points is random."""

    def order(self, count: int) -> Tensor:
        return torch.randperm(count)

    def forward_features(self, points: Tensor) -> Tensor:
        order = self.order(points.shape[1]) if self.training else torch.arange(points.shape[1])
        assert isinstance(self.group_divider, Group)
        neighborhood, center = Group.forward(self.group_divider, points[:, order])
        tokens, pos = self.embedded(self.encoder(neighborhood), center)
        for block in self.blocks.blocks:
            tokens = self.advance(block, tokens, pos)
        normed: Tensor = self.norm(tokens)
        return normed


class BegunByNumpy(BegunAnywhere):
    """The same by random numbers that are not torch's."""

    def order(self, count: int) -> Tensor:
        return torch.from_numpy(np.random.permutation(count))


@pytest.mark.parametrize(("kind", "times"), [(BegunAnywhere, 1), (BegunByNumpy, 2)])
def test_a_prior_is_of_the_groups_that_its_forward_has_drawn(kind: type[Official], times: int) -> None:
    """Groups that torch has drawn are drawn again for the prior; of others both passes make all from their own."""
    model = get_peft_model(
        build(kind), PointPEFTConfig(memory_bank=True, neighbourhood_width=0, prior="backbone")
    ).train()
    model.build_memory_bank([clouds(20, 1)[0]])
    patches: list[Tensor] = []
    tokens: list[Tensor] = []
    model.base_model.get_submodule("encoder.first_conv").register_forward_pre_hook(
        lambda module, args: patches.append(args[0])
    )
    after: list[Tensor] = []
    ask = model.backbone_tokens

    def noted(answer: Any, *of: Any) -> Tensor:
        tokens.append(answer(*of))
        return tokens[-1]

    for answer in (ask, lambda *_: tokens[0]):
        model.backbone_tokens = functools.partial(noted, answer)  # type: ignore[method-assign]
        torch.manual_seed(4)
        np.random.seed(len(after))  # by chance the same point may come first twice
        model(*clouds(2, 0)).sum().backward()
        after.append(torch.rand(3))
    assert len(patches) == times + 1
    assert times == 1 or not torch.equal(patches[0], patches[1])
    assert torch.equal(*after), "the second pass has changed what is drawn next"
