"""Pre-train a small Point-MAE on procedural solids: the backbone that the package embeds.

    python -m tools.pretrain --steps 9000        # the same file for the same seed, thread count and machine
    python -m tools.pretrain --minutes 25        # as many steps as fit

A masked autoencoder: 60 % of the groups are hidden, the encoder sees the others, a shallow decoder sees those and a
mask token at every hidden place and predicts the points of the hidden groups; the loss is the Chamfer distance (L2).
The file holds the encoder under the official names in float16, without `cls_token`, `cls_pos` and the head, which
pre-training does not know.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from point_peft import geometry
from point_peft.backbones import PointTransformer
from point_peft.backbones.layers import TransformerEncoder
from tools.shapes import iterate_shapes, random_rotations

CONFIG: dict[str, Any] = {
    "trans_dim": 144,
    "depth": 6,
    "num_heads": 6,
    "num_group": 32,
    "group_size": 16,
    "encoder_dims": 144,
    "drop_path_rate": 0.1,
}
GROUP_COUNTS = (32, 48)  # one of them at every step, so that the backbone serves any of them


class MaskedAutoencoder(nn.Module):
    """A backbone as encoder, and a decoder of `depth` blocks that is thrown away afterwards."""

    def __init__(self, backbone: PointTransformer, depth: int = 2, num_heads: int = 6, mask_ratio: float = 0.6) -> None:
        super().__init__()
        width = backbone.trans_dim
        self.backbone = backbone
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.decoder_pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.decoder = TransformerEncoder(width, depth, num_heads, 0.1)
        self.decoder_norm = nn.LayerNorm(width)
        self.increase_dim = nn.Linear(width, 3 * backbone.group_divider.group_size)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, points: Tensor) -> Tensor:
        """The loss, a scalar, of clouds (b, n, 3)."""
        neighborhood, center = self.backbone.group_divider(points)
        b, g = center.shape[:2]
        shown = g - int(self.mask_ratio * g)
        order = torch.rand(b, g, device=points.device).argsort(dim=1)
        tokens = self.encode(pick(neighborhood, order[:, :shown]), pick(center, order[:, :shown]))
        tokens = torch.cat([tokens, repeat(self.mask_token, "c -> b m c", b=b, m=g - shown).to(tokens.dtype)], dim=1)
        decoder = self.decoder(tokens, self.decoder_pos_embed(pick(center, order)), (len(self.decoder.blocks) - 1,))[0]
        predicted = rearrange(self.increase_dim(self.decoder_norm(decoder[:, shown:])), "b m (k d) -> (b m) k d", d=3)
        return chamfer(predicted.float(), pick(neighborhood, order[:, shown:]).flatten(0, 1))

    def encode(self, neighborhood: Tensor, center: Tensor) -> Tensor:
        """Tokens (b, v, c) of the visible groups (b, v, k, 3) around `center` (b, v, 3); there is no class token."""
        backbone = self.backbone
        tokens = backbone.reduce_dim(backbone.encoder(neighborhood))
        tokens = backbone.blocks(tokens, backbone.pos_embed(center), (backbone.depth - 1,))[0]
        normed: Tensor = backbone.norm(tokens)
        return normed


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Rows (b, m, ...) of `values` (b, g, ...) chosen per sample by `index` (b, m)."""
    return geometry.gather(values.flatten(2), index).reshape(*index.shape, *values.shape[2:])


def chamfer(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over the groups of the two-way squared distance to the nearest point; both are (m, k, 3)."""
    distance = geometry.squared_distance(predicted, target)
    return distance.amin(dim=2).mean() + distance.amin(dim=1).mean()


def augment(points: Tensor, rng: np.random.Generator, keep: int = 1024) -> Tensor:
    """(b, n, 3) -> (b, keep, 3): a random subset, half of the clouds turned at random, stretched, unit sphere."""
    b, n, _ = points.shape
    points = points[:, torch.from_numpy(rng.permutation(n)[:keep])].float()
    turns = random_rotations(rng, b)
    turns[rng.random(b) < 0.5] = np.eye(3)
    stretch = turns * rng.uniform(2 / 3, 3 / 2, size=(b, 1, 3))
    points = points @ torch.from_numpy(stretch.astype(np.float32))
    points = points - points.mean(dim=1, keepdim=True)
    return points / points.square().sum(dim=2).amax(dim=1).sqrt()[:, None, None]


def batches(shapes: Tensor, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Augmented batches (size, 1024, 3) without end, each shape once per epoch."""
    while True:
        order = torch.from_numpy(rng.permutation(len(shapes)))
        for start in range(0, len(shapes) - size + 1, size):
            yield augment(shapes[order[start : start + size]], rng)


def pretrain(
    model: MaskedAutoencoder, shapes: Tensor, *, steps: int, minutes: float, batch_size: int, lr: float, seed: int
) -> list[float]:
    """Train for `steps` steps or `minutes`, whichever ends first, on a cosine schedule. Returns the losses."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    model.train()
    start = time.monotonic()
    bar = tqdm(total=steps, desc="pre-training", mininterval=5)
    for step, points in enumerate(batches(shapes, batch_size, rng)):
        done = max(step / steps, (time.monotonic() - start) / (60 * minutes) if minutes < math.inf else 0.0)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / min(200, steps)) * (0.5 + 0.5 * math.cos(math.pi * done))
        model.backbone.group_divider.num_group = int(rng.choice(GROUP_COUNTS))
        # The plain attention: in the backward pass of such short sequences the CPU's fused one is several times slower.
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()), sdpa_kernel(SDPBackend.MATH):
            loss = model(points)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
        bar.update()
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.5f}", refresh=False)
    bar.close()
    model.backbone.group_divider.num_group = CONFIG["num_group"]
    return losses


def fast_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 natively (then training is twice as fast)."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def export(backbone: PointTransformer, path: Path, notes: dict[str, Any]) -> None:
    """Write `path` (safetensors, float16, `notes` as metadata), and beside it the constructor's arguments as json."""
    own = ("cls_token", "cls_pos", "cls_head_finetune")
    tensors = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(own)}
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(halves, path, metadata={name: str(value) for name, value in notes.items()})
    path.with_suffix(".json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, make the shapes, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; not reproducible")
    parser.add_argument("--shapes", type=int, default=16000, help="how many solids to generate")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("point_mae_small.safetensors"))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    made = tqdm(iterate_shapes(args.shapes, 2048, args.seed), total=args.shapes, desc="solids", mininterval=5)
    shapes = torch.from_numpy(np.stack([cloud.astype(np.float16) for cloud in made]))
    model = MaskedAutoencoder(PointTransformer(**CONFIG))
    losses = pretrain(
        model, shapes, steps=args.steps, minutes=args.minutes, batch_size=args.batch_size, lr=args.lr, seed=args.seed
    )
    notes = {name: value for name, value in vars(args).items() if name in ("shapes", "batch_size", "lr", "seed")}
    export(model.backbone, args.out, {**notes, "steps": len(losses)})
    size, final = args.out.stat().st_size / 1e6, float(np.mean(losses[-100:]))
    print(f"{args.out}: {size:.2f} MB, {len(losses)} steps, loss {losses[0]:.4f} -> {final:.4f}")


if __name__ == "__main__":
    main()
