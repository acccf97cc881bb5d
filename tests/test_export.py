"""`torch.export` and ONNX: outside of Python the adapted model computes the same, for any number of clouds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch.export import ExportedProgram

from point_peft import AdapterError, LoraConfig, PeftConfig, geometry, get_peft_model
from point_peft.geometry import farthest_point_sample
from tests.adapting import (
    METHOD_NAMES,
    ONE_BLOCK,
    adapt,
    add,
    assert_same_gradients,
    complete,
    distance,
    gradients,
    in_groups,
    loss_of,
    plain,
    without_search,
)
from tests.methods import config
from tests.zoo import BACKBONES, clouds

BACKBONE = without_search(BACKBONES["point_bert"])
"""With more than one block, because methods share and grow things from block to block."""
SIMPLE = without_search(ONE_BLOCK)
ON_MERGED = ("POINT_PEFT",)
"""A method that groups points and asks a bank, and one that looks for near features."""
ANY = {0: torch.export.Dim.DYNAMIC}


@pytest.fixture(autouse=True, scope="module")
def no_cache_of_shapes():
    """The exporter looks up the shapes that each operation gave before; where they are symbols that costs more."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


# Of the exporter itself.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")


def exported(model: nn.Module) -> ExportedProgram:
    """The model for any number of clouds, with every tensor that an adapter of it trains.

    The exported gradient of each of them is that of eager code, and not zero.
    """
    with torch.no_grad():
        program = torch.export.export(model, clouds(3, 6), dynamic_shapes=(ANY,))
    found = []
    for forward in (program.module(), model):  # which have their parameters in common
        model.zero_grad()
        output = forward(*clouds(2, 5))
        loss_of(output).backward()
        found.append((output.detach(), gradients(forward)))
    assert distance(found[0][0], found[1][0]) < 1e-5
    assert_same_gradients(found[0][1], found[1][1])
    assert sorted(found[1][1]) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return program


def outputs_of_onnx(program: ExportedProgram, file: Path, batches: tuple[int, ...]) -> list[Tensor]:
    """Outputs of onnxruntime for clouds of these numbers."""
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    made.save(file)
    onnx.checker.check_model(onnx.load(file))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (points,) = session.get_inputs()
    runs = [session.run(None, {points.name: clouds(batch, batch)[0].numpy()}) for batch in batches]
    return [torch.from_numpy(run[0]) for run in runs]


@in_groups([method for method in METHOD_NAMES if method not in ON_MERGED])
def test_every_method_is_exported_with_its_hooks(methods, monkeypatch):
    """But for two, that are exported below."""
    # What is searched for farthest points has a test of its own, and so has the loop in ONNX.
    monkeypatch.setattr(geometry, "farthest_point_sample", first_points)
    model = adapt(BACKBONE, PeftConfig(tuners=[config(method) for method in methods]))
    exported(model)
    assert distance(model(*clouds(2, 5)).detach(), plain(BACKBONE)) > 1e-3


def first_points(points: Tensor, count: int) -> Tensor:
    """As many points as `farthest_point_sample` gives, and no search."""
    return torch.arange(count).expand(points.shape[0], count)


def test_onnx_of_adapters_on_a_merged_lora(tmp_path):
    """A method on what LoRA merged into; farthest points are one loop of the graph."""
    model, batches = adapt(SIMPLE, LoraConfig(r=2, modules_to_save=[])), (1, 2, 5)
    with torch.no_grad():
        lora = model(*clouds(1, 1))
        merged = model.merge_and_unload()
        assert distance(merged(*clouds(1, 1)), lora) < 1e-4 < 1e-3 < distance(lora, SIMPLE.build()(*clouds(1, 1)))
        adapted = get_peft_model(merged, PeftConfig(tuners=[config(method) for method in ON_MERGED])).eval()
        complete(adapted, dataclasses.replace(SIMPLE, name="merged"), "default", seed=0, fresh=False)
        expected = [adapted(*clouds(batch, batch)) for batch in batches]
    found = outputs_of_onnx(exported(adapted), tmp_path / "model.onnx", batches)
    assert all(distance(output, wanted) < 1e-4 for output, wanted in zip(found, expected, strict=True))
    assert distance(found[0], lora) > 1e-3
    nodes = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Scan" in nodes


def test_what_is_exported_is_what_set_adapter_chose():
    """Of two methods that of which nothing is at a block; the backbone with its search for farthest points."""
    model = adapt(ONE_BLOCK, "LORA")
    add(model, ONE_BLOCK, "LINEAR_PROBE", "other")
    model.set_adapter("other")
    with torch.no_grad():
        program = torch.export.export(model, clouds(3, 5))
        other = model(*clouds(3, 5))
        model.set_adapter("default")
        assert distance(program.module()(*clouds(3, 5)), other) < 1e-5 < distance(model(*clouds(3, 5)), other)


def test_a_part_without_effect_is_found_when_it_is_traced():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, points: Tensor) -> Tensor:
            output: Tensor = self.used(points)
            return output

    model = get_peft_model(Idle(), LoraConfig(r=2, target_modules=["used", "idle"], modules_to_save=[]))
    with pytest.raises(AdapterError, match=r"at 'idle' had no effect"):
        torch.export.export(model, clouds(2, 0))


def test_farthest_points_of_an_exported_loop_are_the_same():
    class Sample(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return farthest_point_sample(points, 24)

    points = torch.randn(3, 64, 3, generator=torch.Generator().manual_seed(0))
    points[1] = points[1, torch.arange(64) % 20]  # fewer places than samples
    points[2] = points[2].mul(2).round()  # equal distances
    program = torch.export.export(Sample(), (points[:2],), dynamic_shapes=(ANY,))
    assert torch.equal(program.module()(points), farthest_point_sample(points, 24))
