"""An adapter trained by the Trainer of transformers, saved, and loaded into a fresh backbone.

    pip install transformers
    python -m examples.transformers_trainer

An adapted model is a module like any other, so that all of the Trainer works with it. It trains on a small part of the
lifted digits, which ends within seconds and learns little; `--train 100000 --epochs 8` takes all, for minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft import PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.quickstart.data import Clouds, load_digits_clouds
from point_peft.quickstart.training import predict

LR = 3e-3


class CloudTrainer(Trainer):
    """The Trainer for models that take points and give logits; those that give their loss need none of its own."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The cross-entropy, and the logits where they are asked for."""
        logits = model(inputs["points"])
        loss = nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Samples as the Trainer's inputs: points (b, n, 3) and labels (b,)."""
    points, labels = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"points": points, "labels": labels}


def share_right(results: EvalPrediction) -> dict[str, float]:
    """The accuracy, from 0 to 1."""
    return {"accuracy": float((np.argmax(results.predictions, axis=1) == results.label_ids).mean())}


def train(model: PointPeftModel, data: Clouds, epochs: int, out: Path) -> None:
    """Train what is not frozen, validate after each epoch, and print a line for each."""
    arguments = TrainingArguments(
        output_dir=str(out), num_train_epochs=epochs, per_device_train_batch_size=8, per_device_eval_batch_size=32,
        eval_strategy="epoch", logging_strategy="epoch", save_strategy="no", warmup_steps=4, label_names=["labels"],
        report_to=[], disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = CloudTrainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=TensorDataset(*data.train),
        eval_dataset=TensorDataset(*data.val),
        compute_metrics=share_right,
        optimizers=(torch.optim.AdamW(model.parameter_groups(LR)), None),
    )
    trainer.remove_callback(PrinterCallback)  # it prints raw dictionaries
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"epoch {entry['epoch']:.0f}: loss {entry['loss']:.3f}", end="")
        if "eval_loss" in entry:
            print(f", validation {100 * entry['eval_accuracy']:.1f} %")


def main(argv: list[str] | None = None) -> None:
    """Train, test, save and load; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=96, help="at most so many training clouds")
    parser.add_argument("--test", type=int, default=32, help="at most so many clouds each to validate and to test")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/transformers_trainer"), help="the adapter's folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data = load_digits_clouds(n=512).subset(args.train, args.test, args.test)
    classes = len(data.class_names)

    model = get_peft_model(default_backbone(cls_dim=classes), PointPEFTConfig())
    model.print_trainable_parameters()
    train(model, data, args.epochs, args.out)
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
