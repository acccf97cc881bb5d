"""One adapter as an ONNX file, for programs without Python.

    python examples/export_onnx.py
    python examples/export_onnx.py --method lora

The file takes any number of clouds at once. What onnxruntime computes from it is compared with the model. LoRA is
merged into the weights first, so that its file is no larger than the backbone's; other methods go along as they are,
Point-PEFT with its memory bank and its second pass. The adapters are not trained here: see quickstart.py for that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a file, not with -m

from point_peft import LoraConfig, PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from tools.shapes import sample_shapes


def clouds(count: int, seed: int) -> Tensor:
    return torch.from_numpy(sample_shapes(count, seed=seed))


def adapted(method: str) -> nn.Module:
    """A backbone that `torch.onnx.export` can be given, with random values in place of trained ones."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, modules_to_save=[]) if method == "lora" else PointPEFTConfig()
    model = get_peft_model(default_backbone(cls_dim=10), config)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    if method == "lora":
        return model.merge_and_unload().eval()
    model.build_memory_bank([clouds(32, seed=1)])
    return model.eval()


def export(model: nn.Module, file: Path) -> None:
    """Write a model, adapted or merged, as an ONNX file for any number of clouds."""
    points = {0: torch.export.Dim.DYNAMIC}
    # The forward of an adapted model takes *args, which are one argument to the exporter.
    shapes = ((points,),) if isinstance(model, PointPeftModel) else (points,)
    program = torch.onnx.export(model, (clouds(2, seed=2),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("point_peft", "lora"), default="point_peft")
    method = parser.parse_args().method
    model = adapted(method)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / f"{method}.onnx"
        export(model, file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        print(f"{file.name}: {sum(f.stat().st_size for f in file.parent.iterdir()) / 1e6:.1f} MB")
        for count in (1, 4):
            points = clouds(count, seed=3 + count)
            (output,) = session.run(None, {session.get_inputs()[0].name: points.numpy()})
            difference = float((torch.from_numpy(output) - model(points)).abs().max())
            print(f"{count} clouds: outputs {tuple(output.shape)}, at most {difference:.1e} from the model's")


if __name__ == "__main__":
    main()
