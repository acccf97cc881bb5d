"""PointGST: parity with the recorded numbers of the official code, its equations, what the bases are a function of."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import AnatomyError, PointGSTConfig, PointPeftError, PointPeftModel, geometry, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.running.forward import Seen
from point_peft.tuners import point_gst as graph
from point_peft.tuners.point_gst import SpectralPart
from tests import golden
from tests.adapting import full_point_mae, move
from tests.test_golden_base import Recorder, compare, grouping
from tests.zoo import BACKBONES, Compact, clouds, compact_like

# ---- parity ----------------------------------------------------------------------------------------------------------

# What is recorded of the bases and the order that they are made in, compared in a test of its own.
BASES = {
    "U", "sub_U", "variant_delta_per_matrix.sub_U", "z_order", "z_order_inverse", "fps_idx", "knn_idx", "delta",
    "local_delta_per_sample",
}  # fmt: skip
# Official names of an adapter's layers -> ours.
LAYERS = {"norm_ly1": "norms.0", "norm_ly2": "norms.1", "down": "down", "up": "up", "adapt1": "mix"}


def our_name(official: str) -> str:
    found = re.fullmatch(r"(blocks\.blocks\.\d+)\.gft_adapter\.(\w+)\.(weight|bias)", official)
    return official if found is None else f"{found[1]}.point_gst.adapter.{LAYERS[found[2]]}.{found[3]}"


def published(transform: str) -> tuple[PointPeftModel, PointTransformer, dict[str, Any], dict[str, Tensor]]:
    """The adapted model of the golden file, in eval mode, the description and what was recorded."""
    description, expected = golden.load("point_gst")
    config, weights = description["config"], golden.weights(description)
    names = ("trans_dim", "depth", "num_heads", "num_group", "group_size", "encoder_dims", "cls_dim")
    base = PointTransformer(**{name: config[name] for name in names})
    base.load_state_dict({name: weights[name] for name in base.state_dict()})
    how: Any = {"rank": config["rank"], "local_size": config["local"], "transform": transform}
    model = get_peft_model(base, PointGSTConfig(**how)).eval()
    ours = {our_name(name): value for name, value in weights.items()}
    tensors = get_adapter(model, "default").tensors()
    assert ours.keys() == {*base.state_dict(), *tensors}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(ours[name])
    return model, base, description, expected


def inject(monkeypatch: pytest.MonkeyPatch, whole: Tensor, local: Tensor) -> None:
    """Let the bases be those that were recorded: their signs are arbitrary, and the output depends on them."""
    recorded = {whole.shape[1]: whole, local.shape[2]: local.flatten(0, 1)}
    monkeypatch.setattr(graph, "fourier_basis", lambda points, *given, pick: recorded[points.shape[1]].to(points))


@torch.no_grad()
def run(model: PointPeftModel, base: PointTransformer, points: Tensor) -> dict[str, Tensor]:
    recorder = Recorder()
    recorder.backbone(base)
    recorder.input(base.cls_head_finetune, "head_in")
    blocks: Any = base.blocks.blocks
    parts = [part for _, part in get_adapter(model, "default").all_parts() if isinstance(part, SpectralPart)]
    for number, part in enumerate(parts):
        recorder.output(part.adapter, f"adapter_out.{number}")
        # What a block works on: the tuned prefix comes in between its call and its first norm.
        recorder.input(blocks[number].norm1, f"block_in.{number}")
    return {"logits": model(points), "input.points": points, **recorder.tensors}


@pytest.mark.parametrize(
    ("transform", "prefix", "own_bases"),
    [
        ("published", "", False),
        ("fourier", "variant_transposed.", False),
        ("published", "variant_delta_per_matrix.", True),
    ],
)
def test_with_the_recorded_bases_it_reproduces_every_recorded_tensor(
    monkeypatch: pytest.MonkeyPatch, transform: str, prefix: str, own_bases: bool
) -> None:
    model, base, description, expected = published(transform)
    local = f"{prefix}sub_U" if own_bases else "sub_U"
    if local not in expected:
        pytest.skip(f"{local} is not recorded")
    inject(monkeypatch, expected["U"], expected[local])
    found = run(model, base, golden.points(description))
    wanted = {n.removeprefix(prefix): t for n, t in expected.items() if n.startswith(prefix) and n not in BASES}
    if not prefix:
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("variant_")}
    compare(found, wanted)


def test_the_bases_are_the_recorded_ones_but_for_signs() -> None:
    description, expected = golden.load("point_gst")
    config, points = description["config"], golden.points(description)
    centres = geometry.gather(points, grouping(points, config)["fps_idx"])
    order = graph.z_order(centres)
    compare(
        {**grouping(points, config), "z_order": order, "z_order_inverse": order.argsort(dim=1)},
        {name: expected[name] for name in ("fps_idx", "knn_idx", "z_order", "z_order_inverse") if name in expected},
    )
    whole, local = bases(centres, config["local"])
    found = {"U": whole, "sub_U": local.reshape(len(centres), -1, *local.shape[1:])}
    for name, ours in found.items():
        # The recorded are made in float32, which turns eigenvectors of near eigenvalues into each other a little.
        cosines = (ours * expected[name]).sum(dim=-2).abs()
        assert float(cosines.min()) > 1 - 1e-3, name
    b = len(centres)
    sorted_centres = geometry.gather(centres, order).reshape(-1, config["local"], 3)
    for name, inside in (("delta", centres), ("local_delta_per_sample", sorted_centres)):
        if name not in expected:
            continue
        real, sample = torch.ones(inside.shape[:2], dtype=torch.bool), torch.arange(len(inside)) // (len(inside) // b)
        found_here = graph.smallest_distance(graph.distances(inside, real), sample, b)
        golden.assert_close(found_here.reshape(b, -1)[:, 0], expected[name])


@torch.no_grad()
def test_a_changed_weight_moves_the_output_as_it_moves_the_official_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base, description, expected = published("published")
    inject(monkeypatch, expected["U"][:1], expected["sub_U"][:1])
    points = golden.points(description)[:1]
    tensors = {**base.state_dict(), **get_adapter(model, "default").tensors()}
    for name, change in description.get("weakest_effect_on_output_when_weight_becomes_1.1w+0.05", []):
        weight = tensors[our_name(name)]
        before = weight.clone()
        weight.mul_(1.1).add_(0.05)
        found = float((model(points) - expected["logits"][:1]).abs().max())
        weight.copy_(before)
        assert found == pytest.approx(change, rel=0.05, abs=5e-6), name


# ---- the bases -------------------------------------------------------------------------------------------------------


class Told:
    """Answers that `graphs_of` asks of a forward."""

    def __init__(self, points: Tensor, samples: Tensor | None = None) -> None:
        self.seen = Seen(coordinates={0: points}, samples={} if samples is None else {0: samples})

    def once(self, key: Any, make: Any) -> Any:
        return make()


def graphs(points: Tensor, size: int, samples: Tensor | None = None) -> tuple[graph.Graphs, graph.Graphs]:
    told: Any = Told(points, samples)
    return graph.graphs_of(told, 0, size)


def bases(points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    whole, local = graphs(points, size)
    return whole.vectors, local.vectors


def places(b: int, g: int, seed: int = 0) -> Tensor:
    return torch.rand(b, g, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def grid() -> Tensor:
    """A cube of points, of whose eigenvalues many are repeated."""
    axis = torch.arange(4.0) - 1.5
    return torch.cartesian_prod(axis, axis, axis)[None]


def doubled() -> Tensor:
    half = places(2, 12)
    return torch.cat([half, half], dim=1)


def laplacian_in_loops(points: Tensor) -> Tensor:
    """For one sample whose points all differ."""
    g, x = len(points), points.double()
    delta = min(float((x[i] - x[j]).norm()) for i in range(g) for j in range(i))
    weight = torch.tensor(
        [[1.0 if i == j else delta / float((x[i] - x[j]).norm()) for j in range(g)] for i in range(g)]
    )
    degree = weight.sum(dim=1)
    return torch.eye(g) - weight / (degree[:, None] * degree).sqrt()


def test_the_bases_are_eigenvectors_by_ascending_eigenvalue() -> None:
    points = places(2, 13)
    whole, local = graphs(points, 32)
    for i in range(2):
        expected = laplacian_in_loops(points[i])
        values = whole.vectors[i].T @ expected @ whole.vectors[i]
        assert torch.allclose(values, values.diagonal().diag_embed(), atol=1e-5)
        assert bool((values.diagonal().diff() > -1e-5).all())
    assert torch.allclose(whole.vectors.mT @ whole.vectors, torch.eye(13).expand(2, 13, 13), atol=1e-6)
    # With no more tokens than a group holds, both are the same graph, in the order of the curve.
    tokens = torch.rand(26, 1)
    one, other = ((scale.vectors[:, :, :5].mT @ scale.split(tokens)).square() for scale in (whole, local))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("make", [grid, doubled, lambda: torch.zeros(1, 24, 3), lambda: places(2, 24)])
def test_the_bases_do_not_depend_on_what_the_library_returns(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """Other signs, and other bases of repeated eigenvalues, give the same."""
    points, eigh = make(), torch.linalg.eigh
    expected = bases(points, 8)

    def other(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        near = (values[:, :, None] - values[:, None]).abs() < 1e-6
        noise = torch.randn(matrix.shape, dtype=matrix.dtype, generator=torch.Generator().manual_seed(1))
        return values, vectors @ torch.linalg.qr(noise * near)[0]

    monkeypatch.setattr(torch.linalg, "eigh", other)
    for ours, wanted in zip(bases(points, 8), expected, strict=True):
        assert bool(ours.isfinite().all()) and torch.allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("make", [grid, lambda: places(4, 64)])
def test_the_bases_move_little_where_points_do(make: Any) -> None:
    points = make()
    moved = points + 1e-7 * torch.randn(points.shape, generator=torch.Generator().manual_seed(2))
    for ours, wanted in zip(bases(moved, 16), bases(points, 16), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-3)


def test_the_basis_of_all_tokens_goes_with_them() -> None:
    """Neither their order nor where the cloud lies changes the eigenvectors, signs included."""
    points, order = places(1, 24), torch.randperm(24, generator=torch.Generator().manual_seed(3))
    expected = bases(points, 8)[0]
    assert torch.allclose(bases(points[:, order], 8)[0], expected[:, order], atol=1e-5)
    assert torch.allclose(bases(2 * points + 0.25, 8)[0], expected, atol=1e-4)


@pytest.mark.parametrize(("g", "size", "sizes"), [(40, 32, [20, 20]), (7, 3, [2, 2, 3]), (5, 32, [5]), (1, 2, [1])])
def test_groups_are_of_nearly_equal_size_and_hold_every_token_once(g: int, size: int, sizes: list[int]) -> None:
    points, tokens = places(3, g), torch.rand(3 * g, 4)
    for scale, wanted in zip(graphs(points, size), ([g], sizes), strict=True):
        held = (scale.rows < 3 * g).sum(dim=1).reshape(3, -1)
        assert [sorted(counts) for counts in held.tolist()] == [wanted] * 3
        assert torch.equal(scale.join(scale.split(tokens)), tokens)
        spectrum = scale.vectors.mT @ scale.split(tokens)
        assert torch.allclose(scale.join(scale.vectors @ spectrum), tokens, atol=1e-5)
    alone = [graphs(points[i : i + 1], size) for i in range(3)]
    for number, scale in enumerate(graphs(points, size)):
        assert torch.allclose(torch.cat([one[number].vectors for one in alone]), scale.vectors, atol=1e-6)


def test_packed_samples_have_two_scales_of_groups_and_do_not_meet() -> None:
    counts, points = [40, 5, 23], places(1, 68)[0]
    samples = torch.repeat_interleave(torch.tensor(counts))
    mixed = torch.randperm(68, generator=torch.Generator().manual_seed(4))
    tokens = torch.rand(68, 2)
    plain, ends = torch.arange(68), torch.tensor([40, 45, 68])
    for of, rows in ((samples, plain), (ends, plain), (samples[mixed], mixed)):
        for scale, size in zip(graphs(points[rows], 16, of), (8, 16), strict=True):
            assert scale.rows.shape[1] == size
            assert torch.equal(scale.join(scale.split(tokens[rows])), tokens[rows])
            whose = torch.cat([samples[rows], torch.tensor([-1])])[scale.rows]
            assert all(len(set(graph.tolist()) - {-1}) == 1 for graph in whose)
    first = graphs(points[:40], 16, torch.tensor([40]))
    for one, scale in zip(first, graphs(points, 16, samples), strict=True):
        assert torch.allclose(one.vectors, scale.vectors[: len(one.vectors)], atol=1e-6)


@pytest.mark.parametrize("make", [grid, doubled, lambda: torch.zeros(1, 24, 3), lambda: places(4, 24)])
def test_bases_of_many_graphs_are_fixed_by_the_same_rule(make: Any) -> None:
    points = make().double()
    b, g, _ = points.shape
    real, sample = torch.arange(g).expand(b, g) < g - 2, torch.arange(b)
    points = points.masked_fill(~real[..., None], 0.0)
    every, picked = (graph.fourier_basis(points, real, sample, b, pick=pick) for pick in (False, True))
    assert torch.allclose(every, picked, atol=1e-9)


# ---- the method ------------------------------------------------------------------------------------------------------


def adapted(name: str = "point_mae", **fields: Any) -> PointPeftModel:
    """A tiny backbone with random values in all tensors of the adapter."""
    backbone = BACKBONES[name]
    config = PointGSTConfig(**{"modules_to_save": [], "rank": 5, "local_size": 6, **fields})
    model = get_peft_model(backbone.build(), config, example_inputs=backbone.example).eval()
    move(model)
    return model


def test_parameters_on_point_mae() -> None:
    """As METHODS.md counts them: the adapters and the prefix."""
    model = get_peft_model(full_point_mae(), PointGSTConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 354_528 + 768 == 355_296


@pytest.mark.parametrize("transform", ["fourier", "published"])
@torch.no_grad()
def test_equation(transform: str) -> None:
    model, (points,) = adapted(transform=transform, tuned_tokens=[]), clouds(2, 0)
    base: Any = model.get_base_model()
    block, tensors = base.blocks.blocks[0], get_adapter(model, "default").tensors()
    given: list[Tensor] = []
    found: list[Tensor] = []
    block.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    block.register_forward_hook(lambda module, args, output: found.append(output))
    model(points)
    weights = {name.removeprefix("blocks.blocks.0.point_gst.adapter."): t for name, t in tensors.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def adapt(u: Tensor, h: Tensor, name: str) -> Tensor:
        u = u.T if transform == "published" else u
        z = u.T @ h
        normed = nn.functional.layer_norm(z, (5,), weights[f"{name}.weight"], weights[f"{name}.bias"])
        return u @ (z + nn.functional.silu(linear(normed, "mix")))

    _, centres = base.group_divider(points)
    whole, local = bases(centres, 6)
    with model.disable_adapter():
        x = given[0] + block.attn(block.norm1(given[0]))
        plain = x + block.mlp(block.norm2(x))
    for i in range(2):
        h = linear(x[i], "down")
        narrow, own = nn.functional.silu(h), h[1:]
        narrow[1:] += adapt(whole[i], own, "norms.0")
        # 16 tokens in groups of at most 6: three, of 5, 5 and 6.
        order, start = graph.z_order(centres)[i], 0
        for number, size in enumerate((5, 5, 6)):
            rows = order[start : start + size]
            basis = local[3 * i + number][:size, :size]
            narrow[1 + rows] += adapt(basis, own[rows], "norms.1")
            start += size
        assert torch.allclose(found[0][i], plain[i] + linear(narrow, "up"), atol=1e-4)


@pytest.mark.parametrize("name", ["point_mae", "pointgpt", "torch_pointcloud_ptv3"])
def test_a_fresh_adapter_is_the_backbone(name: str) -> None:
    backbone = BACKBONES[name]
    model = get_peft_model(backbone.build(), PointGSTConfig(modules_to_save=[])).eval()
    args = backbone.inputs(2, 0)
    with torch.no_grad():
        found = backbone.select(model(*args))
        with model.disable_adapter():
            assert torch.allclose(found, backbone.select(model(*args)), atol=1e-6)


@torch.no_grad()
def test_a_cloud_of_few_places_gives_numbers() -> None:
    """Fewer places than groups: centres are repeated. Of one place only, all are."""
    model, (points,) = adapted(), clouds(3, 0)
    points[0] = points[0, :5].repeat(-(-points.shape[1] // 5), 1)[: points.shape[1]]
    points[1] = points[1, 0]
    together = model(points)
    assert bool(together.isfinite().all())
    alone = torch.cat([model(points[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_bases_are_made_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, make = adapted(), [], graph.fourier_basis

    def count(*args: Any, **kwargs: Any) -> Tensor:
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(graph, "fourier_basis", count)
    model(*clouds(2, 0))
    assert len(made) == 2
    # Two stages of an encoder; that of the decoder has the tokens of the first.
    made.clear()
    scenes = adapted("pointcept_ptv3")
    scenes(*BACKBONES["pointcept_ptv3"].inputs(2, 0))
    assert len(made) == 4 and len({part.number for part in scenes.modules() if isinstance(part, SpectralPart)}) == 3


@pytest.mark.parametrize("again", ["inside", "block", "container"])
def test_checkpointing_gives_the_same_gradients(again: str) -> None:
    torch.manual_seed(0)
    plain, (points,) = Compact(), clouds(2, 0)
    found = []
    for base in (compact_like(plain), compact_like(plain, again=again)):
        torch.manual_seed(0)
        model = get_peft_model(base, PointGSTConfig(rank=5, local_size=6, modules_to_save=[])).eval()
        move(model)
        model(points).square().sum().backward()
        found.append({name: p.grad for name, p in model.adapters.named_parameters() if p.grad is not None})
    assert len(found[0]) == len(list(model.adapters.parameters()))
    for name, gradient in found[0].items():
        assert bool(gradient.any())
        assert torch.allclose(found[1][name], gradient, atol=1e-6), name


def test_autocast() -> None:
    model, (points,) = adapted(), clouds(2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(points)
    output.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.adapters.parameters())
    assert torch.allclose(output.float(), model(points), atol=0.2)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("padded_patches", r"POINT_GST needs to know where the tokens of 'blocks.0' lie in space"),
        ("official_ptv1", r"POINT_GST reads the tokens of 'enc1.1' between its attention and its MLP"),
    ],
)
def test_refused(name: str, why: str) -> None:
    with pytest.raises(AnatomyError, match=why):
        adapted(name)


def test_fields_are_validated() -> None:
    with pytest.raises(PointPeftError, match=r"PointGSTConfig.rank is 0; allowed: 1 or more"):
        PointGSTConfig(rank=0)
    with pytest.raises(PointPeftError, match=r"PointGSTConfig.local_size is 1; allowed: 2 or more"):
        PointGSTConfig(local_size=1)
    wrong: Any = {"transform": "fast"}
    with pytest.raises(PointPeftError, match=r"transform is 'fast'; allowed: 'fourier' or 'published'"):
        PointGSTConfig(**wrong)
