"""Pre-train a small Point-MAE on procedural categories: the backbone that the package embeds.

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
    python -m tools.pretrain                     # both stages
    python -m tools.pretrain --start FILE        # the second, from a file that the first has left

(The two variables keep glibc from handing memory back after every step: a step takes two thirds of the time.) The file
is the same for the same seed, thread count and machine. Nothing of the clouds of `tools.shapes` was ever measured.

In the first stage 60 % of the groups are hidden, and a shallow decoder predicts the points of the hidden ones (Chamfer
distance, L2), as in Y. Pang et al.: "Masked Autoencoders for Point Cloud Self-supervised Learning", ECCV 2022,
https://arxiv.org/abs/2203.06604. Features of that alone are little use to a linear probe. In the second stage every
cloud is to be recognised as an instance of its category, one of thousands, though it is moved, stretched, cut, thinned
and made noisy: from the feature that heads read, [class token; maximum of the patch tokens]. And of the clouds of a
batch the one of the same category is to be nearest. In every second step groups are hidden as before, and the category
is told from the others. Most steps see few groups, the last ones many: those cost twice as much.

The file holds the encoder under the official names in float16, with its class token and without a head.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from point_peft import geometry
from point_peft.backbones import PointTransformer, load_checkpoint
from point_peft.backbones.layers import Encoder, TransformerEncoder
from tools.shapes import Points, Program, sample

CONFIG: dict[str, Any] = {
    "trans_dim": 144,
    "depth": 6,
    "num_heads": 6,
    "num_group": 32,
    "group_size": 16,
    "encoder_dims": 144,
    "drop_path_rate": 0.1,
}
POINTS = 1024
FEW_GROUPS, MANY_GROUPS = (32,), (48, 64)  # one of them at every step, so that the backbone serves any of them
MANY_FROM = 0.8  # share of the steps after which there are many
WEAKEST, STRONGEST, STRONGEST_FROM = 0.2, 0.8, 0.6  # augmentation, and the share of steps after which it is strongest
CHAMFER_WEIGHT = 20.0
TEMPERATURE = 0.1


class Pretraining(nn.Module):
    """A backbone, and what is thrown away afterwards: a decoder, a projector and one direction for each category."""

    def __init__(self, backbone: PointTransformer, categories: int, *, depth: int = 2, mask_ratio: float = 0.6) -> None:
        super().__init__()
        width, heads = backbone.trans_dim, 6 if backbone.trans_dim % 6 == 0 else 1
        self.backbone = backbone
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.decoder_pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.decoder = TransformerEncoder(width, depth, heads, 0.0)
        self.decoder_norm = nn.LayerNorm(width)
        self.increase_dim = nn.Linear(width, 3 * backbone.group_divider.group_size)
        nn.init.normal_(self.mask_token, std=0.02)
        self.projector = nn.Sequential(
            nn.Linear(2 * width, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 128)
        )
        self.directions = nn.Parameter(torch.randn(categories, 128) / 128**0.5)

    def forward(self, points: Tensor, *, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Likeness (b, b) of clouds (b, n, 3), logits (b, categories), Chamfer distance: zero unless `masked`."""
        neighborhood, center = self.backbone.group_divider(points)
        b, g = center.shape[:2]
        patches = self.backbone.reduce_dim(embed(self.backbone.encoder, neighborhood))
        shown = g - int(self.mask_ratio * g) if masked else g
        order = torch.rand(b, g).argsort(dim=1) if masked else repeat(torch.arange(g), "g -> b g", b=b)
        center = geometry.gather(center, order)
        tokens = self.encode(geometry.gather(patches, order[:, :shown]), center[:, :shown])
        feature = torch.cat([tokens[:, 0], reduce(tokens[:, 1:], "b g c -> b c", "max")], dim=1)
        projected = nn.functional.normalize(self.projector(feature), dim=1)
        alike = projected @ projected.T / TEMPERATURE
        logits = projected @ nn.functional.normalize(self.directions, dim=1).T / TEMPERATURE
        if not masked:
            return alike, logits, logits.new_zeros(())
        hidden = geometry.gather(neighborhood.flatten(2), order[:, shown:])
        return (
            alike,
            logits,
            chamfer(self.decode(tokens[:, 1:], center), rearrange(hidden, "b m (k d) -> (b m) k d", d=3)),
        )

    def encode(self, patches: Tensor, center: Tensor) -> Tensor:
        """Tokens (b, 1 + v, c), the class token first, of patch tokens (b, v, c) at `center` (b, v, 3)."""
        backbone, b = self.backbone, len(patches)
        tokens = torch.cat([backbone.get_parameter("cls_token").expand(b, -1, -1), patches], dim=1)
        pos = torch.cat([backbone.get_parameter("cls_pos").expand(b, -1, -1), backbone.pos_embed(center)], dim=1)
        normed: Tensor = backbone.norm(backbone.blocks(tokens, pos, (backbone.depth - 1,))[0])
        return normed

    def decode(self, tokens: Tensor, center: Tensor) -> Tensor:
        """Points (b m, k, 3) of the groups at the last m of `center` (b, v + m, 3), of v visible `tokens` (b, v, c)."""
        b, shown = tokens.shape[:2]
        tokens = torch.cat([tokens, repeat(self.mask_token, "c -> b m c", b=b, m=center.shape[1] - shown)], dim=1)
        tokens = self.decoder(tokens, self.decoder_pos_embed(center), (len(self.decoder.blocks) - 1,))[0]
        predicted: Tensor = self.increase_dim(self.decoder_norm(tokens[:, shown:]))
        return rearrange(predicted, "b m (k d) -> (b m) k d", d=3)


