"""GEM: its convolution against sparse and dense ones, its attention against loops, packed scenes of any size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft import AnatomyError, GEMConfig, PointPeftError, PointPeftModel, geometry, get_peft_model
from point_peft.tuners.gem import ContextAdapter, _scene_rows
from tests.adapting import distance, full_point_mae, rescramble
from tests.forks import Server
from tests.methods import config
from tests.test_packed import C, Dense, G, Packed, anatomy, training_on_a_scene
from tests.zoo import BACKBONES
from tests.zoo.operators import supply_spconv_on_cpu

PTV3 = {32: 2, 64: 2 + 2 + 2, 128: 2 + 2, 256: 6 + 2, 512: 2}
"""Width -> blocks of that width in the published Point Transformer V3, encoder and decoder; 46.2 M parameters."""
SONATA = {48: 3, 96: 3, 192: 3, 384: 12, 512: 3}
"""The same of Sonata, which is an encoder alone; 108.5 M parameters."""


def adapted(backbone: nn.Module, packed: bool, **changes: Any) -> PointPeftModel:
    model = get_peft_model(backbone, GEMConfig(**{"anatomy": anatomy(packed), **changes}))
    rescramble(model)
    return model.eval()


def tensors(model: PointPeftModel, block: int = 0) -> dict[str, Tensor]:
    """The adapter's tensors of a block, by their short names."""
    found = {name: p.detach() for name, p in model.adapters.named_parameters() if f"blocks/{block}." in name}
    return {name.split(f"blocks/{block}.")[1].split(".", 1)[1]: p for name, p in found.items()}


