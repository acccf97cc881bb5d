"""Geometry on packed tokens: the same as on dense ones where both can be had, and scenes of 100,000 points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft import AnatomyError, LoraConfig, PointPEFTConfig, PointPeftModel, TunerConfig, describe, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.anatomy.description import Anatomy, Block, Stage, Tap
from tests.forks import Server
from tests.peak import peak
from tests.zoo import BACKBONES, pointcept

G, C = 24, 12


class Mixing(nn.Module):
    """An attention within samples, on dense tokens (b, g, c)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def mixed(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + nn.functional.scaled_dot_product_attention(self.q(normed), self.k(normed), self.v(normed))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class DenseBlock(Mixing):
    def forward(self, tokens: Tensor, coordinates: Tensor) -> Tensor:
        return self.mixed(tokens)


class PackedBlock(Mixing):
    def forward(self, tokens: Tensor, coordinates: Tensor, samples: Tensor) -> Tensor:
        count = int(samples.max()) + 1
        order = samples.argsort(stable=True)
        mixed = rearrange(self.mixed(rearrange(tokens[order], "(b g) c -> b g c", b=count)), "b g c -> (b g) c")
        return mixed[order.argsort()]


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, C), nn.Linear(C, 5)
        self.blocks = nn.ModuleList(DenseBlock() for _ in range(2))

    def forward(self, points: Tensor) -> Tensor:
        tokens = self.embed(points)
        for block in self.blocks:
            tokens = block(tokens, points)
        logits: Tensor = self.head(tokens)
        return logits


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, C), nn.Linear(C, 5)
        self.blocks = nn.ModuleList(PackedBlock() for _ in range(2))

    def forward(self, points: Tensor, samples: Tensor) -> Tensor:
        tokens = self.embed(points)
        for block in self.blocks:
            tokens = block(tokens, points, samples)
        logits: Tensor = self.head(tokens)
        return logits


def anatomy(packed: bool) -> Anatomy:
    """As a user would state it: the tests of tracing are elsewhere."""
    blocks = tuple(
        Block(
            path=f"blocks.{i}",
            attention=f"blocks.{i}",
            qkv=(f"blocks.{i}.q", f"blocks.{i}.k", f"blocks.{i}.v"),
            projection=None,
            norms=(f"blocks.{i}.norm1", f"blocks.{i}.norm2"),
            mlp=f"blocks.{i}.mlp",
            linears=(f"blocks.{i}.mlp.0", f"blocks.{i}.mlp.2"),
            mlp_norm=f"blocks.{i}.norm2",
        )
        for i in range(2)
    )
    seen: dict[str, Any] = {"coordinates": Tap(module="blocks.0", side="input", steps=(1,))}
    if packed:
        seen |= {"samples": Tap(module="blocks.0", side="input", steps=(2,)), "layout": "packed"}
    return Anatomy(source="the test", stages=(Stage(blocks=blocks, width=C, prefix_tokens=0, **seen),), heads=("head",))


def config(packed: bool, **changes: Any) -> PointPEFTConfig:
    return PointPEFTConfig(
        **{"num_prompts": 0, "adapted_share": 0.5, "anatomy": anatomy(packed), "init": "published", **changes}
    )