def embed(encoder: Encoder, neighborhood: Tensor) -> Tensor:
    """Tokens (b, g, c) of neighbourhoods (b, g, k, 3) as `encoder` makes them, in half of its time while training.

    One row a point instead of one column: a CPU multiplies such matrices faster than it convolves.
    """
    b, _, k, _ = neighborhood.shape
    points = rearrange(neighborhood, "b g k c -> (b g k) c")
    one, norm, relu, two = encoder.first_conv
    first, norm_two, relu_two, last = encoder.second_conv
    assert isinstance(first, nn.Conv1d)
    local = linear(two, relu(norm(linear(one, points))))
    of_whole, of_local = torch.chunk(rearrange(first.weight, "o i 1 -> o i"), 2, dim=1)
    whole = nn.functional.linear(reduce(local, "(bg k) c -> bg c", "max", k=k), of_whole, first.bias)
    both = rearrange(local @ of_local.T, "(bg k) c -> bg k c", k=k) + whole[:, None]
    tokens = linear(last, relu_two(norm_two(rearrange(both, "bg k c -> (bg k) c"))))
    return reduce(tokens, "(b g k) c -> b g c", "max", b=b, k=k)


def linear(conv: nn.Module, rows: Tensor) -> Tensor:
    """A convolution of width one on rows (m, c)."""
    assert isinstance(conv, nn.Conv1d)
    return nn.functional.linear(rows, rearrange(conv.weight, "o i 1 -> o i"), conv.bias)


