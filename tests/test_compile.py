"""`torch.compile(fullgraph=True)` sees the adapters as eager code does, and follows `set_adapter`."""

from __future__ import annotations

import pytest
import torch

from point_peft import METHODS, LoraConfig, PointPEFTConfig, get_peft_model
from tests.models import BACKBONES, clouds


def randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("prior", ["backbone", "stem"])
def test_point_peft_with_its_bank(prior):
    model, (points,) = get_peft_model(BACKBONES["point_mae"].build(), PointPEFTConfig(prior=prior)), clouds(3, 0)
    model.build_memory_bank([clouds(12, 1)[0]])
    randomise(model.adapters, 0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(points), model(points), atol=1e-5)


@pytest.mark.filterwarnings("ignore:the memory bank is empty")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_a_swap(method):
    model, (points,) = get_peft_model(BACKBONES["point_mae"].build(), METHODS[method]()), clouds(3, 0)
    model.add_adapter("other", LoraConfig(r=2))
    randomise(model.adapters, 0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            assert torch.allclose(compiled(points), model(points), atol=1e-5)