def test_tracing_finds_what_is_stated_here() -> None:
    """The blocks have their query, key and value layers themselves."""
    torch.manual_seed(0)
    points, samples = torch.rand(2, G, 3), torch.arange(2).repeat_interleave(G)
    dense, packed = describe(Dense(), points), describe(Packed(), points.flatten(0, 1), samples)
    for found, stated in ((dense, anatomy(False)), (packed, anatomy(True))):
        (stage,), (wanted,) = found.stages, stated.stages
        assert (stage.blocks, stage.layout, stage.samples) == (wanted.blocks, wanted.layout, wanted.samples)
        assert found.heads == stated.heads


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mingled", [False, True], ids=["in order", "mingled"])
def test_packed_tokens_of_equal_samples_give_what_dense_ones_give(mingled: bool, train: bool) -> None:
    torch.manual_seed(0)
    dense, packed, points = Dense(), Packed(), torch.rand(3, G, 3)
    packed.load_state_dict(dense.state_dict())
    # All centres reach every token: as many neighbours as there are centres.
    changes: dict[str, Any] = {"neighbours": G // 2, "local_attention_drop_path": 0.0, "adapter_dropout": 0.0}
    one, other = (get_peft_model(m, config(p, **changes)) for m, p in ((dense, False), (packed, True)))
    for (name, a), b in zip(other.adapters.named_parameters(), one.adapters.parameters(), strict=True):
        with torch.no_grad():
            b.copy_(torch.randn_like(b) * 0.3)
            a.copy_(b)
        assert a.shape == b.shape, name
    order = torch.arange(3 * G)
    if mingled:  # farthest point sampling begins at a sample's first point, which stays the first
        order = rearrange(order, "(b g) -> (g b)", g=G)
    samples = torch.arange(3).repeat_interleave(G)[order]
    one.train(train), other.train(train)
    expected = rearrange(one(points), "b g c -> (b g) c")[order]
    output = other(rearrange(points, "b g xyz -> (b g) xyz")[order], samples)
    assert torch.allclose(output, expected, atol=1e-5)
    for model in (one, other):
        model.zero_grad()
    weights = torch.randn_like(output)
    torch.autograd.backward([(expected * weights).sum(), (output * weights).sum()])
    for (name, a), b in zip(other.adapters.named_parameters(), one.adapters.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        assert torch.allclose(a.grad, b.grad, atol=1e-4 * float(b.grad.abs().max().clamp(min=1.0))), name


def test_the_chunks_of_a_large_scene_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Packed(), config(True))
    points, samples = torch.rand(60, 3), torch.arange(3).repeat_interleave(20)
    found = []
    for limit in (2**24, 100):
        monkeypatch.setattr("point_peft.tuners.point_peft.local_attention.CHUNK_ELEMENTS", limit)
        torch.manual_seed(1)
        model.zero_grad()
        output = model.train()(points, samples)
        torch.autograd.backward(output.square().sum())
        found.append([output, *(p.grad for p in get_adapter(model, "default").parameters())])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        assert torch.allclose(a, b, atol=1e-5 * float(b.detach().abs().max().clamp(min=1.0)))


def test_prompts_in_packed_tokens_are_refused_with_what_can_be_had() -> None:
    backbone = BACKBONES["pointcept_ptv3"]
    message = (
        r"POINT_PEFT puts prompts among the tokens of 'enc\.enc\d\.block\d', which has no place .*num_prompts out.*LORA"
    )
    for stated in (PointPEFTConfig(num_prompts=10), PointPEFTConfig.published()):
        with pytest.raises(AnatomyError, match=message):
            get_peft_model(backbone.build(), stated)
    get_peft_model(backbone.build(), LoraConfig())


def test_without_a_word_on_prompts_packed_tokens_get_none_and_the_report_says_so(tmp_path: Path) -> None:
    """What is made and saved is that of no prompts; a file of before there was a choice means the ten of then."""
    backbone = BACKBONES["pointcept_ptv3"]
    torch.manual_seed(0)
    model = get_peft_model(backbone.build(), PointPEFTConfig(memory_bank=True)).eval()
    said = "POINT_PEFT has no prompts in 5 of its 5 blocks, which have no place for them ('enc.enc0.block0' …)"
    assert said in model.trainable_parameters_report()
    torch.manual_seed(0)
    without = get_peft_model(backbone.build(), PointPEFTConfig(num_prompts=0, memory_bank=True))
    assert "no prompts" not in without.trainable_parameters_report()
    named = [get_adapter(one, "default").tensors() for one in (model, without)]
    assert named[0].keys() == named[1].keys() and not any("prompt" in name for name in named[0])
    (data,) = backbone.inputs(2, 0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        output = model(data)
        assert not torch.allclose(output, backbone.build()(data), atol=1e-2)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    assert torch.equal(again(data), output) and said in again.trainable_parameters_report()
    before = TunerConfig.from_json({"method": "POINT_PEFT"})
    assert isinstance(before, PointPEFTConfig) and before.num_prompts == 10


def test_a_block_without_an_mlp_is_refused_with_what_can_be_had() -> None:
    backbone = BACKBONES["official_ptv1"]
    with pytest.raises(AnatomyError, match=r"MLP of every block, and 'enc1\.1' has none .*adapter_scale=0\.0"):
        get_peft_model(backbone.build(), PointPEFTConfig())


@pytest.mark.parametrize("gone", ["batch", "offset"])
def test_samples_are_told_by_numbers_or_by_ends(gone: str) -> None:
    backbone = BACKBONES["pointcept_ptv3"]
    (data,) = backbone.inputs(3, 0)
    model = get_peft_model(backbone.build(), PointPEFTConfig()).eval()
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = model(data)
        block = model.base_model.get_submodule("enc.enc0.block0")
        seen: list[Any] = []

        def drop(module: nn.Module, args: Any) -> Any:
            point = args[0]
            seen.append(point.pop(gone))
            return None

        def give_back(module: nn.Module, args: Any, output: Any) -> None:
            output[gone] = seen[-1]

        block.register_forward_pre_hook(drop, prepend=True)
        block.register_forward_hook(give_back)
        assert torch.allclose(model(data), expected, atol=1e-5) and len(seen) == 1


def training_on_a_scene(sizes: Sequence[int], config: TunerConfig, file: str) -> None:
    """A forward and a backward pass on samples of these sizes; the bytes that the process holds, into a file."""
    pointcept.GRID, pointcept.PATCH = 512, 64  # type: ignore[attr-defined]
    count = sum(sizes)
    coord = torch.rand(count, 3) * torch.tensor([8.0, 6.0, 3.0])
    coord[torch.arange(count), torch.randint(3, (count,))] = 0.0  # floor and walls
    data = {
        "coord": coord,
        "grid_coord": (coord / 0.02).long(),
        "feat": torch.randn(count, 6),
        "batch": torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        "offset": torch.tensor(sizes).cumsum(0),
    }
    model = get_peft_model(pointcept.PointTransformerV3(), config).train()
    output = model(data)
    assert output.shape == (count, 5)
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.adapters.parameters())
    Path(file).write_text(str(peak() * 1024), "utf-8")


def training(file: str) -> Callable[[], None]:
    config = PointPEFTConfig(num_prompts=0, layers_to_transform=[1])
    return lambda: training_on_a_scene([95_000, 4_000, 1_000], config, file)


def test_a_scene_of_100000_points_trains_within_2_gigabytes(server: Server, tmp_path: Path) -> None:
    """The whole process: backbone, adapter, a forward and a backward pass."""
    assert server.number(training, tmp_path / "peak") < 2 * 2**30