def chamfer(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over the groups of the two-way squared distance to the nearest point; both are (m, k, 3)."""
    distance = geometry.squared_distance(predicted, target)
    return distance.amin(dim=2).mean() + distance.amin(dim=1).mean()


# --- clouds ---


def instance(index: int, categories: int, seed: int, n: int) -> Points:
    """The cloud (n, 3) of number `index`, in float16: instance index // categories of category index % categories."""
    number, category = divmod(index, categories)
    return sample(Program(category, number, seed), n).astype(np.float16)


def make_clouds(categories: int, instances: int, seed: int, n: int = 1536) -> Tensor:
    """(instances * categories, n, 3) in float16: the c-th of every `categories` is of category c."""
    count = categories * instances
    one = partial(instance, categories=categories, seed=seed, n=n)
    with multiprocessing.get_context("fork").Pool() as pool:
        made = pool.imap(one, range(count), chunksize=256)
        return torch.from_numpy(np.stack(list(tqdm(made, total=count, desc="clouds", mininterval=5))))


def augment(points: Tensor, random: torch.Generator, strength: float) -> Tensor:
    """(b, n, 3) on the unit sphere -> (b, POINTS, 3): each as another sensor would have seen another such thing.

    The more so and the more often, the nearer `strength` is to one.
    """
    b, n, _ = points.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=random)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(b, *shape, generator=random) < strength * share

    def normal(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=random)

    # Cut by a plane, thinned along a direction: the points with the greatest keys stay, again and again if too few.
    depth = torch.einsum("bnc,bc->bn", points, nn.functional.normalize(normal(3), dim=1))
    rank = depth.argsort(dim=1).argsort(dim=1) / n
    gone = rank < torch.where(chance(0.25), uniform(0.1, 0.5), 0.0)[:, None]
    thinned = torch.where(chance(0.3), uniform(0.5, 3), 0.0)[:, None] * rank
    gumbel = -(-torch.rand(b, n, generator=random).clamp_(1e-9, 1 - 1e-7).log()).log()
    order = (gumbel + thinned).masked_fill(gone, -math.inf).argsort(dim=1, descending=True)
    kept = torch.where(chance(0.3), uniform(0.1, 1), 1.0) * (n - gone.sum(dim=1))
    again = torch.arange(POINTS) % kept.long().clamp(max=POINTS)[:, None]
    points = geometry.gather(points, order.gather(1, again))
    points = points * uniform(1 - 0.2 * strength, 1 + 0.2 * strength, 1, 3) @ turns(0.15 * strength * normal(3))
    noise = torch.where(
        chance(0.5, 1, 1), uniform(0.0, 0.02, 1, 1), torch.where(chance(0.4), uniform(0, 0.1), 0.0)[:, None, None]
    )
    points = points + noise * normal(POINTS, 3)
    clutter = chance(0.2, 1) & (torch.rand(b, POINTS, generator=random) < uniform(0, 0.1, 1))
    points = torch.where(clutter[..., None], uniform(-1.2, 1.2, POINTS, 3), points)
    points = points - points.mean(dim=1, keepdim=True)
    points = points / points.square().sum(dim=2).amax(dim=1).sqrt()[:, None, None]
    elsewhere = chance(0.3, 1, 1)
    scale = torch.where(elsewhere, uniform(0.6, 1.2, 1, 1), 1.0)
    moved: Tensor = points * scale + torch.where(elsewhere, 0.1 * normal(1, 3), 0.0)
    return moved