def entering(model: PointPeftModel, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that the model gives its first block, and those that it gets with the adapter."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())

    handle = model.base_model.get_submodule("blocks.0").register_forward_pre_hook(keep)
    with torch.no_grad():
        model(*inputs)
        with model.disable_adapter():
            model(*inputs)
    handle.remove()
    return seen[1], seen[0]


# ---- what is computed ------------------------------------------------------------------------------------------------


def naive_spatial(x: Tensor, points: Tensor, p: dict[str, Tensor]) -> Tensor:
    """x + the spatial adapter of one cloud that is on no grid, as it is written down."""
    down, up, kernel = p["spatial.down.weight"], p["spatial.up.weight"], p["spatial.kernel"]
    far = (points[:, None] - points).abs().amax(2)
    fourth = []
    for i in range(len(points)):
        near = (points - points[i]).norm(dim=1).argsort()[:27]
        fourth.append(far[i, near].sort().values[4])
    h = torch.stack(fourth).sort(descending=True).values[len(points) // 2]
    out = []
    for i in range(len(points)):
        near = (points - points[i]).norm(dim=1).argsort()[:27]
        cells: dict[tuple[int, ...], list[Tensor]] = {}
        for j in near:
            step = (points[j] - points[i]) / h
            if step.abs().max() <= 1.5:
                cells.setdefault(tuple(step.clamp(-1, 1).round().long().tolist()), []).append(down @ x[j])
        total = torch.zeros(len(down))
        for (a, b, c), members in cells.items():
            total = total + torch.stack(members).mean(0) @ kernel[9 * (a + 1) + 3 * (b + 1) + c + 1]
        out.append(x[i] + up @ nn.functional.gelu(total))
    return torch.stack(out)


def naive_context(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """x + the context adapter of one scene (n, c), as it is written down."""

    def attend(a: Tensor, b: Tensor, name: str) -> Tensor:
        q, k, v = (t @ p[f"context.{name}.{which}.weight"].T for t, which in ((a, "query"), (b, "key"), (b, "value")))
        mixed: Tensor = (q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v
        return mixed

    u = x @ p["context.down.weight"].T
    u = (u - u.mean(1, keepdim=True)) / (u.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    u = u * p["context.norm.weight"] + p["context.norm.bias"]
    latents = p["context.latents"] + attend(p["context.latents"], u, "look")
    return x + attend(u, latents, "read") @ p["context.up.weight"].T


def test_both_adapters_ahead_of_a_block() -> None:
    torch.manual_seed(0)
    model, points = adapted(Dense(), False), torch.rand(2, 40, 3)
    before, after = entering(model, points)
    p = tensors(model)
    for x, found, cloud in zip(before, after, points, strict=True):
        spatial = naive_spatial(x, cloud, p)
        assert distance(spatial, x) > 1e-3 and distance(naive_context(spatial, p), spatial) > 1e-3
        assert torch.allclose(found, naive_context(spatial, p), atol=1e-5)


def voxels(n: int, side: int) -> Tensor:
    """Cells (n, 3) of a grid, in no order."""
    number = torch.randperm(side**3)[:n]
    return torch.stack([number // side**2, number // side % side, number % side], dim=1)


def without_context(model: PointPeftModel) -> PointPeftModel:
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if name.endswith("context.up.weight"):
                parameter.zero_()
    return model


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_on_a_grid_it_is_a_submanifold_convolution(scale: float) -> None:
    """Against a dense convolution, and against spconv's."""
    supply_spconv_on_cpu()
    import spconv.pytorch as spconv

    torch.manual_seed(0)
    side, sizes = 8, (300, 40)
    cells = [voxels(size, side) for size in sizes]
    cell, samples = torch.cat(cells), torch.arange(2).repeat_interleave(torch.tensor(sizes))
    model = without_context(adapted(Packed(), True, layers_to_transform=[0]))
    # The packed model of the tests wants samples of one size; only what enters its first block is looked at.
    model.base_model.blocks = Once(model.base_model.get_submodule("blocks"))
    before, after = entering(model, cell * scale, samples)
    p = tensors(model)
    kernel, narrow = p["spatial.kernel"], before @ p["spatial.down.weight"].T

    def widened(summed: Tensor) -> Tensor:
        return before + nn.functional.gelu(summed) @ p["spatial.up.weight"].T

    weight = rearrange(kernel, "(x y z) i o -> o i x y z", x=3, y=3)
    grid = torch.zeros(2, narrow.shape[1], side, side, side)
    x, y, z = cell.unbind(1)
    grid[samples, :, x, y, z] = narrow
    dense = nn.functional.conv3d(grid, weight, padding=1)[samples, :, x, y, z]
    assert torch.allclose(after, widened(dense), atol=1e-5)

    conv = spconv.SubMConv3d(*kernel.shape[1:], 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(rearrange(weight, "o i x y z -> o x y z i"))
        indices = torch.cat([samples[:, None], cell], dim=1).int()
        sparse = conv(spconv.SparseConvTensor(narrow.contiguous(), indices, [side] * 3, 2)).features
    assert torch.allclose(after, widened(sparse), atol=1e-5)


class Once(nn.ModuleList):
    """The first block, which only passes its tokens on, and none after it."""

    def __init__(self, blocks: Any) -> None:
        super().__init__(blocks)
        blocks[0].mixed = lambda tokens: tokens

    def __iter__(self) -> Any:
        return itertools.islice(super().__iter__(), 1)


@pytest.mark.parametrize("packed", [False, True])
def test_where_the_cloud_lies_and_how_large_it_is_does_not_matter(packed: bool) -> None:
    torch.manual_seed(0)
    points = torch.rand(2, G, 3, dtype=torch.float64)
    model = adapted((Packed if packed else Dense)(), packed).double()
    with torch.no_grad():
        model.base_model.get_parameter("embed.weight").zero_()  # the tokens are alike, but not what is beside them
    seen = []
    for moved in (points, points * 50 + torch.tensor([900.0, -40.0, 7.0])):
        samples = torch.arange(2).repeat_interleave(G)
        seen.append(entering(model, *((moved.flatten(0, 1), samples) if packed else (moved,)))[1])
    assert torch.allclose(seen[0], seen[1], atol=1e-9)
    assert float(seen[0].std(dim=-2).max()) > 1e-3


def test_tokens_at_one_place_count_as_one_and_clouds_may_have_a_few() -> None:
    """A cloud of one point, or of copies of it alone, meets the centre of the kernel."""
    torch.manual_seed(0)
    model, points = without_context(adapted(Dense(), False)), voxels(12, 3)[None].float()
    one, copies = points[:, :1], points[:, :1].expand(-1, 5, -1)
    assert torch.allclose(entering(model, copies)[1], entering(model, one)[1].expand(-1, 5, -1), atol=1e-5)
    twice = entering(model, torch.cat([points, points], dim=1))[1]
    assert torch.allclose(twice[:, :12], entering(model, points)[1], atol=1e-5)


def test_rows_of_mingled_samples() -> None:
    """Each point once among the real ones, in rows of its own sample that are nearly as long as each other."""
    torch.manual_seed(0)
    samples = torch.tensor([0] * 5 + [2] * 23 + [3])[torch.randperm(29)]
    order, ends = geometry.gathered(samples, 29)
    assert torch.equal(samples[order], samples.sort().values) and ends.tolist() == [5, 5, 28, 29]
    index, real, sample = geometry.rows_of(ends, 29, 8)
    assert sample.tolist() == [0, 2, 2, 2, 3] and real.sum(1).tolist() == [5, 7, 8, 8, 1]
    assert index[real].tolist() == list(range(29))
    assert torch.equal(samples[order][index], sample[:, None].expand_as(index))
    assert geometry.gathered(ends, 29)[0].tolist() == list(range(29))


# ---- packed tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mingled", [False, True])
@pytest.mark.parametrize("row", [1024, 7])
def test_packed_tokens_of_equal_samples_give_what_dense_ones_give(
    mingled: bool, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("point_peft.tuners.gem.ROW", row)
    torch.manual_seed(0)
    dense, packed, points = Dense(), Packed(), torch.rand(3, G, 3)
    packed.load_state_dict(dense.state_dict())
    one, other = adapted(dense, False), adapted(packed, True)
    other.adapters.load_state_dict(one.adapters.state_dict())
    order = torch.randperm(3 * G) if mingled else torch.arange(3 * G)
    samples = torch.arange(3).repeat_interleave(G)
    expected = one(points)
    output = other(points.flatten(0, 1)[order], samples[order])
    back = rearrange(output[order.argsort()], "(b g) c -> b g c", b=3)
    assert torch.allclose(back, expected, atol=1e-5)
    weights = torch.randn_like(expected)
    torch.autograd.backward([(expected * weights).sum(), (back * weights).sum()])
    for (name, a), b in zip(other.adapters.named_parameters(), one.adapters.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and b.grad.any(), name
        assert torch.allclose(a.grad, b.grad, atol=1e-4 * float(b.grad.abs().max().clamp(min=1.0))), name


def scenes(sizes: list[int]) -> dict[str, Tensor]:
    """Voxels of scenes of these sizes, as Pointcept gives them to its models."""
    torch.manual_seed(3)
    cell = torch.cat([voxels(size, 8) for size in sizes])
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    coord = (cell + torch.rand(len(cell), 3)) / 4
    return {"coord": coord, "grid_coord": cell, "feat": torch.randn(len(cell), 6), "batch": batch}


def chosen(data: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Some of the voxels, in that order."""
    found = {name: value[index] for name, value in data.items()}
    numbers = found["batch"].unique(return_inverse=True)[1]
    return {**found, "batch": numbers, "offset": numbers.bincount().cumsum(0)}


def test_scenes_of_any_size_and_order_do_not_depend_on_their_batch_mates() -> None:
    sizes = [300, 5, 64, 1, 400]
    data = scenes(sizes)
    model = get_peft_model(BACKBONES["pointcept_ptv3"].build(), GEMConfig())
    rescramble(model)
    model.eval()
    everything = torch.arange(sum(sizes))
    with torch.no_grad():
        together = model(chosen(data, everything))
        with model.disable_adapter():
            assert distance(model(chosen(data, everything)), together) > 1e-2
        for number in range(len(sizes)):
            own = (data["batch"] == number).nonzero()[:, 0]
            assert torch.allclose(model(chosen(data, own)), together[own], atol=1e-5), sizes[number]
        mingled = torch.randperm(sum(sizes))
        assert torch.allclose(model(chosen(data, mingled)), together[mingled], atol=1e-5)


def test_beside_pointcepts_positional_encoding() -> None:
    """The convolution of the encoding reads what the block was given: x + pos(x) + what the adapters add."""
    (data,) = BACKBONES["pointcept_ptv3"].inputs(2, 0)
    model = get_peft_model(BACKBONES["pointcept_ptv3"].build(), GEMConfig(layers_to_transform=[0]))
    rescramble(model)
    seen: dict[str, list[Tensor]] = {"cpe": [], "norm1": []}
    block = model.base_model.get_submodule("enc.enc0.block0")
    block.get_submodule("cpe").register_forward_hook(lambda m, a, output: seen["cpe"].append(output.feat))
    block.get_submodule("norm1").register_forward_pre_hook(lambda m, args: seen["norm1"].append(args[0].feat))
    with torch.no_grad():
        model.eval()(data)
        with model.disable_adapter():
            model(data)
    assert torch.equal(*seen["cpe"])
    assert distance(*seen["norm1"]) > 1e-3


def test_a_scene_without_tokens_does_no_harm() -> None:
    """Offsets may have one: nothing of it is read, and no gradient is not a number."""
    torch.manual_seed(0)
    adapter, x = ContextAdapter(C, 6, 3), torch.randn(1, 20, C)
    nn.init.normal_(adapter.up.weight)
    full = adapter(x, _scene_rows(torch.tensor([8, 20]), 20))
    for ends in ([0, 8, 20], [8, 8, 20], [8, 20, 20]):
        adapter.zero_grad()
        found = adapter(x, _scene_rows(torch.tensor(ends), 20))
        assert torch.allclose(found, full, atol=1e-6)
        found.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


# ---- how it is used --------------------------------------------------------------------------------------------------


def count(c: int) -> int:
    """Parameters of a block of width c, with the default widths."""
    r, d, m = 16, 36, 8
    return 2 * c * r + 27 * r * r + 2 * c * d + 6 * d * d + m * d + 2 * d


def test_parameters() -> None:
    model = get_peft_model(full_point_mae(), GEMConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 12 * count(384) == 659_808
    model = get_peft_model(BACKBONES["pointcept_ptv3"].build(), GEMConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 3 * count(16) + 2 * count(24)
    added = {name: sum(count(c) * n for c, n in blocks.items()) for name, blocks in (("v3", PTV3), ("sonata", SONATA))}
    assert added == {"v3": 750_384, "sonata": 1_104_960}
    assert round(100 * added["v3"] / 46.2e6, 1) == 1.6 and round(100 * added["sonata"] / 108.5e6, 1) == 1.0


@pytest.mark.parametrize("name", ["point_mae", "pointcept_ptv3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    backbone = BACKBONES[name]
    model = get_peft_model(backbone.build(), GEMConfig(modules_to_save=[]))
    rescramble(model)
    args = backbone.inputs(2, 0)
    expected = backbone.select(model.eval()(*args)).detach()
    with torch.autocast("cpu", dtype=dtype):
        output = backbone.select(model(*args))
    output.float().square().mean().backward()
    assert distance(output.detach().float(), expected) < 0.1
    for parameter in model.adapters.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(packed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, points = adapted(Packed() if packed else Dense(), packed), torch.rand(2, G, 3).to(dtype)
    samples = torch.arange(2).repeat_interleave(G)
    inputs = (points.flatten(0, 1), samples) if packed else (points,)
    expected = model(inputs[0].float(), *inputs[1:]).detach()
    output = model.to(dtype)(*inputs)
    assert distance(output.detach().float(), expected) < 0.05
    output.square().mean().backward()
    for parameter in model.adapters.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_shares_of_a_large_scene_in_half_precision() -> None:
    """Each of 100,000 tokens has a share of 1e-5, which float16 holds three bits of."""
    torch.manual_seed(0)
    adapter, n = ContextAdapter(C, 8, 4), 100_000
    nn.init.normal_(adapter.up.weight)
    x, rows = torch.randn(1, n, C), _scene_rows(torch.tensor([n]), n)
    with torch.no_grad():
        expected = adapter(x, rows)
        found = adapter.half()(x.half(), rows)
    assert distance(found.float(), expected) < 0.01


class Checkpointing(nn.ModuleList):
    """Blocks that are run again in the backward pass."""

    def __iter__(self) -> Any:
        for block in super().__iter__():
            yield lambda *args, block=block: checkpoint(block, *args, use_reentrant=False)


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_gives_the_same_gradients(packed: bool) -> None:
    torch.manual_seed(0)
    model = adapted(Packed() if packed else Dense(), packed).train()
    points, samples = torch.rand(2, G, 3), torch.arange(2).repeat_interleave(G)
    inputs = (points.flatten(0, 1), samples) if packed else (points,)
    found = []
    for again in (False, True):
        if again:
            model.base_model.get_submodule("blocks").__class__ = Checkpointing
        model.zero_grad()
        model(*inputs).square().sum().backward()
        found.append([p.grad.clone() for p in model.adapters.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == len(list(model.adapters.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_stages_on_the_same_points_share_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder is back on the points of the encoder: neighbours are found twice for three stages."""
    calls = []
    knn = geometry.ragged_knn

    def counted(*args: Any) -> Tensor:
        calls.append(len(args[0]))
        return knn(*args)

    monkeypatch.setattr("point_peft.geometry.ragged_knn", counted)
    backbone = BACKBONES["pointcept_ptv3"]
    model = get_peft_model(backbone.build(), GEMConfig())
    model(*backbone.inputs(2, 0))
    assert len(calls) == 2 and calls[0] > calls[1]


def test_unknown_coordinates_are_refused_with_what_can_be_had() -> None:
    backbone = BACKBONES["padded_patches"]
    with pytest.raises(AnatomyError, match=r"GEM needs to know where the tokens of 'blocks.0' lie .*LORA, SSF and BOT"):
        get_peft_model(backbone.build(), GEMConfig(), example_inputs=backbone.example)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("spatial_width", 0, "1 or more"),
        ("context_width", 0, "1 or more"),
        ("num_latents", 1, "2 or more"),
        ("neighbours", 1, "2 or more"),
    ],
)
def test_fields_are_validated(field: str, value: float, allowed: str) -> None:
    with pytest.raises(PointPeftError, match=rf"GEMConfig.{field} is {value!r}; allowed: {allowed}"):
        config("GEM", **{field: value})


def training(file: str) -> Callable[[], None]:
    return lambda: training_on_a_scene([19_000, 800, 200], GEMConfig(), file)


def test_a_scene_of_20000_points_trains_within_a_gigabyte(server: Server, tmp_path: Path) -> None:
    """The whole process: backbone, adapter, a forward and a backward pass."""
    assert server.number(training, tmp_path / "peak") < 1.0e9  # a matrix of all distances would be 1.6e9
