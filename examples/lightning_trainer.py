"""An adapter trained by the Trainer of Lightning, saved, and loaded into a fresh backbone.

    pip install lightning
    python -m examples.lightning_trainer

An adapted model is a module like any other, so that it stands in a LightningModule as it is. It trains on a small part
of the lifted digits, which ends within seconds and learns little; `--train 100000 --epochs 8` takes all, for minutes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft import PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.quickstart.data import Clouds, Split, load_digits_clouds
from point_peft.quickstart.training import predict

LR = 3e-3


class Classifier(lightning.LightningModule):
    """An adapted model, its loss and its optimizer."""

    def __init__(self, model: PointPeftModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Split, index: int) -> Tensor:
        """The loss of a batch, whose mean over an epoch is logged."""
        points, labels = batch
        loss = nn.functional.cross_entropy(self.model(points), labels)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Split, index: int) -> None:
        """Log the accuracy, from 0 to 1."""
        points, labels = batch
        right = (self.model(points).argmax(dim=1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(labels))

    def on_train_epoch_end(self) -> None:
        """Print a line, after the validation."""
        figures = self.trainer.callback_metrics
        print(
            f"epoch {self.current_epoch + 1}: loss {figures['loss']:.3f}, validation {100 * figures['accuracy']:.1f} %"
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, which decays weights only."""
        return torch.optim.AdamW(self.model.parameter_groups(LR))


def train(model: PointPeftModel, data: Clouds, epochs: int) -> None:
    """Train what is not frozen, validate after each epoch, and print a line for each."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it tells of devices that it has and has not
    warnings.filterwarnings("ignore", "Found .* in eval mode")  # as the normalisation of a frozen backbone has to be
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # the clouds are in memory
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=10.0,
    )  # fmt: skip
    trainer.fit(
        Classifier(model),
        DataLoader(TensorDataset(*data.train), batch_size=8, shuffle=True),
        DataLoader(TensorDataset(*data.val), batch_size=32),
    )


def main(argv: list[str] | None = None) -> None:
    """Train, test, save and load; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=96, help="at most so many training clouds")
    parser.add_argument("--test", type=int, default=32, help="at most so many clouds each to validate and to test")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/lightning_trainer"), help="the adapter's folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data = load_digits_clouds(n=512).subset(args.train, args.test, args.test)
    classes = len(data.class_names)

    model = get_peft_model(default_backbone(cls_dim=classes), PointPEFTConfig())
    model.print_trainable_parameters()
    train(model, data, args.epochs)
    logits = predict(model.cpu(), data.test[0])
    right = (logits.argmax(dim=1) == data.test[1]).float().mean()
    print(f"test: {100 * right:.1f} % of {len(logits)} clouds")

    # The adapter only: the backbone stays where it came from.
    model.save_pretrained(args.out)
    reloaded = PointPeftModel.from_pretrained(default_backbone(cls_dim=classes), args.out)
    if not torch.equal(predict(reloaded, data.test[0]), logits):
        raise SystemExit("the reloaded adapter answers otherwise than the trained one")
    size = sum(file.stat().st_size for file in args.out.iterdir() if file.is_file()) / 1e6
    print(f"{args.out}: {size:.2f} MB, loaded into a fresh backbone, whose logits are equal bit for bit")


if __name__ == "__main__":
    main()