def turns(vector: Tensor) -> Tensor:
    """Rotations (b, 3, 3) about vectors (b, 3) by their lengths in radians."""
    x, y, z = vector.unbind(dim=1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, dim=1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    turned: Tensor = torch.linalg.matrix_exp(torch.stack(rows, dim=1))
    return turned


def batches(clouds: Tensor, categories: int, size: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` augmented batches (size, POINTS, 3) and their categories (size,), two instances of each category.

    Augmented more and more: a fresh network finds nothing in common between two instances that differ in everything.
    The first half of a batch are instances of as many categories, the second half others of the same.
    """
    random = torch.Generator().manual_seed(seed)
    instances, half = len(clouds) // categories, size // 2
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < half:
            order = torch.randperm(categories, generator=random)
        category, order = order[:half].repeat(2), order[half:]
        first = torch.randint(instances, (half,), generator=random)
        second = (first + torch.randint(1, instances, (half,), generator=random)) % instances
        chosen = torch.cat([first, second]) * categories + category
        strength = WEAKEST + (STRONGEST - WEAKEST) * min(1, step / (STRONGEST_FROM * steps))
        yield augment(clouds[chosen].float(), random, strength), category


def contrast(alike: Tensor) -> Tensor:
    """Cross entropy of finding each cloud's partner, half a batch further, among all others, by likeness (b, b)."""
    b = len(alike)
    partner = (torch.arange(b) + b // 2) % b
    return nn.functional.cross_entropy(alike.masked_fill(torch.eye(b, dtype=torch.bool), -math.inf), partner)


# --- training ---


def pretrain(
    model: Pretraining, clouds: Tensor, *, told: bool, steps: int, batch_size: int, lr: float, seed: int
) -> list[tuple[float, float]]:
    """Train for `steps` steps on a cosine schedule; returns cross entropy and accuracy of each step."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    rng = np.random.default_rng(seed)
    course: list[tuple[float, float]] = []
    model.train()
    bar = tqdm(total=steps, desc="pre-training", mininterval=10)
    for step, (points, category) in enumerate(batches(clouds, len(model.directions), batch_size, seed, steps)):
        set_rate(optimizer, lr, step, steps)
        counts = MANY_GROUPS if step >= MANY_FROM * steps else FEW_GROUPS
        model.backbone.group_divider.num_group = int(rng.choice(counts))
        # The plain attention: in the backward pass of such short sequences the CPU's fused one is several times slower.
        with sdpa_kernel(SDPBackend.MATH):
            alike, logits, distance = model(points, masked=step % 2 == 1 or not told)
            entropy, pairs = nn.functional.cross_entropy(logits, category), contrast(alike)
            loss = pairs + 0.5 * entropy + CHAMFER_WEIGHT * distance if told else distance
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        course.append((entropy.item(), float((logits.argmax(dim=1) == category).float().mean())))
        bar.update()
        recent = np.mean(course[-100:], axis=0)
        bar.set_postfix(
            pairs=f"{pairs:.3f}",
            entropy=f"{recent[0]:.3f}",
            right=f"{recent[1]:.3f}",
            chamfer=f"{distance:.4f}",
            refresh=False,
        )
    bar.close()
    model.backbone.group_divider.num_group = CONFIG["num_group"]
    return course


def set_rate(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """The learning rate of a step: a cosine from `lr` to zero, after a warm-up of at most 100 steps."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / min(100, steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def export(backbone: PointTransformer, path: Path, notes: dict[str, Any]) -> None:
    """Write `path` (safetensors, float16, `notes` as metadata), and beside it the constructor's arguments as json."""
    tensors = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith("cls_head_")}
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(halves, path, metadata={name: str(value) for name, value in notes.items()})
    path.with_suffix(".json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, make the clouds, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, help="a file of the first stage, which is then left out")
    parser.add_argument("--first-steps", type=int, default=9000, help="steps with masked points alone")
    parser.add_argument("--steps", type=int, default=1500, help="steps with categories too")
    parser.add_argument("--categories", type=int, default=3000)
    parser.add_argument("--instances", type=int, default=6, help="clouds generated of each category")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the first stage; half of it in the second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("point_mae_small.safetensors"))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    start = time.monotonic()
    clouds = make_clouds(args.categories, args.instances, args.seed)
    model = Pretraining(PointTransformer(**CONFIG), args.categories)
    both: dict[str, Any] = {"batch_size": args.batch_size, "seed": args.seed}
    if args.start is None:
        pretrain(model, clouds, told=False, steps=args.first_steps, lr=args.lr, **both)
    else:
        load_checkpoint(model.backbone, args.start)
    course = pretrain(model, clouds, told=True, steps=args.steps, lr=args.lr / 2, **both)
    keys = ("start", "first_steps", "steps", "categories", "instances", "batch_size", "lr", "seed", "threads")
    export(model.backbone, args.out, {name: value for name, value in vars(args).items() if name in keys})
    entropy, right = np.mean(course[-100:], axis=0)
    print(
        f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {(time.monotonic() - start) / 60:.0f} minutes; of the "
        f"last clouds {100 * right:.1f} % told from {args.categories} categories, cross entropy {entropy:.3f}"
    )


if __name__ == "__main__":
    main()
