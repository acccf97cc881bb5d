"""One adapter as an ONNX file, for programs without Python.

    python -m examples.export
    python -m examples.export --method lora

The file takes any number of clouds at once. What onnxruntime computes from it is compared with the model. LoRA is
merged into the weights first, so that its file is no larger than the backbone's; other methods go along as they are,
Point-PEFT here with a memory bank. Clouds and adapters are random here: see quickstart.py for real ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft import LoraConfig, PointPEFTConfig, get_peft_model
from point_peft.backbones import default_backbone


def adapted(method: str, clouds: Tensor) -> nn.Module:
    """A backbone that `torch.onnx.export` can be given, with random values in place of trained ones."""
    config = LoraConfig(r=8, modules_to_save=[]) if method == "lora" else PointPEFTConfig(memory_bank=True)
    model = get_peft_model(default_backbone(cls_dim=10), config)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    if method == "lora":
        return model.merge_and_unload().eval()
    model.build_memory_bank([clouds])
    return model.eval()


def export(model: nn.Module, clouds: Tensor, file: Path) -> None:
    """Write a model, adapted or merged, as an ONNX file for any number of clouds."""
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")  # torch's own
    points = {0: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(model, (clouds,), dynamo=True, dynamic_shapes=(points,), verbose=False)
    if program is None:
        raise SystemExit("torch.onnx.export gave no program")
    program.save(file)


def main(argv: list[str] | None = None) -> None:
    """Export, then answer with the file and with the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("point_peft", "lora"), default="point_peft")
    parser.add_argument("--points", type=int, default=1024, help="points a cloud, which the file keeps to")
    args = parser.parse_args(argv)
    method = args.method
    torch.manual_seed(0)
    clouds = torch.rand(40, args.points, 3)
    model = adapted(method, clouds[:32])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / f"{method}.onnx"
        export(model, clouds[:2], file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        print(f"{file.name}: {sum(f.stat().st_size for f in file.parent.iterdir()) / 1e6:.1f} MB")
        for count in (1, 4):
            points = clouds[32 : 32 + count]
            (output,) = session.run(None, {session.get_inputs()[0].name: points.numpy()})
            difference = float((torch.from_numpy(output) - model(points)).abs().max())
            print(f"{count} at once: outputs {tuple(output.shape)}, at most {difference:.1e} from the model's")


if __name__ == "__main__":
    main()
