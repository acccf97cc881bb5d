"""A backbone of your own: the library finds out what it is made of, adapts it as it is, and leaves it as it was.

    python -m examples.own_backbone

The model below knows nothing of point_peft, and point_peft nothing of it. It learns to tell the digits 0 to 4 apart;
then it is frozen, and an adapter with a head of its own learns 5 to 9.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft import PointPEFTConfig, PointPeftModel, describe, get_peft_model
from point_peft.quickstart.data import Split, load_digits_clouds


class Layer(nn.Module):
    """Attention and a small network, as everybody writes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, g, c) -> (b, g, c)."""
        query, key, value = rearrange(self.mix(self.before(tokens)), "b g (three h c) -> three b h g c", three=3, h=4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.mixed(rearrange(mixed, "b h g c -> b g (h c)"))
        tokens = tokens + self.network(self.between(tokens))
        return tokens


class PatchNet(nn.Module):
    """Every eighth point with the 16 nearest to it is a token; four layers; a head on the largest features."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.places = nn.Linear(3, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(4))
        self.answer = nn.Linear(width, classes)

    def forward(self, cloud: Tensor) -> Tensor:
        """(b, n, 3) -> (b, classes)."""
        centres = cloud[:, ::8]
        nearest = torch.cdist(centres, cloud).topk(16, largest=False).indices  # (b, g, k)
        patches = cloud[torch.arange(len(cloud))[:, None, None], nearest] - centres[:, :, None]
        tokens = self.patches(patches).amax(dim=2) + self.places(centres)
        for layer in self.layers:
            tokens = layer(tokens)
        answer: Tensor = self.answer(tokens.amax(dim=1))
        return answer


def train(model: nn.Module, split: Split, steps: int, lr: float) -> None:
    """Take so many steps with whatever requires a gradient."""
    points, labels = split
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (32,))
        loss = nn.functional.cross_entropy(model(points[chosen]), labels[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module, split: Split) -> Tensor:
    """The answers (m, classes) of a model in eval mode for all clouds of a split."""
    answers: Tensor = model.eval()(split[0])
    return answers


def right(answers: Tensor, split: Split) -> str:
    """The share of a split that is answered rightly, in words."""
    return f"{100 * float((answers.argmax(dim=1) == split[1]).float().mean()):.1f} % of {len(answers)} test clouds"


def between(first: int, last: int, split: Split) -> Split:
    """The clouds of some digits, which become the classes from 0 on."""
    points, labels = split
    own = (labels >= first) & (labels <= last)
    return points[own], labels[own] - first


def main(argv: list[str] | None = None) -> None:
    """Pre-train, describe, adapt, save, reload; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of each of the two trainings")
    parser.add_argument("--out", type=Path, default=Path("build/own_backbone"), help="the adapter's folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits_clouds(n=256)
    first, second = (between(digit, digit + 4, digits.test) for digit in (0, 5))

    # Somebody's weights.
    backbone = PatchNet(classes=5)
    train(backbone, between(0, 4, digits.train), args.steps, lr=2e-3)
    before, names = logits(backbone, first), list(backbone.state_dict())
    print(f"the backbone, trained on 0 to 4: {right(before, first)}")

    # What the library finds when it watches one forward of a few different clouds.
    example = second[0][:2]
    print(describe(backbone, example))

    # The same module, frozen, with an adapter and a head of its own.
    model = get_peft_model(backbone, PointPEFTConfig(), example_inputs=example, heads={"answer": nn.Linear(64, 5)})
    train(model, between(5, 9, digits.train), args.steps, lr=3e-3)
    after = logits(model, second)
    print(f"an adapter for 5 to 9: {right(after, second)}")
    with model.disable_adapter():
        if not torch.equal(logits(model, first), before) or list(backbone.state_dict()) != names:
            raise SystemExit("the backbone is not what it was")
    print("without it the backbone answers as before, bit for bit; the names of its tensors are as before")

    # What was found is in the adapter's file, so that nothing needs to be traced when it is loaded.
    model.save_pretrained(args.out)
    fresh = PatchNet(classes=5)
    fresh.load_state_dict(backbone.state_dict())
    if not torch.equal(logits(PointPeftModel.from_pretrained(fresh, args.out), second), after):
        raise SystemExit("the reloaded adapter answers otherwise than the trained one")
    print(f"{args.out}: saved, loaded into a fresh backbone: the answers are equal bit for bit")


if __name__ == "__main__":
    main()
