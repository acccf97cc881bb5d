"""An adapter goes to the Hugging Face Hub and comes back into a fresh backbone.

    hf auth login
    python -m examples.push_and_pull you/digits --private
    HF_ENDPOINT=http://127.0.0.1:8080 HF_TOKEN=… python -m examples.push_and_pull you/digits    # a Hub of your own

Only the adapter travels: its tensors, its configuration, and a card with its figures and how to load it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft import LoraConfig, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.quickstart.data import load_digits_clouds, take
from point_peft.quickstart.training import accuracy, predict


def main(argv: list[str] | None = None) -> None:
    """Train a little, push, pull; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="OWNER/NAME; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it a private one")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--test", type=int, default=100, help="clouds to test with")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits_clouds(n=512)
    test = take(digits.test, args.test)

    model = get_peft_model(default_backbone(cls_dim=10), LoraConfig(r=4))
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2))
    points, labels = digits.train
    for _ in range(args.steps):
        chosen = torch.randint(len(labels), (16,))
        loss = nn.functional.cross_entropy(model.train()(points[chosen]), labels[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    right = accuracy(model, test)
    print(f"trained: {right:.1f} % of {len(test[1])} test clouds")

    # One commit; the repository's other files, and what its owner wrote into the card, stay.
    commit = model.push_to_hub(
        args.repo,
        commit_message="A LoRA for handwritten digits as clouds",
        private=args.private or None,
        results={"lifted digits": {"accuracy": right}},
        datasets=["scikit-learn digits, lifted"],
        license="apache-2.0",
    )
    print(f"pushed: {commit}")

    # A commit is a revision: what it gives today it gives for ever. `swap_adapter_` would put it into a running model.
    revision = commit.rpartition("/")[2]
    pulled = PointPeftModel.from_pretrained(default_backbone(cls_dim=10), args.repo, revision=revision)
    if not torch.equal(predict(pulled, test[0]), predict(model, test[0])):
        raise SystemExit("what came back answers otherwise than what went")
    print("pulled into a fresh backbone: the answers are equal bit for bit")


if __name__ == "__main__":
    main()
